"""What all trainings of a batch need and compute once: the spectrum of the base, and prior images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from ..adapters.frozen import frozen_tensors
from ..config.settings import build, read_yaml
from ..config.train import TrainConfig, is_style_noun
from ..core.errors import UserError
from ..core.hooks import QUIET, Hooks
from ..data.folder import describe
from ..methods import get_method
from ..models.base import Base
from ..models.loading import load_base
from ..slots.ledger import Slot
from ..svd_cache import CHUNK
from ..training.distributed import current_world, device_of
from ..training.prior_images import make_prior_images, make_shared_prior_images
from ..training.slot_choice import reserve, with_slot_seed
from .job import Batch, BatchFolder


def prepare(folder: BatchFolder, batch: Batch, hooks: Hooks = QUIET) -> None:
    """Fill the cache with what the batch's trainings share, each kind of base and settings once.

    It only saves time: a training computes what it does not find.

    Raises:
        UserError: a base cannot be loaded.
        Cancelled: ``hooks.should_stop`` said so.
    """
    groups: dict[str, list[TrainConfig]] = {}
    for job in batch.jobs:
        path = folder.settings(job)
        if path.is_file() and job.arguments[0] == "train":
            config = build(TrainConfig, read_yaml(path), file=str(path))
            groups.setdefault(loading_key(config), []).append(config)
    for configs in groups.values():
        first = configs[0]
        base = load_base(
            first.base, device_of(first, current_world(first.device)), first.dtype, first.quantization,
            first.layer_offload,
        )  # fmt: skip
        prepare_spectra(base, configs, hooks)
        prepare_prior_images(base, configs, hooks)


def loading_key(config: TrainConfig) -> str:
    """Equal for trainings that load one base in one form."""
    return json.dumps([config.base, config.device, config.dtype, config.quantization, config.layer_offload])


def prepare_spectra(base: Base, configs: Sequence[TrainConfig], hooks: Hooks = QUIET) -> None:
    """Compute the bands of all slots; slots within the same chunk of columns need one file."""
    done = set()
    for config in configs:
        method = get_method(config.method)
        if method.builds_on not in ("columns", "full_svd") or config.init_from_adapter:
            continue
        try:
            slot = slot_in_ledger(config, base) if method.slot else None
        except UserError:  # its own training reports it
            continue
        reach = (-(-slot.top // CHUNK), -(-slot.bottom // CHUNK)) if slot else ()
        key = (method.builds_on, config.target_modules, reach)
        if key not in done:
            done.add(key)
            hooks.raise_if_stopped("Stopped while spectra were computed; what is done is kept.")
            frozen_tensors(method, base.weights(config.target_modules), config.rank, slot, Hooks(hooks.progress))


def slot_in_ledger(config: TrainConfig, base: Base) -> Slot:
    """The slot that a training will find."""
    about = describe(config.concept, config.name, config.token, config.class_noun)
    return reserve(with_slot_seed(config, resume=False), base, about.name)


def prepare_prior_images(base: Base, configs: Sequence[TrainConfig], hooks: Hooks = QUIET) -> None:
    """Generate the prior images that show no concept's own class, and those of classes that several concepts have."""
    nouns: dict[int, str] = {}
    for index, config in enumerate(configs):
        try:
            noun = describe(config.concept, config.name, config.token, config.class_noun).noun
        except UserError:  # its own training reports it
            continue
        nouns[index] = "" if is_style_noun(noun) else noun
    frequent = {noun for noun, count in Counter(nouns.values()).items() if noun and count > 1}
    done = set()
    for index, config in enumerate(configs):
        if not config.prior.loss_weight or config.data.class_images_dir or index not in nouns:
            continue
        own = nouns[index] if nouns[index] in frequent else ""
        key = (own, config.seed, config.resolution, config.prior.model_dump_json())
        if key in done:
            continue
        done.add(key)
        size = config.resolution or base.size
        if own:
            make_prior_images(base, config, [own], size, hooks)
        else:
            make_shared_prior_images(base, config, size, hooks)
