"""What commands show: messages, progress and tables on stderr, and one document on stdout or in a file."""

import codecs
import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from math import ceil, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from supar_cli.cli import text as words
from supar_cli.cli.options import Flags, workers_of
from supar_cli.errors import CheckViolated, InputError
from supar_cli.files import file_hash, naming_write_errors, replacing, write_file
from supar_cli.planning import document, estimate
from supar_cli.planning.plan import Plan, PlanModel

if TYPE_CHECKING:
    from supar_cli.training.reporter import Work

STARTED_S = time.monotonic()  # of the command, which imports this first
ECHO = "^C^C"  # what a terminal writes behind a bar at Ctrl-C, pressed twice: with room for it the bar's line can be erased


class Log:
    """Messages on stderr, a line each."""

    def __init__(self, quiet: bool | None = False) -> None:
        self.quiet = bool(quiet)
        self.is_terminal = words.is_terminal()

    def log(self, message: str) -> None:
        if not self.quiet:
            self._write(message)

    def warn(self, message: str) -> None:
        self._write(f"warning: {message}")

    def next(self, *commands: str) -> None:
        """Say how to go on."""
        self.log(f"next: {' · '.join(commands)}")

    def _write(self, message: str) -> None:
        sys.stderr.write(words.fit(message) + "\n")
        sys.stderr.flush()


