"""`supar explain`: the formula, the numbers and the source behind a plan's values."""

from __future__ import annotations

import json
from pathlib import Path

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.app import command_app
from supar_cli.cli.options import Flags, command
from supar_cli.planning.explain import legend
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse


@command("plan tensor role json", json={"help": "Write a JSON list, one item a plan, to stdout."})
def explain(flags: Flags) -> None:
    """Show the rule behind every number of a plan, worked out, and say where the plan differs from it."""
    source, missing = documents.plan_file(flags.plan), "`supar transfer` writes it"
    if flags.tensor is None and flags.plan is not None and Path("plan.yaml").exists():
        missing += f"; for a tensor of that name: supar explain plan.yaml {flags.plan}"
    plans = [parse(Plan, read) for read in documents.read_all(source, missing)]
    explained = [supar_cli.explain(plan, flags.tensor, flags.role) for plan in plans]
    if flags.json:
        terminal.to_stdout(json.dumps([one.as_json() for one in explained], indent=1, ensure_ascii=False) + "\n")
        return
    titles = [f"{source}, plan {i} of {len(plans)}" for i in range(1, len(plans) + 1)] if len(plans) > 1 else [source]
    texts = [one.text(title) for title, one in zip(titles, explained, strict=True)]
    terminal.to_stdout("\n".join([*texts, "\n".join(legend(explained)) + "\n"]))


app = command_app(explain)
