"""Draw what an evaluation looks at: each concept alone and with the others, ordinary prompts before and after."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..adapters.adapter import Adapter, check_base
from ..adapters.apply import Strength, enabled_adapters, install_tokens
from ..config.evaluate import EvaluateConfig
from ..config.scene import Scene
from ..core.files import parse_json, read_text, write_json
from ..core.hooks import Event, Hooks, Progress
from ..merging.manifest import lasting
from ..metrics.prompts import with_article
from ..metrics.views import View
from ..models.base import Base, load_base
from ..scenes.generate import write_images
from ..scenes.png_metadata import sources_of
from ..scenes.sampling import SceneInputs
from .inputs import PICTURES, EvaluationInputs, drawing_settings, evaluation_scales
from .region_crops import spoken
from .summary import ALONE, FLOOR

SECONDS = "seconds.json"


@dataclass
class EvaluationImages:
    """Draws what is not there yet, and counts; ``seconds`` holds by way those spent, and the pictures made in them."""

    config: EvaluateConfig
    total: int
    progress: Progress
    should_stop: Callable[[], bool]
    done: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.config.output / PICTURES

    def draw(
        self, base: Base, way: str, name: str, prompts: Sequence[str], adapters: Mapping[Path, Strength], of: str
    ) -> list[Path]:
        """Pictures of prompts on a base that its adapters act on; ``of`` is the name it is loaded by."""
        written = []
        for index, prompt in enumerate(prompts):
            scene = Scene(
                **drawing_settings(self.config),
                prompt=prompt,
                output=self.folder / way.replace(" ", "-") / f"{name}-{index}.png",
                base=lasting(of),
                adapters={str(path): strength for path, strength in adapters.items()},
                seeds=self.config.seeds(index),
            )
            sources, begun = sources_of(scene, base), time.perf_counter()
            steps: list[Event] = []
            hooks = Hooks(progress=steps.append, should_stop=self.should_stop)
            paths = write_images(base, scene, sources, SceneInputs(), hooks, resume=True)
            if steps:
                before = self.seconds.get(way, [0.0, 0.0])
                self.seconds[way] = [before[0] + time.perf_counter() - begun, before[1] + len(paths)]
                write_json(self.folder / SECONDS, {**self.earlier(), **self.seconds})
            self.count(len(paths))
            written += paths
        return written

    def portraits(
        self, base: Base, way: str, adapter: Adapter, adapters: Mapping[Path, Strength], of: str
    ) -> list[View]:
        """A concept in every place; its noun where no adapter may act."""
        what = with_article(adapter.noun) if way == FLOOR else adapter.token
        prompts = [prompt.replace("{}", what) for prompt in self.config.prompts]
        paths = self.draw(base, way, adapter.name, prompts, adapters, of)
        tokens = {adapter.token: (adapter.name, adapter.noun)}
        return [
            View(adapter.name, path, spoken(prompts[i // self.config.num_images], tokens))
            for i, path in enumerate(paths)
        ]

    def earlier(self) -> dict[str, list[float]]:
        """The seconds of what was drawn here before."""
        try:
            found = parse_json(read_text(self.folder / SECONDS))
            return {str(way): [float(spent), float(pictures)] for way, (spent, pictures) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def each(self, way: str) -> float:
        """Seconds a picture; 0 if nothing is known."""
        spent, pictures = {**self.earlier(), **self.seconds}.get(way, (0.0, 0.0))
        return spent / pictures if pictures else 0.0

    def count(self, pictures: int) -> None:
        """So many more are there."""
        self.done += pictures
        self.progress(Event("draw", self.done, max(self.total, self.done)))


@dataclass
class GeneratedImages:
    """What was drawn: views by way, ordinary prompts' pictures before and after, and the base's fingerprint."""

    shown: dict[str, list[View]] = field(default_factory=dict)
    ordinary: tuple[list[Path], list[Path]] = ((), ())  # type: ignore[assignment]
    base: str = ""


def count_of(config: EvaluateConfig, held: EvaluationInputs | None) -> int:
    """How many pictures are drawn of the adapters."""
    if held is None:
        return 0
    ways = config.noun_baseline + 1 + (held.together != ALONE)
    return config.num_images * (ways * len(held.adapters) * len(config.prompts) + 2 * len(config.prior_prompts))


def draw_adapters(shelf: EvaluationImages, held: EvaluationInputs, hooks: Hooks) -> GeneratedImages:
    """Each concept as its noun on the untouched base, alone, and together with the others; ordinary prompts beside.

    Raises:
        UserError: an adapter does not belong on the base.
    """
    config, drawn = shelf.config, GeneratedImages()
    base = load_base(held.base, config.device, config.dtype)
    for adapter in held.adapters.values():
        if warning := check_base(adapter, base, config.allow_base):
            hooks.notify(warning)
    drawn.base = base.fingerprint.exact
    for adapter in held.adapters.values():
        install_tokens(base, adapter)
    before = shelf.draw(base, FLOOR, "ordinary", config.prior_prompts, {}, held.base)
    if config.noun_baseline:
        drawn.shown[FLOOR] = [v for a in held.adapters.values() for v in shelf.portraits(base, FLOOR, a, {}, held.base)]
    drawn.shown[ALONE] = []
    for path, adapter in held.adapters.items():
        with enabled_adapters(base, [(adapter, 1.0)]):
            drawn.shown[ALONE] += shelf.portraits(base, ALONE, adapter, {path: 1.0}, held.base)
    way, acts, of = held.together, evaluation_scales(config, held), held.base
    if held.fused:
        del base  # before the next one is loaded: two may not fit
        base, acts, of = load_base(str(held.fused), config.device, config.dtype), {}, str(held.fused)
    with enabled_adapters(base, [(held.adapters[path], strength) for path, strength in acts.items()]):
        if way != ALONE:
            drawn.shown[way] = [v for a in held.adapters.values() for v in shelf.portraits(base, way, a, acts, of)]
        drawn.ordinary = before, shelf.draw(base, way, "ordinary", config.prior_prompts, acts, of)
    return drawn
