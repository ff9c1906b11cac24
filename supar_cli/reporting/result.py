"""What a measurement found, as one type: verdicts, tables and figures. Written as result.json, read back, shown.

Figures are data, so that results store them and `--json` has them. A `y` of null is a loss that is not finite and leaves a
gap; `ring` is the index of a point with a ring around it; `vertical` is the x of a grey band; `low` and `high` bound an
interval. JSON files keep the keys that were given, in this order.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from supar_cli.errors import SetupError
from supar_cli.planning.document import dotted

NAMES = {"lr": "learning rate", "init_std": "init std", "weight_decay": "weight decay"}
NAMES |= {"embedding_lr_ratio": "rate ratio of embeddings", "head_lr_ratio": "rate ratio of the head"}
TITLES = {
    "sp": "SP (standard parameterization)",
    "sp-si": "SP, sparse-aware init",
    "mup": "μP",
    "supar": "SμPar",
    "supar-init-only": "SμPar's init only",
    "supar-lr-only": "SμPar's learning rate only",
}


def finite(value: Any) -> float | None:
    """A number that JSON and a figure can hold, else None."""
    return value if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def fraction(density: float) -> str:
    """1/16 for 0.0625; a density that is not such a fraction stays a decimal."""
    if density == 1:
        return "1"
    whole = round(1 / density)
    return f"1/{whole}" if whole * density == 1 else f"{density:g}"


def command_line() -> str:
    """The command that runs, as a shell reads it."""
    return shlex.join(["supar", *sys.argv[1:]])


class Data(BaseModel):
    """Part of a file that supar wrote: unknown keys are kept, values of another type are refused."""

    model_config = ConfigDict(extra="allow")

    @classmethod
    def parse(cls, found: dict[str, Any], path: Path) -> Self:
        """A file's data as this type; a null is read as a missing key. Raises SetupError that names file and place."""
        try:
            return cls.model_validate({key: value for key, value in found.items() if value is not None})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise SetupError(f"{path}: {dotted(first['loc'])}: {first['msg'].removeprefix('Value error, ')}") from None


Number = int | Annotated[float, Field(allow_inf_nan=False)]
Gap = Annotated[int | float | None, AfterValidator(finite)]
Cell = str | bool | Number | None


class Line(Data):
    label: str = ""
    x: list[Number]
    y: list[Gap]
    ring: int | None = None
    low: list[Gap] | None = None
    high: list[Gap] | None = None

    @model_validator(mode="after")
    def _require_equal_lengths(self) -> Self:
        lengths = {len(values) for values in (self.x, self.y, self.low, self.high) if values is not None}
        if len(lengths) > 1 or (self.low is None) != (self.high is None):
            raise ValueError("x, y, low and high are of different lengths")
        if self.ring is not None and not 0 <= self.ring < len(self.x):
            raise ValueError("ring is not the index of a point")
        return self

    @classmethod
    def through(cls, label: str, points: dict[float, float | None], *, ring: float | None = None) -> Self:
        """A line through points by their x, in order; `ring` is the x of the point to ring."""
        xs = sorted(points)
        return cls(label=label, x=xs, y=[points[x] for x in xs], ring=None if ring is None else xs.index(ring))


class Panel(Data):
    title: str = ""
    vertical: Number | None = None
    lines: list[Line]


class Figure(Data):
    """A row of panels with common axes."""

    name: str
    title: str
    x: str
    y: str
    x_log2: bool = False
    y_log2: bool = False
    y_limits: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = None
    panels: list[Panel] = Field(min_length=1)

    @property
    def lines(self) -> list[Line]:
        return [line for panel in self.panels for line in panel.lines]

    @property
    def gaps(self) -> int:
        """Points that have no finite value."""
        return sum(y is None for line in self.lines for y in line.y)


def loss_text(unit: str | None) -> str:
    """What a sweep's losses are; the unit of those that a user's script reports is not known."""
    return f"validation loss ({unit})" if unit else "loss as the script reports it"


