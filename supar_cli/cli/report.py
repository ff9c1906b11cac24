"""`supar report`: runs, sweeps, checks, comparisons and plans on one self-contained HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.errors import InputError

DEFAULT = "report.html"


def report(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH…",
            help="Run directories, folders of sweeps, checks, comparisons or demos, plans or proxies; - for stdin.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help=f"The page; - for stdout only. [default: {DEFAULT}]", show_default=False),
    ] = None,
    force: console.Force = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write verdicts, figures' data and tables as JSON to stdout.")
    ] = False,
    quiet: console.Quiet = False,
    verbose: console.Verbose = False,
) -> None:
    """Show what was measured on one HTML page: verdicts first, then figures, tables, environment and hashes.

    A job that still runs is shown as far as it is.
    """
    talk = console.Talk(quiet, verbose)
    if out == "":
        raise InputError("--out: is empty; expected a file or -")
    missing = [path for path in paths if path != "-" and not Path(path).exists()]
    if missing:
        raise InputError(
            *(f"{path}: no such file or folder; expected what `supar train` or `sweep` wrote" for path in missing)
        )

    from pydantic_core import to_jsonable_python

    from supar_cli.reporting import html as page
    from supar_cli.reporting import read as reading

    parts = [part for path in paths for part in reading.read(path)]
    text = page.render(parts)
    if out != "-":
        console.persist(Path(out or DEFAULT), text, force, talk)
        for part in parts:
            talk.log(f"  {part.source}: {part.state}; {page.summary(part.verdicts)}")
    if as_json:
        data = {"kind": "supar.report/v1", "parts": to_jsonable_python(parts)}
        console.to_stdout(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    elif out == "-":
        console.to_stdout(text)


app = single(report)
