"""From a config to an adapter on disk: folder, base, slot, loop, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..adapter import Adapter
from ..base import Base, load_base
from ..config import TrainConfig, to_yaml
from ..data.folder import Concept, load_concept
from ..errors import UserError
from ..files import check_writable, write_text
from ..formats.native import save_adapter
from ..methods import get_method
from ..progress import Progress, silent
from ..slots import Ledger, Slot
from ..spectrum import capacity
from ..tokens import known_tokens
from .loop import train


def state_path(output: Path) -> Path:
    """Where a run's resumable state lies while it is unfinished."""
    return output.with_name(f"{output.stem}.state.safetensors")


def train_to_file(
    config: TrainConfig,
    resume: bool = False,
    progress: Progress = silent,
    should_stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda text: None,
    base: Base | None = None,
) -> Adapter:
    """Train the config's concept and write ``output`` and ``output.yaml`` (the resolved settings).

    The concept's slot is reserved in the ledger beside the output before training starts.

    Raises:
        UserError: anything the person can mend; see also :func:`.loop.train`.
    """
    output = config.output
    if output.suffix != ".safetensors":
        raise UserError(f"The output {output} must end in .safetensors.")
    method = get_method(config.method)
    concept = load_concept(config.concept, config.name, config.token, config.noun)
    if concept.skipped:
        note(f"Skipped in {config.concept}: {'; '.join(concept.skipped)}.")
    check_writable(output)
    base = base or load_base(config.base, config.device, config.dtype)
    if concept.token in known_tokens(base.pipeline.tokenizer):
        raise UserError(
            f"The base '{config.base}' already has the token {concept.token}; choose another with token=<name>."
        )
    slot = reserve(config, base, concept) if method.banded else None
    where = f"columns {slot}" if slot else f"rank {config.rank}"
    note(
        f"Concept '{concept.name}' ({len(concept.photos)} photos of a {concept.noun}) as {concept.token}: "
        f"{method.name}, {where}."
    )
    adapter = train(config, base, concept, slot, state_path(output), resume, progress, should_stop)
    save_adapter(adapter, output)
    write_text(output.with_suffix(".yaml"), to_yaml(config))
    return adapter


def reserve(config: TrainConfig, base: Base, concept: Concept) -> Slot:
    """The concept's slot in the ledger beside the output."""
    columns, narrowest = capacity(base.weights(config.targets))
    ledger = Ledger.beside(config.output)
    return ledger.reserve(base.fingerprint.exact, concept.name, config.rank, config.slot, columns, narrowest)
