"""One self-contained HTML page of parts: what a part holds, its figures as inline SVG, the page around them."""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import Any

import jinja2
import markupsafe
import matplotlib
from matplotlib import pyplot as plt

from supar_cli.files import template
from supar_cli.reporting import figures
from supar_cli.reporting.result import Figure, ReportPart, Verdict
from supar_cli.version import __version__

# Colours that follow the page's: ink, card, the grey band and the lines of the grid
THEMED = {"#000000": "currentColor", "#ffffff": "var(--card)", "#bfbfbf": "var(--band)", "#b0b0b0": "var(--line)"}
METADATA = ("Creator", "Date", "Format", "Type")  # what matplotlib writes unless told otherwise


def verdict_style(verdict: Verdict) -> tuple[str, str, str]:
    """A verdict as (class, symbol, words). A control that passes says that the measurement can't tell right from wrong."""
    if verdict.passed is None:
        return "unknown", "?", "unknown"
    if verdict.control and verdict.passed:
        return "unknown", "!", "control passes, but it should fail"
    if verdict.control:
        return "good", "✓", "control fails"
    return ("good", "✓", "passed") if verdict.passed else ("bad", "✗", "FAILED")


def summary(verdicts: list[Verdict]) -> str:
    """`2 passed, 1 FAILED, 1 control fails`."""
    counts = Counter(verdict_style(verdict)[2] for verdict in verdicts)
    return ", ".join(f"{count} {words}" for words, count in counts.items()) or "no verdicts"


def svg(figure: Figure, salt: str) -> str:
    """A figure as an <svg> element, its colours following the page's; its ids are those of no figure with another salt."""
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        drawn = figures.draw(figure)
        drawn.savefig(written, format="svg", transparent=True, metadata=dict.fromkeys(METADATA))
        plt.close(drawn)
    found = re.search(r'<svg[^>]* viewBox="([^"]*)"[^>]*>(.*)', written.getvalue(), re.DOTALL)
    assert found is not None
    width = len(figure.panels)
    style = f"min-width:{15 * width}rem;max-width:{30 * width}rem"
    label = markupsafe.escape(description(figure))
    start = f'<svg viewBox="{found[1]}" role="img" aria-label="{label}" style="{style}">'
    return start + re.sub("<[^>]*>", _theme, found[2])


def _theme(tag: re.Match[str]) -> str:
    """A tag of an SVG with the page's colours. A group's id is in every figure, and nothing refers to it."""
    text = re.sub('^<g id="[^"]*"', "<g", tag[0])
    for colour, themed in THEMED.items():
        text = text.replace(colour, themed)
    return text


def description(figure: Figure) -> str:
    """What a figure shows, for readers who can't see it."""
    labels = dict.fromkeys(line.label for line in figure.lines if line.label)
    return f"{figure.title}. {figure.y} over {figure.x}" + (f"; {', '.join(labels)}" if labels else "")


def cell(value: Any) -> str:
    """A table's cell as text."""
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> bool:
    """Whether a cell is set flush right: a number, a text that begins as one, a dash."""
    return cell(value)[:1] in tuple("+-−0123456789–")


def render(parts: list[ReportPart]) -> str:
    """The page; everything that comes from documents is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "verdict_style": verdict_style, "summary": summary}
    environment.tests["number"] = is_number
    drawn = [
        [markupsafe.Markup(svg(figure, f"p{i}f{j}-")) for j, figure in enumerate(part.figures, 1)]
        for i, part in enumerate(parts, 1)
    ]
    page = environment.from_string(template("report.html.j2").read_text("utf-8"))
    title = parts[0].title if len(parts) == 1 else f"{len(parts)} results"
    return page.render(parts=parts, drawn=drawn, title=title, version=__version__) + "\n"
