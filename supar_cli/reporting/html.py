"""One self-contained HTML page of parts: what a part holds, its figures as inline SVG, the page around them."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import jinja2
import markupsafe
import matplotlib
from matplotlib import pyplot as plt

from supar_cli.reporting import figures
from supar_cli.reporting.result import Figure, Table, Verdict
from supar_cli.version import __version__

# Colours that follow the page's: ink, card, the grey band and the lines of the grid
THEMED = {"#000000": "currentColor", "#ffffff": "var(--card)", "#bfbfbf": "var(--band)", "#b0b0b0": "var(--line)"}
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass
class Part:
    """What one input gives. `state` says in words how far it is; `facts` are (group, [(name, value)]), values texts."""

    source: str
    kind: str
    title: str
    state: str
    verdicts: list[Verdict] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        listed = {name: [one.model_dump() for one in getattr(self, name)] for name in ("verdicts", "figures", "tables")}
        own = {name: getattr(self, name) for name in ("source", "kind", "title", "state", "notes")}
        return {**own, **listed, "facts": {group: dict(pairs) for group, pairs in self.facts}}


def standing(verdict: Verdict) -> tuple[str, str, str]:
    """A verdict as (class, symbol, words). A control is to fail: one that passes says that the measurement is blind."""
    if verdict.passed is None:
        return "unknown", "?", "unknown"
    if verdict.control:
        return (
            ("unknown", "!", "control passes, yet it is to fail") if verdict.passed else ("good", "✓", "control fails")
        )
    return ("good", "✓", "passed") if verdict.passed else ("bad", "✗", "FAILED")


def summary(verdicts: list[Verdict]) -> str:
    """`2 passed, 1 FAILED, 1 control fails`."""
    counts = Counter(standing(verdict)[2] for verdict in verdicts)
    return ", ".join(f"{count} {words}" for words, count in counts.items()) or "no verdicts"


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested data as (dotted name, text)."""
    if isinstance(value, dict):
        return [pair for key, one in value.items() for pair in flat(one, f"{prefix}.{key}" if prefix else str(key))]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return [(prefix or "value", "–" if value is None else text)]


def gaps(figure: Figure) -> int:
    """Points of a figure that have no finite value."""
    return sum(y is None for panel in figure.panels for line in panel.lines for y in line.y)


def svg(figure: Figure, prefix: str) -> str:
    """A figure as an <svg> element whose ids begin with `prefix`, its colours following the page's."""
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        drawn = figures.draw(figure)
        drawn.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        plt.close(drawn)
    root = ET.fromstring(written.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        if LINK in element.attrib:
            element.set("href", element.attrib.pop(LINK))
        for name, value in element.attrib.items():
            element.set(name, _own(name, value, prefix))
    width = len(figure.panels)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": description(figure)}
    root.set("style", f"min-width:{15 * width}rem;max-width:{30 * width}rem")
    return ET.tostring(root, encoding="unicode")


def _own(name: str, value: str, prefix: str) -> str:
    """An attribute of an SVG with its ids made the figure's own and its colours the page's."""
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    value = value.replace("url(#", f"url(#{prefix}")
    if name in ("style", "fill", "stroke"):
        for colour, themed in THEMED.items():
            value = value.replace(colour, themed)
    return value


def description(figure: Figure) -> str:
    """What a figure shows, for who can't see it."""
    labels = dict.fromkeys(line.label for panel in figure.panels for line in panel.lines if line.label)
    return f"{figure.title}. {figure.y} over {figure.x}" + (f"; {', '.join(labels)}" if labels else "")


def cell(value: Any) -> str:
    """A table's cell as text."""
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> bool:
    """Whether a cell is set flush right."""
    if value is None:
        return True
    return isinstance(value, float | int) or (isinstance(value, str) and value[:1] in "+-−0123456789–" and value != "")


def render(parts: list[Part], template: str) -> str:
    """The page. `template` is Jinja2's; all that comes from documents is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "standing": standing, "summary": summary, "gaps": gaps}
    environment.tests["number"] = is_number
    drawn = [
        [markupsafe.Markup(svg(figure, f"p{i}f{j}-")) for j, figure in enumerate(part.figures, 1)]
        for i, part in enumerate(parts, 1)
    ]
    title = parts[0].title if len(parts) == 1 else f"{len(parts)} results"
    return environment.from_string(template).render(parts=parts, drawn=drawn, title=title, version=__version__) + "\n"
