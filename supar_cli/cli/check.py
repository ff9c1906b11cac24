"""`supar check`: the coordinate check, with a verdict, for a proxy's shape or for a plan as it stands."""

from functools import partial
from pathlib import Path
from typing import Any

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, command, workers_of
from supar_cli.cli.values import counts, parameterization
from supar_cli.errors import UnusableResult
from supar_cli.planning.kinds import parse_any
from supar_cli.planning.plan import Plan
from supar_cli.planning.plan_sections import OwnModel
from supar_cli.planning.spec import Proxy, Spec


@command(
    "source factory batches loss layout",
    "parameterization width density pattern block distribution seeds max_seeds steps batch_size",
    "jobs executor executor_set data tokenizer field format device dry_run set out force json quiet verbose",
    source={"metavar": "[PROXY|SPEC|PLAN|-]"},
    layout={"path": "", "help": "Layout of your own model. [default: the proxy's; layout.yaml beside a plan]"},
    parameterization={
        "help": "Parameterization to check: supar, mup, sp, sp-si, supar-init-only or supar-lr-only.",
        "default": "supar",
        "metavar": None,
        "read": parameterization,
    },
    width={
        "type": str,
        "help": "Widths to check, comma-separated. [default: 1, 2, 4 and 8 times the proxy's]",
        "path": "",
        "read": counts,
    },
    density={"help": "Densities to check, comma-separated. [default: 1,0.25,0.0625]"},
    seeds={"help": "Seeds per point; results from fewer than 4 are noisy.", "default": 4, "path": ""},
    steps={"help": "Training steps measured.", "default": 10, "minimum": 1, "path": ""},
    batch_size={"help": "Sequences per step. [default: as many as make 512 tokens]", "minimum": 1, "path": ""},
    out={"help": "Folder for records.jsonl, result.json and figures. [default: check]"},
    force={"help": "Discard the folder's earlier measurements and start again."},
)
def check(flags: Flags) -> None:
    """Measure whether activations, gradients and updates keep their size over density and width.

    Trains a few steps at each size and exits with status 5 when a slope exceeds its bound. For a proxy or
    a spec it trains models over density and width, with SP and μP as controls that should fail. A plan is checked as written,
    against the dense plan of its proxy. A model of your own is made by --factory and trained on --batches.

    Examples:
      supar check plan.yaml --seeds 8 --jobs 2
      supar check proxy.yaml --factory mymodel:make --batches mymodel:batches
    """
    path, name = documents.find(flags.source, "proxy.yaml", "supar.yaml")
    read = documents.read_one(path, "expected a proxy, which `supar tune-proxy` writes", name)
    documents.apply(read, flags)
    found: Any = parse_any(read, Spec, Proxy, Plan)
    subject = found.beside(path)
    layout = flags.layout
    if isinstance(subject.model, OwnModel) and layout is None and path != "-":
        layout = str(Path(path).parent / "layout.yaml")
    code = {name: getattr(flags, name) for name in ("factory", "batches", "loss")}
    asked = ("parameterization", "seeds", "max_seeds", "steps", "batch_size", "force")
    if flags.dry_run:
        from supar_cli.experiments import check_plans, coordinates, own_coordinates

        with documents.with_locations(read), documents.naming_flags(flags):
            subject, own = check_plans.with_layout(subject, layout)
            sizes: dict[str, Any] = {"widths": flags.width or [], "densities": flags.density or [], "own": own}
            sizes |= {name: getattr(flags, name) for name in ("seeds", "steps", "batch_size")}
            sweeps = check_plans.sweeps_of(subject, flags.parameterization, **sizes)
            functions = own_coordinates.own_code(own, **code)
        step_of = partial(own_coordinates.measured_step, functions) if functions else coordinates.measured_step
        return terminal.show_dry_run(check_plans.parts(sweeps), flags, step_of=step_of)
    folder = terminal.folder_of(flags, "check")
    progress = terminal.Progress("check", flags.quiet, folder / "records.jsonl")
    with progress, documents.with_locations(read), documents.naming_flags(flags):
        result = supar_cli.check(
            subject,
            width=flags.width or [],
            density=flags.density or [],
            layout=layout,
            out=folder,
            **code,
            **{name: getattr(flags, name) for name in asked},
            reporter=progress,
            **workers_of(flags),
        )
    verdicts = result["verdicts"]
    if not flags.quiet:
        terminal.show_tables(table for table in result["tables"] if not table["folded"])
        terminal.show_verdicts(verdicts)
    terminal.print_documents([result], flags)
    terminal.Log(flags.quiet).next(f"supar report {folder}")
    terminal.require_passed(verdicts, flags)
    if unjudged := [one for one in verdicts if one["passed"] is None]:
        raise UnusableResult(terminal.verdict_lines(unjudged, flags))
