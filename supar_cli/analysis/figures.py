"""Figures as data: panels of lines that a command draws to a PNG and a report to inline SVG.

A figure is plain data, so that results store it and `--json` gives it:

    {name, title, x, y: axis labels, x_log2, y_log2: bool, y_limits: [low, high] or null, panels: [
        {title, vertical: x of a grey band or null, lines: [
            {label, x: [...], y: [...], low: [...], high: [...] (optional interval), ring: index of a ringed point or null}]}]}

A `y` of null is a loss that is not finite and leaves a gap.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

NAMES = {"lr": "learning rate", "init_std": "init std", "weight_decay": "weight decay"}
TITLES = {
    "sp": "SP (standard parameterization)",
    "mup": "μP",
    "supar": "SμPar",
    "supar-init-only": "SμPar's init only",
    "supar-lr-only": "SμPar's learning rate only",
}
# Okabe and Ito: told apart with any colour vision
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
MARKERS = "os^DvPX*"

Figure = dict[str, Any]
Line = dict[str, Any]


def fraction(density: float) -> str:
    """1/16 for 0.0625; a density that is no such fraction stays a decimal."""
    if density == 1:
        return "1"
    whole = round(1 / density)
    return f"1/{whole}" if whole * density == 1 else f"{density:g}"


def line(label: str, points: dict[float, float | None], *, ring: float | None = None) -> Line:
    """A line through points by their x, in order; `ring` is the x of the point to ring."""
    xs = sorted(points)
    ys = [points[x] for x in xs]
    return {
        "label": label,
        "x": xs,
        "y": [y if y is not None and isfinite(y) else None for y in ys],
        "ring": None if ring is None else xs.index(ring),
    }


def draw(figure: Figure) -> Any:
    """The figure as matplotlib's, one row of panels with common axes; close it after use."""
    panels = figure["panels"]
    drawn, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels) + 0.4, 4.0), sharex=True, sharey=True, squeeze=False
    )
    for panel, axis in zip(panels, axes[0], strict=True):
        if panel.get("vertical") is not None:
            axis.axvline(panel["vertical"], color="0.75", lw=6, zorder=0)
        for number, one in enumerate(panel["lines"]):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            ys = [float("nan") if y is None else y for y in one["y"]]
            axis.plot(one["x"], ys, marker + "-", color=colour, ms=4, label=one["label"])
            if one.get("low") is not None:
                axis.fill_between(one["x"], one["low"], one["high"], color=colour, alpha=0.15, lw=0)
            if one.get("ring") is not None:
                at = one["ring"]
                axis.plot(one["x"][at], ys[at], marker, color=colour, ms=11, mfc="none", mew=1.6)
        if figure["x_log2"]:
            axis.set_xscale("log", base=2)
        if figure["y_log2"]:
            axis.set_yscale("log", base=2)
        axis.set_title(panel["title"])
        axis.set_xlabel(figure["x"])
        axis.grid(alpha=0.25)
        if any(one["label"] for one in panel["lines"]):
            axis.legend(fontsize=8)
    axes[0][0].set_ylabel(figure["y"])
    if figure.get("y_limits"):
        axes[0][0].set_ylim(*figure["y_limits"])
    drawn.tight_layout()
    return drawn


def save(figure: Figure, path: Path) -> None:
    """Draw a figure into a file of the kind its name says."""
    drawn = draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def loss_limits(losses: list[float]) -> list[float]:
    """Limits of a loss axis: a diverging end of a curve would flatten the rest."""
    best = min(losses)
    return [best - 0.05, min(max(losses), best + 1.5) + 0.05]
