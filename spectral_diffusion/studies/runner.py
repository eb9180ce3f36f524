"""What the studies share: adapters are trained once and figures measured once, cached by what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.apply import put_adapters
from ..adapters.formats.native import content_hash, load_adapter
from ..config.evaluate import GENERIC_SUBJECTS, PLACES
from ..config.fuse import FuseConfig
from ..config.scene import Scene
from ..config.settings import build, read_yaml
from ..config.train import TrainConfig
from ..core import assets as resources
from ..core.cache import cache_folder
from ..core.errors import NotFiniteError, UserError
from ..core.files import parse_json, read_text, write_json
from ..core.hooks import Hooks, Progress, silent
from ..core.locks import locked
from ..core.machine import cell_provenance, parse_device
from ..core.names import with_article
from ..core.precision import resolve_mixed_precision
from ..data.folder import Concept, load_concept, open_photo
from ..linalg import matrix_shape
from ..merging.fuse import fuse_adapters
from ..methods import get_method
from ..metrics.classifiers import classify_images, load_classifier
from ..metrics.encoders import Clip, Encoder, load_encoder
from ..models.base import Base
from ..models.loading import load_base
from ..pocket import is_pocket
from ..scenes.sampling import sample
from ..training.output import state_path
from ..training.run import train_to_file

log = logging.getLogger(__name__)

Figures = dict[str, Any]
CELLS = "2"  # raised when what a cell measures changes, so that old cells are measured again
TEST_CONCEPTS = (
    "rex",
    "fido",
    "brew",
    "posy",
    "inky",
    "coral",
    "bolt",
    "zippy",
)  # three pairs that look alike, and two more
MANY = (
    *TEST_CONCEPTS,
    "hoot",
    "luna",
    "moss",
    "toad",
    "tusk",
    "peck",
    "rusty",
    "pip",
)  # two more such pairs, and four more
EVERY = (
    *MANY,
    "gigi",
    "dabble",
    "flit",
    "finn",
    "nip",
    "pippin",
    "comet",
    "breeze",
    "nook",
    "twang",
    "dawdle",
    "spike",
    "ding",
    "regal",
    "sugar",
    "rumble",
)  # sixteen more, each of a class of its own
TUNING_CONCEPTS = ("bruno", "misty", "shelly", "hero")  # settings are chosen on these and never reported
SEEDS = (0, 1)  # of what is reported: intervals come from the concepts, and a third seed hardly narrows them
SWEEP_CONCEPTS, SWEEP_SEEDS = TUNING_CONCEPTS[:3], (0, 1)  # of every choice of a learning rate
RATES = (0.4, 1.0, 2.5)  # first trials of a learning rate, as factors on the settings' own; see widened
TRAINING = 4 * 3600.0  # seconds that another process's training of the same adapter is waited for
# Beside a cached adapter: the seconds of its training, those of one that was stopped, and why one diverged.
SECONDS, STOPPED, DIVERGED = "seconds.json", "stopped.json", "diverged.json"
WIDER = 3  # rates that are tried beyond an edge at most


def kept_cell(path: Path) -> Figures | None:
    """A cell's figures and where they were made, from its file; None if missing or damaged (the log reports damage)."""
    if not path.is_file():
        return None
    try:
        cell = parse_json(read_text(path))
        return {"figures": dict(cell["figures"]), **({"made": dict(cell["made"])} if "made" in cell else {})}
    except (OSError, ValueError, LookupError, TypeError):
        log.warning("%s is damaged; it is measured again.", path)
        return None


