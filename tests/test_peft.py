"""The PEFT tuner as PEFT's users and diffusers call it: settings, slots, merging, mixed batches, files."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shards_on_cpus
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from spectral_diffusion import SpectralConfig
from spectral_diffusion.adapters.layer import AdaptedLayer
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.slots.ledger import read_columns

METHODS = [name for name, method in all_methods().items() if not method.peft or method.initial]
NO_RANK = {"svdiff": 1}
IDS = torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(1))


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.2, "max_position_embeddings": 16,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings, **more)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 32, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()


class Net(nn.Module):
    """A convolution, a Linear and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.head = nn.Conv2d(4, 8, 3), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.linear(self.conv(x).flatten(1)).tanh())
        return out


def net_input() -> Tensor:
    return torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def config(method: str = "spectral-additive", **more: Any) -> SpectralConfig:
    return SpectralConfig(**{"r": NO_RANK.get(method, 2), "method": method, "task_type": "CAUSAL_LM", **more})


def stir(model: nn.Module, adapter: str = "default", scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(len(adapter))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"spectral_delta.{adapter}." in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def logits(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, **more).logits
    return found


def adapted(model: nn.Module) -> list[AdaptedLayer]:
    return [module for module in model.modules() if isinstance(module, AdaptedLayer)]


@pytest.fixture
def both() -> Iterator[PeftModel]:
    """A model with the adapters one (additive) and two (rotation), stirred; one is active."""
    model = get_peft_model(llama(), config(), "one")
    model.add_adapter("two", config("spectral-rotation"))
    stir(model, "one")
    stir(model, "two")
    yield model.eval()


# Settings


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_method_trains_or_is_refused(name: str) -> None:
    if name not in METHODS:
        with pytest.raises(UserError, match=r"is PEFT's own method; use peft\.(AdaLoraConfig|LoraConfig)"):
            config(name)
        return
    plain = logits(llama())
    model = get_peft_model(llama(), config(name))
    assert torch.equal(logits(model), plain)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(model(IDS, labels=IDS).loss) < float(loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "must be at least 1"),
        ({"bias": "lora_only"}, "use none, all or spectral_only"),
        ({"slot": "next"}, "slot 'next' is not understood"),
        ({"slot": "0:3"}, "has 3 columns but the rank is 2"),
        ({"method": "oft", "slot": "0:2"}, "oft has no slots"),
        ({"method": "spectral-additiv"}, "did you mean 'spectral-additive'"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "need target_modules as a list"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"method": "dora"}, r"use peft\.LoraConfig\(use_dora=True\)"),
    ],
)
def test_settings_are_refused_in_a_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 32}, r"cannot have rank 32 on model\.layers\.0\.self_attn\.q_proj \(16×16\); near it are 14, 15, 16"),
        ({"slot": "14:16", "target_modules": ["k_proj"]}, r"The columns 14:16 do not fit: .*k_proj has 8"),
        ({"target_modules": ["embed_tokens"]}, "is a Embedding; only Linear, Conv1D of transformers and Conv2d"),
        ({"method": "oft", "r": 5}, "oft cannot have rank 5"),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(settings: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(**settings))
    assert not adapted(model)
    held = get_peft_model(model, config())
    state = get_peft_model_state_dict(held)
    with pytest.raises(ValueError, match=message):
        held.add_adapter("other", config(**settings))
    assert list(held.peft_config) == ["default"] and list(get_peft_model_state_dict(held)) == list(state)
    held.add_adapter("other", config())


