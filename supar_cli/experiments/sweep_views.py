"""What the results of sweeps show of measured curves: data, verdicts, tables and figures."""

from __future__ import annotations

from math import inf, isfinite, isinf, isnan, log2
from typing import Any

import numpy as np

from supar_cli.experiments.curves import Curve, Optimum, find_optimum, find_regrets
from supar_cli.experiments.statistics import Interval, interval, interval_of_few, resample, share_of, slope
from supar_cli.planning.rules import SP
from supar_cli.planning.sweep import MARKS, Level, Mark, Sweep
from supar_cli.reporting.result import NAMES, TITLES, Figure, Line, Panel, Table, Verdict, finite, fraction, loss_figure

CONTROL = {True: " (a control: passes, but should miss)", False: " (a control: misses, as expected)"}

SHORT = {**TITLES, "sp": "SP", "supar-lr-only": "SμPar's rate only"}

Data = dict[str, Any]


def title_of(name: str, titles: dict[str, str] = TITLES) -> str:
    """What an arm is called: a parameterization by its title, others by their names."""
    return titles.get(name, name)


def transfer(sweep: Sweep, curves: list[Curve]) -> Data:
    """The parts of a sweep's result: does each arm's optimum stay constant?"""
    by_name = [[curve for curve in curves if curve.name == name] for name in sweep.all_arms]
    arms = [_arm(sweep, own) for own in by_name]
    measured = list(zip(arms, by_name, strict=True))
    return {
        "title": sweep.title or sweep.name,
        "verdicts": [verdict for arm, own in measured for verdict in _verdicts(sweep, arm, own)],
        "tables": [*(_optimum_table(sweep, arm, own) for arm, own in measured), _cost_table(sweep, arms)],
        "figures": [curves_figure(sweep, curves), _optimum_figure(sweep, measured)],
        "arms": arms,
        "resamples": len(resample(sweep.seeds)),
    }


def _arm(sweep: Sweep, curves: list[Curve]) -> Data:
    """An arm as result.json has it, its sizes in order; drift is the slope of log2(optimum) on log2(size)."""
    # common to all, as their seeds are, but for those that the first size has more
    draws = [resample(sweep.seeds, len(sweep.seeds_at(curve.level)) - sweep.seeds) for curve in curves]
    optima = [find_optimum(curve, drawn) for curve, drawn in zip(curves, draws, strict=True)]
    octaves, resampled_ZB = np.array([one.octaves for one in optima]), [one.resampled for one in optima]
    found: Data = {"drift": None, "drift_ci95": None, "drift_ci90": None, "shift_octaves": float(np.ptp(octaves))}
    has_seeds = all(map(len, resampled_ZB))
    if len(curves) > 1:
        sizes = np.array([log2(curve.level.scale) for curve in curves])
        found["drift"] = float(slope(sizes, octaves[:, None])[0])
        drifts_B = slope(sizes, np.array(resampled_ZB)) if has_seeds else np.empty(0)
        found["drift_ci95"] = interval(drifts_B)
        found["drift_ci90"] = interval_of_few(found["drift"], drifts_B, sweep.seeds)
    shifts_B = np.ptp(np.array(resampled_ZB), axis=0) if has_seeds else np.empty(0)
    found["shift_ci90"] = interval_of_few(found["shift_octaves"], shifts_B, sweep.seeds)
    worst, regrets_B = _regret(curves, optima, draws)
    found["regret"], found["regret_ci90"] = finite(worst), interval_of_few(worst, regrets_B, sweep.seeds)
    name = curves[0].name
    return {
        "arm": name,
        "parameterization": sweep.all_arms[name].parameterization,
        "control": not is_subject(sweep, name),
        **found,
        "levels": [
            _level(sweep, curve, one, curves[0].best, optima[0].octaves)
            for curve, one in zip(curves, optima, strict=True)
        ],
    }


