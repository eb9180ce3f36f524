"""What a GPU does with this program, in one page: `make gpu-check`. No network, at most eight minutes.

Training steps of every method at the shapes of Stable Diffusion 1.5, XL and FLUX.2 klein 4B with random weights, beside
PEFT's LoRA in the loop of diffusers' training scripts; the spectrum on the GPU and on the CPU; every merge,
distillation and regions on the pocket base; precisions and compilation; and the tests of every verb on the device. It
writes ``docs/gpu/<card>.md`` and ``.json``, ready for a pull request. ``--device cpu --tiny`` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_diffusion.adapters.attach import AdapterSpec, inject_adapter, unloading
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.assets import concepts
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.linalg import matrix_shape, min_abs_cosine, top_band
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.merges import all_merges
from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.models.architectures import build_meta
from spectral_diffusion.models.targets import find_targets
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.slots.ledger import Slot
from spectral_diffusion.training.run import train_to_file

RANK, ROUNDS, BUDGET = 8, 5, 480  # seconds in all
SCRIPT = "lora, as diffusers' scripts"
TOO_LARGE = {"svdiff", "oft", "dora"}  # left out beyond Stable Diffusion 1.5: they need all of the spectrum or weights
Row = dict[str, Any]


class Check:
    """The rows of a run by section, and its clock."""

    def __init__(self, device: str, tiny: bool, folder: Path) -> None:
        self.device, self.tiny, self.folder = torch.device(device), tiny, folder
        self.sections: dict[str, list[Row]] = {}
        self.start = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return BUDGET - (time.monotonic() - self.start)

    @contextmanager
    def row(self, section: str, **named: Any) -> Iterator[Row]:
        """A row that is kept whatever happens while it is measured."""
        found: Row = dict(named)
        begun = time.monotonic()
        try:
            yield found
        except Exception as error:  # the rest of the page is wanted all the same
            found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        found["seconds"] = round(time.monotonic() - begun, 2)
        self.sections.setdefault(section, []).append(found)
        print(section, found, flush=True)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# ---------------------------------------------------------------------- training steps


def network_of(arch: str, check: Check) -> tuple[dict[str, nn.Module], Callable[[], Tensor]]:
    """A network with random weights in half precision on the device, and a function that gives its loss."""
    if arch == "klein-4b":
        from diffusers import Flux2Transformer2DModel

        from spectral_diffusion.models.flux2 import fused_rows
        from spectral_diffusion.models.split_linear import split_layers

        size = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
        if check.tiny:
            size = {
                "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 48,
                "attention_head_dim": 16, "in_channels": 4, "axes_dims_rope": (4, 4, 4, 4),
                "timestep_guidance_channels": 32,
            }  # fmt: skip
        with torch.device("meta"):
            network: nn.Module = Flux2Transformer2DModel(guidance_embeds=False, **size)
    else:
        network = build_meta("pocket" if check.tiny else arch)["unet"]
    network.to_empty(device=check.device).to(torch.bfloat16).requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name and name.endswith("weight") else parameter.data.normal_(std=0.02)
    if arch == "klein-4b":
        split_layers(network, fused_rows)
    side, batch = {"sd15": (512, 2), "sdxl": (1024, 1), "klein-4b": (512, 2)}[arch]
    side = 64 if check.tiny else side
    if arch != "sd15":
        network.enable_gradient_checkpointing()  # type: ignore[operator]
        network.train()
    return {"transformer" if arch == "klein-4b" else "unet": network}, loss_of(network, arch, side, batch, check)


def loss_of(network: Any, arch: str, side: int, batch: int, check: Check) -> Callable[[], Tensor]:
    """The loss of one batch for pictures of that side."""
    like: dict[str, Any] = {"device": check.device, "dtype": torch.bfloat16}
    config = network.config
    if arch == "klein-4b":
        from diffusers import Flux2KleinPipeline

        cells = side // 16
        latents = torch.randn(batch, cells * cells, config.in_channels, **like)
        words = torch.randn(batch, 512, config.joint_attention_dim, **like)
        grid = torch.zeros(batch, config.in_channels, cells, cells, device=check.device)
        options = {
            "guidance": None, "encoder_hidden_states": words, "return_dict": False,
            "txt_ids": Flux2KleinPipeline._prepare_text_ids(words).to(check.device),
            "img_ids": Flux2KleinPipeline._prepare_latent_ids(grid).to(check.device),
        }  # fmt: skip
        times = torch.full((batch,), 0.5, **like)
        return lambda: F.mse_loss(network(hidden_states=latents, timestep=times, **options)[0].float(), latents.float())
    latents = torch.randn(batch, config.in_channels, side // 8, side // 8, **like)
    words = torch.randn(batch, 77, config.cross_attention_dim, **like)
    times, more = torch.full((batch,), 500, device=check.device), {}
    if config.addition_embed_type:
        more = {"added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 1280, **like), "time_ids": torch.ones(batch, 6, **like)}}  # fmt: skip
    return lambda: F.mse_loss(network(latents, times, words, **more).sample.float(), latents.float())


def adapted(models: dict[str, nn.Module], method: str) -> list[nn.Parameter]:
    """Attach a method with random bands: the cost does not depend on which."""
    kind = get_method(method)
    layers = find_targets(models)
    allowed = kind.ranks([matrix_shape(layer.weight) for layer in layers.values()])
    rank = RANK if RANK in allowed else allowed[0]
    slot = Slot.interval(0, rank) if kind.slot else None
    frozen: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        out, inside = matrix_shape(layer.weight)
        if kind.builds_on == "columns":
            U, V = (torch.randn(length, rank) / length**0.5 for length in (out, inside))
            frozen[name] = {"U": U, "S": torch.ones(rank), "V": V}
        elif kind.builds_on == "random" and kind.init_frozen:
            frozen[name] = kind.init_frozen(out, inside, rank, slot)
        elif kind.builds_on == "full_svd":
            band = top_band(layer.weight.float(), min(out, inside))
            frozen[name] = {key: value.float() for key, value in band._asdict().items()}
    injected = inject_adapter(models, AdapterSpec(kind, rank, steps=100), "check", frozen)
    return [parameter for _, parameter in injected.named_parameters()]


def steps(check: Check, parameters: list[nn.Parameter], loss: Callable[[], Tensor], reading: bool) -> list[float]:
    """Milliseconds of training steps; ``reading``: the loss after each, as scripts do for their progress bar."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=check.device.type == "cuda")
    taken = []
    for _ in range(ROUNDS + 2):
        check.wait()
        begun = time.perf_counter()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if reading:
            value.item()
        check.wait()
        taken.append(1000 * (time.perf_counter() - begun))
    return taken[2:]


