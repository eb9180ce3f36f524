"""Generate the images of an evaluation: each concept alone and with the others, generic prompts before and after."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..adapters.adapter import Adapter, check_base
from ..adapters.apply import Strength, enabled_adapters, install_tokens
from ..config.evaluate import EvaluateConfig
from ..config.scene import Scene
from ..config.train import in_style
from ..core.files import parse_json, read_text, write_json
from ..core.hooks import Event, Hooks, Progress
from ..core.names import with_article
from ..merging.manifest import lasting
from ..metrics.views import View
from ..models.base import Base
from ..models.loading import load_base
from ..scenes.generate import write_images
from ..scenes.png_metadata import sources_of
from ..scenes.sampling import SceneInputs
from .inputs import PICTURES, EvaluationInputs, evaluation_scales, generation_settings
from .region_crops import spoken
from .summary import ALONE, FLOOR

SECONDS = "seconds.json"


@dataclass
class EvaluationImages:
    """Generates missing images and counts them; ``seconds`` maps a setting to seconds spent and images made."""

    config: EvaluateConfig
    total: int
    progress: Progress
    should_stop: Callable[[], bool]
    done: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.config.output / PICTURES

    def generate(
        self, base: Base, setting: str, name: str, prompts: Sequence[str], scales: Mapping[Path, Strength], of: str
    ) -> list[Path]:
        """Images of prompts on a base with its adapters enabled; ``of`` is the base's name."""
        written = []
        for index, prompt in enumerate(prompts):
            scene = Scene(
                **generation_settings(self.config),
                prompt=prompt,
                output=self.folder / setting.replace(" ", "-") / f"{name}-{index}.png",
                base=lasting(of),
                adapters={str(path): strength for path, strength in scales.items()},
                seeds=self.config.seeds(index),
            )
            sources, begun = sources_of(scene, base), time.perf_counter()
            steps: list[Event] = []
            hooks = Hooks(progress=steps.append, should_stop=self.should_stop)
            paths = write_images(base, scene, sources, SceneInputs(), hooks, resume=True)
            if steps:
                before = self.seconds.get(setting, [0.0, 0.0])
                self.seconds[setting] = [before[0] + time.perf_counter() - begun, before[1] + len(paths)]
                write_json(self.folder / SECONDS, {**self.earlier(), **self.seconds})
            self.count(len(paths))
            written += paths
        return written

    def portraits(
        self, base: Base, setting: str, adapter: Adapter, scales: Mapping[Path, Strength], of: str
    ) -> list[View]:
        """A concept in every location; its noun on the untouched base."""
        what = with_article(adapter.noun) if setting == FLOOR else adapter.token
        if adapter.is_style:
            what = "a dog" if setting == FLOOR else in_style("a dog", adapter.token)
        prompts = [prompt.replace("{}", what) for prompt in self.config.prompts]
        paths = self.generate(base, setting, adapter.name, prompts, scales, of)
        tokens = {adapter.token: (adapter.name, adapter.noun)}
        return [
            View(adapter.name, path, spoken(prompts[i // self.config.num_images], tokens))
            for i, path in enumerate(paths)
        ]

    def earlier(self) -> dict[str, list[float]]:
        """The seconds of earlier runs into this folder."""
        try:
            seconds = parse_json(read_text(self.folder / SECONDS))
            return {str(setting): [float(spent), float(pictures)] for setting, (spent, pictures) in seconds.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def each(self, setting: str) -> float:
        """Seconds per image; 0 if unknown."""
        spent, pictures = {**self.earlier(), **self.seconds}.get(setting, (0.0, 0.0))
        return spent / pictures if pictures else 0.0

    def count(self, pictures: int) -> None:
        """Count finished images and report progress."""
        self.done += pictures
        self.progress(Event("generate", self.done, max(self.total, self.done)))


@dataclass
class GeneratedImages:
    """Generated images: views by setting, those of generic prompts before and after, and the base's fingerprint."""

    shown: dict[str, list[View]] = field(default_factory=dict)
    generic_images: tuple[list[Path], list[Path]] = ((), ())  # type: ignore[assignment]
    base: str = ""


def count_of(config: EvaluateConfig, inputs: EvaluationInputs | None) -> int:
    """How many images the adapters take."""
    if inputs is None:
        return 0
    passes = config.noun_baseline + 1 + (inputs.together != ALONE)
    return config.num_images * (passes * len(inputs.adapters) * len(config.prompts) + 2 * len(config.prior_prompts))


def generate_adapters(images: EvaluationImages, inputs: EvaluationInputs, hooks: Hooks) -> GeneratedImages:
    """Each concept as its noun on the untouched base, alone, and together with the others; also generic prompts.

    Raises:
        UserError: an adapter does not fit the base.
    """
    config, generated = images.config, GeneratedImages()
    how = config.device, config.dtype, config.quantization, config.layer_offload
    base = load_base(inputs.base, *how)
    for adapter in inputs.adapters.values():
        if warning := check_base(adapter, base, config.allow_base):
            hooks.notify(warning)
    generated.base = base.fingerprint.exact
    for adapter in inputs.adapters.values():
        install_tokens(base, adapter)
    before = images.generate(base, FLOOR, "generic", config.prior_prompts, {}, inputs.base)
    if config.noun_baseline:
        generated.shown[FLOOR] = [
            v for a in inputs.adapters.values() for v in images.portraits(base, FLOOR, a, {}, inputs.base)
        ]
    generated.shown[ALONE] = []
    for path, adapter in inputs.adapters.items():
        with enabled_adapters(base, [(adapter, 1.0)]):
            generated.shown[ALONE] += images.portraits(base, ALONE, adapter, {path: 1.0}, inputs.base)
    setting, acts, of = inputs.together, evaluation_scales(config, inputs), inputs.base
    if inputs.fused:
        del base  # before the next one is loaded: two may not fit
        base, acts, of = load_base(str(inputs.fused), *how), {}, str(inputs.fused)
    with enabled_adapters(base, [(inputs.adapters[path], strength) for path, strength in acts.items()]):
        if setting != ALONE:
            generated.shown[setting] = [
                v for a in inputs.adapters.values() for v in images.portraits(base, setting, a, acts, of)
            ]
        generated.generic_images = before, images.generate(base, setting, "generic", config.prior_prompts, acts, of)
    return generated
