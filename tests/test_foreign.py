"""Other programs' LoRAs: every spelling is read as its own program reads it, or refused with a true sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spectral_diffusion.adapters.formats.import_lora import distinct, import_lora, name_of
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.cli import app
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.merging.fuse import check_together, fuse_to_folder
from spectral_diffusion.merging.manifest import adapters_in_fusion, read_manifest
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.targets import find_targets
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.scenes.png_metadata import read_sources

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def pair(out: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Down (2, n) and up (n, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, out, generator=generator), torch.randn(out, 2, generator=generator)


def write(path: Path, names: dict[str, int], endings: tuple[str, str]) -> Path:
    """A LoRA file with a pair of factors under every name, of these widths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, width in names.items():
        tensors |= {f"{name}{ending}": value for ending, value in zip(endings, pair(width), strict=True)}
    save_file(tensors, path)
    return path


def web(path: Path) -> Path:
    """A small LoRA in kohya's spelling."""
    return write(path, {KOHYA: 16}, (".lora_down.weight", ".lora_up.weight"))


def changes(pipe: StableDiffusionPipeline, path: Path) -> dict[str, torch.Tensor]:
    """What the stock pipeline makes of a LoRA file, by layer."""
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    before = {name: layer.weight.detach().clone() for name, layer in find_targets(models).items()}
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = {name: layer.weight.detach() - before[name] for name, layer in find_targets(models).items()}
    return {name: delta for name, delta in after.items() if delta.any()}


@pytest.mark.parametrize("texts", ["q_proj.lora_linear_layer", "to_q_lora"])
def test_diffusers_old_spellings_are_read_as_diffusers_reads_them(tiny_base: Path, tmp_path: Path, texts: str) -> None:
    names = {f"unet.{UNET}.processor.to_q_lora": 16, f"unet.{UNET}.processor.to_out_lora": 16, f"{TEXT}.{texts}": 24}
    old = write(tmp_path / "old.safetensors", names, (".down.weight", ".up.weight"))
    adapter = import_lora(old, None, str(tiny_base), device="cpu")
    if texts == "to_q_lora":  # which the present diffusers tells from its file's other keys
        assert {name for name in adapter.layers if name.startswith("text")} == {
            name for name in find_targets(load_base(str(tiny_base), "cpu").models) if "q_proj" in name
        }
        return
    wanted = changes(StableDiffusionPipeline.from_pretrained(tiny_base), old)
    assert set(adapter.layers) == set(wanted) and len(wanted) == 3
    for layer, delta in wanted.items():
        assert torch.allclose(adapter.factors(layer).delta(), delta, atol=1e-5)


