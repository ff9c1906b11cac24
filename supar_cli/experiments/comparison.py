"""SP, μP and SμPar side by side at transferred hyperparameters, beside SP with a learning rate of its own.

SP has three lines: the proxy's rate as the others have it, the rate that is best for SP at the first size, re-used (what
people do), and its rate re-tuned at every size (what nobody can afford, and the fair comparison of what is possible).
"""

from __future__ import annotations

from math import inf, isfinite, sqrt
from typing import Any

from supar_cli.experiments.curves import Curve, first_of
from supar_cli.experiments.study_views import finite
from supar_cli.reporting import result as figures

DENSE, RETUNED = "SP, tuned dense", "SP, re-tuned"


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None for one value or where a loss isn't finite."""
    if len(values) < 2 or not all(map(isfinite, values)):
        return None
    mean = sum(values) / len(values)
    return sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def cell(curve: Curve, place: float) -> dict[str, Any]:
    """The loss at a place: mean, standard error, each seed's; a diverged or failed run leaves no mean."""
    by_seed = curve.losses[place]
    return {
        "loss": finite(curve.mean(place)),
        "standard_error": standard_error(list(by_seed.values())),
        "by_seed": {str(seed): finite(loss) for seed, loss in by_seed.items()},
        "diverged": sum(loss == inf for loss in by_seed.values()),
        "value": curve.grid.at(place),
    }


def rows(curves: list[Curve]) -> list[dict[str, Any]]:
    """One a size: a cell of each parameterization at place 0 and of SP at its own places, and SμPar's gains in shares."""
    found = []
    names = list(dict.fromkeys(curve.name for curve in curves))
    sizes = [curve for curve in curves if curve.name == names[0]]
    for i, size in enumerate(sizes):
        own = {name: [c for c in curves if c.name == name][i] for name in names}
        row: dict[str, Any] = {"level": _level(size), "density": size.level.density, "width": size.level.width}
        row["cells"] = {figures.TITLES[name]: cell(curve, 0.0) for name, curve in own.items()}
        if "sp" in own:
            sp = own["sp"]
            octaves = sp.grid.octaves(sp.best) - sp.grid.octaves(0.0)
            row["cells"][DENSE] = cell(sp, first_of(sp, curves).best)
            row["cells"][RETUNED] = {**cell(sp, sp.best), "octaves": octaves, "bracketed": sp.bracketed}
        row["gains"] = {name: gain(row["cells"][name], row["cells"]) for name in row["cells"]}
        found.append(row)
    return found


def _level(curve: Curve) -> str:
    own = curve.level
    return f"{own.value:g}" if own.axis in ("width", "layers") else figures.fraction(own.density)


def gain(other: dict[str, Any], cells: dict[str, Any]) -> float | None:
    """SμPar's loss below another's, as a share of the other's: positive where SμPar is better."""
    supar = cells.get(figures.TITLES["supar"])
    if supar is None or supar["loss"] is None or other["loss"] is None:
        return None
    return float((other["loss"] - supar["loss"]) / other["loss"])


def tables(found: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """Losses with standard errors, and SμPar's gain over each of the others; 80 columns wide at most."""
    names = list(found[0]["cells"])
    short = {name: name.replace(" (standard parameterization)", "") for name in names}
    losses = [[row["level"], *(_loss(row["cells"][name]) for name in names)] for row in found]
    others = [name for name in names if name != figures.TITLES["supar"]]
    gains = [[row["level"], *(_percent(row["gains"][name]) for name in others), _rate(row)] for row in found]
    return [
        {
            "title": "validation loss (nats per token): mean ± standard error over seeds",
            "columns": [axis, *(short[name] for name in names)],
            "rows": losses,
        },
        {
            "title": "how much lower SμPar's loss is than that of",
            "columns": [axis, *(short[name] for name in others), "re-tuned ÷ proxy's"],
            "rows": gains,
        },
    ]


def _loss(one: dict[str, Any]) -> str:
    if one["loss"] is None:
        return f"{one['diverged']} diverged" if one["diverged"] else "failed"
    spread = one["standard_error"]
    return f"{one['loss']:.4f}" + ("" if spread is None else "±" + f"{spread:.4f}".removeprefix("0"))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.2f} %"


def _rate(row: dict[str, Any]) -> str:
    again = row["cells"].get(RETUNED)
    if again is None:
        return "–"
    return f"2^{again['octaves']:g}" + ("" if again["bracketed"] else ", at the end")


def figure(found: list[dict[str, Any]], axis: str) -> dict[str, Any]:
    """Loss over density or width, a line for each way of choosing hyperparameters, with standard errors."""
    lines = []
    for name in found[0]["cells"]:
        own = sorted(((row["width"] if axis == "width" else row["density"]), row["cells"][name]) for row in found)
        one = figures.line(name, {x: part["loss"] for x, part in own})
        if all(part["standard_error"] is not None for _, part in own):
            one["low"] = [part["loss"] - part["standard_error"] for _, part in own]
            one["high"] = [part["loss"] + part["standard_error"] for _, part in own]
        lines.append(one)
    losses = [y for one in lines for y in one["y"] if y is not None]
    return {
        "name": "compare",
        "title": "Loss at transferred hyperparameters, and SP's with its rate re-tuned at every size",
        "x": axis,
        "y": "validation loss (nats per token)",
        "x_log2": True,
        "y_log2": False,
        "y_limits": figures.loss_limits(losses),
        "panels": [{"title": "the same hyperparameters at every size", "vertical": None, "lines": lines}],
    }
