"""What the results of sweeps and comparisons show of measured curves: data, verdicts, tables and figures."""

from __future__ import annotations

from math import inf, isfinite, isinf, isnan, log2
from typing import Any

import numpy as np

from supar_cli.experiments.curves import Curve, Optimum, find_optimum, first_of
from supar_cli.experiments.statistics import Interval, interval, resample, slope, standard_error
from supar_cli.planning.rules import SP
from supar_cli.planning.sweep import Level, Sweep
from supar_cli.reporting.result import NAMES, TITLES, Figure, Line, Panel, Table, Verdict, finite, fraction, loss_figure

MAX_DRIFT, MAX_SHIFT_OCTAVES, MAX_REGRET = 0.15, 0.5, 0.005  # the thresholds, as in SPEC and README

CONTROL = {True: " (a control: passes, but should miss)", False: " (a control: misses, as expected)"}

SHORT = {**TITLES, "sp": "SP", "supar-lr-only": "SμPar's rate only"}
SUPAR = TITLES["supar"]
DENSE, RETUNED = "SP, tuned dense", "SP, re-tuned"  # SP's loss at its best value of the first size, and of each size

Data = dict[str, Any]


def transfer(sweep: Sweep, curves: list[Curve]) -> Data:
    """The parts of a sweep's result: does each parameterization's optimum stay constant?"""
    draws = resample(sweep.seeds)  # common to all, as their seeds are
    by_name = [[curve for curve in curves if curve.name == name] for name in sweep.parameterizations]
    arms = [_arm(sweep, own, draws) for own in by_name]
    return {
        "title": sweep.title or sweep.name,
        "verdicts": [verdict for arm, own in zip(arms, by_name, strict=True) for verdict in _verdicts(arm, own)],
        "tables": [_optimum_table(sweep, arm) for arm in arms],
        "figures": [curves_figure(sweep, curves), _optimum_figure(sweep, arms)],
        "arms": arms,
        "resamples": len(draws),
    }


def comparison(sweep: Sweep, curves: list[Curve]) -> Data:
    """The parts of a comparison's result: losses at the proxy's value of the hyperparameter, and SP's at its own."""
    rows = [_compare([curve for curve in curves if curve.level == level], curves) for level in sweep.levels]
    tables, figures = _comparison_tables(rows, sweep.levels[0].measure), [_comparison_figure(rows, sweep.levels)]
    title = f"{sweep.title or sweep.name}: SP, μP and SμPar at transferred hyperparameters"
    return {
        "title": title,
        "verdicts": regret_verdicts(sweep, curves),
        "tables": tables,
        "figures": figures,
        "levels": rows,
    }


def _arm(sweep: Sweep, curves: list[Curve], draws: np.ndarray) -> Data:
    """A parameterization as result.json has it, its sizes in order; drift is the slope of log2(optimum) on log2(size)."""
    optima = [find_optimum(curve, draws) for curve in curves]
    octaves, resampled = [optimum.octaves for optimum in optima], [optimum.resampled for optimum in optima]
    drift = drift_interval = None
    if len(curves) > 1:
        sizes = np.array([log2(curve.level.scale) for curve in curves])
        drift = float(slope(sizes, np.array(octaves)[:, None])[0])
        drift_interval = interval(slope(sizes, np.array(resampled))) if all(map(len, resampled)) else None
    return {
        "parameterization": curves[0].name,
        "control": not is_subject(sweep, curves[0].name),
        "drift": drift,
        "drift_ci95": drift_interval,
        "shift_octaves": max(octaves) - min(octaves),
        "levels": [
            _level(sweep.tuned, curve, optimum, curves[0].best, octaves[0])
            for curve, optimum in zip(curves, optima, strict=True)
        ],
    }


def is_subject(sweep: Sweep, name: str) -> bool:
    """Whether a parameterization's optimum should stay constant over the study's sizes; if not, it is a control."""
    if sweep.level_axis == "layers" and sweep.parameterization.depth_rule == "none":
        return False
    if any(level.density != sweep.levels[0].density for level in sweep.levels):
        return name == "supar"
    return name not in SP