def test_layers_ranks_and_exclusions_are_obeyed() -> None:
    model = get_peft_model(
        llama(),
        config(
            target_modules=["q_proj", "v_proj", "up_proj"], exclude_modules=["up_proj"], layers_to_transform=[1],
            layers_pattern="layers", rank_pattern={"v_proj": 3},
        ),
    )  # fmt: skip
    ranks = {name.split("layers.")[1]: m for name, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    assert {name: len(m.parameters_of("default")["A_U"].mT) for name, m in ranks.items()} == {
        "1.self_attn.q_proj": 2,
        "1.self_attn.v_proj": 3,
    }
    assert model.peft_config["default"].slot == "0:3"
    full = get_peft_model(llama(), config(r=3, target_modules=["q_proj"], layers_to_transform=1))
    mine, theirs = (layers[0].frozen_of("default")["U"] for layers in (list(ranks.values()), adapted(full)))
    assert torch.equal(mine, theirs[:, :2])  # a layer of a smaller rank has the slot's first columns


@pytest.mark.parametrize("bias", ["all", "spectral_only"])
@pytest.mark.parametrize("method", ["spectral-additive", "spectral-rotation", "oft"])
def test_biases_train_and_are_saved(method: str, bias: str, tmp_path: Path) -> None:
    base = llama(attention_bias=True)
    model = get_peft_model(base, config(method, bias=bias))
    trained = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    wanted = {name for name in trained if bias == "all" or "base_layer" in name}
    assert wanted and {name for name, p in trained.items() if p.requires_grad} == wanted
    model(IDS, labels=IDS).loss.backward()
    assert all(trained[name].grad.abs().sum() > 0 for name in wanted if "k_proj" not in name)  # softmax ignores k's
    with torch.no_grad():
        for name in wanted:
            trained[name] += 0.3
    after = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(attention_bias=True), tmp_path)
    assert torch.equal(logits(again), after)
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("two", config(bias="all"))


def test_other_modules_are_trained_and_saved(tmp_path: Path) -> None:
    settings = SpectralConfig(r=2, target_modules=["conv", "linear"], modules_to_save=["head"])
    model = get_peft_model(Net(), settings)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("head.modules_to_save" in name for name in names) and any("conv.spectral_delta" in n for n in names)
    model(net_input()).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.5 * parameter.grad
    model.eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(net_input()), model(net_input()))


# Slots


def test_the_default_slot_is_the_next_free_one() -> None:
    model = get_peft_model(llama(), SpectralConfig(r=2, target_modules=["q_proj"]))
    slots: dict[str, str | None] = {"default": "0:2"}
    for name, settings, slot in (
        ("two", {"r": 3}, "2:5"),
        ("far", {"r": 2, "slot": "6,8"}, "6,8"),
        ("end", {"r": 2, "slot": "-7:-5"}, "-7:-5"),  # of 16 columns the ones from 9 to 11
        ("three", {"r": 2}, "11:13"),
        ("one", {"r": 1}, "5:6"),
        ("rows", {"r": 2, "method": "orthogonal"}, "0:2"),  # of another space
        ("none", {"r": 2, "method": "oft"}, None),
    ):
        model.add_adapter(name, SpectralConfig(target_modules=["q_proj"], **settings))
        slots[name] = slot
        assert model.peft_config[name].slot == slot, name
    used = [
        column for name in ("default", "two", "far", "three", "one") for column in read_columns(slots[name]).columns
    ]
    assert len(set(used)) == len(used) == 10
    with pytest.raises(UserError, match="do not fit"):
        model.add_adapter("four", SpectralConfig(r=4, target_modules=["q_proj"]))
    model.delete_adapter("default")
    model.add_adapter("again", SpectralConfig(r=2, target_modules=["q_proj"]))
    assert model.peft_config["again"].slot == "0:2"


def test_one_config_can_serve_several_adapters() -> None:
    settings = SpectralConfig(r=2, target_modules="all-linear")
    model = get_peft_model(llama(), settings)
    model.add_adapter("two", settings)
    assert [held.slot for held in model.peft_config.values()] == ["0:2", "2:4"] and settings.slot is None


def test_two_adapters_of_default_slots_train_apart_and_sum_up() -> None:
    model = get_peft_model(llama(), config(), "one")
    model.add_adapter("two", config())
    stir(model, "one")
    stir(model, "two")
    model.base_model.set_adapter(["one", "two"])
    together = logits(model)
    model.base_model.merge_adapter()
    assert torch.allclose(logits(model), together, atol=1e-4)
    for layer in adapted(model):
        one, two = (layer.frozen_of(name)["U"] for name in ("one", "two"))
        assert float((one.mT @ two).abs().max()) < 1e-5


