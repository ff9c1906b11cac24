"""Figures drawn by matplotlib: into PNG files, and for a report's inline SVG."""

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from supar_cli.errors import InputError
from supar_cli.files import write_file
from supar_cli.reporting.result import Figure, Result

# Okabe and Ito: told apart with any colour vision
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
MARKERS = "os^DvPX*"
IN_A_ROW = 5


def draw(figure: Figure) -> Any:
    """The figure as matplotlib's, rows of panels with common axes; close it after use."""
    columns = min(len(figure.panels), IN_A_ROW)
    rows = -(-len(figure.panels) // columns)
    size = (4.4 * columns + 0.4, 4.0 * rows)
    drawn, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    first = axes[0][0]
    for axis in axes.flat[len(figure.panels) :]:
        axis.remove()
    if figure.x_log2:
        first.set_xscale("log", base=2)
    if figure.y_log2:
        first.set_yscale("log", base=2)
    for panel, axis in zip(figure.panels, axes.flat, strict=False):
        if panel.vertical is not None:
            first_label = next((line.label for line in panel.lines), "")
            axis.axvline(panel.vertical, color="0.75", lw=6, zorder=0, label=_plain(f"best at {first_label}"))
        looks = zip(cycle(COLOURS), cycle(MARKERS), cycle(["-"] * len(COLOURS) + ["--"] * len(COLOURS)), strict=False)
        for line, (colour, marker, dashes) in zip(panel.lines, looks, strict=False):
            look = {"color": colour, "ls": dashes, "marker": marker, "ms": 4}
            axis.plot(line.x, np.array(line.y, float), label=_plain(line.label), **look)
            if line.low is not None:
                low, high = np.array([line.low, line.high], float)
                axis.fill_between(line.x, low, high, color=colour, alpha=0.15, lw=0)
            if line.ring is not None:
                at = slice(line.ring, line.ring + 1)
                axis.plot(line.x[at], np.array(line.y[at], float), marker, color=colour, ms=11, mfc="none", mew=1.6)
        if any(line.ring is not None for line in panel.lines):
            axis.plot([], [], "o", color="0.4", ms=11, mfc="none", mew=1.6, label="best of each line")
        axis.set(title=_plain(panel.title), xlabel=_plain(figure.x))
        axis.grid(alpha=0.25)
        if any(line.label for line in panel.lines):
            is_crowded = len(panel.lines) > 6 and len(figure.panels) == 1  # beside the lines, where they leave no room
            axis.legend(fontsize=8, **({"loc": "center left", "bbox_to_anchor": (1.02, 0.5)} if is_crowded else {}))
    first.set(ylabel=_plain(figure.y), ylim=figure.y_limits)
    drawn.tight_layout()
    return drawn


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def require_format(flag: str, path: str) -> None:
    """Raise InputError where a path's name says no kind of picture that can be drawn."""
    known = plt.Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in known:
        raise InputError(f"{flag} {path}: not the name of a picture; expected one that ends in .png, .svg or .pdf")


def save(figure: Figure, path: Path) -> None:
    """Draw a figure into a file of the kind that its name says."""
    drawn = draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def write_result(result: Result, folder: Path, log: Callable[[str], None]) -> None:
    """Write result.json and a PNG of each figure."""
    text = json.dumps(result.document(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(folder / "result.json", text)
    for figure in result.figures:
        save(figure, folder / f"{figure.name}.png")
    names = ", ".join(["result.json", *(f"{figure.name}.png" for figure in result.figures), "records.jsonl"])
    log(f"wrote {folder}/: {names}")
