"""The pocket base's pretraining: drawing on the device, and training in pieces that can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.files import write_tensors
from spectral_diffusion.scenes.keypose import draw_keypose
from tools.pocket import puppets, render, travel, trials
from tools.pocket.base import Recipe, Training, changed, velocity_loss
from tools.pocket.batches import Batch, Mix, token_ids
from tools.pocket.compute import Compute, choose
from tools.pocket.device import (
    DeviceRenderer,
    DeviceSource,
    begin_planning,
    label_maps,
    outline,
    planned_ahead,
    skeletons,
    thicken,
)
from tools.pocket.growth import widened
from tools.pocket.loop import Limits, Progress, train_piece
from tools.pocket.models import Sizes, Trainee, build_tokenizer
from tools.pocket.muon import MuonAdamW
from tools.pocket.plan import Layer, Plan, Planner
from tools.pocket.sprites import NOUNS, TINTS, Bank, build_bank, icon_keys, tinted
from tools.pocket.vae import VaeBatch, VaeRecipe, VaeSource, VaeTraining, build_vae, quality, recolored

TINY = Sizes(widths=(8, 8, 8), heads=(1, 1, 1), groups=4, text_width=32, text_layers=1)
CPU = Compute(torch.device("cpu"), bf16=False)


def random_batch(step: int) -> Batch:
    """A batch of noise that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)

    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    ids = torch.randint(0, 1000, (4, 32), generator=generator)
    return Batch(
        noise(4, 8, 8, 8), noise(4, 1, 8, 8), ids, torch.tensor([1]), noise(1, 1, 32, 32),
        torch.tensor([0, 3]), noise(2, 3, 32, 32), torch.randint(0, 12, (4, 2, 8, 8), generator=generator),
    )  # fmt: skip


def tiny_training(recipe: Recipe | None = None) -> Training:
    torch.manual_seed(0)
    return Training(Trainee(TINY, downscale=4), CPU, recipe or Recipe(warmup=8, ema=(4, 40)))


def run(training: Training, until: int, saver: Callable[[], None] = lambda: None) -> list[str]:
    said: list[str] = []
    train_piece(training, random_batch, Limits(until_samples=until, report_steps=3), saver, said.append)
    return said


def test_a_resumed_training_is_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    whole = tiny_training()
    run(whole, 60)
    part = tiny_training()
    part.about = {"start": "noise"}
    run(part, 32, lambda: part.save(tmp_path / "state"))
    rest = tiny_training()
    torch.manual_seed(99)
    rest.load(tmp_path / "state")
    assert rest.about == {"start": "noise"}
    run(rest, 60)
    assert rest.progress.step == whole.progress.step == 15
    for mine, theirs in zip([rest.parameters, *rest.averages], [whole.parameters, *whole.averages], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(*whole.averages, strict=True))


def test_a_piece_ends_by_time_with_a_saved_state(tmp_path: Path) -> None:
    saved: list[int] = []
    training = tiny_training()
    said: list[str] = []
    train_piece(
        training,
        random_batch,
        Limits(minutes=0.0, report_steps=2),
        lambda: saved.append(training.progress.step),
        said.append,
    )
    assert saved == [2] and training.progress.step == 2 and "loss" in said[0]


def test_the_rate_is_constant_until_the_decay_is_asked_for() -> None:
    recipe, progress = Recipe(rate=1.0, warmup=10, last_rate=0.1), Progress()
    assert progress.rate(recipe) == pytest.approx(0.1)
    progress.samples = 500
    assert progress.rate(recipe) == 1 and not progress.decayed
    progress.decay_from, progress.decay_samples = 500, 100
    progress.samples = 550
    assert progress.rate(recipe) == pytest.approx(0.55) and not progress.decayed
    progress.samples = 600
    assert progress.rate(recipe) == pytest.approx(0.1) and progress.decayed


def test_a_loss_that_is_not_finite_is_never_saved() -> None:
    training = tiny_training()
    with torch.no_grad():
        training.parameters[0].fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        run(training, 12, lambda: pytest.fail("saved"))


