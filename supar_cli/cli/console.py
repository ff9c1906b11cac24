"""What the commands share: options by the same words, documents in and out, and messages on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from supar_cli import files
from supar_cli.errors import InputError, Problem, SetupError
from supar_cli.files import write_file
from supar_cli.planning import document, spec

Out = Annotated[str | None, typer.Option("--out", "-o", help="Where to write; - for stdout only.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite a file that differs.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="A.B=VALUE", help="Set any key of the document read; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout instead of YAML.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="`stdlib`, a text/JSONL/token file or a folder of them.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        min=1,
        help="Runs at the same time. [default: one a GPU; on a CPU 1 for tune-proxy, else one a core, at most 8; "
        "on Ray one a GPU or core of the cluster; on Slurm 8]",
        show_default=False,
    ),
]
ExecutorOption = Annotated[
    str,
    typer.Option(
        "--executor", metavar="NAME", help="Who runs them: local, processes of this machine; ray, a cluster; or slurm."
    ),
]
ExecutorSet = Annotated[
    list[str] | None,
    typer.Option(
        "--executor-set",
        metavar="KEY=VALUE",
        help="A setting of the executor; repeatable. ray: address, cpus of a run. slurm: partition, account, time in "
        "minutes and sbatch's other options.",
    ),
]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="auto, float32 or bfloat16.")]


class Talk:
    """Messages on stderr: plain lines, or rich output when stderr is a terminal."""

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def log(self, message: str) -> None:
        if not self.quiet:
            self._write(message)

    def warn(self, message: str) -> None:
        self._write(f"warning: {message}")

    def _write(self, message: str) -> None:
        with _unread(sys.stderr):
            sys.stderr.write(message + "\n")
            sys.stderr.flush()


class Progress(Talk):
    """A bar with rate and time left on a terminal, a line every few seconds elsewhere. Use as a context manager."""

    EVERY_S = 10.0  # chosen: often enough to see life, rare enough for a log file

    def __init__(self, what: str, quiet: bool = False, verbose: bool = False) -> None:
        super().__init__(quiet, verbose)
        self._what = what
        self._bar: Any = None
        self._task: Any = None
        self._started = self._said = time.monotonic()
        self._first: int | None = None
        self._step = 0

    def __enter__(self) -> Progress:
        if self.terminal and not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._what, total=None, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def progress(self, step: int, steps: int, loss: float) -> None:
        from supar_cli.planning.estimate import duration

        now = time.monotonic()
        if self._first is None or step < self._step:  # it begins, or begins anew: the demo counts trials, then runs
            self._first, self._started = step, now
        self._step = step
        done, seconds = step - self._first, max(now - self._started, 1e-9)
        rate = "" if not done else f", {done / seconds:.3g}/s" if done > seconds else f", {seconds / done:.3g} s each"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=steps, note=f"loss {loss:.4f}{rate}")
        elif step == steps or now - self._said > self.EVERY_S:
            self._said = now
            left = f", {duration((steps - step) * seconds / done)} left" if done and step < steps else ""
            self.log(f"{self._what}: {step}/{steps}, loss {loss:.4f}{rate}{left}")

    def _write(self, message: str) -> None:
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            super()._write(message)


def seconds(flag: str, text: str) -> float:
    """Seconds of `90s`, `30m`, `2h` or `1:30:00`. Raises InputError."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    parts = text.split(":")
    try:
        if 2 <= len(parts) <= 3 and all(part.isascii() and part.isdigit() for part in parts):
            found = sum(int(part) * 60.0**power for power, part in enumerate(reversed(parts)))
        else:
            found = float(text[:-1]) * units[text[-1:]]
        if not 0 < found < float("inf"):
            raise ValueError
    except (KeyError, ValueError):
        raise InputError(f"{flag} {text}: expected a time such as 90s, 30m, 2h or 1:30:00") from None
    return found


def read_one(source: str, missing: str) -> document.Document:
    """The one document of a file or `-`. Raises InputError; `missing` says how to make the file when it is not there."""
    documents = read_all(source, missing)
    if len(documents) > 1:
        raise InputError(f"{source}: holds {len(documents)} documents; expected one")
    return documents[0]


def read_all(source: str, missing: str) -> list[document.Document]:
    """All documents of a file or `-`."""
    if source != "-" and not Path(source).exists():
        raise InputError(f"{source}: no such file; {missing}")
    return document.read_file(source)


