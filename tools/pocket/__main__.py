"""The verbs of the pocket base's tools: ``python -m tools.pocket``, from the root of the repository."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from spectral_diffusion.cli.support import echo

from .base import Recipe
from .loop import Limits

app = typer.Typer(
    name="python -m tools.pocket",
    help="How the pocket base is made and measured.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


WorkOption = Annotated[Path, typer.Option(help="Folder for artwork, states and what comes of them.")]
StartOption = Annotated[str, typer.Option(help="A pipeline or packed files to begin with if there is no state yet.")]
MinutesOption = Annotated[float, typer.Option(help="Minutes of this piece.")]
UntilOption = Annotated[int | None, typer.Option(help="Stop at this count of samples.")]
DecayOption = Annotated[int | None, typer.Option(help="Take the rate down over so many samples, from now.")]
RateOption = Annotated[float, typer.Option(help="Learning rate before the decay.")]
BatchOption = Annotated[int, typer.Option(help="Samples per step.")]
SizesOption = Annotated[str, typer.Option(help="narrow or wide: the U-Net's widths.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
MapsOption = Annotated[float, typer.Option(help="Weight of the added loss on maps of classes and colours.")]
PipelineOption = Annotated[Path, typer.Option("-o", "--output", help="Where to write the pipeline.")]
AverageOption = Annotated[int, typer.Option(help="Which moving average; 0 is the shortest.")]
ReuseOption = Annotated[int, typer.Option(help="How often every batch is seen, each time with other noise.")]
SheetOption = Annotated[int, typer.Option(help="Draw a sample sheet after this many samples; 0: never.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads.")]
WorkersOption = Annotated[int, typer.Option(help="Processes that plan scenes and draw puppets.")]
PuppetsOption = Annotated[int, typer.Option(help="Drawings of each puppet in a colour and a pose.")]


@app.command("pretrain")
def pretrain(
    work: WorkOption = Path("pretraining"),
    start: StartOption = "pocket",
    minutes: MinutesOption = math.inf,
    until_samples: UntilOption = None,
    decay_samples: DecayOption = None,
    rate: RateOption = Recipe.rate,
    batch: BatchOption = 32,
    maps: MapsOption = 0.0,
    sizes: SizesOption = "narrow",
    device: DeviceOption = "auto",
    threads: ThreadsOption = 2,
    workers: WorkersOption = 0,
    puppets: PuppetsOption = 48,
    reuse: ReuseOption = 2,
    sheet_samples: SheetOption = 50_000,
) -> None:
    """Train text encoder, U-Net and T2I-Adapters for one piece (goes on where the last one stopped)."""
    import torch

    from .pieces import Piece, run_base

    torch.set_num_threads(threads)
    piece = Piece(work, start, sizes, batch, device, workers, puppets, reuse, sheet_samples=sheet_samples)
    run_base(piece, Recipe(rate=rate, maps=maps), Limits(minutes, until_samples), decay_samples, echo)


@app.command("trial")
def trial(
    name: Annotated[str, typer.Argument(help="plain, maps, noisier, even, wide or muon.")],
    work: WorkOption = Path("pretraining"),
    samples: Annotated[int, typer.Option(min=1, help="Samples that the trial sees.")] = 50_000,
    every: Annotated[int, typer.Option(min=1, help="Samples between two measurements.")] = 10_000,
    threads: ThreadsOption = 2,
) -> None:
    """Try one change of the recipe from the folder's state; compare held-out losses with those of plain."""
    import torch

    from .trials import TRIALS, run_trial

    if name not in TRIALS:
        raise typer.BadParameter(f"{name} is none of {', '.join(TRIALS)}.")
    torch.set_num_threads(threads)
    run_trial(name, work, samples, every, echo)


@app.command("gpu")
def gpu(
    work: WorkOption = Path("pretraining"),
    start: StartOption = "pocket",
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the packed state.")] = Path("packed"),
    minutes: MinutesOption = 8,
    decay_samples: DecayOption = None,
    rate: RateOption = 1.5e-3,
    batch: BatchOption = 1024,
    maps: MapsOption = 0.0,
    sizes: SizesOption = "narrow",
    device: DeviceOption = "cuda",
    workers: WorkersOption = 12,
    puppets: PuppetsOption = 200,
    compiled: Annotated[bool, typer.Option(help="Compile the U-Net first.")] = False,
) -> None:
    """One piece on a GPU, from packed files to packed files; needs artwork.safetensors in the folder, no internet."""
    from .pieces import Piece, run_base
    from .travel import pack

    piece = Piece(work, start, sizes, batch, device, workers, puppets, 1, compiled, sheet_samples=0)
    training = run_base(
        piece, Recipe(rate=rate, ema=(100_000, 1_000_000), maps=maps), Limits(minutes), decay_samples, echo
    )
    pack(training, output)
    echo(f"Wrote {output}/.")


