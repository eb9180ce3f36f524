"""The pocket transformer: pretraining computes what FLUX.2's pipeline does, and pieces join bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, DiffusionPipeline
from PIL import Image
from torch import Tensor

from spectral_diffusion.core.errors import UserError
from spectral_diffusion.models.denoiser import Conditioning
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.targets import find_targets
from tools.pocket import transformer
from tools.pocket.batches import Batch, token_ids
from tools.pocket.compute import Compute
from tools.pocket.loop import Limits, train_piece
from tools.pocket.map_heads import ANSWERS, TokenMapHead
from tools.pocket.muon import is_inner
from tools.pocket.teacher import FlowTeacher
from tools.pocket.transformer import (
    FlowRecipe,
    FlowTrainee,
    FlowTraining,
    build_tokenizer,
    chat_ids,
    export_transformer,
    flux2_vae,
    transformer_pictures,
)
from tools.pocket.vae import build_vae
from tools.pocket.world import vocabulary

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")

CPU = Compute(torch.device("cpu"), False)
CAPTIONS = ["a red dog on the grass", "", "a Blue cat and a zqx"]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    pictures = [torch.rand(4, 3, 32, 32) * 2 - 1 for _ in range(3)]
    return flux2_vae(build_vae((8, 8, 8, 8)), pictures)


@pytest.fixture
def training(vae: AutoencoderKLFlux2, monkeypatch: pytest.MonkeyPatch) -> FlowTraining:
    monkeypatch.setattr(transformer, "HEADS", 2)
    monkeypatch.setattr(transformer, "DEPTH", (1, 1))
    torch.manual_seed(0)
    return FlowTraining(FlowTrainee(vae), CPU, FlowRecipe(warmup=8, ema=(4, 40)))


def random_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = chat_ids(build_tokenizer(), [f"a {word} on the grass" for word in ("dog", "cat", "house", "tree")])
    none = torch.zeros(0, dtype=torch.long)
    latents = torch.randn(4, 8, 8, 8, generator=generator)
    where = torch.rand(4, 1, 8, 8, generator=generator)
    return Batch(latents, where, ids, none, torch.zeros(0), none, torch.zeros(0), torch.zeros(4, 2, 8, 8).long())


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 1 for word in vocabulary())
    assert tokenizer.decode(tokenizer("Zqx and a dog").input_ids).strip() == "zqx and a dog"


def test_the_autoencoder_is_the_same_with_normal_latents() -> None:
    torch.manual_seed(1)
    old = build_vae((8, 8, 8, 8)).requires_grad_(False)
    pictures = [torch.rand(8, 3, 32, 32) * 2 - 1 for _ in range(2)]
    new = flux2_vae(old, pictures)
    latents = [vae.encode(pictures[0]).latent_dist.mean for vae in (old, new)]
    assert torch.equal(*latents) and torch.equal(old.decode(latents[0]).sample, new.decode(latents[0]).sample)
    trainee = FlowTrainee(new)
    normal = torch.cat([trainee.denoiser.normalize(new.encode(batch).latent_dist.mean) for batch in pictures])
    assert normal.mean((0, 2, 3)).abs().max() < 1e-3 and (normal.std((0, 2, 3)) - 1).abs().max() < 0.02


def test_the_head_reads_every_latent_from_the_token_that_covers_it() -> None:
    head = TokenMapHead(transformer.build_transformer())
    head.layers = torch.nn.Identity()
    labels = torch.stack([torch.randint(0, count, (2, 8, 8)) for count in ANSWERS], 1)
    hot = [F.one_hot(labels[:, i], count).movedim(-1, 1) for i, count in enumerate(ANSWERS)]
    tokens = F.pixel_unshuffle(torch.cat(hot, 1) * 50.0, 2).flatten(2).mT
    prompt = torch.randn(2, 5, tokens.shape[-1])
    head._seen.append(torch.cat([prompt, tokens], 1))
    assert head.loss(labels) < 1e-6
    head._seen.append(torch.cat([prompt, tokens.roll(1, 1)], 1))
    assert head.loss(labels) > 1


def test_training_reads_prompts_and_predicts_as_the_pipeline_does(training: FlowTraining) -> None:
    trainee = training.trainee.eval()
    pipeline = trainee.pipeline()
    options = {"max_sequence_length": transformer.LENGTH, "text_encoder_out_layers": (1, 2, 3)}
    with torch.no_grad():
        words = trainee.words(chat_ids(trainee.tokenizer, CAPTIONS))
        assert torch.allclose(words, pipeline.encode_prompt(CAPTIONS, torch.device("cpu"), **options)[0], atol=1e-6)
        noisy, times = torch.randn(3, 32, 4, 4), torch.tensor([3, 500, 999])
        mine = trainee(noisy, times, chat_ids(trainee.tokenizer, CAPTIONS))
        again = trainee.denoiser.predict(noisy, times, Conditioning({"encoder_hidden_states": words}))
    assert torch.equal(mine, again)


def test_a_perfect_teacher_expects_what_the_flow_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the scale of the latents, the noise levels and the form of the prediction, exactly."""
    torch.manual_seed(0)
    vae = flux2_vae(build_vae((8, 8, 8, 8)), [torch.rand(4, 3, 32, 32) * 2 - 1])
    student, base = FlowTrainee(vae).denoiser, load_base("pocket", "cpu")
    teacher = FlowTeacher(base, student)
    raw = 0.7 * torch.randn(6, 8, 16, 8)
    latents, timesteps = student.normalize(raw), torch.tensor([80, 250, 499, 612, 800, 990])
    noise = torch.randn_like(latents)
    raw_noise = student.denormalize(noise) - student.denormalize(torch.zeros_like(noise))
    cumulative = base.pipeline.scheduler.alphas_cumprod.sqrt().acos()

    def predict(noisy: Tensor, at: Tensor, conditioning: Conditioning) -> Tensor:
        assert len(conditioning) == 6 and conditioning.tensors["encoder_hidden_states"].shape[1:] == (32, 128)
        low = at.floor().long()
        angles = torch.lerp(cumulative[low], cumulative[low + 1], at - low).view(-1, 1, 1, 1)
        assert torch.allclose(noisy, angles.cos() * raw + angles.sin() * raw_noise, atol=1e-3)
        return angles.cos() * raw_noise - angles.sin() * raw

    monkeypatch.setattr(teacher.denoiser, "predict", predict)
    ids = token_ids(teacher.tokenizer, ["a red dog"] * 6)
    expected = teacher.velocity(student.add_noise(latents, noise, timesteps), timesteps, ids)
    assert torch.allclose(expected, student.target(latents, noise, timesteps), atol=1e-3)


