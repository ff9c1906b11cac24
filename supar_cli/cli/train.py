"""`supar train`: a plan becomes a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.errors import InputError, SetupError
from supar_cli.planning.document import Document
from supar_cli.planning.plan import Plan, with_steps
from supar_cli.planning.spec import parse


def train(
    plan: Annotated[
        str | None,
        typer.Argument(help="Plan document, run directory, or - for stdin. [default: plan.yaml]", show_default=False),
    ] = None,
    index: Annotated[int | None, typer.Option(help="Run only this document of a stream, counted from 0.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Train this many steps instead, the warm-up the same share.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    data: console.DataOption = None,
    device: console.DeviceOption = None,
    precision: console.PrecisionOption = None,
    compile_: Annotated[str | None, typer.Option("--compile", help="auto, on or off.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="How masked weights are computed: auto (the fastest here), dense, sparse or block."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show sizes, FLOPs, memory and time; run nothing.")
    ] = False,
    settings: console.Set = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Run directory. [default: runs/NAME]", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Start again in a directory that holds a run.")] = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    verbose: console.Verbose = False,
) -> None:
    """Train every plan of a document; metrics, checkpoints and result.json go to runs/NAME/."""
    talk = console.Talk(quiet, verbose)
    source = plan or "plan.yaml"
    if source != "-" and Path(source).is_dir():
        out, source = out or source, str(Path(source) / "plan.yaml")
    documents = console.read_all(source, "`supar transfer` writes it")
    plans = []
    for document in documents:
        console.apply_settings(document, settings)
        for path, value in (
            (("run", "device"), device),
            (("run", "precision"), precision),
            (("run", "compile"), compile_),
            (("run", "engine"), engine),
            (("run", "checkpoint_every"), checkpoint_every),
        ):
            if value is not None:
                console.put(document, path, value)
        if data is not None:
            console.put(document, ("data", "source"), data)
        plans.append(parse(Plan, document))
    if index is not None:
        if not 0 <= index < len(plans):
            raise InputError(f"--index {index}: {source} holds {len(plans)} documents; expected 0 to {len(plans) - 1}")
        plans, documents = plans[index : index + 1], documents[index : index + 1]
    if out is not None and len(plans) > 1:
        raise InputError(f"--out: {source} holds {len(plans)} plans; expected --index with one directory")
    results = [
        _run(_shortened(one, steps, talk), document, out, resume, force, dry_run, talk)
        for one, document in zip(plans, documents, strict=True)
    ]
    if not dry_run:
        console.emit(results, None, None, force=True, as_json=as_json, talk=talk)


def _shortened(plan: Plan, steps: int | None, talk: console.Talk) -> Plan:
    if steps is None or steps == plan.train.steps:
        return plan
    shorter = with_steps(plan, steps)
    talk.log(f"steps {plan.train.steps} → {steps}, warm-up {plan.train.warmup_steps} → {shorter.train.warmup_steps}")
    return shorter


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Turn numpy's, torch's and CUDA's ways of running out of memory into a message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise SetupError(
            "out of memory; expected a smaller run.micro_batch_size or model (`--dry-run` estimates what it needs)"
        ) from None


def _run(
    plan: Plan, read: Document, out: str | None, resume: bool, force: bool, dry_run: bool, talk: console.Talk
) -> dict[str, Any]:
    if dry_run:
        from supar_cli.cli import tables

        tables.show_plan(plan)
        tables.show_estimate(plan)
        return {}
    directory = Path(out or Path("runs") / plan.name)
    from supar_cli.training import checkpoint, rundir, trainer

    with console.Progress(directory.name, talk.quiet, talk.verbose) as progress:
        with console.located(read), _enough_memory():
            ready = trainer.Trainer(plan, reporter=progress)
        rundir.start(directory, plan, resume=resume, force=force)
        setup = ready.setup
        talk_precision = str(setup.precision).removeprefix("torch.")
        progress.log(
            f"{directory}: {plan.train.steps} steps on {setup.device}, {talk_precision}, compile {'on' if setup.compiles else 'off'}"
        )
        try:
            with _enough_memory():
                outcome = ready.run(directory, resume=resume)
        except KeyboardInterrupt:
            kept = checkpoint.available(directory / "checkpoints")
            how = f"continues from {kept[-1].name}" if kept else "starts at step 0: no checkpoint was written yet"
            progress.warn(f"stopped at step {ready.done}; `supar train {directory} --resume` {how}")
            raise
    result: dict[str, Any] = json.loads((directory / "result.json").read_text("utf-8"))
    if outcome.resumed_at == plan.train.steps:
        talk.log(f"{directory}: was complete already")
    took = f"after {result['steps']} steps in {console.duration(result['seconds'])}"
    talk.log(f"{directory}: validation loss {result['validation_loss']:.4f} {took}")
    return result


app = single(train)
