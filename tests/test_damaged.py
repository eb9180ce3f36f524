"""Damaged and malicious files: a sentence at once, or computed again with a note; never a hang, never used silently."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_photos
from filelock import FileLock
from safetensors.torch import load_file, save_file

from spectral_diffusion import cli
from spectral_diffusion.adapters.adapter import check_finite
from spectral_diffusion.adapters.formats.native import load_adapter, save_adapter
from spectral_diffusion.adapters.formats.reading import read_lora
from spectral_diffusion.app import concepts
from spectral_diffusion.app import gallery as pictures
from spectral_diffusion.app.overview import look
from spectral_diffusion.app.workspace import Workspace, visible
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.settings import build, parse_overrides, read_yaml, to_yaml
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core import cache, files, locks
from spectral_diffusion.core.errors import NotFiniteError, UserError, short_repr
from spectral_diffusion.core.files import check_writable, parse_json, read_text, write_tensors
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.data.image_io import open_upright
from spectral_diffusion.data.latents_cache import cached_latents
from spectral_diffusion.merging.activations import GramAccumulator
from spectral_diffusion.merging.calibration import unpacked
from spectral_diffusion.merging.fuse import fuse_adapters, fuse_to_folder
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.targets import PRESETS, patterns_of, work
from spectral_diffusion.scenes.png_metadata import is_our_png
from spectral_diffusion.scenes.scene import read_scene
from spectral_diffusion.slots import ledger as slots
from spectral_diffusion.slots.ledger import Ledger, SlotRequest
from spectral_diffusion.svd_cache import spectrum_of
from spectral_diffusion.training.run import state_path, train_to_file

BOMB = "- &a [l,l,l,l,l,l,l,l,l,l]\n" + "".join(
    f"- &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)
)
LONG = "A" * 300
FIFO = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")


def flip(path: Path) -> None:
    """Change one bit near the end of a file."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


# --- settings -------------------------------------------------------------------------------------------------


