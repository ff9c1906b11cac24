"""Figures drawn by matplotlib: into PNG files, and for a report's inline SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from supar_cli.reporting.result import Figure, Gap

# Okabe and Ito: told apart with any colour vision
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
MARKERS = "os^DvPX*"


def draw(figure: Figure) -> Any:
    """The figure as matplotlib's, one row of panels with common axes; close it after use."""
    panels = figure.panels
    drawn, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels) + 0.4, 4.0), sharex=True, sharey=True, squeeze=False
    )
    for panel, axis in zip(panels, axes[0], strict=True):
        if panel.vertical is not None:
            axis.axvline(panel.vertical, color="0.75", lw=6, zorder=0)
        for number, line in enumerate(panel.lines):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axis.plot(line.x, _with_gaps(line.y), marker + "-", color=colour, ms=4, label=_plain(line.label))
            if line.low is not None and line.high is not None:
                low, high = _with_gaps(line.low), _with_gaps(line.high)
                axis.fill_between(line.x, low, high, color=colour, alpha=0.15, lw=0)
            if line.ring is not None and (y := line.y[line.ring]) is not None:
                axis.plot(line.x[line.ring], y, marker, color=colour, ms=11, mfc="none", mew=1.6)
        if figure.x_log2:
            axis.set_xscale("log", base=2)
        if figure.y_log2:
            axis.set_yscale("log", base=2)
        axis.set_title(_plain(panel.title))
        axis.set_xlabel(_plain(figure.x))
        axis.grid(alpha=0.25)
        if any(line.label for line in panel.lines):
            axis.legend(fontsize=8)
    axes[0][0].set_ylabel(_plain(figure.y))
    if figure.y_limits:
        axes[0][0].set_ylim(*figure.y_limits)
    drawn.tight_layout()
    return drawn


def _with_gaps(values: list[Gap]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def save(figure: Figure | dict[str, Any], path: Path) -> None:
    """Draw a figure into a file of the kind its name says."""
    drawn = draw(Figure.model_validate(figure))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
