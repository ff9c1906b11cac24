"""What a measurement found, as one type: verdicts, tables and figures. Written as result.json, read back, shown.

Figures are data, so that results store them and `--json` has them. A `y` of null is a loss that is not finite and leaves a
gap; `ring` is the index of a point with a ring around it; `vertical` is the x of a grey band; `low` and `high` bound an
interval. JSON files keep the keys that were given, in this order.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from supar_cli.files import write_file

NAMES = {"lr": "learning rate", "init_std": "init std", "weight_decay": "weight decay"}
TITLES = {
    "sp": "SP (standard parameterization)",
    "mup": "μP",
    "supar": "SμPar",
    "supar-init-only": "SμPar's init only",
    "supar-lr-only": "SμPar's learning rate only",
}


class _Data(BaseModel):
    """Unknown keys of a file are kept; values of another type are refused."""

    model_config = ConfigDict(extra="allow")


def _drawable(y: float | None) -> float | None:
    """JSON has no NaN; Python's reader lets it and infinities through."""
    return y if y is not None and abs(y) < float("inf") else None


Number = int | Annotated[float, Field(allow_inf_nan=False)]
Gap = Annotated[int | float | None, AfterValidator(_drawable)]


class Line(_Data):
    label: str = ""
    x: list[Number]
    y: list[Gap]
    ring: int | None = None
    low: list[Gap] | None = None
    high: list[Gap] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Line:
        lengths = {len(values) for values in (self.x, self.y, self.low, self.high) if values is not None}
        if len(lengths) > 1 or (self.low is None) != (self.high is None):
            raise ValueError("x, y, low and high are of different lengths")
        if self.ring is not None and not 0 <= self.ring < len(self.x):
            raise ValueError("ring is not the index of a point")
        return self

    @classmethod
    def through(cls, label: str, points: dict[float, float | None], *, ring: float | None = None) -> Line:
        """A line through points by their x, in order; `ring` is the x of the point to ring."""
        xs = sorted(points)
        return cls(label=label, x=xs, y=[points[x] for x in xs], ring=None if ring is None else xs.index(ring))


class Panel(_Data):
    title: str = ""
    vertical: float | None = None
    lines: list[Line]


class Figure(_Data):
    """A row of panels with common axes."""

    name: str
    title: str
    x: str
    y: str
    x_log2: bool = False
    y_log2: bool = False
    y_limits: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    panels: list[Panel] = Field(min_length=1)

    def save(self, path: Path) -> None:
        """Draw it into a file of the kind that its name says."""
        from supar_cli.reporting import figures

        figures.save(self, path)


def loss_figure(title: str, x: str, panels: list[Panel], name: str = "loss") -> Figure:
    """Validation loss over `x`, as sweeps and the demo show it."""
    losses = [y for panel in panels for line in panel.lines for y in line.y if y is not None]
    y, limits = "validation loss (nats per token)", loss_limits(losses)
    return Figure(name=name, title=title, x=x, y=y, x_log2=True, y_log2=False, y_limits=limits, panels=panels)


class Verdict(_Data):
    """`passed` is None where nothing could be decided. A control is to fail, and its text says so."""

    what: str
    passed: bool | None
    control: bool = False
    text: str = ""

    @property
    def is_violated(self) -> bool:
        """Whether a check ends with status 5 for it."""
        return self.passed is False and not self.control


class Table(_Data):
    """Cells are texts or numbers. `folded`: shown when asked for."""

    title: str
    columns: list[str]
    rows: Sequence[Sequence[str | float | int | bool | None]]
    folded: bool = False


class Result(_Data):
    """result.json of a check, sweep or comparison, as `supar report` reads it; further keys are the measurement's own."""

    kind: str
    title: str
    verdicts: list[Verdict]
    tables: list[Table]
    figures: list[Figure]
    command: str = Field(default_factory=lambda: command_line())
    parents: dict[str, str]
    environment: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """The data of result.json."""
        found = self.model_dump(exclude_unset=True)
        return {
            **{key: found[key] for key in ("kind", "title", "verdicts", "tables", "figures")},
            "command": self.command,
            **found,
        }

    def write(self, folder: Path, log: Callable[[str], None]) -> None:
        """Write result.json and a PNG of each figure."""
        text = json.dumps(self.document(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_file(folder / "result.json", text)
        for figure in self.figures:
            figure.save(folder / f"{figure.name}.png")
        names = ", ".join(["result.json", *(f"{figure.name}.png" for figure in self.figures), "records.jsonl"])
        log(f"wrote {folder}/: {names}")


def line(label: str, points: dict[float, float | None], *, ring: float | None = None) -> dict[str, Any]:
    """`Line.through` as data."""
    return Line.through(label, points, ring=ring).model_dump(exclude_unset=True)


def command_line() -> str:
    """The command that runs, as a shell reads it."""
    return shlex.join(["supar", *sys.argv[1:]])


def finite(value: float | None) -> float | None:
    """A number that JSON and a figure can hold, else None."""
    return value if value is not None and isfinite(value) else None


def fraction(density: float) -> str:
    """1/16 for 0.0625; a density that is not such a fraction stays a decimal."""
    if density == 1:
        return "1"
    whole = round(1 / density)
    return f"1/{whole}" if whole * density == 1 else f"{density:g}"


def loss_limits(losses: list[float]) -> list[float] | None:
    """Limits of a loss axis: a diverging end of a curve would flatten the rest. None without losses."""
    return [min(losses) - 0.05, min(max(losses), min(losses) + 1.5) + 0.05] if losses else None