def test_a_teacher_of_another_family_is_refused(training: FlowTraining) -> None:
    with pytest.raises(UserError, match="must be a Stable Diffusion that predicts velocities"):
        FlowTeacher(load_base("pocket-transformer", "cpu"), training.trainee.denoiser)


def test_the_teacher_says_the_target_at_its_timesteps_only(training: FlowTraining) -> None:
    class Known:
        asked: Tensor

        def velocity(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
            assert ids.shape[1] == 3
            self.asked = timesteps
            return torch.full_like(noisy, 1e4)

    batch, plain = random_batch(0), training.loss(random_batch(0))
    batch.ids = torch.cat([batch.ids, torch.zeros(4, 3, dtype=torch.long)], 1)
    assert torch.equal(training.loss(batch), plain)
    training.teacher = known = Known()  # type: ignore[assignment]
    training.recipe = replace(training.recipe, taught=(400, 800))
    assert training.loss(batch) > 1e6
    assert len(known.asked) and bool(((known.asked >= 400) & (known.asked < 800)).all())
    training.recipe = replace(training.recipe, taught=(0, 0))
    assert torch.equal(training.loss(batch), plain)


def test_a_resumed_training_is_the_unbroken_one_bit_for_bit(
    training: FlowTraining, vae: AutoencoderKLFlux2, tmp_path: Path
) -> None:
    def run(part: FlowTraining, until: int) -> None:
        train_piece(part, random_batch, Limits(until_samples=until, report_steps=2), lambda: None, lambda said: None)

    def fresh() -> FlowTraining:
        torch.manual_seed(0)
        return FlowTraining(FlowTrainee(vae), CPU, training.recipe)

    begun = [parameter.detach().clone() for parameter in training.parameters]
    run(training, 24)
    part = fresh()
    run(part, 8)
    part.save(tmp_path / "state.safetensors")
    rest = fresh()
    rest.load(tmp_path / "state.safetensors")
    run(rest, 24)
    every: list[tuple[Tensor, Tensor]] = list(zip(training.parameters, rest.parameters, strict=True))
    every += zip(training.averages[0], rest.averages[0], strict=True)
    names = [*training.names, *training.names]
    assert [name for name, (one, two) in zip(names, every, strict=True) if not torch.equal(one, two)] == []
    assert sum(not torch.equal(one, two) for one, two in zip(begun, training.parameters, strict=True)) > 20


def test_muon_updates_the_matrices_in_blocks_and_adamw_everything_else(training: FlowTraining) -> None:
    kinds = {name: is_inner(name, p) for name, p in zip(training.names, training.parameters, strict=True)}
    outside = {name.partition(".weight")[0] for name, inside in kinds.items() if not inside}
    assert not {"text_encoder.model.embed_tokens", "transformer.x_embedder", "transformer.proj_out"} - outside
    assert {"head.layers.0", "text_encoder.model.norm"} <= outside
    assert kinds["text_encoder.model.layers.0.mlp.up_proj.weight"] and kinds["transformer.norm_out.linear.weight"]
    assert kinds["transformer.single_transformer_blocks.0.attn.to_out.weight"]
    before = [parameter.detach().clone() for parameter in training.parameters]
    training.step(random_batch(0))
    first, rest = training.optimizer.param_groups
    assert first["lr"] == training.recipe.rate / 8 and rest["lr"] == first["lr"] * training.recipe.rate_share
    name = "transformer.single_transformer_blocks.0.attn.to_out.weight"
    moved = dict(zip(training.names, training.parameters, strict=True))[name] - before[training.names.index(name)]
    values = torch.linalg.svdvals(moved.detach())
    assert values[0] < 3 * values[len(values) // 2]  # all directions move about as far


@pytest.mark.slow
def test_the_loss_falls(training: FlowTraining) -> None:
    losses = [float(training.step(random_batch(step % 2))) for step in range(30)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_an_export_is_a_stock_pipeline_and_a_base(training: FlowTraining, tmp_path: Path) -> None:
    training.step(random_batch(0))
    training.trainee.denoiser.vae.save_pretrained(tmp_path / "vae")
    training.trainee.denoiser.vae = AutoencoderKLFlux2.from_pretrained(tmp_path / "vae")
    export_transformer(training, tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "vae" / "config.json").read_text(encoding="utf-8")
    stock = DiffusionPipeline.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    [image] = transformer_pictures(stock, ["a dog"], steps=1)
    assert isinstance(image, Image.Image) and image.size == (128, 128)
    base = load_base(str(tmp_path / "out"), "cpu")
    assert base.denoiser.side_multiple == 16 and len(find_targets(base.models, "attention")) == 8 + 4
