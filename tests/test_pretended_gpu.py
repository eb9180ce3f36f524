"""Every verb on a pretended GPU (see ``pretended/gpu.py``): what a CUDA device or a Mac would refuse is refused here.

A core of it runs always; all of it with ``make test-slow``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_photos, make_tiny_base, seldom
from diffusers import T2IAdapter
from families import MAKERS, make_tiny_sdxl
from PIL import Image, ImageDraw
from pretended import PretendedGPU, Refused

from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.control import ControlConfig
from spectral_diffusion.config.evaluate import EvaluateConfig
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import Cancelled
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.evaluation.run import evaluate_to_folder
from spectral_diffusion.linalg import cayley_change, gram_of, to_float64
from spectral_diffusion.merging.activations import GramAccumulator
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.merge_layers import contribute
from spectral_diffusion.merging.merges import all_merges
from spectral_diffusion.methods import all_methods
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.offload import is_offloaded
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.training.control_adapter import train_control
from spectral_diffusion.training.half_weights import half_weights
from spectral_diffusion.training.run import train_to_file

REAL = os.environ.get("SPECTRAL_DIFFUSION_TEST_DEVICE", "")
UNETS = ("sd", "sdxl")
PRIOR = {"loss_weight": 1.0, "batch_size": 2, "num_images": 2, "cut_mix_prob": 0.5}
HALF: dict[str, Any] = {"dtype": "float16"}
BRAIN: dict[str, Any] = {"dtype": "bfloat16"}
LARGE: dict[str, Any] = {"width": 64, "height": 64}


class World:
    """Tiny bases, photos and adapters on disk, and the verbs on a pretended device."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bases, self.loaded = folder, {}, {}  # type: ignore[var-annotated]
        self.rex, self.mug = make_photos(folder / "photos" / "rex"), make_photos(folder / "photos" / "mug", seed=1)
        self.masked = make_photos(folder / "masked" / "rex")
        (self.masked / "masks").mkdir()
        mask = Image.new("L", (24, 20))
        ImageDraw.Draw(mask).rectangle([4, 4, 16, 16], fill=255)
        for index in range(3):
            mask.save(self.masked / "masks" / f"{index}.png")
        mask.save(folder / "mask.png")

    def base(self, name: str) -> Path:
        if name not in self.bases:
            path = self.folder / name
            if name == "sd":
                make_tiny_base(path)
                for kind, channels in (("sketch", 1), ("keypose", 3)):
                    adapter = T2IAdapter(in_channels=channels, channels=[16, 24], num_res_blocks=1, downscale_factor=2)
                    adapter.save_pretrained(path / f"t2i_{kind}")
            else:
                (make_tiny_sdxl if name == "sdxl" else MAKERS[name])(path)
            self.bases[name] = path
        return self.bases[name]

    def fresh(self, name: str, kind: str, dtype: str = "float32") -> Base:
        """A loaded base on the pretended device."""
        return load_base(str(self.base(name)), kind, dtype)

    def output(self, *parts: Any) -> Path:
        path = self.folder / "out" / "-".join(str(part) for part in parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def train(self, kind: str, tag: str, base: str = "sd", photos: Path | None = None, **more: Any) -> Path:
        photos = photos or self.rex
        flows = {} if base in UNETS else {"noise_offset": 0.0}
        given = {
            "rank": 2, "steps": 2, "device": kind, "learning_rate": 1e-3, "crops_per_image": 1, **flows, **more,
        }  # fmt: skip
        output = self.output(kind, base, tag) / f"{photos.name}.safetensors"
        output.unlink(missing_ok=True)
        train_to_file(TrainConfig(concept=photos, output=output, base=str(self.base(base)), **given))
        return output

    def pair(self, kind: str, method: str = "spectral-additive", base: str = "sd", **more: Any) -> list[Path]:
        """Two adapters, trained once."""
        files = [self.output(kind, base, f"pair-{method}") / f"{photos.name}.safetensors" for photos in self.both]
        if not all(file.exists() for file in files):
            for photos in self.both:
                self.train(kind, f"pair-{method}", base, photos, method=method, **more)
        return files

    @property
    def both(self) -> tuple[Path, Path]:
        return self.rex, self.mug

    def fuse(self, kind: str, tag: str, files: list[Path], base: str = "sd", **more: Any) -> None:
        given = {"calibration": {"num_images": 2, "num_inference_steps": 2, "tokens_per_call": 16}, **more}
        output = self.output(kind, base, f"fused-{tag}") / "fused"
        if not output.exists():
            fuse_to_folder(FuseConfig(adapters=files, output=output, device=kind, **given))

    def generate(self, kind: str, tag: str, base: str = "sd", **more: Any) -> None:
        given = {
            "prompt": "a photo of a dog", "base": str(self.base(base)), "device": kind, "num_inference_steps": 2,
            "guidance_scale": 3.0, **({} if base in UNETS else {"width": 32, "height": 32}), **more,
        }  # fmt: skip
        output = self.output(kind, base, "pictures") / f"{tag}.png"
        generate_to_file(Scene(output=output, **given), preview=lambda step, images: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=[REAL] if REAL else ["cuda", "mps"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A pretended device, or the real one that `make gpu-check` names."""
    if REAL:
        yield SimpleNamespace(kind=REAL)
        return
    with PretendedGPU(request.param) as device:
        yield device


Case = tuple[str, Callable[[World, str], Any]]
OBJECTIVE = {"attention_loss_weight": 0.1, "snr_gamma": 5.0, "loss_type": "huber"}
DISTILL = {
    "steps": 2, "batch_size": 2, "num_images": 2, "num_prior_images": 2, "noises_per_image": 2,
    "gradient_accumulation_steps": 2,
}  # fmt: skip


def trained(tag: str, **more: Any) -> Case:
    return f"train {tag}", lambda world, kind: world.train(kind, tag.replace(" ", "-"), **more)


def generated(tag: str, **more: Any) -> Case:
    return f"generate {tag}", lambda world, kind: world.generate(kind, tag.replace(" ", "-"), **more)


def resumed(world: World, kind: str, **more: Any) -> None:
    output = world.output(kind, "resumed", *more) / "rex.safetensors"
    config = TrainConfig(
        concept=world.rex, output=output, base=str(world.base("sd")), device=kind, crops_per_image=1,
        **{"rank": 2, "steps": 4, "optimizer": {"ema_decay": 0.5}, **more},
    )  # fmt: skip
    calls = iter(range(99))
    with suppress(Cancelled):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(calls) >= 2))
    train_to_file(config, resume=True)


def continued(world: World, kind: str) -> None:
    start = world.train(kind, "start", method="spectral-rotation")
    world.train(kind, "continued", photos=world.mug, init_from_adapter=str(start))


def regions(world: World, kind: str, method: str = "spectral-additive", base: str = "sd", **more: Any) -> None:
    first, second = world.pair(kind, method, base)
    world.generate(
        kind, f"regions-{method}-{'-'.join(more)}", base, prompt="a beach", region_isolation=0.5,
        global_prompt_weight=0.2,
        regions=[
            {"box": (0, 0, 0.5, 1), "prompt": "<rex>", "adapters": {str(first): 0.9}},
            {"mask": str(world.folder / "mask.png"), "prompt": "<mug>", "adapters": {str(second): 1.0}},
        ],
        **more,
    )  # fmt: skip


def controlled(world: World, kind: str, **more: Any) -> None:
    sketch = str(world.folder / "mask.png")
    world.generate(
        kind, f"controlled-{'-'.join(more)}",
        controls=[
            {"file": sketch, "kind": "sketch", "conditioning_scale": 0.8},
            {"file": sketch, "kind": "keypose", "conditioning_scale": 0.5},
        ],
        regions=[{"box": (0, 0, 0.5, 1), "prompt": "a cup", "conditioning_scale": 0.5}],
        **more,
    )  # fmt: skip


def control_trained(world: World, kind: str, **more: Any) -> None:
    folder = world.folder / "pairs"
    if not folder.exists():
        make_photos(folder, 3)
        (folder / "conditions").mkdir()
        for index in range(3):
            Image.new("L", (24, 20)).save(folder / "conditions" / f"{index}.png")
    output = world.output(kind, "t2i", *more.values()) / "t2i"
    train_control(
        ControlConfig(
            folder=folder, output=output, base=str(world.base("sd")), steps=2, batch_size=2, device=kind,
            template="a {}", **more,
        )
    )  # fmt: skip


def evaluated(world: World, kind: str) -> None:
    evaluate_to_folder(
        EvaluateConfig(
            adapters=world.pair(kind)[:1], references=world.folder / "photos", output=world.output(kind, "report"),
            base=str(world.base("sd")), device=kind, num_images=1, num_inference_steps=2, encoders=["pocket"],
        )
    )  # fmt: skip


def merged(merge: str) -> Case:
    method = {"orthogonal": "orthogonal", "fedavg": "lora", "orthofuse": "oft"}.get(merge, "spectral-additive")
    options = {"options": {"styles": ["rex"]}} if merge == "np-lora" else {}
    rank = {"rank": 1} if method == "oft" else {}

    def work(world: World, kind: str) -> None:
        world.fuse(kind, merge, world.pair(kind, method, **rank), merge=merge, **options)

    return f"fuse {merge}", work


def found(world: World, kind: str, base: str = "sd", **more: Any) -> None:
    """Regions that are found by attention."""
    adapters = {str(file): 0.5 for file in world.pair(kind, base=base)}
    tag = f"found-{base}-{'-'.join(more)}"
    world.generate(kind, tag, base, prompt="<rex> beside <mug>", adapters=adapters, region_isolation=1.0, **more)


def kept_off(world: World, kind: str, base: str = "sd", **more: Any) -> None:
    """Training that knows other concepts, and two concepts in one adapter."""
    earlier = [file for file in world.pair(kind, base=base) if file.stem == "mug"]
    knows = {"overlap_weight": 1.0, "erasure_prob": 1.0, "earlier_adapters": earlier}
    joint = {"joint_concepts": [world.mug]} if base in UNETS else {}
    if not joint:
        knows["erasure_prob"] = 0.5
    world.train(kind, f"kept-off-{base}", base, interference=knows, token="<one>", name="one", **joint, **more)


OFTEN = {
    "spectral-additive",
    "spectral-rotation",
    "lora",
    "dora",
    "spectral",
    "gradient",
    "ssr",
    "ties",
}
METHODS = {
    method: trained(method, method=method, rank=1 if method in {"svdiff", "oft", "svft"} else 2)
    for method in all_methods()
}
FUSED = {merge: merged(merge) for merge in all_merges()}
CORE: list[Case] = [
    *(case for name, case in {**METHODS, **FUSED}.items() if name in OFTEN),
    trained("half additive", **HALF),
    trained("half rotation checkpointing", method="spectral-rotation", gradient_checkpointing=True, **HALF),
    trained("autocast lora", method="lora", mixed_precision="fp16"),
    trained("prior cut-mix ema", prior=PRIOR, optimizer={"ema_decay": 0.9, "gradient_accumulation_steps": 2}, steps=3),
    trained("sdxl", base="sdxl"),
    trained("klein", base="klein"),
    ("train resume", lambda world, kind: resumed(world, kind, **HALF)),
    ("train kept off", kept_off),
    ("fuse distill", lambda world, kind: world.fuse(kind, "distill", world.pair(kind), distill=DISTILL)),
    generated("adapter", num_images=2),
    ("generate regions", regions),
    ("generate found regions", found),
    ("generate controls", controlled),
    ("generate klein regions", lambda world, kind: regions(world, kind, base="klein")),
]  # fmt: skip
LONG: list[Case] = [
    *(case for name, case in {**METHODS, **FUSED}.items() if name not in OFTEN),
    ("generate found regions half", lambda world, kind: found(world, kind, **HALF)),
    ("generate found regions sdxl", lambda world, kind: found(world, kind, base="sdxl", **HALF)),
    *(
        trained(f"{name} {method}", method=method, **options)
        for name, options in {
            "half": HALF, "brain": BRAIN, "autocast-half": {"mixed_precision": "fp16"},
            "autocast-brain": {"mixed_precision": "bf16"}, "sdxl": {"base": "sdxl"},
        }.items()
        for method in ("spectral-additive", "spectral-rotation", "lora", "dora", "vera", "adalora")
    ),
    *(trained(f"{name}", base=name) for name in ("z-image", "krea-2", "qwen-image-2.1")),
    *(
        trained(f"{name} half checkpointing", base=name, gradient_checkpointing=True, **BRAIN)
        for name in ("klein", "z-image", "krea-2", "qwen-image-2.1")
    ),
    trained("klein offloaded", base="klein", gradient_checkpointing=True, layer_offload=True, **BRAIN),
    trained("sdxl half checkpointing prior", base="sdxl", gradient_checkpointing=True, prior=PRIOR, **HALF),
    trained("conv", target_modules="attention+feed-forward+projection+conv"),
    trained("conv half", target_modules="attention+feed-forward+projection+conv", **HALF),
    ("train masks", lambda world, kind: world.train(
        kind, "masks", photos=world.masked, data={"mask_weight": 0.7}, objective=OBJECTIVE, prior=PRIOR, steps=4)),
    ("train masks half", lambda world, kind: world.train(
        kind, "masks-half", photos=world.masked, data={"mask_weight": 0.7}, objective=OBJECTIVE, **HALF)),
    ("train kept off half", lambda world, kind: kept_off(world, kind, method="lora", **HALF)),
    ("train kept off klein", lambda world, kind: kept_off(world, kind, base="klein")),
    trained("riemannian", method="lora", optimizer={"riemannian_reg": 0.01, "loraplus_lr_ratio": 4.0}, **HALF),
    *(
        (f"generate found regions {name}", lambda world, kind, name=name: found(world, kind, base=name, **BRAIN))
        for name in ("klein", "z-image", "krea-2", "qwen-image-2.1")
    ),
    trained("prodigy", optimizer={"name": "prodigy", "ema_decay": 0.9, "gradient_accumulation_steps": 2}),
    trained("adalora ema", method="adalora", optimizer={"ema_decay": 0.9}, steps=12),
    trained("per layer", per_layer_tokens=True, validation={"every": 1, "num_inference_steps": 2}),
    trained("per layer half", per_layer_tokens=True, **HALF),
    trained("normalized", normalize=True, slot_lr_power=0.5),
    trained("bottom", slot="bottom"),
    trained("buckets", data={"aspect_buckets": True, "cache_latents": False, "flip": 0.5}, resize_ratio=1.1),
    trained("validated", validation={"every": 1, "num_inference_steps": 2}),
    ("train resume adalora", lambda world, kind: resumed(world, kind, method="adalora", steps=6)),
    ("train resume prodigy", lambda world, kind: resumed(world, kind, optimizer={"name": "prodigy"})),
    ("train continued", continued),
    *(
        (f"fuse {method} gradient", lambda world, kind, method=method: world.fuse(
            kind, f"gradient-{method}", world.pair(kind, method, **({"rank": 1} if method == "svdiff" else {}))[:1],
            merge="gradient"))
        for method in ("dora", "svdiff", "spectral-rotation")
    ),
    ("fuse gradient staged", lambda world, kind: world.fuse(
        kind, "staged", world.pair(kind), merge="gradient",
        calibration={"num_images": 2, "num_inference_steps": 2, "calibrate_on": "previous_stages"})),
    ("fuse gradient sdxl", lambda world, kind: world.fuse(
        kind, "gradient", world.pair(kind, base="sdxl"), "sdxl", merge="gradient")),
    ("fuse gradient klein", lambda world, kind: world.fuse(
        kind, "gradient", world.pair(kind, base="klein"), "klein", merge="gradient", dtype="bfloat16")),
    ("fuse distill sdxl", lambda world, kind: world.fuse(
        kind, "distill", world.pair(kind, base="sdxl"), "sdxl", distill=DISTILL)),
    ("fuse distill klein", lambda world, kind: world.fuse(
        kind, "distill", world.pair(kind, base="klein"), "klein", distill={**DISTILL, "rank": 2}, dtype="bfloat16")),
    ("fuse distill checkpointing", lambda world, kind: world.fuse(
        kind, "distill-more", world.pair(kind),
        distill={**DISTILL, "gradient_checkpointing": True, "target_modules": r"re:unet\..*"})),
    *(generated(f"{sampler} half", sampler=sampler, num_images=2, **HALF) for sampler in ("dpm", "ddim", "euler")),
    *(
        (f"generate regions {method} half", lambda world, kind, method=method: regions(world, kind, method, **HALF))
        for method in ("dora", "spectral-rotation", "lora")
    ),
    ("generate regions sdxl", lambda world, kind: regions(world, kind, base="sdxl", **HALF)),
    *(
        (f"generate regions {name}", lambda world, kind, name=name: regions(world, kind, base=name, **LARGE, **BRAIN))
        for name in ("z-image", "krea-2", "qwen-image-2.1")
    ),
    ("generate controls half", lambda world, kind: controlled(world, kind, **HALF)),
    *(generated(name, base=name, **BRAIN) for name in ("klein", "z-image", "krea-2", "qwen-image-2.1")),
    ("train-control", control_trained),
    ("train-control half", lambda world, kind: control_trained(world, kind, dtype="float16")),
    ("evaluate", evaluated),
]  # fmt: skip


def by_name(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("work", [work for _, work in cases], ids=[name for name, _ in cases])


# On Apple's GPUs the rest of them runs with the slow tests: what those refuse, float64 above all, shows in these.
APPLE_OFTEN = {
    "train spectral-additive", "train klein", "fuse spectral", "generate adapter",
}  # fmt: skip


SELDOM = {
    "fuse gradient",
    "fuse distill",
    "train prior cut-mix ema",
    "generate klein regions",
    "train kept off",
}  # long on CUDA, too


def on_kind(kind: str, name: str, work: Callable[[World, str], Any]) -> Any:
    longer = not REAL and (name not in APPLE_OFTEN if kind == "mps" else name in SELDOM)
    return pytest.param(kind, work, id=f"{kind}-{name}", marks=[pytest.mark.slow] if longer else [])


@pytest.mark.parametrize(
    ("gpu", "work"),
    [on_kind(kind, name, work) for kind in ([REAL] if REAL else ["cuda", "mps"]) for name, work in CORE],
    indirect=["gpu"],
)
def test_what_people_do_most(world: World, gpu: PretendedGPU, work: Callable[[World, str], Any]) -> None:
    work(world, gpu.kind)


@pytest.mark.slow
@by_name(LONG)
def test_everything_else(world: World, gpu: PretendedGPU, work: Callable[[World, str], Any]) -> None:
    work(world, gpu.kind)


@pytest.mark.skipif(bool(REAL), reason="a pretended pair of devices")
@pytest.mark.parametrize("merge", seldom(["gradient", "ssr", "spectral", "ties"], ("ties",)))
def test_several_gpus_share_the_layers_of_a_merge(
    world: World, merge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer is merged on one of them, and what has no room on any is on the CPU, with the same fusion."""
    given: dict[str, Any] = {
        "adapters": world.pair("cpu"), "merge": merge, "base": str(world.base("sd")),
        "calibration": {"num_images": 2, "num_inference_steps": 2, "tokens_per_call": 16, "cache": False},
    }  # fmt: skip
    fuse_to_folder(FuseConfig(output=tmp_path / "alone", device="cpu", **given))
    homes: list[str] = []

    def counted(adapters: Any, layer: str, weight: Any, config: Any, home: torch.device) -> Any:
        homes.append(str(home))
        return contribute(adapters, layer, weight, config, home)

    monkeypatch.setattr("spectral_diffusion.merging.merge_layers.contribute", counted)
    with PretendedGPU("cuda", 2):
        if merge == "gradient":
            free = {"cuda:0": 300_000, "cuda:1": 300_000, "cpu": 1 << 30}
            monkeypatch.setattr(
                "spectral_diffusion.merging.placement.available",
                lambda device: free[str(device)],
            )
        fuse_to_folder(FuseConfig(output=tmp_path / "shared", device="cuda", **given))
    assert {"cuda:0", "cuda:1"} <= set(homes) and ("cpu" in homes) == (merge == "gradient")
    alone, shared = (load_base(str(tmp_path / name), "cpu").models for name in ("alone", "shared"))
    for component, network in alone.items():
        found = dict(shared[component].named_parameters())
        for name, weight in network.named_parameters():
            assert torch.allclose(weight, found[name], atol=1e-5), name


@pytest.mark.parametrize("name", ["klein", "z-image", "krea-2", "qwen-image-2.1"])
def test_a_text_encoder_without_room_comes_layer_by_layer(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = load_base(str(world.base(name)), "cpu").denoiser.encode(["a dog"])
    monkeypatch.setattr("spectral_diffusion.models.flow.has_room", lambda module, device: False)
    with PretendedGPU("cuda"):
        base = load_base(str(world.base(name)), "cuda")
        for _ in range(2):
            found = base.denoiser.encode(["a dog", "a cat"])[:1]
        encoder = base.pipeline.text_encoder
        assert is_offloaded(encoder) and encoder.device.type == "cpu" and base.denoiser.network.device.type == "cuda"
        for key, value in want.tensors.items():
            assert torch.allclose(found.tensors[key].cpu()[..., : value.shape[-1]], value, atol=1e-5), key


# ---------------------------------------------------------------------- what a step costs


def cost_of_steps(world: World, method: str, count: int = 10, **more: Any) -> tuple[int, int]:
    """Kernels, and waits for the device, of ``count`` training steps of the pocket base."""
    with PretendedGPU("cuda") as gpu:

        def watch(event: Event) -> None:
            if event.stage == "train" and event.done in (1, count + 1):
                gpu.counting = event.done == 1

        output = world.output("cost", method, *(type(value).__name__ for value in more.values())) / "rex.safetensors"
        config = TrainConfig(
            concept=world.rex, output=output, device="cuda", rank=8, steps=count + 2, batch_size=2, method=method,
            crops_per_image=1, resolution=32, **more,
        )  # fmt: skip
        train_to_file(config, hooks=Hooks(progress=watch))
    return gpu.kernels.total(), gpu.syncs.total()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"dtype": "float16"}], ids=["autocast", "half"])
def test_a_step_launches_fewer_kernels_than_a_loras_and_waits_for_none(world: World, more: dict[str, Any]) -> None:
    """Small batches on fast cards are bound by launches. One reading of all figures every ten steps is all waiting."""
    loras, waits = cost_of_steps(world, "lora", **more)
    assert waits == 1
    for method, most in (("spectral-additive", 0.87), ("spectral-rotation", 0.85)):
        kernels, waits = cost_of_steps(world, method, **more)
        assert kernels <= most * loras and waits == 1, (method, kernels / loras, waits)


@pytest.mark.parametrize(
    ("more", "most"),
    [
        pytest.param({"optimizer": {"ema_decay": 0.9}}, 1, marks=pytest.mark.slow),
        pytest.param({"optimizer": {"gradient_accumulation_steps": 2}}, 1, marks=pytest.mark.slow),
        # Two a step for each of its three groups.
        pytest.param({"optimizer": {"name": "prodigy"}}, 70, marks=pytest.mark.slow),
    ],
    ids=["ema", "accumulated", "prodigy"],
)
def test_settings_that_wait_no_more(world: World, more: dict[str, Any], most: int) -> None:
    assert cost_of_steps(world, "spectral-additive", **more)[1] <= most


@pytest.mark.parametrize(("base", "most"), [("klein", 1), ("z-image", 1), ("krea-2", 1)])
def test_transformers_wait_for_their_prompts_no_more(world: World, base: str, most: int) -> None:
    """Each prompt is encoded once, which waits; there is one here, read before anything is counted."""
    more = {"base": str(world.base(base)), "noise_offset": 0.0, "dtype": "bfloat16", "templates": ["a photo of {}"]}
    assert cost_of_steps(world, "lora", **more)[1] <= most


# ---------------------------------------------------------------------- the pretended device itself


def test_it_refuses_what_a_device_would() -> None:
    with PretendedGPU("cuda"):
        x, y = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
        assert x.device.type == "cuda" and x.is_cuda and not y.is_cuda and (x + 1).device == x.device
        with pytest.raises(Refused, match="on cuda and on the CPU"):
            x @ y
        assert (x @ y.to(x)).sum().item() == 8
        with pytest.raises(Refused, match="numpy"):
            x.numpy()
        with pytest.raises(Refused, match="generator of the cpu"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        moved = copy.deepcopy(torch.nn.Linear(2, 2).to("cuda"))
        with pytest.raises(Refused):
            moved(y)
        moved(x).sum().backward()
        assert moved.weight.grad is not None and moved.weight.grad.is_cuda
    with PretendedGPU("mps"):
        x = torch.ones(2, 2, device="mps")
        with pytest.raises(Refused, match="float64 on MPS"):
            x.double()
        with pytest.raises(Refused, match="no MPS kernel"):
            torch.linalg.lu_solve(x, torch.ones(2, dtype=torch.int32, device="mps"), x)


def test_it_counts_kernels_and_waits() -> None:
    with PretendedGPU("cuda") as gpu:
        x = torch.ones(4, 4, device="cuda")
        gpu.counting = True
        y = (x @ x).T.reshape(2, 8)[:1]
        assert gpu.kernels == {"mm": 1, "clone": 1}
        float(y.sum())
        y.cpu()
        assert gpu.syncs.total() == 2


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("where", ["crops", "frozen", "tokens"])
def test_it_sees_planted_mistakes(world: World, kind: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_diffusion.adapters.layer import Buffers
    from spectral_diffusion.data.samples import PhotoCrops
    from spectral_diffusion.models.prompt_encoder import PromptEncoder

    take, put, ids = PhotoCrops.take, Buffers.put, PromptEncoder.token_ids
    if where == "crops":
        monkeypatch.setattr(
            PhotoCrops, "take", lambda self, *a: tuple(t if t is None else t.cpu() for t in take(self, *a))
        )
    elif where == "frozen":
        monkeypatch.setattr(Buffers, "put", lambda self, tensors, device: put(self, tensors, torch.device("cpu")))
    else:
        monkeypatch.setattr(PromptEncoder, "token_ids", lambda self, *a: ids(self, *a).cpu())
    with PretendedGPU(kind), pytest.raises(Refused, match="on the CPU"):
        world.train(kind, f"mistake-{where}")


def test_apples_gpus_are_spared_float64() -> None:
    """They refuse it even as what a copy to the CPU makes."""
    generator = torch.Generator().manual_seed(0)
    skew, rows = torch.randn(3, 4, 4, generator=generator), torch.randn(3, 8, generator=generator)
    want = cayley_change(skew)
    with PretendedGPU("mps"):
        assert torch.equal(cayley_change(skew.to("mps")).cpu(), want)
        assert to_float64(rows.to("mps")).device.type == gram_of(rows.to("mps")).device.type == "cpu"
        for size in (2, 8):  # a Gram matrix, and rows
            GramAccumulator(size).add(rows[:, :size].to("mps"))


@pytest.mark.skipif(bool(REAL), reason="a pretended device")
@pytest.mark.parametrize(
    ("base", "method", "half"),
    [
        ("sd", "spectral-additive", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("klein", "lora", True), ("sd", "dora", False))),
    ],
)
def test_frozen_weights_take_half_the_memory_with_the_same_bits(
    world: World, base: str, method: str, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast would round them anyway; they are whole again afterwards, and validation images know of it."""
    given: dict[str, Any] = {
        "method": method, "mixed_precision": "bf16", "steps": 3, "rank": 2, "device": "cuda", "learning_rate": 1e-2,
        "crops_per_image": 1, "validation": {"every": 3, "num_inference_steps": 1}, "noise_offset": 0.0,
    }  # fmt: skip
    seen: list[set[torch.dtype]] = []

    def watched(network: Any, precision: Any) -> Any:
        seen.append(set())
        return half_weights(network, precision)

    files = []
    with PretendedGPU("cuda"):
        for on in (True, False):
            monkeypatch.setattr("spectral_diffusion.training.loop.half_weights", watched if on else nothing)
            loaded = world.fresh(base, "cuda")
            before = {name: p.detach().clone() for name, p in loaded.denoiser.network.named_parameters()}
            output = tmp_path / str(on) / "rex.safetensors"
            config = TrainConfig(concept=world.rex, output=output, base=str(world.base(base)), **given)
            train_to_file(config, base=loaded)
            after = dict(loaded.denoiser.network.named_parameters())
            assert all(p.dtype == torch.float32 and torch.equal(p, after[name]) for name, p in before.items())
            files.append(load_adapter(output))
    assert bool(seen) == half
    for name, parameters in files[0].parameters.items():
        assert torch.equal(parameters, files[1].parameters[name]), name


@contextmanager
def nothing(network: Any, precision: Any) -> Iterator[None]:
    yield
