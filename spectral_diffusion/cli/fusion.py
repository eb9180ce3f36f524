"""The verbs that fuse adapters, search the strengths of a fusion, and take concepts out again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.fuse import FuseConfig
from ..core.errors import UserError
from ..core.files import is_folder
from ..core.hooks import ignore
from .executors import (
    ClusterOption,
    ExecutorOption,
    Executors,
    ParallelOption,
    cluster_of,
    job_hooks,
    submit_batch,
)
from .options import settings_flags
from .support import (
    ConfigOption,
    JsonOption,
    StrengthOption,
    echo,
    files_and_settings,
    given,
    importing,
    named_base,
    numbers,
    resolve,
)

WAVES = 4  # of a cluster's jobs, one after the other, that even out what takes longer


@settings_flags(FuseConfig, without={"adapters"})
def fuse(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter files, or fused folders for what is inside; then key=value.")
    ],
    strength: StrengthOption = None,
    add: Annotated[
        list[Path] | None, typer.Option(help="One more adapter for a fused folder. Repeat for more.")
    ] = None,
    config: ConfigOption = None,
    part: Annotated[
        list[str] | None, typer.Option(help="Only compute what an adapter contributes, into the cache.", hidden=True)
    ] = None,
    executor: ExecutorOption = None,
    jobs: ParallelOption = None,
    cluster: ClusterOption = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Fuse several adapters into one checkpoint that stock diffusers opens.

    With --executor the adapters' parts are computed by jobs, and then they are fused.
    """
    files, overrides = files_and_settings(adapters)
    files += [str(path) for path in add or []]
    flags |= given(adapters=files, scales=numbers(strength, "--strength"))
    with importing():
        from ..merging.fuse import fuse_to_folder
        from ..merging.parts import compute_parts

    settings = resolve(
        FuseConfig, "fuse", config, added_to(files, flags, config), overrides, base=named_base(files, overrides)
    )
    if executor:
        submit_parts(settings, executor, jobs, cluster)
        return
    with job_hooks() as hooks:
        if part:
            compute_parts(settings, part, hooks)
            return
        for warning in fuse_to_folder(settings, hooks):
            echo(f"Note: {warning}")
    echo(f"Wrote {settings.output}/; open it with --base {settings.output} or DiffusionPipeline.from_pretrained.")


def submit_parts(settings: FuseConfig, executor: Executors, parallelism: int | None, cluster: list[str] | None) -> None:
    """Submit jobs for the adapters' parts of a fusion, and one that fuses them.

    A job takes several parts where more could not run at once anyway, since each loads the base.
    """
    from ..adapters.formats.reading import is_foreign
    from ..batch.job import Batch, BatchFolder, Job
    from ..batch.submission import check_idle
    from ..config.settings import to_yaml
    from ..core.files import write_text
    from ..merging.manifest import check_fusion_output, files_in_fusion
    from ..merging.parts import names_in, part_names

    check_fusion_output(settings.output)
    settings = settings.model_copy(
        update={
            "distill": settings.distill.model_copy(update={"cache": True}),
            "adapters": [
                file for path in settings.adapters for file in ([path] if is_foreign(path) else files_in_fusion(path))
            ],
        }
    )
    folder = BatchFolder(settings.output.with_name(f"{settings.output.name}.jobs"))
    file = folder.settings("fuse")
    arguments = ("fuse", *map(str, settings.adapters), "-o", str(settings.output), "--config", str(file.resolve()))
    names = part_names(settings, names_in(settings))
    waves = 1 if executor is Executors.local else WAVES
    count = min(len(names), (parallelism or (1 if executor is Executors.local else len(names))) * waves)
    each = [
        Job(name=f"part-{number}", arguments=(*arguments, *(f"--part={name}" for name in names[number::count])))
        for number in range(count)
    ]
    batch = Batch(
        executor=executor.value, cluster=cluster_of(cluster, parallelism), jobs=each,
        finish=Job(name="fuse", arguments=arguments, output=str(settings.output)),
    )  # fmt: skip
    check_idle(folder, batch.every)  # before its settings are replaced
    write_text(file, to_yaml(settings))
    submit_batch(folder, batch)


