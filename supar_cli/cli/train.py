"""`supar train`: a plan becomes a run."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.errors import InputError, Preempted, SetupError
from supar_cli.planning.document import Document
from supar_cli.planning.plan import Plan, with_steps
from supar_cli.planning.spec import parse

if TYPE_CHECKING:
    from supar_cli.training.stopping import Stopping


def train(
    plan: Annotated[
        str | None,
        typer.Argument(help="Plan document, run directory, or - for stdin. [default: plan.yaml]", show_default=False),
    ] = None,
    index: Annotated[int | None, typer.Option(help="Run only this document of a stream, counted from 0.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Train this many steps instead, the warm-up the same share.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Continue the directory's run from its last checkpoint, or refuse to."
        ),
    ] = True,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Checkpoints that stay, the newest.")] = None,
    max_time: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop with a checkpoint after 90s, 30m, 2h or 1:30:00; exit 75.")
    ] = None,
    data: console.DataOption = None,
    device: console.DeviceOption = None,
    precision: console.PrecisionOption = None,
    compile_: Annotated[str | None, typer.Option("--compile", help="auto, on or off.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="How masked weights are computed: auto (the fastest here), dense, sparse or block."),
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option(help="Follow the run in tensorboard, wandb or mlflow too, offline; repeatable."),
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
            (("run", "keep"), keep),
            (("run", "trackers"), tracker),
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
    from supar_cli.training.stopping import Stopping

    with Stopping(None if max_time is None else console.seconds("--max-time", max_time)) as stopping:
        results = [
            _run(_shortened(one, steps, talk), document, out, resume and not force, force, dry_run, talk, stopping)
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
    plan: Plan,
    read: Document,
    out: str | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    talk: console.Talk,
    stopping: Stopping,
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
        setup = ready.setup
        precision = str(setup.precision).removeprefix("torch.")
        try:
            with rundir.opened(directory, plan, resume=resume, force=force) as changes, _enough_memory():
                for change in changes:
                    progress.warn(f"{directory}: goes on otherwise than it began: {change}")
                compiled = "on" if setup.compiles else "off"
                progress.log(
                    f"{directory}: {plan.train.steps} steps on {setup.device}, {precision}, compile {compiled}"
                )
                outcome = ready.run(directory, resume=resume, stop=stopping.reason)
        except (KeyboardInterrupt, Preempted) as error:
            kept = checkpoint.available(directory / "checkpoints")
            how = f"continues from {kept[-1].name}" if kept else "starts at step 0: no checkpoint was written yet"
            what = str(error) or f"stopped at step {ready.done} of {plan.train.steps}"
            progress.warn(f"{what}; `supar train {directory}` {how}")
            if stopping.signal == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise typer.Exit(Preempted.exit_status) from None
    result: dict[str, Any] = json.loads((directory / "result.json").read_text("utf-8"))
    if outcome.resumed_at == plan.train.steps:
        talk.log(f"{directory}: was complete already; --force starts again")
    took = f"after {result['steps']} steps in {console.duration(result['seconds'])}"
    talk.log(f"{directory}: validation loss {result['validation_loss']:.4f} {took}")
    return result


app = single(train)
