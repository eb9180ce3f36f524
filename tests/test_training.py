"""Training: learns, repeats itself bit for bit, resumes bit for bit, stops on NaN, never shares a slot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_photos
from diffusers import T2IAdapter
from PIL import Image
from typer.testing import CliRunner

from spectral_diffusion.adapters.adapter import Adapter, check_base
from spectral_diffusion.adapters.formats.native import DIGEST, digest, load_adapter, save_adapter
from spectral_diffusion.cli import app
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.train import OptimizerConfig, TrainConfig, ValidationConfig
from spectral_diffusion.core.errors import Cancelled, NotFiniteError, UserError
from spectral_diffusion.core.files import read_tensors, write_tensors
from spectral_diffusion.core.hooks import Event, Hooks, ignore
from spectral_diffusion.core.paths import without_folders
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.prompt_encoder import PromptEncoder
from spectral_diffusion.models.tokens import add_token_rows, collapse, embedding_of, expand, known_tokens, split_words
from spectral_diffusion.scenes.control import ControlMap
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.slots.ledger import Ledger
from spectral_diffusion.training.loop import Trainer
from spectral_diffusion.training.run import state_path, train_to_file


def settings(photos: Path, tiny_base: Path, output: Path, **more: object) -> TrainConfig:
    values = {"concept": photos, "output": output, "base": str(tiny_base), "rank": 2, "steps": 6, "device": "cpu"}
    return TrainConfig(**{**values, **more})  # type: ignore[arg-type]


def same(one: Adapter, two: Adapter) -> bool:
    return all(torch.equal(one.parameters[n], two.parameters[n]) for n in one.parameters) and all(
        torch.equal(one.vectors[n], two.vectors[n]) for n in one.vectors
    )


@pytest.mark.parametrize("method", ["spectral-additive", "lora"])
def test_training_lowers_the_loss_on_its_own_photos(photos: Path, tiny_base: Path, tmp_path: Path, method: str) -> None:
    losses: list[float] = []

    def watch(event: Event) -> None:
        if event.stage == "train":
            losses.append(event.metrics["loss"])

    config = settings(
        photos, tiny_base, tmp_path / "a.safetensors", method=method, steps=60, batch_size=4, learning_rate=3e-2
    )
    adapter = train_to_file(config, hooks=Hooks(progress=watch))
    assert adapter.norm() > 0
    assert losses[-1] < 0.93 * losses[0]


@pytest.mark.parametrize("method", ["spectral-additive", "lora"])
def test_same_seed_same_file(photos: Path, tiny_base: Path, tmp_path: Path, method: str) -> None:
    config = settings(photos, tiny_base, tmp_path / "a" / "rex.safetensors", method=method)
    train_to_file(config)
    other = config.model_copy(update={"output": tmp_path / "b" / "rex.safetensors"})
    train_to_file(other)
    (one, one_meta), (two, two_meta) = (read_tensors(c.output) for c in (config, other))
    assert one_meta == two_meta
    assert set(one) == set(two) and all(torch.equal(one[n], two[n]) for n in one)
    third = train_to_file(config.model_copy(update={"output": tmp_path / "c" / "rex.safetensors", "seed": 1}))
    assert not same(load_adapter(config.output), third)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_run_resumes_bit_for_bit(photos: Path, tiny_base: Path, tmp_path: Path, stop: int) -> None:
    whole = train_to_file(settings(photos, tiny_base, tmp_path / "a" / "rex.safetensors"))
    config = settings(photos, tiny_base, tmp_path / "b" / "rex.safetensors")
    asked = iter(range(100))
    with pytest.raises(Cancelled, match=f"step {stop} of 6"):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(asked) >= stop))
    assert state_path(config.output).exists() and not config.output.exists()
    resumed = train_to_file(config, resume=True)
    assert same(whole, resumed)
    assert not state_path(config.output).exists()


CLI = "import sys; from spectral_diffusion.cli import main; sys.argv[0] = 'spectral-diffusion'; main()"


def training_words(photos: Path, tiny_base: Path, output: Path, *more: str) -> list[str]:
    return ["train", str(photos), "-o", str(output), "--base", str(tiny_base), "--device", "cpu", "--rank", "2", *more]


def start_training(photos: Path, tiny_base: Path, output: Path, *more: str) -> subprocess.Popen:
    words = training_words(photos, tiny_base, output, *more)
    return subprocess.Popen(
        [sys.executable, "-c", CLI, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(photos: Path, tiny_base: Path, tmp_path: Path, how: signal.Signals) -> None:
    more = ("--steps", "60", "checkpointing_steps=5", "batch_size=1")
    output = tmp_path / "killed" / "rex.safetensors"
    run = start_training(photos, tiny_base, output, *more)
    for _ in range(1200):
        if state_path(output).exists() or run.poll() is not None:
            break
        time.sleep(0.05)
    run.send_signal(how)
    run.communicate(timeout=60)
    assert run.returncode in (130, -how) and not output.exists()
    resumed = CliRunner().invoke(app, training_words(photos, tiny_base, output, *more, "--resume"))
    assert resumed.exit_code == 0, resumed.output
    whole = training_words(photos, tiny_base, tmp_path / "whole" / "rex.safetensors", *more)
    assert CliRunner().invoke(app, whole).exit_code == 0
    assert same(load_adapter(output), load_adapter(tmp_path / "whole" / "rex.safetensors"))


def test_resume_without_a_state_starts_afresh_and_other_settings_are_refused(
    photos: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = settings(photos, tiny_base, tmp_path / "rex.safetensors")
    asked = iter(range(100))
    with pytest.raises(Cancelled):
        train_to_file(config, resume=True, hooks=Hooks(should_stop=lambda: next(asked) >= 2))
    with pytest.raises(UserError, match=r"was made with learning_rate=0\.0001, now it is 0\.5"):
        train_to_file(config.model_copy(update={"learning_rate": 0.5}), resume=True)
    state_path(config.output).write_bytes(b"garbage")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        train_to_file(config, resume=True)


def test_other_photos_or_another_concept_do_not_go_on_with_a_state(
    photos: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output, other = tmp_path / "a.safetensors", make_photos(tmp_path / "other", seed=5)

    def train(folder: Path, stop: int, resume: bool = False, note: Any = ignore, **more: Any) -> None:
        asked = iter(range(99))
        config = settings(folder, tiny_base, output, method="lora")
        train_to_file(config, resume=resume, hooks=Hooks(notify=note, should_stop=lambda: next(asked) == stop), **more)

    with pytest.raises(Cancelled):
        train(photos, 2)
    with pytest.raises(UserError, match="other photos, captions or words"):
        train(other, 99, resume=True)
    picture = next(photos.glob("*.png"))
    before = picture.read_bytes()
    Image.new("RGB", (20, 20), "red").save(picture)
    with pytest.raises(UserError, match="other photos, captions or words"):
        train(photos, 99, resume=True)
    picture.write_bytes(before)
    notes: list[str] = []
    train(photos, 99, resume=True, note=notes.append)
    assert output.is_file() and not any("other photos" in note for note in notes)
    output.unlink()
    with pytest.raises(Cancelled):
        train(photos, 2)
    Image.new("RGB", (20, 20), "red").save(picture)
    train(photos, 99, resume=True, force=True, note=notes.append)
    assert output.is_file() and any("other photos" in note for note in notes)


def test_an_edited_config_goes_on_only_by_force(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    base, notes = load_base(str(tiny_base), "cpu"), []
    config = settings(photos, tiny_base, tmp_path / "rex.safetensors", learning_rate=1e-2)
    asked = iter(range(100))
    with pytest.raises(Cancelled):
        train_to_file(config, base=base, hooks=Hooks(should_stop=lambda: next(asked) >= 3))
    edited = config.model_copy(
        update={
            "weight_decay": 0.9,
            "optimizer": OptimizerConfig(ema_decay=0.5),
            "validation": ValidationConfig(every=100),
        }
    )
    with pytest.raises(
        UserError, match=r"weight_decay=0\.0, now it is 0\.9, optimizer\.ema_decay=0\.0, now it is 0\.5\. .*force=true"
    ):
        train_to_file(edited, resume=True, base=base)
    with pytest.raises(UserError, match=r"optimizer\.name=adamw and cannot go on with prodigy\. Use optimizer"):
        train_to_file(
            config.model_copy(update={"optimizer": OptimizerConfig(name="prodigy")}), resume=True, base=base, force=True
        )
    kept = state_path(config.output).read_bytes()
    plain = train_to_file(config, resume=True, base=base)
    state_path(config.output).write_bytes(kept)
    forced = train_to_file(edited, resume=True, base=base, force=True, hooks=Hooks(notify=notes.append))
    assert any("going on because force is set" in note for note in notes)
    averaged = edited.model_copy(update={"weight_decay": 0.0})
    state_path(config.output).write_bytes(kept)
    other = train_to_file(averaged, resume=True, base=base, force=True)
    # The new settings count, not those that the optimizer was saved with.
    assert not same(plain, forced) and not same(forced, other)


def test_a_training_goes_on_with_other_batches_a_step_only_if_that_is_forced(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with another number of processes, whose batches together decide the photos of a step."""
    config, asked, notes = settings(photos, tiny_base, tmp_path / "rex.safetensors"), iter(range(100)), list[str]()
    with pytest.raises(Cancelled):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(asked) >= 2))
    own = Trainer._belongs
    monkeypatch.setattr(Trainer, "_belongs", lambda self: {**own(self), "parts": "4"})
    with pytest.raises(UserError, match=r"made with 1 batches a step over all processes, now it is 4; as many .*force"):
        train_to_file(config, resume=True)
    assert train_to_file(config, resume=True, force=True, hooks=Hooks(notify=notes.append)).norm() > 0
    assert any("now it is 4; going on because force is set" in note for note in notes)


