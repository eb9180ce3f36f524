"""What the base draws while it is trained: the pipeline as it stands, and a sheet of fixed prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from spectral_diffusion.data.image_grid import image_grid

from .base import Training
from .models import Trainee, save_pipeline

SHEET = [
    "a red octopus on the beach",
    "a blue dog on the grass",
    "a yellow cat on a white background",
    "a green elephant in the snow",
    "an orange giraffe on a blue background",
    "a purple rabbit on the grass",
    "a black penguin in the snow",
    "a yellow duck on the water",
    "a brown turtle on the beach",
    "a pink butterfly in the sky",
    "a red fish in the sea",
    "an orange crab on a black background",
    "a green apple on a table",
    "a yellow banana on a purple background",
    "a blue car in the desert",
    "a white airplane in the sky",
    "a red rocket at night",
    "an orange sailboat on the water",
    "a purple teapot on a table",
    "a brown house in the snow",
    "a green tree on a pink background",
    "a black guitar on a yellow background",
    "a red mushroom on the grass",
    "a blue backpack in the desert",
    "a red dog on the left and a blue cat on the right on a white background",
    "a yellow duck on the left and a purple teapot on the right on a table",
    "a green car and an orange house on the grass",
    "a white rabbit on the left and a black octopus on the right on the beach",
    "a dog on the grass",
    "an octopus in the sea",
    "a mushroom on the grass",
    "a penguin in the snow",
]


def export(training: Training, vae: AutoencoderKL, folder: Path, average: int = 0) -> None:
    """Write the pipeline with one of the moving averages as its weights, in fp16."""
    trainee = training.trainee
    shown = Trainee(trainee.sizes, trainee.downscale)
    shown.load_state_dict(training.averaged_weights(average), strict=False)
    save_pipeline(folder, vae, shown.tokenizer, shown.text_encoder, shown.unet, shown.t2i_sketch, shown.t2i_keypose)
    training.write_about(folder)


def sample_sheet(pipeline: Path, target: Path, prompts: list[str] | None = None, steps: int = 20) -> None:
    """Write a grid of pictures of fixed prompts, 8 to a row, 128 pixels each."""
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    prompts = prompts or SHEET
    for start in range(0, len(prompts), 8):
        chunk = prompts[start : start + 8]
        generators = [torch.Generator().manual_seed(100 + start + i) for i in range(len(chunk))]
        images += pipe(chunk, num_inference_steps=steps, guidance_scale=4.0, generator=generators).images
    image_grid([image.resize((128, 128), Image.Resampling.NEAREST) for image in images], 8, gap=0).save(target)
