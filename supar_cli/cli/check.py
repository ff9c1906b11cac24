"""`supar check`: the coordinate check, with a verdict, for a proxy's shape or for a plan as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from supar_cli.cli import console, studies
from supar_cli.cli.app import single
from supar_cli.errors import CheckViolated, InputError, UnusableResult
from supar_cli.planning import rules
from supar_cli.planning.density import Share, literal, share
from supar_cli.planning.document import Document
from supar_cli.planning.kinds import kinds_of
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Spec

KINDS = kinds_of(Spec, Proxy, Plan)


def check(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROXY|SPEC|PLAN|-]",
            help="A document; - for stdin. [default: proxy.yaml, supar.yaml, else the quickstart template]",
            show_default=False,
        ),
    ] = None,
    parameterization: Annotated[
        str, typer.Option(help="What is checked: supar, mup, sp, supar-init-only or supar-lr-only.")
    ] = "supar",
    width: Annotated[
        str | None, typer.Option(help="Widths. [default: 1, 2, 4, 8 times the proxy's]", show_default=False)
    ] = None,
    density: Annotated[str | None, typer.Option(help="Densities. [default: 1,0.25,0.0625]", show_default=False)] = None,
    pattern: Annotated[
        str | None, typer.Option(help="exact, fixed_fan_in, bernoulli, block, or N:M such as 2:4.")
    ] = None,
    block: Annotated[int | None, typer.Option(help="Edge of a block: 16, 32, 64 or 128.")] = None,
    distribution: Annotated[str | None, typer.Option(help="uniform or erk.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds; fewer than 4 are noisy.")] = 4,
    max_seeds: Annotated[
        int, typer.Option(min=1, help="Seeds are doubled up to this where a bound lies within a slope's 95 % interval.")
    ] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Training steps measured.")] = 10,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences a step. [default: 512 tokens of them]", show_default=False)
    ] = None,
    jobs: console.JobsOption = None,
    executor: console.ExecutorOption = "local",
    executor_set: console.ExecutorSet = None,
    data: console.DataOption = None,
    device: console.DeviceOption = None,
    settings: console.Set = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder for records.jsonl, result.json and pictures.")
    ] = "check",
    force: Annotated[bool, typer.Option("--force", "-f", help="Start a folder's measurements anew.")] = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    verbose: console.Verbose = False,
) -> None:
    """Measure whether sizes of activations, gradients and updates keep still over density and width.

    Trains a few steps at each size and exits with status 5 when a slope exceeds its bound. A proxy is swept, beside SP and
    μP as controls that are to fail. A plan is taken as it stands and held against its proxy, dense.
    """
    flags = locals()
    if parameterization not in get_args(rules.ParameterizationName):
        raise InputError(
            f"--parameterization {parameterization}: expected one of {', '.join(get_args(rules.ParameterizationName))}"
        )
    talk = console.Talk(quiet, verbose)
    read, wanted = _document(source, flags)

    from supar_cli.experiments import coordinate_check

    with studies.progress_of("check", Path(out), quiet, verbose) as progress, console.located(read):
        result = coordinate_check.check(
            wanted,
            parameterization=parameterization,  # type: ignore[arg-type]
            width=_widths(width),
            density=_densities(density),
            seeds=seeds,
            max_seeds=max_seeds,
            steps=steps,
            batch_size=batch_size,
            jobs=jobs,
            executor=executor,
            executor_set=console.executor_settings(executor_set),
            verbose=verbose,
            out=out,
            force=force,
            reporter=progress,
        )
    verdicts = result["verdicts"]
    if not quiet:
        studies.show([table for table in result["tables"] if not table["folded"]])
        for one in verdicts:
            good = "control" if one["control"] else "passed"
            word = {None: "NOT JUDGED", one["control"]: "FAILED"}.get(one["passed"], good)
            talk.log(f"{word}: {one['what']}: {one['text']}")
    console.emit([result], None, None, force=True, as_json=as_json, talk=talk)
    unjudged = [one for one in verdicts if one["passed"] is None]
    violated = [one for one in verdicts if one["passed"] is one["control"]]
    if violated or unjudged:
        kind = CheckViolated if violated else UnusableResult
        raise kind("\n".join(f"{one['what']}: {one['text']}" for one in violated or unjudged))


def _document(source: str | None, flags: dict[str, Any]) -> tuple[Document, Any]:
    if source is None:
        source = next((name for name in ("proxy.yaml", "supar.yaml") if Path(name).exists()), None)
    read = console.read_one(source or str(console.template("quickstart")), "`supar tune-proxy` writes a proxy")
    read.name = source or "quickstart template"
    console.apply_settings(read, flags["settings"])
    drawn = ("pattern", "block", "distribution")
    kind = read.data.get("kind") if isinstance(read.data, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(read.problem(("kind",), f"is {kind!r}", f"expected one of {', '.join(KINDS)}"))
    if KINDS[kind] is Plan:
        given = [name for name in (*drawn, "width", "density") if flags[name] is not None]
        if given or flags["parameterization"] != "supar":
            word = given[0] if given else "parameterization"
            raise InputError(f"--{word}: a plan is checked as it stands; expected a proxy or a spec for --{word}")
    console.override(read, ("target", "sparsity"), {name: flags[name] for name in drawn})
    console.override(read, ("run",), {"device": flags["device"]})
    console.override(read, ("data",), {"source": flags["data"]})
    wanted = parse(KINDS[kind], read)
    return read, wanted.beside(read.name) if isinstance(wanted, Plan) else wanted


def _widths(text: str | None) -> list[int]:
    """The widths of the flag, the narrowest first. Raises InputError."""
    try:
        found = sorted({int(part) for part in _parts(text)})
    except ValueError:
        raise InputError(f"--width {text}: expected numbers with commas between them") from None
    if any(width < 1 for width in found):
        raise InputError(f"--width {text}: expected widths above 0")
    return found


def _densities(text: str | None) -> list[Share]:
    """The densities of the flag, the densest first. Raises InputError."""
    try:
        found = sorted({share(part) for part in _parts(text)}, key=literal, reverse=True)
    except ValueError:
        raise InputError(f"--density {text}: expected numbers with commas between them") from None
    if any(not 0 < literal(density) <= 1 for density in found):
        raise InputError(f"--density {text}: expected 0 < density <= 1")
    return found


def _parts(text: str | None) -> list[str]:
    return [part for part in (text or "").split(",") if part.strip()]


app = single(check)
