"""A run directory as data and text: its state, how far it is, its last losses, and a curve drawn in characters."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supar_cli.errors import SetupError, SuparError
from supar_cli.files import Record, read_json, read_jsonl
from supar_cli.planning.plan import Plan, read_plan
from supar_cli.reporting.result import finite
from supar_cli.training import run_directory

LOSSES = {"loss": "training", "validation_loss": "validation"}
POINTS = 200  # chosen: more than a figure of this size shows
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Unicode braille cell: 4 rows of 2


@dataclass(frozen=True)
class Run:
    """What a run directory holds. `result` is None before the run's end; `summary` is what `supar runs` lists."""

    plan: Plan
    records: list[Record]
    result: Record | None
    summary: dict[str, Any]

    @property
    def environment(self) -> Record:
        """What it ran on and with; empty before its end."""
        found = (self.result or {}).get("environment")
        return found if isinstance(found, dict) else {}


def read_run(folder: Path) -> Run:
    """A run directory as it stands. Raises SuparError that names the file."""
    plan, path = read_plan(folder / "plan.yaml"), folder / "metrics.jsonl"
    records = read_jsonl(path, "step")
    for at, record in enumerate(records, 1):
        if not isinstance(record["step"], int) or not isinstance(record.get("grad_norm_by_role", {}), dict):
            raise SetupError(f"{path}:{at}: not the record of a step; expected a whole `step` and norms by role")
    result = run_directory.read_result(folder / "result.json") if (folder / "result.json").exists() else None
    state, text = _state(folder, result is not None)
    summary = {
        "run": str(folder),
        "state": state,
        "step": records[-1]["step"] if records else 0,
        "steps": plan.train.steps,
        **{name: next(reversed(series(records, name).values()), None) for name in LOSSES},
        "written": time_written(_last_file(folder)),
        "text": text,
    }
    return Run(plan, records, result, summary)


def _state(folder: Path, is_finished: bool) -> tuple[str, str]:
    """(running, finished, preempted, failed or killed; why it ended)."""
    if run_directory.is_open(folder):
        return "running", ""
    if is_finished:
        return "finished", ""
    path = folder / run_directory.STATUS_FILE
    ended = read_json(path) if path.exists() else {}
    if not isinstance(ended, dict):
        raise SetupError(f"{path}: is corrupt; expected a state and a text")
    return str(ended.get("state", "killed")), str(ended.get("text", ""))


def summary(folder: Path) -> dict[str, Any]:
    """One run as plain data. A directory that can't be read has the state `unreadable` and says why."""
    try:
        return read_run(folder).summary
    except SuparError as error:
        return {"run": str(folder), "state": "unreadable", "text": str(error).splitlines()[0]}


def details(folder: Path) -> Run:
    """A run directory to be shown. Raises SetupError."""
    try:
        return read_run(folder)
    except SuparError as error:
        raise SetupError(str(error).splitlines()[0]) from None


def folders(root: Path) -> list[Path]:
    """Run directories in a folder or one below it, the last written first."""
    found = [path.parent for pattern in ("plan.yaml", "*/plan.yaml", "*/*/plan.yaml") for path in root.glob(pattern)]
    runs = [path for path in found if any((path / name).exists() for name in ("lock", "metrics.jsonl", "checkpoints"))]
    return sorted(runs, key=lambda path: _last_file(path).stat().st_mtime, reverse=True)


def _last_file(folder: Path) -> Path:
    return next(path for name in ("result.json", "metrics.jsonl", "plan.yaml") if (path := folder / name).exists())


def time_written(path: Path) -> str:
    """When a file was last written, UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(path.stat().st_mtime))


def series(records: list[Record], name: str) -> dict[float, float | None]:
    """A quantity by step; None where it is there and not finite."""
    return {one["step"]: finite(one[name]) for one in records if name in one}


def downsample(by_step: dict[float, float | None]) -> tuple[dict[float, float | None], int]:
    """(means of equal numbers of neighbours, at their last step; how many each). A gap inside makes a gap."""
    each = max(1, math.ceil(len(by_step) / POINTS))
    items = [(step, math.nan if y is None else y) for step, y in sorted(by_step.items())]
    groups = [items[at : at + each] for at in range(0, len(items), each)]
    return {group[-1][0]: finite(sum(y for _, y in group) / len(group)) for group in groups}, each


def curve(records: list[Record], name: str, width: int, height: int) -> list[str]:
    """A quantity over steps in `height` lines of braille, `width` characters wide with its axis; none without numbers."""
    known = {step: y for step, y in downsample(series(records, name))[0].items() if y is not None}
    if not known:
        return []
    low, high = min(known.values()), max(known.values())
    first, last = min(known), max(known)
    labels = [f"{value:.4g}" for value in (high, low)]
    margin = max(map(len, labels)) + 2
    cells = [[0] * (width - margin) for _ in range(height)]
    for step, y in known.items():
        across = round((step - first) / max(last - first, 1) * (2 * (width - margin) - 1))
        down = round((high - y) / ((high - low) or 1) * (4 * height - 1))
        cells[down // 4][across // 2] |= DOTS[down % 4][across % 2]
    lines = ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
    left = [labels[0], *[""] * (height - 2), labels[1]]
    steps = f"{'':{margin}}{first:g}{f'step {last:g}':>{width - margin - len(f'{first:g}')}}"
    return [f"{label:>{margin - 2}} ┤{line}" for label, line in zip(left, lines, strict=True)] + [steps]