def test_bfloat16_is_measured_not_assumed() -> None:
    assert choose("cpu", bf16=True).bf16 and not choose("cpu", bf16=False).bf16
    assert choose("cpu").bf16 in (True, False)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank whose icons are full squares but for the first class's, two thirds as high as wide, red left of blue."""
    file = tmp_path_factory.mktemp("artwork") / "artwork.safetensors"
    sprites = torch.zeros(len(icon_keys()), 32, 32, 4, dtype=torch.uint8)
    sprites[:, 2:30, 2:30] = 255
    sprites[:2] = 0
    sprites[:2, 7:25, 2:16] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)
    sprites[:2, 7:25, 16:30] = torch.tensor([0, 0, 255, 255], dtype=torch.uint8)
    sizes = torch.ones(len(sprites), 2)
    sizes[:2, 1] = 18 / 28
    write_tensors(file, {"sprites": sprites, "sizes": sizes})
    return build_bank(file, 32, 1, CPU.device, quick=True)


def one_thing(bank: Bank, x: float, y: float, side: float, angle: float = 0, mirror: float = 1) -> Plan:
    """A plan of one picture with the first class in its own colours."""
    sprite = bank.catalogue.icon("octopus", False, None)
    layer = Layer([0], [sprite], [0], [10], [(x, y, side, angle, mirror)])
    return Plan(False, 1, [layer], [0], [False], [""], np.zeros((1, 32), np.int64), [0], [(False, False, 0.0)], [])


@pytest.mark.parametrize("side", [0.9, 0.5, 0.3])
def test_a_sprite_is_drawn_where_and_as_large_as_planned(bank: Bank, side: float) -> None:
    scenes = DeviceRenderer(bank, CPU)(one_thing(bank, 0.5, 0.55, side))
    mask = scenes.masks[0, 0]
    assert float(mask.sum()) / 1024 == pytest.approx(side * side * 18 / 28, rel=0.06)
    centre = torch.arange(32) + 0.5
    assert float((mask.sum(0) * centre).sum() / mask.sum()) / 32 == pytest.approx(0.5, abs=0.01)
    assert float((mask.sum(1) * centre).sum() / mask.sum()) / 32 == pytest.approx(0.55, abs=0.01)
    red, _, blue = scenes.images[0]
    middle = round(0.55 * 32)
    assert red[middle, 13] > 0.9 and blue[middle, 13] < -0.9 and blue[middle, 18] > 0.9 and red[middle, 18] < -0.9
    assert scenes.sketches.shape == (1, 1, 32, 32) and float(scenes.sketches.max()) > 0.5
    assert scenes.cover[0][1].sum() == mask.sum()


def test_sprites_turn_to_the_left_and_are_mirrored(bank: Bank) -> None:
    draw = DeviceRenderer(bank, CPU)
    upright = draw(one_thing(bank, 0.5, 0.5, 0.75, angle=90))
    mask = upright.masks[0, 0] > 0.5
    assert int(mask.any(1).sum()) == 24 and abs(int(mask.any(0).sum()) - 15) <= 1
    assert upright.images[0, 2, 8, 16] > 0.9 and upright.images[0, 0, 24, 16] > 0.9  # the right side, blue, is up
    mirrored = draw(one_thing(bank, 0.5, 0.5, 0.75, mirror=-1))
    assert mirrored.images[0, 2, 16, 10] > 0.9 and mirrored.images[0, 0, 16, 22] > 0.9


def test_what_lies_in_front_covers_what_lies_behind(bank: Bank) -> None:
    plan = one_thing(bank, 0.5, 0.5, 0.9)
    square = bank.catalogue.icon("dog", False, "green")
    plan.layers.append(Layer([0], [square], [1], [3], [(0.25, 0.5, 0.5, 0.0, 1.0)]))
    scenes = DeviceRenderer(bank, CPU)(plan)
    (_, behind), (_, front) = scenes.cover
    assert behind[0, 0, 16, 8] < 0.05 and front[0, 0, 16, 8] > 0.95 and behind[0, 0, 16, 24] > 0.95
    assert torch.allclose(torch.maximum(behind, front).amax(), scenes.masks.amax(), atol=1e-5)
    nouns, tints = label_maps(plan, scenes, 4, CPU)[0]
    assert (nouns[4, 2], tints[4, 2]) == (1, 3) and (nouns[4, 6], tints[4, 6]) == (0, 10)
    assert (nouns[0, 7], tints[0, 7]) == (len(NOUNS), len(TINTS))


