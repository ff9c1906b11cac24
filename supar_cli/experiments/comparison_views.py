"""What the results of comparisons show of measured curves: losses at the same hyperparameters, and SP's at its own."""

from __future__ import annotations

from math import inf, isnan
from typing import Any

from supar_cli.experiments.curves import Curve, first_of
from supar_cli.experiments.statistics import Interval, share_of, standard_error
from supar_cli.experiments.sweep_views import (
    CONTROL,
    SHORT,
    banded,
    by_seed,
    is_subject,
    size_text,
    table,
    worst_regret,
)
from supar_cli.planning.sweep import AGGREGATES, MARKS, Level, Sweep
from supar_cli.reporting.result import TITLES, Figure, Panel, Table, Verdict, finite, loss_figure, loss_text

SUPAR = TITLES["supar"]
DENSE, RETUNED = "SP, tuned dense", "SP, re-tuned"  # at its best value of the first size, and of each size

Data = dict[str, Any]


def comparison(sweep: Sweep, curves: list[Curve]) -> Data:
    """The parts of a comparison's result: losses at the proxy's value of the hyperparameter, and SP's at its own."""
    rows = [_compare(sweep, level, curves) for level in sweep.levels]
    shown = f"{loss_text(sweep.loss_unit)}: {AGGREGATES[sweep.aggregate]} ± standard error over seeds"
    tables, figures = _comparison_tables(rows, sweep.levels[0].measure, shown), [_comparison_figure(rows, sweep)]
    title = f"{sweep.title or sweep.name}: SP, μP and SμPar at transferred hyperparameters"
    return {
        "title": title,
        "verdicts": regret_verdicts(sweep, curves),
        "tables": tables,
        "figures": figures,
        "levels": rows,
    }


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
        worst, lost = worst_regret(own)
        text = f"largest {lost}; < {100 * MARKS['regret']:g} %"
        is_unknown = isnan(worst) or (worst < MARKS["regret"] and not all(curve.bracketed for curve in own))
        passed = None if is_unknown else worst < MARKS["regret"]
        if passed is None:
            text += " (unknown: a run failed, or no inner optimum)"
        elif is_control:
            text += CONTROL[passed]
        found.append(Verdict(what=f"{SHORT[own[0].name]}: regret", passed=passed, control=is_control, text=text))
    return found


def _compare(sweep: Sweep, level: Level, curves: list[Curve]) -> Data:
    """A size: a cell of each parameterization at the proxy's value and of SP at its own, and SμPar's gains.

    A gain is SμPar's loss below another's, as a share of the other's: positive where SμPar is better.
    """
    at_size = [curve for curve in curves if curve.level == level]
    cells = {TITLES[curve.name]: _cell(curve, 0.0) for curve in at_size}
    for sp in (curve for curve in at_size if curve.name == "sp"):
        octaves = sp.grid.octaves(sp.best) - sp.grid.octaves(0.0)
        cells[DENSE] = _cell(sp, first_of(sp, curves).best)
        cells[RETUNED] = {**_cell(sp, sp.best), "octaves": octaves, "bracketed": sp.bracketed}
    supar = cells[SUPAR]["loss"] if SUPAR in cells else None
    losses = {name: cell["loss"] for name, cell in cells.items()}
    gains = {name: None if None in (loss, supar) else share_of(loss - supar, loss) for name, loss in losses.items()}
    width = sweep.size_at(level).get("width")
    return {"level": size_text(level), "density": level.density, "width": width, "cells": cells, "gains": gains}


def _cell(curve: Curve, index: float) -> Data:
    """The loss at an index: mean, standard error, each seed's; a diverged or failed run leaves no mean."""
    losses = list(curve.losses[index].values())
    return {
        "loss": finite(curve.mean(index)),
        "standard_error": standard_error(losses, curve.aggregate == "iqm"),
        "by_seed": by_seed(curve, index),
        "diverged": losses.count(inf),
        "value": curve.grid.value(index),
    }


def _comparison_tables(rows: list[Data], measure: str, title: str) -> list[Table]:
    """Losses with standard errors, and SμPar's gain over each of the others; 80 columns wide at most."""
    short = {name: name.replace(" (standard parameterization)", "") for name in rows[0]["cells"]}
    losses, gains = [], []
    for row in rows:
        shares = {name: "–" if gain is None else f"{100 * gain:+.2f} %" for name, gain in row["gains"].items()}
        own = {short[name]: share for name, share in shares.items() if name != SUPAR}
        losses.append({measure: row["level"], **{short[name]: _loss(cell) for name, cell in row["cells"].items()}})
        gains.append({measure: row["level"], **own, "re-tuned ÷ proxy's": _ratio(row["cells"].get(RETUNED))})
    return [
        table(title, losses),
        table("SμPar's gain over the others, in % of their loss; negative: SμPar is worse", gains),
    ]


def _loss(cell: Data) -> str:
    if cell["loss"] is None:
        return f"{cell['diverged']} diverged" if cell["diverged"] else "failed"
    error = "" if cell["standard_error"] is None else "±" + f"{cell['standard_error']:.4f}".removeprefix("0")
    return f"{cell['loss']:.4f}{error}"


def _ratio(retuned: Data | None) -> str:
    """SP's best value at a size over the proxy's."""
    return "–" if retuned is None else f"2^{retuned['octaves']:g}" + ("" if retuned["bracketed"] else ", at the edge")


def _comparison_figure(rows: list[Data], sweep: Sweep) -> Figure:
    """Loss over density or width, a line for each way of choosing hyperparameters, with standard errors."""
    lines = []
    for name in rows[0]["cells"]:
        points: dict[float, tuple[float | None, Interval | None]] = {}
        for level, row in zip(sweep.levels, rows, strict=True):
            loss, error = row["cells"][name]["loss"], row["cells"][name]["standard_error"]
            points[level.scale] = loss, None if error is None else [loss - error, loss + error]
        lines.append(banded(name, points))
    title = "Loss at transferred hyperparameters, and SP's with its rate re-tuned at every size"
    panel = Panel(title="the same hyperparameters at every size", vertical=None, lines=lines)
    return loss_figure(title, sweep.levels[0].measure, [panel], name="compare", unit=sweep.loss_unit)