def added_to(files: Sequence[str], flags: Mapping[str, Any], config: str | None) -> dict[str, Any]:
    """The flags, on top of the settings of the fused folders among the files, which are fused again with more.

    Raises:
        UserError: a folder is not a fusion, or ``config`` is given too.
    """
    from ..adapters.formats.reading import is_foreign
    from ..merging.unfuse import settings_of

    folders = [path for path in map(Path, files) if is_folder(path) and not is_foreign(path)]
    if not folders:
        return dict(flags)
    before: dict[str, Any] = {}
    for folder in folders:
        made = settings_of(folder, [folder], Path("fused")).model_dump(mode="json", exclude={"output", "adapters"})
        before = {**made, **before, "scales": {**made["scales"], **before.get("scales", {})}}
    if config:
        raise UserError(f"{folders[0]} is added to with its own settings; give others as key=value, not with --config.")
    return {**before, **flags, "scales": {**before["scales"], **flags.get("scales", {})}}


@settings_flags(FuseConfig, without={"adapters", "output", "scales"})
def tune(
    adapters: Annotated[list[str], typer.Argument(help="Adapter files; settings of fuse may follow as key=value.")],
    strengths: Annotated[str, typer.Option(help="Strengths to try.")] = "0.5,0.65,0.8,0.9,1.0",
    prior_weights: Annotated[
        str, typer.Option(help="Values of calibration.prior_weight to try, for gradient and ssr.")
    ] = "",
    as_json: JsonOption = False,
    config: ConfigOption = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Find the strength (and prior weight) of a fusion on held-out prompts; use other concepts than you report."""
    files, overrides = files_and_settings(adapters)
    flags |= {"adapters": files, "output": "tuned"}
    settings = resolve(FuseConfig, "fuse", config, flags, overrides, base=named_base(files, overrides))
    try:
        tries = [[float(part) for part in text.split(",") if part.strip()] for text in (strengths, prior_weights)]
    except ValueError as error:
        raise UserError("--strengths and --prior-weights take numbers with commas, such as 0.5,0.8,1.") from error
    if not tries[0]:
        raise UserError("--strengths needs at least one number, such as 0.5,0.8,1.")
    if not all(math.isfinite(value) for values in tries for value in values):
        raise UserError("All of --strengths and --prior-weights have to be finite, such as 0.5,0.8,1.")
    from ..merging.manifest import adapters_in_fusion
    from ..merging.search import search_scales
    from ..models.loading import load_base

    loaded = [adapter for file in settings.adapters for adapter in adapters_in_fusion(file)]
    base = load_base(settings.base or loaded[0].base, settings.device, settings.dtype)
    with job_hooks() as hooks:
        quiet = replace(hooks, notify=ignore)  # what a fusion notes would be said of every candidate, and in the JSON
        candidates = search_scales(base, loaded, settings, tries[0], tries[1], quiet)
    if as_json:
        typer.echo(json.dumps([{**vars(candidate), "score": candidate.score} for candidate in candidates], indent=2))
        return
    for candidate in candidates:
        echo(
            f"strength {candidate.scale:g}, prior weight {candidate.prior_weight:g}: "
            f"concepts off {candidate.concepts:.3f}, drift {candidate.drift:.3f}"
        )
    best = candidates[0]
    each = {candidate.name: best.scale * settings.scales.get(candidate.name, 1.0) for candidate in loaded}
    names = " ".join(f"--strength {name}={value:g}" for name, value in each.items())
    others = [override for override in overrides if not override.startswith("adapters=")]
    settings_text = " ".join([*others, f"calibration.prior_weight={best.prior_weight:g}"])
    where = f" --base {flags['base']}" if "base" in flags else ""
    echo(f"Best: fuse {' '.join(map(str, settings.adapters))}{where} --merge {settings.merge} {names} {settings_text}")


def unfuse(
    folder: Annotated[Path, typer.Argument(help="A fused folder.")],
    remove: Annotated[list[str], typer.Option(help="A concept to take out. Repeat for more.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    subtract: Annotated[
        bool, typer.Option("--subtract", help="Without the base: subtract, and say how exact.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Where the base is, if not where it was.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps …")] = "auto",
) -> None:
    """Take concepts out of a fused folder again: the same bits as if they had never been in."""
    from ..merging.unfuse import unfuse as take_out

    with job_hooks() as hooks:
        take_out(folder, remove, output, subtract, base, device, hooks)
    echo(f"Wrote {output}/.")
