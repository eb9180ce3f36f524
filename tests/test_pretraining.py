"""The pocket base's pretraining: drawing on the device, and training in pieces that can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectral_diffusion.errors import UserError
from tools.pocket.base import Recipe, Training
from tools.pocket.batches import Batch
from tools.pocket.compute import Compute, choose
from tools.pocket.loop import Limits, Progress, train_piece
from tools.pocket.models import Sizes, Trainee

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
        torch.tensor([0, 3]), noise(2, 3, 32, 32),
    )  # fmt: skip


def tiny_training(recipe: Recipe | None = None) -> Training:
    torch.manual_seed(0)
    return Training(Trainee(TINY), CPU, recipe or Recipe(warmup=8, ema=(4, 40)))


def run(training: Training, until: int, saver: Callable[[], None] = lambda: None) -> list[str]:
    said: list[str] = []
    train_piece(training, random_batch, Limits(until_samples=until, report_steps=3), saver, said.append)
    return said


def test_a_resumed_training_is_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    whole = tiny_training()
    run(whole, 60)
    part = tiny_training()
    run(part, 32, lambda: part.save(tmp_path / "state", {"start": "noise"}))
    rest = tiny_training()
    torch.manual_seed(99)
    assert rest.load(tmp_path / "state") == {"start": "noise"}
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