def _regret(curves: list[Curve], optima: list[Optimum], draws: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """The largest regret over sizes, by the parabolas and for each row of resampled seeds; else by the best value measured."""
    parts = zip(curves, optima, draws, strict=True)
    fitted = [find_regrets(curve, one, optima[0], drawn) for curve, one, drawn in parts]
    if any(isnan(value) for value, _ in fitted):
        return worst_regret(curves)[0], np.empty(0)
    if not all(len(regrets_B) for _, regrets_B in fitted):
        return max(value for value, _ in fitted), np.empty(0)
    regrets_B = np.max([regrets_B for _, regrets_B in fitted], axis=0)
    return max(value for value, _ in fitted), regrets_B[np.isfinite(regrets_B)]


def has_promise(sweep: Sweep) -> bool:
    """Whether any parameterization's optimum should stay: over depth none does without a rule."""
    return sweep.level_axis != "layers" or sweep.parameterization.depth_rule != "none"


def is_subject(sweep: Sweep, name: str) -> bool:
    """Whether an arm's optimum should stay constant over the study's sizes; if not, it is a control."""
    arm = sweep.arms.get(name)
    if arm is not None and arm.control is not None:
        return not arm.control
    parameterization = name if arm is None else arm.parameterization
    if not has_promise(sweep):
        return False
    if any(level.density != sweep.levels[0].density for level in sweep.levels):
        return parameterization == "supar"
    return parameterization not in SP


def _verdicts(sweep: Sweep, arm: Data, curves: list[Curve]) -> list[Verdict]:
    """A verdict for each mark of an arm at several sizes; `passed` is None where an optimum isn't bracketed."""
    if arm["drift"] is None:
        return []
    worst = arm["regret"] if arm["regret"] is not None else worst_regret(curves)[0]
    lost = "diverged" if worst == inf else "unknown" if isnan(worst) else f"{100 * worst:.2f} %"
    own, shift = sweep.all_arms[arm["arm"]].marks, arm["shift_octaves"]
    texts: dict[Mark, tuple[float, str, str, str]] = {
        "drift": (arm["drift"], f"γ = {arm['drift']:+.3f}", "{:+.3f}", "|γ| < {:g}"),
        "shift": (shift, f"largest {shift:.2f} octaves", "{:.2f}", "< {:g}"),
        "regret": (worst, f"largest {lost}", "{:.2%}", "< {:.3g} %"),
    }
    outer = [f"{curve.level.axis} {curve.level.value:g}" for curve in curves if not curve.bracketed]
    found = []
    for what, mark in (MARKS if own is None else own).items():
        value, text, form, threshold = texts[what]
        text += f"{_between(arm[f'{what}_ci90'], form)}; {threshold.format(100 * mark if what == 'regret' else mark)}"
        passed, why = _judge(value, arm[f"{what}_ci90"], mark)
        if outer or (what == "regret" and isnan(worst)):
            unknown = f"no inner optimum at {', '.join(outer)}" if outer else "a run failed"
            passed, why = None, f" (unknown: {unknown})"
        elif arm["control"] and passed is not None:
            why = CONTROL[passed]
        title = f"{title_of(arm['arm'], SHORT)}: {what}"
        powerless = {"has_power": False} if why == NO_POWER and not arm["control"] else {}
        found.append(Verdict(what=title, passed=passed, control=arm["control"], text=text + why, **powerless))
    return found


NO_POWER = " (no power: the interval is wider than twice the mark; more seeds narrow it)"


def _judge(value: float, between: Interval | None, mark: float) -> tuple[bool | None, str]:
    """Whether |value| is within a mark, and why that isn't decided.

    It isn't if the whole 90 % interval lies beyond the mark. It is if it lies within, and the interval is no wider than twice
    the mark. One seed has no interval, and the value alone decides.
    """
    if between is None:
        return abs(value) < mark, ""
    low, high = between
    if max(low, -high) > mark:
        return False, ""
    if high - low > 2 * mark:
        return None, NO_POWER
    return (True, "") if abs(value) < mark else (None, " (undecided: the mark lies within the interval)")


def _between(ends: Interval | None, form: str) -> str:
    return "" if ends is None else f" [{form.format(ends[0])}, {form.format(ends[1])}]".replace("%", " %")


def worst_regret(curves: list[Curve]) -> tuple[float, str]:
    """The largest regret of the first size's best value, inf where it diverges, nan where it is unknown; and in words."""
    regrets = [curve.regret(curves[0].best) for curve in curves]
    worst = max(regrets, key=lambda value: inf if isnan(value) else value)
    return worst, "diverged" if worst == inf else "unknown" if isnan(worst) else f"{100 * worst:.2f} %"


def _level(sweep: Sweep, curve: Curve, optimum: Optimum, first_best: float, first_octaves: float) -> Data:
    """A size: its optimum and interval, its losses, the regret of the first size's best value.

    `cost` is what half and twice that value lose, as a share of the loss at it.
    """
    loss, reused = curve.mean(curve.best), curve.mean(first_best)
    beside = {name: curve.loss_at(curve.grid.octaves(first_best) + by) for name, by in (("half", -1), ("twice", 1))}
    return {
        "parameterization": sweep.all_arms[curve.name].parameterization,
        "density": curve.level.density,
        **sweep.size_at(curve.level),
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
        "cost": {name: finite(share_of(value - reused, reused)) for name, value in beside.items()},
        "diverged": curve.count_runs(isinf),
        "failed": curve.count_runs(isnan),
        "losses": [
            {sweep.tuned: curve.grid.value(index), "mean": finite(curve.mean(index)), "by_seed": by_seed(curve, index)}
            for index in curve.indices
        ],
    }


def by_seed(curve: Curve, index: float) -> dict[str, float | None]:
    return {str(seed): finite(loss) for seed, loss in curve.losses[index].items()}


def table(title: str, rows: list[dict[str, str]]) -> Table:
    return Table(title=title, columns=list(rows[0]), rows=[list(row.values()) for row in rows])


def _optimum_table(sweep: Sweep, arm: Data, curves: list[Curve]) -> Table:
    """Optima and losses by size; at most 80 columns wide."""
    rows = []
    for curve, level in zip(curves, arm["levels"], strict=True):
        between = level["optimum_ci95"]
        notes = [f"{level['width']} wide" if sweep.iso != "none" else ""]
        notes += ["" if level["bracketed"] else "at the edge", "" if level["fitted"] else "no fit"]
        notes += [f"{level[key]} {key}" for key in ("diverged", "failed") if level[key]]
        row = {
            curve.level.measure: size_text(curve.level),
            f"best {sweep.tuned}": f"{level['optimum']:.3g}",
            "95 % interval": "one seed" if between is None else "{:.3g} … {:.3g}".format(*between),
            "octaves": f"{level['shift_octaves']:+.2f}",
            "loss": _number(level["loss_at_best"], "{:.4f}"),
            "re-used": _number(level["loss_at_first"], "{:.4f}"),
            "regret": _number(level["regret"], "{:.2%}").replace("%", " %"),
            "": ", ".join(filter(None, notes)),
        }
        rows.append(row)
    return table(title_of(arm["arm"]) + (", control" if arm["control"] else ""), rows)


def _cost_table(sweep: Sweep, arms: list[Data]) -> Table:
    """What half, twice and the re-used value itself cost, by arm and size; at most 80 columns wide."""
    rows, measure = [], sweep.levels[0].measure
    for arm in arms:
        for level in arm["levels"]:
            shares = (level["cost"]["half"], level["cost"]["twice"], level["regret"])
            half, twice, lost = ("–" if share is None else f"{100 * share:+.2f} %" for share in shares)
            size = fraction(level["density"]) if measure == "density" else str(level[measure])
            name = title_of(arm["arm"], SHORT)
            rows.append({"": name, measure: size, "at half": half, "at twice": twice, "against re-tuning": lost})
    return table(f"what half and twice the re-used {sweep.tuned} cost, and itself against re-tuning", rows)


def size_text(level: Level) -> str:
    """1/16 for a density, 512 for a width."""
    return fraction(level.density) if level.measure == "density" else f"{level.value:g}"


def _number(value: float | None, form: str) -> str:
    return "diverged" if value is None else form.format(value)


def curves_figure(sweep: Sweep, curves: list[Curve]) -> Figure:
    """Loss over the tuned hyperparameter: a panel for each parameterization, a line for each size, its best ringed."""
    panels, word = [], NAMES.get(sweep.tuned, sweep.tuned)
    for name in sweep.all_arms:
        own, lines = [curve for curve in curves if curve.name == name], []
        for curve in own:
            losses = {curve.grid.value(index): finite(curve.mean(index)) for index in curve.indices}
            best = curve.grid.value(curve.best) if isfinite(curve.mean(curve.best)) else None
            lines.append(Line.through(f"{curve.level.measure} {size_text(curve.level)}", losses, ring=best))
        octaves = [curve.grid.octaves(curve.best) for curve in own]
        factor = 2.0 ** (max(octaves) - min(octaves))
        title = f"{title_of(name)}\nbest {word} {'stays' if factor == 1 else f'moves {factor:.3g}×'}"
        panels.append(Panel(title=title, vertical=own[0].grid.value(own[0].best), lines=lines))
    title = f"Loss over {word}; rings are optima, the grey band is the first size's"
    return loss_figure(title, f"{word} of the proxy", panels, unit=sweep.loss_unit)


def _optimum_figure(sweep: Sweep, measured: list[tuple[Data, list[Curve]]]) -> Figure:
    """The optimum over density (or width, or depth), with its interval over seeds: level where it transfers."""
    lines = []
    for arm, curves in measured:
        found = zip(curves, arm["levels"], strict=True)
        points = {curve.level.scale: (level["optimum"], level["optimum_ci95"]) for curve, level in found}
        lines.append(banded(title_of(arm["arm"]), points))
    measure, best = sweep.levels[0].measure, f"best {NAMES.get(sweep.tuned, sweep.tuned)}"
    title = f"{best.capitalize()} over {measure}; bands are 95 % intervals over seeds"
    panel = Panel(title=best, vertical=None, lines=lines)
    logs: Data = {"x_log2": True, "y_log2": True, "y_limits": None}
    return Figure(name="optimum", title=title, x=measure, y=best, **logs, panels=[panel])


def banded(label: str, points: dict[float, tuple[float | None, Interval | None]]) -> Line:
    """A line through points (y, bounds of y) by their x, with a band where all points have bounds."""
    line = Line.through(label, {x: y for x, (y, _) in points.items()})
    bounds = [found for _, (_, found) in sorted(points.items()) if found is not None]
    if len(bounds) == len(points):
        line.low, line.high = [low for low, _ in bounds], [high for _, high in bounds]
    return line
