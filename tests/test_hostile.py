"""Hostile input: one sentence every time; never a traceback, a hang, or a damaged file taken for a whole one."""

from __future__ import annotations

import json
import random
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_photos
from PIL import Image

from spectral_diffusion.adapters.formats.native import load_adapter, save_adapter
from spectral_diffusion.config.settings import build, read_yaml, to_yaml
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.data.folder import load_concept, open_photo
from spectral_diffusion.data.samples import random_crop
from spectral_diffusion.slots.ledger import Ledger, Slot, SlotRequest
from spectral_diffusion.training.run import train_to_file

MUTANTS = 500


def mutate(data: bytes, dice: random.Random) -> bytes:
    """Cut, flip, overwrite, repeat, insert: one to four times."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        place, length = dice.randrange(len(out) or 1), dice.choice((1, 1, 2, 8, 40, 400))
        kind = dice.randrange(6)
        if kind == 0:
            del out[place : place + length]
        elif kind == 1 and out:
            out[place % len(out)] ^= 1 << dice.randrange(8)
        elif kind == 2:
            out[place : place + length] = bytes(dice.randrange(256) for _ in range(min(length, len(out) - place)))
        elif kind == 3:
            out[place:place] = out[place : place + length]
        elif kind == 4:
            out[place:place] = dice.choice(
                (b"\x00", b"\xff" * 8, b'"', b"{", b"]", b": ", b"1e999", b"\n- ", "é".encode())
            )
        else:
            out = out[:place]
    return bytes(out)


def test_a_picture_that_would_start_another_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    Image.new("RGB", (8, 8)).save(tmp_path / "e.eps")
    (tmp_path / "e.eps").rename(tmp_path / "e.png")
    with pytest.raises(UserError, match=r"e\.png is not a readable image"):
        open_photo(tmp_path / "e.png")


def mutants(data: bytes, seed: str, early: bool = False) -> list[bytes]:
    """Changed copies; ``early`` aims half of them at a safetensors header."""
    dice = random.Random(seed)
    found = []
    while len(found) < MUTANTS:
        if early and dice.random() < 0.5:
            size = 8 + struct.unpack("<Q", data[:8])[0]
            one = mutate(data[:size], dice) + data[size:]
        else:
            one = mutate(data, dice)
        if one != data:
            found.append(one)
    return found


def sentence(error: pytest.ExceptionInfo[UserError] | UserError) -> None:
    text = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert text and "\n" not in text.strip() and len(text) < 600


def test_no_mutated_adapter_is_taken_for_a_whole_one(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rex.safetensors"
    config = TrainConfig(concept=photos, output=path, base=str(tiny_base), rank=1, steps=1, device="cpu")
    train_to_file(config)
    data, bad = path.read_bytes(), tmp_path / "bad.safetensors"
    begun = time.monotonic()
    for one in mutants(data, "adapter", early=True):
        bad.write_bytes(one)
        with pytest.raises(UserError) as error:
            load_adapter(bad)
        sentence(error)
    assert time.monotonic() - begun < 120
    assert load_adapter(path).norm() > 0


@pytest.mark.parametrize(("method", "features"), [("lora", 2**18), ("vera", 2**16)])
def test_a_small_file_that_claims_a_giant_layer_is_refused(
    photos: Path, tiny_base: Path, tmp_path: Path, method: str, features: int
) -> None:
    config = TrainConfig(
        concept=photos, output=tmp_path / "rex.safetensors", base=str(tiny_base), method=method, rank=1, steps=1,
        device="cpu", batch_size=1,
    )  # fmt: skip
    adapter = train_to_file(config)
    layer = adapter.layers[0]
    out, inside = adapter.sizes[layer]
    for sizes in ((features, inside), (out, features), (0, inside)):
        shapes = adapter.method.shapes(*sizes, adapter.rank)
        own = {f"{layer}.{name}": torch.zeros(shape) for name, shape in shapes.items()}
        giant = replace(adapter, sizes={**adapter.sizes, layer: sizes}, parameters={**adapter.parameters, **own})
        save_adapter(giant, tmp_path / "giant.safetensors")
        with pytest.raises(UserError, match="wrong size"):
            load_adapter(tmp_path / "giant.safetensors")


def test_a_pickle_in_disguise_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (tmp_path / "opened",)  # type: ignore[return-value]

    torch.save({"x": Bomb()}, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        load_adapter(tmp_path / "bad.safetensors")
    assert not (tmp_path / "opened").exists()


def test_mutated_settings_are_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    config = TrainConfig(concept=Path("photos"), output=Path("a.safetensors"))
    path, refused = tmp_path / "a.yaml", 0
    for one in mutants(to_yaml(config).encode(), "settings"):
        path.write_bytes(one)
        try:
            build(TrainConfig, read_yaml(path), {"concept": "c", "output": "o.safetensors"}, file=str(path))
        except UserError as error:
            refused += 1
            sentence(error)
    assert 100 < refused < MUTANTS


def test_mutated_ledgers_are_read_or_refused_and_stay_as_they_were(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "slots.json")
    for index in range(4):
        ledger.reserve("base", f"c{index}", SlotRequest(4, "next", 64))
    data, refused = ledger.path.read_bytes(), 0
    for one in mutants(data, "ledger"):
        ledger.path.write_bytes(one)
        try:
            slot = ledger.reserve("base", "new", SlotRequest(4, "next", 64))
            assert isinstance(slot, Slot)
            others = [held for name, held in ledger.read()["base"].items() if name != "new"]
            assert not any(slot.overlaps(held) for held in others)
        except UserError as error:
            refused += 1
            sentence(error)
            assert ledger.path.read_bytes() == one
    assert refused > 200


def png_bomb(width: int, height: int) -> bytes:
    """A tiny file that claims to be a huge picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_every_odd_picture_is_used_or_named(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "odd", count=2)
    colours = np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(colours)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(colours[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("LA").save(folder / "grey-alpha.png")
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(90, expand=False)] * 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    Image.new("1", (30, 30), 1).save(folder / "bits.png")
    picture.save(folder / "really.png", format="JPEG")  # a JPEG under another name is still a picture
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "bomb.png").write_bytes(png_bomb(60_000, 60_000))
    (folder / "large.png").write_bytes(png_bomb(12_000, 12_000))
    data = (folder / "really.png").read_bytes()
    (folder / "half.jpg").write_bytes(data[: len(data) // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept = load_concept(folder)
    used = {photo.path.name for photo in concept.photos}
    good = {
        "cmyk.jpg",
        "sixteen.png",
        "palette.png",
        "grey-alpha.png",
        "animated.gif",
        "turned.jpg",
        "bits.png",
        "really.png",
    }
    bad = {"empty.png", "text.jpg", "bomb.png", "large.png", "half.jpg"}
    assert good <= used and not bad & used
    told = " ".join(concept.skipped)
    assert all(name in told for name in bad)
    for photo in concept.photos:
        image = open_photo(photo.path)
        crop = random_crop(image, 16, 1.0, torch.Generator().manual_seed(0))
        assert crop.shape == (3, 16, 16) and torch.isfinite(crop).all()
    assert open_photo(folder / "turned.jpg").size == (24, 30)
    assert abs(float(np.asarray(open_photo(folder / "sixteen.png")).mean()) - float(colours[..., 0].mean())) < 2


def test_a_ledger_of_json_bombs_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "slots.json")
    for text in ("[" * 100_000, json.dumps({"format_version": 2, "bases": {"b": {"a": "0:99999999"}}}), "1" * 10_000):
        ledger.path.write_text(text)
        with pytest.raises(UserError, match="is not a slot ledger"):
            ledger.read()
