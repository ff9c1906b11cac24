"""What the results of sweeps and comparisons show of measured curves: data, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, isfinite
from typing import Any

from supar_cli.experiments.curves import Curve, first_of
from supar_cli.experiments.optima import ParameterizationResult, summarize, verdicts
from supar_cli.experiments.statistics import RESAMPLES, Interval, interval, standard_error
from supar_cli.planning.sweep import Level, Sweep
from supar_cli.reporting.result import NAMES, TITLES, Figure, Line, Panel, Table, finite, fraction, loss_limits

DENSE, RETUNED = "SP, tuned dense", "SP, re-tuned"  # SP's loss at its best value of the first size, and of each size


def transfer(sweep: Sweep, curves: list[Curve]) -> dict[str, Any]:
    """The parts of a sweep's result: does the optimum of each parameterization stay where it is?"""
    found = summarize(sweep, curves)
    arms = [_arm(one, sweep.tuned) for one in found]
    return {
        "verdicts": [verdict for one in found for verdict in verdicts(one)],
        "tables": [_optimum_table(sweep, one, arm["levels"]) for one, arm in zip(found, arms, strict=True)],
        "figures": [loss_figure(sweep, curves), _optimum_figure(sweep, found)],
        "arms": arms,
        "resamples": RESAMPLES if sweep.seeds > 1 else 0,
    }


def comparison(sweep: Sweep, curves: list[Curve]) -> dict[str, Any]:
    """The parts of a comparison's result: losses at the proxy's value of the hyperparameter, and SP's at its own."""
    rows = [_compare([curve for curve in curves if curve.level == level], curves) for level in sweep.levels]
    return {
        "verdicts": [],
        "tables": _comparison_tables(rows, sweep.levels[0].measure),
        "figures": [_comparison_figure(rows, sweep.levels)],
        "levels": rows,
    }


def _arm(one: ParameterizationResult, tuned: str) -> dict[str, Any]:
    """A parameterization as result.json has it."""
    return {
        "parameterization": one.name,
        "control": one.is_control,
        "drift": one.drift,
        "drift_ci95": None if one.drift_interval is None else list(one.drift_interval),
        "shift_octaves": one.shift_octaves,
        "levels": [_level(one, i, tuned) for i in range(len(one.curves))],
    }


def _level(one: ParameterizationResult, i: int, tuned: str) -> dict[str, Any]:
    """A size: its optimum and interval, its losses in nats a token, the regret of the first size's value."""
    curve, optimum = one.curves[i], one.optima[i]
    loss, reused, between = curve.mean(curve.best), curve.mean(one.curves[0].best), interval(optimum.resampled)
    return {
        "parameterization": one.name,
        "density": curve.level.density,
        "width": curve.level.width,
        "layers": curve.level.layers,
        "optimum": 2.0**optimum.octaves,
        "optimum_ci95": None if between is None else [2.0**octaves for octaves in between],
        "fitted": not optimum.why,
        "why": optimum.why,
        "shift_octaves": optimum.octaves - one.optima[0].octaves,
        "best_measured": curve.grid.value(curve.best),
        "bracketed": curve.bracketed,
        "loss_at_best": finite(loss),
        "loss_at_first": finite(reused),
        "regret_nats": finite(reused - loss),
        "regret": finite(one.regrets[i]),
        "diverged": curve.diverged,
        "failed": curve.failed,
        "losses": [
            {tuned: curve.grid.value(index), "mean": finite(curve.mean(index)), "by_seed": _by_seed(curve, index)}
            for index in curve.indices
        ],
    }


def _by_seed(curve: Curve, index: float) -> dict[str, float | None]:
    return {str(seed): finite(loss) for seed, loss in curve.losses[index].items()}


