"""`supar demo`: tune a tiny dense proxy, go sparse under SP and SμPar, and see whose learning rate still holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from supar_cli.cli import console, studies
from supar_cli.cli.app import single
from supar_cli.reporting.result import fraction


def demo(
    data: console.DataOption = None,
    steps: Annotated[int, typer.Option(min=8, help="Training steps of every run.")] = 120,
    trials: Annotated[int, typer.Option(min=1, help="Trials of the proxy's search.")] = 6,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds averaged at every point of the sweep.")] = 1,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes. [default: one a CPU core, at most 8]", show_default=False)
    ] = None,
    device: console.DeviceOption = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder for proxy.yaml, results.json and lr_transfer.png.")
    ] = "demo",
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    verbose: console.Verbose = False,
) -> None:
    """See what SμPar keeps and SP loses as weights go sparse: a few minutes on two CPU cores, no download."""
    from supar_cli.experiments import sweep as experiment

    how: dict[str, Any] = {"steps": steps, "trials": trials, "seeds": seeds, "jobs": jobs, "device": device}
    with console.Progress("demo", quiet, verbose) as progress:
        result = experiment.demo(data, **how, out=out, verbose=verbose, reporter=progress)
    talk = console.Talk(quiet, verbose)
    if not quiet:
        studies.show([_table(result["regrets"])])
        talk.log(_explanation(result, Path(out)))
    console.emit([result], None, None, force=True, as_json=as_json, talk=talk)


RULES = {"sp": "SP", "supar": "SμPar"}


def _table(regrets: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        [
            RULES[row["parameterization"]],
            fraction(row["density"]),
            f"2^{row['optimum_octaves']}",
            f"{row['loss_at_optimum']:.3f}",
            *("diverged" if row[key] is None else f"{row[key]:.3f}" for key in ("loss_at_dense_rate", "regret")),
        ]
        for row in regrets
    ]
    columns = ["rules", "density", "best rate ÷ dense", "loss at best", "loss at dense rate", "regret"]
    return {"title": "regret of re-using the dense model's rate", "columns": columns, "rows": rows}


def _explanation(result: dict[str, Any], folder: Path) -> str:
    worst = {}
    for name in RULES:
        regrets = [row["regret"] for row in result["regrets"] if row["parameterization"] == name]
        worst[name] = "diverges" if None in regrets else f"loses up to {max(regrets):.3f} nats a token"
    seeds = result["seeds"]
    return f"""\
best rate ÷ dense: a density's best learning rate over the dense model's best.
regret: nats a token lost by re-using the dense model's.
Shown: with the dense model's rate, sparse SP training {worst["sp"]},
  sparse SμPar training {worst["supar"]}. Nothing to re-tune is what SμPar is for.
Not shown: that SμPar beats an SP whose rate is re-tuned at every density. That can be as
  good; compare the losses at their own best. The models are tiny, trained for seconds,
  {seeds} seed{"s" if seeds > 1 else ""} a point.
Figure: {folder / "lr_transfer.png"}

Next, with a proxy that is tuned for longer:
  supar tune-proxy
  supar transfer --sparsity 0.992
  supar train"""


app = single(demo)
