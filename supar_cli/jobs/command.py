"""Running a plan for its loss by a command of the user: it trains the plan in a file and reports its losses."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from supar_cli.errors import InputError, RunFailed, SetupError, UnusableResult
from supar_cli.files import file_hash, naming_write_errors, parse_record, write_file
from supar_cli.jobs.workers import describe_end
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training.launch.environment import StopSignals
from supar_cli.training.run_directory import RunHistory
from supar_cli.user_code import words_of

RESULT = "SUPAR_RESULT"  # the environment variable with the file that `own.report` writes to
POLL_S = 0.1  # chosen: between two looks at what a script reports; trials take minutes
GRACE_S = 2.0  # chosen: for a script to end by SIGTERM, and again by SIGKILL; its worker has workers.STOP_S for both
LINES, TAIL_BYTES = 10, 2**14  # chosen: the end of a traceback, which says what went wrong


def run_command(plan: Plan, folder: Path, on_report: Callable[[int, float], None] | None = None) -> RunHistory:
    """Run the plan's `run.command`, `{plan}` being the plan's file and `{python}` supar's own; its last reported loss decides.

    The plan, the output and the reports are kept in a new folder below `folder`. `on_report` gets (step, loss) of each
    report with a step, and may raise to end the run. However it ends, none of its processes is left. Raises RunFailed if it
    crashes, hangs or reports nothing, UnusableResult when a loss is not finite.
    """
    with naming_write_errors(folder):
        here = _make_folder(folder, plan.hash()[7:15])
        write_file(here / "plan.yaml", document.write([plan.model_dump()]))
        reports, output = _Reports(here / "result.jsonl"), (here / "output.txt").open("wb")
    with output, StopSignals() as stop:
        process = _start(require_command(plan), here, output.fileno())
        try:
            return _follow(process, reports, plan.run.timeout_s, stop, on_report)
        except RunFailed as error:
            raise RunFailed(f"{error}; {_last_lines(here / 'output.txt')}") from None
        finally:
            _end(process, here)


def require_command(plan: Plan) -> str:
    """The command of a plan of a user's model. Raises InputError if there is none."""
    if plan.run.command is None:
        expected = "expected what trains a plan, such as --command 'python train.py {plan}'"
        raise InputError(f"run.command: is missing; {expected}")
    return plan.run.command


def script_files(command: str) -> dict[str, str]:
    """The files that a command names, and the hashes of their content: a changed script has other losses."""
    return {word: file_hash(Path(word)) for word in words_of(command) if Path(word).is_file()}


