"""Text for people, on stderr: wrapped at words and coloured a little on a terminal, and tables that break no word."""

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any

WIDTH = 80  # columns of what is no terminal
NARROWEST = 20  # chosen: narrower terminals wrap by themselves
GAP = "  "  # between the columns of a table
RED, GREEN, YELLOW, BOLD = 31, 32, 33, 1
COLOURED = re.compile(r"^(?:error|warning):|^ *pass(?= )|\bFAIL(?:ED)?\b", re.MULTILINE)


def is_terminal() -> bool:
    """Whether people read stderr as it is written."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def width() -> int:
    """The columns that text has: COLUMNS, those of the terminal, or WIDTH."""
    asked = os.environ.get("COLUMNS", "")
    columns = int(asked) if asked.isdecimal() else 0
    with suppress(OSError, ValueError, AttributeError):
        columns = columns or os.get_terminal_size(sys.stderr.fileno()).columns
    return max(NARROWEST, columns) if columns else WIDTH


def fit(text: str) -> str:
    """The text as a terminal shows it best, as it is for any other reader."""
    if not is_terminal():
        return text
    return colour(
        "\n".join(
            part
            for line in text.split("\n")
            for part in (wrap(line, width()) or [""] if "\x1b" not in line else [line])
        )
    )


def wrap(line: str, columns: int, indented: int = 2) -> list[str]:
    """A line in parts of at most so many columns, broken between words; those after the first are indented further."""
    indent = " " * (len(line) - len(line.lstrip()) + indented)
    at_words = textwrap.TextWrapper(columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    at_words.replace_whitespace = False
    return at_words.wrap(line)


def colour(text: str) -> str:
    """The text with a few words in colour, unless NO_COLOR says otherwise."""
    if os.environ.get("NO_COLOR"):
        return text
    codes = {"w": YELLOW, "p": GREEN}
    return COLOURED.sub(lambda found: _code(found[0], codes.get(found[0].lstrip()[0], RED)), text)


def _code(text: str, code: int) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[int] = (), title: str | None = None
) -> str:
    """Rows under headings, `right` the indices of numbers; a row over several lines where the columns do not fit."""
    texts, right = [[*map(str, row)] for row in rows], set(right)
    widths = _widths(list(columns), texts, right, width())
    lines = [] if title is None else wrap(title, width())
    if widths is None:
        return "\n".join([*lines, *(line for row in texts for line in _stacked(columns, row))])
    for i, row in enumerate([list(columns), *texts]):
        parts = [
            textwrap.wrap(cell, size or 1, break_long_words=False, break_on_hyphens=False)
            for cell, size in zip(row, widths, strict=True)
        ]
        for line in zip_longest(*parts, fillvalue=""):
            cells = (
                part.rjust(size) if j in right else part.ljust(size)
                for j, (part, size) in enumerate(zip(line, widths, strict=True))
            )
            shown = GAP.join(cells).rstrip()
            lines.append(_code(shown, BOLD) if i == 0 and is_terminal() and not os.environ.get("NO_COLOR") else shown)
    return "\n".join(lines)


def _widths(columns: list[str], rows: list[list[str]], right: set[int], most: int) -> list[int] | None:
    """The width of each column, None where not even the longest words fit beside each other.

    Headings of numbers are broken first, then the widest column gives way.
    """
    cells = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in columns]
    least = [
        max(map(len, " ".join([heading, *own]).split()), default=0) for heading, own in zip(columns, cells, strict=True)
    ]
    widest = [max(map(len, [heading, *own])) for heading, own in zip(columns, cells, strict=True)]
    most -= len(GAP) * (len(columns) - 1)
    if sum(widest) > most:
        for i in right:
            widest[i] = max(least[i], *map(len, cells[i]), 0)
    while sum(widest) > most:
        wide = [i for i, size in enumerate(widest) if size > least[i]]
        if not wide:
            return None
        widest[max(wide, key=lambda i: (widest[i], i))] -= 1
    return widest


def _stacked(columns: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row as its first cell, and below it the others with their headings, as many in a line as it holds."""
    lines, here = wrap(row[0], width()), ""
    for heading, cell in zip(columns[1:], row[1:], strict=True):
        pair = "  " + f"{heading} {cell}".strip() if cell else ""
        if len(here) + len(pair) > width():
            lines += wrap(here, width())
            here = ""
        here += pair
    return [*lines, *wrap(here, width())]
