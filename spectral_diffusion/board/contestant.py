"""An entry opened on a suite: who paints its concepts alone, and who together."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.apply import put_adapters
from ..adapters.formats.import_lora import import_lora
from ..adapters.formats.native import load_adapter
from ..adapters.formats.reading import is_foreign, lora_file
from ..config.fuse import DistillConfig, MergeConfig
from ..config.scene import Scene
from ..config.settings import build
from ..core.errors import Fix, UserError
from ..core.files import read_tensors
from ..core.hooks import Hooks
from ..merging.export import ExportOptions, export
from ..merging.fuse import fuse_adapters
from ..merging.teacher_targets import generic_subjects
from ..models.base import Base, base_of
from ..models.loading import load_base, quiet_loading
from ..models.split_linear import fused_layers
from ..studies.runner import StudyRunner, scaled
from . import stock
from .entry import BoardEntry
from .painters import BasePainter, CommandPainter, Painter, StockPainter
from .suite import BoardSuite

HALF = 2  # bytes of a number in half precision, in which files are shared
BLOCK = 2**24  # bytes that are hashed at once


class Contestant:
    """An entry on a suite.

    Args:
        lab: trains and caches the adapters of entries that are trained here.
        allow_commands: whether the entry's program may run.

    Raises:
        UserError: the entry runs a program, and that is not allowed.
    """

    def __init__(
        self,
        entry: BoardEntry,
        suite: BoardSuite,
        lab: StudyRunner,
        allow_commands: bool = False,
        timeout: float = 7200,
    ) -> None:
        self.entry, self.suite, self.lab, self.timeout = entry, suite, lab, timeout
        self._adapters: dict[str, Adapter] = {}  # reading a foreign file loads the base
        self._hashes: dict[Path, str] = {}
        if entry.command is not None and not allow_commands:
            raise UserError(
                f"The entry '{entry.name}' runs a program of its own ({' '.join(entry.command)}); read it first.",
                Fix("run_commands", "true", "to let it run"),
            )

    @cached_property
    def scene(self) -> Scene:
        return build(Scene, dict(self.suite.generate), {"base": self.suite.base})

    @property
    def shows_alone(self) -> bool:
        """Whether it can show one concept with nothing else learned."""
        return any(source is not None for source in (self.entry.command, self.entry.adapters, self.entry.train))

    def words(self, names: Sequence[str]) -> dict[str, str]:
        """The name of each concept in a prompt."""
        if self.entry.adapters is None and self.entry.train is None:
            return {name: self.entry.word_for(name, token=self.lab.concept(name).token) for name in names}
        return {name: self.entry.word_for(name, self.adapter(name)) for name in names}

    def adapter(self, name: str) -> Adapter:
        """One concept's adapter, read once."""
        if name not in self._adapters:
            self._adapters[name] = self._read(name)
        return self._adapters[name]

    def _read(self, name: str) -> Adapter:
        if self.entry.train is not None:
            return self.lab.trained(name, **self.training(name))[0]
        path = self._file(name)
        if not is_foreign(path):
            return load_adapter(path)
        found, concept = import_lora(path, None, self.suite.base), self.lab.concept(name)
        vectors = {} if self.entry.embeddings is None else word_vectors(self._embedding(name))
        token = concept.token if vectors else found.token
        return replace(found, name=name, noun=concept.noun, token=token, vectors=vectors or found.vectors)

    def training(self, name: str) -> dict[str, Any]:
        """The changed settings of one concept's training; ``rate`` is a factor of the suite's learning rates."""
        change = dict(self.entry.train or {})
        change = {**scaled(self.lab, float(change.pop("rate", 1.0))), **change}
        if self.entry.own_slots:
            rank = int(change.get("rank", self.suite.train.get("rank", 8)))
            start = rank * self.suite.concepts.index(name)
            change["slot"] = f"{start}:{start + rank}"
        return {"seed": self.suite.seed, **change}

    def _file(self, name: str) -> Path:
        assert self.entry.adapters is not None
        path = self.entry.path(self.entry.adapters, concept=name)
        return lora_file(path) if is_foreign(path) else path

    def _embedding(self, name: str) -> Path:
        assert self.entry.embeddings is not None
        return self.entry.path(self.entry.embeddings, concept=name)

    def depends_on(self, names: Sequence[str], alone: bool = False) -> list[str]:
        """Hashes of what decides the pictures and figures of these concepts: files, trainings, photos."""
        photos = [self.lab.concept(name).digest() for name in names]
        if self.entry.train is not None:
            return [*photos, *(self.lab.adapter_path(name, **self.training(name)).parent.name for name in names)]
        files = [self.entry.path(self.entry.fused, n=len(names))] if self.entry.fused and not alone else []
        if self.entry.adapters:
            files += [self._file(name) for name in names]
        if self.entry.embeddings:
            files += [self._embedding(name) for name in names]
        files += [path for part in self.entry.command or () if (path := self.entry.beside(part)).is_file()]
        parts = [part for file in files for part in (sorted(file.rglob("*")) if file.is_dir() else [file])]
        for part in parts:
            if part.is_file() and part not in self._hashes:
                self._hashes[part] = hash_of(part)
        return [*photos, *(self._hashes[part] for part in parts if part in self._hashes)]

    def alone(self, name: str) -> Painter:
        """Who paints one concept with nothing else learned, where :attr:`shows_alone`."""
        if self.entry.command is not None:
            return self._program([name])
        base = self.lab.fresh()
        put_adapters(base, [(self.adapter(name), self.entry.scale)])
        return BasePainter(base, self.scene)

    def together(self, names: Sequence[str]) -> Painter:
        """Who paints these concepts after all were merged."""
        if self.entry.command is not None:
            return self._program(names)
        if self.entry.fused is not None:
            return self._opened(names)
        if self.entry.joint:
            return self._joint(names)
        if self.entry.merge.startswith("stock:"):
            return self._stock(names)
        return self._merged(names)

    def scale(self, names: Sequence[str]) -> float:
        """λ of every adapter."""
        return self.entry.scale / len(names) if self.entry.mean else self.entry.scale

    def _program(self, names: Sequence[str]) -> CommandPainter:
        words = self.words(names)
        photos = self.suite.photos.resolve()
        concepts = [
            {"name": n, "token": words[n], "noun": self.lab.concept(n).noun, "photos": str(photos / n)} for n in names
        ]
        assert self.entry.command is not None
        return CommandPainter(self.entry.command, concepts, self.scene, self.entry.beside(""), self.timeout)

    def _opened(self, names: Sequence[str]) -> BasePainter:
        """What was merged elsewhere."""
        assert self.entry.fused is not None
        path = self.entry.path(self.entry.fused, n=len(names))
        if path.is_dir() and (path / "model_index.json").is_file():
            base = load_base(str(path), **self.lab.loading)
        else:
            base = self.lab.fresh()
            adapter = import_lora(path, None, self.suite.base) if is_foreign(path) else load_adapter(path)
            put_adapters(base, [(adapter, self.entry.scale)])
            if self.entry.embeddings:
                for name, word in self.words(names).items():
                    stock.load_word(base.pipeline, self._embedding(name), word)
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        return BasePainter(base, self.scene, None, sum(file.stat().st_size for file in files))

    def _joint(self, names: Sequence[str]) -> BasePainter:
        """One adapter of all concepts: their ranks and steps together."""
        change = self.training(names[0])
        config = self.lab.train_config(names[0], change, Path("adapter.safetensors"))
        further, count = [str(self.suite.photos / name) for name in names[1:]], len(names)
        longer = {"joint_concepts": further, "steps": config.steps * count, "rank": config.rank * count}
        joint, seconds = self.lab.trained(names[0], **{**change, **longer})
        base = self.lab.fresh()
        put_adapters(base, [(joint, self.entry.scale)])
        return BasePainter(base, self.scene, seconds, HALF * joint.count())

    @property
    def distillation(self) -> DistillConfig:
        """The entry's distillation, by default without the subjects of the prompts that drift is measured on."""
        asked = self.entry.distill
        if not asked.steps or asked.prior_subjects:
            return asked
        kept = [s for s in generic_subjects(asked) if not any(s in prompt for prompt in self.suite.generic)]
        return asked.model_copy(update={"prior_subjects": kept})

    def _merged(self, names: Sequence[str]) -> BasePainter:
        """One of this program's merges."""
        adapters = [self.adapter(name) for name in names]
        base, entry = self.lab.fresh(), self.entry
        # What layers see is recorded anew, so that the seconds of a merge do not depend on which was measured first.
        calibration = entry.calibration.model_copy(update={"cache": False})
        config = MergeConfig(
            merge=entry.merge, options=entry.options, calibration=calibration, distill=self.distillation,
            scales={adapter.name: self.scale(names) for adapter in adapters}, seed=self.suite.seed,
            mixed_precision=self.lab.settings["train"]["mixed_precision"],
        )  # fmt: skip
        begun = time.monotonic()
        factors = fuse_adapters(base, adapters, config, Hooks(progress=self.lab.progress, notify=self.lab.note))
        seconds = time.monotonic() - begun
        numbers = sum(rows.numel() for adapter in adapters for rows in adapter.vectors.values())
        if factors is None:
            numbers += changed_numbers(base, self.lab.fresh())
        else:
            numbers += sum(pair.up.numel() + pair.down.numel() for pair in factors.values())
        return BasePainter(base, self.scene, seconds, HALF * numbers)

    def _stock(self, names: Sequence[str]) -> BasePainter:
        """diffusers' or PEFT's own way with the same files."""
        with tempfile.TemporaryDirectory() as scratch, quiet_loading():
            files = self._diffusers_files(names, Path(scratch))
            base = self.lab.fresh()
            is_split = bool(fused_layers(base.models))  # layers that stock LoRA files do not know
            base.family.release(base.pipeline)
            pipeline, kind, scale = base.pipeline, self.entry.merge.partition(":")[2], self.scale(names)
            stock.load_tokens(pipeline, files)
            begun = time.monotonic()
            if kind == "set_adapters":
                stock.use_set_adapters(pipeline, files, scale)
                numbers = stock.numbers_in(files)
            elif kind == "key-by-key":
                numbers = stock.use_key_by_key(pipeline, files, scale) + stock.vectors_in(files)
            else:
                merged = stock.use_add_weighted_adapter(pipeline, files, scale, kind, self.suite.seed)
                numbers = merged + stock.vectors_in(files)
            seconds = time.monotonic() - begun
            if is_split:
                return StockPainter(base, self.scene, seconds, HALF * numbers)
            return BasePainter(base_of(pipeline, self.suite.base), self.scene, seconds, HALF * numbers)

    def _diffusers_files(self, names: Sequence[str], folder: Path) -> Mapping[str, stock.LoraFiles]:
        """Every concept's files in diffusers' spelling: its own, or exported."""
        words, files = self.words(names), {}
        for name in names:
            path = self._file(name) if self.entry.train is None else self.lab.adapter_path(name, **self.training(name))
            if is_foreign(path):
                embedding = self._embedding(name) if self.entry.embeddings else None
                files[name] = stock.LoraFiles(path, embedding, words[name])
                continue
            written = export(path, folder / f"{name}.safetensors", "diffusers", ExportOptions(dtype="float32"))
            embedding = next((file for file in written if file.stem != name and file.suffix == ".safetensors"), None)
            files[name] = stock.LoraFiles(folder / f"{name}.safetensors", embedding, words[name])
        return files


def word_vectors(file: Path) -> dict[str, Tensor]:
    """The vectors of a textual-inversion file, (n, width) by text encoder.

    Raises:
        UserError: it is none.
    """
    tensors = read_tensors(file)[0]
    names = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    if tensors.keys() == names.keys():
        return {names[key]: value.float().reshape(-1, value.shape[-1]) for key, value in tensors.items()}
    if len(tensors) != 1:
        raise UserError(f"{file} is no textual-inversion file: it has {len(tensors)} tensors.")
    [value] = tensors.values()
    return {"text_encoder": value.float().reshape(-1, value.shape[-1])}


def hash_of(file: Path) -> str:
    """A hash of a file's content."""
    hashed = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            hashed.update(block)
    return hashed.hexdigest()[:20]


def changed_numbers(base: Base, before: Base) -> int:
    """How many numbers of a base's networks a merge has changed, in whole weights."""
    count = 0
    for name, model in base.models.items():
        old = before.models[name].state_dict()
        for key, value in model.state_dict().items():
            if key in old and old[key].shape == value.shape and not torch.equal(old[key], value):
                count += value.numel()
    return count