def test_a_unets_own_keys_need_no_prefix(tiny_base: Path, tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.safetensors", {f"{UNET}.processor.to_q_lora": 16}, (".down.weight", ".up.weight"))
    adapter = import_lora(bare, None, str(tiny_base), device="cpu")
    down, up = pair(16)
    assert adapter.layers == [f"unet.{UNET}.to_q"]
    assert torch.allclose(adapter.factors(adapter.layers[0]).delta(), up @ down, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_a_unets_saved_adapter_is_scaled_by_its_alpha(tiny_base: Path, tmp_path: Path, whole: bool) -> None:
    """``save_lora_adapter`` writes keys and metadata without a prefix; a folder stands for the file inside."""
    torch.manual_seed(0)
    unet = StableDiffusionPipeline.from_pretrained(tiny_base).unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path)
    path = tmp_path if whole else tmp_path / "pytorch_lora_weights.safetensors"
    adapter = import_lora(path, None, str(tiny_base), device="cpu")
    layer = unet.get_submodule(f"{UNET}.to_q")
    assert torch.allclose(adapter.factors(f"unet.{UNET}.to_q").delta(), layer.get_delta_weight("default"), atol=1e-5)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("rooted", [False, True])
def test_a_peft_folder_is_read_with_its_config(tiny_base: Path, tmp_path: Path, part: str, rooted: bool) -> None:
    torch.manual_seed(0)
    target = "to_k" if part == "unet" else "q_proj"
    model = getattr(StableDiffusionPipeline.from_pretrained(tiny_base), part)
    config = LoraConfig(
        r=2, lora_alpha=4, use_rslora=rooted, alpha_pattern={"attn2.to_k": 1}, target_modules=[target],
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "rex")
    adapter = import_lora(tmp_path / "rex", None, str(tiny_base), device="cpu")
    assert adapter.name == "rex" and all(layer.startswith(f"{part}.") for layer in adapter.layers)
    for layer in adapter.layers:
        wanted = model.get_submodule(f"base_model.model.{layer.partition('.')[2]}").get_delta_weight("default")
        assert torch.allclose(adapter.factors(layer).delta(), wanted, atol=1e-5), layer
    file, settings = tmp_path / "rex" / "adapter_model.safetensors", tmp_path / "rex" / "adapter_config.json"
    kept = json.loads(settings.read_text())
    for change, message in (
        ({"peft_type": "LOHA"}, "PEFT adapter of the kind LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, r"only a base without its start \(pissa_niter_4\)"),
        ({"lora_alpha": "x"}, "cannot be read"),
    ):
        settings.write_text(json.dumps({**kept, **change}))
        with pytest.raises(UserError, match=message):
            import_lora(file, None, str(tiny_base), device="cpu")
    settings.unlink()
    with pytest.raises(UserError, match=r"its alpha is in adapter_config.json; put that file beside it"):
        import_lora(file, None, str(tiny_base), device="cpu")


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", {}, r"a LoRA for Flux or SD3 \(transformer\.\), but this"),
        ("lora_unet_double_blocks_0_img_attn_qkv", {}, "a LoRA for Flux, but this base is a Stable Diffusion"),
        ("lora_unet_blocks_0_self_attn_q", {"modelspec.architecture": "wan2.1/lora"}, "a LoRA for wan2.1, but"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", {}, "a LoRA for Stable Diffusion 3, but"),
        (
            "model.layers.0.self_attn.q_proj",
            {},
            "another kind of network: this base has no layer model.layers",
        ),
        (
            "lora_te2_text_model_encoder_layers_9_mlp_fc1",
            {},
            r"another base \(Stable Diffusion XL\).*base=…",
        ),
        (f"{KOHYA}_nowhere", {}, "is a LoRA for another base: 1 of its 1 layers"),
    ],
)
def test_a_lora_for_something_else_is_called_that(
    tiny_base: Path, tmp_path: Path, name: str, metadata: dict[str, str], message: str
) -> None:
    down, up = pair(16)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match=message):
        import_lora(tmp_path / "x.safetensors", None, str(tiny_base), device="cpu")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer.*git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "a pickle, which can run code and is not opened; convert it"),
        (b"\x80\x02}q\x00." + bytes(60), "a pickle"),
        (b"<!DOCTYPE html><html></html>", "a web page; download the file again"),
        (b'{"error": "Unauthorized"}', "a text, perhaps a server's error"),
        (
            b"<" + bytes(7) + b'{"__metadata__": 5',
            "is not a readable safetensors file .Error|is no adapter or weights: their files end in",
        ),
    ],
)
def test_what_is_no_safetensors_file_is_called_what_it_is(
    tiny_base: Path, tmp_path: Path, data: bytes, message: str
) -> None:
    for name in ("x.safetensors", "pytorch_lora_weights.bin"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            import_lora(tmp_path / name, None, str(tiny_base), device="cpu")
        with pytest.raises(UserError, match=message):
            fuse_to_folder(FuseConfig(adapters=[tmp_path / name], output=tmp_path / "out", base=str(tiny_base)))


def test_a_header_that_begins_like_a_web_page_is_a_header(tmp_path: Path) -> None:
    for length in range(1, 200):  # of a name, so that headers have every length
        save_file({"x" * length: torch.zeros(1)}, tmp_path / "x.safetensors")
        if (tmp_path / "x.safetensors").read_bytes()[:1] in (b"<", b"{", b"\x80"):
            with pytest.raises(
                UserError, match="not an adapter of this program; another program's LoRA becomes one by"
            ):
                load_adapter(tmp_path / "x.safetensors")
            return
    pytest.fail("no header of such a length")


def test_a_bundled_embedding_becomes_a_token(tiny_base: Path, tmp_path: Path) -> None:
    file = web(tmp_path / "bundle.safetensors")
    rows = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    save_file(
        {**load_file(file), "bundle_emb.my rex_1.clip_l": rows, "bundle_emb.fido.string_to_param.*": rows[:1].clone()},
        file,
    )
    import_lora(file, tmp_path / "in.safetensors", str(tiny_base), device="cpu")
    adapter = load_adapter(tmp_path / "in.safetensors")
    assert set(adapter.tokens) == {"<my-rex-1>", "<fido>"}
    assert torch.equal(adapter.tokens["<my-rex-1>"]["text_encoder"], rows)
    scene = Scene(
        prompt="<fido>",
        base=str(tiny_base),
        adapters={str(file): 1.0},
        num_inference_steps=1,
        output=tmp_path / "a.png",
    )
    notes: list[str] = []
    generate_to_file(scene.model_copy(update={"device": "cpu"}), hooks=Hooks(notify=notes.append))
    assert not any("no token" in note for note in notes)
    with pytest.raises(UserError, match=r"share the token <.*>; leave one out"):
        check_together([adapter, import_lora(file, None, str(tiny_base), "other", "cpu")], {})
    save_file({**load_file(file), "bundle_emb.wide.clip_l": torch.zeros(1, 99)}, file)
    with pytest.raises(UserError, match="an embedding 'wide' that does not fit"):
        import_lora(file, None, str(tiny_base), device="cpu")


@pytest.mark.parametrize("key", ["emb_params", "<rex>", "clip_l"])
def test_an_embedding_alone_is_called_that(tiny_base: Path, tmp_path: Path, key: str) -> None:
    save_file({key: torch.zeros(2, 24)}, tmp_path / "word.safetensors")
    with pytest.raises(UserError, match=r"is an embedding \(textual inversion\) and no LoRA"):
        import_lora(tmp_path / "word.safetensors", None, str(tiny_base), device="cpu")


def test_names_of_the_web_are_made_ours(tiny_base: Path, tmp_path: Path) -> None:
    odd = web(tmp_path / "Add Detail (v1) [SD15].safetensors")
    files = [web(tmp_path / folder / "pytorch_lora_weights.safetensors") for folder in ("a", "b/a")]
    assert [name_of(file) for file in (odd, *files)] == ["Add Detail v1 SD15", "a", "a"]
    assert name_of(web(tmp_path / "((..)).safetensors")) == "lora" and distinct("A", ["a", "a-2"]) == "A-3"
    notes: list[str] = []
    config = FuseConfig(adapters=[*files, odd], output=tmp_path / "out", base=str(tiny_base), device="cpu")
    fuse_to_folder(config, hooks=Hooks(notify=notes.append))
    assert [one.name for one in adapters_in_fusion(tmp_path / "out")] == ["Add Detail v1 SD15", "a", "a-2"]
    assert any("is called 'a-2' here" in note for note in notes)
    assert import_lora(odd, tmp_path / "in.safetensors", str(tiny_base), device="cpu").name == "Add Detail v1 SD15"


def test_pictures_are_drawn_with_foreign_loras(tiny_base: Path, tmp_path: Path) -> None:
    file = web(tmp_path / "web.safetensors")
    import_lora(file, tmp_path / "in.safetensors", str(tiny_base), device="cpu")

    def drawn(name: str, **more: object) -> bytes:
        scene = Scene(
            prompt="a dog",
            base=str(tiny_base),
            num_inference_steps=2,
            device="cpu",
            output=tmp_path / f"{name}.png",
            **more,
        )
        [path] = generate_to_file(scene)
        return path.read_bytes()

    def bound(path: Path) -> list[Region]:
        return [Region(box=(0, 0, 0.5, 1), prompt="a dog", adapters={str(path): 1.0})]

    drawn("a", adapters={str(file): 1.0}), drawn("b", adapters={str(tmp_path / "in.safetensors"): 1.0}), drawn("c")
    drawn("d", regions=bound(file)), drawn("e", regions=bound(tmp_path / "in.safetensors"))
    from PIL import Image

    a, b, c, d, e = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abcde")
    assert a == b != c and d == e
    assert str(file) in read_sources(tmp_path / "a.png")
    folder = web(tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    for path in (file, folder.parent):
        words = [
            "generate",
            "--adapter",
            path,
            "--base",
            tiny_base,
            "--prompt",
            "a dog",
            "--device",
            "cpu",
            "num_inference_steps=1",
        ]
        assert CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / "f.png")]).exit_code == 0
        words = ["fuse", path, "--base", tiny_base, "--device", "cpu", "-o", tmp_path / "fused"]
        assert CliRunner().invoke(app, [*map(str, words)]).exit_code == 0
        assert read_manifest(tmp_path / "fused")["concepts"].keys() == {name_of(path)}  # type: ignore[index]
    with pytest.raises(UserError, match=f"becomes one by spectral-diffusion import {file}"):
        adapters_in_fusion(file)
