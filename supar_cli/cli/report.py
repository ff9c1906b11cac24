"""`supar report`: runs, sweeps, checks, comparisons and plans on one self-contained HTML page."""

from __future__ import annotations

import json
from pathlib import Path

from supar_cli.cli import terminal
from supar_cli.cli.app import command_app
from supar_cli.cli.options import Flags, command
from supar_cli.errors import InputError
from supar_cli.files import template

DEFAULT = "report.html"


@command(
    "paths out force json quiet verbose",
    out={"help": f"The page; - for stdout only. [default: {DEFAULT}]"},
    json={"help": "Write verdicts, figures' data and tables as JSON to stdout."},
)
def report(flags: Flags) -> None:
    """Show what was measured on one HTML page: verdicts first, then figures, tables, environment and hashes.

    A job that still runs is shown as far as it is.
    """
    if flags.out == "":
        raise InputError("--out: is empty; expected a file or -")
    missing = [path for path in flags.paths if path != "-" and not Path(path).exists()]
    if missing:
        what = "no such file or folder; expected what `supar train` or `sweep` wrote"
        raise InputError(*(f"{path}: {what}" for path in missing))

    from supar_cli.reporting import html as page
    from supar_cli.reporting import read as reading

    log = terminal.Log(flags.quiet)
    parts = [part for path in flags.paths for part in reading.read(path)]
    text = page.render(parts, template("report.html.j2").read_text("utf-8"))
    if flags.out != "-":
        terminal.persist(Path(flags.out or DEFAULT), text, flags.force, log)
        for part in parts:
            log.log(f"  {part.source}: {part.state}; {page.summary(part.verdicts)}")
    if flags.json:
        data = {"kind": "supar.report/v1", "parts": [part.as_json() for part in parts]}
        terminal.to_stdout(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    elif flags.out == "-":
        terminal.to_stdout(text)


app = command_app(report)
