"""No training loses or replaces work without a word: stopped states, finished adapters, two at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_photos

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.training.checkpoint import differences, step_of
from spectral_diffusion.training.control_adapter import control_state_path as folder_state
from spectral_diffusion.training.control_adapter import prepare_control_output as prepare_folder
from spectral_diffusion.training.output import claimed, is_done, settled
from spectral_diffusion.training.run import state_path, train_to_file

Train = Callable[..., Adapter]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base), "cpu")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "rex.safetensors"


@pytest.fixture
def config(photos: Path, tiny_base: Path, output: Path) -> TrainConfig:
    return TrainConfig(concept=photos, output=output, base=str(tiny_base), rank=2, steps=4, device="cpu", batch_size=1)


@pytest.fixture
def train(config: TrainConfig, base: Base) -> Train:
    def run(
        stop: int = 99, notes: list[str] | None = None, resume: bool = False, force: bool = False, **more: Any
    ) -> Adapter:
        asked = itertools.count()
        said = [] if notes is None else notes
        changed = TrainConfig(**{**config.model_dump(), **more})
        return train_to_file(
            changed,
            resume,
            base=base,
            force=force,
            hooks=Hooks(notify=said.append, should_stop=lambda: next(asked) >= stop),
        )

    return run


def stopped(train: Train, step: int) -> None:
    with pytest.raises(Cancelled):
        train(stop=step)


def test_a_stopped_state_is_not_lost_where_resume_is_forgotten(train: Train, output: Path) -> None:
    stopped(train, 2)
    state = state_path(output)
    before = state.read_bytes()
    with pytest.raises(
        UserError, match=r"stopped at step 2 is in .*rex\.state\.safetensors. Use resume=true .* force=true"
    ):
        train()
    assert state.read_bytes() == before and not output.exists()
    train(force=True)
    assert output.exists() and not state.exists()
    state.write_bytes(b"garbage")
    with pytest.raises(UserError, match="A damaged state is in"):
        train()


def test_resume_with_nothing_to_resume_says_so(train: Train, output: Path) -> None:
    notes: list[str] = []
    train(notes=notes, resume=True)
    assert f"No state of a stopped training is beside {output}; starting at step 0." in notes
    before = output.read_bytes()
    again = train(notes=notes, resume=True)
    assert notes[-1] == f"{output} is done already." and output.read_bytes() == before
    assert torch.equal(*(next(iter(one.parameters.values())) for one in (again, load_adapter(output))))
    for change, told in (({"steps": 8}, "steps=4, now it is 8"), ({"rank": 1}, "rank=2, now it is 1")):
        with pytest.raises(UserError, match=rf"was made with {told}. Use force=true to keep it, or resume=false"):
            train(resume=True, **change)
    output.with_suffix(".yaml").unlink()  # the adapter says it too
    with pytest.raises(UserError, match=r"was made with steps=4, now it is 8"):
        train(resume=True, steps=8)
    train(notes=notes, resume=True)
    assert notes[-1] == f"{output} is done already." and output.read_bytes() == before
    train(steps=5)  # without --resume it is trained anew, as ever
    assert output.read_bytes() != before


def test_early_stopping_is_a_setting_that_decides(train: Train, output: Path, config: TrainConfig) -> None:
    shown = {"every": 2, "prompts": ["a photo of {}"], "scales": [1.0], "num_inference_steps": 2}
    stopping = {**shown, "early_stopping_patience": 2}
    train()
    notes: list[str] = []
    train(notes=notes, resume=True, validation=shown)  # what is only shown changes nothing
    assert notes[-1] == f"{output} is done already."
    with pytest.raises(UserError, match=r"made with validation.early_stopping_patience=0, now it is 2"):
        train(resume=True, validation=stopping)
    train(validation=stopping)
    with pytest.raises(UserError, match=r"made with validation.seed=0, now it is 1"):
        train(resume=True, validation={**stopping, "seed": 1})
    train(notes=notes, resume=True, validation={**stopping, "model_card": True})
    assert notes[-1] == f"{output} is done already."


def test_a_setting_that_an_earlier_version_did_not_have_is_no_difference_while_it_is_off() -> None:
    now = {"steps": 4, "validation": {"early_stopping_patience": 0}}
    assert differences({"steps": 4}, now) == {}
    assert differences({"steps": 4, "validation": {"early_stopping_patience": 2}}, now).keys() == {
        "validation.early_stopping_patience"
    }
    on = {"steps": 4, "validation": {"early_stopping_patience": 2}}
    assert differences({"steps": 4}, on) == {"validation.early_stopping_patience": (None, 2)}


def test_a_page_that_a_person_wrote_is_not_replaced_by_a_card(train: Train, output: Path) -> None:
    output.parent.mkdir(parents=True)
    card = output.with_suffix(".md")
    card.write_text("# My notes\n")
    with pytest.raises(UserError, match=r"rex\.md was not written by this program"):
        train(validation={"model_card": True})
    assert card.read_text() == "# My notes\n" and not output.exists()
    card.unlink()
    for _ in range(2):  # the second replaces the first one's card
        train(validation={"model_card": True})
    assert "spectral-adapter" in card.read_text()


def test_a_slot_for_a_method_without_one_is_told(train: Train) -> None:
    notes: list[str] = []
    train(notes=notes, method="lora", slot="3", steps=1)
    assert "Note: lora has no slot, so slot=3 changes nothing." in notes


def test_settings_that_a_training_settles_are_no_difference(config: TrainConfig) -> None:
    config = config.model_copy(update={"mixed_precision": "no"})
    assert settled(config) == {"slot_seed"}
    assert settled(config.model_copy(update={"slot_seed": 3})) == set()
    assert settled(config.model_copy(update={"param_budget": 5000})) == {"slot_seed", "rank"}
    assert settled(config.model_copy(update={"mixed_precision": "auto"})) == {"slot_seed", "mixed_precision"}
    assert "rank" in settled(config.model_copy(update={"method": "svdiff"}))
    assert not is_done(config)


def test_another_concepts_adapter_is_not_replaced(train: Train, output: Path, tmp_path: Path) -> None:
    train()
    before = output.read_bytes()
    mug = make_photos(tmp_path / "mug", seed=1)
    for resume in (False, True):
        with pytest.raises(UserError, match=r"is the adapter of 'rex', which training 'mug' would replace.*force=true"):
            train(concept=mug, resume=resume)
    assert output.read_bytes() == before
    assert train(concept=mug, force=True).name == "mug" == load_adapter(output).name


def test_an_output_is_trained_by_one_at_a_time(train: Train, output: Path) -> None:
    with claimed(output), pytest.raises(UserError, match="is being trained by another process already"):
        train()
    assert not list(output.parent.iterdir())  # and the lock is gone
    train()
    assert sorted(path.suffix for path in output.parent.iterdir() if not path.name.startswith(".")) == [
        ".json", ".safetensors", ".yaml",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rank": 3}, "rank=2 and cannot go on with 3. Use rank=2 to go on"),
        ({"method": "lora"}, "method=spectral-additive and cannot go on with lora"),
        ({"target_modules": "attention+conv"}, "target_modules=attention and cannot go on with attention"),
        ({"text_encoder_learning_rate": 1e-4, "embedding_learning_rate": 2e-3}, "text_encoder_learning_rate=1e-05 and"),
    ],
)
def test_what_no_force_can_carry_over_is_said_at_once(
    train: Train, output: Path, change: dict[str, Any], told: str
) -> None:
    stopped(train, 2)
    before = state_path(output).read_bytes()
    for force in (False, True):
        with pytest.raises(UserError) as error:
            train(resume=True, force=force, **change)
        assert told in str(error.value) and "force=true and resume=false to start anew" in str(error.value)
    assert state_path(output).read_bytes() == before


def test_a_resume_never_writes_fewer_steps_than_were_done(train: Train, output: Path) -> None:
    stopped(train, 3)
    with pytest.raises(UserError, match=r"is at step 3 already, past steps=2\. Use steps=3 or more"):
        train(resume=True, force=True, steps=2)
    assert not output.exists() and step_of(state_path(output)) == 3


def test_a_t2i_adapters_stopped_state_is_not_lost_either(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = tmp_path / "sketcher"
    prepare_folder(folder, resume=True, hooks=Hooks(notify=notes.append))
    assert notes == [f"No state of a stopped training is beside {folder}; starting at step 0."]
    folder_state(folder).write_bytes(b"")
    prepare_folder(folder, resume=True, hooks=Hooks(notify=notes.append))
    with pytest.raises(UserError, match=r"state is in .*sketcher\.state\.safetensors.*Use resume=true to go on"):
        prepare_folder(folder, resume=False, hooks=Hooks(notify=notes.append))


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_rates_of_zero_are_told(train: Train, name: str) -> None:
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    rates = dict.fromkeys(("learning_rate", "text_encoder_learning_rate", "embedding_learning_rate"), 0.0)
    with pytest.raises(UserError, match="Every learning rate is 0, so nothing would be trained"):
        train(optimizer={"name": name}, **rates)
