"""Figures, drawn with matplotlib into files."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from supar_cli.analysis.sweeps import Curve

TITLES = {"sp": "SP (standard parameterization)", "mup": "μP", "supar": "SμPar"}
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: told apart with any colour vision
MARKERS = "os^Dv"


def fraction(density: float) -> str:
    """1/16 for 0.0625; a density that is no such fraction stays a decimal."""
    if density == 1:
        return "1"
    whole = round(1 / density)
    return f"1/{whole}" if whole * density == 1 else f"{density:g}"


def lr_transfer(curves: list[Curve], lr: float, path: Path) -> None:
    """Loss over learning rate, a panel for each parameterization, a line for each density; dots ring the optima."""
    names = list(dict.fromkeys(curve.parameterization for curve in curves))
    figure, panels = plt.subplots(
        1, len(names), figsize=(4.6 * len(names), 4.0), sharex=True, sharey=True, squeeze=False
    )
    finite = [loss for curve in curves for loss in curve.losses.values() if isfinite(loss)]
    best = min(finite)
    for name, panel in zip(names, panels[0], strict=True):
        own = [curve for curve in curves if curve.parameterization == name]
        dense = next(curve for curve in own if curve.density == 1.0)
        panel.axvline(lr * 2.0**dense.best, color="0.75", lw=6, zorder=0, label="dense optimum")
        for curve, colour, marker in zip(own, COLOURS, MARKERS, strict=False):
            points = [(lr * 2.0**octave, loss) for octave, loss in curve.losses.items() if isfinite(loss)]
            panel.plot(
                *zip(*points, strict=True), marker + "-", color=colour, ms=4, label=f"density {fraction(curve.density)}"
            )
            panel.plot(lr * 2.0**curve.best, curve.losses[curve.best], marker, color=colour, ms=11, mfc="none", mew=1.6)
        panel.set_xscale("log", base=2)
        panel.set_title(TITLES[name])
        panel.set_xlabel("learning rate of the proxy, η")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel("validation loss (nats per token)")
    # a diverging end of a curve would flatten the rest
    panels[0][0].set_ylim(best - 0.05, min(max(finite), best + 1.5) + 0.05)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
