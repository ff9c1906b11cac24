"""Running a plan for its loss, and the records of a folder's runs, so that no run is repeated."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from supar_cli.errors import InputError, RunFailed, SetupError, UnusableResult
from supar_cli.files import Record, append_lines, naming_write_errors, read_jsonl, write_file
from supar_cli.jobs.command import require_command, run_command
from supar_cli.jobs.workers import Call, Function, WorkerFailure, Workers
from supar_cli.planning.plan import Plan
from supar_cli.planning.plan_sections import OwnModel
from supar_cli.training.run_directory import RunHistory
from supar_cli.training.runtime import Runtime, batch_shares, device_of, lacks_memory, used_device, versions
from supar_cli.training.tasks import load_task
from supar_cli.training.trainer import Trainer


def require_runnable(plan: Plan, device: bool = True, warn: Callable[[str], None] = lambda _: None) -> None:
    """Raise errors of a plan's data, and of its device if it is on this machine, before any work is done.

    `warn` is told what is wrong with the data or slow on the device. Of a user's model only the command is known.
    """
    if isinstance(plan.model, OwnModel):
        require_command(plan)
        return
    found: list[str] = []
    if device and device_of(plan.run.device).type == "cuda":
        batch_shares(plan)  # the rest is checked by its worker: CUDA used here would take memory from runs
    elif device:
        found = Runtime.of(plan).warnings
    for message in [*found, *getattr(load_task(plan), "warnings", ())]:
        warn(message)


def train_plan(
    plan: Plan, on_evaluation: Callable[[int, float], None] | None = None, folder: Path = Path("trials")
) -> RunHistory:
    """Train a plan without a directory. Raises UnusableResult when it diverges, RunFailed where memory is short.

    Trials, finalists, fit runs and the runs of sweeps are all made here. With `compile: auto` a plan is
    not compiled: compiling takes longer than a proxy's trial. Where nobody asks, only the last step is evaluated. A plan of
    a user's model is trained by its command, whose files are kept in `folder`.
    """
    if isinstance(plan.model, OwnModel):
        return run_command(plan, folder, on_evaluation)
    if plan.run.compile == "auto":
        plan = plan.model_copy(update={"run": plan.run.model_copy(update={"compile": "off"})})
    if on_evaluation is None:
        plan = plan.model_copy(update={"train": plan.train.model_copy(update={"eval_every": plan.train.steps})})
    try:
        return Trainer(plan, load_task(plan)).run(on_evaluation=on_evaluation)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        text = f"{error}".partition("\n")[0]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the next trial of this process
    raise RunFailed(f"out of memory: {text}; expected a smaller run.micro_batch_size or model")


def validation_loss(plan: Plan, folder: Path = Path("trials")) -> float:
    """The last validation loss of a plan, trained as by `train_plan`. Raises UnusableResult when it diverges."""
    return train_plan(plan, folder=folder).evaluations[-1][1]


def measure_loss(plan: Plan, about: Record, folder: Path) -> Record:
    """The record of a run: `about` it, its `loss`, `seconds`, and `state`: done, diverged or failed, with `why`.

    `folder` is that of `train_plan`.
    """
    started = time.monotonic()
    try:
        outcome: Record = {"state": "done", "loss": validation_loss(plan, folder)}
    except UnusableResult as error:
        outcome = {"state": "diverged", "loss": None, "why": str(error)}
    except RunFailed as error:
        outcome = {"state": "failed", "loss": None, "why": str(error)}
    except (RuntimeError, MemoryError) as error:  # torch's own errors, out of memory among them
        text = f"{error}".partition("\n")[0]
        outcome = {"state": "failed", "loss": None, "why": f"{type(error).__name__}: {text}"}
    return {**about, "plan": plan.hash(), **outcome, **used_device(), "seconds": round(time.monotonic() - started, 2)}


def failed_record(plan: Plan, about: Record, folder: Path, why: str) -> Record:
    """The record of a run whose worker died each time."""
    return {**about, "plan": plan.hash(), "state": "failed", "loss": None, "why": why}


class Records:
    """Records of a folder's records.jsonl by their `run`, the hash of what was run; a truncated line is ignored.

    A run whose last record is not `usable` is made again. Raises SetupError when the file can't be read or written.
    """

    def __init__(self, folder: Path, usable: Callable[[Record], bool] = bool) -> None:
        self.path = folder / "records.jsonl"
        with naming_write_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
        last = {str(record["run"]): record for record in read_jsonl(self.path, "run")}
        self.by_run: dict[str, Record] = {run: record for run, record in last.items() if usable(record)}

    def add(self, record: Record) -> None:
        """Append a record and flush it to disk."""
        self.by_run[record["run"]] = record
        with naming_write_errors(self.path):
            append_lines(self.path, json.dumps(record, allow_nan=False) + "\n")

    def complete(
        self,
        function: Function,
        calls: dict[str, Call],
        workers: Workers,
        on_failure: Callable[..., Record] | None = None,
    ) -> Iterator[tuple[int, int, Record]]:
        """Yield (number done, total, record) as each run ends, recorded ones first; only runs without a record are made.

        `function` returns a record without `run`. `on_failure`, of the call and why, returns the record of one whose
        worker died each time; SetupError without it.
        """
        runs = [run for run in calls if run not in self.by_run]
        recorded = [run for run in calls if run in self.by_run]
        for run in recorded:
            yield len(recorded), len(calls), self.by_run[run]
        results = workers.results(function, [calls[run] for run in runs])
        for done, (index, record) in enumerate(results, len(recorded) + 1):
            run = runs[index]
            if isinstance(record, WorkerFailure):
                if on_failure is None:
                    raise SetupError(f"a run's worker died each time it was started: {record.why}")
                record = on_failure(*calls[run], record.why)
            self.add({"run": run, **record})
            yield done, len(calls), self.by_run[run]


def open_study_folder(folder: Path, question: Record, force: bool) -> Record:
    """Prepare a folder for a measurement. Its question.json holds the measurement's settings, which identify it except for `seeds`.

    Returns them, with the `script` that the measurement began with. Raises InputError if the folder holds a measurement with
    other settings; `force` discards that one.
    """
    path = folder / "question.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder for --out")
    if path.is_file() and not force:
        before = _read_question(path.read_bytes())
        if _without_seeds(before) != _without_seeds(_read_question(json.dumps(question))):
            raise InputError(
                f"{folder}: holds the records of another measurement; expected --force to start again or another --out"
            )
        question = {**question, **{key: value for key, value in before.items() if key == "script"}}
    with naming_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if force:
            (folder / "records.jsonl").unlink(missing_ok=True)
        write_file(path, json.dumps(question, indent=1, sort_keys=True) + "\n")
    return question


def _read_question(text: str | bytes) -> Record:
    """The settings in a question.json; none in one that is damaged."""
    try:
        question = json.loads(text)
    except ValueError:
        return {}
    return question if isinstance(question, dict) else {}


def _without_seeds(question: Record) -> Record:
    """The settings without what only adds runs or judges them: with more seeds the same measurement continues."""
    arms = {
        name: {key: value for key, value in arm.items() if value is not None and key not in ("control", "marks")}
        for name, arm in question.get("arms", {}).items()
    }
    return {
        **question,
        "arms": arms,
        "seeds": None,
        "first_seeds": None,
        "robustness": None,
        "aggregate": None,
        "script": None,
    }


def environment(workers: Workers, records: Iterable[Record] = ()) -> Record:
    """Versions and machine, as results state them, and the CUDA devices that the runs of these records used."""
    elsewhere = "" if workers.is_local else f" on {type(workers).__name__}"
    return {
        **versions(),
        "numpy": np.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {workers.jobs} jobs{elsewhere}",
        "cuda": ", ".join(sorted({record["cuda"] for record in records if "cuda" in record})) or None,
    }
