"""`supar explain`: the formula, the numbers and the source behind a plan's values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.planning.explain import explain as explain_plan
from supar_cli.planning.explain import legend
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse


def explain(
    plan: Annotated[
        str | None,
        typer.Argument(help="Plan document, run directory, or - for stdin. [default: plan.yaml]", show_default=False),
    ] = None,
    tensor: Annotated[
        str | None,
        typer.Argument(help="Only this: blocks.0.mlp.up, mlp.up (in all blocks), mlp.", show_default=False),
    ] = None,
    role: Annotated[
        str | None, typer.Option(metavar="ROLE", help="Only embedding, hidden, norm, bias or unembedding tensors.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write a JSON list, one item a plan, to stdout.")] = False,
) -> None:
    """Show the rule behind every number of a plan, worked out, and say where the plan differs from it."""
    source = plan or "plan.yaml"
    if source != "-" and Path(source).is_dir():
        source = str(Path(source) / "plan.yaml")
    missing = "`supar transfer` writes it"
    if tensor is None and plan is not None and Path("plan.yaml").exists():
        missing += f"; for a tensor of that name: supar explain plan.yaml {plan}"
    documents = console.read_all(source, missing)
    explained = [explain_plan(parse(Plan, document), tensor, role) for document in documents]
    if as_json:
        console.to_stdout(json.dumps([one.as_json() for one in explained], indent=1, ensure_ascii=False) + "\n")
        return
    titles = [f"{source}, plan {i} of {len(explained)}" for i in range(1, len(explained) + 1)]
    texts = [one.text(title) for title, one in zip(titles if len(titles) > 1 else [source], explained, strict=True)]
    console.to_stdout("\n".join([*texts, "\n".join(legend(explained)) + "\n"]))


app = single(explain)
