"""`supar train`: a plan becomes a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supar_cli.cli import console
from supar_cli.cli.app import ARGUMENTS, single
from supar_cli.errors import InputError, Preempted, SetupError
from supar_cli.planning import document
from supar_cli.planning.document import Document
from supar_cli.planning.estimate import duration
from supar_cli.planning.plan import Plan, with_steps
from supar_cli.planning.problems import parse
from supar_cli.training.launch.environment import LAUNCH_DIR, TORCHRUN, is_worker_rank

if TYPE_CHECKING:
    from supar_cli.training.distributed import Ranks


@dataclass(frozen=True, slots=True)
class Job:
    """A plan to run, flags and settings put in, the document it was read from, and its directory."""

    plan: Plan
    read: Document
    directory: Path


def train(
    ctx: typer.Context,
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
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to train with on this machine, each on its own GPU.", show_default=False),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="How processes hold the model: ddp (whole), fsdp (in shards), auto (shards where it fits none)."
        ),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="With --nproc: times to go on from the last checkpoint when a process dies.")
    ] = 0,
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
    flags = locals()
    talk = console.Talk(quiet or is_worker_rank(), verbose)
    if dry_run:
        _show(flags, talk)
        return
    if nproc is not None and not _is_launched():
        raise typer.Exit(_launched(flags, talk))
    if max_restarts and nproc is None:
        raise InputError("--max-restarts: goes with --nproc; torchrun has its own")
    from supar_cli.training.distributed import init_distributed
    from supar_cli.training.launch.signals import StopSignals

    limit = None if max_time is None else console.seconds("--max-time", max_time)
    with StopSignals(limit) as signals:
        try:
            with init_distributed() as ranks:
                jobs = ranks.on_main(_jobs, flags, talk)
                results = [_run(job, flags, talk, signals.reason, ranks) for job in jobs]
        except KeyboardInterrupt:
            if not is_worker_rank():
                sys.stderr.write("interrupted\n")
            sys.stderr.flush()
            os._exit(130)  # the second Ctrl-C: nothing is waited for, not even a checkpoint that is being written
        except Preempted as error:
            if error.interrupted:
                raise KeyboardInterrupt from None
            raise typer.Exit(Preempted.exit_status) from None
    if ranks.is_main:
        console.emit(results, None, None, force=True, as_json=as_json, talk=talk)


def _jobs(flags: dict[str, Any], talk: console.Talk) -> list[Job]:
    """The plans that the command line asks for. Raises InputError."""
    out, source = flags["out"], flags["plan"] or "plan.yaml"
    if source != "-" and Path(source).is_dir():
        out, source = out or source, str(Path(source) / "plan.yaml")
    documents = console.read_all(source, "`supar transfer` writes it")
    plans = []
    for read in documents:
        console.apply_settings(read, flags["settings"])
        for path, flag in PLACES.items():
            if flags[flag] is not None:
                console.put(read, path, flags[flag])
        plans.append(parse(Plan, read).beside(source))
    index = flags["index"]
    if index is not None:
        if not 0 <= index < len(plans):
            raise InputError(f"--index {index}: {source} holds {len(plans)} documents; expected 0 to {len(plans) - 1}")
        plans, documents = plans[index : index + 1], documents[index : index + 1]
    if out is not None and len(plans) > 1:
        raise InputError(f"--out: {source} holds {len(plans)} plans; expected --index with one directory")
    plans = [_shortened(plan, flags["steps"], talk) for plan in plans]
    return [Job(plan, read, Path(out or Path("runs") / plan.name)) for plan, read in zip(plans, documents, strict=True)]


PLACES = {
    ("run", "device"): "device",
    ("run", "precision"): "precision",
    ("run", "compile"): "compile_",
    ("run", "engine"): "engine",
    ("run", "parallel"): "parallel",
    ("run", "checkpoint_every"): "checkpoint_every",
    ("run", "keep"): "keep",
    ("run", "trackers"): "tracker",
    ("data", "source"): "data",
}


def _show(flags: dict[str, Any], talk: console.Talk) -> None:
    """Sizes and estimates of what would run."""
    from supar_cli.cli import tables

    for job in _jobs(flags, talk):
        tables.show_plan(job.plan)
        tables.show_estimate(job.plan, flags["nproc"] or 1)


def _is_launched() -> bool:
    """Whether this process is one of `--nproc`'s. Raises InputError where it is one of another launcher's."""
    if LAUNCH_DIR not in os.environ and TORCHRUN in os.environ:
        raise InputError("--nproc: torchrun has started this process; expected torchrun's own --nproc-per-node")
    return LAUNCH_DIR in os.environ


def _launched(flags: dict[str, Any], talk: console.Talk) -> int:
    """Run this very command in several processes and give its exit status."""
    from supar_cli.training.launch import elastic

    with elastic.launch_environment(
        flags["nproc"], document.standard_input() if flags["plan"] == "-" else None
    ) as folder:
        _jobs(flags, console.Talk(quiet=True))  # bad input ends here, once
        return elastic.launch(flags["ctx"].meta[ARGUMENTS], flags["nproc"], flags["max_restarts"], folder, talk.warn)


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


def _begun_file(directory: Path) -> Path | None:
    """What says that `--nproc`'s processes have begun a directory's run; None where it was not `--nproc` that started this.

    A process of their next life goes on with the run, whatever the flags said of its first start.
    """
    if LAUNCH_DIR not in os.environ:
        return None
    return Path(os.environ[LAUNCH_DIR], "begun-" + document.content_hash(str(directory)))


def _has_begun(directory: Path) -> bool:
    file = _begun_file(directory)
    return file is not None and file.exists()


def _note_begun(directory: Path) -> None:
    if file := _begun_file(directory):
        file.touch()


def _run(job: Job, flags: dict[str, Any], talk: console.Talk, stop: Any, ranks: Ranks) -> dict[str, Any]:
    """Train a plan, this rank's part of it, and return its result; only the main rank speaks and writes."""
    from supar_cli.training import checkpoint_reader, run_directory, trainer
    from supar_cli.training.distributed import collective_error
    from supar_cli.training.reporter import NullReporter

    plan, directory = job.plan, job.directory
    goes_on = ranks.on_main(_has_begun, directory)
    force = flags["force"] and not goes_on
    resume = (flags["resume"] and not force) or goes_on
    with console.Progress(directory.name, talk.quiet, talk.verbose) as progress, ExitStack() as stack:
        with console.located(job.read), _enough_memory():
            ready = trainer.Trainer(plan, reporter=progress if ranks.is_main else NullReporter(), ranks=ranks)
        runtime = ready.runtime
        try:
            if why := ranks.on_main(run_directory.preemption_reason, directory):
                raise collective_error(
                    Preempted, why
                )  # torchrun has started it again: every status but 0 is a failure to it
            opening = run_directory.open_run(directory, plan, resume=resume, force=force)
            changes = ranks.on_main(stack.enter_context, opening)
            ranks.on_main(_note_begun, directory)
            with ranks.translate_peer_errors(), _enough_memory():
                for change in changes:
                    ready.reporter.warn(f"{directory}: goes on otherwise than it began: {change}")
                precision, compiled = str(runtime.precision).removeprefix("torch."), "on" if runtime.compiles else "off"
                among = f" in {ranks.size} processes ({ready.parallel.kind})" if ranks.is_distributed else ""
                ready.reporter.log(
                    f"{directory}: {plan.train.steps} steps on {runtime.device}{among}, {precision}, compile {compiled}"
                )
                history = ready.run(directory, resume=resume, stop=stop)
        except (KeyboardInterrupt, Preempted) as error:
            kept = checkpoint_reader.available(directory / "checkpoints")
            how = f"continues from {kept[-1].name}" if kept else "starts at step 0: no checkpoint was written yet"
            what = str(error) or f"stopped at step {ready.done} of {plan.train.steps}"
            ready.reporter.warn(f"{what}; `supar train {directory}` {how}")
            raise
    if not ranks.is_main:
        return {}
    result: dict[str, Any] = run_directory.read_result(directory / "result.json")
    if history.resumed_at == plan.train.steps:
        talk.log(f"{directory}: was complete already; --force starts again")
    took = f"after {result['steps']} steps in {duration(result['seconds'])}"
    talk.log(f"{directory}: validation loss {result['validation_loss']:.4f} {took}")
    return result


app = single(train)
