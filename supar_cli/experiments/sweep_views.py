"""What the results of sweeps and comparisons show of measured curves: data, tables and figures."""

from __future__ import annotations

from math import inf, isfinite
from typing import Any

from supar_cli.experiments.curves import Curve, first_of
from supar_cli.experiments.optima import ParameterizationResult, summarize, verdicts
from supar_cli.experiments.statistics import RESAMPLES, Interval, standard_error
from supar_cli.planning.sweep import Level, Sweep
from supar_cli.reporting.result import NAMES, TITLES, Figure, Line, Panel, Table, finite, fraction, loss_figure

SUPAR = TITLES["supar"]
DENSE, RETUNED = "SP, tuned dense", "SP, re-tuned"  # SP's loss at its best value of the first size, and of each size

Data = dict[str, Any]


def transfer(sweep: Sweep, curves: list[Curve]) -> Data:
    """The parts of a sweep's result: does the optimum of each parameterization stay where it is?"""
    found = summarize(sweep, curves)
    arms = [_arm(one, sweep.tuned) for one in found]
    return {
        "verdicts": [verdict for one in found for verdict in verdicts(one)],
        "tables": [_optimum_table(sweep, one, arm["levels"]) for one, arm in zip(found, arms, strict=True)],
        "figures": [curves_figure(sweep, curves), _optimum_figure(sweep, found)],
        "arms": arms,
        "resamples": RESAMPLES if sweep.seeds > 1 else 0,
    }


def comparison(sweep: Sweep, curves: list[Curve]) -> Data:
    """The parts of a comparison's result: losses at the proxy's value of the hyperparameter, and SP's at its own."""
    rows = [_compare([curve for curve in curves if curve.level == level], curves) for level in sweep.levels]
    tables, figures = _comparison_tables(rows, sweep.levels[0].measure), [_comparison_figure(rows, sweep.levels)]
    return {"verdicts": [], "tables": tables, "figures": figures, "levels": rows}


def _arm(one: ParameterizationResult, tuned: str) -> Data:
    """A parameterization as result.json has it."""
    return {
        "parameterization": one.name,
        "control": one.is_control,
        "drift": one.drift,
        "drift_ci95": one.drift_interval and list(one.drift_interval),
        "shift_octaves": one.shift_octaves,
        "levels": [_level(one, i, tuned) for i in range(len(one.curves))],
    }