def apply_settings(read: document.Document, settings: list[str] | None) -> None:
    """Apply `a.b=VALUE` to a document in place, VALUE being YAML. Raises InputError when it is not of that form."""
    for setting in settings or []:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise InputError(f"--set {setting}: expected A.B=VALUE")
        found = document.read(text or "null", f"--set {path}")
        put(read, tuple(path.split(".")), found[0].data if found else None)


def executor_settings(settings: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` of `--executor-set`, VALUE being YAML. Raises InputError when it is not of that form."""
    found: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals or not key or not text:
            raise InputError(f"--executor-set {setting}: expected KEY=VALUE")
        found[key.strip().replace("-", "_")] = document.read(text, f"--executor-set {key}")[0].data
    return found


def put(read: document.Document, path: tuple[str, ...], value: Any) -> None:
    """Set one path of a document, making the mappings on the way. Raises InputError when a list or value is in the way."""
    here = read.data
    for part in path[:-1]:
        if not isinstance(here, dict):
            break
        if here.get(part) is None:
            here[part] = {}
        here = here[part]
    if not isinstance(here, dict):
        raise InputError(f"--set {'.'.join(path)}: {read.name} has no mapping there; expected a path of keys")
    here[path[-1]] = value


def override(read: document.Document, section: tuple[str, ...], changes: dict[str, Any]) -> None:
    """Change keys of a document's section, as `spec.override` does: what a changed value drops is dropped."""
    here: Any = read.data
    for part in section:
        here = here.get(part) if isinstance(here, dict) else None
    before = here if isinstance(here, dict) else {}
    for name, value in spec.override(before, changes).items():
        if name not in before or before[name] != value:
            put(read, (*section, name), value)


@contextmanager
def located(read: document.Document) -> Iterator[None]:
    """Give the file and line of `read` to a problem raised inside as `a.b: what is wrong`, `a` being a key of it."""
    try:
        yield
    except InputError as error:
        located = InputError(*(_located(read, problem) for problem in error.problems))
        located.is_collective = error.is_collective
        raise located from None


def _located(read: document.Document, problem: Problem | str) -> Problem | str:
    where, _, what = str(problem).partition(": ")
    path = tuple(where.split("."))
    known = isinstance(problem, str) and isinstance(read.data, dict) and path[0] in read.data
    return read.problem(path, what) if known else problem


def check_writable(out: str | None, default: str, force: bool, text: str | None = None) -> None:
    """Raise InputError when writing would replace a file that differs (`text` unknown: any file) without `--force`."""
    if out == "-" or force:
        return
    path = Path(out or default)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file for --out")
    if path.is_file() and (text is None or path.read_text("utf-8", "replace") != text):
        raise InputError(f"{path}: exists and differs; expected --force to overwrite it, or another --out")


def persist(path: Path, text: str, force: bool, talk: Talk) -> None:
    """Write a file whole, byte for byte. Raises InputError when it would replace one that differs without `--force`."""
    check_writable(str(path), str(path), force, text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    except OSError as error:
        raise SetupError(f"{path}: can't be written: {error.strerror or error}") from None
    talk.log(f"wrote {path}")


def emit(documents: list[Any], out: str | None, default: str | None, *, force: bool, as_json: bool, talk: Talk) -> None:
    """Persist the documents, then print them where stdout is read: a pipe, a file, or `-o -`."""
    text = document.write(documents)
    if out != "-" and (out or default):
        persist(Path(out or default or ""), text, force, talk)
    if out == "-" or as_json or not sys.stdout.isatty():
        to_stdout(json.dumps(documents[0] if len(documents) == 1 else documents, indent=1) + "\n" if as_json else text)


def to_stdout(text: str) -> None:
    """Write to stdout, once. A reader that is gone loses nothing: the work is on disk."""
    with _unread(sys.stdout):
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def _unread(stream: Any) -> Iterator[None]:
    """Writing to a stream whose reader may be gone: what is said from then on is lost, and the work goes on."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def template(name: str) -> Path:
    """Path of a shipped document."""
    return files.template(f"{name}.yaml")


def input_error(error: ValueError) -> InputError:
    """What pydantic found wrong with values given as flags."""
    found = getattr(error, "errors", None)
    if found is None:
        return InputError(str(error))
    return InputError(
        *(f"--{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg'].removeprefix('Value error, ')}" for e in found())
    )
