"""A run directory: opened for one plan, its metrics a line at a time, its files whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, TextIO

from supar_cli.errors import InputError, SetupError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan, parse


def start(directory: Path, plan: Plan, *, resume: bool, force: bool) -> None:
    """Make a run directory ready. Raises InputError when it holds another run, or this one and neither flag was given."""
    existing = directory / "plan.yaml"
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file; expected a folder for --out")
    if existing.is_file():
        other = parse(Plan, document.read_file(str(existing))[0])
        if resume and other.hash() != plan.hash():
            raise InputError(
                f"{directory}: holds a run of another plan ({other.hash()[:19]}…, this one is {plan.hash()[:19]}…)"
            )
        if not resume and not force:
            raise InputError(
                f"{directory}: holds a run already; expected --resume to continue it or --force to start again"
            )
    elif directory.exists() and any(directory.iterdir()) and not force:
        raise InputError(f"{directory}: exists and is no run directory; expected another --out")
    try:
        if force and not resume and existing.is_file():
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
            for name in ("metrics.jsonl", "result.json"):
                (directory / name).unlink(missing_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
        document.write_file(existing, document.write([plan.model_dump()]))
    except OSError as error:
        raise SetupError(f"{directory}: can't be written: {error.strerror or error}") from None


class Metrics:
    """metrics.jsonl of a run: `before` are the records of steps already done; lines of steps to be done again are dropped."""

    def __init__(self, directory: Path | None, done: int) -> None:
        self._file: TextIO | None = None
        self.before: list[dict[str, Any]] = []
        if directory is not None:
            path = directory / "metrics.jsonl"
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= done] if done else []
            self.before = [json.loads(line) for line in kept]
            document.write_file(path, "".join(kept))
            self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def _lines(path: Path) -> list[str]:
    """Complete lines of a file; the last one of a killed run may be cut."""
    if not path.is_file():
        return []
    return [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("}\n")]
