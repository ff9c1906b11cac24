"""A run directory: its lock and its start for one plan, its status, its metrics and its result. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from supar_cli.errors import InputError, Preempted, SetupError
from supar_cli.files import Record, naming_write_errors, read_json, write_file
from supar_cli.planning import document
from supar_cli.planning.plan import Plan, read_plan
from supar_cli.training.launch.environment import is_rank_process, launcher_id, under_torchrun

LOCK_TRIES = 10  # chosen: for a second in all, as `is_open` of another process holds the lock for an instant
DIFFERENCES = 8  # chosen: how many differences of two plans a message lists
STATUS_FILE = "ended.json"  # how training ended, if it did not finish
DAMAGED_METRICS = "metrics.damaged.jsonl"  # metrics.jsonl before records that can't be read were dropped
FILES = ("metrics.jsonl", DAMAGED_METRICS, "result.json", "trackers.json", STATUS_FILE)
SCORES = ("validation_loss_se", "accuracy", "accuracy_se")  # of an evaluation, besides the loss that decides
FOLDERS = ("checkpoints", "tensorboard", "wandb")


@contextmanager
def open_run(directory: Path, plan: Plan, *, resume: bool, force: bool) -> Iterator[list[str]]:
    """Lock a directory while a run starts or continues there, and write a status file if the run does not finish.

    Yields what has changed in the plan's `run` section, such as `run.precision: float32 → bfloat16`. Raises InputError as
    `begin_run` does, if another process trains there, and under torchrun without `resume`.
    """
    if under_torchrun() and not resume:
        what = "a run can't start again under torchrun, whose restarts would do so too"
        raise InputError(f"{directory}: {what}; expected another --out or an empty directory")
    _refuse_foreign(directory, force)
    with naming_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory):
        changes = begin_run(directory, plan, resume=resume, force=force)
        try:
            with naming_write_errors(directory):
                (directory / STATUS_FILE).unlink(missing_ok=True)
            yield changes
        except BaseException as error:
            state = "preempted" if isinstance(error, Preempted | KeyboardInterrupt) else "failed"
            text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
            ended = {"state": state, "text": text} | ({"launcher": launcher_id()} if is_rank_process() else {})
            with suppress(OSError):  # the disk may be the cause
                write_file(directory / STATUS_FILE, json.dumps(ended) + "\n")
            raise


def preemption_reason(directory: Path) -> str:
    """Why a directory's run was preempted under the launcher of this process; empty if it was not."""
    with suppress(SetupError, KeyError, TypeError):
        ended = read_json(directory / STATUS_FILE)
        if is_rank_process() and ended["state"] == "preempted" and ended["launcher"] == launcher_id():
            return str(ended["text"])
    return ""


def _lock(directory: Path) -> TextIO:
    """Lock the directory. The system releases the lock when the process ends, however it ends."""
    with naming_write_errors(directory):
        file = (directory / "lock").open("a")
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:  # this file system has no locks: go on without one
            return file
    file.close()
    raise InputError(f"{directory}: another process is training there; expected another --out")


def _leftovers(directory: Path) -> set[Path]:
    """Temporary files and folders left by a process that was killed while it wrote or removed something."""
    patterns = [f".{name}.*" for name in ("plan.yaml", *FILES, *FOLDERS)]
    return {path for pattern in [*patterns, "checkpoints/.step-*"] for path in directory.glob(pattern)}


