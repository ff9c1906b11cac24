"""What every benchmark has: settings, a measurement, a document of both, and its comparison with an earlier document."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from supar_cli.errors import InputError
from supar_cli.reporting.result import Figure, Table, command_line
from supar_cli.sparse.csr import numba_version
from supar_cli.training.runtime import device_name, versions

KIND = "supar.bench/v1"
WORSE = 0.1  # chosen: a smaller loss than a tenth is not worth an alarm, even where it is certain
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """A measured number and the quartiles of its rounds. `is_gain`: whether larger is better."""

    value: float
    low: float
    high: float
    is_gain: bool = True

    @classmethod
    def ratio(cls, above: list[float], below: list[float]) -> Reading:
        """The median of a ratio over rounds; each ratio is taken within one round."""
        low, middle, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
        return cls(middle, low, high)

    @classmethod
    def read(cls, found: Document, name: str) -> Reading:
        """The reading that `fields` wrote."""
        low, high = map(float, found[f"{name}_quartiles"])
        return cls(float(found[name]), low, high)

    def fields(self, name: str) -> Document:
        return {name: round(self.value, 4), f"{name}_quartiles": [round(self.low, 4), round(self.high, 4)]}

    def cells(self) -> list[str]:
        return [f"{self.value:.3f}", f"{self.low:.3f} to {self.high:.3f}"]

    def change_to(self, now: Reading | None) -> Document:
        """The current reading next to this one; worse if it lost more than WORSE and the quartile ranges don't overlap."""
        if now is None:
            return {"now": None, "change": None, "worse": False}
        change = now.value / self.value - 1
        is_worse = change < -WORSE and now.high < self.low if self.is_gain else change > WORSE and now.low > self.high
        return {"now": round(now.value, 4), "change": round(change, 4), "worse": is_worse}


@dataclass(frozen=True)
class Benchmark:
    """A measurement and how its document is read: as tables, as a figure, and as the readings that are compared.

    Documents are compared where their `settings` are equal.
    """

    name: str
    settings: Document
    device: torch.device
    measure: Callable[[], Document]
    tables: Callable[[Document], list[Table]]
    readings: Callable[[Document], dict[str, Reading]]
    figure: Callable[[Document], Figure] | None = None

    def run(self) -> Document:
        """Measure and return the result document."""
        start = {"kind": KIND, "bench": self.name, **self.settings}
        return start | self.measure() | {"environment": environment(self.device)}

    def earlier(self, name: str, document: Any) -> dict[str, Reading]:
        """The readings of a file's document. Raises InputError, naming every difference, where it can't be compared."""
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise InputError(f"{name}: kind: is not {KIND}; expected what `supar bench {self.name}` wrote")
        if document.get("bench") != self.name:
            raise InputError(f"{name}: bench: is {document.get('bench')!r}; expected {self.name}")
        different = [
            f"{name}: {key}: is {document.get(key)!r} in the earlier result, {value!r} now; expected the same settings"
            for key, value in self.settings.items()
            if document.get(key) != value
        ]
        if different:
            raise InputError(*different)
        try:
            return self.readings(document)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise InputError(f"{name}: is not a complete document of `supar bench {self.name}` ({error!r})") from None


def machine_settings(device: torch.device, precision: str) -> Document:
    """The settings that come from the machine."""
    return {"device": device_name(device), "precision": precision}


def environment(device: torch.device) -> Document:
    """What a measurement ran on and with, when (UTC), and the command line."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        **versions(),
        "numba": numba_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
    }


def compare(earlier: dict[str, Reading], now: dict[str, Reading]) -> list[Document]:
    """Each earlier reading with the current one, None if there is no current one."""
    return [
        {"what": what, "then": round(then.value, 4), "better": "larger" if then.is_gain else "smaller"}
        | then.change_to(now.get(what))
        for what, then in earlier.items()
    ]


def comparison_table(name: str, rows: list[Document]) -> Table:
    """What `compare` found against the document of a file."""
    cells = [
        [
            row["what"],
            f"{row['then']:.4g}",
            *(["–", "–"] if row["now"] is None else [f"{row['now']:.4g}", f"{100 * row['change']:+.1f} %"]),
            "WORSE" if row["worse"] else "",
        ]
        for row in rows
    ]
    return Table(title=f"against {name}", columns=["", "then", "now", "change", ""], rows=cells)