class TimeLeft:
    """The time that is left of steps or runs, from those done since the first call; as a text it counts down."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._started_s = 0.0
        self._bound, self._end_s, self.each_s = "", 0.0, 0.0

    def update(self, done: int, work: "Work") -> None:
        """Take over what is done. Runs in flight count as far as those that began with them: `each_s` is the time of one."""
        now_s = time.monotonic()
        if self._first is None:
            self._first, self._started_s = (done, work.done), now_s
        ended, share = done - self._first[0], work.done - self._first[1]
        if ended <= 0 or share <= 0:
            return
        rounds = ceil(ended / work.jobs)
        self.each_s = (now_s - self._started_s) / rounds
        self._bound = work.bound
        self._end_s = now_s + self.each_s * (ended / share) * (work.total - work.done) / work.jobs

    def __str__(self) -> str:
        left_s = self._end_s - time.monotonic()
        return f"{self._bound}{estimate.duration(left_s)} left" if left_s > 0 else ""

    @property
    def rate(self) -> str:
        return f"{1 / self.each_s:.3g}/s" if 0 < self.each_s < 1 else f"{self.each_s:.3g} s each" if self.each_s else ""


class Progress(Log):
    """A bar with rate and time left on a terminal, a line every few seconds elsewhere. Use as a context manager.

    `records`: the file from which the same command continues, named when the user stops it.
    """

    EVERY_S = 10.0  # chosen: often enough to see life, rare enough for a log file

    def __init__(self, what: str, quiet: bool | None = False, records: Path | None = None) -> None:
        super().__init__(quiet)
        self._what, self._records, self._left = what, records, TimeLeft()
        self._bar: Any = None
        self._task: Any = None
        self._written = time.monotonic()

    def __enter__(self) -> Self:
        if self.is_terminal and not self.quiet:
            from rich.console import Console, ConsoleDimensions
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
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
                TextColumn("{task.fields[left]}"),
                console=Narrower(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._what, total=None, note="loading torch, data …", left=self._left)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt and self._records is not None:
            self.warn(f"stopped; the same command continues from {self._records}")
        if self._bar is not None:
            self._bar.stop()

    def progress(self, done: int, total: int, loss: float, work: "Work | None" = None) -> None:
        from supar_cli.training.reporter import Work

        self._left.update(done, work or Work(done, total))
        note = ", ".join(filter(None, ("" if isnan(loss) else f"loss {loss:.4f}", self._left.rate)))
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif done and (done == total or time.monotonic() - self._written > self.EVERY_S):
            self._written = time.monotonic()
            self.log(", ".join(filter(None, (f"{self._what}: {done}/{total}", note, str(self._left)))))

    def _write(self, message: str) -> None:
        if self._bar is not None:
            self._bar.console.print(words.fit(message), markup=False, highlight=False, soft_wrap=True)
        else:
            super()._write(message)


def show_tables(tables: Iterable[dict[str, Any]]) -> None:
    """Tables of a result; only a last column without a heading, for notes, is aligned to the left."""
    for one in tables:
        right = [i for i, heading in enumerate(one["columns"]) if heading or i == 0]
        Log().log(words.table(one["columns"], one["rows"], right, one["title"]))


def require_passed(verdicts: Sequence[dict[str, Any]], flags: Flags) -> None:
    """Raise CheckViolated for what is missed, and for controls that miss nothing (the verdict on the power)."""
    if missed := [one for one in verdicts if one["passed"] is False and not one["control"]]:
        raise CheckViolated(verdict_lines(missed, flags))


def show_verdicts(verdicts: Sequence[dict[str, Any]]) -> None:
    """One line per verdict, none without any. Controls are in brackets; their "(a control …)" note is for other outputs."""
    if not verdicts:
        return
    judged = {True: "pass", False: "FAIL", None: "?"}
    controls = {True: "(pass)", False: "(miss)", None: "?"}
    rows = [
        [(controls if one["control"] else judged)[one["passed"]], one["what"], one["text"].partition(" (a control")[0]]
        for one in verdicts
    ]
    with_controls = any(one["control"] for one in verdicts)
    title = "verdicts (?: undecided); controls, in brackets, should miss" if with_controls else "verdicts"
    Log().log(words.table(["", "", "measured; threshold"], rows, title=title))


def verdict_lines(verdicts: Sequence[dict[str, Any]], flags: Flags) -> str:
    """A line per verdict, with its text unless that was shown."""
    return "\n".join(f"{one['what']}: {one['text'] if flags.quiet else 'see the verdicts above'}" for one in verdicts)


def show_plan(plan: Plan, processes: int | None = None) -> None:
    """The numbers of a plan by role; with a number of processes also estimates of size, memory and time, from arithmetic."""
    from supar_cli.planning.advice import COLUMNS, number, plan_rows
    from supar_cli.planning.density_over_run import summary

    log = Log()
    log.log(words.table(COLUMNS, plan_rows(plan), right=range(1, len(COLUMNS))))
    log.log("decay: steps in which weight decay alone divides a weight by e")
    if moving := summary(plan):
        log.log(moving)
    if isinstance(plan.model, PlanModel):
        factors = plan.model.multipliers
        log.log(
            f"inputs × {number(factors.input)}, logits × {number(factors.output)}, q·k × {number(factors.attention)}, "
            f"residual × {number(factors.residual)}"
        )
    if processes is not None:
        log.log("\n".join([*estimate.lines(plan, processes), *estimate.times([plan])]))


def log_plans(plans: Sequence[Plan], flags: Flags, log: Log) -> None:
    """What plans are, a line each, with their tables where they are asked for or a terminal shows them."""
    for plan in plans:
        end = " at the end" if plan.sparsity.updates and plan.sparsity.updates.start else ""
        log.log(
            f"{plan.parameterization.name}: sparsity {plan.sparsity.sparsity:g}, density {plan.sparsity.density:g}{end}; "
            f"{plan.model.shape_text}; "
            f"{plan.live:,} of {plan.parameters:,} parameters live"
        )
        if flags.dry_run or flags.explain or (log.is_terminal and not flags.quiet):
            show_plan(plan, processes=1 if flags.dry_run else None)


def show_dry_run(parts: list[Any], flags: Flags, **how: Any) -> None:
    """What a command would run, its size, memory and time, on stderr; `how` is that of `dry_run.time_here`."""
    from supar_cli.experiments import dry_run

    options = {name: value for name, value in workers_of(flags).items() if value is not None}
    here = dry_run.time_here(parts, STARTED_S, **options, **how)
    Log().log("\n".join(dry_run.describe(parts, here, by_script="step_of" not in how)))


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


def keep_files(made: Path, documents: list[Any], flags: Flags, default: str) -> None:
    """Write the files of a folder beside the documents that name them, unless it is a dry run.

    Raises InputError when one of them, or the documents, would replace one that differs without `--force`.
    """
    out = Path(default if flags.out in (None, "-") else flags.out)
    if flags.dry_run:
        return
    if flags.out != "-":
        check_writable(out, flags.force, (json_text if flags.json and flags.out else document.write)(documents))
    changed: list[tuple[Path, Path]] = []
    for one in sorted(made.iterdir()):
        path = out.parent / one.name
        if not path.is_file() or file_hash(path) != file_hash(one):
            check_writable(path, flags.force)
            changed.append((one, path))
    for one, path in changed:
        with naming_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as aside:
                shutil.copyfile(one, aside)


def folder_of(flags: Flags, default: str) -> Path:
    """The folder that `--out` names, else the default one. Raises InputError where it is a file."""
    folder = Path(default if flags.out in (None, "-") else flags.out)
    if folder.is_file():
        raise InputError(f"{folder}: is a file; expected a folder for --out")
    return folder


def prints(flags: Flags) -> bool:
    """Whether the document goes to stdout: `-o -` says so, and `-o FILE` not; by default where stdout is no terminal."""
    return flags.out == "-" or (flags.out is None and not sys.stdout.isatty())


def write_text(text: str, flags: Flags, log: Log, default: str) -> None:
    """Write a text to `--out` alone, else to the default file and to stdout where that is read. A default of - is no file."""
    out = flags.out or default
    if out != "-":
        persist(Path(out), text, flags.force, log)
    if prints(flags) or (out == "-" and flags.out is None):
        to_stdout(text)


def emit(documents: list[Any], flags: Flags, log: Log, default: str | None) -> None:
    """Write the documents to `--out` alone, else to the default file and to stdout where that is read.

    With `--json` as JSON to `--out` and stdout; the default file is YAML.
    """
    if flags.out not in (None, "-"):
        text = json_text(documents) if flags.json else document.write(documents)
        persist(Path(flags.out), text, flags.force, log)
        return
    if default is not None and flags.out is None:
        persist(Path(default), document.write(documents), flags.force, log)
    print_documents(documents, flags)


def print_documents(documents: list[Any], flags: Flags, always: bool = False) -> None:
    """Print documents to stdout where they go there, or if `--json` or `always` is set."""
    if flags.json:
        to_stdout(json_text(documents))
    elif always or prints(flags):
        text, is_unicode = (
            document.write(documents),
            codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf"),
        )
        to_stdout(text if is_unicode or text.isascii() else document.write_ascii(documents))


def json_text(documents: list[Any]) -> str:
    """The document, or the list of several, as JSON."""
    return json.dumps(documents[0] if len(documents) == 1 else documents, indent=1) + "\n"


def to_stdout(text: str) -> None:
    """Write to stdout, once."""
    sys.stdout.write(text)
    sys.stdout.flush()
