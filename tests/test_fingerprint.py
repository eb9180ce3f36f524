"""A base's fingerprint: the same as ever, measured once for a file, and never a changed weight's."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from spectral_diffusion.core.errors import UserError
from spectral_diffusion.models import fingerprint as fingerprints
from spectral_diffusion.models import loading as bases
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.fingerprint import Fingerprint, fingerprint
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.svd_cache import HASHED, hash_rounded


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[None]:
    """An empty cache, and how often a fingerprint was measured."""
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / "cache"))
    times: list[None] = []

    def counted(models: dict[str, torch.nn.Module]) -> Fingerprint:
        times.append(None)
        return fingerprint(models)

    monkeypatch.setattr(fingerprints, "fingerprint", counted)
    return times


def by_hand(base: Base, dtype: torch.dtype) -> str:
    """The hash of all weights as the files of existing adapters hold it."""
    lines = []
    for part, model in base.models.items():
        for name, weight in model.named_parameters():
            data = weight.detach().float().to(dtype).contiguous()
            one = hashlib.sha256(str(tuple(data.shape)).encode() + data.view(-1).view(torch.uint8).numpy().tobytes())
            lines.append(f"{part}.{name.removeprefix('text_model.')}={one.hexdigest()[:32]}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


def test_the_value_is_what_it_always_was(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    wanted = [by_hand(base, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert base.fingerprint == Fingerprint(*wanted)


def test_a_weight_is_hashed_alike_in_one_part_or_several() -> None:
    weight = torch.randn(5, HASHED // 4).mT  # not contiguous, and longer than a part
    data = weight.half().contiguous()
    wanted = hashlib.sha256(str(tuple(data.shape)).encode() + data.view(-1).view(torch.uint8).numpy().tobytes())
    assert hash_rounded(weight, [torch.float16]) == [wanted.hexdigest()[:32]]
    assert hash_rounded(torch.zeros(0), [torch.float32]) == [hashlib.sha256(b"(0,)").hexdigest()[:32]]


def test_it_is_measured_once_for_a_file_and_a_precision(tiny_base: Path, measured: list[None], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    first = load_base(str(folder), "cpu").fingerprint
    assert load_base(str(folder), "cpu").fingerprint == first and len(measured) == 1
    half = load_base(str(folder), "cpu", "bfloat16").fingerprint
    assert half.exact != first.exact and half.brain == first.brain and len(measured) == 2
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert load_base(str(folder), "cpu").fingerprint == first and len(measured) == 3
    shutil.copytree(folder, tmp_path / "copy")
    assert load_base(str(tmp_path / "copy"), "cpu").fingerprint == first and len(measured) == 4


def test_a_damaged_or_unwritable_cache_costs_only_the_time(
    tiny_base: Path, measured: list[None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load_base(str(tiny_base), "cpu").fingerprint
    [kept] = (tmp_path / "cache" / "fingerprints").glob("*.json")
    for text in ("", "[" * 100_000, "{}", '{"exact": "a", "half": "b", "brain": "c"}', "\x00\xff"):
        kept.write_text(text)
        assert load_base(str(tiny_base), "cpu").fingerprint == wanted
    assert len(measured) == 6
    assert load_base(str(tiny_base), "cpu").fingerprint == wanted and len(measured) == 6
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / "file"))
    assert load_base(str(tiny_base), "cpu").fingerprint == wanted and len(measured) == 7


def test_changed_weights_have_their_own(tiny_base: Path, measured: list[None]) -> None:
    wanted = load_base(str(tiny_base), "cpu").fingerprint
    base = load_base(str(tiny_base), "cpu")
    with torch.no_grad():
        base.pipeline.unet.conv_in.bias.add_(1)
    assert base.fingerprint != wanted and base.fingerprint == fingerprint(base.models)
    base = load_base(str(tiny_base), "cpu")
    base.add_token("<rex>", {"text_encoder": torch.ones(2, 24)})
    assert base.fingerprint != wanted
    assert load_base(str(tiny_base), "cpu").fingerprint == wanted and len(measured) == 3


def test_a_base_of_the_hub_is_kept_too(
    tiny_base: Path, measured: list[None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = bases._load_diffusers
    monkeypatch.setattr(bases, "_load_diffusers", lambda name, options: load(str(tiny_base), options))
    first = load_base("someone/model", "cpu")
    assert first.fingerprint == load_base("someone/model", "cpu").fingerprint and len(measured) == 1


def test_a_base_whose_weights_were_not_fetched_says_so(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(UserError, match=r"is not a readable safetensors file but a Git LFS pointer.*git lfs pull"):
        load_base(str(folder), "cpu")
    single = tmp_path / "single.safetensors"
    single.write_text("<!DOCTYPE html><html>")
    with pytest.raises(UserError, match="but a web page; download the file again"):
        load_base(str(single), "cpu")
