"""`supar train --nproc N`: launch the same command in N processes on this machine, with torch's elastic launcher.

If a process dies, all start again from the last checkpoint, at most `--max-restarts` times. The run directory is the only
state that they share with the earlier ones.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from supar_cli.errors import Preempted, SetupError
from supar_cli.files import write_file
from supar_cli.training.launch.environment import (
    INSISTENT,
    LAUNCH_DIR,
    LAUNCHER,
    ONE_REQUEST_S,
    SIGNAL_FILE,
    STDIN,
    handle_signals,
    restore_signals,
)

# Exit statuses that a restart would not change: bad input, environment, unusable result, violated check, stopped
FINAL = (2, 3, 4, 5, Preempted.exit_status, 130)

# chosen: for processes to end by a second Ctrl-C. One that waits in a call for another that hangs does not hear it
KILL_S = 5.0
Received = list[tuple[signal.Signals, float]]  # signals, and when they came


@contextmanager
def launch_environment(processes: int, stdin: bytes | None) -> Iterator[Path]:
    """Set the environment of processes to launch and yield their shared folder; `stdin` is their standard input."""
    before = dict(os.environ)
    try:
        with TemporaryDirectory(prefix="supar-") as folder:
            os.environ |= {LAUNCH_DIR: folder, LAUNCHER: str(os.getpid())}
            if stdin is not None:
                os.environ[STDIN] = str(Path(folder, "stdin"))
                Path(folder, "stdin").write_bytes(stdin)
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            yield Path(folder)
    finally:
        os.environ.clear()
        os.environ.update(before)


def launch(arguments: list[str], processes: int, restarts: int, folder: Path, warn: Callable[[str], None]) -> int:
    """Run `supar ARGUMENTS` in several processes, pass signals on to them and return the exit status.

    `folder` is that of `launch_environment`. Raises SetupError if processes are killed more often than `restarts` times.
    """
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # the process that failed reports the error itself
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with _forwarding(folder) as received:
        for attempt in range(restarts + 1):
            for left in _processes(folder):
                left.unlink()
            failures = _run(arguments, processes, folder, received)
            if not failures:
                return 0
            final = [code for code in failures.values() if code in FINAL]
            # the launcher sends SIGTERM to the processes that are left; anyone else's is a request to stop
            signals = {rank: signal.Signals(-code) for rank, code in failures.items() if code < 0}
            killed = ", ".join(f"rank {rank} by {s.name}" for rank, s in signals.items() if s != signal.SIGTERM)
            if received:
                return final[0] if final else 128 + received[0][0]
            if final and not killed:
                return final[0]
            if attempt < restarts:
                what = f"killed: {killed}" if killed else "a process failed"
                warn(f"{what}; starting again from the last checkpoint, {attempt + 1} of at most {restarts} times")
    if killed:
        raise SetupError(f"killed: {killed}; the same command continues from the last checkpoint")
    return next((code for code in failures.values() if code > 0), 1)


def _run(arguments: list[str], processes: int, folder: Path, received: Received) -> dict[int, int]:
    """Run the processes once and return the exit statuses of those that failed, by rank; negative ones are signals."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    # in the main thread torch would handle signals itself, and end the processes 30 s after the first one
    with futures.ThreadPoolExecutor(1, "launcher") as pool:
        future: futures.Future[object] = pool.submit(
            elastic_launch(config, sys.executable), "-m", "supar_cli", *arguments
        )
        while not future.done():
            futures.wait([future], timeout=0.1)  # short, to pass signals on soon
            if _insisted(received):
                _send(folder, signal.SIGKILL)
                for killed in _processes(folder):  # once: their numbers may soon be those of others
                    killed.unlink()
        try:
            future.result()
        except ChildFailedError as error:
            return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


@contextmanager
def _forwarding(folder: Path) -> Iterator[Received]:
    """Pass signals on to the processes whose numbers are in the folder; yield the signals received.

    A process that starts later finds the signal in the folder: it writes its number first and then looks.
    """
    received: Received = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append((signal.Signals(number), time.monotonic()))
        write_file(folder / SIGNAL_FILE, str(number))
        _send(folder, number)

    handlers = handle_signals(forward)
    try:
        yield received
    finally:
        restore_signals(handlers, is_ending=bool(received))


def _insisted(received: Received) -> bool:
    """Whether an end was asked for a second time, and the processes had time for it."""
    asked = [at for number, at in received if number in INSISTENT]
    again = next((at for at in asked if at - asked[0] >= ONE_REQUEST_S), None)
    return again is not None and time.monotonic() - again >= KILL_S


def _send(folder: Path, number: int) -> None:
    for path in _processes(folder):
        with suppress(OSError, ValueError):
            os.kill(int(path.read_text("utf-8")), number)


def _processes(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.isdigit()]
