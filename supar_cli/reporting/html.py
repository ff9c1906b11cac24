"""One self-contained HTML page of parts: what a part holds, its figures as inline SVG, the page around them."""

import io
import re
from collections import Counter
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
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


def draw_svg(figure: Figure, salt: str) -> tuple[str, str]:
    """(viewBox, elements) of a figure as SVG, in the page's colours; ids are unique per salt."""
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        drawn = figures.draw(figure)
        drawn.savefig(written, format="svg", transparent=True, metadata=dict.fromkeys(METADATA))
        plt.close(drawn)
    found = re.search('<svg[^>]* viewBox="([^"]*)"[^>]*>(.*)</svg>', written.getvalue(), re.DOTALL)
    assert found is not None
    return found[1], re.sub("<[^>]*>", _theme, found[2])


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
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    functions = (cell, verdict_style, summary, draw_svg, description)
    environment.filters |= {function.__name__: function for function in functions}
    environment.tests["number"] = is_number
    page = environment.from_string(template("report.html.j2").read_text("utf-8"))
    title = parts[0].title if len(parts) == 1 else f"{len(parts)} results"
    return page.render(parts=parts, title=title, version=__version__) + "\n"
