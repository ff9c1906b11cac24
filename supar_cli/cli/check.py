"""`supar check`: the coordinate check, with a verdict, for a proxy's shape or for a plan as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from supar_cli.cli import console, studies
from supar_cli.cli.app import single
from supar_cli.data import corpus
from supar_cli.errors import CheckViolated, InputError
from supar_cli.planning import density as sparsity
from supar_cli.planning import rules
from supar_cli.planning.document import Document
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Proxy, Spec, parse

TOKENS = 512  # chosen: of a batch; fewer make single gradients noisy, more make the check slow
KINDS: dict[str, Any] = {"supar.spec/v1": Spec, "supar.proxy/v1": Proxy, "supar.plan/v1": Plan}


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
    pattern: Annotated[str | None, typer.Option(help="exact, fixed_fan_in, bernoulli or block.")] = None,
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
    with console.located(read):
        if wanted.data.hash is None:
            wanted = wanted.model_copy(update={"data": corpus.identified(wanted.data)})
        run = wanted.run.model_copy(update={"precision": "float32", "compile": "off", "micro_batch_size": None})
        wanted = wanted.model_copy(update={"run": run})
        sweeps = _sweeps(wanted, flags)
    talk.log(
        f"{read.name}: {len({plan.hash() for sweep in sweeps for plan in sweep.runs()})} runs of {steps} steps, "
        f"{sweeps[0].plans[0][0].train.batch_size} sequences of {sweeps[0].plans[0][0].model.context} tokens, {wanted.data.source}"
    )
    result, broken = _measured(sweeps, Path(out), flags, talk)
    console.emit([result], None, None, force=True, as_json=as_json, talk=talk)
    if broken:
        raise CheckViolated("\n".join(broken))


def _document(source: str | None, flags: dict[str, Any]) -> tuple[Document, Any]:
    if source is None:
        source = next((name for name in ("proxy.yaml", "supar.yaml") if Path(name).exists()), None)
    read = console.read_one(source or str(console.template("quickstart")), "`supar tune-proxy` writes a proxy")
    read.name = source or "quickstart template"
    console.apply_settings(read, flags["settings"])
    places = {name: ("target", "sparsity", name) for name in ("pattern", "block", "distribution")}
    kind = read.data.get("kind") if isinstance(read.data, dict) else None
    if kind not in KINDS:
        raise InputError(read.problem(("kind",), f"is {kind!r}", f"expected one of {', '.join(KINDS)}"))
    if kind == "supar.plan/v1":
        given = [name for name in (*places, "width", "density") if flags[name] is not None]
        if given or flags["parameterization"] != "supar":
            word = given[0] if given else "parameterization"
            raise InputError(f"--{word}: a plan is checked as it stands; expected a proxy or a spec for --{word}")
    for name, path in {**places, "device": ("run", "device"), "data": ("data", "source")}.items():
        if flags[name] is not None:
            console.put(read, path, flags[name])
    if flags["data"] is not None:
        console.put(read, ("data", "hash"), None)
    return read, parse(KINDS[kind], read)


def _sweeps(wanted: Any, flags: dict[str, Any]) -> list[Any]:
    from supar_cli.analysis import check_plans

    rows = flags["batch_size"] or max(1, TOKENS // wanted.model.context)
    if isinstance(wanted, Plan):
        return check_plans.plan_sweeps(wanted, seeds=flags["seeds"], steps=flags["steps"], batch_size=rows)
    base = wanted.model.width
    return check_plans.proxy_sweeps(
        wanted,
        flags["parameterization"],
        widths=_numbers("width", flags["width"], int) or [base * factor for factor in check_plans.WIDTHS],
        densities=_numbers("density", flags["density"], sparsity.number) or list(check_plans.DENSITIES),
        seeds=flags["seeds"],
        steps=flags["steps"],
        batch_size=rows,
    )


def _numbers(word: str, text: str | None, kind: Any) -> list[Any]:
    """The sizes of a flag, the densest or the narrowest first. Raises InputError."""
    try:
        found = sorted({kind(part) for part in (text or "").split(",") if part.strip()}, reverse=kind is not int)
    except ValueError:
        raise InputError(f"--{word} {text}: expected numbers with commas between them") from None
    if any(not (value > 0 and (kind is int or value <= 1)) for value in found):
        raise InputError(f"--{word} {text}: expected {'widths above 0' if kind is int else '0 < density <= 1'}")
    return found


def _measured(
    sweeps: list[Any], folder: Path, flags: dict[str, Any], talk: console.Talk
) -> tuple[dict[str, Any], list[str]]:
    """Run what is not recorded yet, judge, draw and write; the result and what is to be said of violated bounds."""
    from supar_cli.analysis import check as verdicts
    from supar_cli.analysis import records
    from supar_cli.tuning import execute

    first = sweeps[0].plans[0][0]
    workers = studies.workers(flags, first.run.device, folder)
    execute.require_runnable(first, device=workers.here)
    # what identifies the question is its first seed: more seeds go on with what is there
    question = {
        "runs": sorted({row[0].hash() for sweep in sweeps for row in sweep.plans}),
        "sweeps": [[sweep.arm, sweep.axis, sweep.sizes] for sweep in sweeps],
    }
    records.open_result(folder, question, flags["force"])
    store = records.Records(folder)
    with workers:
        found = _judged(sweeps, store, workers, flags["max_seeds"], talk)
    pictures = verdicts.pictures(sweeps, store.by_run, flags["steps"])
    result = records.result(
        "supar.check-result/v1",
        "Coordinate check: sizes over density and width",
        verdicts=[
            # of a control, whether it keeps the bounds, which it is not to
            {"what": v.sweep.label, "passed": v.passed != v.sweep.control, "control": v.sweep.control, "text": v.text()}
            for v in found
        ],
        tables=[verdicts.table(verdict) for verdict in found if verdict.findings],
        figures=pictures,
        parents={},
        environment=records.environment(workers),
        notes=[f"{v.sweep.label}: {note}" for v in found for note in v.notes],
    )
    studies.write(folder, result, talk)
    if not talk.quiet:
        studies.show([table for table, v in zip(result["tables"], found, strict=False) if not v.sweep.control])
        for verdict in found:
            word = ("control" if verdict.sweep.control else "passed") if verdict.passed else "FAILED"
            talk.log(f"{word}: {verdict.sweep.label}: {verdict.text()}")
    return result, [f"{v.sweep.label}: {v.text()}" for v in found if not v.passed]


def _judged(sweeps: list[Any], store: Any, workers: Any, max_seeds: int, talk: console.Talk) -> list[Any]:
    """The verdicts, of more seeds where a bound lies within a slope's interval; of no more where another fails for certain."""
    from supar_cli.analysis import coordinates
    from supar_cli.analysis.check import judge

    while True:
        plans = {plan.hash(): plan for sweep in sweeps for plan in sweep.runs()}
        calls = {run: (plan,) for run, plan in sorted(plans.items(), key=lambda item: -item[1].parameters)}
        with studies.progress_of("check", store.path.parent, talk.quiet, talk.verbose) as progress:
            for done, total, record in store.complete(coordinates.measure, calls, workers):
                progress.progress(done, total, record["losses"][-1] if record["losses"] else float("nan"))
        found = [judge(sweep, store.by_run) for sweep in sweeps]
        short = [v for v in found if v.open and len(v.sweep.plans[0]) < max_seeds]
        if not short or any(not v.passed and not v.open for v in found if not v.sweep.control):
            return found
        for verdict in short:
            seeds = min(2 * len(verdict.sweep.plans[0]), max_seeds)
            talk.log(f"{verdict.sweep.label}: {verdict.text()}; going on to {seeds}")
            verdict.sweep.grow(seeds)


app = single(check)