def test_aliases_in_yaml_are_refused_at_once_wherever_yaml_is_read(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(f"prompt:\n{BOMB}")
    with pytest.raises(UserError, match=r"bomb\.yaml uses the alias \*a at line 3; write the value itself there"):
        read_scene(tmp_path / "bomb.yaml")
    workspace = Workspace(tmp_path / "workspace")
    folder = make_photos(workspace.concepts / "rex", 1)
    (folder / "concept.yaml").write_text(f"name: rex\ntoken: <rex>\nnoun:\n{BOMB}")
    with pytest.raises(UserError, match="uses the alias"):
        load_concept(folder)
    [card] = [card for card in look(workspace).cards if card.folder == "rex"]
    assert "uses the alias" in card.problem
    assert parse_overrides(["prompt=*x"]) == {"prompt": "*x"}  # a word on the command line stays one


def test_our_own_settings_hold_no_alias() -> None:
    fuse = FuseConfig(adapters=[Path("a")], output=Path("b"))
    for settings in (TrainConfig(concept=Path("a"), output=Path("b")), fuse, Scene(prompt="x")):
        assert "&" not in to_yaml(settings)


def test_a_wrong_value_of_any_size_is_cut_while_it_is_written(tmp_path: Path) -> None:
    deep: list[object] = ["l"] * 10
    for _ in range(8):
        deep = [deep] * 10  # a thousand million words
    for value in (deep, 10**5000, "x" * 10**6):
        with pytest.raises(UserError, match="Setting 'num_inference_steps' cannot be") as error:
            build(Scene, {"num_inference_steps": value})
        assert len(str(error.value)) < 300
    assert short_repr(["a"]) == "['a']"
    folder = make_photos(tmp_path / "rex", 1)
    (folder / "concept.yaml").write_text(f"noun: 0x{'f' * 9000}\n")
    with pytest.raises(UserError, match="must give noun as a word"):
        load_concept(folder)


def test_settings_are_never_read_from_a_huge_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("prompt: x\n" + "#" * 2_000_000)
    with pytest.raises(UserError, match="more than 1 MB"):
        read_yaml(tmp_path / "a.yaml")


def test_json_is_read_to_a_depth_that_later_code_can_walk_through() -> None:
    assert parse_json('{"a": [1, {"b": 2}]}') == {"a": [1, {"b": 2}]}
    for text in ("[" * 100_000, "[" * 200 + "]" * 200, '{"a":' * 200 + "1" + "}" * 200):
        with pytest.raises(ValueError):
            parse_json(text)


# --- names and kinds of files ----------------------------------------------------------------------------------


def test_a_name_that_is_too_long_for_a_file_is_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {"base": "pocket", "num_inference_steps": 1, "output": str(tmp_path / "o.png")}
    for part in (
        {"adapters": {LONG: 1.0}},
        {"regions": [{"box": [0, 0, 0.5, 1], "prompt": "x", "adapters": {LONG: 1.0}}]},
        {"regions": [{"mask": LONG, "prompt": "x"}]},
        {"controls": [{"file": LONG, "kind": "sketch"}]},
        {"base": LONG},
    ):
        (tmp_path / "s.yaml").write_text(json.dumps({"prompt": "x", **whole, **part}))
        monkeypatch.setattr("sys.argv", ["spectral-diffusion", "generate", str(tmp_path / "s.yaml")])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert f"'{LONG}'" in (told := capsys.readouterr().err) or f"No such file: {LONG}" in told


def test_an_error_of_the_system_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/some/file")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == "Error: Cannot use /some/file: Permission denied.\n"


@FIFO
def test_pipes_among_the_files_hang_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    folder = make_photos(workspace.concepts / "rex", 1)
    workspace.pictures.mkdir()
    pipes = [folder / "a.png", folder / "0.txt", workspace.pictures / "a.png", workspace.concepts / "b"]
    for pipe in pipes:
        os.mkfifo(pipe)
    assert [path.name for path in visible(workspace.concepts)] == ["rex"]
    assert pictures.page_of(workspace, 1) == ([], 1, [])
    assert len(concepts.view_concept(workspace, "rex")[1]) == 1
    [card] = [card for card in look(workspace).cards if card.folder == "rex"]
    assert card.count == 1 and not card.problem
    assert not is_our_png(pipes[0])
    with pytest.raises(UserError, match=r"a\.png is not a readable image"):
        open_upright(pipes[0])
    with pytest.raises(OSError, match="no regular file"):
        read_text(pipes[0])
    os.mkfifo(folder / "concept.yaml")
    with pytest.raises(UserError, match="no regular file"):
        read_yaml(folder / "concept.yaml")


def test_a_full_disk_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors needs about .* MiB and its disk has .* MiB free"):
        check_writable(tmp_path / "a.safetensors", 2**60)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "fsync": full}))
    with pytest.raises(UserError, match=r"Cannot write .*No space left on device"):
        check_writable(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_the_output_is_said_before_training_and_fusing(
    trained: Path, photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=files.PROBE + 1000))
    config = TrainConfig(concept=photos, output=tmp_path / "a.safetensors", base=str(tiny_base), rank=8, device="cpu")
    with pytest.raises(UserError, match=r"a\.safetensors needs about"):
        train_to_file(config)
    with pytest.raises(UserError, match=r"fused needs about"):
        fuse_to_folder(FuseConfig(adapters=[trained], output=tmp_path / "fused", device="cpu"))


# --- caches ---------------------------------------------------------------------------------------------------


def spectrum_file(folder: Path) -> tuple[Callable[[], torch.Tensor], Path]:
    weights = {"a": torch.randn(24, 20, generator=torch.Generator().manual_seed(0))}

    def read() -> torch.Tensor:
        return spectrum_of(weights, 8, folder).bands["a"].V

    read()
    return read, next(folder.glob("*.safetensors"))


