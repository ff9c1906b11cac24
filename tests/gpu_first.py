"""The first minutes on a GPU: what has to hold there, each figure beside its mark.

In a checkout, with torch, Triton and what supar needs importable. What a machine without a network lacks is carried: with the same Python
`pip download --only-binary=:all: -d wheels pydantic pyyaml safetensors 'typer<0.29' rich numpy` where there is one, and over there
`pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=$PWD/site`.

    python tests/gpu_first.py                    # all but the tests: 4 minutes at most on an H100 or H200
    python tests/gpu_first.py --stage layers     # one stage, or several; --long: more cases, 9 minutes at most
    python tests/gpu_first.py --cpu              # a rehearsal without a GPU: small sizes, no mark of speed

A line is PASS, FAIL or NOTE, what was seen, and its mark; all are in gpu_first.json too, as soon as they are known. The exit status is 1 if
one failed. Stages that measure no time run at once, each in a process of its own; one that breaks or hangs is a FAIL and ends no other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

CHECKOUT = Path(__file__).resolve().parent.parent
if __name__ in ("__main__", "__mp_main__"):  # a script's own folder is the first there
    sys.path[0] = str(CHECKOUT)

DEFAULT_S, LONG_S = 235.0, 560.0  # chosen: so that fifteen minutes of a machine hold a run, mending and a second run
CORES = 2  # chosen: for a stage that runs beside others
TRACEBACK_LINES = 6
Row = dict[str, Any]


class Stage(NamedTuple):
    """A function of a module, by its name. `is_timed`: nothing else runs meanwhile."""

    module: str
    limit_s: float
    is_timed: bool = False
    is_default: bool = True


STAGES = {
    "facts": Stage("tests.gpu_speed", 40, is_timed=True),
    "waits": Stage("tests.gpu_stages", 60),
    "engines": Stage("tests.gpu_stages", 60),
    "block_16": Stage("tests.gpu_stages", 120),
    "block_32": Stage("tests.gpu_stages", 120),
    "block_64": Stage("tests.gpu_stages", 120),
    "block_128": Stage("tests.gpu_stages", 120),
    "training": Stage("tests.gpu_stages", 120),
    "ranks": Stage("tests.gpu_stages", 90),
    "survival": Stage("tests.gpu_stages", 120),
    "layers": Stage("tests.gpu_speed", 60, is_timed=True),
    "model": Stage("tests.gpu_speed", 120, is_timed=True),
    "proxy": Stage("tests.gpu_speed", 90, is_timed=True),
    "tests": Stage("tests.gpu_stages", 300, is_default=False),
}


class Session:
    """What a stage is told, and where it reports what it finds."""

    def __init__(self, is_cpu: bool, is_long: bool, folder: Path, tell: Callable[[Row], None]) -> None:
        self.is_cpu, self.is_long, self.folder, self._tell = is_cpu, is_long, folder, tell
        self.device = "cpu" if is_cpu else "cuda"

    def note(self, what: str, value: object) -> None:
        self._tell({"result": "NOTE", "what": what, "value": value, "wanted": ""})

    def check(
        self, what: str, value: float, *, least: float | None = None, most: float | None = None, on_gpu: bool = False
    ) -> None:
        """Whether a figure is within its marks; those that hold `on_gpu` are no marks in a rehearsal."""
        bounds = [f"≥ {least:g}" if least is not None else "", f"≤ {most:g}" if most is not None else ""]
        is_good = (least is None or value >= least) and (most is None or value <= most)  # never of nan
        result = "NOTE" if self.is_cpu and on_gpu else "PASS" if is_good else "FAIL"
        self._tell({"result": result, "what": what, "value": value, "wanted": " and ".join(filter(None, bounds))})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, an error is a FAIL of its own, and what comes after this goes on."""
        try:
            yield
        except Exception as error:
            where = "".join(traceback.format_exception(error)).splitlines()[-TRACEBACK_LINES:]
            text = " | ".join(line.strip() for line in where)
            self._tell({"result": "FAIL", "what": f"{name} broke", "value": text, "wanted": ""})

    def check_equal(self, what: str, value: object, wanted: object) -> None:
        result = "PASS" if value == wanted else "FAIL"
        self._tell({"result": result, "what": what, "value": value, "wanted": str(wanted)})


def work(names: Sequence[str], is_cpu: bool, is_long: bool, folder: Path, sender: Connection) -> None:
    """Run stages one after another in this process, and send each (name, row), and (name, None) at its end."""
    os.setsid()  # so that what it starts ends with it
    if is_cpu or not STAGES[names[0]].is_timed:  # before torch is imported; a rehearsal's stages share a few cores
        os.environ.setdefault("OMP_NUM_THREADS", "1" if is_cpu else str(CORES))
    for name in names:
        own = folder / name
        own.mkdir(exist_ok=True)
        session = Session(is_cpu, is_long, own, lambda row, name=name: sender.send((name, row)))  # type: ignore[misc]
        with session.part("it"):
            getattr(import_module(STAGES[name].module), name)(session)
        sender.send((name, None))