def _optimum_table(sweep: Sweep, one: ParameterizationResult, levels: list[dict[str, Any]]) -> Table:
    """At most 80 columns wide."""
    measure = sweep.levels[0].measure
    columns = [measure, f"best {sweep.tuned}", "95 % interval", "octaves", "loss", "re-used", "regret", ""]
    rows = []
    for curve, row in zip(one.curves, levels, strict=True):
        notes = [f"{row['width']} wide" if sweep.iso != "none" else ""]
        notes += ["" if row["bracketed"] else "at the edge", "" if row["fitted"] else "no fit"]
        notes += [f"{row[key]} {key}" for key in ("diverged", "failed") if row[key]]
        between = row["optimum_ci95"]
        rows.append(
            [
                _size(curve.level),
                f"{row['optimum']:.3g}",
                "one seed" if between is None else "{:.3g} … {:.3g}".format(*between),
                f"{row['shift_octaves']:+.2f}",
                *("diverged" if row[key] is None else f"{row[key]:.4f}" for key in ("loss_at_best", "loss_at_first")),
                "diverged" if row["regret"] is None else f"{100 * row['regret']:.2f} %",
                ", ".join(filter(None, notes)),
            ]
        )
    return Table(title=TITLES[one.name] + (", control" if one.is_control else ""), columns=columns, rows=rows)


def _size(level: Level) -> str:
    """1/16 for a density, 512 for a width."""
    return fraction(level.density) if level.measure == "density" else f"{level.value:g}"


def loss_figure(sweep: Sweep, curves: list[Curve]) -> Figure:
    """Loss over the tuned hyperparameter: a panel for each parameterization, a line for each size, its best ringed."""
    panels = []
    for name in sweep.parameterizations:
        own, lines = [curve for curve in curves if curve.name == name], []
        for curve in own:
            losses = {curve.grid.value(index): finite(curve.mean(index)) for index in curve.indices}
            best = curve.grid.value(curve.best) if isfinite(curve.mean(curve.best)) else None
            lines.append(Line.through(f"{curve.level.measure} {_size(curve.level)}", losses, ring=best))
        panels.append(Panel(title=TITLES[name], vertical=own[0].grid.value(own[0].best), lines=lines))
    word = NAMES.get(sweep.tuned, sweep.tuned)
    title = f"Loss over {word}; rings are optima, the grey band is the first size's"
    return _figure_of_losses("loss", title, f"{word} of the proxy", panels)


def _figure_of_losses(name: str, title: str, x: str, panels: list[Panel]) -> Figure:
    losses = [y for panel in panels for line in panel.lines for y in line.y if y is not None]
    return Figure(
        name=name,
        title=title,
        x=x,
        y="validation loss (nats per token)",
        x_log2=True,
        y_log2=False,
        y_limits=loss_limits(losses),
        panels=panels,
    )


def _optimum_figure(sweep: Sweep, found: list[ParameterizationResult]) -> Figure:
    """The optimum over density (or width, or depth), with its interval over seeds: level where it transfers."""
    lines = []
    for one in found:
        points = []
        for curve, optimum in zip(one.curves, one.optima, strict=True):
            between = interval(optimum.resampled)
            bounds = None if between is None else (2.0 ** between[0], 2.0 ** between[1])
            points.append((curve.level.scale, 2.0**optimum.octaves, bounds))
        lines.append(_banded(TITLES[one.name], points))
    measure, word = sweep.levels[0].measure, NAMES.get(sweep.tuned, sweep.tuned)
    return Figure(
        name="optimum",
        title=f"Best {word} over {measure}; bands are 95 % intervals over seeds",
        x=measure,
        y=f"best {word}",
        x_log2=True,
        y_log2=True,
        y_limits=None,
        panels=[Panel(title=f"best {word}", vertical=None, lines=lines)],
    )


def _banded(label: str, points: Iterable[tuple[float, float | None, Interval | None]]) -> Line:
    """A line through points (x, y, bounds of y), with a band where all points have bounds."""
    ordered = sorted(points, key=lambda point: point[0])
    line = Line.through(label, {x: y for x, y, _ in ordered})
    bounds = [one for _, _, one in ordered if one is not None]
    if len(bounds) == len(ordered):
        line.low, line.high = [low for low, _ in bounds], [high for _, high in bounds]
    return line


