"""What a run costs beside its steps: checkpoints, metrics and monitors, and exchanging gradients with a second process.

`python -m tests.measure_run PLAN [ROUNDS]` prints milliseconds, and shares of a step's time with their quartiles, as JSON. The
plan's data are not read: tokens are random. Processes are measured for a plan that runs on a CPU.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

import supar_cli
from supar_cli.bench.results import Reading
from supar_cli.bench.step import WARMUP, RandomTokens
from supar_cli.planning.plan import Plan
from supar_cli.sparse.autotune import interleave, timed
from supar_cli.training import checkpoint, run_directory
from supar_cli.training.distributed import Ranks
from supar_cli.training.runtime import Runtime
from supar_cli.training.trainer import Trainer

PROCESSES = 2
CHECKPOINTS = 5  # chosen: their median stands
BEFORE = 3  # chosen: steps before a checkpoint, whose median is what a step takes without one
CPU = torch.device("cpu")
LINE = {"step": 1, "loss": 5.5, "lr": 0.01, "grad_norm": 1.0, "grad_norm_by_role": {"hidden": 1.0}}  # of metrics


def measure(plan: Plan, rounds: int) -> dict[str, Any]:
    """A step, and what checkpoints, metrics and monitors add to it."""
    trainer = Trainer(plan, RandomTokens(plan))
    with TemporaryDirectory() as name:
        folder, every = Path(name), plan.run.log_every
        with run_directory.Metrics(folder, 0) as metrics:
            runs = {"step": trainer.step, "line": partial(metrics.write, LINE), "monitor": partial(look, trainer)}
            seconds = interleave(runs, rounds, trainer.runtime.device, WARMUP)
        saved = [save(trainer, folder) for _ in range(CHECKPOINTS)]
    extra = [line + monitor / every for line, monitor in zip(seconds["line"], seconds["monitor"], strict=True)]
    return {
        "rounds": rounds,
        "step_ms": milliseconds(seconds["step"]),
        "log_every": every,
        **{
            f"checkpoint_{what}_ms": milliseconds([one[what] for one in saved])
            for what in ("returns", "lost", "written")
        },
        "checkpoint_bytes": saved[-1]["bytes"],
        **Reading.ratio([one["lost"] for one in saved], [one["step"] for one in saved]).fields("checkpoint"),
        **Reading.ratio(extra, seconds["step"]).fields("metrics"),
    }


def milliseconds(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 3)


def look(trainer: Trainer) -> None:
    """What the monitor does at a step that is logged."""
    trainer.diagnostics(trainer.batch(trainer.done), torch.ones(len(trainer.sparse_model.tensors)))


def save(trainer: Trainer, folder: Path) -> dict[str, float]:
    """Seconds of a step before a checkpoint, until its save returns, that training loses in all, and until it is on disk.

    Steps go on while it is written; what each takes beyond a plain step's time is lost to it.
    """
    device = trainer.runtime.device
    step_s = statistics.median(timed(trainer.step, device) for _ in range(BEFORE))
    writer = checkpoint.Writer(folder / "checkpoints", trainer.plan, trainer.task.hash, trainer.parallel)
    started_s = time.perf_counter()
    writer.save(trainer.done, trainer.capture)
    lost_s = returns_s = time.perf_counter() - started_s
    while writer._pending is not None and not writer._pending.done():
        lost_s += max(0.0, timed(trainer.step, device) - step_s)
    written_s = time.perf_counter() - started_s
    writer.wait()
    size_bytes = sum(path.stat().st_size for path in checkpoint.available(folder / "checkpoints")[-1].iterdir())
    return {"step": step_s, "returns": returns_s, "lost": lost_s, "written": written_s, "bytes": size_bytes}


def measure_processes(plan: Plan, rounds: int) -> dict[str, Any]:
    """A process's step alone, beside another that it has nothing to do with, and exchanging gradients with it.

    The work of a process is the same in all three: the plan's batch. Their steps are interleaved.
    """
    with TemporaryDirectory() as folder, ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        calls = [pool.submit(measure_rank, rank, folder, plan, rounds) for rank in range(PROCESSES)]
        seconds = calls[0].result()
    return {
        "processes": PROCESSES,
        **{f"{name}_ms": milliseconds(spent) for name, spent in seconds.items()},
        **Reading.ratio(seconds["exchanging"], seconds["alone"]).fields("over_alone"),
        **Reading.ratio(seconds["exchanging"], seconds["beside"]).fields("over_beside"),
    }


def after_barrier(step: Callable[[], object]) -> object:
    dist.barrier()
    return step()


def measure_rank(rank: int, folder: str, plan: Plan, rounds: int) -> dict[str, list[float]]:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    ranks = Ranks(rank, PROCESSES, rank, PROCESSES, is_distributed=True)
    train = plan.train.model_copy(update={"batch_size": PROCESSES * plan.train.batch_size})
    together = plan.model_copy(update={"train": train})
    own = Trainer(plan, RandomTokens(plan))
    shared = Trainer(together, RandomTokens(together), ranks=ranks)
    steps = {"alone": own.step if ranks.is_main else lambda: None, "beside": own.step, "exchanging": shared.step}
    seconds = interleave({name: partial(after_barrier, step) for name, step in steps.items()}, rounds, CPU, WARMUP)
    dist.barrier()
    gc.collect()  # as `init_distributed` does
    dist.destroy_process_group()
    return seconds


def main(path: str, rounds: str = "20") -> None:
    plan = supar_cli.load(path)
    found = measure(plan, int(rounds))
    if Runtime.of(plan).device == CPU:
        found["parallel"] = measure_processes(plan, int(rounds))
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