class Report:
    """All rows by stage; printed, and written after each."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self._path, self._lock, self._begun_s = path, threading.Lock(), time.monotonic()
        self.found: dict[str, Any] = {"options": options, "seconds": 0.0, "stages": {}}

    @property
    def rows(self) -> list[Row]:
        return [row for stage in self.found["stages"].values() for row in stage["rows"]]

    def add(self, name: str, row: Row | None, began_s: float) -> None:
        """A row of a stage, or None: it has ended."""
        with self._lock:
            stage = self.found["stages"].setdefault(name, {"seconds": 0.0, "rows": []})
            stage["seconds"] = round(time.monotonic() - began_s, 1)
            self.found["seconds"] = round(time.monotonic() - self._begun_s, 1)
            if row is not None:
                stage["rows"].append(row)
                value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
                mark = f"  ({row['wanted']})" if row["wanted"] else ""
                print(f"{row['result']} {name:9} {row['what']}: {value}{mark}", flush=True)
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(self.found, indent=1, default=str, ensure_ascii=False) + "\n", "utf-8")
            part.replace(self._path)


@contextmanager
def worker(names: Sequence[str], is_cpu: bool, is_long: bool, folder: Path) -> Iterator[tuple[Any, Connection]]:
    """A process that runs stages, and what it sends. In the end it is killed, with all that it started."""
    spawn = multiprocessing.get_context("spawn")  # a forked process can't use CUDA
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=work, args=(names, is_cpu, is_long, folder, sender))
    process.start()
    sender.close()
    try:
        yield process, receiver
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()


def run_in_order(names: Sequence[str], options: argparse.Namespace, folder: Path, report: Report, end_s: float) -> None:
    """Run stages one after another, in another process after one that has hung or has died."""
    left = list(names)
    while left:
        began_s = time.monotonic()
        if end_s - began_s <= 0:
            for name in left:
                report.add(name, {"result": "NOTE", "what": "left out", "value": "no time", "wanted": ""}, began_s)
            return
        with worker(left, options.cpu, options.long, folder) as (process, receiver):
            why = _listen(left, receiver, report, end_s)
            if why is not None:
                process.join(1)
                why = f"{why}, exit status {process.exitcode}" if process.exitcode is not None else why
                report.add(left.pop(0), {"result": "FAIL", "what": "it was ended", "value": why, "wanted": ""}, began_s)


def _listen(left: list[str], receiver: Connection, report: Report, end_s: float) -> str | None:
    """Report what a worker sends and take stages that have ended out of `left`; why the first of them can't end, or None."""
    while left:
        began_s = time.monotonic()
        limit_s = min(STAGES[left[0]].limit_s, max(end_s - began_s, 0.0))
        name, row = left[0], Row()
        while row is not None:
            try:
                if not receiver.poll(max(0.0, began_s + limit_s - time.monotonic())):
                    return f"no end after {limit_s:.0f} s"
                name, row = receiver.recv()
            except EOFError:
                return "its process died"
            report.add(name, row, began_s)
        left.pop(0)
    return None


def plan_groups(names: Sequence[str], is_cpu: bool) -> tuple[list[list[str]], list[list[str]]]:
    """Groups of stages that one process runs: those at once, and those one after another. A rehearsal is one process."""
    if is_cpu:
        return [], [list(names)]
    return [[n] for n in names if not STAGES[n].is_timed], [[n] for n in names if STAGES[n].is_timed]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="What has to hold on a GPU, each figure beside its mark.")
    parser.add_argument("--stage", action="append", choices=list(STAGES), help="only this stage; repeatable")
    parser.add_argument("--long", action="store_true", help="more cases, and 9 minutes at most instead of 4")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU, at small sizes")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder of gpu_first.json")
    options = parser.parse_args(arguments)
    names = options.stage or [name for name, stage in STAGES.items() if stage.is_default or options.long]
    end_s = time.monotonic() + (LONG_S if options.long else DEFAULT_S)
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "gpu_first.json", {**vars(options), "stage": names})
    at_once, alone = plan_groups(names, options.cpu)
    with tempfile.TemporaryDirectory(prefix="gpu-first-") as folder:
        rest = (options, Path(folder), report, end_s)
        if ["facts"] in alone:  # first of all, as it says which machine it is
            run_in_order(alone.pop(alone.index(["facts"])), *rest)
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // CORES)) as pool:
            list(pool.map(lambda group: run_in_order(group, *rest), at_once))
        for group in alone:
            run_in_order(group, *rest)
    failed = [row for row in report.rows if row["result"] == "FAIL"]
    passed = sum(row["result"] == "PASS" for row in report.rows)
    print(f"{passed} passed, {len(failed)} failed, in {report.found['seconds']:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
