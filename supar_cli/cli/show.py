"""`supar show`: one run in the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from supar_cli.cli import terminal
from supar_cli.cli.app import command_app
from supar_cli.cli.options import Flags, command
from supar_cli.errors import InputError
from supar_cli.planning.plan import Plan

LAST = 12  # chosen: evaluations that are listed
WIDEST, HEIGHT = 100, 12  # chosen: a curve of the terminal's width up to this, in lines that leave room for the rest


@command("run json quiet")
def show(flags: Flags) -> None:
    """Show a run: state, plan, environment and the curve of its losses."""
    folder = Path(flags.run)
    if not (folder / "plan.yaml").is_file():
        raise InputError(f"{flags.run}: no run directory; expected one that `supar runs` lists")

    from supar_cli.reporting import text as reading

    plan, found, records, environment = reading.details(folder)
    if not flags.quiet:
        _show_state(flags.run, plan, found)
        _show_environment(environment)
        _show_losses(records)
    terminal.print_documents([found | {"environment": environment}], flags)


def _show_state(run: str, plan: Plan, found: dict[str, Any]) -> None:
    log, names = terminal.Log(), {"loss": "loss", "validation_loss": "validation"}
    losses = [f"{name} {found[key]:.4f}" for key, name in names.items() if found[key] is not None]
    step = f"step {found['step']} of {found['steps']}"
    log.log(", ".join([f"{run}: {found['state']}", step, *losses, f"last written {found['written']}"]))
    if found["text"]:
        log.log(found["text"])
    log.log(f"plan {plan.name}, {plan.hash()}")
    terminal.show_plan(plan)


def _show_environment(environment: dict[str, Any]) -> None:
    from supar_cli.reporting.html import flat

    log, engines = terminal.Log(), environment.get("engines")
    for name, value in flat({key: value for key, value in environment.items() if key != "engines"}):
        log.log(f"{name}: {value}")
    if isinstance(engines, dict) and engines:
        counts = sorted(Counter(engines.values()).items())
        log.log("engine: " + ", ".join(f"{engine} {count}" for engine, count in counts))


def _show_losses(records: list[dict[str, Any]]) -> None:
    from supar_cli.reporting import text as reading

    log, width = terminal.Log(), min(shutil.get_terminal_size().columns, WIDEST)
    if lines := reading.curve(records, "loss", width, HEIGHT):
        log.log("\n".join(["training loss", *lines]))
    losses = [(record["step"], record.get("validation_loss")) for record in records]
    values = [f"{loss:.4f} at {step}" for step, loss in losses if isinstance(loss, float)]
    if values:
        log.log(textwrap.fill(f"validation loss {', '.join(values[-LAST:])}", width))


app = command_app(show)
