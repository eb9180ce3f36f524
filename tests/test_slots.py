"""Slots and the spectrum cache: disjoint, refused with the reason, safe under two processes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from spectral_diffusion import svd_cache as spectrum
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.linalg import matrix_shape, top_band
from spectral_diffusion.slots.ledger import (
    Ledger,
    Slot,
    SlotRequest,
    collision_probability,
    parse_policy,
    random_slot,
    read_columns,
)
from spectral_diffusion.svd_cache import Spectrum, capacity, hash_weight, spectrum_of, triplets_of


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "slots.json")


def test_next_is_the_first_free_interval_of_mixed_ranks(ledger: Ledger) -> None:
    assert ledger.reserve("base", "a", SlotRequest(8, "next", 64)) == Slot.interval(0, 8)
    assert ledger.reserve("base", "b", SlotRequest(4, "next", 64)) == Slot.interval(8, 12)
    assert ledger.reserve("base", "c", SlotRequest(8, "16:24", 64)) == Slot.interval(16, 24)
    assert ledger.reserve("base", "d", SlotRequest(4, "next", 64)) == Slot.interval(12, 16)
    assert ledger.reserve("base", "e", SlotRequest(8, "next", 64)) == Slot.interval(24, 32)
    assert ledger.reserve("other base", "a", SlotRequest(8, "next", 64)) == Slot.interval(0, 8)


def test_retraining_keeps_the_slot_and_another_rank_takes_a_new_one(ledger: Ledger) -> None:
    ledger.reserve("base", "a", SlotRequest(8, "next", 64))
    ledger.reserve("base", "b", SlotRequest(8, "next", 64))
    assert ledger.reserve("base", "a", SlotRequest(8, "next", 64)) == Slot.interval(0, 8)
    assert ledger.reserve("base", "a", SlotRequest(16, "next", 64)) == Slot.interval(16, 32)
    assert ledger.reserve("base", "c", SlotRequest(8, "next", 64)) == Slot.interval(0, 8)


def test_taken_and_past_capacity_are_refused_with_the_reason(ledger: Ledger) -> None:
    ledger.reserve("base", "a", SlotRequest(8, "0", 20))
    with pytest.raises(UserError, match="overlaps the columns 0:8 of 'a'"):
        ledger.reserve("base", "b", SlotRequest(4, "1", 20))
    with pytest.raises(UserError, match=r"past the 20 columns.*narrow.*2 slots of rank 8 fit"):
        ledger.reserve("base", "b", SlotRequest(8, "2", 20, "narrow"))
    ledger.reserve("base", "b", SlotRequest(8, "next", 20))
    with pytest.raises(UserError, match="past the 20 columns"):
        ledger.reserve("base", "c", SlotRequest(8, "next", 20))
    assert set(ledger.read()["base"]) == {"a", "b"}


def test_a_slot_of_wider_targets_is_not_kept_where_there_is_no_room_for_it(ledger: Ledger) -> None:
    ledger.reserve("base", "a", SlotRequest(8, "64:72", 128))
    assert ledger.reserve("base", "a", SlotRequest(8, "next", 64)) == Slot.interval(0, 8)


def test_release(ledger: Ledger) -> None:
    ledger.reserve("base", "a", SlotRequest(8, "next", 64))
    assert ledger.release("a") == [Slot.interval(0, 8)]
    with pytest.raises(UserError, match="No concept 'a'"):
        ledger.release("a")


@pytest.mark.parametrize(
    "text",
    ["", "-1:1", "x", "3:", "1,1", "-1,0", "1,", "8:0", "sampled:", "sampled:x", "1:2:3", "next ", "9999999", "²"],
)
def test_nonsense_slots(text: str) -> None:
    with pytest.raises(UserError, match="not understood"):
        parse_policy(text, 8)


def test_slot_width_must_be_the_rank() -> None:
    with pytest.raises(UserError, match="has 4 columns but the rank is 8"):
        parse_policy("0:4", 8)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format_version": 3, "bases": {}}',
        '{"format_version": 2, "bases": {"b": {"a": "x"}}}',
        '{"format_version": 1, "bases": {"b": {"a": 3}}}',
    ],
)
def test_damaged_ledger(ledger: Ledger, content: str) -> None:
    ledger.path.write_text(content)
    with pytest.raises(UserError, match="is not a slot ledger"):
        ledger.reserve("base", "a", SlotRequest(8, "next", 64))
    assert ledger.path.read_text() == content


def test_many_reservations_at_once_never_share(ledger: Ledger) -> None:
    with ThreadPoolExecutor(8) as pool:
        slots = list(pool.map(lambda i: ledger.reserve("base", f"c{i}", SlotRequest(2, "next", 64)), range(32)))
    assert sorted(s.columns[0] for s in slots) == list(range(0, 64, 2))


def test_two_processes_never_share_a_slot(ledger: Ledger) -> None:
    code = (
        "import sys; from pathlib import Path; from spectral_diffusion.slots.ledger import SlotRequest, Ledger\n"
        "request = SlotRequest(2, 'next', 200)\n"
        "for i in range(20): Ledger(Path(sys.argv[1])).reserve('base', f'{sys.argv[2]}{i}', request)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(ledger.path), name]) for name in "ab"]
    assert [run.wait(60) for run in runs] == [0, 0]
    taken = sorted(ledger.read()["base"].values())
    assert len(taken) == 40
    assert all(a.top <= b.columns[0] for a, b in itertools.pairwise(taken))


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"unet.a": torch.randn(12, 20, generator=generator), "unet.b": torch.randn(30, 16, generator=generator)}


def test_spectrum_is_cached_and_a_damaged_cache_is_computed_again(tmp_path: Path) -> None:
    calls: list[str] = []
    first = spectrum_of(weights(), 8, tmp_path, Hooks(progress=lambda event: calls.append(event.stage)))
    again = spectrum_of(weights(), 8, tmp_path, Hooks(progress=lambda event: calls.append(event.stage)))
    assert len(calls) == 2
    assert all(torch.equal(first.bands[n].U, again.bands[n].U) for n in first.bands)
    [file] = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    repaired = spectrum_of(weights(), 8, tmp_path)
    assert all(torch.equal(first.bands[n].V, repaired.bands[n].V) for n in first.bands)
    other = {name: weight + 1 for name, weight in weights().items()}
    assert not torch.equal(spectrum_of(other, 8, tmp_path).bands["unet.a"].U, first.bands["unet.a"].U)


def test_an_interrupted_spectrum_goes_on_where_it_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {str(i): torch.randn(20, 12, generator=torch.Generator().manual_seed(i)) for i in range(6)}
    want = spectrum_of(many, 4, tmp_path / "unbroken").bands
    monkeypatch.setattr(spectrum, "KEEP_EVERY", 0.0)

    def stop(event: Event) -> None:
        if event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spectrum_of(many, 4, tmp_path / "broken", Hooks(progress=stop))
    seen: list[str] = []
    found = spectrum_of(
        many, 4, tmp_path / "broken", Hooks(progress=lambda event: seen.append(event.metrics["layer"]))
    ).bands
    assert seen == ["3", "4", "5"]  # the first three were kept
    assert all(torch.equal(a, b) for name in many for a, b in zip(want[name], found[name], strict=True))


def test_an_unwritable_cache_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert spectrum_of(weights(), 4, tmp_path / "file" / "under").bands["unet.a"].S.shape == (12,)


def test_capacity_names_the_narrowest() -> None:
    assert capacity({name: matrix_shape(weight) for name, weight in weights().items()}) == (12, "unet.a")


def test_hash_knows_shape_and_precision() -> None:
    weight = weights()["unet.a"]
    assert hash_weight(weight) != hash_weight(weight.reshape(20, 12))
    rounded = weight.half().float()
    assert hash_weight(weight) != hash_weight(rounded)
    assert hash_weight(weight, torch.float16) == hash_weight(rounded, torch.float16)


def test_ledger_file_is_plain_json(ledger: Ledger) -> None:
    ledger.reserve("base", "a", SlotRequest(8, "next", 64))
    assert json.loads(ledger.path.read_text()) == {"format_version": 2, "bases": {"base": {"a": "0:8"}}}


def test_a_base_in_another_precision_shares_the_columns(ledger: Ledger) -> None:
    """Its adapters fit the same base, as the loading rule has it."""
    whole, half, brain = ("h", "b"), ("h", "x"), ("y", "b")
    assert str(ledger.reserve("float32", "rex", SlotRequest(8, "next", 96), rounded=whole)) == "0:8"
    assert str(ledger.reserve("float16", "mug", SlotRequest(8, "next", 96), rounded=half)) == "8:16"
    assert (
        str(ledger.reserve("bfloat16", "hat", SlotRequest(8, "next", 96), rounded=brain)) == "16:24"
    )  # by way of float32
    assert str(ledger.reserve("float32", "cup", SlotRequest(8, "next", 96), rounded=whole)) == "24:32"
    assert str(ledger.reserve("other", "fox", SlotRequest(8, "next", 96), rounded=("p", "q"))) == "0:8"
    with pytest.raises(UserError, match="of 'rex'"):
        ledger.reserve("bfloat16", "owl", SlotRequest(8, "0", 96), rounded=brain)
    ledger.release("mug")
    assert str(ledger.reserve("float16", "owl", SlotRequest(8, "next", 96), rounded=half)) == "8:16"


def test_a_concept_trained_again_in_another_precision_moves(ledger: Ledger) -> None:
    whole, half = ("h", "b"), ("h", "x")
    ledger.reserve("float32", "rex", SlotRequest(8, "next", 96), rounded=whole)
    assert str(ledger.reserve("float16", "rex", SlotRequest(8, "next", 96), rounded=half)) == "0:8"
    assert str(ledger.reserve("float16", "rex", SlotRequest(16, "next", 96), rounded=half)) == "0:16"
    assert str(ledger.reserve("float32", "mug", SlotRequest(8, "next", 96), rounded=whole)) == "16:24"
    assert ledger.read() == {"float16": {"rex": Slot.interval(0, 16)}, "float32": {"mug": Slot.interval(16, 24)}}


def test_policies(ledger: Ledger) -> None:
    listed = ledger.reserve("base", "a", SlotRequest(3, "9,1,5", 16))
    assert listed.columns == (1, 5, 9) and str(listed) == "1,5,9" and read_columns("1,5,9") == listed
    assert ledger.reserve("base", "b", SlotRequest(3, "next", 16)) == Slot.interval(2, 5)
    bottom = ledger.reserve("base", "c", SlotRequest(4, "bottom", 16))
    assert bottom.columns == (-4, -3, -2, -1) and str(bottom) == "-4:0" and read_columns("-4:0") == bottom
    assert ledger.reserve("base", "d", SlotRequest(2, "bottom", 16)).columns == (-6, -5)
    ledger.release("c")
    assert ledger.reserve("base", "d", SlotRequest(2, "bottom", 16)).columns == (-6, -5), "it keeps its slot"
    assert ledger.reserve("base", "c", SlotRequest(4, "bottom", 16)) == bottom
    with pytest.raises(UserError, match="overlaps the columns -4:0 of 'c'"):
        ledger.reserve("base", "e", SlotRequest(2, "12:14", 16))  # the same columns, counted from the other end
    random = ledger.reserve("other", "f", SlotRequest(4, "random", 16, seed=7))
    assert random == random_slot(4, 16, 7) and random != random_slot(4, 16, 8)
    with pytest.raises(UserError, match="is past the 16 columns"):
        ledger.reserve("other", "g", SlotRequest(2, "3,99", 16))


def test_sampled_slots_are_private(ledger: Ledger) -> None:
    one, again, other = (ledger.reserve("base", "a", SlotRequest(8, "sampled", 200, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other and one.rank == 8 and one.columns[0] >= 0 and one.columns[-1] < 64
    assert not ledger.path.exists()
    assert ledger.reserve("base", "a", SlotRequest(8, "sampled:16", 200, seed=1)).columns[-1] < 16
    with pytest.raises(UserError, match="8 columns cannot be drawn from 4"):
        ledger.reserve("base", "a", SlotRequest(8, "sampled:4", 200))


def test_collision_probability_is_what_drawing_shows() -> None:
    assert collision_probability(1, 4) == 0.25 and collision_probability(3, 5) == 1
    met = [random_slot(4, 32, 2 * i).overlaps(random_slot(4, 32, 2 * i + 1)) for i in range(2000)]
    assert abs(sum(met) / len(met) - collision_probability(4, 32)) < 0.04


def test_bottom_columns_are_the_smallest_singular_triplets() -> None:
    bands = triplets_of(weights(), Slot((-3, -1)))
    for name, weight in weights().items():
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        assert torch.allclose(bands[name].S.double(), S[[-3, -1]], atol=1e-6)
        assert torch.allclose((bands[name].U.double() * U[:, [-3, -1]]).sum(0).abs(), torch.ones(2).double())
        assert torch.allclose((bands[name].V.double() * Vh.mT[:, [-3, -1]]).sum(0).abs(), torch.ones(2).double())


def test_a_nearly_degenerate_border_is_found() -> None:
    U, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)).double())
    S = torch.tensor([9.0, 8, 7, 6, 6 - 1e-5, 5, 4, 3, 2, 1, 0.5, 0.1]).double()
    spectrum = Spectrum({"a": top_band(U * S @ U.mT, 8)})
    gap, layer = spectrum.smallest_gap(range(4))
    assert layer == "a" and 1e-6 < gap < 1e-5
    assert spectrum.smallest_gap(range(3))[0] > 0.1
    assert spectrum.smallest_gap(range(3, 5))[0] > 0.1  # both of the close pair are inside


def test_slots_of_many_concepts_are_taken_at_once_or_not_at_all(tmp_path: Path) -> None:
    """As one after the other, in one step; where one has no room the ledger stays as it was."""
    singles, together = Ledger(tmp_path / "singles.json"), Ledger(tmp_path / "together.json")
    for ledger in (singles, together):
        ledger.reserve("base", "old", SlotRequest(4, "8:12", 64), ("half",))
        ledger.reserve("base in half", "there", SlotRequest(4, "next", 64), ("half",))
    requests = {
        "a": SlotRequest(4, "next", 64), "b": SlotRequest(8, "next", 64), "old": SlotRequest(8, "next", 64),
        "c": SlotRequest(4, "bottom", 64), "d": SlotRequest(4, "40:44", 64), "e": SlotRequest(4, "next", 64),
        "f": SlotRequest(4, "sampled:32", 64, seed=3), "g": SlotRequest(4, "next", 64),
    }  # fmt: skip
    one_by_one = {name: singles.reserve("base", name, request, ("half",)) for name, request in requests.items()}
    assert together.reserve_all("base", requests, ("half",)) == one_by_one
    assert together.path.read_bytes() == singles.path.read_bytes()
    disjoint = [slot.from_top(64) for name, slot in one_by_one.items() if name != "f"]
    assert sum(map(len, disjoint)) == len(set().union(*disjoint))
    before = together.path.read_bytes()
    with pytest.raises(UserError, match="past the 64 columns"):
        together.reserve_all("base", {"h": SlotRequest(4, "next", 64), "i": SlotRequest(60, "next", 64)}, ("half",))
    assert together.path.read_bytes() == before


def test_a_slot_that_is_there_is_only_read(tmp_path: Path) -> None:
    """What a job of an array finds in the ledger it leaves alone: no lock, no new file."""
    ledger = Ledger(tmp_path / "slots.json")
    ledger.reserve_all("base", {name: SlotRequest(4, "next", 64) for name in "abc"}, ("half",))
    before = ledger.path.stat().st_ino
    assert str(ledger.reserve("base", "b", SlotRequest(4, "next", 64), ("half",))) == "4:8"
    assert str(ledger.reserve("base", "c", SlotRequest(4, "8:12", 64), ("half",))) == "8:12"
    assert ledger.path.stat().st_ino == before
    ledger.reserve("base", "b", SlotRequest(8, "next", 64), ("half",))
    assert ledger.path.stat().st_ino != before