@app.command("export")
def export_pipeline(
    work: WorkOption = Path("pretraining"),
    output: PipelineOption = Path("pipeline"),
    average: AverageOption = 0,
) -> None:
    """Write the pipeline as it stands, with the folder's autoencoder if there is one."""
    from .pieces import as_saved, vae_of
    from .sheet import export, sample_sheet

    export(as_saved(work), vae_of(work), output, average)
    sample_sheet(output, output / "samples.png")
    echo(f"Wrote {output}/, and what it draws in {output / 'samples.png'}.")


@app.command("pack")
def pack_state(
    work: WorkOption = Path("pretraining"),
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the packed state.")] = Path("packed"),
) -> None:
    """Write the base's weights in small files, without the optimizer's numbers and the moving averages."""
    from .pieces import as_saved
    from .travel import pack

    pack(as_saved(work), output, averages=False)
    echo(f"Wrote {output}/.")


@app.command("unpack")
def unpack_state(
    packed: Annotated[Path, typer.Argument(help="Files that `gpu` or `pack` wrote.")],
    work: WorkOption = Path("pretraining"),
) -> None:
    """Make packed files the state of a folder; the one before becomes base.before.safetensors."""
    from .pieces import unpack_into

    echo(f"Wrote {work}/: {unpack_into(packed, work)} samples.")


@app.command("vae")
def vae(
    work: WorkOption = Path("pretraining"),
    start: Annotated[str, typer.Option(help="The pipeline whose U-Net predicts latents.")] = "pocket",
    minutes: MinutesOption = math.inf,
    until_samples: UntilOption = None,
    decay_samples: DecayOption = None,
    rate: RateOption = 1e-3,
    batch: BatchOption = 8,
    anchor: Annotated[float | None, typer.Option(help="Let the encoder learn from pictures, held by this.")] = None,
    predicted: Annotated[float, typer.Option(help="Share of latents that the U-Net predicts.")] = 0.5,
    features: Annotated[float, typer.Option(help="Weight of the error in the critic's features.")] = 0.0,
    adversarial: Annotated[float, typer.Option(help="Weight of what the critic says.")] = 0.0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 2,
    workers: WorkersOption = 0,
    puppets: PuppetsOption = 12,
) -> None:
    """Train the autoencoder for one piece (goes on where the last one stopped)."""
    import torch

    from .pieces import Piece, run_vae
    from .vae import VaeRecipe

    torch.set_num_threads(threads)
    piece = Piece(work, start, batch=batch, device=device, workers=workers, puppets=puppets)
    recipe = VaeRecipe(rate=rate, predicted=predicted, anchor=anchor, features=features, adversarial=adversarial)
    run_vae(piece, recipe, Limits(minutes, until_samples), decay_samples, echo)


@app.command("transformer")
def transformer(
    work: WorkOption = Path("pretraining"),
    start: Annotated[str, typer.Option(help="The pipeline whose autoencoder it takes the first time.")] = "pocket",
    minutes: MinutesOption = math.inf,
    until_samples: UntilOption = None,
    decay_samples: DecayOption = None,
    rate: RateOption = 2e-3,
    batch: BatchOption = 32,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 2,
    workers: WorkersOption = 0,
    puppets: PuppetsOption = 24,
    reuse: ReuseOption = 2,
    sheet_samples: SheetOption = 50_000,
    teacher: Annotated[str | None, typer.Option(help="A Stable Diffusion over the same autoencoder: pocket.")] = None,
) -> None:
    """Train the pocket transformer for one piece (goes on where the last one stopped)."""
    import torch

    from .pieces import Piece
    from .transformer import FlowRecipe
    from .transformer_piece import run_transformer

    torch.set_num_threads(threads)
    piece = Piece(
        work, start, batch=batch, device=device, workers=workers, puppets=puppets, reuse=reuse,
        sheet_samples=sheet_samples,
    )  # fmt: skip
    run_transformer(piece, FlowRecipe(rate=rate), Limits(minutes, until_samples), decay_samples, echo, teacher)


