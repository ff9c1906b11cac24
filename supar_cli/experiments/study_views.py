"""A measured study as tables, figures and the data of its result."""

from __future__ import annotations

from math import isfinite
from typing import Any

from supar_cli.experiments.curves import Curve, first_of
from supar_cli.experiments.transfer_study import Arm
from supar_cli.planning.sweep import Level, Sweep
from supar_cli.reporting import result as figures


def label(level: Level) -> str:
    """`density 1/16`, `width 512`; the width too where it follows the density."""
    if level.axis in ("width", "layers"):
        return f"{level.axis} {level.value:g}"
    return f"density {figures.fraction(level.density)}"


def finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def rows(sweep: Sweep, arm: Arm) -> list[dict[str, Any]]:
    """One a size: its optimum and interval, its losses in nats a token, the regret of the first size's value."""
    first = first_of(arm.curves[0], arm.curves).best
    found = []
    for curve, best, regret in zip(arm.curves, arm.optima, arm.regrets, strict=True):
        loss, there = curve.mean(curve.best), curve.mean(first)
        between = best.interval
        found.append(
            {
                "parameterization": arm.name,
                "density": curve.level.density,
                "width": curve.level.width,
                "layers": curve.level.layers,
                "optimum": 2.0**best.octaves,
                "optimum_ci95": None if between is None else [2.0**value for value in between],
                "fitted": best.fitted,
                "why": best.why,
                "shift_octaves": best.octaves - arm.optima[0].octaves,
                "best_measured": curve.grid.at(curve.best),
                "bracketed": curve.bracketed,
                "loss_at_best": finite(loss),
                "loss_at_first": finite(there),
                "regret_nats": finite(there - loss),
                "regret": finite(regret),
                "diverged": curve.diverged,
                "failed": curve.failed,
                "losses": [
                    {
                        sweep.tuned: curve.grid.at(place),
                        "mean": finite(curve.mean(place)),
                        "by_seed": _by_seed(curve, place),
                    }
                    for place in curve.places
                ],
            }
        )
    return found


def _by_seed(curve: Curve, place: float) -> dict[str, float | None]:
    return {str(seed): finite(loss) for seed, loss in curve.losses[place].items()}


def table(sweep: Sweep, arm: Arm) -> dict[str, Any]:
    """{title, columns, rows} of texts, at most 80 columns wide."""
    columns = [
        sweep.level_axis or "density",
        f"best {sweep.tuned}",
        "95 % interval",
        "octaves",
        "loss",
        "re-used",
        "regret",
        "",
    ]
    found = []
    for curve, row in zip(arm.curves, rows(sweep, arm), strict=True):
        own = f"{row['width']} wide" if sweep.iso != "none" else ""
        notes = [own, "" if row["bracketed"] else "at the edge", "" if row["fitted"] else "no fit"]
        notes += [f"{row[key]} {key}" for key in ("diverged", "failed") if row[key]]
        between = row["optimum_ci95"]
        found.append(
            [
                figures.fraction(curve.level.density)
                if sweep.level_axis in ("sparsity", "density", "")
                else f"{curve.level.value:g}",
                f"{row['optimum']:.3g}",
                "one seed" if between is None else f"{between[0]:.3g} … {between[1]:.3g}",
                f"{row['shift_octaves']:+.2f}",
                _number(row["loss_at_best"], "{:.4f}"),
                _number(row["loss_at_first"], "{:.4f}"),
                _number(row["regret"], "{:.2%}").replace("%", " %"),
                ", ".join(filter(None, notes)),
            ]
        )
    if sweep.level_axis == "sparsity":
        columns[0] = "density"
    return {"title": figures.TITLES[arm.name] + (", control" if arm.control else ""), "columns": columns, "rows": found}


def _number(value: float | None, form: str) -> str:
    return "diverged" if value is None else form.format(value)


def loss_figure(sweep: Sweep, curves: list[Curve]) -> dict[str, Any]:
    """Loss over the tuned hyperparameter: a panel for each parameterization, a line for each size, its best ringed."""
    panels: list[dict[str, Any]] = []
    for name in dict.fromkeys(curve.name for curve in curves):
        own = [curve for curve in curves if curve.name == name]
        lines = [
            figures.line(
                label(curve.level),
                {curve.grid.at(place): finite(curve.mean(place)) for place in curve.places},
                ring=curve.grid.at(curve.best) if isfinite(curve.mean(curve.best)) else None,
            )
            for curve in own
        ]
        panels.append({"title": figures.TITLES[name], "vertical": own[0].grid.at(own[0].best), "lines": lines})
    word = figures.NAMES.get(sweep.tuned, sweep.tuned)
    losses = [y for panel in panels for one in panel["lines"] for y in one["y"] if y is not None]
    return {
        "name": "loss",
        "title": f"Loss over {word}; rings are optima, the grey band is the first size's",
        "x": f"{word} of the proxy",
        "y": "validation loss (nats per token)",
        "x_log2": True,
        "y_log2": False,
        "y_limits": figures.loss_limits(losses),
        "panels": panels,
    }


def optimum_figure(sweep: Sweep, arms: list[Arm]) -> dict[str, Any]:
    """The optimum over density (or width, or depth), with its interval over seeds: level where it transfers."""
    lines = []
    for arm in arms:
        scales = [curve.level.scale for curve in arm.curves]
        order = sorted(range(len(scales)), key=scales.__getitem__)
        one = figures.line(
            figures.TITLES[arm.name], {s: 2.0**o.octaves for s, o in zip(scales, arm.optima, strict=True)}
        )
        between = [arm.optima[i].interval for i in order]
        if all(found is not None for found in between):
            one["low"] = [2.0 ** found[0] for found in between if found]
            one["high"] = [2.0 ** found[1] for found in between if found]
        lines.append(one)
    axis = "density" if sweep.level_axis in ("sparsity", "density", "") else sweep.level_axis
    name = figures.NAMES.get(sweep.tuned, sweep.tuned)
    return {
        "name": "optimum",
        "title": f"Best {name} over {axis}; bands are 95 % intervals over seeds",
        "x": axis,
        "y": f"best {name}",
        "x_log2": True,
        "y_log2": True,
        "y_limits": None,
        "panels": [{"title": f"best {name}", "vertical": None, "lines": lines}],
    }
