"""From a config to an adapter on disk: folder, base, slot, loop, files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from ..adapters.adapter import Adapter, check_base
from ..adapters.formats.native import load_adapter, save_adapter
from ..config.presets import with_rates
from ..config.settings import to_yaml
from ..config.train import TrainConfig
from ..core.errors import Fix, UserError
from ..core.files import check_writable
from ..core.hooks import QUIET, Hooks
from ..core.machine import heading
from ..core.names import check_name, with_article
from ..core.outputs import write_settings
from ..core.precision import precision_note, resolve_mixed_precision
from ..data.folder import Concept, load_concept
from ..data.joint import joined
from ..methods import get_method
from ..methods.registry import Method
from ..models.base import Base
from ..models.loading import load_base
from ..models.offload import is_offloaded
from ..models.per_layer_tokens import check_encoders
from ..models.prompt_encoder import PromptEncoder, trigger_words
from .checks import notes_on
from .distributed import World, current_world, device_of
from .loop import TrainingJob, train
from .memory import memory_note
from .optimizers import check_optimizer
from .output import check_token_is_free, claimed, other_token, prepare_output
from .output import state_path as state_path
from .overlap import earlier_adapters
from .sharding import check_sharding
from .slot_choice import earlier_settings, reserve, slot_notes, with_rank, with_slot_seed


def train_to_file(
    config: TrainConfig,
    resume: bool = False,
    hooks: Hooks = QUIET,
    base: Base | None = None,
    force: bool = False,
) -> Adapter:
    """Train the config's concept and write ``output`` and ``output.yaml`` (the resolved settings).

    The settings are taken as they are; :func:`..config.presets.settings_for` gives those of the command line. The
    concept's slot is reserved in the ledger beside the output before training starts. Of several processes, as
    ``accelerate launch`` starts them, the main one alone writes and notifies.

    Args:
        resume: go on from a stopped training's state; an adapter that is done already stays and is returned.
        force: resume although settings have changed; without ``resume`` replace a stopped training's state, and
            another concept's adapter.

    Raises:
        UserError: anything that the user can fix; see also :func:`.loop.train`.
    """
    if config.output.suffix != ".safetensors":
        raise UserError(f"The output {config.output} must end in .safetensors.")
    get_method(config.method)  # a misspelt one is reported before any loading
    among = current_world(config.device)
    check_sharding(config, among)
    if not among.is_main:
        hooks = Hooks(should_stop=hooks.should_stop)
    with claimed(config.output) if among.is_main else nullcontext():
        concept = read_concepts(config)
        if concept.skipped:
            hooks.notify(f"Skipped in {config.concept}: {'; '.join(concept.skipped)}.")
        for text in concept.notes:
            hooks.notify(text)
        check_name(concept.name)
        done = prepare_output(config, concept.name, resume, force, hooks) if among.is_main else None
        if among.broadcast(done):
            return load_adapter(config.output)
        for single in (concept, *concept.joint) if not force else ():
            check_token_is_free(config.output, single, concept)
        base = base or load_base(
            config.base,
            device_of(config, among),
            config.dtype,
            config.quantization,
            config.layer_offload or config.shard_base,
        )
        return train_on(base, config, concept, among, resume, force, hooks)


def train_on(
    base: Base, config: TrainConfig, concept: Concept, among: World, resume: bool, force: bool, hooks: Hooks
) -> Adapter:
    """The part of :func:`train_to_file` that needs the base.

    Raises:
        UserError: see :func:`train_to_file`.
    """
    output, note = config.output, hooks.notify
    for single in (concept, *concept.joint):
        check_concept(single, concept, base, config)
    base.denoiser.check_objective(config.objective)
    config = among.broadcast(settle_precision(config, base, resume, Hooks(notify=note)))
    start_from = None
    if config.init_from_adapter:
        config, start_from = with_start(config, base, concept)
        note(f"Going on from {config.init_from_adapter}: method, rank {config.rank}, targets and columns are its own.")
        if start_from.per_layer_vectors:
            note(f"Note: {start_from.token} has layer-wise vectors; what goes on from it keeps their mean.")
    config = with_rates(config)
    method = get_method(config.method)
    check_columns(config, method)
    check_optimizer(config, method)
    check_weights(base, method)
    size = config.resolution or base.size
    base.check_side(size, "resolution")
    for text in notes_on(concept, PromptEncoder(base, concept, config.seed, size, joint=concept.joint), config):
        note(text)
    shapes = list(base.sizes(config.target_modules).values())
    config = with_rank(config, shapes, Hooks(notify=note))
    slot = start_from.slot if start_from else None
    if method.slot and not start_from:
        config = among.broadcast(with_slot_seed(config, resume))
        slot = among.broadcast(reserve(config, base, concept.name) if among.is_main else None)
        assert slot is not None
        for text in slot_notes(config, slot, base):
            note(text)
    if not method.slot and config.slot != "next":
        note(f"Note: {method.name} has no slot, so slot={config.slot} changes nothing.")
    if among.is_main:  # the adapter with its bands, and the state with two moments for every number
        trained = method.total(shapes, config.rank)
        check_writable(output, 4 * (4 * trained + config.rank * sum(map(sum, shapes))))
    where = f"{method.slot or 'columns'} {slot}" if slot else f"rank {config.rank}"
    note(training_note(concept, method, where, shapes, config.rank))
    if not base.tokenizers:
        note(
            f"Note: this base learns no words. Write '{trigger_words(concept)}' in prompts of other programs; here "
            f"{concept.token} names it."
        )
    if memory := memory_note(base, config, size):
        note(memory)
    earlier = earlier_adapters(config, base, concept, start_from, resume, Hooks(notify=note))
    job = TrainingJob(config, base, concept, slot, state_path(output), start_from, among, resume, force, earlier)
    adapter = train(job, hooks)
    if among.is_main:
        save_adapter(adapter, output)
        write_settings(output.with_suffix(".yaml"), heading() + to_yaml(config))
        state_path(output).unlink(missing_ok=True)
    return adapter


def check_columns(config: TrainConfig, method: Method) -> None:
    """Refuse settings of columns for a method without them.

    Raises:
        UserError: there are such.
    """
    if config.normalize and not method.normalizable:
        raise UserError(f"The method {method.name} has no columns that could be normalized.", Fix("normalize", "false"))
    if config.slot_lr_power and method.builds_on != "columns":
        raise UserError(f"The method {method.name} has no columns to scale the rate by.", Fix("slot_lr_power", "0"))


def training_note(concept: Concept, method: Method, where: str, shapes: Sequence[tuple[int, int]], rank: int) -> str:
    """What is about to be trained; ``where`` is the slot or the rank."""
    tokens = " and ".join(single.token for single in (concept, *concept.joint))
    return (
        f"Concept '{concept.name}' ({len(concept.photos)} photos of {with_article(concept.noun)}) as {tokens}: "
        f"{method.name}, {where}; {method.total(shapes, rank):,} numbers in {len(shapes)} layers."
    )


def read_concepts(config: TrainConfig) -> Concept:
    """The concept of the settings, with those that are trained jointly in it.

    Raises:
        UserError: see :func:`..data.folder.load_concept`; two of one token; or settings that joint concepts rule out.
    """
    concept = load_concept(config.concept, config.name, config.token, config.class_noun)
    if not config.joint_concepts:
        return concept
    if config.per_layer_tokens:
        raise UserError("Joint concepts have one vector per word, not one per layer.", Fix("per_layer_tokens", "false"))
    if config.data.class_images_dir:
        raise UserError(
            "data.class_images_dir shows one class, and joint concepts may have several.",
            Fix("data.class_images_dir", so="left out"),
        )
    return joined([concept, *map(load_concept, config.joint_concepts)])


def check_concept(concept: Concept, first: Concept, base: Base, config: TrainConfig) -> None:
    """Refuse a concept whose token the base has already, and layer-wise vectors on a base that cannot have them.

    ``first`` is the concept that the settings name; others are trained jointly with it.

    Raises:
        UserError: so it is.
    """
    learning = {
        "per_layer_tokens": (config.per_layer_tokens, "false"),
        "objective.attention_loss_weight": (config.objective.attention_loss_weight, "0"),
    }
    for name, (asked, off) in learning.items():
        if asked and not base.tokenizers:
            raise UserError(
                f"The base '{config.base}' learns no words, so {name} has nothing to work on.", Fix(name, off)
            )
    if config.joint_concepts and not base.tokenizers:
        raise UserError(
            f"The base '{config.base}' learns no words, so only one concept fits into an adapter.",
            Fix("joint_concepts", "[]"),
        )
    if config.per_layer_tokens:
        check_encoders(base)
    known = {token.lower(): token for token in base.known_tokens}
    if token := known.get(concept.token.lower()):  # tokenizers ignore case
        raise UserError(f"The base '{config.base}' already has the token {token}.", other_token(concept, first))


def check_weights(base: Base, method: Method) -> None:
    """Refuse a method that computes with the weights themselves, where they are quantized or elsewhere.

    Raises:
        UserError: so it is.
    """
    away = base.stored is not None or is_offloaded(base.denoiser.network)
    if away and (method.builds_on == "weight" or (method.peft and method.peft.initialize)):
        raise UserError(
            f"The method {method.name} computes with the weights, which are quantized or off the GPU here.",
            Fix("method", so="to choose another"),
            Fix("quantization", "none"),
        )


def with_start(config: TrainConfig, base: Base, concept: Concept) -> tuple[TrainConfig, Adapter]:
    """The adapter that training goes on from, and the settings that it fixes.

    Raises:
        UserError: it is of another kind or another base.
    """
    assert config.init_from_adapter is not None
    adapter = load_adapter(config.init_from_adapter)
    if adapter.method.continue_from is None:
        raise UserError(
            f"Training can start from a spectral-rotation adapter, whose rotated columns are orthonormal again; "
            f"{config.init_from_adapter} is {adapter.method.name}."
        )
    check_base(adapter, base)
    for single in (concept, *concept.joint):
        if single.token.lower() in {token.lower() for token in adapter.tokens}:
            raise UserError(
                f"{config.init_from_adapter} has the token {single.token} already.", other_token(single, concept)
            )
    fixed = {
        "method": adapter.method.name,
        "rank": adapter.rank,
        "target_modules": adapter.targets,
        "param_budget": None,
    }
    return config.model_copy(update={**fixed, "slot": str(adapter.slot)}), adapter


def settle_precision(config: TrainConfig, base: Base, resume: bool, hooks: Hooks) -> TrainConfig:
    """Settle the mixed precision: given, the interrupted run's, or what is quick on this machine. It is recorded."""
    requested = config.mixed_precision
    if requested == "auto":
        requested = earlier_settings(config, resume).get("mixed_precision", requested)
    precision = resolve_mixed_precision(requested, base.device, base.dtype)
    precision_note(requested, precision, base.device, config.allow_tf32, hooks.notify)
    return config.model_copy(update={"mixed_precision": precision})