def _verdicts(arm: Data, curves: list[Curve]) -> list[Verdict]:
    """Three verdicts on a parameterization at several sizes; `passed` is None where an optimum isn't bracketed."""
    drift, shift, is_control = arm["drift"], arm["shift_octaves"], arm["control"]
    if drift is None:
        return []
    worst, lost = _worst_regret(curves)
    between = "" if arm["drift_ci95"] is None else " [{:+.3f}, {:+.3f}]".format(*arm["drift_ci95"])
    marks = {
        "drift": (abs(drift) < MAX_DRIFT, f"γ = {drift:+.3f}{between}; |γ| < {MAX_DRIFT:g}"),
        "shift": (shift < MAX_SHIFT_OCTAVES, f"largest {shift:.2f} octaves; < {MAX_SHIFT_OCTAVES:g}"),
        "regret": (worst < MAX_REGRET, lost),
    }
    outer = [f"{curve.level.axis} {curve.level.value:g}" for curve in curves if not curve.bracketed]
    found = []
    for what, (is_met, text) in marks.items():
        passed: bool | None = is_met
        if outer or (what == "regret" and isnan(worst)):
            passed = None
            text += f" (unknown: no inner optimum at {', '.join(outer)})" if outer else " (unknown: a run failed)"
        elif is_control:
            text += CONTROL[is_met]
        found.append(Verdict(what=f"{SHORT[curves[0].name]}: {what}", passed=passed, control=is_control, text=text))
    return found


def _worst_regret(curves: list[Curve]) -> tuple[float, str]:
    """The largest regret of the first size's best value, inf where it diverges, nan where it is unknown; with its threshold."""
    regrets = [curve.regret(curves[0].best) for curve in curves]
    worst = max(regrets, key=lambda value: inf if isnan(value) else value)
    lost = "diverged" if worst == inf else "unknown" if isnan(worst) else f"{100 * worst:.2f} %"
    return worst, f"largest {lost}; < {100 * MAX_REGRET:g} %"


def regret_verdicts(sweep: Sweep, curves: list[Curve]) -> list[Verdict]:
    """Verdicts on re-using a value that was tuned at the first size: SμPar should lose nothing by it, SP, the control, should.

    Of those that were run at several sizes, SμPar also at several values; none unless SμPar should lose nothing. A
    regret at an optimum that isn't bracketed is a lower bound.
    """
    found = []
    for name, is_control in (("supar", False), ("sp", True)):
        own = [curve for curve in curves if curve.name == name]
        if len(own) < 2 or not is_subject(sweep, "supar") or (not is_control and len(own[0].losses) < 2):
            continue
        worst, text = _worst_regret(own)
        is_unknown = isnan(worst) or (worst < MAX_REGRET and not all(curve.bracketed for curve in own))
        passed = None if is_unknown else worst < MAX_REGRET
        if passed is None:
            text += " (unknown: a run failed, or no inner optimum)"
        elif is_control:
            text += CONTROL[passed]
        found.append(Verdict(what=f"{SHORT[own[0].name]}: regret", passed=passed, control=is_control, text=text))
    return found


def _level(tuned: str, curve: Curve, optimum: Optimum, first_best: float, first_octaves: float) -> Data:
    """A size: its optimum and interval, its losses in nats per token, the regret of the first size's best value."""
    loss, reused = curve.mean(curve.best), curve.mean(first_best)
    return {
        "parameterization": curve.name,
        "density": curve.level.density,
        "width": curve.level.width,
        "layers": curve.level.layers,
        "optimum": 2.0**optimum.octaves,
        "optimum_ci95": optimum.bounds,
        "fitted": not optimum.why,
        "why": optimum.why,
        "shift_octaves": optimum.octaves - first_octaves,
        "best_measured": curve.grid.value(curve.best),
        "bracketed": curve.bracketed,
        "loss_at_best": finite(loss),
        "loss_at_first": finite(reused),
        "regret_nats": finite(reused - loss),
        "regret": finite(curve.regret(first_best)),
        "diverged": curve.count_runs(isinf),
        "failed": curve.count_runs(isnan),
        "losses": [
            {tuned: curve.grid.value(index), "mean": finite(curve.mean(index)), "by_seed": _by_seed(curve, index)}
            for index in curve.indices
        ],
    }


def _by_seed(curve: Curve, index: float) -> dict[str, float | None]:
    return {str(seed): finite(loss) for seed, loss in curve.losses[index].items()}


def _table(title: str, rows: list[dict[str, str]]) -> Table:
    return Table(title=title, columns=list(rows[0]), rows=[list(row.values()) for row in rows])