def test_nan_stops_with_a_word_and_keeps_the_last_good_state(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = settings(
        photos,
        tiny_base,
        tmp_path / "rex.safetensors",
        checkpointing_steps=1,
        learning_rate=1e12,
        max_grad_norm=1e30,
        steps=40,
    )
    with pytest.raises(NotFiniteError, match=r"NaN or infinity at step \d+: lower the learning rate"):
        train_to_file(config)
    assert not config.output.exists()
    state, _ = read_tensors(state_path(config.output))
    assert all(torch.isfinite(t).all() for n, t in state.items() if n.startswith("tensor."))


def test_two_trainers_at_once_never_share_a_slot(tiny_base: Path, tmp_path: Path) -> None:
    folders = [make_photos(tmp_path / name, seed=i) for i, name in enumerate(("dog", "mug"))]
    runs = [start_training(f, tiny_base, tmp_path / f"{f.name}.safetensors", "--steps", "2") for f in folders]
    assert [run.communicate(timeout=120) and run.returncode for run in runs] == [0, 0]
    one, two = (load_adapter(tmp_path / f"{f.name}.safetensors").slot for f in folders)
    assert one and two and not one.overlaps(two)
    [taken] = Ledger(tmp_path / "slots.json").read().values()
    assert {taken["dog"], taken["mug"]} == {one, two}


def test_training_leaves_the_base_as_it_was(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    before = {n: p.clone() for model in base.models.values() for n, p in model.state_dict().items()}
    train_to_file(settings(photos, tiny_base, tmp_path / "rex.safetensors"), base=base)
    after = {n: p for model in base.models.values() for n, p in model.state_dict().items()}
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_the_token_stops_at_the_norm_limit(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = settings(
        photos,
        tiny_base,
        tmp_path / "rex.safetensors",
        embedding_learning_rate=2e-3,
        max_embedding_norm_ratio=1.2,
        steps=40,
    )
    with PromptEncoder(load_base(str(tiny_base), "cpu"), load_concept(photos), seed=0, size=16) as condition:
        first = float(condition.vectors()["text_encoder"].norm(dim=1).mean())
    moved = float(train_to_file(config).vectors["text_encoder"].norm(dim=1).mean())
    assert 1.2 * first < moved < 2 * first  # one step past the limit, then it rests


def test_a_token_whose_class_noun_is_long_is_trained_too(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Words that were trained may be far longer than a table's mean row; the limit must not stop them at once."""
    base = load_base(str(tiny_base), "cpu")
    [noun] = base.pipeline.tokenizer("dog", add_special_tokens=False).input_ids
    with torch.no_grad():
        embedding_of(base.models["text_encoder"]).weight[noun] *= 10
    with PromptEncoder(base, load_concept(photos, noun="dog"), seed=0, size=16) as condition:
        first = condition.vectors()["text_encoder"]
    assert 0.5 < float(first[0].norm() / first[1].norm()) < 2  # the random word is as long as the noun
    config = settings(photos, tiny_base, tmp_path / "rex.safetensors", class_noun="dog")
    assert not torch.equal(train_to_file(config, base=base).vectors["text_encoder"], first)


def test_training_prompts_have_the_ids_that_stock_tokenizers_give(photos: Path, tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    prompts = ["a photo of <rex> on the beach", "<rex>", "a red dog and <rex>, at night"]
    with PromptEncoder(base, load_concept(photos, name="rex"), seed=0, size=16) as condition:
        mine = condition(prompts).tensors["encoder_hidden_states"]
        vectors = condition.vectors()["text_encoder"]

    stock = load_base(str(tiny_base), "cpu").pipeline
    add_token_rows(stock.tokenizer, stock.text_encoder, "<rex>", vectors)
    assert known_tokens(stock.tokenizer) == {"<rex>": 2}
    stock_prompts = [stock.maybe_convert_prompt(p, stock.tokenizer) for p in prompts]
    assert stock_prompts == [expand(p, {"<rex>": 2}) for p in prompts]
    ids = stock.tokenizer(stock_prompts, padding="max_length", max_length=32, return_tensors="pt").input_ids
    assert torch.equal(mine, stock.text_encoder(ids)[0])


def test_expanding_is_idempotent() -> None:
    assert split_words("<a>", 3) == ["<a>", "<a>_1", "<a>_2"]
    once = expand("<a> and <b> <a>", {"<a>": 2})
    assert once == "<a> <a>_1 and <b> <a> <a>_1"
    assert expand(once, {"<a>": 2}) == once
    assert collapse(once, {"<a>": 2}) == collapse("<a> and <b> <a>", {"<a>": 2}) == "<a> and <b> <a>"


@pytest.mark.parametrize("sketched", [False, True])
def test_pictures_are_conditioned_on_the_words_that_were_trained(
    photos: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, sketched: bool
) -> None:
    """Every pipeline must read <rex> <rex>_1 exactly once, whether or not it expands tokens by itself."""
    base = load_base(str(tiny_base), "cpu")
    with PromptEncoder(base, load_concept(photos, name="rex"), seed=0, size=16) as condition:
        wanted = condition.token_ids("text_encoder", ["a photo of <rex> on the beach"])[0].tolist()
        vectors = condition.vectors()
    base.add_token("<rex>", vectors)
    read: list[list[int]] = []
    encoder = base.models["text_encoder"]
    encoder.register_forward_pre_hook(lambda module, inputs: read.extend(inputs[0].tolist()))
    adapter = T2IAdapter(in_channels=1, channels=[16, 24], num_res_blocks=1, downscale_factor=2)
    monkeypatch.setattr("spectral_diffusion.scenes.control.load_t2i_adapter", lambda base, name, kind: adapter)
    for prompt in ("a photo of <rex> on the beach", "a photo of <rex> <rex>_1 on the beach"):
        read.clear()
        config = Scene(num_inference_steps=1, guidance_scale=3.0, device="cpu")
        sample(base, [prompt], [0], config, controls=[ControlMap(Image.new("L", (16, 16)))] if sketched else [])
        assert wanted in read


def test_native_file_round_trip(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    adapter = train_to_file(settings(photos, tiny_base, tmp_path / "rex.safetensors"))
    loaded = load_adapter(tmp_path / "rex.safetensors")
    assert same(adapter, loaded)
    for field in ("name", "noun", "token", "rank", "slot", "targets", "base", "fingerprint", "config", "provenance"):
        kept = getattr(adapter, field)
        assert (without_folders(kept) if field == "config" else kept) == getattr(loaded, field), field
    for layer, band in adapter.bands.items():
        assert all(torch.equal(a, b) for a, b in zip(band, loaded.bands[layer], strict=True))
    save_adapter(loaded, tmp_path / "again.safetensors")
    assert read_tensors(tmp_path / "again.safetensors")[1] == read_tensors(tmp_path / "rex.safetensors")[1]


def test_damaged_native_files_are_refused(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rex.safetensors"
    train_to_file(settings(photos, tiny_base, path))
    tensors, metadata = read_tensors(path)
    first = next(n for n in tensors if n.startswith("delta."))
    broken = {
        "missing tensor": ({n: t for n, t in tensors.items() if n != first}, metadata),
        "wrong shape": ({**tensors, first: torch.zeros(3, 2)}, metadata),
        "nan": ({**tensors, first: tensors[first] * float("nan")}, metadata),
        "version": (tensors, {**metadata, "format_version": "9"}),
        "foreign": (tensors, {}),
        "config": (tensors, {**metadata, "spectral.config": "{"}),
        "method": (tensors, {**metadata, "spectral.method": "magic"}),
        "rank": (tensors, {**metadata, "spectral.rank": "3"}),
        "token": (tensors, {**metadata, "spectral.concept": '{"name": "a", "noun": "b", "token": "../x"}'}),
    }
    for name, (parts, meta) in broken.items():
        meta = {**meta, DIGEST: digest(parts, meta)}  # a correct hash, so that it is the content that is refused
        write_tensors(tmp_path / "bad.safetensors", parts, meta)
        with pytest.raises(UserError):
            load_adapter(tmp_path / "bad.safetensors")
            pytest.fail(name)


def close_relative(tiny_base: Path) -> Base:
    """The base with every adapted weight a little larger: other bits, the same singular vectors."""
    base = load_base(str(tiny_base), "cpu")
    for weight in base.weights().values():
        weight *= 1.001
    return base


def test_loading_rule(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    adapter = train_to_file(settings(photos, tiny_base, tmp_path / "rex.safetensors"))
    assert check_base(adapter, load_base(str(tiny_base), "cpu")) is None
    for dtype in ("float16", "bfloat16"):
        assert check_base(adapter, load_base(str(tiny_base), "cpu", dtype)) is None
    related = close_relative(tiny_base)
    with pytest.raises(UserError, match="allow_base=true"):
        check_base(adapter, related)
    assert "close relative" in (check_base(adapter, related, allow=True) or "")
    foreign = load_base(str(tiny_base), "cpu")
    for weight in foreign.weights().values():
        weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for allow in (False, True):
        with pytest.raises(UserError, match=f"Use base={tiny_base} to load"):
            check_base(adapter, foreign, allow)


@pytest.mark.parametrize("method", ["spectral-additive", "lora"])
def test_loading_rule_from_half_precision_and_back(photos: Path, tiny_base: Path, tmp_path: Path, method: str) -> None:
    """Trained on the half-precision weights, loaded on the full ones; and on the wrong ones, with and without force."""
    for dtype in ("bfloat16", "float16"):
        output = tmp_path / dtype / "rex.safetensors"
        adapter = train_to_file(settings(photos, tiny_base, output, dtype=dtype, steps=1, method=method))
        assert check_base(adapter, load_base(str(tiny_base), "cpu")) is None
        assert check_base(adapter, load_base(str(tiny_base), "cpu", dtype)) is None
    related = close_relative(tiny_base)
    with pytest.raises(UserError, match="allow_base=true"):
        check_base(adapter, related)
    assert "loaded because allow_base is set" in (check_base(adapter, related, allow=True) or "")


def test_no_temporary_files_are_left(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "rex.safetensors"
    train_to_file(settings(photos, tiny_base, output))
    left = {p.name for p in output.parent.iterdir() if not p.name.endswith(".lock")}
    assert left == {"rex.safetensors", "rex.yaml", "slots.json"}
    assert oct(output.stat().st_mode & 0o777) == oct(0o666 & ~os.umask(os.umask(0o22)))


def test_a_sampled_slot_records_its_seed_and_survives_a_resume(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    told: list[str] = []
    config = settings(photos, tiny_base, tmp_path / "rex.safetensors", slot="sampled:16")
    asked = iter(range(100))
    with pytest.raises(Cancelled):
        train_to_file(config, hooks=Hooks(notify=told.append, should_stop=lambda: next(asked) >= 3))
    assert any("were sampled from the top 16" in text and "with a chance of" in text for text in told)
    resumed = train_to_file(config, resume=True)
    assert resumed.slot and resumed.slot.rank == 2 and not (tmp_path / "slots.json").exists()
    seed = load_adapter(config.output).config["slot_seed"]
    again = settings(photos, tiny_base, tmp_path / "again.safetensors", slot="sampled:16", slot_seed=seed)
    assert same(resumed, train_to_file(again))
    fresh = train_to_file(settings(photos, tiny_base, tmp_path / "fresh.safetensors", slot="sampled:16", steps=1))
    assert fresh.config["slot_seed"] != seed


@pytest.mark.parametrize("slot", ["bottom", "random", "1,3"])
def test_other_slot_policies_train_and_load(photos: Path, tiny_base: Path, tmp_path: Path, slot: str) -> None:
    adapter = train_to_file(settings(photos, tiny_base, tmp_path / "rex.safetensors", slot=slot))
    loaded = load_adapter(tmp_path / "rex.safetensors")
    assert same(adapter, loaded) and adapter.slot == loaded.slot and adapter.norm() > 0
    assert check_base(loaded, load_base(str(tiny_base), "cpu")) is None
    other = load_base(str(tiny_base), "cpu", "bfloat16")
    assert check_base(loaded, other) is None


def test_normalised_and_slot_rates_train_and_load(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    plain = train_to_file(settings(photos, tiny_base, tmp_path / "a.safetensors", slot="8:10"))
    for name, more in (("n", {"normalize": True}), ("r", {"slot_lr_power": 1.0})):
        output = tmp_path / f"{name}" / "rex.safetensors"
        adapter = train_to_file(settings(photos, tiny_base, output, slot="8:10", **more))
        assert same(adapter, load_adapter(output))
        assert adapter.norm() > plain.norm()  # later columns are smaller, so their steps grow
