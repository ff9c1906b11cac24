"""`supar runs`: the runs of a folder, as far as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.errors import InputError

COLUMNS = ("run", "state", "step", "loss", "validation", "last written, UTC")


def runs(
    folder: Annotated[str, typer.Argument(help="A folder of run directories, or of folders of them.")] = "runs",
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """List runs: running, finished, preempted, failed or killed, how far they came, and their last losses."""
    talk = console.Talk(quiet)
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder; `supar train` writes runs/NAME")

    from rich.console import Console
    from rich.table import Table

    from supar_cli.reporting import text as reading

    found = [reading.summary(path) for path in reading.folders(root)]
    if not found:
        talk.warn(f"{folder}: holds no run")
    elif not quiet:
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
        for heading in COLUMNS:
            right = heading in ("step", "loss", "validation")
            table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=right)
        for one in found:
            losses = ("" if one.get(key) is None else f"{one[key]:.4f}" for key in ("loss", "validation_loss"))
            steps = f"{one['step']}/{one['steps']}" if "steps" in one else ""
            name = Path(one["run"]).relative_to(root)
            table.add_row(str(name), one["state"], steps, *losses, one.get("written", "")[: len("2026-11-24 04:09")])
        Console(stderr=True).print(table, highlight=False)
        for one in found:
            if one["text"]:
                talk.log(f"{one['run']}: {one['text']}")
    console.emit([found], None, None, force=True, as_json=as_json, talk=talk)


app = single(runs)
