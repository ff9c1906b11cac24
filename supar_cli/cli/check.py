"""`supar check`: the coordinate check, with a verdict, for a proxy's shape or for a plan as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.app import command_app
from supar_cli.cli.options import Flags, apply, command, flag_of, numbers, parameterization, workers_of
from supar_cli.data import corpus
from supar_cli.errors import CheckViolated, InputError
from supar_cli.planning.density import Share, literal
from supar_cli.planning.document import Document
from supar_cli.planning.kinds import parse_any
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Proxy, Spec

NOT_OF_A_PLAN = ("pattern", "block", "distribution", "width", "density")


def _widths(flag: str, text: str) -> list[int]:
    """Widths with commas between them, the narrowest first. Raises InputError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{flag} {text}: expected numbers above 0 with commas between them")
    return sorted({int(part) for part in parts})


def _densities(flag: str, text: str) -> list[Share]:
    """Densities with commas between them, the densest first. Raises InputError."""
    found = sorted(set(numbers(flag, text)), key=literal, reverse=True)
    if any(not 0 < literal(density) <= 1 for density in found):
        raise InputError(f"{flag} {text}: expected 0 < density <= 1")
    return found


@command(
    "source parameterization width density pattern block distribution seeds max_seeds steps batch_size",
    "jobs executor executor_set data device set out force json quiet verbose",
    source={"metavar": "[PROXY|SPEC|PLAN|-]"},
    parameterization={
        "help": "What is checked: supar, mup, sp, supar-init-only or supar-lr-only.",
        "default": "supar",
        "metavar": None,
        "read": parameterization,
    },
    width={"type": str, "help": "Widths. [default: 1, 2, 4, 8 times the proxy's]", "path": "", "read": _widths},
    density={"help": "Densities. [default: 1,0.25,0.0625]", "read": _densities},
    seeds={"help": "Seeds; fewer than 4 are noisy.", "default": 4, "path": ""},
    steps={"help": "Training steps measured.", "default": 10, "minimum": 1, "path": ""},
    batch_size={"help": "Sequences a step. [default: 512 tokens of them]", "minimum": 1, "path": ""},
    out={"help": "Folder for records.jsonl, result.json and pictures.", "default": "check"},
    force={"help": "Start a folder's measurements anew."},
)
def check(flags: Flags) -> None:
    """Measure whether sizes of activations, gradients and updates keep still over density and width.

    Trains a few steps at each size and exits with status 5 when a slope exceeds its bound. A proxy is swept, beside SP and
    μP as controls that are to fail. A plan is taken as it stands and held against its proxy, dense.
    """
    read, subject = _read(flags)
    from supar_cli.experiments import check_run

    folder, log, widths, densities = Path(flags.out), terminal.Log(flags.quiet), flags.width or [], flags.density or []
    asked = {name: getattr(flags, name) for name in ("seeds", "steps", "batch_size")}
    with documents.with_locations(read):
        subject = corpus.with_hash(subject)
        sweeps = check_run.sweeps_of(subject, flags.parameterization, widths=widths, densities=densities, **asked)
    first = sweeps[0].plans[0][0]
    log.log(
        f"{read.name}: {len({plan.hash() for sweep in sweeps for plan in sweep.runs()})} runs of {flags.steps} steps, "
        f"{first.train.batch_size} sequences of {first.decoder.context} tokens, {subject.data.source}"
    )
    with terminal.Progress("check", flags.quiet, folder / "records.jsonl") as progress:
        result = supar_cli.check(
            subject,
            parameterization=flags.parameterization,
            width=widths,
            density=densities,
            **asked,
            max_seeds=flags.max_seeds,
            out=folder,
            force=flags.force,
            reporter=progress,
            **workers_of(flags),
        )
    verdicts = result["verdicts"]
    if not flags.quiet:
        terminal.show_tables(table for table in result["tables"] if not table["title"].endswith(", a control"))
        for one in verdicts:
            word = "FAILED" if _is_violated(one) else "control" if one["control"] else "passed"
            log.log(f"{word}: {one['what']}: {one['text']}")
    terminal.print_documents([result], flags)
    if violations := [one for one in verdicts if _is_violated(one)]:
        raise CheckViolated("\n".join(f"{one['what']}: {one['text']}" for one in violations))


def _is_violated(verdict: dict[str, Any]) -> bool:
    """Whether a bound is not kept; a control is to exceed its own."""
    return bool(verdict["passed"] == verdict["control"])


def _read(flags: Flags) -> tuple[Document, Any]:
    """The document to check, as read and as a proxy, a spec or a plan. Raises InputError."""
    path, name = documents.find(flags.source, "proxy.yaml", "supar.yaml")
    read = documents.read_one(path, "`supar tune-proxy` writes a proxy", name)
    apply(read, flags)
    subject = parse_any(read, Spec, Proxy, Plan)
    if not isinstance(subject, Plan):
        return read, subject
    given = [option for option in NOT_OF_A_PLAN if getattr(flags, option) is not None]
    if flags.parameterization != "supar":
        given.append("parameterization")
    if given:
        flag = flag_of(given[0])
        raise InputError(f"{flag}: a plan is checked as it stands; expected a proxy or a spec for {flag}")
    return read, subject.beside(path)


app = command_app(check)
