"""Who executes trials: plans run for their validation loss, in this process or in several."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Data
from supar_cli.training import data
from supar_cli.training.device import Setup
from supar_cli.training.trainer import Trainer


@functools.lru_cache(maxsize=1)
def _tokens(source: str, vocab: int, context: int) -> data.Tokens:
    return data.load(Data(**json.loads(source)), vocab=vocab, context=context)


def tokens_of(plan: Plan) -> data.Tokens:
    return _tokens(json.dumps(plan.data.model_dump()), plan.model.vocab, plan.model.context)


def require_runnable(plan: Plan) -> None:
    """Raise what is wrong with a plan's device or data, before any work is done."""
    Setup.of(plan)
    tokens_of(plan)


def validation_loss(plan: Plan, on_evaluation: Callable[[int, float], None] | None = None) -> float:
    """Train a plan and return its last validation loss. Raises UnusableResult when it diverges.

    Compiling, unless the plan asks for it, is left out: it takes longer than a proxy's trial.
    """
    if plan.run.compile == "auto":
        plan = plan.model_copy(update={"run": plan.run.model_copy(update={"compile": "off"})})
    return Trainer(plan, tokens_of(plan)).run(on_evaluation=on_evaluation).evaluations[-1][1]


def _start_worker(threads: int, devices: int, counter: Any) -> None:
    torch.set_num_threads(threads)
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    if devices > 1:
        torch.cuda.set_device(index % devices)


@dataclass(slots=True)
class Workers:
    """Runs calls in `jobs` processes, or in this one when there is only one job; results as they come."""

    jobs: int

    def results(self, function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """(index of the call, its result) in the order of completion."""
        if self.jobs == 1 or len(calls) == 1:
            for index, call in enumerate(calls):
                yield index, function(*call)
            return
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        start = (threads, devices, context.Value("i", 0))
        pool = ProcessPoolExecutor(self.jobs, context, _start_worker, start)
        try:
            futures = {pool.submit(function, *call): index for index, call in enumerate(calls)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