def _optimum_table(sweep: Sweep, arm: Data) -> Table:
    """Optima and losses by size; at most 80 columns wide."""
    rows = []
    for size, level in zip(sweep.levels, arm["levels"], strict=True):
        between = level["optimum_ci95"]
        notes = [f"{level['width']} wide" if sweep.iso != "none" else ""]
        notes += ["" if level["bracketed"] else "at the edge", "" if level["fitted"] else "no fit"]
        notes += [f"{level[key]} {key}" for key in ("diverged", "failed") if level[key]]
        row = {
            size.measure: _size(size),
            f"best {sweep.tuned}": f"{level['optimum']:.3g}",
            "95 % interval": "one seed" if between is None else "{:.3g} … {:.3g}".format(*between),
            "octaves": f"{level['shift_octaves']:+.2f}",
            "loss": _number(level["loss_at_best"], "{:.4f}"),
            "re-used": _number(level["loss_at_first"], "{:.4f}"),
            "regret": _number(level["regret"], "{:.2%}").replace("%", " %"),
            "": ", ".join(filter(None, notes)),
        }
        rows.append(row)
    return _table(TITLES[arm["parameterization"]] + (", control" if arm["control"] else ""), rows)


def _size(level: Level) -> str:
    """1/16 for a density, 512 for a width."""
    return fraction(level.density) if level.measure == "density" else f"{level.value:g}"


def _number(value: float | None, form: str) -> str:
    return "diverged" if value is None else form.format(value)


def curves_figure(sweep: Sweep, curves: list[Curve]) -> Figure:
    """Loss over the tuned hyperparameter: a panel for each parameterization, a line for each size, its best ringed."""
    panels, word = [], NAMES.get(sweep.tuned, sweep.tuned)
    for name in sweep.parameterizations:
        own, lines = [curve for curve in curves if curve.name == name], []
        for curve in own:
            losses = {curve.grid.value(index): finite(curve.mean(index)) for index in curve.indices}
            best = curve.grid.value(curve.best) if isfinite(curve.mean(curve.best)) else None
            lines.append(Line.through(f"{curve.level.measure} {_size(curve.level)}", losses, ring=best))
        octaves = [curve.grid.octaves(curve.best) for curve in own]
        factor = 2.0 ** (max(octaves) - min(octaves))
        title = f"{TITLES[name]}\nbest {word} {'stays' if factor == 1 else f'moves {factor:.3g}×'}"
        panels.append(Panel(title=title, vertical=own[0].grid.value(own[0].best), lines=lines))
    title = f"Loss over {word}; rings are optima, the grey band is the first size's"
    return loss_figure(title, f"{word} of the proxy", panels)


def _optimum_figure(sweep: Sweep, arms: list[Data]) -> Figure:
    """The optimum over density (or width, or depth), with its interval over seeds: level where it transfers."""
    lines, scales = [], [level.scale for level in sweep.levels]
    for arm in arms:
        points = [(level["optimum"], level["optimum_ci95"]) for level in arm["levels"]]
        lines.append(_banded(TITLES[arm["parameterization"]], dict(zip(scales, points, strict=True))))
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
    return [
        _table(title, losses),
        _table("SμPar's gain over the others, in % of their loss; negative: SμPar is worse", gains),
    ]


def _loss(cell: Data) -> str:
    if cell["loss"] is None:
        return f"{cell['diverged']} diverged" if cell["diverged"] else "failed"
    error = "" if cell["standard_error"] is None else "±" + f"{cell['standard_error']:.4f}".removeprefix("0")
    return f"{cell['loss']:.4f}{error}"


def _ratio(retuned: Data | None) -> str:
    """SP's best value at a size over the proxy's."""
    return "–" if retuned is None else f"2^{retuned['octaves']:g}" + ("" if retuned["bracketed"] else ", at the edge")


def _comparison_figure(rows: list[Data], levels: list[Level]) -> Figure:
    """Loss over density or width, a line for each way of choosing hyperparameters, with standard errors."""
    lines = []
    for name in rows[0]["cells"]:
        points: dict[float, tuple[float | None, Interval | None]] = {}
        for level, row in zip(levels, rows, strict=True):
            loss, error = row["cells"][name]["loss"], row["cells"][name]["standard_error"]
            points[level.scale] = loss, None if error is None else [loss - error, loss + error]
        lines.append(_banded(name, points))
    title = "Loss at transferred hyperparameters, and SP's with its rate re-tuned at every size"
    panel = Panel(title="the same hyperparameters at every size", vertical=None, lines=lines)
    return loss_figure(title, levels[0].measure, [panel], name="compare")