def _compare(at_size: list[Curve], curves: list[Curve]) -> dict[str, Any]:
    """A size: a cell of each parameterization at the proxy's value and of SP at its own, and SμPar's gains in shares."""
    level, cells = at_size[0].level, {TITLES[curve.name]: _cell(curve, 0.0) for curve in at_size}
    for sp in (curve for curve in at_size if curve.name == "sp"):
        octaves = sp.grid.octaves(sp.best) - sp.grid.octaves(0.0)
        cells[DENSE] = _cell(sp, first_of(sp, curves).best)
        cells[RETUNED] = {**_cell(sp, sp.best), "octaves": octaves, "bracketed": sp.bracketed}
    row: dict[str, Any] = {"level": _size(level), "density": level.density, "width": level.width, "cells": cells}
    row["gains"] = {
        name: _gain(cell["loss"], cells.get(TITLES["supar"], {}).get("loss")) for name, cell in cells.items()
    }
    return row


def _cell(curve: Curve, index: float) -> dict[str, Any]:
    """The loss at an index: mean, standard error, each seed's; a diverged or failed run leaves no mean."""
    losses = list(curve.losses[index].values())
    return {
        "loss": finite(curve.mean(index)),
        "standard_error": standard_error(losses),
        "by_seed": _by_seed(curve, index),
        "diverged": losses.count(inf),
        "value": curve.grid.value(index),
    }


def _gain(other: float | None, supar: float | None) -> float | None:
    """SμPar's loss below another's, as a share of the other's: positive where SμPar is better."""
    return None if supar is None or other is None else (other - supar) / other


def _comparison_tables(rows: list[dict[str, Any]], measure: str) -> list[Table]:
    """Losses with standard errors, and SμPar's gain over each of the others; 80 columns wide at most."""
    names = list(rows[0]["cells"])
    others = [name for name in names if name != TITLES["supar"]]
    short = {name: name.replace(" (standard parameterization)", "") for name in names}
    losses = [[row["level"], *(_loss(row["cells"][name]) for name in names)] for row in rows]
    gains = [[row["level"], *(_percent(row["gains"][name]) for name in others), _rate(row["cells"])] for row in rows]
    return [
        Table(
            title="validation loss (nats per token): mean ± standard error over seeds",
            columns=[measure, *short.values()],
            rows=losses,
        ),
        Table(
            title="how much lower SμPar's loss is than that of",
            columns=[measure, *(short[name] for name in others), "re-tuned ÷ proxy's"],
            rows=gains,
        ),
    ]


def _loss(cell: dict[str, Any]) -> str:
    if cell["loss"] is None:
        return f"{cell['diverged']} diverged" if cell["diverged"] else "failed"
    spread = cell["standard_error"]
    return f"{cell['loss']:.4f}" + ("" if spread is None else "±" + f"{spread:.4f}".removeprefix("0"))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.2f} %"


def _rate(cells: dict[str, dict[str, Any]]) -> str:
    """SP's best value at a size over the proxy's."""
    if RETUNED not in cells:
        return "–"
    return f"2^{cells[RETUNED]['octaves']:g}" + ("" if cells[RETUNED]["bracketed"] else ", at the end")


def _comparison_figure(rows: list[dict[str, Any]], levels: list[Level]) -> Figure:
    """Loss over density or width, a line for each way of choosing hyperparameters, with standard errors."""
    lines = []
    for name in rows[0]["cells"]:
        points = []
        for level, row in zip(levels, rows, strict=True):
            loss, error = row["cells"][name]["loss"], row["cells"][name]["standard_error"]
            points.append((level.scale, loss, None if error is None else (loss - error, loss + error)))
        lines.append(_banded(name, points))
    title = "Loss at transferred hyperparameters, and SP's with its rate re-tuned at every size"
    panel = Panel(title="the same hyperparameters at every size", vertical=None, lines=lines)
    return _figure_of_losses("compare", title, levels[0].measure, [panel])
