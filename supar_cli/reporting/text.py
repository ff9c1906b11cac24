"""What a run directory tells of its run: state, progress, last losses, and a curve drawn in text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from supar_cli.errors import SetupError, SuparError
from supar_cli.files import Record
from supar_cli.planning.plan import Plan
from supar_cli.reporting.run_parts import finite, last_written, points, run_files, state, thinned

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Unicode braille cell: 4 rows of 2


def folders(root: Path) -> list[Path]:
    """Run directories in a folder or one below it, the last written first."""
    found = [path.parent for pattern in ("plan.yaml", "*/plan.yaml", "*/*/plan.yaml") for path in root.glob(pattern)]
    runs = [path for path in found if any((path / name).exists() for name in ("lock", "metrics.jsonl", "checkpoints"))]
    return sorted(runs, key=lambda path: _latest(path).stat().st_mtime, reverse=True)


def summary(folder: Path) -> dict[str, Any]:
    """One run as plain data. A directory that can't be read has the state `unreadable` and says why."""
    try:
        plan, records, result = run_files(folder)
        word, text = state(folder, result)
    except SuparError as error:
        return {"run": str(folder), "state": "unreadable", "text": str(error).splitlines()[0]}
    return {
        "run": str(folder),
        "state": word,
        "step": records[-1]["step"] if records else 0,
        "steps": plan.train.steps,
        "loss": _last(records, "loss"),
        "validation_loss": _last(records, "validation_loss"),
        "written": last_written(_latest(folder))[0],
        "text": text,
    }


def details(folder: Path) -> tuple[Plan, dict[str, Any], list[Record], dict[str, Any]]:
    """(plan, summary, metrics, environment) of a run; the environment is empty before its end. Raises SuparError."""
    found = summary(folder)
    if found["state"] == "unreadable":
        raise SetupError(found["text"])
    plan, records, result = run_files(folder)
    environment = (result or {}).get("environment")
    return plan, found, records, environment if isinstance(environment, dict) else {}


def curve(records: list[Record], name: str, width: int, height: int) -> list[str]:
    """A quantity over steps in `height` lines of braille, `width` characters wide with its axis; none without numbers."""
    known = {step: y for step, y in thinned(points(records, name))[0].items() if y is not None}
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


def _last(records: list[Record], name: str) -> float | None:
    return next((finite(record[name]) for record in reversed(records) if name in record), None)


def _latest(folder: Path) -> Path:
    return next(path for name in ("result.json", "metrics.jsonl", "plan.yaml") if (path := folder / name).exists())