@app.command("export-transformer")
def export_transformer(
    work: WorkOption = Path("pretraining"),
    output: PipelineOption = Path("pipeline"),
    average: AverageOption = 0,
) -> None:
    """Write the transformer's pipeline as it stands, and what it draws."""
    from .transformer_piece import export_saved

    export_saved(work, output, average)
    echo(f"Wrote {output}/, and what it draws in {output / 'samples.png'}.")


@app.command("concepts")
def concepts(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the photo folders.")] = Path(
        "concepts"
    ),
    work: Annotated[Path, typer.Option(help="Folder for the artwork.")] = Path("pretraining"),
) -> None:
    """Draw the ready-made concept folders again."""
    from .art import icon_sets
    from .concepts import make_all
    from .render import Renderer
    from .styles import READY_MADE, make_style

    renderer = Renderer(icon_sets(work / "art"))
    make_all(renderer, output)
    for name in READY_MADE:
        make_style(renderer, name, output / name)
    echo(f"Wrote {output}/.")


@app.command("naming")
def naming(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the sheet, the names and the key.")],
    base: Annotated[str, typer.Option(help="The pocket base, or a folder of the same kind.")] = "pocket",
    seed: Annotated[int, typer.Option(help="Which pictures.")] = 0,
    names: Annotated[int, typer.Option(min=2, max=40, help="Names on the list.")] = 40,
    pictures: Annotated[int, typer.Option(min=1, max=512, help="Pictures on the sheet; names may repeat.")] = 48,
) -> None:
    """Draw unlabelled pictures to be named blindly from a list of names."""
    from .naming import make_naming

    make_naming(output, base, seed, names, pictures)
    echo(f"Wrote {output}/: name the pictures of sheet.png from names.txt, then look at key.json.")


@app.command("measure")
def measure(
    work: Annotated[Path, typer.Option(help="Folder of the pretraining.")] = Path("pretraining"),
    identity_steps: Annotated[int, typer.Option(help="Training steps of the identity encoder.")] = 1500,
    judge_steps: Annotated[int, typer.Option(help="Training steps of each judge.")] = 1200,
    start: Annotated[Path | None, typer.Option(help="Folder with judges/ and identity/ to begin with.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the identity encoder and the two judges (goes on where it stopped)."""
    import torch

    from .art import icon_sets
    from .encoders import train_encoder
    from .judges import KINDS, train_judge
    from .render import Renderer

    torch.set_num_threads(threads)
    renderer = Renderer(icon_sets(work / "art"))
    train_encoder(renderer, work, "identity", identity_steps, start and start / "identity" / "model.safetensors", echo)
    for name in KINDS:
        train_judge(renderer, work, name, judge_steps, start, echo)


@app.command("measure-styles")
def measure_styles(
    work: Annotated[Path, typer.Option(help="Folder with the artwork in art/ and the autoencoder in vae/.")] = Path(
        "pretraining"
    ),
    steps: Annotated[int, typer.Option(help="Training steps of each encoder.")] = 1200,
    only: Annotated[str, typer.Option(help="style, styled_identity, or both if empty.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the encoders of styles and of identity in any style (goes on where it stopped)."""
    import torch

    from spectral_diffusion import pocket

    from .art import icon_sets
    from .encoders import train_encoder
    from .render import Renderer

    torch.set_num_threads(threads)
    renderer, shipped = Renderer(icon_sets(work / "art")), pocket.path() / "identity" / "model.safetensors"
    for name in (only,) if only else ("style", "styled_identity"):
        train_encoder(renderer, work, name, steps, shipped if name == "styled_identity" else None, echo)


@app.command("report")
def report(
    base: Annotated[str, typer.Option(help="The pocket base, or a folder of the same kind.")] = "pocket",
    count: Annotated[int, typer.Option(min=1, help="Pictures per row of the table.")] = 300,
    work: Annotated[Path, typer.Option(help="Folder for the artwork.")] = Path("pretraining"),
    weights: Annotated[Path | None, typer.Option(help="Folder with judges/ and identity/ (default: shipped).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Measure every figure of the model card again."""
    import json

    from .art import icon_sets
    from .render import Renderer
    from .report import make_report, table

    figures = make_report(
        Renderer(icon_sets(work / "art")), base, count, weights, lambda text: typer.echo(text, err=True)
    )
    typer.echo(json.dumps(figures, indent=2) if as_json else table(figures))


if __name__ == "__main__":
    app()