def latents_file(folder: Path) -> tuple[Callable[[], torch.Tensor], Path]:
    def read() -> torch.Tensor:
        return cached_latents(folder, "key", lambda: (torch.arange(12.0).view(3, 4), None))[0]

    read()
    return read, next(folder.glob("*.safetensors"))


@pytest.mark.parametrize("made", [spectrum_file, latents_file])
def test_what_a_damaged_cache_held_is_computed_again_with_a_note(
    made: Callable[[Path], tuple[Callable[[], torch.Tensor], Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read, file = made(tmp_path)
    good, whole = read().clone(), file.read_bytes()  # a tensor that was read is a view of its file
    assert not caplog.records
    flip(file)
    assert torch.equal(read(), good) and f"{file} is damaged" in caplog.text
    assert cache.load(file)  # written anew
    file.write_bytes(whole[: len(whole) // 2])
    assert torch.equal(read(), good)


def test_damaged_activations_are_not_restored(tmp_path: Path) -> None:
    seen, path = GramAccumulator(4), tmp_path / "a.safetensors"
    seen.add(torch.ones(2, 4))
    assert cache.store(path, {"a": seen.matrix()}, {"counts": '{"a": 2}'})
    found = cache.restored(path, unpacked)
    assert found and torch.equal(found["a"].matrix(), seen.matrix())
    flip(path)
    assert cache.restored(path, unpacked) is None
    cache.store(path, {"a": seen.matrix()}, {"counts": "[" * 100_000})
    assert cache.restored(path, unpacked) is None


def test_a_machine_without_a_home_has_a_private_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("SPECTRAL_DIFFUSION_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    cache._without_home.cache_clear()
    folder = cache.cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    assert "SPECTRAL_DIFFUSION_CACHE names another" in caplog.text
    cache._without_home.cache_clear()
    assert cache.cache_folder() == folder
    folder.chmod(0o777)  # as if somebody else had made it first
    cache._without_home.cache_clear()
    assert cache.cache_folder() != folder
    cache._without_home.cache_clear()


# --- locks ----------------------------------------------------------------------------------------------------


def test_a_lock_that_another_process_holds_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.05)
    monkeypatch.setattr(slots, "WAIT", 0.2)
    ledger = Ledger(tmp_path / "slots.json")
    ledger.reserve("base", "a", SlotRequest(4, "next", 64))
    with FileLock(tmp_path / ".slots.json.lock"), caplog.at_level(logging.WARNING):
        with pytest.raises(UserError, match=r"Another process has locked .*\.slots\.json\.lock .*; end it"):
            ledger.reserve("base", "b", SlotRequest(4, "next", 64))
        assert "Waiting for another process, which holds" in caplog.text
    assert str(ledger.reserve("base", "b", SlotRequest(4, "next", 64))) == "4:8"


# --- adapters and LoRA files from elsewhere -------------------------------------------------------------------


def lora_file(path: Path, config: str, size: float = 1.0) -> Path:
    down, up = torch.full((2, 4), size), torch.full((4, 2), size)
    tensors = {"unet.a.to_q.lora_A.weight": down, "unet.a.to_q.lora_B.weight": up}
    save_file(tensors, path, {"lora_adapter_metadata": config})
    return path


@pytest.mark.parametrize(
    "config",
    [
        '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": Infinity}',
        '{"unet.lora_alpha": 1e39}',
        '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": NaN}}',
    ],
)
def test_an_alpha_that_is_not_finite_is_refused(config: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is damaged: unet\.a\.to_q or its alpha holds NaN or infinity"):
        read_lora(lora_file(tmp_path / "a.safetensors", config), ["unet.a.to_q"])


@pytest.mark.parametrize(
    ("pattern", "scale"), [("to_q", 3), ("a.to_q", 3), (r"^a\.to_q$", 3), ("^to_q", 2), ("o_q", 2)]
)
def test_an_alpha_pattern_is_a_name_as_peft_reads_it(pattern: str, scale: float, tmp_path: Path) -> None:
    config = json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {pattern: 6, "q": 100}})
    factors = read_lora(lora_file(tmp_path / "a.safetensors", config), ["unet.a.to_q"]).factors
    assert float(factors["unet.a.to_q"].up[0, 0]) == scale


def test_an_alpha_pattern_that_is_an_expression_is_refused(tmp_path: Path) -> None:
    config = json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"(([a-z0-9_.]+)+)!": 6}})
    with pytest.raises(UserError, match="names layers by a regular expression in its alpha_pattern"):
        read_lora(lora_file(tmp_path / "a.safetensors", config), ["unet.a.to_q"])


def test_targets_that_take_for_ever_are_refused() -> None:
    for pattern in ("(([a-z0-9_.]+)+)!", "(?:a|a)*!", "(a|b){3}", "(u|u)" * 40, ".*.*.*.*.*!", "(a?)?" * 40, "(.*)+"):
        with pytest.raises(UserError, match="could take too long to match"):
            patterns_of(f"re:{pattern}")
    usual = [pattern for part in PRESETS.values() for pattern in part]
    more = [
        r"unet\.(down|up)_blocks\.\d+\.attentions\.\d+\.(proj_in|proj_out)",
        ".*",
        r"unet\..*?\.to_[qkv]",
        "a{3}[)*+]",
    ]
    assert all(work(pattern) < 1e6 and patterns_of(f"re:{pattern}") for pattern in (*usual, *more))


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "rex.safetensors"
    photos = make_photos(folder / "rex", 1)
    config = TrainConfig(concept=photos, output=path, base=str(tiny_base), rank=2, steps=1, device="cpu")
    train_to_file(config)
    return path


@pytest.mark.parametrize("place", ["frozen", "earlier", "vectors"])
def test_nan_anywhere_in_an_adapter_is_refused(place: str, trained: Path, tmp_path: Path) -> None:
    adapter = load_adapter(trained)
    adapter.earlier = {"<old>": {name: rows.clone() for name, rows in adapter.vectors.items()}}
    check_finite(adapter)
    held = getattr(adapter, place)
    tensors = held if place == "vectors" else next(iter(held.values()))
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_adapter(adapter, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="Adapter 'rex' holds NaN or infinity in"):
        load_adapter(tmp_path / "nan.safetensors")


def test_a_fusion_never_writes_infinite_weights(trained: Path, tiny_base: Path) -> None:
    adapter = load_adapter(trained)
    adapter.parameters = {name: torch.full_like(value, 1e38) for name, value in adapter.parameters.items()}
    config = FuseConfig(adapters=[trained], output=Path("out"))
    with pytest.raises(NotFiniteError, match="is NaN or infinite once fused"):
        fuse_adapters(load_base(str(tiny_base), "cpu"), [adapter], config)


# --- training states ------------------------------------------------------------------------------------------


def test_a_damaged_training_state_is_refused(tiny_base: Path, photos: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        concept=photos, output=tmp_path / "a.safetensors", base=str(tiny_base), rank=2, steps=3, checkpointing_steps=1,
        device="cpu",
    )  # fmt: skip
    asked = iter([False, False, True, True, True, True])
    with pytest.raises(Exception, match="Stopped"):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(asked, True)))
    state = state_path(config.output)
    tensors, whole = load_file(state), state.read_bytes()

    def refused() -> None:
        with pytest.raises(UserError, match=r"a\.state\.safetensors is not a training state of this run"):
            train_to_file(config, resume=True)

    flip(state)
    refused()
    for text in ("[" * 100_000, '{"meta": [], "groups": [], "scalars": {}}'):
        metadata = {"state": text}
        write_tensors(state, tensors, {**metadata, cache.DIGEST: cache.digest(tensors, metadata)})
        refused()
    state.write_bytes(whole)
    train_to_file(config, resume=True)
    assert config.output.exists()
