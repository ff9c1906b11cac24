"""`supar show`: one run in the terminal."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.errors import InputError

LAST = 12  # chosen: evaluations that are listed
WIDEST, HEIGHT = 100, 12  # chosen: a curve of the terminal's width up to this, in lines that leave room for the rest


def show(
    run: Annotated[str, typer.Argument(help="A run directory.", show_default=False)],
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Show a run: state, plan, environment and the curve of its losses."""
    talk = console.Talk(quiet)
    folder = Path(run)
    if not (folder / "plan.yaml").is_file():
        raise InputError(f"{run}: no run directory; expected one that `supar runs` lists")

    from supar_cli.reporting import text as reading
    from supar_cli.reporting.result import flatten

    plan, found, records, environment = reading.details(folder)
    if not quiet:
        from supar_cli.cli import tables

        losses = [
            f"{what} {found[key]:.4f}"
            for what, key in (("loss", "loss"), ("validation", "validation_loss"))
            if found[key] is not None
        ]
        step = f"step {found['step']} of {found['steps']}"
        talk.log(", ".join([f"{run}: {found['state']}", step, *losses, f"last written {found['written']}"]))
        if found["text"]:
            talk.log(found["text"])
        talk.log(f"plan {plan.name}, {plan.hash()}")
        tables.show_plan(plan)
        for name, value in flatten({key: value for key, value in environment.items() if key != "engines"}).items():
            talk.log(f"{name}: {value}")
        engines = environment.get("engines")
        for line in tables.counted("engine", engines if isinstance(engines, dict) else {}):
            talk.log(line)
        width = min(shutil.get_terminal_size().columns, WIDEST)
        lines = reading.curve(records, "loss", width, HEIGHT)
        if lines:
            talk.log("\n".join(["training loss", *lines]))
        values = [f"{record['validation_loss']:.4f} at {record['step']}" for record in records if _evaluated(record)]
        if values:
            talk.log(textwrap.fill(f"validation loss {', '.join(values[-LAST:])}", width))
    console.emit([found | {"environment": environment}], None, None, force=True, as_json=as_json, talk=talk)


def _evaluated(record: dict[str, Any]) -> bool:
    return isinstance(record.get("validation_loss"), float)


app = single(show)
