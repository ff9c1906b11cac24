"""A plan trained in a run directory, as `supar train` and Python do it: started or continued, reported, and its result read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from supar_cli.errors import InputError, Preempted, SetupError
from supar_cli.files import Record
from supar_cli.planning.document import content_hash
from supar_cli.planning.estimate import duration
from supar_cli.planning.plan import Plan
from supar_cli.training import run_directory
from supar_cli.training.checkpoint_reader import available
from supar_cli.training.distributed import Ranks, StopReason, collective_error, init_distributed
from supar_cli.training.launch.environment import LAUNCH_DIR
from supar_cli.training.reporter import NullReporter, Reporter
from supar_cli.training.runtime import lacks_memory
from supar_cli.training.trainer import Trainer

# chosen: a fifth of the steps, more than warm-up alone explains. measured: the quickstart's proxy, 300 steps, four seeds,
# clips .050 to .060 of its steps, its targets of twice the width .030 dense and .017 at density 1/4
CLIPPED_GAP = 0.2  # between the shares of steps that the proxy and a run clip


def train(plan: Plan, directory: str | Path, *, resume: bool = True, force: bool = False) -> Record:
    """Train a plan in a run directory, from its last checkpoint, and return its result document. Raises SuparError.

    In a script that torchrun started, its processes train it together. Without `resume` a directory that holds a run is
    refused; with `force` it starts again.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"{type(plan).__name__}: expected a Plan")
    with init_distributed() as ranks:
        return run(make_trainer(plan, NullReporter(), ranks), Path(directory), resume=resume, force=force)


def make_trainer(plan: Plan, reporter: Reporter, ranks: Ranks) -> Trainer:
    """The trainer of a plan in this process; only the main rank's reports. Raises SetupError where memory runs out."""
    with _naming_lack_of_memory():
        return Trainer(plan, reporter=reporter if ranks.is_main else NullReporter(), ranks=ranks)


def run(
    trainer: Trainer, directory: Path, *, resume: bool = True, force: bool = False, stop: StopReason = lambda: None
) -> Record:
    """Train in a run directory to the plan's last step and return the result document; every rank calls it.

    `stop()` gives a reason to end early: the reporter gets the command that continues, and Preempted is raised. Raises SuparError.
    """
    plan, ranks, reporter = trainer.plan, trainer.ranks, trainer.reporter
    # a restarted process of `--nproc` continues its run, whatever the flags say
    is_launched = LAUNCH_DIR in os.environ
    begun = Path(os.environ.get(LAUNCH_DIR, ""), "begun-" + content_hash(str(directory)))
    has_begun = ranks.on_main(lambda: is_launched and begun.exists())
    force = force and not has_begun
    resume = (resume and not force) or has_begun
    with ExitStack() as stack:
        try:
            if why := ranks.on_main(run_directory.preemption_reason, directory):
                # restarted by torchrun, which treats every status but 0 as a failure
                raise collective_error(Preempted, why)
            opening = run_directory.open_run(directory, plan, resume=resume, force=force)
            changes = ranks.on_main(stack.enter_context, opening)
            if is_launched:
                begun.touch()
            with ranks.translate_peer_errors(), _naming_lack_of_memory():
                for change in changes:
                    reporter.warn(f"{directory}: continues with a changed setting: {change}")
                for line in getattr(trainer.task, "lines", ()):
                    reporter.log(line)
                for message in [*trainer.runtime.warnings, *getattr(trainer.task, "warnings", ())]:
                    reporter.warn(message)
                reporter.log(f"{directory}: {plan.train.steps} steps on {_place(trainer)}")
                history = trainer.run(directory, resume=resume, stop=stop)
        except (KeyboardInterrupt, Preempted) as error:
            kept = available(directory / "checkpoints")
            how = f"continues from {kept[-1].name}" if kept else "starts at step 0: no checkpoint was written yet"
            reporter.warn(f"{str(error) or 'interrupted'}; `supar train {directory}` {how}")
            raise
    if history.resumed_at == plan.train.steps:
        reporter.log(f"{directory}: is already complete; --force starts it again")
    result: Record = ranks.on_main(run_directory.read_result, directory / "result.json")
    share, proxy_share = result.get("clipped_share"), plan.parameterization.base.clipped_share
    if share is not None and proxy_share is not None and abs(share - proxy_share) > CLIPPED_GAP:
        what = f"{100 * share:.0f} % of the steps were clipped, but {100 * proxy_share:.0f} % of the proxy's"
        remedy = "set train.grad_clip so that the shares agree, or 0 in proxy and run"
        reporter.warn(
            f"{directory}: {what}: clipping does not transfer, as norms change with width and density; {remedy}"
        )
    took = f"after {result['steps']} steps in {duration(result['seconds'])}"
    scored = f", accuracy {result['accuracy']:.4f} ± {result['accuracy_se']:.4f}" if "accuracy" in result else ""
    reporter.log(f"{directory}: validation loss {result['validation_loss']:.4f}{scored} {took}")
    return result


def _place(trainer: Trainer) -> str:
    """Where and how a trainer computes, in words."""
    runtime, ranks = trainer.runtime, trainer.ranks
    among = f" in {ranks.size} processes ({trainer.parallel.kind})" if ranks.is_distributed else ""
    compiled = "on" if runtime.compiles else f"off ({runtime.why_eager})" if runtime.why_eager else "off"
    graph = ", steps as one CUDA graph" * runtime.has_graph
    return f"{runtime.device}{among}, {runtime.precision_name}, compile {compiled}{graph}"


@contextmanager
def _naming_lack_of_memory() -> Iterator[None]:
    """Raise SetupError for the out-of-memory errors of numpy, torch and CUDA."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        what = "expected a smaller run.micro_batch_size or model (`--dry-run` estimates what it needs)"
        raise SetupError(f"out of memory; {what}") from None