def check_steps(check: Check, arch: str) -> None:
    """Step time and memory of every method on one architecture, against PEFT's LoRA as diffusers' scripts use it."""
    models, loss = network_of(arch, check)
    [network] = models.values()
    names = [name for name in all_methods() if arch == "sd15" or name not in TOO_LARGE]
    baseline = 0.0
    for name in [SCRIPT, "lora", *(name for name in names if name != "lora")]:
        if check.left < 0.35 * BUDGET:
            break
        with check.row(f"steps of {arch}", method=name) as row, unloading(models):
            if check.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if name == SCRIPT:
                from peft import LoraConfig

                targets = r".*\.(to_q|to_k|to_v|to_out\.0)"
                if arch == "klein-4b":  # the projections that our adapters change
                    joint = r"add_[qkv]_proj|to_add_out|to_qkv_mlp_proj\.[qkv]"
                    targets = rf"{targets}|.*\.({joint})|single_transformer_blocks\.\d+\.attn\.to_out"
                network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))  # type: ignore[operator]
                parameters = [p for p in network.parameters() if p.requires_grad]
                for parameter in parameters:
                    parameter.data = parameter.data.float()
            else:
                parameters = adapted(models, name)
            cast: Any = torch.autocast(check.device.type, torch.bfloat16)
            with cast:
                taken = steps(check, parameters, loss, reading=name == SCRIPT)
            row["ms"] = round(statistics.median(taken), 1)
            baseline = baseline or row["ms"]
            row["of the script's"] = round(row["ms"] / baseline, 2)
            row["trained"] = sum(parameter.numel() for parameter in parameters)
            if check.device.type == "cuda":
                row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    del models, loss, network
    if check.device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------- the rest


def check_spectrum(check: Check) -> None:
    """Top columns of some weights of Stable Diffusion 1.5 on the device and on the CPU."""
    layers = find_targets(build_meta("pocket" if check.tiny else "sd15"))
    shapes = sorted({matrix_shape(layer.weight) for layer in layers.values()})
    counts = {shape: sum(matrix_shape(layer.weight) == shape for layer in layers.values()) for shape in shapes}
    total = {"cpu": 0.0, check.device.type: 0.0}
    for shape in shapes:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) @ torch.diag(
            torch.linspace(2, 0.1, shape[1])
        )
        count = min(64, *shape)
        bands = {}
        with check.row("spectrum", shape="×".join(map(str, shape)), layers=counts[shape]) as row:
            for where in dict.fromkeys(("cpu", check.device.type)):
                place = check.device if where != "cpu" else torch.device("cpu")
                here = weight.to(place)
                if where != "cpu":
                    top_band(here, count)  # the first call also loads the solver
                check.wait()
                begun = time.perf_counter()
                bands[where] = top_band(here, count)
                check.wait()
                seconds = time.perf_counter() - begun
                row[f"{where} s"] = round(seconds, 3)
                total[where] += seconds * counts[shape]
            on_device = bands[check.device.type]._replace(
                **{key: value.cpu() for key, value in bands[check.device.type]._asdict().items()}
            )
            row["least cosine"] = round(float(min_abs_cosine(bands["cpu"], on_device).min()), 6)
    with check.row("spectrum", shape="all layers") as row:
        row |= {f"{where} s": round(seconds, 1) for where, seconds in total.items()}