def loss_figure(
    title: str, x: str, panels: list[Panel], name: str = "loss", unit: str | None = "nats per token"
) -> Figure:
    """Validation loss over `x`, as sweeps and the demo show it: a diverging end of a curve would flatten the rest.

    Without a unit it isn't known where that begins.
    """
    losses = [y for panel in panels for line in panel.lines for y in line.y if y is not None]
    limits = [min(losses) - 0.05, min(max(losses), min(losses) + 1.5) + 0.05] if losses and unit else None
    y = loss_text(unit)
    return Figure(name=name, title=title, x=x, y=y, x_log2=True, y_log2=False, y_limits=limits, panels=panels)


class Verdict(Data):
    """`passed` is None where nothing could be decided. A control is expected to fail, and its text says so.

    Without `has_power` its interval is too wide for its threshold.
    """

    what: str
    passed: bool | None
    control: bool = False
    text: str = ""
    has_power: bool = True


def with_power(verdicts: list[Verdict]) -> list[Verdict]:
    """Verdicts and, if there are controls, one on the measurement itself: it has no power if a control misses no mark,
    or if the interval of what is measured is too wide.

    The marks of a control share what stands before the colon of `what`.
    """
    marks: dict[str, list[bool | None]] = {}
    for one in verdicts:
        if one.control:
            marks.setdefault(one.what.partition(":")[0], []).append(one.passed)
    passing = [name for name, found in marks.items() if all(found)]
    missing = all(False in found for found in marks.values())
    text = "every control misses, as it should" if missing else "undecided: a control neither passes nor misses"
    if passing:
        text = f"none: {', '.join(passing)} should miss, but passes; that others pass too shows nothing then"
    wide = [one.what for one in verdicts if not one.has_power]
    if wide:
        text = f"none: {', '.join(wide)}: the interval is too wide; more seeds narrow it"
    passed = False if passing or wide else True if missing else None
    return [*verdicts, Verdict(what="power", passed=passed, control=False, text=text)] if marks or wide else verdicts


class Table(Data):
    """Cells are texts or numbers. A `folded` table is shown when the reader opens it."""

    title: str
    columns: list[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False

    @model_validator(mode="after")
    def _require_whole_rows(self) -> Self:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"{self.title}: a row has {len(row)} cells; expected {len(self.columns)}, one per column"
                )
        return self


class Result(Data):
    """result.json of a check, sweep or comparison, as `supar report` reads it; further keys are the measurement's own."""

    kind: str
    title: str = ""
    verdicts: list[Verdict] = []
    tables: list[Table] = []
    figures: list[Figure] = []
    command: str = ""
    parents: dict[str, Any] = {}
    environment: dict[str, Any] = {}

    def document(self) -> dict[str, Any]:
        """The data of result.json."""
        return self.model_copy(update={"command": self.command or command_line()}).model_dump(exclude_unset=True)


class DemoCurve(Data):
    """A demo's losses by octaves from the proxy's learning rate."""

    parameterization: str
    density: float
    losses: dict[Annotated[float, Field(gt=-1000, lt=1000)], Gap]


class Demo(Data):
    """results.json of a demo."""

    curves: list[DemoCurve]
    regrets: list[dict[str, Cell]]
    verdicts: list[Verdict] = []
    proxy: str = "–"
    meta: dict[str, Any] = Field(default_factory=dict)


@dataclass
class ReportPart:
    """What a report shows of one input. `state` describes its progress; `facts` are texts by group and name."""

    source: str
    kind: str
    title: str
    state: str
    notes: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested data as texts by dotted name: a text as it is, nothing as a dash, other data as JSON."""
    if isinstance(value, dict):
        parts = [flatten(one, f"{prefix}.{key}" if prefix else str(key)) for key, one in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return {prefix or "value": "–" if value is None else text}
