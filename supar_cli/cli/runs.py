"""`supar runs`, `show` and `report`: what was measured so far."""

import json
import shutil
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from supar_cli.cli import terminal
from supar_cli.cli import text as words
from supar_cli.cli.options import Flags, command
from supar_cli.errors import InputError
from supar_cli.reporting import runs as reading
from supar_cli.reporting.read import read
from supar_cli.reporting.result import flatten

COLUMNS = ("run", "state", "step", "loss", "validation", "accuracy", "last written, UTC")
SHOWN = (*reading.LOSSES, "accuracy")
LAST = 12  # chosen: evaluations that are listed
WIDEST, HEIGHT = 100, 12  # chosen: a curve of the terminal's width up to this, in lines that leave room for the rest
PAGE = "report.html"


@command("folder json quiet")
def runs(flags: Flags) -> None:
    """List runs with their state (running, finished, preempted, failed or killed), progress and last losses.

    Examples:
      supar runs
      supar runs sweeps/NAME --json
    """
    log, root = terminal.Log(flags.quiet), Path(flags.folder)
    if not root.is_dir():
        what = "is a file; expected a folder of runs" if root.exists() else "no such folder"
        raise InputError(f"{root}: {what}; `supar train` writes runs/NAME")

    found = [reading.summary(path) for path in reading.folders(root)]
    if not found:
        log.warn(f"{root}: no run directory found")
    elif not flags.quiet:
        rows = [_row(one, root) for one in found]
        shown = [name for name in COLUMNS if name != "accuracy" or any(row[name] for row in rows)]
        right = [at for at, name in enumerate(shown) if name in ("step", "loss", "validation", "accuracy")]
        log.log(words.table(shown, [[row[name] for name in shown] for row in rows], right=right))
        for one in found:
            if one["text"]:
                log.log(f"{one['run']}: {one['text']}")
    terminal.print_documents([found], flags)


def _row(one: dict[str, Any], root: Path) -> dict[str, str]:
    scores = ["" if one.get(key) is None else f"{one[key]:.4f}" for key in ("loss", "validation_loss", "accuracy")]
    steps = f"{one['step']}/{one['steps']}" if "steps" in one else ""
    written = one.get("written", "")[: len("2026-11-24 04:09")]
    values = (str(Path(one["run"]).relative_to(root)), one["state"], steps, *scores, written)
    return dict(zip(COLUMNS, values, strict=True))


@command("directory json quiet")
def show(flags: Flags) -> None:
    """Show a run: state, plan, environment and the curve of its losses.

    Examples:
      supar show
      supar show runs/NAME
    """
    log = terminal.Log(flags.quiet)
    folder = find_run(flags.directory, log)
    if not (folder / "plan.yaml").is_file():
        raise InputError(f"{folder}: not a run directory; expected one that `supar runs` lists")

    run = reading.details(folder)
    plan, found, environment = run.plan, run.summary, run.environment
    if not flags.quiet:
        scores = [f"{key.removesuffix('_loss')} {found[key]:.4f}" for key in SHOWN if found.get(key) is not None]
        step = f"step {found['step']} of {found['steps']}"
        log.log(", ".join([f"{folder}: {found['state']}", step, *scores, f"last written {found['written']}"]))
        if found["text"]:
            log.log(found["text"])
        log.log(f"plan {plan.name}, {plan.hash()}")
        terminal.show_plan(plan)
        for name, value in flatten({key: value for key, value in environment.items() if key != "engines"}).items():
            log.log(f"{name}: {value}")
        engines = environment.get("engines")
        if isinstance(engines, dict) and engines:
            counts = sorted(Counter(engines.values()).items())
            log.log("engine: " + ", ".join(f"{engine} {count}" for engine, count in counts))
        _show_losses(run.records, log)
    terminal.print_documents([found | {"environment": environment}], flags)


def find_run(path: str | None, log: terminal.Log) -> Path:
    """The run directory of a path, or of a name in runs/; by default the newest. Raises InputError where there is none."""
    return _find(path) if path is not None else _newest(log)


def _find(path: str) -> Path:
    """The path, or the run of this name in runs/ where there is nothing at the path."""
    named = Path("runs", path)
    return named if not Path(path).exists() and named.is_dir() else Path(path)


def _newest(log: terminal.Log) -> Path:
    """The run of runs/ that was last written, which is named. Raises InputError where there is none."""
    found = reading.folders(Path("runs"))
    if not found:
        raise InputError("runs: holds no run; expected a run directory, which `supar train` writes")
    log.log(f"the newest run: {found[0]}")
    return found[0]


def _show_losses(records: list[dict[str, Any]], log: terminal.Log) -> None:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    if lines := reading.curve(records, "loss", width, HEIGHT):
        log.log("\n".join(["training loss", *lines]))
    if len(set(reading.series(records, "density").values())) > 1:
        lines = reading.curve(records, "density", width, HEIGHT // 2)
        log.log("\n".join(["density of the tensors whose masks change", *lines]))
    if masks := reading.masks_text(records):
        log.log(masks)
    for title, name in (("validation loss", "validation_loss"), ("accuracy", "accuracy")):
        values = [
            f"{record[name]:.4f}{_error_text(record.get(f'{name}_se'))} at {record['step']}"
            for record in records
            if isinstance(record.get(name), float)
        ]
        if values:
            log.log(textwrap.fill(f"{title} {', '.join(values[-LAST:])}", width))


def _error_text(error: float | None) -> str:
    """A standard error, where there is one."""
    return "" if error is None else f" ± {error:.4f}"


@command(
    "paths out force json quiet verbose",
    out={"help": f"The page; - for stdout only. [default: {PAGE}]"},
    json={"help": "Write verdicts, figures' data and tables as JSON, to --out or to stdout."},
)
def report(flags: Flags) -> None:
    """Write one HTML page of results: verdicts first, then figures, tables, environment and hashes.

    A job that is still running is shown with its results so far.

    Examples:
      supar report
      supar report runs/NAME sweeps/NAME demo -o page.html
    """
    if flags.out == "":
        raise InputError("--out: is empty; expected a file or -")
    log = terminal.Log(flags.quiet)
    paths = [path if path == "-" else str(_find(path)) for path in flags.paths or []] or [str(_newest(log))]
    missing = [path for path in paths if path != "-" and not Path(path).exists()]
    if missing:
        what = "no such file or folder; expected what `supar train` or `sweep` wrote"
        raise InputError(*(f"{path}: {what}" for path in missing))

    from supar_cli.reporting import html as page

    parts = [part for path in paths for part in read(path)]
    text = page.render(parts)
    data = {"kind": "supar.report/v1", "parts": to_jsonable_python(parts)}
    as_json = json.dumps(data, indent=1, allow_nan=False) + "\n" if flags.json else ""
    if flags.out != "-":
        terminal.persist(Path(flags.out or PAGE), as_json if flags.out and as_json else text, flags.force, log)
        for part in parts:
            log.log(f"  {part.source}: {part.state}; {page.summary(part.verdicts)}")
    if flags.out == "-" or (as_json and flags.out is None):
        terminal.to_stdout(as_json or text)
