"""`supar sweep`: does a hyperparameter's optimum stay where it is over density or width? Measured, with a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from supar_cli.cli import console, studies
from supar_cli.cli.app import single
from supar_cli.errors import CheckViolated, InputError

PRESETS = ("fig1", "fig6", "fig7", "fig9", "fig10", "fig11", "fig13", "fig14")
DEFAULT_OVER = {"lr": "x:-2..2/1", "density": [1.0, 0.25, 0.0625]}
DEFAULTS = {"over": DEFAULT_OVER, "parameterizations": ["sp", "mup", "supar"]}


def sweep(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPEC|PROXY|SWEEP|-]",
            help="A document; - for stdin. [default: proxy.yaml, supar.yaml, else the quickstart template]",
            show_default=False,
        ),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="An axis; repeatable. lr, init_std, alpha_input, alpha_output or weight_decay, one of them: "
            "log2:-12..-4/0.5 is 2^-12 to 2^-4 in half octaves, x:-3..3/1 the proxy's value times 2^-3 to 2^3, or a list. "
            "And sparsity, density, width or layers: a list as 0,0.5,0.75.",
        ),
    ] = None,
    parameterization: Annotated[
        str | None,
        typer.Option(metavar="NAME[,…]", help="Some of sp, mup, supar, supar-init-only, supar-lr-only."),
    ] = None,
    iso: Annotated[
        str | None, typer.Option(metavar="WHAT", help="parameters or wpn: sparser is wider, to keep as many of these.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A figure of the paper, small: " + ", ".join(PRESETS) + ".")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The preset at the paper's size.")] = False,
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
        str | None, typer.Option("--out", "-o", help="Folder. [default: sweeps/NAME]", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Start a folder's measurements anew.")] = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    verbose: console.Verbose = False,
) -> None:
    """Sweep a hyperparameter at several densities or widths and judge whether its optimum transfers.

    An optimum at the end of the axis extends it, by its own step. The same command again repeats no finished run. Ends
    with 5 when SμPar misses a pass mark: |γ| < 0.15, largest shift < 0.5 octave, regret < 0.5 %.
    """
    flags = locals()
    if preset is not None and (source is not None or preset not in PRESETS):
        what = "given beside a document" if source is not None else f"expected {', '.join(PRESETS)}"
        raise InputError(f"--preset {preset}: {what}")
    talk = console.Talk(quiet, verbose)
    read = studies.read(source, full, DEFAULTS, preset)
    studies.put_axes(read, over or [])
    console.apply_settings(read, settings)
    studies.put_flags(read, flags)
    study = studies.study(read, talk)
    folder = Path(out or f"sweeps/{study.name}")
    studies.describe(study, talk)

    from supar_cli.experiments import sweep as experiment

    with studies.progress_of("sweep", folder, quiet, verbose) as progress:
        result = experiment.sweep(study, folder, **studies.how(flags), reporter=progress)
    if not quiet:
        studies.show(result["tables"])
        _explain(result, talk)
        studies.show_verdicts(result["verdicts"])
    console.emit([result], None, None, force=True, as_json=as_json, talk=talk)
    missed = [one for one in result["verdicts"] if one["passed"] is False and not one["control"]]
    if missed:
        raise CheckViolated("\n".join(f"{one['what']}: {one['text']}" for one in missed))


def _explain(result: dict[str, Any], talk: console.Talk) -> None:
    talk.log(
        "octaves: the best value against the first row's\n"
        "re-used: loss at the first row's best of the values measured\n"
        "γ: slope of log2(best value) on log2(size); best values are a parabola's through\n"
        "  the losses within 2 steps and 1.5 octaves of the best one measured"
    )
    for arm in result["arms"]:
        counts = {word: sum(level[word] for level in arm["levels"]) for word in ("diverged", "failed")}
        if any(counts.values()):
            runs = sum(len(point["by_seed"]) for level in arm["levels"] for point in level["losses"])
            said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
            talk.log(f"{arm['parameterization']}: of {runs} runs {said}; a diverged one counts as worse than any loss")
    if result["sweep"]["seeds"] == 1:
        talk.log("one seed: no interval; what it shows may be chance")
    else:
        talk.log(f"95 % intervals: {result['resamples']} resamples of the {result['sweep']['seeds']} seeds")
    outer = sum(not level["bracketed"] for arm in result["arms"] for level in arm["levels"])
    if outer:
        widen = result["sweep"]["widen"]
        talk.warn(
            f"{outer} optima lie at the end of their axis, extended by at most {widen} steps; -s widen=N allows more"
        )


app = single(sweep)