# Merging, disabling, removing


@pytest.mark.parametrize("make", [llama, gpt2], ids=["linear", "conv1d"])
@pytest.mark.parametrize("method", METHODS)
def test_merge_unmerge_disable_delete_and_unload(method: str, make: Callable[[], nn.Module]) -> None:
    plain = logits(make())
    model = get_peft_model(make(), config(method))
    stir(model)
    acting = logits(model)
    assert not torch.allclose(acting, plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model), acting, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()  # again: nothing happens
    assert torch.allclose(logits(model), acting, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), acting, atol=1e-4)
    with model.disable_adapter():
        assert torch.allclose(logits(model), plain, atol=1e-4)
    assert torch.allclose(logits(copy.deepcopy(model)), acting, atol=1e-4)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(logits(merged), acting, atol=1e-4) and not adapted(merged)
    model.add_adapter("other", config(method))
    model.delete_adapter("other")
    assert torch.allclose(logits(model), acting, atol=1e-4)
    bare = model.unload()
    assert torch.allclose(logits(bare), plain, atol=1e-4) and not adapted(bare)
    logits(bare)
    assert not bare._forward_pre_hooks


def test_what_depends_on_the_weight_is_unmerged_exactly() -> None:
    model = get_peft_model(llama(), config("spectral-additive"), "one")
    model.add_adapter("two", config("oft"))
    stir(model, "one")
    stir(model, "two", 0.05)
    model.base_model.set_adapter(["one", "two"])
    acting = logits(model)
    model.merge_adapter(["one"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["two"])  # ΔW of the weight as it was before one was merged
    assert torch.allclose(logits(model), acting, atol=1e-4)
    alone = get_peft_model(llama(), config("oft"))
    stir(alone, scale=0.05)
    alone.merge_adapter()
    alone.unmerge_adapter()
    for layer, original in zip(adapted(alone), adapted(get_peft_model(llama(), config())), strict=True):
        assert torch.equal(layer.base_weight, original.base_weight)


def test_a_broken_adapter_is_not_merged_safely() -> None:
    model = get_peft_model(llama(), config())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "A_U" in n).fill_(float("nan"))
    with pytest.raises(ValueError, match="holds NaN or infinity; nothing was merged"):
        model.merge_and_unload(safe_merge=True)


def test_an_adapter_added_beside_a_merged_one_has_the_bases_columns() -> None:
    model = get_peft_model(llama(), config())
    stir(model)
    acting = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Adapters are unmerged"):
        model.add_adapter("b", config(slot="2:4"))
    fresh = get_peft_model(llama(), config(slot="2:4"))
    for layer, wanted in zip(adapted(model), adapted(fresh), strict=True):
        for part in "USV":
            assert torch.allclose(layer.frozen_of("b")[part], wanted.frozen_of("default")[part], atol=1e-5)
    assert torch.allclose(logits(model), acting, atol=1e-4)


def test_strengths_are_set_and_scaled_as_peft_does() -> None:
    model = get_peft_model(llama(), config())
    stir(model)
    layer, acting = adapted(model)[0], logits(model)
    full = layer.get_delta_weight("default")
    steps: list[tuple[Callable[[], None], float]] = [
        (lambda: layer.set_scale("default", 0.5), 0.5),
        (lambda: layer.scale_layer(3.0), 1.5),
        (lambda: layer.unscale_layer(2.0), 0.75),
        (lambda: layer.set_scale("another", 7.0), 0.75),
        (lambda: layer.unscale_layer(), 1.0),
    ]
    for change, wanted in steps:
        change()
        assert torch.allclose(layer.get_delta_weight("default"), wanted * full, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model), acting)
    model.merge_adapter()
    layer.scale_layer(1.0)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), acting, atol=1e-4)


