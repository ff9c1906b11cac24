"""What a check or a sweep has measured: one JSON line a run, added as runs end, so that interrupted work goes on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from supar_cli.errors import InputError, SetupError, SuparError, UnusableResult
from supar_cli.files import write_file
from supar_cli.jobs.workers import Failure, Workers, validation_loss
from supar_cli.jobs.workers import require_runnable as require_runnable
from supar_cli.planning.plan import Plan
from supar_cli.reporting import figures
from supar_cli.training.runtime import versions

Record = dict[str, Any]


def measure_loss(plan: Plan, about: Record) -> Record:
    """The record of a run: `about` it, its `loss`, `seconds`, and `state`: done, diverged or failed, with `why`."""
    started = time.monotonic()
    record: Record = {**about, "plan": plan.hash(), "state": "done", "loss": None}
    try:
        record["loss"] = validation_loss(plan)
    except UnusableResult as error:
        record |= {"state": "diverged", "why": str(error)}
    except (RuntimeError, MemoryError) as error:  # torch's own errors, out of memory among them
        if isinstance(error, SuparError):
            raise
        record |= {"state": "failed", "why": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return {**record, "seconds": round(time.monotonic() - started, 2)}


def failed_record(plan: Plan, about: Record, why: str) -> Record:
    """The record of a run whose worker died each time."""
    return {**about, "plan": plan.hash(), "state": "failed", "loss": None, "why": why}


class Records:
    """Records of a folder's records.jsonl by their `run`, the hash of what was run.

    A line that a killed process cut is dropped. Raises SetupError when the file can't be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "records.jsonl"
        self.by_run: dict[str, Record] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text("utf-8").splitlines(keepends=True) if self.path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]
            if len(whole) < len(lines):
                write_file(self.path, "".join(whole))
        except OSError as error:
            raise SetupError(f"{self.path}: can't be written: {error.strerror or error}") from None
        for number, line in enumerate(whole, 1):
            try:
                record = json.loads(line)
                self.by_run[record["run"]] = record
            except (ValueError, KeyError, TypeError):
                raise SetupError(f"{self.path}:{number}: not a record; expected a JSON object with `run`") from None

    def add(self, record: Record) -> None:
        """Append a record and flush it to disk."""
        self.by_run[record["run"]] = record
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SetupError(f"{self.path}: can't be written: {error.strerror or error}") from None

    def complete(
        self,
        function: Callable[..., Record],
        calls: dict[str, tuple[Any, ...]],
        workers: Workers,
        died: Callable[..., Record] | None = None,
    ) -> Iterator[tuple[int, int, Record]]:
        """Make the calls whose run is not recorded yet: (done, of all, its record) as each ends, the recorded ones first.

        `function` returns its record without `run`, with `state`: `done`, or why not (`diverged`, `failed`) and `why`.
        `died`, of the call and why, is the record of one that takes its workers down each time; SetupError without it.
        """
        missing = {run: call for run, call in calls.items() if run not in self.by_run}
        done = len(calls) - len(missing)
        for run in calls:
            if run not in missing:
                yield done, len(calls), self.by_run[run]
        runs = list(missing)
        for index, record in workers.results(function, list(missing.values())):
            if isinstance(record, Failure):
                if died is None:
                    raise SetupError(f"a run's worker died each time it was started: {record.why}")
                record = died(*missing[runs[index]], record.why)
            self.add({"run": runs[index], **record})
            done += 1
            yield done, len(calls), self.by_run[runs[index]]


def open_study_folder(folder: Path, question: dict[str, Any], force: bool) -> None:
    """Make a folder ready for a question (what is measured): its question.json identifies it, but for its `seeds`.

    Raises InputError when the folder holds the answer to another question and `force` is not set; with it, starts anew.
    """
    path = folder / "question.json"
    text = json.dumps(question, indent=1, sort_keys=True) + "\n"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder for --out")
    if path.is_file() and not force and _asked(path.read_text("utf-8")) != _asked(text):
        raise InputError(
            f"{folder}: holds the answer to another question; expected --force to start again or another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if force:
            (folder / "records.jsonl").unlink(missing_ok=True)
        write_file(path, text)
    except OSError as error:
        raise SetupError(f"{folder}: can't be written: {error.strerror or error}") from None


def _asked(text: str) -> Any:
    """A question without its seeds: with more, its answer goes on."""
    try:
        asked = json.loads(text)
    except ValueError:
        return None
    return {**asked, "seeds": None} if isinstance(asked, dict) else asked


def environment(workers: Workers) -> dict[str, Any]:
    """Versions and machine, as results state them."""
    cuda = torch.cuda.is_available()
    where = "" if workers.here else f" on {type(workers).__name__}"
    return {
        **versions(),
        "numpy": np.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {workers.jobs} jobs{where}",
        "cuda": torch.cuda.get_device_name() if cuda else None,
    }


def write_result(folder: Path, result: dict[str, Any], log: Callable[[str], None]) -> None:
    """result.json and a PNG of each figure."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(folder / "result.json", text)
    for figure in result["figures"]:
        figures.save(figure, folder / f"{figure['name']}.png")
    names = ", ".join(["result.json", *(f"{figure['name']}.png" for figure in result["figures"]), "records.jsonl"])
    log(f"wrote {folder}/: {names}")


def result(
    kind: str,
    title: str,
    *,
    verdicts: list[dict[str, Any]],
    tables: list[dict[str, Any]],
    figures: list[dict[str, Any]],
    parents: dict[str, str],
    environment: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """What result.json of a check, sweep or comparison holds, as `supar report` reads it.

    A verdict is {what, passed, control, text}: a control is to fail, and says so in its text. A table is {title, columns,
    rows}, its cells texts or numbers. Figures are those of `figures`.
    """
    return {
        "kind": kind,
        "title": title,
        "verdicts": verdicts,
        "tables": tables,
        "figures": figures,
        "command": shlex.join(["supar", *sys.argv[1:]]),
        "parents": parents,
        "environment": environment,
        **more,
    }