def test_the_device_draws_as_the_other_renderer_does() -> None:
    random = np.random.default_rng(0)
    sprite = np.asarray(Image.effect_noise((24, 24), 90).convert("RGB"))
    sprite = np.dstack([sprite, np.full((24, 24), 255, np.uint8)])
    colour = (220, 38, 38)
    wanted = np.asarray(render.tint(Image.fromarray(sprite, "RGBA"), colour), np.float32) / 255
    assert np.abs(tinted(torch.from_numpy(sprite).float() / 255, colour).numpy() - wanted).max() < 0.01
    alpha, rgb = np.ones((16, 16), np.float32), random.random((16, 16, 3)).astype(np.float32)
    alpha[:, :5] = 0
    lines = outline(
        torch.from_numpy(rgb * alpha[..., None]).permute(2, 0, 1)[None], torch.from_numpy(alpha)[None, None]
    )
    light = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    assert np.abs(lines[0, 0].numpy() - render.outline(alpha, light)).max() < 1e-4
    thick = thicken(lines, torch.tensor([[1.0, 0.0, 0.4]]))
    assert set(thick.unique().tolist()) <= {0.0, 1.0} and thick.sum() > (lines > 0.4).sum()
    look = puppets.random_look(Random(0), "robot", colour)
    _, points = puppets.draw_figure(puppets.random_pose(Random(1), "jumping"), look, 56)
    mine, _ = skeletons(torch.from_numpy(points).float()[None] + 4, 64, 64)
    theirs = np.asarray(draw_keypose([points + 4], 64, 64), np.float32) / 255
    assert np.corrcoef(mine[0].permute(1, 2, 0).numpy().ravel(), theirs.ravel())[0, 1] > 0.9


def test_plans_depend_on_their_step_alone_wherever_they_are_made(bank: Bank) -> None:
    planner = Planner(bank.catalogue, partial(token_ids, build_tokenizer()), Mix(wide=0.5), 8)
    plans = {step: planner(step) for step in (3, 4, 5)}
    assert plans[3].captions != plans[4].captions and planner(3).captions == plans[3].captions
    ahead = planned_ahead(ThreadPoolExecutor(1, initializer=begin_planning, initargs=(planner,)), 3, 2)
    for step in (3, 4, 5):
        at, plan = next(ahead)
        assert at == step and repr(plan.layers) == repr(plans[step].layers) and (plan.ids == plans[step].ids).all()
    ahead.close()
    wide = next(plan for plan in map(planner, range(20)) if plan.wide)
    assert wide.count == 4 and all(len(layer.rows) == len(set(layer.rows)) for layer in wide.layers)
    first, second = (DeviceRenderer(bank, CPU)(wide) for _ in range(2))
    assert first.images.shape == (4, 3, 32, 64) and torch.equal(first.images, second.images)
    assert len(first.keyposes) == len(wide.keypose_rows) and torch.equal(first.keyposes, second.keyposes)


def test_batches_are_seen_again_where_drawing_costs_time(bank: Bank) -> None:
    planner = Planner(bank.catalogue, partial(token_ids, build_tokenizer()), Mix(wide=0.0), 4)
    source = DeviceSource(DeviceRenderer(bank, CPU), build_vae((8, 8)), planner, reuse=3)
    first = source(0)
    assert first.latents.shape == (4, 8, 16, 16) and first.where.shape == (4, 1, 16, 16) and first.samples == 4
    source(1)
    assert source(16) is first and source(32) is first and source(48) is not first


def test_a_wider_network_begins_near_the_narrow_one() -> None:
    torch.manual_seed(1)
    narrow = Trainee(Sizes(widths=(16, 32, 32), heads=(1, 1, 1), groups=8, text_width=32, text_layers=1), 4)
    same = widened(narrow, narrow.sizes)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), narrow.state_dict().values(), strict=True))
    sizes = Sizes(widths=(32, 48, 64), heads=(1, 1, 2), groups=8, text_width=32, text_layers=1)
    batch = random_batch(0)
    noisy, timesteps = torch.randn(4, 8, 8, 8), torch.tensor([10, 300, 600, 900])
    with torch.no_grad():
        wanted, found, other = (
            net(noisy, timesteps, batch) for net in (narrow, widened(narrow, sizes), Trainee(sizes, 4))
        )

    def alike(one: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([one.flatten(), wanted.flatten()]))[0, 1])

    assert alike(found) > 0.5 > abs(alike(other))