def _level(one: ParameterizationResult, i: int, tuned: str) -> Data:
    """A size: its optimum and interval, its losses in nats a token, the regret of the first size's value."""
    curve, optimum = one.curves[i], one.optima[i]
    loss, reused = curve.mean(curve.best), curve.mean(one.curves[0].best)
    return {
        "parameterization": one.name,
        "density": curve.level.density,
        "width": curve.level.width,
        "layers": curve.level.layers,
        "optimum": 2.0**optimum.octaves,
        "optimum_ci95": optimum.bounds and list(optimum.bounds),
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


def _table(title: str, rows: list[dict[str, str]]) -> Table:
    return Table(title=title, columns=list(rows[0]), rows=[list(row.values()) for row in rows])


def _optimum_table(sweep: Sweep, one: ParameterizationResult, levels: list[Data]) -> Table:
    """Optima and losses by size; at most 80 columns wide."""
    rows = []
    for curve, level in zip(one.curves, levels, strict=True):
        between = level["optimum_ci95"]
        notes = [f"{level['width']} wide" if sweep.iso != "none" else ""]
        notes += ["" if level["bracketed"] else "at the edge", "" if level["fitted"] else "no fit"]
        notes += [f"{level[key]} {key}" for key in ("diverged", "failed") if level[key]]
        row = {
            curve.level.measure: _size(curve.level),
            f"best {sweep.tuned}": f"{level['optimum']:.3g}",
            "95 % interval": "one seed" if between is None else "{:.3g} … {:.3g}".format(*between),
            "octaves": f"{level['shift_octaves']:+.2f}",
            "loss": _number(level["loss_at_best"], "{:.4f}"),
            "re-used": _number(level["loss_at_first"], "{:.4f}"),
            "regret": _number(level["regret"], "{:.2%}").replace("%", " %"),
            "": ", ".join(filter(None, notes)),
        }
        rows.append(row)
    return _table(TITLES[one.name] + (", control" if one.is_control else ""), rows)


def _size(level: Level) -> str:
    """1/16 for a density, 512 for a width."""
    return fraction(level.density) if level.measure == "density" else f"{level.value:g}"


def _number(value: float | None, form: str) -> str:
    return "diverged" if value is None else form.format(value)


def curves_figure(sweep: Sweep, curves: list[Curve]) -> Figure:
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
    return loss_figure(title, f"{word} of the proxy", panels)


def _optimum_figure(sweep: Sweep, found: list[ParameterizationResult]) -> Figure:
    """The optimum over density (or width, or depth), with its interval over seeds: level where it transfers."""
    lines = []
    for one in found:
        scales = [curve.level.scale for curve in one.curves]
        points = [(2.0**optimum.octaves, optimum.bounds) for optimum in one.optima]
        lines.append(_banded(TITLES[one.name], dict(zip(scales, points, strict=True))))
    measure, best = sweep.levels[0].measure, f"best {NAMES.get(sweep.tuned, sweep.tuned)}"
    title = f"{best.capitalize()} over {measure}; bands are 95 % intervals over seeds"
    panel = Panel(title=best, vertical=None, lines=lines)
    logs: Data = {"x_log2": True, "y_log2": True, "y_limits": None}
    return Figure(name="optimum", title=title, x=measure, y=best, **logs, panels=[panel])


def _banded(label: str, points: dict[float, tuple[float | None, Interval | None]]) -> Line:
    """A line through points (y, bounds of y) by their x, with a band where all points have bounds."""
    line = Line.through(label, {x: y for x, (y, _) in points.items()})
    bounds = [found for _, (_, found) in sorted(points.items()) if found is not None]
    if len(bounds) == len(points):
        line.low, line.high = [low for low, _ in bounds], [high for _, high in bounds]
    return line


def _compare(at_size: list[Curve], curves: list[Curve]) -> Data:
    """A size: a cell of each parameterization at the proxy's value and of SP at its own, and SμPar's gains.

    A gain is SμPar's loss below another's, as a share of the other's: positive where SμPar is better.
    """
    level, cells = at_size[0].level, {TITLES[curve.name]: _cell(curve, 0.0) for curve in at_size}
    for sp in (curve for curve in at_size if curve.name == "sp"):
        octaves = sp.grid.octaves(sp.best) - sp.grid.octaves(0.0)
        cells[DENSE] = _cell(sp, first_of(sp, curves).best)
        cells[RETUNED] = {**_cell(sp, sp.best), "octaves": octaves, "bracketed": sp.bracketed}
    supar = cells[SUPAR]["loss"] if SUPAR in cells else None
    losses = {name: cell["loss"] for name, cell in cells.items()}
    gains = {name: None if None in (loss, supar) else (loss - supar) / loss for name, loss in losses.items()}
    return {"level": _size(level), "density": level.density, "width": level.width, "cells": cells, "gains": gains}


def _cell(curve: Curve, index: float) -> Data:
    """The loss at an index: mean, standard error, each seed's; a diverged or failed run leaves no mean."""
    losses = list(curve.losses[index].values())
    return {
        "loss": finite(curve.mean(index)),
        "standard_error": standard_error(losses),
        "by_seed": _by_seed(curve, index),
        "diverged": losses.count(inf),
        "value": curve.grid.value(index),
    }


def _comparison_tables(rows: list[Data], measure: str) -> list[Table]:
    """Losses with standard errors, and SμPar's gain over each of the others; 80 columns wide at most."""
    short = {name: name.replace(" (standard parameterization)", "") for name in rows[0]["cells"]}
    losses, gains = [], []
    for row in rows:
        shares = {name: "–" if gain is None else f"{100 * gain:+.2f} %" for name, gain in row["gains"].items()}
        own = {short[name]: share for name, share in shares.items() if name != SUPAR}
        losses.append({measure: row["level"], **{short[name]: _loss(cell) for name, cell in row["cells"].items()}})
        gains.append({measure: row["level"], **own, "re-tuned ÷ proxy's": _ratio(row["cells"].get(RETUNED))})
    title = "validation loss (nats per token): mean ± standard error over seeds"
    return [_table(title, losses), _table("how much lower SμPar's loss is than that of", gains)]


def _loss(cell: Data) -> str:
    if cell["loss"] is None:
        return f"{cell['diverged']} diverged" if cell["diverged"] else "failed"
    error = "" if cell["standard_error"] is None else "±" + f"{cell['standard_error']:.4f}".removeprefix("0")
    return f"{cell['loss']:.4f}{error}"


def _ratio(retuned: Data | None) -> str:
    """SP's best value at a size over the proxy's."""
    return "–" if retuned is None else f"2^{retuned['octaves']:g}" + ("" if retuned["bracketed"] else ", at the end")


def _comparison_figure(rows: list[Data], levels: list[Level]) -> Figure:
    """Loss over density or width, a line for each way of choosing hyperparameters, with standard errors."""
    lines = []
    for name in rows[0]["cells"]:
        points: dict[float, tuple[float | None, Interval | None]] = {}
        for level, row in zip(levels, rows, strict=True):
            loss, error = row["cells"][name]["loss"], row["cells"][name]["standard_error"]
            points[level.scale] = loss, None if error is None else (loss - error, loss + error)
        lines.append(_banded(name, points))
    title = "Loss at transferred hyperparameters, and SP's with its rate re-tuned at every size"
    panel = Panel(title="the same hyperparameters at every size", vertical=None, lines=lines)
    return loss_figure(title, levels[0].measure, [panel], name="compare")
