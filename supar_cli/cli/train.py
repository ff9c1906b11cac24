"""`supar train`: a plan becomes a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, command, require_one
from supar_cli.errors import InputError, Preempted
from supar_cli.planning import document
from supar_cli.planning.document import Document
from supar_cli.planning.plan import Plan, with_steps
from supar_cli.planning.problems import parse
from supar_cli.training.launch.environment import LAUNCH_DIR, TORCHRUN, StopSignals, is_worker_rank

if TYPE_CHECKING:
    from supar_cli.files import Record
    from supar_cli.training.distributed import Ranks


@dataclass(frozen=True, slots=True)
class Job:
    """A plan to run, with flags and settings applied, the document it was read from, and its directory."""

    plan: Plan
    read: Document
    directory: Path


@command(
    "plan index steps resume checkpoint_every keep max_time data tokenizer device precision compile engine nproc parallel",
    "max_restarts tracker dry_run set name out force json quiet verbose",
    steps={
        "help": "Train this many steps instead of the plan's; the warm-up keeps its share of them.",
        "minimum": 1,
        "path": "",
    },
    dry_run={"help": "Show sizes, memory and time, here from timing a few steps; write nothing."},
    out={"help": "Run directory. [default: runs/NAME]"},
    force={"help": "Start again in a directory that holds a run."},
)
def train(flags: Flags) -> None:
    """Train every plan of a document; metrics, checkpoints and result.json go to runs/NAME/.

    Examples:
      supar train
      supar train plan.yaml --name first --max-time 2h
    """
    log = terminal.Log(flags.quiet or is_worker_rank())
    if flags.dry_run:
        return _show_dry_run(_jobs(flags, log), flags.nproc or 1)
    if flags.nproc is not None and not _is_launched():
        raise typer.Exit(_launch_processes(flags, log))
    if flags.max_restarts and flags.nproc is None:
        raise InputError("--max-restarts: needs --nproc; expected torchrun's own --max-restarts under torchrun")
    from supar_cli.training.distributed import init_distributed

    with StopSignals(flags.max_time) as signals:
        try:
            with init_distributed() as ranks:
                jobs = ranks.on_main(_jobs, flags, log)
                results = [_run(job, flags, log.quiet, ranks, signals.reason) for job in jobs]
        except KeyboardInterrupt:
            if not is_worker_rank():
                sys.stderr.write("interrupted\n")
            sys.stderr.flush()
            os._exit(130)  # second Ctrl-C: exit at once, even while a checkpoint is being written
        except Preempted as error:
            signals.is_ending = True
            if error.interrupted:
                raise KeyboardInterrupt from None
            raise typer.Exit(Preempted.exit_status) from None
    if ranks.is_main:
        terminal.print_documents(results, flags)
        for job in jobs:
            log.next(f"supar show {job.directory}", f"supar report {job.directory}")


def _jobs(flags: Flags, log: terminal.Log) -> list[Job]:
    """The plans that the command line asks for. Raises InputError."""
    source, index, out = documents.plan_file(flags.plan), flags.index, flags.out
    if out == "-":
        out = None
    if flags.name is not None:
        require_one(flags, "name", "out")
        if Path(flags.name).name != flags.name or flags.name in ("", ".."):
            raise InputError(f"--name {flags.name}: is not a folder's name; expected --out for a path")
        out = str(Path("runs", flags.name))
    if source != (flags.plan or "plan.yaml"):  # a run directory
        out = out or flags.plan
    plans = []
    for read in documents.read_all(source, "expected a plan, which `supar transfer` writes"):
        documents.apply(read, flags, same_data=True)
        plans.append((parse(Plan, read).beside(source), read))
        with documents.with_locations(read):
            _ = plans[-1][0].own_data  # a user's model is trained by the user's script
    if index is not None:
        if not 0 <= index < len(plans):
            raise InputError(f"--index {index}: {source} holds {len(plans)} documents; expected 0 to {len(plans) - 1}")
        plans = [plans[index]]
    if out is not None and len(plans) > 1:
        flag = "out" if flags.name is None else "name"
        what = f"names one directory, but {source} holds {len(plans)} plans"
        raise InputError(f"--{flag}: {what}; expected --index to choose one")
    jobs = []
    for plan, read in plans:
        wanted = plan if flags.steps is None else with_steps(plan, flags.steps)
        before, after = plan.train, wanted.train
        if after.steps != before.steps:
            log.log(f"steps {before.steps} → {after.steps}, warm-up {before.warmup_steps} → {after.warmup_steps}")
        jobs.append(Job(wanted, read, Path(out or Path("runs") / wanted.name)))
    return jobs


def _run(job: Job, flags: Flags, quiet: bool, ranks: Ranks, stop: Callable[[], str | None]) -> Record:
    """Train a plan, this rank's part of it, and return its result."""
    from supar_cli.training import train as training

    with terminal.Progress(job.directory.absolute().name, quiet) as progress:
        with documents.with_locations(job.read):
            trainer = training.make_trainer(job.plan, progress, ranks)
        return training.run(trainer, job.directory, resume=flags.resume, force=flags.force, stop=stop)


def _show_dry_run(jobs: list[Job], processes: int) -> None:
    """Show plans, and the time that their runs take here if each is of one process."""
    from supar_cli.experiments import dry_run

    for job in jobs:
        terminal.show_plan(job.plan, processes)
    if processes == 1:
        parts = [dry_run.Part("run", [job.plan]) for job in jobs]
        terminal.Log().log(dry_run.time_here(parts, terminal.STARTED_S, jobs=1))


def _is_launched() -> bool:
    """Whether `--nproc` launched this process. Raises InputError if another launcher did."""
    if LAUNCH_DIR not in os.environ and TORCHRUN in os.environ:
        raise InputError("--nproc: torchrun has started this process; expected torchrun's own --nproc-per-node")
    return LAUNCH_DIR in os.environ


def _launch_processes(flags: Flags, log: terminal.Log) -> int:
    """Run this very command in several processes and return its exit status."""
    from supar_cli.training.launch import elastic

    stdin = document.standard_input() if flags.plan == "-" else None
    with elastic.launch_environment(flags.nproc, stdin) as folder:
        _jobs(flags, terminal.Log(quiet=True))  # report bad input once, before processes start
        return elastic.launch(sys.argv[1:], flags.nproc, flags.max_restarts or 0, folder, log.warn)
