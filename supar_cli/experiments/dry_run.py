"""What a command would run, and the time that takes: by arithmetic for other devices, by timing a few steps for this one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

from supar_cli.errors import SuparError
from supar_cli.jobs.clusters import WorkerOptions, make_workers
from supar_cli.jobs.command import require_command
from supar_cli.jobs.workers import Workers
from supar_cli.planning import estimate
from supar_cli.planning.plan import Plan, PlanModel
from supar_cli.planning.plan_sections import OwnModel
from supar_cli.training.timing import time_run

LONGEST_S = 20.0  # chosen: a model whose timing may take longer is not timed; there the count of FLOPs is right


@dataclass(frozen=True, slots=True)
class Part:
    """Runs that a command makes before those of the next part: a plan of each. `bound` is that of `reporter.Work`."""

    what: str
    plans: list[Plan]
    bound: str = ""


def describe(parts: list[Part], here: str, by_script: bool = True) -> list[str]:
    """The runs, size and memory of the largest, and the time of all by device and `here`, in a few lines."""
    plans = [plan for part in parts for plan in part.plans]
    counts = ", ".join(f"{part.bound}{len(part.plans)} {part.what}" for part in parts if part.plans)
    if isinstance(plans[0].model, OwnModel) and by_script:
        return [f"runs: {counts}; {len(plans)} in all, each by: {require_command(plans[0])}", here]
    largest = estimate.lines(max(plans, key=estimate.run_seconds))
    steps = sum(plan.train.steps for plan in plans)
    found = [f"runs: {counts}; {steps:,} steps in all. The largest:", *(f"  {line}" for line in largest)]
    return [*found, *estimate.times(plans), here]


def time_here(
    parts: list[Part],
    started_s: float,
    step_of: Callable[..., Any] | None = None,
    **options: Unpack[WorkerOptions],
) -> str:
    """The time that a command takes here, from timing a few steps of each size; or why it isn't timed. Nothing is written.

    `started_s` is when the command began, on the monotonic clock; `step_of` is that of `time_run`.
    """
    if isinstance(parts[0].plans[0].model, OwnModel) and step_of is None:
        return "time: that of the script"
    loaded_s = time.monotonic() - started_s
    by_size = {_size(plan): plan for part in parts for plan in part.plans}
    slowest_s = max(map(estimate.timing_seconds, by_size.values()))
    if (executor := options.get("executor", "local")) != "local":
        return f"here: not timed, as {executor} runs them elsewhere"
    if slowest_s > LONGEST_S:
        return f"here: not timed, as three steps and an evaluation may take {estimate.duration(slowest_s)}"
    try:
        device = parts[0].plans[0].run.device
        with make_workers(device=device, **options) as workers:
            run_s, start_s = _time_all(by_size, workers, partial(time_run, step_of=step_of))
    except (SuparError, RuntimeError, MemoryError) as error:  # torch's own too: out of memory
        return f"here: not timed: {str(error).partition(chr(10))[0] or 'out of memory'}"
    seconds = loaded_s + start_s
    for part in parts:
        each_s = [run_s[_size(plan)] for plan in part.plans]
        seconds += max([sum(each_s) / workers.jobs, *each_s])
    bound = next((part.bound for part in parts if part.bound), "")
    if any(plan.sparsity.updates and plan.sparsity.updates.start for part in parts for plan in part.plans):
        bound = "at most "  # the steps that were timed are the densest
    jobs = f", {workers.jobs} runs at a time" if workers.jobs > 1 else ""
    return f"here{jobs}, by timing a few steps: {bound}{estimate.duration(seconds)}"


def _size(plan: Plan) -> tuple[object, ...]:
    """What the time of a plan's run depends on."""
    train, model = plan.train, plan.model
    kept = tuple((row.size, row.kept) for row in plan.tensors)
    own = (model.heads, model.context) if isinstance(model, PlanModel) else ()
    return kept, *own, train.batch_size, train.steps, train.eval_every, train.eval_batches


def _time_all(
    by_size: dict[tuple[object, ...], Plan], workers: Workers, time_one: Callable[[Plan], tuple[float, float]]
) -> tuple[dict[tuple[object, ...], float], float]:
    """The seconds of a run of each size, measured while all workers are busy, and those in which the workers start."""
    began_s, sizes, run_s, start_s = time.monotonic(), list(by_size), dict[tuple[object, ...], float](), 0.0
    order = [*sizes, *(sizes * workers.jobs)[: -len(sizes) % workers.jobs]]
    for index, (found_s, spent_s) in workers.results(time_one, [(by_size[size],) for size in order]):
        start_s = start_s or time.monotonic() - began_s - spent_s
        run_s.setdefault(order[index], found_s)
    return run_s, start_s
