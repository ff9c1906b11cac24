"""`supar demo`: tune a tiny dense proxy, go sparse under SP and SμPar, and see whose learning rate still holds."""

from __future__ import annotations

import json
import os
import platform
import time
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from supar_cli.cli import console, studies
from supar_cli.cli.app import single
from supar_cli.data import corpus
from supar_cli.errors import SetupError, UnusableResult
from supar_cli.files import write_file
from supar_cli.planning import document
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.planning.sweep import Sweep

DENSITIES = (1.0, 1 / 4, 1 / 16)
STEPS = 120
FIRST_OCTAVE, LAST_OCTAVE, WIDEN = -2, 2, 8  # of the sweep; the last: a factor of a thousand from the transferred rate


def demo(
    data: console.DataOption = None,
    steps: Annotated[int, typer.Option(min=8, help="Training steps of every run.")] = STEPS,
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
    started = time.monotonic()
    spec = _spec(data, steps, trials, device)
    folder = Path(out)
    workers = studies.workers({"jobs": jobs, "verbose": verbose}, spec.run.device, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{folder}: can't be written: {error.strerror or error}") from None
    with workers, console.Progress("demo", quiet, verbose) as progress:
        progress.log(
            f"1. Tuning a dense proxy: width {spec.model.width}, {spec.model.layers} layers, {steps} steps on {spec.data.source}."
        )
        proxy = _tuned(spec, folder, workers, progress)
        write_file(folder / "proxy.yaml", document.write([proxy.model_dump()]))
        progress.log(
            "2. Transferring it to densities 1, 1/4, 1/16 under SP and SμPar; at each, the learning rate is swept\n"
            "   by factors of 2 around the transferred one."
        )
    study = _study(proxy, seeds)
    with workers, console.Progress("demo", quiet, verbose) as progress:
        curves = _sweep(study, folder, workers, progress)
    from supar_cli.experiments import study_views
    from supar_cli.reporting import figures

    rows = _regrets(curves)
    figures.save(study_views.loss_figure(study, curves), folder / "lr_transfer.png")
    result = {
        "kind": "supar.demo/v1",
        "proxy": proxy.hash(),
        "lr": proxy.hyperparameters.lr,
        "seeds": seeds,
        "steps": steps,
        "regrets": rows,
        "curves": [
            {
                "parameterization": c.name,
                "density": c.level.density,
                "losses": {_octave(place): study_views.finite(c.mean(place)) for place in c.places},
            }
            for c in curves
        ],
        "meta": {
            "seconds": round(time.monotonic() - started, 1),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {workers.jobs} jobs",
        },
    }
    write_file(folder / "results.json", json.dumps(result, indent=1) + "\n")
    talk = console.Talk(quiet, verbose)
    if not quiet:
        _show(rows)
        talk.log(_meaning(rows, folder, seeds))
    console.emit([result], None, None, force=True, as_json=as_json, talk=talk)


def _spec(data: str | None, steps: int, trials: int, device: str | None) -> Spec:
    """The quickstart's spec on a demo's budget: shorter runs, of fewer tokens."""
    read = console.read_one(str(console.template("quickstart")), "the installation lacks its templates")
    changes: dict[tuple[str, ...], Any] = {
        ("model", "context"): 64,
        ("train", "steps"): steps,
        ("train", "batch_size"): 16,
        ("train", "eval_every"): max(1, steps // 4),
        ("train", "eval_batches"): 8,
        ("search", "trials"): trials,
        ("search", "finalists"): 1,
        ("search", "seeds"): 1,
        ("search", "lr_fit_octaves"): [],
        ("data", "source"): data,
        ("run", "device"): device,
    }
    for path, value in changes.items():
        if value is not None:
            console.put(read, path, value)
    spec = parse(Spec, read)
    return spec.model_copy(update={"data": corpus.identified(spec.data)})


def _tuned(spec: Spec, folder: Path, workers: Any, progress: console.Progress) -> Proxy:
    from supar_cli.experiments import search

    return search.search(spec, str(folder / "proxy.journal"), workers=workers, reporter=progress)


def _study(proxy: Proxy, seeds: int) -> Sweep:
    keys = {"model", "hyperparameters", "parameterization", "sparsity", "data", "train", "run"}
    return Sweep(
        kind="supar.sweep/v1",
        name="demo",
        over={"lr": f"x:{FIRST_OCTAVE}..{LAST_OCTAVE}/1", "density": list(DENSITIES)},
        parameterizations=["sp", "supar"],
        seeds=seeds,
        widen=WIDEN,
        **proxy.model_dump(include=keys),
    )


def _octave(place: float) -> int:
    """Octaves from the proxy's rate, of a place in the sweep's grid."""
    return FIRST_OCTAVE + round(place)


def _sweep(study: Sweep, folder: Path, workers: Any, progress: console.Progress) -> list[Any]:
    from supar_cli.experiments import curves as measuring
    from supar_cli.reporting.result import fraction

    measured = measuring.Measurements(study, folder, workers, progress)
    curves = measured.curves()
    measured.bracket(curves)
    measured.share(curves)
    for curve in curves:
        label = f"{_LABELS[curve.name]} at density {fraction(curve.level.density)}"
        loss, rates = curve.mean(curve.best), len(curve.losses)
        progress.log(f"   {label}: best at η·2^{_octave(curve.best)}, loss {loss:.4f} ({rates} rates)")
    return curves


def _regrets(curves: list[Any]) -> list[dict[str, Any]]:
    """For each curve: where its optimum lies against the dense one's of its parameterization, and the regret there.

    None stands for a loss that is not finite. Raises UnusableResult when a curve's training diverged at every rate.
    """
    from supar_cli.experiments.curves import first_of
    from supar_cli.experiments.study_views import finite

    rows = []
    for curve in curves:
        dense, loss = first_of(curve, curves), curve.mean(curve.best)
        if not isfinite(loss):
            raise UnusableResult(
                f"{curve.name} at density {curve.level.density:g}: training diverged at every rate tried"
            )
        there = curve.mean(dense.best)
        rows.append(
            {
                "parameterization": curve.name,
                "density": curve.level.density,
                "optimum_octaves": round(curve.best - dense.best),
                "loss_at_optimum": loss,
                "loss_at_dense_rate": finite(there),
                "regret": finite(there - loss),
            }
        )
    return rows


_LABELS = {"sp": "SP", "supar": "SμPar"}


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from supar_cli.reporting.result import fraction

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("rules")
    for heading in ("density", "best rate ÷ dense", "loss at best", "loss at dense rate", "regret"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            _LABELS[row["parameterization"]],
            fraction(row["density"]),
            f"2^{row['optimum_octaves']}",
            f"{row['loss_at_optimum']:.3f}",
            *("diverged" if row[key] is None else f"{row[key]:.3f}" for key in ("loss_at_dense_rate", "regret")),
        )
    Console(stderr=True).print(table)


def _meaning(rows: list[dict[str, Any]], folder: Path, seeds: int) -> str:
    worst = {
        name: max(
            (row["regret"] for row in rows if row["parameterization"] == name),
            key=lambda r: float("inf") if r is None else r,
        )
        for name in _LABELS
    }
    words = {
        name: "diverges" if value is None else f"loses up to {value:.3f} nats a token" for name, value in worst.items()
    }
    return f"""\
best rate ÷ dense: a density's best learning rate over the dense model's best.
regret: nats a token lost by re-using the dense model's.
Shown: with the dense model's rate, sparse SP training {words["sp"]},
  sparse SμPar training {words["supar"]}. Nothing to re-tune is what SμPar is for.
Not shown: that SμPar beats an SP whose rate is re-tuned at every density. That can be as
  good; compare the losses at their own best. The models are tiny, trained for seconds,
  {seeds} seed{"s" if seeds > 1 else ""} a point.
Figure: {folder / "lr_transfer.png"}

Next, with a proxy that is tuned for longer:
  supar tune-proxy
  supar transfer --sparsity 0.992
  supar train"""


app = single(demo)
