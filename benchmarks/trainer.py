"""Steps a second of our trainer against a loop as diffusers' DreamBooth-LoRA example has it.

Both train the same LoRA (PEFT's own for theirs) of the U-Net's and text encoder's attention on one Stable Diffusion
1.5 with random weights, from the same photos, batch, precision and optimizer; reading the photo, the VAE and the text
encoder count on both sides. Ours once with no cache, as the example has none, and once with its caches. The three take
turns after every step, each on modules of its own over the same weights, so that a drifting machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from spectral_diffusion.config.settings import build
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core import assets as resources
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.models.architectures import build_meta, build_vae_meta, fill_randomly
from spectral_diffusion.models.base import Base
from spectral_diffusion.training.loop import TrainingJob, train
from tools.pocket.models import build_tokenizer

RANK, RATE, WARM = 8, 1e-4, 2  # the first steps are not counted
ATTENTION = {
    "unet": ["to_k", "to_q", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


def random_base() -> Base:
    """Every network of Stable Diffusion 1.5 at its size, weights small and random."""
    torch.manual_seed(0)
    models = {**build_meta("sd15"), "vae": build_vae_meta()}
    for model in models.values():
        fill_randomly(model.requires_grad_(False))
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    pipeline = StableDiffusionPipeline(
        tokenizer=tokenizer, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **models,
    )  # fmt: skip
    return Base("random", pipeline, torch.device("cpu"), torch.float32)


def twin(base: Base) -> Base:
    """A base of its own modules over the same weights, which nobody changes."""
    parts = dict(base.pipeline.components)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            shared = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
            parts[name] = copy.deepcopy(part, shared)
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    return Base("random", pipeline, base.device, base.dtype)


def make_photos(folder: Path, side: int = 1024) -> Path:
    """Photos of a shipped concept, as large as a telephone's after a first crop."""
    folder.mkdir()
    for path in sorted((resources.concepts() / "rex").glob("*.png")):
        photo = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        photo.save(folder / f"{path.stem}.jpg", quality=92)
    (folder / "concept.yaml").write_text("name: rex\nnoun: dog\ntoken: <rex>\n")
    return folder


class Photos(Dataset[dict[str, Any]]):
    """As the example's dataset: a photo is opened, turned, resized, cropped and made a tensor each time it is asked."""

    def __init__(self, folder: Path, tokenizer: Any, size: int) -> None:
        self.files, self.tokenizer, self.size = sorted(folder.glob("*.jpg")), tokenizer, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        photo = ImageOps.exif_transpose(Image.open(self.files[index])).convert("RGB")
        photo = ImageOps.fit(photo, (self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(photo, np.float32) / 127.5 - 1).permute(2, 0, 1)
        words = self.tokenizer(
            "a photo of a dog", truncation=True, padding="max_length", max_length=77, return_tensors="pt"
        )
        return {"pixels": pixels, "ids": words.input_ids[0]}


class Turns:
    """Who may work: the loops take a step each, one after the other; every step is timed."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._waiting, self._next, self._begun = threading.Condition(), 0, time.perf_counter()

    def take(self, name: str) -> None:
        """Wait for this loop's turn."""
        with self._waiting:
            self._waiting.wait_for(lambda: self.names[self._next] == name)
            self._begun = time.perf_counter()

    def give(self, name: str) -> None:
        """A step is done: the next loop's turn."""
        with self._waiting:
            self.seconds[name].append(time.perf_counter() - self._begun)
            self._next = (self._next + 1) % len(self.names)
            self._waiting.notify_all()


def their_loop(base: Base, folder: Path, size: int, batch: int, steps: int, turns: Turns, name: str) -> None:
    """The example's loop: LoRA by PEFT, the photo through VAE and text encoder at every step."""
    accelerator = Accelerator(cpu=True)
    pipeline = base.pipeline
    unet, text_encoder, vae = pipeline.unet, pipeline.text_encoder, pipeline.vae
    for model, targets in ((unet, ATTENTION["unet"]), (text_encoder, ATTENTION["text_encoder"])):
        wanted = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets)
        inject_adapter_in_model(wanted, model, "theirs")  # what add_adapter of both libraries comes down to
        model.train()
    parameters = [p for model in (unet, text_encoder) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    rates = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    loader = DataLoader(Photos(folder, pipeline.tokenizer, size), batch, shuffle=True)
    unet, text_encoder, optimizer, loader, rates = accelerator.prepare(unet, text_encoder, optimizer, loader, rates)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    turns.take(name)
    while len(turns.seconds[name]) < steps:
        for one in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(one["pixels"]).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),)).long()
                noisy = schedule.add_noise(latents, noise, timesteps)
                words = text_encoder(one["ids"])[0]
                predicted = unet(noisy, timesteps, words).sample
                loss: Tensor = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            float(loss.detach())  # the example logs it
            turns.give(name)
            if len(turns.seconds[name]) == steps:
                return
            turns.take(name)


def our_loop(
    base: Base, folder: Path, size: int, batch: int, steps: int, cached: bool, turns: Turns, name: str
) -> None:
    """Our trainer; the token's vectors are trained too."""

    def watch(event: Event) -> None:
        if event.stage == "train":
            turns.give(name)
            if event.done < steps:
                turns.take(name)

    with tempfile.TemporaryDirectory() as kept:
        config = build(TrainConfig, {
            "concept": folder, "output": Path(kept) / "rex.safetensors", "method": "lora", "rank": RANK,
            "resolution": size, "batch_size": batch, "steps": steps, "learning_rate": RATE, "noise_offset": 0.0,
            "checkpointing_steps": steps, "text_encoder_learning_rate": RATE, "crops_per_image": 1,
            "data": {"cache_latents": cached, "latents_cache_dir": Path(kept) / "latents"},
        })  # fmt: skip
        first = iter([True])

        def before_the_first() -> bool:
            if next(first, False):
                turns.take(name)
            return False

        state = Path(kept) / "state.safetensors"
        job = TrainingJob(config, base, load_concept(folder), None, state)
        train(job, Hooks(watch, should_stop=before_the_first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=16, help="that are counted of each")
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    base = random_base()
    names = ("diffusers' loop", "ours, no caches", "ours, caches")
    turns = Turns(names)
    with tempfile.TemporaryDirectory() as place:
        folder = make_photos(Path(place) / "photos")
        shared = (folder, arguments.size, arguments.batch, arguments.steps + WARM)
        work = [
            threading.Thread(target=their_loop, args=(base, *shared, turns, names[0]), daemon=True),
            threading.Thread(target=our_loop, args=(twin(base), *shared, False, turns, names[1]), daemon=True),
            threading.Thread(target=our_loop, args=(twin(base), *shared, True, turns, names[2]), daemon=True),
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    seconds = {name: turns.seconds[name][WARM:] for name in names}
    theirs = seconds[names[0]]
    out = {
        name: {
            "seconds a step": round(statistics.median(times), 3),
            "of theirs": round(statistics.median(a / b for a, b in zip(theirs, times, strict=True)), 3),
        }
        for name, times in seconds.items()
    }
    print(json.dumps({"threads": torch.get_num_threads(), "steps": arguments.steps, **out}, indent=1))


if __name__ == "__main__":
    main()
