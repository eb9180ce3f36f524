"""Several concepts trained jointly into one adapter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import make_photos

from spectral_diffusion import cli
from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.train import PriorPreservationConfig, TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.data.joint import joined
from spectral_diffusion.data.samples import PhotoCrops
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.prompt_encoder import PromptEncoder
from spectral_diffusion.training.batch import sample_batch
from spectral_diffusion.training.output import is_done
from spectral_diffusion.training.prior_images import prior_prompts
from spectral_diffusion.training.run import train_to_file


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Photos of a dog and, twice as many, of a cup."""
    for name, noun, count in (("rex", "dog", 2), ("mug", "cup", 4)):
        folder = make_photos(tmp_path / "photos" / name, count)
        (folder / "concept.yaml").write_text(f"noun: {noun}\n")
    return [tmp_path / "photos" / "rex", tmp_path / "photos" / "mug"]


def settings(folders: list[Path], tiny_base: Path, output: Path, **more: object) -> TrainConfig:
    values = {"base": str(tiny_base), "rank": 2, "steps": 6, "device": "cpu", "learning_rate": 0.01}
    where = {"concept": folders[0], "joint_concepts": folders[1:], "output": output}
    return TrainConfig(**{**values, **where, **more})  # type: ignore[arg-type]


def trained(folders: list[Path], tiny_base: Path, output: Path, **more: object) -> Adapter:
    return train_to_file(settings(folders, tiny_base, output, **more))


def test_joined_concepts_count_about_equally(folders: list[Path]) -> None:
    concepts = [load_concept(folder) for folder in folders]
    both = joined(concepts)
    seen = {token: sum(p.repeats for p in both.photos if p.token == token) for token in ("<rex>", "<mug>")}
    assert seen == {"<rex>": 4, "<mug>": 4} and [c.noun for c in both.joint] == ["cup"]
    assert joined(concepts[:1]).photos[0].path == concepts[0].photos[0].path
    assert len({both.digest(), *(concept.digest() for concept in concepts)}) == 3
    with pytest.raises(UserError, match="one token, <rex>"):
        joined([concepts[0], concepts[0]])


def test_every_photo_is_shown_under_its_own_concepts_token(folders: list[Path], tiny_base: Path) -> None:
    base, config = load_base(str(tiny_base), "cpu"), settings(folders, tiny_base, folders[0], batch_size=3)
    both = joined([load_concept(folder) for folder in folders])
    crops = PhotoCrops(both, base, config, 16)
    tokens = []
    for step in range(8):
        batch = sample_batch(step, crops, both, config, base.denoiser)
        shown = [both.photos[photo] for photo in crops.order.photos(step)]
        assert batch.tokens == [photo.token for photo in shown]
        assert all(token in prompt for token, prompt in zip(batch.tokens, batch.prompts, strict=True))
        tokens += batch.tokens
    assert tokens.count("<rex>") == tokens.count("<mug>") == 12


def test_both_tokens_are_trained_and_come_back_from_the_file(
    folders: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    adapter = trained(folders, tiny_base, tmp_path / "both.safetensors")
    assert set(adapter.tokens) == {"<rex>", "<mug>"} and adapter.noun == "dog"
    base = load_base(str(tiny_base), "cpu")
    both = joined([load_concept(folder) for folder in folders])
    first = PromptEncoder(base, both, 0, 16, joint=both.joint)
    for encoder in base.tokenizers:
        for index, token in enumerate(("<rex>", "<mug>")):
            vectors, before = adapter.tokens[token][encoder], first.vectors(index)[encoder]
            assert vectors.shape == before.shape and not torch.equal(vectors, before)
    back = load_adapter(tmp_path / "both.safetensors")
    assert all(torch.equal(back.tokens[t][e], v) for t, rows in adapter.tokens.items() for e, v in rows.items())


def test_tokens_begin_as_they_would_alone_and_stop_one_by_one(folders: list[Path], tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    concepts = [load_concept(folder) for folder in folders]
    with PromptEncoder(base, concepts[0], 0, 16, joint=concepts[1:]) as encode:
        for index, concept in enumerate(concepts):
            alone = PromptEncoder(base, concept, 0, 16).vectors()
            assert all(torch.equal(encode.vectors(index)[name], rows) for name, rows in alone.items())
        prompt = "<rex> beside <mug>"
        [name] = encode.tokens
        first = encode.tokens[name].base.num_embeddings
        assert [i for i in encode.token_ids(name, [prompt])[0].tolist() if i >= first] == [first + i for i in range(4)]
        assert encode.token_mask([prompt]).sum() == 4
        rows = encode.tokens[name].vectors
        rows.data[2:] *= 3  # the second token is at its limit, the first is not
        with encode.frozen_beyond_norm(1.5):
            rows.data += 1
        assert bool((rows[:2] != encode.vectors(0)[name] - 1).all())
        assert torch.allclose(rows[2:], 3 * PromptEncoder(base, concepts[1], 0, 16).vectors()[name])


def test_joint_training_resumes_bit_for_bit(folders: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    prior = {"loss_weight": 1.0, "num_images": 3, "cut_mix_prob": 0.5}
    whole = trained(folders, tiny_base, tmp_path / "whole.safetensors", prior=prior)
    (tmp_path / "whole.safetensors").unlink()
    config = settings(folders, tiny_base, tmp_path / "parts.safetensors", prior=prior)
    done: list[int] = []  # steps; the prior images report and ask too

    def on_progress(event: Event) -> None:
        if event.stage == "train":
            done.append(event.done)

    with pytest.raises(Cancelled):
        train_to_file(config, hooks=Hooks(progress=on_progress, should_stop=lambda: len(done) == 3))
    parts = train_to_file(config, resume=True)
    assert all(torch.equal(parts.parameters[name], value) for name, value in whole.parameters.items())
    assert all(torch.equal(parts.tokens["<mug>"][e], v) for e, v in whole.tokens["<mug>"].items())


def test_a_joint_adapter_owns_all_of_its_tokens(folders: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "both.safetensors"
    both = trained(folders, tiny_base, output)
    with pytest.raises(UserError, match="has the token <mug> already"):
        trained(folders[1:], tiny_base, tmp_path / "mug.safetensors")
    with pytest.raises(UserError, match="was made with joint_concepts"):
        is_done(settings(folders[:1], tiny_base, output))
    assert is_done(settings(folders, tiny_base, output)) and list(both.earlier) == ["<mug>"]


def test_every_class_has_prior_images_and_likeness_is_the_first_ones(folders: list[Path]) -> None:
    both = joined([load_concept(folder) for folder in folders])
    subjects, _ = prior_prompts(PriorPreservationConfig(num_images=12), both.nouns, 0)
    assert [subject.split()[-1] for subject in subjects[::3]] == ["dog", "cup", "dog", "cup"]
    assert {both.token_of(photo) for photo in both.photos} == {"<rex>", "<mug>"}


def test_what_joint_concepts_rule_out_is_said(folders: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one vector per word"):
        trained(folders, tiny_base, tmp_path / "a.safetensors", per_layer_tokens=True)
    with pytest.raises(UserError, match="one token, <rex>"):
        trained([folders[0], folders[0]], tiny_base, tmp_path / "a.safetensors")


def test_the_command_line_trains_folders_jointly(
    folders: list[Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "both.safetensors"
    words = ["--base", str(tiny_base), "--steps", "2", "--rank", "2", "--device", "cpu", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", ["spectral-diffusion", "train", *map(str, folders), "--joint", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert set(load_adapter(output).tokens) == {"<rex>", "<mug>"}