def test_peft_reports_the_layers_status(both: PeftModel) -> None:
    status = both.get_model_status()
    assert status.available_adapters == ["one", "two"] and status.active_adapters == ["one"]
    assert status.requires_grad == {"one": True, "two": False} and status.enabled is True
    assert status.num_adapter_layers == 4 and status.devices == {"one": ["cpu"], "two": ["cpu"]}
    both.set_adapter("two", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in both.parameters())
    everything = get_peft_model(llama(), config(target_modules="all-linear"))
    everything.add_adapter("two", config(target_modules="all-linear"))
    assert all(len(layer.spectral_delta) == 2 for layer in adapted(everything)) and len(adapted(everything)) == 14


# Several adapters at once


def test_a_mixed_batch_goes_row_by_row(both: PeftModel) -> None:
    wanted = {}
    for name in ("one", "two"):
        both.set_adapter(name)
        wanted[name] = logits(both)
    wanted["__base__"] = logits(llama())
    names = ["two", "__base__", "one", "two"]
    found = logits(both, adapter_names=names)
    for row, name in enumerate(names):
        assert torch.allclose(found[row], wanted[name][row], atol=1e-5), name
        assert name == "two" or not torch.allclose(found[row], wanted["two"][row], atol=1e-2)
    assert torch.equal(logits(both), wanted["two"])  # nothing is left of it
    text = both.generate(IDS, adapter_names=names, max_new_tokens=2, do_sample=False, num_beams=2, pad_token_id=0)
    alone = both.generate(IDS, max_new_tokens=2, do_sample=False, num_beams=2, pad_token_id=0)
    assert torch.equal(text[[0, 3]], alone[[0, 3]])
    for wrong, message in ((["one", "x", "one", "one"], "no adapter x"), (["one"], "1 names for a batch of 4")):
        with pytest.raises(ValueError, match=message):
            both(IDS, adapter_names=wrong)
    both.merge_adapter()
    with pytest.raises(ValueError, match="while adapters are merged"):
        both(IDS, adapter_names=names)
    with pytest.raises(ValueError, match="while the model trains"):
        both.train()(IDS, adapter_names=names)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_weighted_sum_is_a_new_adapter(both: PeftModel, kind: str, tmp_path: Path) -> None:
    layers = adapted(both)
    wanted = [0.7 * m.get_delta_weight("one") - 0.4 * m.get_delta_weight("two") for m in layers]
    both.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", kind, 6)
    for layer, delta in zip(layers, wanted, strict=True):
        assert torch.allclose(layer.get_delta_weight("sum"), delta, atol=1e-5)
    both.set_adapter("sum")
    acting = logits(both)
    both.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path / "sum", adapter_name="x")
    assert torch.allclose(logits(again), acting, atol=1e-5)
    for arguments, message in (
        ((["one"], [1.0], "sum"), "an adapter 'sum' already"),
        ((["one", "x"], [1.0, 1.0], "new"), "no adapter x"),
        ((["one"], [1.0, 2.0], "new"), "one weight for each"),
        ((["one"], [1.0], "new", "ties"), "'ties' is not offered here"),
    ):
        with pytest.raises(UserError, match=message):
            both.add_weighted_adapter(*arguments)


def test_a_sum_has_no_more_columns_than_the_layer_and_changes_of_full_rank_are_truncated() -> None:
    model = get_peft_model(llama(), config(r=6), "one")
    model.add_adapter("two", config("oft"))
    stir(model, "one", 0.1)
    stir(model, "two", 0.1)
    model.add_weighted_adapter(["one", "one"], [1.0, 1.0], "twice")
    with pytest.raises(UserError, match="in full rank; use combination_type='svd'"):
        model.add_weighted_adapter(["two"], [1.0], "new")
    model.add_weighted_adapter(["two"], [2.0], "new", "svd", svd_rank=16)
    for layer in adapted(model):
        once = layer.get_delta_weight("one")
        assert torch.allclose(layer.get_delta_weight("twice"), 2 * once, atol=1e-5)
        assert torch.allclose(layer.get_delta_weight("new"), 2 * layer.get_delta_weight("two"), atol=1e-5)