def _make_folder(folder: Path, name: str) -> Path:
    """A new folder for a run, with a number behind its name from the second run on of the same plan."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 1
    while True:
        here = folder.absolute() / (name if count == 1 else f"{name}-{count}")
        with suppress(FileExistsError):
            here.mkdir()
            return here
        count += 1


def _start(command: str, here: Path, output: int) -> subprocess.Popen[bytes]:
    """Start the command by the shell, in a process group of its own: Ctrl-C reaches supar alone, which then ends it."""
    plan = str(here / "plan.yaml")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # this worker's share of the cores
    return subprocess.Popen(
        command.replace("{python}", shlex.quote(sys.executable)).replace("{plan}", shlex.quote(plan)),
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**threads, **os.environ, RESULT: str(here / "result.jsonl")},
        start_new_session=True,
    )


class _Reports:
    """The reports in a file that a script appends to."""

    def __init__(self, path: Path) -> None:
        self.history = RunHistory()
        self._path, self._bytes, self._step = path, 0, -1

    def take(self, has_ended: bool) -> list[tuple[int | None, float]]:
        """(step, loss) of each new report; a last line without its end counts once the script `has_ended`.

        Raises RunFailed for what is not a report, UnusableResult for a loss that is not finite.
        """
        try:
            if not self._path.is_file():  # a pipe would be waited for
                if self._path.exists():
                    raise RunFailed(f"{self._path}: is no longer a plain file; expected reports appended to it")
                return []
            with self._path.open("rb") as file:
                file.seek(self._bytes)
                *lines, rest = file.read().split(b"\n")
        except OSError as error:
            raise RunFailed(f"{self._path}: can't be read: {error.strerror or error}") from None
        lines += [rest] if has_ended and rest else []
        self._bytes += sum(len(line) + 1 for line in lines)
        return [self._add(line) for line in lines]

    def _add(self, line: bytes) -> tuple[int | None, float]:
        number = len(self.history.evaluations) + 1
        try:
            record = parse_record(self._path, number, line, "loss")
        except SetupError as error:
            raise RunFailed(str(error)) from None
        loss, step, at = record["loss"], record.get("step"), f"{self._path}:{number}"
        if loss is None or (type(loss) in (int, float) and not abs(loss) <= sys.float_info.max):  # an int may be beyond
            raise UnusableResult(
                "the script reports a loss that is not finite" + ("" if step is None else f" at step {step}")
            )
        if type(loss) not in (int, float):
            raise RunFailed(f"{at}: loss is {loss!r}; expected a number")
        if step is not None and (type(step) is not int or step <= self._step):
            raise RunFailed(f"{at}: step is {step!r}; expected a whole number above the last one's, {self._step}")
        self._step = self._step if step is None else step
        self.history.evaluations.append((max(self._step, 0), float(loss)))
        return step, float(loss)


def _follow(
    process: subprocess.Popen[bytes],
    reports: _Reports,
    timeout_s: float | None,
    stop: StopSignals,
    on_report: Callable[[int, float], None] | None,
) -> RunHistory:
    """Pass on what a script reports until it ends, from steps that lie at least a fiftieth apart; return its reports."""
    started = heard = time.monotonic()
    next_step = 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
        status = process.returncode  # read before the reports: what was written by then is in the file
        for step, loss in reports.take(has_ended=status is not None):
            heard = time.monotonic()
            if step is not None and step >= next_step and on_report is not None:
                next_step = step + max(1, step // 50)  # chosen: some 400 of a report at each of 100,000 steps
                on_report(step, loss)
        if status is not None:
            break
        if stop.reason() is not None:
            raise KeyboardInterrupt
        if timeout_s is not None and time.monotonic() - heard > timeout_s:
            raise RunFailed(f"the script has reported no loss for {timeout_s:g} s and was ended (run.timeout_s)")
    if status != 0:
        number = status - 128  # a shell's word for the signal that ended its child
        raise RunFailed(f"the script failed: {describe_end(-number if number in signal.valid_signals() else status)}")
    if not reports.history.evaluations:
        how = 'supar_cli.report_loss(loss), or a line {"loss": …} in the file $' + RESULT
        raise RunFailed(f"the script ended without reporting a loss; expected {how}")
    reports.history.seconds = time.monotonic() - started
    return reports.history


def _end(process: subprocess.Popen[bytes], here: Path) -> None:
    """End what is left of a command: its process group, then whatever else has its environment, such as torchrun's workers."""
    try:
        limit = time.monotonic() + GRACE_S
        _signal_group(process, signal.SIGTERM)
        while _signal_group(process, 0) and time.monotonic() < limit:
            time.sleep(POLL_S / 2)
    finally:
        _signal_group(process, signal.SIGKILL)
        limit = time.monotonic() + GRACE_S
        # until they are gone, with their memory
        while (left := list(_processes_of(here))) and time.monotonic() < limit:
            for one in left:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(one, signal.SIGKILL)
            time.sleep(POLL_S / 10)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to the command's process group; False if there is none any more."""
    process.poll()  # else a zombie would be in it
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # on macOS the second where only zombies are left
        return False
    return True


def _processes_of(here: Path) -> Iterator[int]:
    """The processes that have the run's environment, where /proc tells."""
    mark = f"{RESULT}={here / 'result.jsonl'}\0".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in environment.read_bytes():
                yield int(environment.parent.name)


def _last_lines(path: Path) -> str:
    """The end of a script's output, indented below the name of its file."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = [line.rstrip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    if not lines:
        return f"its output, {path}, is empty"
    return "\n".join([f"the end of its output, {path}:", *(f"  {line}" for line in lines[-LINES:])])
