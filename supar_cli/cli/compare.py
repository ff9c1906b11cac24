"""`supar compare`: SP, μP and SμPar with the same hyperparameters as weights go sparse, and SP re-tuned at every size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from supar_cli.cli import console, studies
from supar_cli.cli.app import single
from supar_cli.errors import InputError
from supar_cli.planning.sweep import require_comparison

# one value, the transferred one; SP's search goes on from it by octaves
DEFAULTS = {
    "over": {"lr": "x:0..0/1", "sparsity": [0.0, 0.75, 0.9375]},
    "parameterizations": ["sp", "mup", "supar"],
    "widen": 8,
}


def compare(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROXY|SPEC|-]",
            help="A document; - for stdin. [default: proxy.yaml, supar.yaml, else the quickstart template]",
            show_default=False,
        ),
    ] = None,
    sparsity: Annotated[str | None, typer.Option(help="Levels. [default: 0,0.75,0.9375]", show_default=False)] = None,
    density: Annotated[str | None, typer.Option(help="Levels, instead of --sparsity.")] = None,
    parameterization: Annotated[
        str | None,
        typer.Option(metavar="NAME[,…]", help="Some of sp, mup, supar, supar-init-only, supar-lr-only."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds a point, the same for all.")] = None,
    jobs: console.JobsOption = None,
    executor: console.ExecutorOption = "local",
    executor_set: console.ExecutorSet = None,
    width: Annotated[int | None, typer.Option(help="Width of the runs. [default: the proxy's]")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of a run.")] = None,
    data: console.DataOption = None,
    seed: Annotated[int | None, typer.Option(help="The first seed.")] = None,
    device: console.DeviceOption = None,
    settings: console.Set = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder. [default: compare/NAME]", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Start a folder's measurements anew.")] = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    verbose: console.Verbose = False,
) -> None:
    """Compare SP, μP and SμPar over sparsities at a fixed budget, nothing re-tuned.

    Beside it SP with a learning rate of its own, tuned when dense or at every size."""
    flags = locals()
    if sparsity is not None and density is not None:
        raise InputError("--density: given beside --sparsity; expected only one of them")
    talk = console.Talk(quiet, verbose)
    read = studies.read(source, False, DEFAULTS)
    levels = {"sparsity": sparsity, "density": density}
    studies.put_axes(read, [f"{name}={values}" for name, values in levels.items() if values is not None])
    console.apply_settings(read, settings)
    studies.put_flags(read, flags)
    study = studies.study(read, talk)
    with console.located(read):
        require_comparison(study)
    folder = Path(out or f"compare/{study.name}")
    from supar_cli.experiments import sweep as experiment

    studies.describe(study, talk)
    with studies.progress_of("compare", folder, quiet, verbose) as progress:
        result = experiment.compare(study, folder, **studies.how(flags), reporter=progress)
    if not quiet:
        studies.show(result["tables"])
        _explain(result["levels"], talk)
    console.emit([result], None, None, force=True, as_json=as_json, talk=talk)


def _explain(rows: list[dict[str, Any]], talk: console.Talk) -> None:
    talk.log(
        "tuned dense: SP at the learning rate that is its best in the first row, re-used\n"
        "re-tuned: SP at its best for that row, found by octaves and judged by the same\n"
        "  runs, which flatters it a little. SμPar is for not having to do that.\n"
        "the others: at the proxy's learning rate"
    )
    if rows[0]["cells"] and all(cell["standard_error"] is None for row in rows for cell in row["cells"].values()):
        talk.log("one seed: no standard errors; what it shows may be chance")


app = single(compare)