def _drop(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_open(directory: Path) -> bool:
    """Whether a process is training in a run directory."""
    try:
        with (directory / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _refuse_foreign(directory: Path, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file; expected a folder for --out")
    is_free = force or not directory.exists() or (directory / "plan.yaml").is_file()
    if not is_free and set(directory.iterdir()) - _leftovers(directory) - {directory / "lock"}:
        raise InputError(f"{directory}: exists and is not a run directory; expected another --out")


def begin_run(directory: Path, plan: Plan, *, resume: bool, force: bool) -> list[str]:
    """Make a directory ready for a run and return what has changed in the plan's `run` section.

    Raises InputError if it holds another run, or if it holds this one and neither `resume` nor `force` is given.
    """
    existing, changes = directory / "plan.yaml", list[str]()
    _refuse_foreign(directory, force)
    if existing.is_file() and not force:
        if not resume:
            what = "holds a run already; expected --resume to continue it or --force to start again"
            raise InputError(f"{directory}: {what}")
        try:
            other = read_plan(existing)
        except InputError as error:
            what = "can't be read; expected this run's plan (each checkpoint has a copy), or --force to start again"
            raise InputError(f"{existing}: {what}", *(f"  {problem}" for problem in error.problems)) from None
        if other.hash() != plan.hash():
            what = "holds a run of another plan; expected another --out, or --force to start again"
            differences = (f"  {line}" for line in _differences(other.experiment(), plan.experiment()))
            raise InputError(f"{directory}: {what}", *differences)
        changes = _differences({"run": other.run.model_dump()}, {"run": plan.run.model_dump()})
    with naming_write_errors(directory):
        if force and existing.is_file():
            with suppress(FileNotFoundError):  # rename first: a kill leaves all checkpoints or none
                (directory / "checkpoints").rename(directory / ".checkpoints.old")
            for name in (*FILES, *FOLDERS):
                _drop(directory / name)
        directory.mkdir(parents=True, exist_ok=True)
        for path in _leftovers(directory):
            _drop(path)
        write_file(existing, document.write([plan.model_dump()]))
    return changes


def is_finished(directory: Path, plan: Plan) -> bool:
    """Whether the directory holds the whole result of this plan's run."""
    with suppress(SetupError):
        found = read_result(directory / "result.json")
        numbers = [found.get(name) for name in ("steps", "seconds", "validation_loss")]
        return found.get("plan") == plan.hash() and all(isinstance(number, int | float) for number in numbers)
    return False


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences of two plans, such as `train.steps: 12 → 24`; those of tensors, which follow from the rest, last."""
    before, after = dict(_leaves("", old)), dict(_leaves("", new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    keys.sort(key=lambda key: key.startswith("tensors."))
    lines = [f"{key}: {before.get(key, 'nothing')} → {after.get(key, 'nothing')}" for key in keys[:DIFFERENCES]]
    return [*lines, f"and {len(keys) - DIFFERENCES} more"] if len(keys) > DIFFERENCES else lines


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every scalar of plain data with its path; an element of a list has its name, or else its index, in the path."""
    if isinstance(value, list):
        value = {part.get("name", at) if isinstance(part, dict) else at: part for at, part in enumerate(value)}
    if not isinstance(value, dict):
        yield path, value
        return
    for key, part in value.items():
        yield from _leaves(f"{path}.{key}" if path else str(key), part)


@dataclass(slots=True)
class RunHistory:
    """The losses of a run: `losses[i]` is the training loss of step i before its update, `evaluations` are (step, loss).

    `scores` are what else the last evaluation told. `clipped` says of each step whose record tells it whether its gradient
    was clipped.
    Only rank 0 knows those of steps before `resumed_at`; a loss is nan if its record is lost.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    clipped: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    resumed_at: int = 0

    @property
    def clipped_share(self) -> float | None:
        """The share of clipped steps, None where no record tells it."""
        return sum(self.clipped) / len(self.clipped) if self.clipped else None

    def add(self, record: Record) -> None:
        """Add what a step's record says."""
        if "clipped" in record:
            self.clipped.append(bool(record["clipped"]))
        if "loss" in record:
            at = record["step"] - 1
            self.losses[at : at + 1] = [record["loss"]]  # at their end, or in place of nan
        if "validation_loss" in record:
            self.evaluations.append((record["step"], record["validation_loss"]))
            self.scores = {name: record[name] for name in SCORES if name in record}


class Metrics(AbstractContextManager["Metrics"]):
    """Writes metrics.jsonl. Keeps the records of the `done` steps, and drops those of steps to be repeated.

    `history` has the losses of all steps so far. `damage` is a warning if records of steps done are lost; the run does not
    depend on them. Without a directory it writes nothing.
    """

    def __init__(self, directory: Path | None, done: int) -> None:
        self._file: TextIO | None = None
        self.history = RunHistory([math.nan] * done, resumed_at=done)
        self.damage = ""
        if directory is None:
            return
        self._directory, path, damaged = directory, directory / "metrics.jsonl", directory / DAMAGED_METRICS
        with naming_write_errors(directory):
            before = list(_records(path, done))
            if lost := done - len(before):
                self.damage = f"{path}: the records of {lost} of the {done} steps done are missing or damaged"
                if path.exists() and not damaged.exists():  # the first copy has the most records
                    path.replace(damaged)
                    self.damage += f"; {DAMAGED_METRICS} is the file as it was"
            write_file(path, "".join(json.dumps(record) + "\n" for record in before))
            self._file = path.open("a", encoding="utf-8")
        for record in before:
            self.history.add(record)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # closing writes again what could not be written before
                self._file.close()

    def write(self, record: Record) -> None:
        self.history.add(record)
        if self._file is not None:
            with naming_write_errors(self._directory):
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()

    def sync(self) -> None:
        """Flush the records to disk, before a checkpoint of their steps gets its name."""
        if self._file is not None:
            with naming_write_errors(self._directory):
                os.fsync(self._file.fileno())


def _records(path: Path, done: int) -> Iterator[dict[str, Any]]:
    """The records of steps up to `done`, in their order, without lines that are cut or damaged."""
    last = 0
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            record = json.loads(line.decode("utf-8"))
            step, losses = record["step"], [record["loss"], record.get("validation_loss", 0.0)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if type(step) is int and last < step <= done and all(isinstance(loss, int | float) for loss in losses):
            last = step
            yield record


def result_document(
    plan: Plan, history: RunHistory, data: str, masks: dict[str, str], live_parameters: int, environment: Record
) -> Record:
    """The result document of a run: losses, sizes, environment, and the hashes of `data` and `masks` that identify it."""
    losses = history.losses
    return {
        "kind": "supar.result/v1",
        "plan": plan.hash(),
        "data": data,
        "masks": masks,
        "steps": len(losses),
        "train_loss": losses[-1] if losses and math.isfinite(losses[-1]) else None,
        "validation_loss": history.evaluations[-1][1] if history.evaluations else None,
        **history.scores,
        "clipped_share": history.clipped_share,
        "parameters": plan.parameters,
        "live_parameters": live_parameters,
        "resumed_at": history.resumed_at,
        "seconds": history.seconds,
        "environment": environment,
    }


def write_result(directory: Path, result: Record) -> None:
    """Write a run's result.json. Raises SetupError if it can't be written."""
    with naming_write_errors(directory):
        write_file(directory / "result.json", json.dumps(result, indent=1) + "\n")


def read_result(path: Path) -> Record:
    """Read a run's result.json. Raises SetupError that names the file if it is not one."""
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != "supar.result/v1":
        raise SetupError(f"{path}: is not the result of a run; without it `supar train` writes it again")
    return found