def test_maps_are_learnt_beside_the_networks_and_dropped(tmp_path: Path) -> None:
    training = tiny_training(Recipe(warmup=0, ema=(4, 40), maps=0.1))
    begun = float(training.step(random_batch(0)))
    for _ in range(12):
        last = float(training.step(random_batch(0)))
    assert last < begun and training.names[-1].startswith("head.")
    training.save(tmp_path / "state")
    plain, again = tiny_training(), tiny_training(Recipe(warmup=0, ema=(4, 40), maps=0.1))
    for other in (plain, again):
        other.load(tmp_path / "state")
        assert all(torch.equal(a, b) for a, b in zip(other.averages[0], training.averages[0]))
    assert plain.progress.warmed == training.progress.samples and again.progress.warmed == 0
    assert len(plain.parameters) < len(again.parameters) == len(training.parameters)
    run(plain, 60)


def test_a_training_goes_on_in_other_networks() -> None:
    training = tiny_training()
    run(training, 60)
    wide = Sizes(widths=(16, 16, 16), heads=(1, 1, 1), groups=4, text_width=32, text_layers=1)
    larger = changed(training, lambda trainee: widened(trainee, wide))
    assert larger.trainee.sizes == wide and larger.progress.samples == larger.progress.warmed == 60
    name = "t2i_sketch.adapter.conv_in.weight"
    assert larger.averages[0][larger.names.index(name)].shape == (16, 16, 3, 3)
    old, new = (t.averages[1][t.names.index("unet.conv_in.weight")] for t in (training, larger))
    assert torch.equal(new[:8], old) and not torch.equal(larger.averages[0][0], larger.averages[1][0])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_a_trial_measures_its_weights_and_averages_on_the_same_pictures() -> None:
    torch.manual_seed(0)
    training = Training(Trainee(TINY, 4), CPU, Recipe(ema=trials.AVERAGES), Progress(samples=2_000_000))
    training.optimizer = MuonAdamW(training, 1.0)
    batches = [random_batch(step) for step in (0, 1)]
    before = trials.held_out_losses(training, batches, None)
    assert before == trials.held_out_losses(training, batches, 2)  # the average begins as the weights
    assert {f"{t}{part}" for t in trials.TIMESTEPS for part in ("", " things")} == set(before)
    for _ in range(8):
        training.step(batches[0])
    after = [trials.held_out_losses(training, batches, average)["900"] for average in (None, 0, 4)]
    assert len(set(after)) == 3 and all(loss < before["900"] for loss in after)
    moved = [p for p, q in zip(training.parameters, training.averages[0], strict=True) if not torch.equal(p, q)]
    assert {p.ndim for p in moved} == {1, 2, 4}  # Muon's matrices and AdamW's others


def test_a_packed_state_goes_on_with_a_fresh_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "LIMIT", 50_000)
    training = tiny_training()
    run(training, 24)
    travel.pack(training, tmp_path)
    assert max(file.stat().st_size for file in tmp_path.glob("raw-*")) < 100_000
    there = tiny_training()
    travel.unpack(there, tmp_path)
    assert there.progress.step == 6 and there.progress.warmed == 24
    assert there.rate() == pytest.approx(there.recipe.rate / 8)
    for mine, theirs in zip(
        [there.parameters, *there.averages], [training.parameters, *training.averages], strict=True
    ):
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(mine, theirs, strict=True))
    run(there, 32)
    with pytest.raises(UserError, match="no packed state"):
        travel.unpack(there, tmp_path / "nowhere")


def vae_batch(step: int) -> VaeBatch:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
    moments = torch.randn(4, 16, 4, 4, generator=generator)
    return VaeBatch(images, moments, moments[:, :8], 2)


def vae_training(anchor: float | None = None) -> VaeTraining:
    torch.manual_seed(0)
    return VaeTraining(build_vae((8, 8, 8, 8)), CPU, VaeRecipe(warmup=4, features=1.0, adversarial=0.1, anchor=anchor))


def test_a_resumed_autoencoder_is_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    whole, part, rest = vae_training(), vae_training(), None
    train_piece(whole, vae_batch, Limits(until_samples=20, report_steps=2), lambda: None, lambda text: None)
    state = tmp_path / "vae.state.safetensors"
    train_piece(part, vae_batch, Limits(until_samples=8), lambda: part.save(state, {}), lambda text: None)
    rest = vae_training()
    torch.manual_seed(9)
    rest.load(state)
    train_piece(rest, vae_batch, Limits(until_samples=20), lambda: None, lambda text: None)
    mine, theirs = ([*t.parameters, *t.average, *t.critic.parameters()] for t in (rest, whole))
    assert rest.progress.step == 5 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    (tmp_path / "vae-critic.state.safetensors").unlink()
    vae_training().load(state)
    assert torch.equal(rest.averaged().decoder.conv_in.weight, rest.average[rest.names.index("decoder.conv_in.weight")])


