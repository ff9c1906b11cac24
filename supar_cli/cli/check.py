"""`supar check`: the coordinate check, with a verdict, for a proxy's shape or for a plan as it stands."""

from pathlib import Path
from typing import Any

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, apply, command, naming_flags, parameterization, workers_of
from supar_cli.data import corpus
from supar_cli.errors import InputError, UnusableResult
from supar_cli.planning.kinds import parse_any
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Proxy, Spec


def _widths(flag: str, text: str) -> list[int]:
    """Whole numbers with commas between them. Raises InputError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{flag} {text}: expected numbers above 0 with commas between them")
    return [int(part) for part in parts]


@command(
    "source parameterization width density pattern block distribution seeds max_seeds steps batch_size",
    "jobs executor executor_set data device dry_run set out force json quiet verbose",
    source={"metavar": "[PROXY|SPEC|PLAN|-]"},
    parameterization={
        "help": "Parameterization to check: supar, mup, sp, supar-init-only or supar-lr-only.",
        "default": "supar",
        "metavar": None,
        "read": parameterization,
    },
    width={
        "type": str,
        "help": "Widths to check, comma-separated. [default: 1, 2, 4 and 8 times the proxy's]",
        "path": "",
        "read": _widths,
    },
    density={"help": "Densities to check, comma-separated. [default: 1,0.25,0.0625]"},
    seeds={"help": "Seeds per point; results from fewer than 4 are noisy.", "default": 4, "path": ""},
    steps={"help": "Training steps measured.", "default": 10, "minimum": 1, "path": ""},
    batch_size={"help": "Sequences per step. [default: as many as make 512 tokens]", "minimum": 1, "path": ""},
    out={"help": "Folder for records.jsonl, result.json and figures.", "default": "check"},
    force={"help": "Discard the folder's earlier measurements and start again."},
)
def check(flags: Flags) -> None:
    """Measure whether activations, gradients and updates keep their size over density and width.

    Trains a few steps at each size and exits with status 5 when a slope exceeds its bound. For a proxy or
    a spec it trains models over density and width, with SP and μP as controls that should fail. A plan is checked as written,
    against the dense plan of its proxy.
    """
    path, name = documents.find(flags.source, "proxy.yaml", "supar.yaml")
    read = documents.read_one(path, "`supar tune-proxy` writes a proxy", name)
    apply(read, flags)
    subject: Any = parse_any(read, Spec, Proxy, Plan)
    if isinstance(subject, Plan):
        subject = subject.beside(path)
    asked = ("parameterization", "seeds", "max_seeds", "steps", "batch_size", "force", "out")
    if flags.dry_run:
        from supar_cli.experiments import check_plans, coordinates

        with documents.with_locations(read), naming_flags(flags):
            sizes: dict[str, Any] = {"widths": flags.width or [], "densities": flags.density or []}
            own = {name: getattr(flags, name) for name in ("seeds", "steps", "batch_size")}
            sweeps = check_plans.sweeps_of(corpus.with_hash(subject), flags.parameterization, **sizes, **own)
        parts = check_plans.parts(sweeps)
        return terminal.show_dry_run(parts, flags, step_of=coordinates.measured_step)
    progress = terminal.Progress("check", flags.quiet, Path(flags.out, "records.jsonl"))
    with progress, documents.with_locations(read), naming_flags(flags):
        result = supar_cli.check(
            subject,
            width=flags.width or [],
            density=flags.density or [],
            **{name: getattr(flags, name) for name in asked},
            reporter=progress,
            **workers_of(flags),
        )
    verdicts = result["verdicts"]
    if not flags.quiet:
        terminal.show_tables(table for table in result["tables"] if not table["folded"])
        terminal.show_verdicts(verdicts)
    terminal.print_documents([result], flags)
    terminal.require_passed(verdicts)
    if unjudged := [one for one in verdicts if one["passed"] is None]:
        raise UnusableResult("\n".join(f"{one['what']}: {one['text']}" for one in unjudged))