# Files


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_files_round_trip_with_little_memory_too(method: str, low: bool, tmp_path: Path) -> None:
    base = gpt2().to(torch.bfloat16)
    model = get_peft_model(base, config(method))
    stir(model)
    acting = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(gpt2().to(torch.bfloat16), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(logits(again), acting)
    assert {tensor.dtype for layer in adapted(again) for tensor in layer.parameters_of("default").values()} == {
        torch.float32
    }
    again.load_adapter(tmp_path, "second", low_cpu_mem_usage=low)
    again.set_adapter("second")
    assert torch.equal(logits(again), acting)


def test_another_process_loads_it_as_the_card_says(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    llama().save_pretrained(base)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config())
    model.add_adapter("other", config())
    model.save_pretrained(folder)
    model.save_pretrained(folder)  # says it once
    card = (folder / "README.md").read_text()
    assert card.count("from spectral_diffusion import SpectralConfig") == 1 and card.startswith("---\nbase_model: ")
    assert "[More Information Needed]" in card  # the rest is for a person to fill in
    assert "SpectralConfig" in (folder / "other" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("this folder", str(folder))
    code += "\nassert type(model.base_model).__name__ == 'SpectralModel'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_peft_converts_it_to_a_plain_lora() -> None:
    from peft import convert_to_lora

    model = get_peft_model(llama(), config())
    stir(model)
    assert model.supports_lora_conversion()
    theirs, state = convert_to_lora(model, rank=4)
    again = get_peft_model(llama(), theirs)
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(again, state)
    assert torch.allclose(logits(again.eval()), logits(model), atol=1e-4)


# Checkpointing, sharding, diffusers


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["spectral-additive", "spectral-rotation-s", "oft"])
def test_checkpointing_of_both_kinds_gives_the_same_gradients(method: str, reentrant: bool) -> None:
    model = get_peft_model(llama(), config(method))
    stir(model)
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    for _ in range(2):
        for wanted, found in zip(plain, gradients(model), strict=True):
            assert wanted.any() and torch.allclose(found, wanted, rtol=1e-4, atol=1e-7)


@shards_on_cpus
def test_sharded_layers_prepare_their_own(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = get_peft_model(llama(), config("spectral-rotation"))
    stir(model)
    plain = gradients(model)
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found = [p.grad.full_tensor() for p in model.parameters() if p.requires_grad]
    finally:
        dist.destroy_process_group()
    assert not any(layer.prepared for layer in adapted(model))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found, plain, strict=True))


def test_diffusers_networks_take_it(tiny_base: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    plain = unet(latents, 3, text).sample
    unet.add_adapter(SpectralConfig(r=2), "one")
    unet.add_adapter(SpectralConfig(r=2, method="spectral-rotation", target_modules=["to_k", "conv1"]), "two")
    assert [held.slot for held in unet.peft_config.values()] == ["0:2", "2:4"]
    assert torch.equal(unet(latents, 3, text).sample, plain)
    stir(unet, "one")
    stir(unet, "two")
    unet.set_adapters(["one", "two"], [0.5, 1.0])
    acting = unet(latents, 3, text).sample
    assert not torch.allclose(acting, plain, atol=1e-3)
    unet.fuse_lora()
    assert torch.allclose(unet(latents, 3, text).sample, acting, atol=1e-4)
    unet.unfuse_lora()
    unet.delete_adapters("two")
    unet.set_adapters("one", 0.0)
    assert torch.allclose(unet(latents, 3, text).sample, plain, atol=1e-4)
    unet.unload_lora()
    unet(latents, 3, text)
    assert not adapted(unet) and not unet._forward_pre_hooks


def test_a_state_dict_names_the_layers() -> None:
    source = inject_adapter_in_model(config(target_modules=["v_proj"]), llama())
    state = get_peft_model_state_dict(source)
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        again = inject_adapter_in_model(config(), llama(), state_dict=state)
    assert [name for name, m in again.named_modules() if isinstance(m, BaseTunerLayer)] == [
        f"model.layers.{index}.self_attn.v_proj" for index in range(2)
    ]


def test_the_slots_methods_know_their_kinds() -> None:
    """The default slot counts columns and rows apart, which no method may blur."""
    assert {get_method(name).slot for name in METHODS} == {None, "columns", "rows"}