def cell_key(value: Any) -> str:
    """A short hash of anything JSON-able."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]


class NotMeasured(UserError):
    """A part of a study that cannot be measured; the rest of it can."""


class TimeOver(NotMeasured):
    """The time limit is reached: nothing new is measured, but cached cells can still be read."""


class Diverged(NotMeasured, NotFiniteError):
    """A training met NaN or infinity. It is not tried again: with the same settings it would meet them again."""


@dataclass
class StudyRunner:
    """A base to study, and a folder of cached adapters and measured cells.

    Attributes:
        folder: of the cached adapters and cells; default: ``experiments`` in the cache folder.
        settings: of every training and picture, ``{"train": …, "generate": …}``.
        encoder_name: the encoder that measures identity: ``pocket``, or a CLIP or DINOv2 model by folder or hub id.
        most: stop measuring new cells after this many seconds; a later run continues.
        concepts: the folder of the concepts' photo folders; default: the shipped ones.
        nouns: class nouns of concepts whose folders do not say them.
        loading: how the base is loaded: device, dtype, quantization, layer_offload.
        recipe: a file whose settings lie over the base's own; ``settings`` are both together.
        known: cells by name that were measured elsewhere, read from a page's record.
        used: the cells that were read or measured by this object.
        edges: sweeps whose best is at an edge, which a study's page lists.
    """

    base_name: str = "pocket"
    folder: Path = field(default_factory=lambda: cache_folder() / "experiments")
    settings: Mapping[str, Any] = field(default_factory=dict)
    encoder_name: str = "pocket"
    concepts: Path = field(default_factory=resources.concepts)
    nouns: Mapping[str, str] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)
    recipe: Path | None = None
    progress: Progress = silent
    note: Callable[[str], None] = lambda text: None
    most: float = 6 * 3600.0
    begun: float = field(default_factory=time.monotonic)
    known: Mapping[str, Figures] = field(default_factory=dict)
    used: dict[str, Figures] = field(default_factory=dict)
    edges: list[str] = field(default_factory=list)
    _untouched: dict[int, list[Image.Image]] = field(init=False, default_factory=dict)  # by seed

    def __post_init__(self) -> None:
        # A cell's key contains the precision of its training, so "auto" is resolved first.
        train = dict(self.settings.get("train", {}))
        asked = str(train.get("mixed_precision", "auto"))
        train["mixed_precision"] = resolve_mixed_precision(asked, parse_device("auto"))
        self.settings = {**self.settings, "train": train}

    def on(self, base: str, settings: Mapping[str, Any]) -> StudyRunner:
        """A runner on another base, which shares this one's folder, time and cells."""
        return self if base == self.base_name else replace(self, base_name=base, settings=settings, edges=[])

    def fresh(self) -> Base:
        """A freshly loaded copy of the base."""
        return load_base(self.base_name, **self.loading)

    def fused(self, adapters: Sequence[Adapter], **settings: Any) -> Base:
        """The base with adapters fused into it; ``settings`` are those of :class:`..config.FuseConfig`.

        Raises:
            TimeOver: the time limit is reached.
        """
        self.check_time()
        base, files = self.fresh(), [Path(f"{adapter.name}.safetensors") for adapter in adapters]
        common = {"mixed_precision": self.settings["train"]["mixed_precision"], "output": Path("fused")}
        fuse_adapters(
            base, list(adapters), FuseConfig(adapters=files, **common, **settings), Hooks(progress=self.progress)
        )
        return base

    @cached_property
    def sides(self) -> list[tuple[int, int]]:
        """The sizes (out, in) of the weights that the settings adapt."""
        targets = str(self.settings.get("train", {}).get("target_modules", "attention"))
        return [matrix_shape(weight) for weight in self.fresh().weights(targets).values()]

    @cached_property
    def fingerprint(self) -> str:
        return self.fresh().fingerprint.exact

    @cached_property
    def encoder(self) -> Encoder:
        return load_encoder(self.encoder_name)

    @cached_property
    def pictures_config(self) -> Scene:
        return build(Scene, dict(self.settings.get("generate", {})), {"base": self.base_name})

    def concept(self, name: str) -> Concept:
        """A concept by its folder's name."""
        return load_concept(self.concepts / name, noun=self.nouns.get(name))

    def references(self, name: str) -> list[Image.Image]:
        """Its photos."""
        return [open_photo(photo.path) for photo in self.concept(name).photos]

    def check_time(self) -> None:
        """Call before anything slow.

        Raises:
            TimeOver: the time limit is reached.
        """
        if time.monotonic() - self.begun > self.most:
            raise TimeOver("The time for this study is over; run it again to go on where it stopped.")

    @property
    def terms(self) -> dict[str, Any]:
        """What every cell depends on."""
        other = {} if self.encoder_name == "pocket" else {"encoder": self.encoder_name}
        return {"base": self.fingerprint, "recipe": self.settings, **other}

    def cell(self, kind: str, key: Mapping[str, Any], compute: Callable[[], Figures], timed: bool = False) -> Figures:
        """Figures measured once: read from the cache or the known cells, else computed and cached.

        Timings (``timed``) are never taken from another machine's record.

        Raises:
            TimeOver: the time limit is reached.
        """
        whole = {"kind": kind, "cells": CELLS, **self.terms, **key}
        name = f"{kind}-{cell_key(whole)}"
        path = self.folder / "cells" / f"{name}.json"
        cell = kept_cell(path)
        if cell is None and name in self.known and not timed:
            cell = self.known[name]
        if cell is None:
            self.check_time()
            cell = {"figures": compute(), "made": cell_provenance()}
            write_json(path, {"key": whole, **cell})
        made = {"made": cell["made"]} if "made" in cell else {}
        self.used[name] = {"of": cell_key(self.terms), "key": dict(key), "figures": cell["figures"], **made}
        return dict(cell["figures"])

    def train_config(self, concept: str, change: Mapping[str, Any], output: Path) -> TrainConfig:
        """The study's training settings with some of them changed."""
        where: dict[str, Any] = {"concept": self.concepts / concept, "output": output, "base": self.base_name}
        where |= {"class_noun": self.nouns[concept]} if concept in self.nouns else {}
        return build(TrainConfig, dict(self.settings.get("train", {})), dict(change), where)

    def adapter_path(self, concept: str, **change: Any) -> Path:
        """The file of the adapter of these settings; its folder's name hashes all that it depends on."""
        config = self.train_config(concept, change, Path("adapter.safetensors"))
        # Only what differs from the defaults counts, so that a new setting keeps cached adapters valid.
        # Files count by what is in them.
        excluded: dict[str, Any] = dict.fromkeys(
            ("concept", "joint_concepts", "output", "device", "base", "init_from_adapter"), True
        )
        excluded["interference"] = {"earlier_adapters"}
        changed = {**config.model_dump(mode="json", exclude=excluded, exclude_defaults=True), **revised(config.method)}
        joint = [folder.name for folder in config.joint_concepts]
        photos = [
            hashlib.sha256(p.path.read_bytes()).hexdigest()
            for name in (concept, *joint)
            for p in self.concept(name).photos
        ]
        decides = [changed, self.fingerprint, concept, photos]
        if config.init_from_adapter:
            decides.append(content_hash(load_adapter(config.init_from_adapter)))
        decides += [["joint", *joint]] if joint else []
        # An earlier adapter's folder is named by a hash of all that it depends on, so it need not be there yet.
        decides += [path.parent.name for path in config.interference.earlier_adapters]
        return self.folder / "adapters" / cell_key(decides) / f"{concept}.safetensors"

    def trained(self, concept: str, **change: Any) -> tuple[Adapter, float]:
        """An adapter, from the cache if possible, and the seconds that its training took on this machine.

        Of several processes with one folder, the first trains it and the others wait.

        Raises:
            TimeOver: the time limit is reached.
            Diverged: the training met NaN or infinity, now or before.
        """
        file = self.adapter_path(concept, **change)
        spent = file.with_name(SECONDS)
        refuse_diverged(file)
        if not (file.is_file() and spent.is_file()):
            self.check_time()
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked(file.with_name(".training.lock"), TRAINING):
                refuse_diverged(file)
                if not (file.is_file() and spent.is_file()):
                    self._train(concept, change, file)
        return load_adapter(file), float(json.loads(spent.read_text(encoding="utf-8")))

    def _train(self, concept: str, change: Mapping[str, Any], file: Path) -> None:
        """Train an adapter and write the seconds that it took, those before it was stopped among them.

        Raises:
            Diverged: it met NaN or infinity, which is written down.
        """
        file.unlink(missing_ok=True)  # the run was killed before it wrote its seconds: measure again
        stopped = file.with_name(STOPPED)
        state = state_path(file)
        before = float(json.loads(read_text(stopped))) if stopped.is_file() and state.is_file() else 0.0
        begun, clock = time.monotonic(), time.time()
        try:
            train_to_file(self.train_config(concept, change, file), resume=True, hooks=Hooks(progress=self.progress))
        except NotFiniteError as error:
            write_json(file.with_name(DIVERGED), error.message)
            raise Diverged(error.message, *error.fixes) from error
        except BaseException:
            if state.is_file():  # what was trained since is trained again, and counts then
                write_json(stopped, before + max(0.0, state.stat().st_mtime - clock))
            raise
        write_json(file.with_name(SECONDS), before + time.monotonic() - begun)

    def portraits(self, base: Base, what: str, seed: int = 0) -> list[Image.Image]:
        """One picture of a token or a noun in each location."""
        prompts = [f"a photo of {what} {location}" for location in PLACES]
        return sample(base, prompts, [1000 * seed + i for i in range(len(prompts))], self.pictures_config)

    def generic_images(self, base: Base, seed: int = 0) -> list[Image.Image]:
        """One picture of each generic prompt, which names no concept."""
        prompts = [f"a photo of {subject}" for subject in GENERIC_SUBJECTS]
        return sample(base, prompts, [1000 * seed + 500 + i for i in range(len(prompts))], self.pictures_config)

    def untouched_images(self, seed: int) -> list[Image.Image]:
        """The generic images of the untouched base, with which drift compares."""
        if seed not in self._untouched:
            self._untouched[seed] = self.generic_images(self.fresh(), seed)
        return self._untouched[seed]

    def identity(self, pictures: Sequence[Image.Image], concept: str) -> float:
        """Mean cosine of every picture with every photo of the concept."""
        vectors, references = self.encoder.embed(pictures), self.encoder.embed(self.references(concept))
        return float((vectors @ references.mT).mean())

    @cached_property
    def referee(self) -> Any:
        return load_classifier("referee")

    def text_match(self, pictures: Sequence[Image.Image]) -> float:
        """The share of portraits whose backdrop matches the prompt.

        The held-out classifier decides for pocket pictures; a CLIP model by the nearest location text.
        """
        wanted = list(PLACES.values()) * (len(pictures) // len(PLACES))
        if isinstance(self.encoder, Clip):
            text_vectors = self.encoder.embed_text([f"a photo {location}" for location in PLACES])
            nearest = (self.encoder.embed(pictures) @ text_vectors.mT).argmax(1).tolist()
            seen: list[str | None] = [list(PLACES.values())[index] for index in nearest]
        else:
            verdicts = classify_images(self.referee, pictures, [1] * len(pictures))
            seen = [verdict[0].backdrop for verdict in verdicts]
        return sum(a == b for a, b in zip(seen, wanted, strict=True)) / len(pictures)

    def noun_baseline(self, concept: str, seed: int = 0) -> Figures:
        """Identity and text match of the untouched base for the concept's noun: the floor of identity."""

        def compute() -> Figures:
            pictures = self.portraits(self.fresh(), with_article(self.concept(concept).noun), seed)
            return {"identity": self.identity(pictures, concept), "text": self.text_match(pictures)}

        return self.cell("generic", {"concept": concept, "seed": seed}, compute)

    def alone(self, concept: str, **change: Any) -> Figures:
        """A concept's adapter alone: identity, text match, norm, trained numbers, seconds; pictures use its seed."""
        seed = int(change.get("seed", 0))

        def compute() -> Figures:
            adapter, seconds = self.trained(concept, **change)
            base = self.fresh()
            put_adapters(base, [(adapter, 1.0)])
            pictures = self.portraits(base, adapter.token, seed)
            return {
                "identity": self.identity(pictures, concept),
                "text": self.text_match(pictures),
                "trained": adapter.count(),
                "norm": adapter.norm(),
                "seconds": seconds,
            }

        method = str(change.get("method", self.settings.get("train", {}).get("method", "")))
        return self.cell("alone", {"concept": concept, "change": without_paths(change), **revised(method)}, compute)


def refuse_diverged(file: Path) -> None:
    """Refuse an adapter whose training met NaN or infinity before.

    Raises:
        Diverged: so it did.
    """
    noted = file.with_name(DIVERGED)
    if noted.is_file():
        raise Diverged(str(json.loads(read_text(noted))))


def without_paths(change: Mapping[str, Any]) -> dict[str, Any]:
    """Changed settings as a key that no machine's folders are in; an adapter is named by its folder's hash."""
    interference = dict(change.get("interference", {}))
    if "earlier_adapters" not in interference:
        return dict(change)
    interference["earlier_adapters"] = [Path(path).parent.name for path in interference["earlier_adapters"]]
    return {**change, "interference": interference}


def revised(method: str) -> dict[str, int]:
    """A key part that separates a revised method's adapters and cells from earlier ones."""
    revision = get_method(method).revision if method else 1
    return {"revision": revision} if revision > 1 else {}


def scaled(lab: StudyRunner, rate: float) -> dict[str, float]:
    """The settings' learning rates of both networks times a factor."""
    train = lab.train_config(TUNING_CONCEPTS[0], {}, Path("adapter.safetensors"))
    return {
        "learning_rate": train.learning_rate * rate,
        "text_encoder_learning_rate": train.text_encoder_learning_rate * rate,
    }


def seeded(change: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Training settings with a seed; 0 is the default and left out, so that studies share cached adapters."""
    return {**change, "seed": seed} if seed else dict(change)


def best_rate(
    lab: StudyRunner,
    rates: Sequence[float],
    concepts: Iterable[str] = SWEEP_CONCEPTS,
    seeds: Sequence[int] = SWEEP_SEEDS,
    **change: Any,
) -> tuple[float, list[Figures]]:
    """The factor on the learning rates with the best mean identity on concepts that are not reported.

    Where the best is the first or the last, up to three further ones are tried beyond it; if it is at an edge even
    then, ``lab.edges`` says so.
    """
    concepts = list(concepts)

    def identity(rate: float) -> float:
        changed = {**change, **scaled(lab, rate)}
        found = [lab.alone(name, **seeded(changed, seed))["identity"] for seed in seeds for name in concepts]
        return sum(found) / len(found)

    best, values = swept_rate(lab, json.dumps(change, sort_keys=True), identity, rates)
    return best, [{"rate": rate, "identity": value} for rate, value in values.items()]


def swept_rate(
    lab: StudyRunner, what: str, measure: Callable[[float], float], rates: Sequence[float]
) -> tuple[float, dict[float, float]]:
    """:func:`widened`; a best that is at an edge even then goes into ``lab.edges``."""
    best, values = widened(measure, rates)
    if len(rates) > 1 and best in (min(values), max(values)):
        lab.edges.append(f"{what}: the best of the rates tried, {best:g}, is at an edge")
    return best, values


def widened(measure: Callable[[float], float], rates: Sequence[float]) -> tuple[float, dict[float, float]]:
    """The best of a geometric series of rates, which goes on beyond an edge while the best is there.

    Returns:
        The best rate, and what was measured by rate, in ascending order; 0 where a training met NaN or infinity.
    """

    def measured(rate: float) -> float:
        try:
            return measure(rate)
        except NotFiniteError:
            return 0.0

    values = {rate: measured(rate) for rate in rates}
    for _ in range(WIDER if len(rates) > 1 else 0):
        tried = sorted(values)
        best = max(tried, key=values.__getitem__)
        if best == tried[0]:
            further = best * tried[0] / tried[1]
        elif best == tried[-1]:
            further = best * tried[-1] / tried[-2]
        else:
            break
        values[further] = measured(further)
    ordered = dict(sorted(values.items()))
    return max(ordered, key=ordered.__getitem__), ordered


def study_settings(file: Path | None = None, quick: bool = False, base: str = "pocket") -> dict[str, Any]:
    """The studies' settings for a base, with a file's over them; the quick ones make everything small.

    Bases that do not ship with the package have the pocket base's.

    Raises:
        UserError: the file is missing, no YAML, or has other parts than ``train``, ``generate`` and ``quick``.
    """
    settings = read_yaml(resources.configs() / "evidence" / f"{base if is_pocket(base) else 'pocket'}.yaml")
    given = read_yaml(file) if file else {}
    for part, change in given.items():
        if part not in settings or not isinstance(change, dict):
            raise UserError(f"{file}: '{part}' must be one of {', '.join(settings)} with settings below it.")
        settings[part] = merged(settings[part], change)
    small = settings.pop("quick", {})
    return {part: merged(settings[part], small.get(part, {}) if quick else {}) for part in settings}


def merged(settings: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with some of them changed, one level into nested settings."""
    out = dict(settings)
    for key, value in change.items():
        out[key] = {**out[key], **value} if isinstance(value, Mapping) and isinstance(out.get(key), Mapping) else value
    return out