def check_verbs(check: Check) -> None:
    """Trainings in every precision, every merge, distillation and regions on the pocket base."""
    device, files = str(check.device), []
    count = 3 if check.tiny else 60
    for name in ("rex", "brew"):
        output = check.folder / f"{name}.safetensors"
        with check.row("pocket base", what=f"train {name}, {count} steps") as row:
            row["loss"] = last_loss(concept=concepts() / name, output=output, device=device, steps=count)
        files.append(output)
    modes: list[dict[str, Any]] = [
        {"dtype": "float16"}, {"dtype": "bfloat16"}, {"mixed_precision": "no"}, {"compile": True},
        {"gradient_checkpointing": True}, {"method": "spectral-rotation"},
    ]  # fmt: skip
    for more in modes:
        if check.left < 0.2 * BUDGET or (check.tiny and "compile" in more):
            continue
        with check.row("pocket base", what=f"train rex with {more}") as row:
            output = check.folder / "-".join(map(str, more.values())) / "rex.safetensors"
            output.parent.mkdir(exist_ok=True)
            row["loss"] = last_loss(concept=concepts() / "rex", output=output, device=device, steps=count, **more)
    merges: list[tuple[str, dict[str, Any]]] = [
        *((merge, {"merge": merge}) for merge in all_merges() if merge != "orthogonal"),
        ("distillation, 20 steps", {"distill": {"steps": 2 if check.tiny else 20}}),
    ]
    for number, (name, more) in enumerate(merges):
        if check.left < 0.15 * BUDGET:
            break
        with check.row("pocket base", what=f"fuse: {name}"):
            output = check.folder / f"fused-{number}"
            fuse_to_folder(FuseConfig(adapters=files, output=output, device=device, **more))
    with check.row("pocket base", what="8 pictures with two regions, 20 steps"):
        regions = [
            Region(box=(0.5 * i, 0, 0.5 + 0.5 * i, 1), prompt=f"<{file.stem}>", adapters={str(file): 1.0})
            for i, file in enumerate(files)
        ]
        generate_to_file(Scene(
            prompt="on the beach", regions=regions, device=device, width=256, height=128, num_images=8,
            num_inference_steps=2 if check.tiny else 20, output=check.folder / "scene.png"))  # fmt: skip


def last_loss(**settings: Any) -> float:
    """The running loss at the end of a training of the pocket base."""
    losses: list[float] = []

    def watch(event: Event) -> None:
        if event.stage == "train" and "loss" in event.metrics:
            losses.append(event.metrics["loss"])

    train_to_file(TrainConfig(rank=RANK, **settings), hooks=Hooks(progress=watch))
    return round(losses[-1], 4)


def check_tests(check: Check) -> None:
    """The tests of every verb, on the device itself."""
    with check.row("tests", what="tests/test_pretended_gpu.py on the device") as row:
        environment = {**os.environ, "SPECTRAL_DIFFUSION_TEST_DEVICE": str(check.device)}
        only = ["-k", "spectral-additive or regions"] if check.tiny else []
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_pretended_gpu.py", "-k", "people_do_most", *only],
            capture_output=True, text=True, env=environment, timeout=max(60.0, check.left), check=False,
        )  # fmt: skip
        row["result"] = (ran.stdout.strip().splitlines() or ["nothing"])[-1]
        if ran.returncode:
            row["error"] = next((line for line in ran.stdout.splitlines() if line.startswith("E  ")), "failed").strip()


def machine(device: torch.device) -> Row:
    """The card and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} of {platform.machine()}"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0
    libraries = ("torch", "diffusers", "transformers", "peft", "spectral-diffusion")
    return {
        "card": name, "GiB": round(memory, 1), "CUDA": torch.version.cuda or "",
        **{library: version(library) for library in libraries},
    }  # fmt: skip


def page(check: Check, found: Row) -> str:
    """The report as Markdown."""
    lines = [f"# {found['card']}", "", ", ".join(f"{key} {value}" for key, value in found.items() if value), ""]
    lines += ["Written by `make gpu-check` (`benchmarks/gpu_check.py`); rank 8, attention targets, bfloat16.", ""]
    for section, rows in check.sections.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"## {section[0].upper()}{section[1:]}", "", f"| {' | '.join(columns)} |"]
        lines += [f"|{' --- |' * len(columns)}"]
        lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows]
        lines += [""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps, to try the script")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/gpu"))
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no CUDA device here; try the script itself with --device cpu --tiny.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        check = Check(given.device, given.tiny, Path(folder))
        os.environ["SPECTRAL_DIFFUSION_CACHE"] = str(check.folder / "cache")
        check_spectrum(check)
        check_verbs(check)
        for arch in ("sd15", "klein-4b", "sdxl"):
            check_steps(check, arch)
        if check.left > 60:
            check_tests(check)
    found = machine(check.device)
    given.output.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", found["card"].lower()).strip("-")
    (given.output / f"{stem}.md").write_text(page(check, found), encoding="utf-8")
    (given.output / f"{stem}.json").write_text(json.dumps({"machine": found, **check.sections}, indent=2))
    wrong = [row for rows in check.sections.values() for row in rows if "error" in row]
    print(f"{given.output / stem}.md, {len(wrong)} errors, {time.monotonic() - check.start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
