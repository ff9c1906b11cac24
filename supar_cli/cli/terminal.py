"""What commands show: messages, progress and tables on stderr, and one document on stdout or in a file."""

import codecs
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from supar_cli.cli.options import Flags
from supar_cli.errors import InputError
from supar_cli.files import naming_write_errors, write_file
from supar_cli.planning import document
from supar_cli.planning.plan import Plan, PlanModel

ECHO = "^C^C"  # what a terminal writes behind a bar at Ctrl-C, pressed twice: with room for it the bar's line can be erased
WIDTH = 80  # columns that a measurement's tables fit in


class Log:
    """Messages on stderr, a line each."""

    def __init__(self, quiet: bool | None = False) -> None:
        self.quiet = bool(quiet)
        self.is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def log(self, message: str) -> None:
        if not self.quiet:
            self._write(message)

    def warn(self, message: str) -> None:
        self._write(f"warning: {message}")

    def _write(self, message: str) -> None:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


class Progress(Log):
    """A bar with rate and time left on a terminal, a line every few seconds elsewhere. Use as a context manager.

    `records`: the file from which the same command continues, named when the user stops it.
    """

    EVERY_S = 10.0  # chosen: often enough to see life, rare enough for a log file

    def __init__(self, what: str, quiet: bool | None = False, records: Path | None = None) -> None:
        super().__init__(quiet)
        self._what, self._records = what, records
        self._bar: Any = None
        self._task: Any = None
        self._started = self._written = time.monotonic()
        self._first: int | None = None
        self._step = 0

    def __enter__(self) -> Self:
        if self.is_terminal and not self.quiet:
            from rich.console import Console, ConsoleDimensions
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            class Narrower(Console):
                @property  # type: ignore[misc]
                def size(self) -> ConsoleDimensions:
                    whole = super().size
                    return whole._replace(width=max(1, whole.width - len(ECHO)))

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=Narrower(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._what, total=None, note="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt and self._records is not None:
            self.warn(f"stopped; the same command continues from {self._records}")
        if self._bar is not None:
            self._bar.stop()

    def progress(self, step: int, steps: int, loss: float) -> None:
        from supar_cli.planning.estimate import duration

        now = time.monotonic()
        if self._first is None or step < self._step:  # a new count starts: the demo counts trials, then runs
            self._first, self._started = step, now
        self._step = step
        done, seconds = step - self._first, max(now - self._started, 1e-9)
        rate = "" if not done else f", {done / seconds:.3g}/s" if done > seconds else f", {seconds / done:.3g} s each"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=steps, note=f"loss {loss:.4f}{rate}")
        elif step == steps or now - self._written > self.EVERY_S:
            self._written = now
            left = f", {duration((steps - step) * seconds / done)} left" if done and step < steps else ""
            self.log(f"{self._what}: {step}/{steps}, loss {loss:.4f}{rate}{left}")

    def _write(self, message: str) -> None:
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            super()._write(message)


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    right: Iterable[int] = (),
    whole: Iterable[int] = (),
    width: int | None = None,
) -> None:
    """A table on stderr. Columns are given by index: `right` are aligned to the right, `whole` are not wrapped."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold", title=title, title_justify="left")
    for i, heading in enumerate(columns):
        justify: Any = "right" if i in right else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=i in whole)
    for row in rows:
        table.add_row(*map(str, row))
    Console(stderr=True, width=width, highlight=False).print(table)


def show_tables(tables: Iterable[dict[str, Any]]) -> None:
    """Tables of a result; only a last column without a heading, for notes, is aligned to the left."""
    for one in tables:
        right = [i for i, heading in enumerate(one["columns"]) if heading or i == 0]
        show_table(one["columns"], one["rows"], title=one["title"], right=right, width=WIDTH)


def show_verdicts(verdicts: Sequence[dict[str, Any]]) -> None:
    """One line per verdict. Controls are in brackets; their "(a control …)" note is for other outputs."""
    words = {True: "pass", False: "FAIL", None: "?"}
    controls = {True: "(pass)", False: "(miss)", None: "?"}
    rows = [
        [(controls if one["control"] else words)[one["passed"]], one["what"], one["text"].partition(" (a control")[0]]
        for one in verdicts
    ]
    with_controls = any(one["control"] for one in verdicts)
    title = "verdicts (?: undecided); controls, in brackets, should miss" if with_controls else "verdicts"
    show_table(["", "", "measured; threshold"], rows, title=title, width=WIDTH)


def show_plan(plan: Plan, processes: int | None = None) -> None:
    """The numbers of a plan by role; with a number of processes also estimates of size, memory and time, from arithmetic."""
    from supar_cli.planning import estimate
    from supar_cli.planning.advice import COLUMNS, number, plan_rows

    numeric = range(1, len(COLUMNS))
    show_table(COLUMNS, plan_rows(plan), right=numeric, whole=[i for i in numeric if COLUMNS[i] != "shape"])
    log = Log()
    log.log("decay: steps in which weight decay alone divides a weight by e")
    if isinstance(plan.model, PlanModel):
        factors = plan.model.multipliers
        log.log(
            f"inputs × {number(factors.input)}, logits × {number(factors.output)}, q·k × {number(factors.attention)}, "
            f"residual × {number(factors.residual)}"
        )
    if processes is not None:
        log.log("\n".join(estimate.lines(plan, processes)))


def check_writable(path: Path, force: bool, text: str | None = None) -> None:
    """Raise InputError when writing would replace a file that differs (`text` unknown: any file) without `--force`."""
    if not force and path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file for --out")
    if not force and path.is_file() and (text is None or path.read_text("utf-8", "replace") != text):
        raise InputError(f"{path}: exists and differs; expected --force to overwrite it, or another --out")


def persist(path: Path, text: str, force: bool, log: Log) -> None:
    """Write a file whole, byte for byte. Raises InputError when it would replace one that differs without `--force`."""
    check_writable(path, force, text)
    with naming_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    log.log(f"wrote {path}")


def write_text(text: str, out: str, force: bool, log: Log) -> None:
    """Write a text to a file, then to stdout where that is read: a pipe, a file, or an `out` of -."""
    if out != "-":
        persist(Path(out), text, force, log)
    if out == "-" or not sys.stdout.isatty():
        to_stdout(text)


def emit(documents: list[Any], flags: Flags, log: Log, default: str | None) -> None:
    """Write the documents to `--out` or the default, then print them where stdout is read: a pipe, a file, or `-o -`."""
    text = document.write(documents)
    if flags.out != "-" and (flags.out or default):
        persist(Path(flags.out or default or ""), text, flags.force, log)
    print_documents(documents, flags, always=flags.out == "-", text=text)


def print_documents(documents: list[Any], flags: Flags, always: bool = False, text: str | None = None) -> None:
    """Print documents to stdout if stdout is not a terminal, or if `--json` or `always` is set. `text` is their YAML, if known."""
    if flags.json:
        to_stdout(json.dumps(documents[0] if len(documents) == 1 else documents, indent=1) + "\n")
    elif always or not sys.stdout.isatty():
        text = text or document.write(documents)
        is_unicode = codecs.lookup(sys.stdout.encoding).name.startswith("utf")
        to_stdout(text if is_unicode or text.isascii() else document.write_ascii(documents))


def to_stdout(text: str) -> None:
    """Write to stdout, once."""
    sys.stdout.write(text)
    sys.stdout.flush()
