"""What we write is read by stock libraries that know nothing of us, and what they write by us."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import seldom
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from spectral_diffusion.adapters.apply import put_adapters
from spectral_diffusion.adapters.formats.import_lora import import_lora
from spectral_diffusion.adapters.formats.lora import diffusers_name, kohya_name, kohya_tensors, names_of
from spectral_diffusion.adapters.formats.native import load_adapter, save_adapter
from spectral_diffusion.adapters.formats.reading import read_lora
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.files import read_tensors
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.linalg import Factors, balance, truncate
from spectral_diffusion.merging.export import ExportOptions, export, open_source, write_lora
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.models.architectures import build_meta
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.targets import find_targets
from spectral_diffusion.training.run import train_to_file

EVERYTHING = "attention+feed-forward+projection+conv"


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from conftest import make_photos

    folder = tmp_path_factory.mktemp("trained")
    out = {}
    for index, (name, method, targets) in enumerate(
        (("dog", "spectral-additive", EVERYTHING), ("mug", "lora", "attention"),
         ("hat", "spectral-rotation", "attention"), ("fog", "oft", "attention"))
    ):  # fmt: skip
        config = TrainConfig(
            concept=make_photos(folder / name, seed=index),
            output=folder / f"{name}.safetensors",
            rank=2,
            steps=3,
            base=str(tiny_base),
            method=method,
            target_modules=targets,
            learning_rate=3e-2,
            text_encoder_learning_rate=3e-2,
            device="cpu",
        )
        train_to_file(config)
        out[name] = config.output
    fuse_to_folder(
        FuseConfig(adapters=[out["dog"], out["mug"], out["hat"]], output=folder / "fused",
                   scales={"mug": 0.6, "hat.unet": 0.5}, device="cpu")
    )  # fmt: skip
    return {**out, "fused": folder / "fused"}


def stock(tiny_base: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    """Latents after 4 steps."""
    return pipe(
        prompt, num_inference_steps=4, guidance_scale=3.0, width=16, height=16, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


def reference(tiny_base: Path, path: Path) -> StableDiffusionPipeline:
    base = load_base(str(path) if path.is_dir() else str(tiny_base), "cpu")
    if path.is_file():
        put_adapters(base, [(load_adapter(path), 1.0)])
    base.pipeline.set_progress_bar_config(disable=True)
    return base.pipeline


@pytest.mark.parametrize("name", seldom(["dog", "mug", "hat", "fused"], {"dog", "fused"}))
@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_stock_diffusers_draws_what_we_draw(
    trained: dict[str, Path], tiny_base: Path, tmp_path: Path, name: str, kind: str
) -> None:
    files = export(trained[name], tmp_path / "out.safetensors", kind, ExportOptions(dtype="float32"))
    pipe = stock(tiny_base)
    words = {"dog": "<dog>", "mug": "<mug>", "hat": "<hat>", "fused": "<dog> and <mug> and <hat>"}[name]
    prompt = f"a photo of {words}"
    for file in files:
        if re.search(r"\.(dog|mug|hat)\.safetensors$", file.name):
            pipe.load_textual_inversion(str(file))
    plain = draw(pipe, prompt)
    pipe.load_lora_weights(str(files[0]))
    theirs = draw(pipe, prompt)
    mine = draw(reference(tiny_base, trained[name]), prompt)
    effect = float((mine - plain).norm())
    assert effect > 1e-3 and float((theirs - mine).norm()) <= 1e-3 * effect


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_one_forward_in_float64_is_exact(trained: dict[str, Path], tiny_base: Path, tmp_path: Path, kind: str) -> None:
    export(trained["dog"], tmp_path / "out.safetensors", kind, ExportOptions(dtype="float32"))
    pipe = stock(tiny_base)
    pipe.load_lora_weights(str(tmp_path / "out.safetensors"))
    base = load_base(str(tiny_base), "cpu")
    put_adapters(base, [(load_adapter(trained["dog"]), 1.0)])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(1, 32, 24, generator=generator, dtype=torch.float64)
    outputs = [unet.double()(latents, 10, text).sample for unet in (pipe.unet, base.pipeline.unet)]
    assert float((outputs[0] - outputs[1]).abs().max()) <= 1e-6


def test_half_precision_files_lose_little(trained: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    export(trained["dog"], tmp_path / "half.safetensors", "kohya")
    adapter = load_adapter(trained["dog"])
    layers = find_targets(load_base(str(tiny_base), "cpu").models, EVERYTHING)
    found = read_lora(tmp_path / "half.safetensors", layers)
    assert set(found.factors) == set(adapter.layers) and found.kernels == adapter.kernels and found.kernels
    for layer, factors in found.factors.items():
        exact = adapter.factors(layer).delta()
        assert float((factors.delta() - exact).norm() / exact.norm()) < 2e-3


def test_fused_folder_and_checkpoint_open_in_stock_diffusers(
    trained: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    prompt = "a photo of <dog> and <hat>"
    mine = draw(reference(tiny_base, trained["fused"]), prompt)
    export(trained["fused"], tmp_path / "folder", "folder")
    assert torch.equal(draw(stock(tmp_path / "folder"), prompt), mine)
    assert "`<dog>`" in (tmp_path / "folder" / "README.md").read_text()
    files = export(trained["fused"], tmp_path / "single.safetensors", "checkpoint")
    pipe = StableDiffusionPipeline.from_single_file(str(files[0]), config=str(tiny_base))
    pipe.set_progress_bar_config(disable=True)
    for file in files[1:]:
        if file.suffix == ".safetensors":
            pipe.load_textual_inversion(str(file))
    assert float((draw(pipe, prompt) - mine).abs().max()) <= 1e-5


def test_a_method_of_full_rank_goes_out_with_its_error_told(
    trained: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    export(
        trained["fog"], tmp_path / "near.safetensors", "kohya", ExportOptions(rank=3), hooks=Hooks(notify=notes.append)
    )
    told = float(re.search(r"is (\S+)% away", notes[-1])[1]) / 100  # type: ignore[index]
    weights = load_base(str(tiny_base), "cpu").weights()
    adapter = load_adapter(trained["fog"])
    found = read_lora(tmp_path / "near.safetensors", weights).factors
    lost = whole = 0.0
    for layer, factors in found.items():
        exact = adapter.factors(layer, weights[layer]).delta()
        lost, whole = lost + float((factors.delta() - exact).square().sum()), whole + float(exact.square().sum())
    assert (lost / whole) ** 0.5 == pytest.approx(told, abs=2e-3) and told > 0.01
    export(trained["fog"], tmp_path / "exact.safetensors", "checkpoint")
    pipe = StableDiffusionPipeline.from_single_file(str(tmp_path / "exact.safetensors"), config=str(tiny_base))
    layer = adapter.layers[-1]
    weight = pipe.unet.get_submodule(layer.removeprefix("unet.")).weight
    assert torch.allclose(weight - weights[layer], adapter.factors(layer, weights[layer]).delta(), atol=1e-5)


@pytest.mark.parametrize("kind", ["kohya", "diffusers", "comfyui"])
def test_layers_without_a_rank_are_left_out(trained: dict[str, Path], tmp_path: Path, kind: str) -> None:
    adapter = load_adapter(trained["mug"])
    pruned = adapter.layers[0]

    def factors() -> dict[str, Factors]:
        own = {layer: adapter.factors(layer) for layer in adapter.layers}
        return {**own, pruned: Factors(own[pruned].up[:, :0], own[pruned].down[:0])}

    source = replace(open_source(trained["mug"]), factors=factors)
    output = tmp_path / "mug.safetensors"
    write_lora(source, output, kind, ExportOptions(), Hooks())
    weights = {layer: torch.zeros(adapter.sizes[layer]) for layer in adapter.layers}
    assert read_lora(output, weights).factors.keys() == set(adapter.layers) - {pruned}
    empty = replace(source, factors=lambda: {pruned: factors()[pruned]})
    with pytest.raises(UserError, match="changes no weight"):
        write_lora(empty, tmp_path / "none.safetensors", kind, ExportOptions(), Hooks())


def test_metadata_and_card(trained: dict[str, Path], tmp_path: Path) -> None:
    picture = tmp_path / "sample.png"
    files = export(trained["fused"], tmp_path / "three.safetensors", "kohya", ExportOptions(picture=picture))
    again = export(trained["fused"], tmp_path / "again.safetensors", "kohya")
    tensors, metadata = read_tensors(files[0])
    assert metadata == read_tensors(again[0])[1]  # no timestamps
    import hashlib

    data = files[0].read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1" and metadata["modelspec.merged_from"] == "dog, hat, mug"
    assert metadata["modelspec.trigger_phrase"] == "<dog>, <hat>, <mug>"
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["ss_network_module"] == "networks.lora"
    assert json.loads(metadata["spectral.recipe"])["merge"] == "spectral"
    alphas = {float(tensors[name]) for name in tensors if name.endswith("alpha")}
    assert alphas == {8.0}  # 2 · 2 of the dog, 2 of the mug, 2 of the hat, where all three act
    text = files[-1].read_text()
    for part in (
        "base_model:",
        "`<dog>`",
        "sample.png",
        "merge",
        "License",
        "Consent",
        "1 thread",
        "| mixed precision | no |",
    ):
        assert part in text


def test_nothing_that_is_there_is_lost(trained: dict[str, Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo.txt").write_text("keep me")
    (tmp_path / "notes.md").write_text("my own notes")
    copy = tmp_path / "mug.safetensors"
    copy.write_bytes(trained["mug"].read_bytes())
    for source, output, kind in (
        (trained["dog"], mine, "folder"),
        (trained["fused"], trained["fused"], "folder"),
        (trained["fused"], trained["fused"] / "inside", "folder"),
        (trained["dog"], trained["dog"], "kohya"),
        (trained["dog"], copy, "kohya"),
        (trained["dog"], tmp_path / "notes.safetensors", "kohya"),
    ):
        with pytest.raises(UserError, match="to write elsewhere"):
            export(source, output, kind)
    assert (mine / "photo.txt").read_text() == "keep me" and (tmp_path / "notes.md").read_text() == "my own notes"
    for _ in range(2):  # an earlier export may be written again
        export(trained["dog"], tmp_path / "out", "folder")
        export(trained["dog"], tmp_path / "out.safetensors", "kohya")


def test_folders_and_files_of_others_are_not_replaced(
    trained: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    project, earlier, web = tmp_path / "project", tmp_path / "earlier", tmp_path / "web.safetensors"
    project.mkdir()
    (project / "README.md").write_text("# My project")
    export(trained["dog"], earlier, "folder")
    (earlier / "notes.txt").write_text("mine")
    save_file({"lora_unet_x.alpha": torch.ones(1)}, web)
    (tmp_path / "words.dog.safetensors").write_bytes(trained["mug"].read_bytes())
    base = shutil.copytree(tiny_base, tmp_path / "based" / "base")
    card = (earlier / "README.md").read_text()
    (base / "README.md").write_text(card)  # such as a base that came out of an export
    adapter = load_adapter(trained["dog"])
    save_adapter(replace(adapter, base=str(base)), tmp_path / "based.safetensors")
    for source, output, kind, what in (
        ("dog", project, "folder", "is no earlier export"),
        ("dog", earlier, "folder", "holds notes.txt"),
        ("dog", web, "checkpoint", "is no earlier export"),
        ("dog", web, "kohya", "is no earlier export"),
        ("fused", tmp_path / "words.safetensors", "embedding", r"words\.dog\.safetensors is no earlier export"),
        ("dog", tmp_path / "words.safetensors", "kohya", r"words\.dog\.safetensors is no earlier export"),
    ):
        with pytest.raises(UserError, match=f"{what}.*to write elsewhere"):
            export(trained[source], output, kind)
    with pytest.raises(UserError, match=r"or its base\. Use output=… to write elsewhere"):
        export(tmp_path / "based.safetensors", base, "folder")
    assert (project / "README.md").read_text() == "# My project" and (earlier / "notes.txt").exists()
    assert (base / "unet").is_dir() and list(load_file(web)) == ["lora_unet_x.alpha"]
    assert load_adapter(tmp_path / "words.dog.safetensors").name == "mug"


def test_every_token_has_its_embedding_file(trained: dict[str, Path], tmp_path: Path) -> None:
    [one] = export(trained["dog"], tmp_path / "dog-word.safetensors", "embedding")
    assert torch.equal(load_file(one)["<dog>"], load_adapter(trained["dog"]).vectors["text_encoder"])
    many = export(trained["fused"], tmp_path / "words.safetensors", "embedding")
    assert [file.name for file in many] == [f"words.{name}.safetensors" for name in ("dog", "hat", "mug")]


def test_kohya_keys_of_stable_diffusion_are_those_that_diffusers_knows() -> None:
    """The installed diffusers turns every key that we write at SD 1.5 size into exactly the layer it came from."""
    models = build_meta("sd15")
    layers = find_targets(models, EVERYTHING)
    tiny = {
        layer: Factors(torch.zeros(module.weight.shape[0], 1), torch.zeros(1, module.weight[0].numel()))
        for layer, module in layers.items()
    }
    kernels = {n: tuple(m.weight.shape[1:]) for n, m in layers.items() if isinstance(m, nn.Conv2d)}
    state = kohya_tensors(tiny, kernels, torch.float32)  # type: ignore[arg-type]
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(state)
    unet = convert_unet_state_dict_to_peft({k: v for k, v in converted.items() if k.startswith("unet.")})
    found = {re.sub(r"\.lora_[AB]\.weight$", "", key) for key in unet}
    assert found == {layer for layer in layers if layer.startswith("unet.")}
    text = [key for key in converted if key.startswith("text_encoder.")]
    assert len(text) == 2 * sum(layer.startswith("text_encoder.") for layer in layers) and len(alphas) == len(layers)


def test_spellings_are_distinct_at_full_size() -> None:
    for arch, count in (("sd15", 4), ("sdxl", 5)):
        layers = list(find_targets(build_meta(arch), EVERYTHING))
        xl = arch == "sdxl"
        assert len({kohya_name(layer, xl) for layer in layers}) == len(layers)
        assert set(names_of(layers).values()) == set(layers) and count
    assert kohya_name("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", True) == (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    )
    assert kohya_name("text_encoder_2.text_projection", True) == "lora_te2_text_projection"
    assert diffusers_name("text_encoder_2.text_projection") == "text_encoder_2.text_projection"
    assert kohya_name("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", True) == (
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    )


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_imported_files_are_the_adapters_they_were(
    trained: dict[str, Path], tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    export(trained["dog"], tmp_path / "web.safetensors", kind, ExportOptions(dtype="float32"))
    adapter = import_lora(tmp_path / "web.safetensors", tmp_path / "in.safetensors", str(tiny_base), device="cpu")
    original = load_adapter(trained["dog"])
    for layer in original.layers:
        assert torch.allclose(adapter.factors(layer).delta(), original.factors(layer).delta(), atol=1e-6)
    assert load_adapter(tmp_path / "in.safetensors").tokens == {}
    # a file from the web fuses as it is, beside our own
    fuse_to_folder(
        FuseConfig(adapters=[trained["hat"], tmp_path / "web.safetensors"], output=tmp_path / "mixed", device="cpu")
    )
    plain, fused = load_base(str(tiny_base), "cpu").weights(), load_base(str(tmp_path / "mixed"), "cpu").weights()
    hat = load_adapter(trained["hat"])
    for layer in hat.layers:
        wanted = hat.factors(layer).delta() + original.factors(layer).delta()
        assert torch.allclose(fused[layer] - plain[layer], wanted, atol=1e-5)


def test_an_import_writes_over_nothing_but_an_import(trained: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    web, mine = tmp_path / "web.safetensors", tmp_path / "mug.safetensors"
    export(trained["mug"], web, "kohya", ExportOptions(dtype="float32"))
    mine.write_bytes(trained["mug"].read_bytes())
    for output in (web, mine, tmp_path / "words.txt", tmp_path):
        with pytest.raises(UserError, match=r"to write elsewhere|must end in \.safetensors"):
            import_lora(web, output, str(tiny_base), device="cpu")
    assert load_adapter(mine).token and any("lora_up" in name for name in load_file(web))
    for _ in range(2):
        import_lora(web, tmp_path / "in.safetensors", str(tiny_base), device="cpu")


@pytest.mark.parametrize("rooted", [False, True])
def test_alpha_in_the_config_of_diffusers_files_is_multiplied_in(tiny_base: Path, tmp_path: Path, rooted: bool) -> None:
    """A stock training's file; the oracle is what the stock pipeline does with it."""
    torch.manual_seed(0)
    trainer, pipe = stock(tiny_base), stock(tiny_base)
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=rooted, alpha_pattern={"attn2.to_k": 2}, target_modules=["to_q", "to_k"],
        init_lora_weights=False,
    )  # fmt: skip
    trainer.unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(trainer.unet), weight_name="web.safetensors",
        unet_lora_adapter_metadata=trainer.unet.peft_config["default"].to_dict(),
    )  # fmt: skip
    adapter = import_lora(tmp_path / "web.safetensors", None, str(tiny_base), device="cpu")
    before = {name: module.weight.clone() for name, module in find_targets({"unet": pipe.unet}).items()}
    pipe.load_lora_weights(tmp_path, weight_name="web.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = {name: module.weight for name, module in find_targets({"unet": pipe.unet}).items()}
    assert len(adapter.layers) == len(before) // 2
    for layer in adapter.layers:
        assert torch.allclose(adapter.factors(layer).delta(), after[layer] - before[layer], atol=1e-5), layer
    data, metadata = read_tensors(tmp_path / "web.safetensors")
    save_file(data, tmp_path / "bad.safetensors", {**metadata, "lora_adapter_metadata": "[1"})
    with pytest.raises(UserError, match="lora_adapter_metadata cannot be read"):
        import_lora(tmp_path / "bad.safetensors", None, str(tiny_base), device="cpu")


@pytest.mark.parametrize("extra", ["lora_unet_conv_out.w_norm", "unet.conv_out.lora_B.bias", "bundle_emb.rex.x"])
def test_what_is_more_than_a_lora_is_not_taken_for_one(
    trained: dict[str, Path], tiny_base: Path, tmp_path: Path, extra: str
) -> None:
    export(trained["mug"], tmp_path / "web.safetensors", "kohya")
    save_file({**load_file(tmp_path / "web.safetensors"), extra: torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=f"no plain LoRA .it holds {extra}"):
        import_lora(tmp_path / "more.safetensors", None, str(tiny_base), device="cpu")


def test_a_full_disk_is_told_in_a_sentence(trained: dict[str, Path], tmp_path: Path) -> None:
    adapter = load_adapter(trained["dog"])
    with pytest.raises(UserError, match=r"Cannot write .*dog\.safetensors: .*No space left"), full_disk():
        save_adapter(adapter, tmp_path / "dog.safetensors")
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk() -> Iterator[None]:
    def fail(*args: object, **more: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        yield


def test_alpha_of_foreign_files_is_multiplied_in(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    layer, module = next(iter(find_targets(base.models).items()))
    up, down = torch.randn(module.weight.shape[0], 4), torch.randn(4, module.weight.shape[1])
    name = kohya_name(layer)
    save_file(
        {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)},
        tmp_path / "a.safetensors",
    )
    adapter = import_lora(tmp_path / "a.safetensors", None, "", base=base)
    assert torch.allclose(adapter.factors(layer).delta(), 0.5 * up @ down, atol=1e-5)


def test_balance_and_truncate() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = Factors(
        1e-4 * torch.randn(9, 4, generator=generator, dtype=torch.float64),
        1e3 * torch.randn(4, 7, generator=generator, dtype=torch.float64),
    )
    even = balance(factors)
    assert torch.allclose(even.delta(), factors.delta()) and torch.allclose(even.up.norm(dim=0), even.down.norm(dim=1))
    zero = balance(Factors(torch.zeros(3, 2), torch.ones(2, 3)))
    assert torch.equal(zero.delta(), torch.zeros(3, 3))
    U, S, Vh = torch.linalg.svd(factors.delta())
    assert torch.allclose(truncate(factors, 2).delta(), (U[:, :2] * S[:2]) @ Vh[:2])
    assert torch.allclose(truncate(factors, 99).delta(), factors.delta())


def mutants(tensors: dict[str, torch.Tensor], count: int) -> list[tuple[str, Callable[[dict], None]]]:
    """Ways to spoil a LoRA file."""
    draw = random.Random(0)
    names = sorted(tensors)
    out = []
    for index in range(count):
        name = draw.choice([n for n in names if not n.endswith("alpha")])
        other = name.replace("lora_up", "lora_down") if "lora_up" in name else name.replace("lora_down", "lora_up")
        kind = index % 9
        changes: list[tuple[str, Callable[[dict], None]]] = [
            ("nan", lambda t, n=name: t[n].reshape(-1)[:1].fill_(float("nan"))),
            ("missing", lambda t, n=name: t.pop(n)),
            ("size", lambda t, n=name: t.update({n: torch.zeros(3, 5, 7)})),
            ("rank", lambda t, n=name, o=other: t.update({n: torch.zeros(77, 3), o: torch.zeros(5, 9)})),
            ("foreign", lambda t, n=name: t.update({f"lora_unet_nowhere_{n[10:]}": t.pop(n)})),
            ("hada", lambda t, n=name: t.update({f"{n.split('.')[0]}.hada_w1_a": t.pop(n)})),
            ("empty", lambda t: t.clear()),
            ("alpha", lambda t, n=name: t.update({f"{n.split('.')[0]}.alpha": torch.zeros(3)})),
            ("infinite", lambda t, n=name: t.update({f"{n.split('.')[0]}.alpha": torch.tensor(float("inf"))})),
        ]
        out.append(changes[kind])
    return out


def test_spoilt_foreign_files_get_a_sentence_each(trained: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    export(trained["mug"], tmp_path / "good.safetensors", "kohya", ExportOptions(dtype="float32"))
    good = load_file(tmp_path / "good.safetensors")
    base = load_base(str(tiny_base), "cpu")
    path = tmp_path / "bad.safetensors"
    for kind, change in mutants(good, 120):
        tensors = {name: value.clone() for name, value in good.items()}
        change(tensors)
        save_file(tensors or {"x": torch.zeros(1)}, path)
        with pytest.raises(UserError) as told:
            import_lora(path, None, "", base=base)
        assert str(path) in str(told.value) and "\n" not in str(told.value), kind
    data = (tmp_path / "good.safetensors").read_bytes()
    draw_byte = random.Random(1)
    refused = 0
    for _ in range(60):
        spoilt = bytearray(data)
        for _ in range(8):
            spoilt[draw_byte.randrange(min(len(data), 4000))] = draw_byte.randrange(256)
        path.write_bytes(bytes(spoilt))
        try:
            import_lora(path, None, "", base=base)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 45  # a byte in a tensor's value is a value
