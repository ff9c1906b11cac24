"""How long a plan's run takes on this machine, from timing a few real steps of its model. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable

from supar_cli.planning.plan import Plan
from supar_cli.sparse import autotune
from supar_cli.training.step_graph import WARM_UP_STEPS
from supar_cli.training.tasks import load_task
from supar_cli.training.trainer import Trainer

TIMED_S = 1.0  # chosen: long beside a scheduler's slices, short beside any run that is worth an estimate
MOST_STEPS = 50  # chosen: of tiny models, whose steps take a millisecond


def time_run(plan: Plan, step_of: Callable[[Plan], Callable[[], object]] | None = None) -> tuple[float, float]:
    """Seconds of a plan's run from its making to its last evaluation, and those spent on timing it once its data are loaded.

    `step_of` returns what is repeated instead of steps and evaluations. The plan is not compiled, which takes longer than a
    few steps. Raises SetupError where the machine lacks the device, the data or the memory.
    """
    if plan.data is not None:  # of a user's model, its own code reads them
        load_task(plan)
    began_s = time.perf_counter()
    step: Callable[[], object]
    evaluate: Callable[[], object] | None
    with autotune.keeping_no_measurement():
        plan = plan.model_copy(update={"run": plan.run.model_copy(update={"compile": "off"})})
        if step_of is None:
            trainer = Trainer(plan, load_task(plan))
            step, evaluate = trainer.step, trainer.evaluate
        else:
            step, evaluate = step_of(plan), None
    # the first one allocates, and loads or compiles kernels; a CUDA graph is replayed after those that it is recorded by
    untimed = WARM_UP_STEPS + 1 if plan.run.cuda_graph == "on" else 1
    for _ in range(untimed):
        step()
    warm_s = time.perf_counter()
    timed = 0
    while timed < 2 or (timed < MOST_STEPS and time.perf_counter() - warm_s < TIMED_S):
        step()
        timed += 1
    stepped_s = time.perf_counter()
    run_s = warm_s - began_s + max(0, plan.train.steps - untimed) * (stepped_s - warm_s) / timed
    if evaluate is not None:
        evaluate()
        run_s += (time.perf_counter() - stepped_s) * -(-plan.train.steps // plan.train.eval_every)
    return run_s, time.perf_counter() - began_s
