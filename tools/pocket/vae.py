"""Training of the autoencoder: a decoder that draws clean edges from imperfect latents.

It begins from the shipped autoencoder and keeps to its latents, so text encoder, U-Net and T2I-Adapters go on from
where they are. Its decoder learns from true latents and from what the U-Net makes of noisy ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import pi, sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from spectral_diffusion.training.checkpoint import load_state, save_state

from .batches import Mix
from .compute import Compute
from .device import DeviceRenderer, constant, grid
from .loop import Progress, Rates
from .models import Trainee, build_scheduler
from .plan import Plan, Planner
from .render import WorldConfig

VARIED = WorldConfig(
    classes=40,
    counts=(0.5, 0.3, 0.2),
    scale=(0.5, 0.95),
    shift=0.15,
    rotate=15,
    natural=0.3,
    second_drawing=0.4,
    puppets=0.2,
)


def build_vae(widths: tuple[int, ...]) -> AutoencoderKL:
    """A small AutoencoderKL with one stage for each width; each but the last halves the side."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=16 * 2 ** (len(widths) - 1),
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


class Critic(nn.Module):
    """Tells patches of true pictures from decoded ones: logits at an eighth of the side, and features on the way.

    It sees the latents beside the picture, so that a patch must fit what it was decoded from.
    """

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 64)) -> None:
        super().__init__()
        sides = (3, *widths)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(sides, widths))
        self.latents = nn.Conv2d(8, widths[-1], 1)
        self.last = nn.Sequential(nn.Conv2d(2 * widths[-1], widths[-1], 3, 1, 1), nn.LeakyReLU(0.2))
        self.head = nn.Conv2d(widths[-1], 1, 3, 1, 1)

    def forward(self, images: Tensor, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        x = images
        for stage in self.stages:
            x = F.leaky_relu(stage(x), 0.2)
            features.append(x)
        x = self.last(torch.cat([x, self.latents(latents)], 1))
        return self.head(x), [*features, x]


@dataclass(frozen=True)
class VaeRecipe(Rates):
    """How the autoencoder is trained."""

    rate: float = 1e-3
    warmup: int = 1_000
    ema: int = 5_000  # samples that the moving average looks back
    predicted: float = 0.5  # share of latents that the U-Net predicted
    timesteps: tuple[int, int] = (50, 650)  # where it predicts
    anchor: float | None = None  # None: the encoder learns the old latents alone, from a quarter of the batch; a
    # number: it learns from the decoded pictures too, and this weight holds it to those latents
    edges: float = 1.0  # weight of the error in differences between neighbours
    features: float = 0.0  # weight of the error in the critic's features
    adversarial: float = 0.0  # weight of what the critic says
    critic_rate: float = 4e-4
    clip: float = 1.0


@dataclass
class VaeBatch:
    """True pictures with the latents to decode; those of the last rows are the U-Net's predictions."""

    images: Tensor  # (n, 3, 128, 128)
    moments: Tensor  # (n, 16, 16, 16) that the old encoder gives
    latents: Tensor  # (n, 8, 16, 16) to decode
    predicted: int


@dataclass
class VaeSource:
    """The batches of a step, keyed by it."""

    renderer: DeviceRenderer
    plans: Callable[[int], Plan]
    old: AutoencoderKL
    trainee: Trainee
    recipe: VaeRecipe
    alphas: Tensor = field(default_factory=lambda: build_scheduler().alphas_cumprod)

    @torch.no_grad()
    def __call__(self, step: int) -> VaeBatch:
        compute, plan = self.renderer.compute, self.plans(step)
        images = self.renderer(plan).images
        generator = compute.generator(step)
        true = len(images) - round(self.recipe.predicted * len(images))
        images = torch.cat([recolored(images[:true], generator), images[true:]])
        with compute.autocast():
            moments = self.old.quant_conv(self.old.encoder(images)).float()
        latents = moments[:, :8].clone()
        if true < len(images):
            ids = compute.move(torch.from_numpy(plan.ids))[true:]
            latents[true:] = self.predict(latents[true:], ids, generator)
        return VaeBatch(images, moments, latents, len(images) - true)

    def predict(self, latents: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        """What the U-Net takes noisy latents for, at random timesteps, with the right captions."""
        compute, device = self.renderer.compute, latents.device
        low, high = self.recipe.timesteps
        timesteps = torch.randint(low, high, (len(latents),), generator=generator, device=device)
        alpha = self.alphas.to(device)[timesteps][:, None, None, None]
        noise = torch.randn(latents.shape, generator=generator, device=device)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with compute.autocast():
            words = self.trainee.text_encoder(ids).last_hidden_state
            velocity = self.trainee.unet(noisy, timesteps, words).sample.float()
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity


def recolored(images: Tensor, generator: torch.Generator, share: float = 0.6) -> Tensor:
    """A share of the pictures with other hues, on either side of a line differently; grays stay.

    Personal things have colours, and colours side by side, that no scene of the pocket world has.
    """
    count, device = len(images), images.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    turns = (2 * pi * uniform(2, count))[..., None, None]
    across = constant(((0.0, -1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 1.0, 0.0)), device) / sqrt(3)
    matrices = turns.cos() * torch.eye(3, device=device) + (1 - turns.cos()) / 3 + turns.sin() * across
    one, two = (torch.einsum("nij,njhw->nihw", matrix, images) for matrix in matrices)
    y, x = (2 * axis / axis.amax() - 1 for axis in grid(*images.shape[-2:], device))
    slope, offset = 2 * pi * uniform(count, 1, 1), uniform(count, 1, 1) - 0.5
    side = slope.cos() * x + slope.sin() * y > offset
    changed = (uniform(count) < share)[:, None, None, None]
    return torch.where(changed, torch.where(side[:, None], one, two).clamp(-1, 1), images)


@dataclass
class VaeTraining:
    """The autoencoder and its critic with their optimizers, the moving average and progress."""

    vae: AutoencoderKL
    compute: Compute
    recipe: VaeRecipe
    progress: Progress = field(default_factory=Progress)
    critic: Critic = field(default_factory=Critic)
    average: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.vae.to(self.compute.device)
        self.critic.to(self.compute.device)
        self.names = [name for name, _ in self.vae.named_parameters()]
        self.parameters = [parameter for _, parameter in self.vae.named_parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        settings: dict[str, Any] = {"weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.recipe.rate, betas=(0.9, 0.99), **settings)
        self.judging = torch.optim.AdamW(
            self.critic.parameters(), lr=self.recipe.critic_rate, betas=(0.5, 0.99), **settings
        )

    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.progress.rate(self.recipe)

    def step(self, batch: VaeBatch) -> Tensor:
        """One optimizer step; returns the squared error in pictures of −1…1, which stays on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        anchor, count = self.recipe.anchor, len(batch.images) - batch.predicted
        if anchor is None:
            count = max(1, len(batch.images) // 4)
        with self.compute.autocast():
            moments = self.vae.quant_conv(self.vae.encoder(batch.images[:count])).float()
            latents = batch.latents if anchor is None else torch.cat([moments[:, :8], batch.latents[count:]])
            decoded = self.vae.decode(latents).sample.float()
        squared = F.mse_loss(decoded, batch.images)
        edges = sum(F.l1_loss(decoded.diff(dim=dim), batch.images.diff(dim=dim)) for dim in (2, 3))
        loss = 4 * squared + F.l1_loss(decoded, batch.images) + self.recipe.edges * edges
        held = 10 if anchor is None else anchor
        loss = loss + held * F.mse_loss(moments[:, :8], batch.moments[:count, :8])
        loss = loss + F.mse_loss(moments[:, 8:], batch.moments[:count, 8:])
        judged = self.recipe.features > 0 or self.recipe.adversarial > 0
        if judged:
            loss = loss + self.judge(decoded, batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        if judged:
            self.train_critic(decoded.detach(), batch)
        count = len(batch.images)
        self.progress.step += 1
        self.progress.samples += count
        with torch.no_grad():
            length = min(self.recipe.ema, max(count, self.progress.samples / 10))
            torch._foreach_lerp_(self.average, list(self.parameters), count / length)
        return squared.detach()

    def judge(self, decoded: Tensor, batch: VaeBatch) -> Tensor:
        """What the critic makes of decoded pictures, as a loss of the decoder."""
        self.critic.requires_grad_(False)
        with self.compute.autocast():
            said, mine = self.critic(decoded, batch.latents)
            with torch.no_grad():
                _, true = self.critic(batch.images, batch.latents)
        self.critic.requires_grad_(True)
        apart = sum((F.l1_loss(a.float(), b.float()) for a, b in zip(mine, true, strict=True)), torch.zeros(()))
        return self.recipe.features * apart - self.recipe.adversarial * said.float().mean()

    def train_critic(self, decoded: Tensor, batch: VaeBatch) -> None:
        """One step of the critic, with the hinge loss."""
        with self.compute.autocast():
            fake, _ = self.critic(decoded, batch.latents)
            real, _ = self.critic(batch.images, batch.latents)
        loss = F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()
        self.judging.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.recipe.clip)
        self.judging.step()

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write everything that a later piece needs: the autoencoder's file last, since it says how far it is."""
        meta = {"progress": asdict(self.progress), "recipe": asdict(self.recipe), "about": about}
        save_state(critic_path(path), dict(self.critic.state_dict()), self.judging, meta)
        tensors = {f"raw.{n}": p for n, p in zip(self.names, self.parameters, strict=True)}
        tensors |= {f"ema.{n}": v for n, v in zip(self.names, self.average, strict=True)}
        save_state(path, tensors, self.optimizer, meta)

    @torch.no_grad()
    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a saved state; returns what was saved ``about`` it."""
        tensors, meta = load_state(path, self.optimizer)
        self.progress = Progress(**meta["progress"])
        for name, parameter, value in zip(self.names, self.parameters, self.average, strict=True):
            parameter.copy_(tensors[f"raw.{name}"])
            value.copy_(tensors[f"ema.{name}"])
        if critic_path(path).exists():  # a critic that is missing or of another step begins anew
            judged, critic_meta = load_state(critic_path(path))
            if critic_meta["progress"]["step"] == self.progress.step:
                load_state(critic_path(path), self.judging)
                self.critic.load_state_dict(judged)
        return meta["about"]

    def averaged(self) -> AutoencoderKL:
        """An autoencoder with the moving averages as its weights."""
        vae = build_vae(tuple(self.vae.config.block_out_channels)).to(self.compute.device)
        vae.load_state_dict(dict(zip(self.names, self.average, strict=True)))
        return vae.requires_grad_(False)


def critic_path(path: Path) -> Path:
    """Where the critic lies beside the autoencoder's state."""
    return path.with_name(f"{path.name.split('.')[0]}-critic.state.safetensors")


@torch.no_grad()
def quality(vae: AutoencoderKL, batch: VaeBatch) -> dict[str, float]:
    """PSNR in dB of true pictures, encoded and decoded, and of decoded predictions; how far the latents moved."""

    def decibels(images: Tensor, decoded: Tensor) -> float:
        error = ((decoded.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
        return float((-10 * error.log10()).mean())

    true = len(batch.images) - batch.predicted
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in batch.images[:true].split(8)])
    decoded = torch.cat([vae.decode(part).sample for part in torch.cat([latents, batch.latents[true:]]).split(8)])
    return {
        "true": decibels(batch.images[:true], decoded[:true]),
        "predicted": decibels(batch.images[true:], decoded[true:]) if batch.predicted else float("nan"),
        "moved": float(F.mse_loss(latents, batch.moments[:true, :8])),
    }


def vae_planner(planner: Planner) -> Planner:
    """The same planner for the autoencoder's varied world."""
    mix = Mix(world=VARIED, wide=0.0, sketch=0.0, keypose=0.0, empty=0.0)
    return Planner(planner.catalogue, planner.encode, mix, planner.batch, "pocket2-vae")