def test_an_anchor_lets_the_encoder_learn_from_pictures() -> None:
    held, free = vae_training(), vae_training(anchor=0.0)
    batch = vae_batch(0)
    batch.moments = free.vae.quant_conv(free.vae.encoder(batch.images)).detach()  # nothing to distill
    batch.latents = batch.moments[:, :8]
    for training in (held, free):
        training.step(batch)
    gradients = [float(training.vae.encoder.conv_out.weight.grad.abs().max()) for training in (held, free)]
    assert gradients[0] < 1e-5 < 1e-3 < gradients[1]
    figures = quality(free.averaged(), batch)
    assert figures["moved"] > 0 and all(np.isfinite(list(figures.values())))


def test_recoloured_pictures_keep_their_grays_and_their_share() -> None:
    images = torch.full((64, 3, 8, 8), 0.5)
    images[:, 0, 4:] = 0.0
    changed = recolored(images, torch.Generator().manual_seed(0), share=0.5)
    assert torch.allclose(changed[:, :, :4], images[:, :, :4], atol=1e-5)
    others = (changed != images).flatten(1).any(1) & ((changed - images).abs().amax((1, 2, 3)) > 0.01)
    assert 16 < int(others.sum()) < 48
    assert float(changed[:, :, 4:].mean()) == pytest.approx(float(images[:, :, 4:].mean()), abs=1e-4)
    halves = changed[others][:, :, 4:].flatten(2)
    assert (halves.amax(2) - halves.amin(2)).amax(1).gt(0.05).float().mean() > 0.5  # two hues in one picture


def test_the_loss_weighs_what_things_cover() -> None:
    training, batch = tiny_training(), random_batch(0)
    nothing, everything = (replace(batch, where=torch.full_like(batch.where, value)) for value in (0.0, 1.0))
    with torch.no_grad():
        assert torch.allclose(velocity_loss(training, nothing), velocity_loss(training, everything), rtol=1e-4)
        assert not torch.allclose(velocity_loss(training, nothing), velocity_loss(training, batch), rtol=1e-6)


class Shapes(Compute):
    """A device that computes shapes alone: what reads a number, or mixes it with the processor, fails, as on a GPU."""

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def generator(self, seed: int) -> torch.Generator:
        return None  # type: ignore[return-value]

    def move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)


def test_no_step_waits_for_the_device(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, fused, **settings: adamw(parameters, **settings))
    shapes = Shapes(torch.device("meta"), True)
    planner = Planner(bank.catalogue, partial(token_ids, build_tokenizer()), Mix(wide=0.0, sketch=0.5, keypose=1.0), 16)
    plan = planner(1)
    assert plan.sketch_rows and plan.keypose_rows
    backdrops = {wide: pictures.to("meta") for wide, pictures in bank.backdrops.items()}
    there = replace(bank, textures=bank.textures.to("meta"), keypoints=bank.keypoints.to("meta"), backdrops=backdrops)
    renderer, vae = DeviceRenderer(there, shapes), build_vae((8, 8)).to("meta")
    batch = DeviceSource(renderer, vae, planner).batch(plan)
    assert batch.latents.shape == (16, 8, 16, 16) and len(batch.keyposes) == len(plan.keypose_rows)
    training = Training(Trainee(TINY, downscale=2), shapes, Recipe())
    loss = training.step(batch)
    with pytest.raises(RuntimeError, match="meta"):
        float(loss)
    recipe = VaeRecipe(features=1.0, adversarial=0.1, anchor=0.5)
    source = VaeSource(renderer, planner, vae, training.trainee, recipe, training.alphas)
    seen = source(2)
    assert seen.predicted == 8 and seen.latents.shape == (16, 8, 16, 16)
    seen.latents, seen.moments = (images[:, :, ::4, ::4] for images in (seen.latents, seen.moments))
    with pytest.raises(RuntimeError, match="meta"):
        float(VaeTraining(build_vae((8, 8, 8, 8)), shapes, recipe).step(seen))
