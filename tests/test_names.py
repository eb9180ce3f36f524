"""Names in any alphabet: as names of concepts and files, as tokens, and two that a tokenizer reads as one."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import make_photos

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.batch.concepts import trainings
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.names import check_name, check_token, slug, with_article
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.inspection import slot_clashes_between
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.training.run import train_to_file

NAMES = {
    "rex": "rex", "Rex": "Rex", "my dog": "my-dog", "Müller": "Muller", "Möller": "Moller", "Łódź": "lodz",
    "собака": "sobaka", "кот": "kot", "ёж": "ezh", "σκύλος": "skylos", "고양이": "goyangi", "ねこ": "neko",
    "犬": "72ac", "猫": "732b", "école": "ecole", "___": "",
}  # fmt: skip


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_every_name_gives_a_token_of_its_own(form: str) -> None:
    found = {name: slug(unicodedata.normalize(form, name)) for name in NAMES}
    assert found == NAMES
    for word in filter(None, found.values()):
        check_token(f"<{word}>")


@pytest.mark.parametrize("name", ["e\u0301cole", "собака", "犬", "कुत्ता", "กา", "گربه\u200cها", "a.b_c+d-e"])
def test_names_of_any_alphabet_are_names(name: str, tmp_path: Path) -> None:
    concept = load_concept(make_photos(tmp_path / name, 1))
    assert concept.name == unicodedata.normalize("NFC", name) == check_name(name)
    assert concept.token != "<it>"


def test_a_name_that_is_no_noun_says_so(tmp_path: Path) -> None:
    assert load_concept(make_photos(tmp_path / "café", 1)).noun == "cafe"
    concept = load_concept(make_photos(tmp_path / "собака", 1))
    assert concept.noun == "object" and "class_noun=dog" in concept.notes[0]
    assert not load_concept(tmp_path / "собака", noun="dog").notes


@pytest.mark.parametrize("name", ["../rex", "a/b", ".rex", "re\nx", "a" * 101, "", "rex;rm"])
def test_what_can_be_no_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot be a file's name"):
        check_name(name)


def test_two_folders_of_a_batch_with_one_token_are_refused(tmp_path: Path) -> None:
    folders = [make_photos(tmp_path / name, 1) for name in ("rex", "rex_")]

    def settings(folder: Path, output: Path) -> TrainConfig:
        return TrainConfig(concept=folder, output=output)

    with pytest.raises(UserError, match=r"'rex' and 'rex_' have one token, <rex>; give one of them another"):
        trainings(folders, tmp_path / "out", settings)
    (folders[1] / "concept.yaml").write_text("token: <other>\n")
    assert len(trainings(folders, tmp_path / "out", settings)) == 2
    twice = [make_photos(tmp_path / place / "e\u0301cole", 1) for place in "a"]
    twice.append(make_photos(tmp_path / "b" / "\u00e9cole", 1))
    with pytest.raises(UserError, match="Two of the folders are called"):
        trainings(twice, tmp_path / "out", settings)


def test_a_token_in_another_case_is_the_same_token(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), "cpu")

    def train(name: str, file: str, **more: object) -> Adapter:
        output = tmp_path / "out" / f"{file}.safetensors"
        values = {"concept": photos, "output": output, "base": str(tiny_base), "name": name, "rank": 1, "steps": 1}
        return train_to_file(TrainConfig(**{**values, **more}), base=base)  # type: ignore[arg-type]

    big = train("Rex", "big")
    with pytest.raises(UserError, match=r"big\.safetensors, the adapter of 'Rex', has the token <rex> already"):
        train("rex", "small")
    train("Rex", "again")  # the same concept once more
    small = train("rex", "small", token="<small>", steps=2)
    small.token = "<rex>"
    assert any("share the token" in text for text in slot_clashes_between([big, small]))
    width = base.models["text_encoder"].config.hidden_size
    fresh = load_base(str(tiny_base), "cpu")
    fresh.add_token("<Rex>", {"text_encoder": torch.zeros(2, width)})
    with pytest.raises(UserError, match="The token <Rex> is there already"):
        fresh.add_token("<rex>", {"text_encoder": torch.zeros(2, width)})
    with pytest.raises(UserError, match="already has the token <Rex>"):
        train_to_file(TrainConfig(concept=photos, output=tmp_path / "x.safetensors", base=str(tiny_base)), base=fresh)


def test_a_token_acts_with_all_its_vectors_whatever_its_case(tmp_path: Path) -> None:
    """Tokenizers lower-case, and diffusers would expand ``<Rex>`` to its first vector alone."""
    concept = load_concept(make_photos(tmp_path / "Rex", 1))
    assert concept.token == "<rex>" and load_concept(tmp_path / "Rex", token="<BIG-Rex>").token == "<big-rex>"
    base = load_base("pocket", "cpu")
    base.add_token(check_token("<Rex>"), {name: torch.ones(2, 128) for name in base.tokenizers})
    spelled = base.spell("a photo of <Rex> on the beach")
    expanded = base.pipeline.maybe_convert_prompt(spelled, base.pipeline.tokenizer)
    assert expanded == "a photo of <rex> <rex>_1 on the beach"
    ids = base.pipeline.tokenizer(expanded).input_ids
    assert len(set(ids) - set(base.pipeline.tokenizer("a photo of on the beach").input_ids)) == 2


def test_nouns_have_the_article_of_their_sound() -> None:
    given = {"dog": "a", "octopus": "an", "orange dog": "an", "unicorn": "a", "uniform": "a", "ukulele": "a"}
    given |= {"umbrella": "an", "hourglass": "an", "house": "a", "euphonium": "a", "Owl": "an", "one-eyed cat": "a"}
    assert {noun: with_article(noun) for noun in given} == {noun: f"{a} {noun}" for noun, a in given.items()}
