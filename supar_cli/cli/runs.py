"""`supar runs`: the runs of a folder, as far as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from supar_cli.cli import terminal
from supar_cli.cli.app import command_app
from supar_cli.cli.options import Flags, command
from supar_cli.errors import InputError

COLUMNS = ("run", "state", "step", "loss", "validation", "last written, UTC")


@command("folder json quiet")
def runs(flags: Flags) -> None:
    """List runs: running, finished, preempted, failed or killed, how far they came, and their last losses."""
    log, root = terminal.Log(flags.quiet), Path(flags.folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; `supar train` writes runs/NAME")

    from supar_cli.reporting import text as reading

    found = [reading.summary(path) for path in reading.folders(root)]
    if not found:
        log.warn(f"{root}: holds no run")
    elif not flags.quiet:
        terminal.show_table(COLUMNS, [_row(one, root) for one in found], right=(2, 3, 4), whole=(2, 3, 4))
        for one in found:
            if one["text"]:
                log.log(f"{one['run']}: {one['text']}")
    terminal.print_documents([found], flags)


def _row(one: dict[str, Any], root: Path) -> list[str]:
    losses = ["" if one.get(key) is None else f"{one[key]:.4f}" for key in ("loss", "validation_loss")]
    steps = f"{one['step']}/{one['steps']}" if "steps" in one else ""
    written = one.get("written", "")[: len("2026-11-24 04:09")]
    return [str(Path(one["run"]).relative_to(root)), one["state"], steps, *losses, written]


app = command_app(runs)
