"""Lines of `supar explain`: labels before wrapped parts, numbers, and the places of tensors that share an explanation."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from textwrap import wrap
from typing import Any

from supar_cli.planning.plan import PlanTensor

COLUMNS, INDENT = 79, 16
WRAPPING: dict[str, Any] = {"width": COLUMNS, "break_long_words": False, "break_on_hyphens": False}
UNBROKEN = "\N{NO-BREAK SPACE}"


def places(rows: Iterable[PlanTensor]) -> str:
    """Names of tensors, those of equal sites in one: `attn.q, attn.k in blocks 0–3`."""
    blocks: dict[str, list[int]] = {}
    for row in rows:
        blocks.setdefault(row.site, []).extend([] if row.block is None else [row.block])
    found: dict[str, list[str]] = {}
    for site, numbers in blocks.items():
        found.setdefault(_ranges(numbers), []).append(site)
    return "; ".join(", ".join(sites) + place for place, sites in found.items())


def _ranges(blocks: list[int]) -> str:
    """` in blocks 0–3, 5` for the numbers of blocks."""
    if not blocks:
        return ""
    # consecutive block numbers have the same difference to their index
    runs = [[block for _, block in run] for _, run in groupby(enumerate(sorted(blocks)), lambda at: at[1] - at[0])]
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f" in block{'s' if len(blocks) > 1 else ''} {words}"


def short(value: float) -> str:
    """Six significant digits at most."""
    return f"{value:.6g}"


def wrapped(label: str | None, parts: Iterable[str]) -> list[str]:
    """Parts on as few lines as possible after a label, without breaking a part. None: flush left, for a title."""
    indent = 4 if label is None else INDENT
    first = "" if label is None else f"  {label:<{INDENT - 2}}"
    text = " ".join(part.replace(" ", UNBROKEN) for part in parts)
    lines = wrap(text, initial_indent=first, subsequent_indent=" " * indent, **WRAPPING) or [first.rstrip()]
    return [line.replace(UNBROKEN, " ") for line in lines]
