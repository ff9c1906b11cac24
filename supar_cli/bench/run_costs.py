"""What a run costs beside its steps: checkpoints, metrics and monitors, and the exchange of gradients between two processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from supar_cli.bench.step import random_task
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint, checkpoint_reader, run_directory
from supar_cli.training.distributed import Ranks
from supar_cli.training.trainer import Trainer

PROCESSES = 2
WARMUP = 3  # chosen: the first steps allocate, compile and touch memory
CHECKPOINTS = 5  # chosen: their median stands
BEFORE = 3  # chosen: steps before a checkpoint, whose median is what a step takes without one


def measure(plan: Plan, steps: int) -> dict[str, Any]:
    """Medians with quartiles: seconds of a step, and what is added to it, as shares of a step's time."""
    trainer = Trainer(plan, random_task(plan))
    with TemporaryDirectory() as folder:
        for _ in range(WARMUP):
            trainer.step()
        plain, watched, every = [], [], plan.run.log_every
        for _ in range(steps):  # beside each other, so that what else the machine does falls on both
            plain.append(_timed(trainer.step))
            line, watch = _watch(trainer, Path(folder))
            watched.append((line + watch / every) / plain[-1])
        saved = [_checkpoint(trainer, Path(folder)) for _ in range(CHECKPOINTS)]
    found: dict[str, Any] = {"steps": steps, "step_ms": _ms(statistics.median(plain)), "log_every": every}
    for name in ("returns", "stall", "written"):
        found[f"checkpoint_{name}_ms"] = _ms(statistics.median(one[name] for one in saved))
    found["checkpoint_bytes"] = saved[-1]["bytes"]
    found["checkpoint"] = _spread([one["stall"] / one["step"] for one in saved])
    found["metrics"] = _spread(watched)
    return found


def _checkpoint(trainer: Trainer, folder: Path) -> dict[str, float]:
    """Seconds of a step before it, until a save returns, that training loses in all, and until it is on disk; its bytes.

    Steps go on while it is written; what each takes beyond a plain step's time is lost to it.
    """
    step_s = statistics.median(_timed(trainer.step) for _ in range(BEFORE))
    writer = checkpoint.Writer(folder / "checkpoints", trainer.plan, trainer.task.hash, trainer.parallel)
    started = time.perf_counter()
    writer.save(trainer.done, trainer.capture)
    returns = time.perf_counter() - started
    lost = returns
    while writer.is_writing:
        lost += max(0.0, _timed(trainer.step) - step_s)
    written = time.perf_counter() - started
    writer.wait()
    files = checkpoint_reader.available(folder / "checkpoints")[-1].iterdir()
    size = sum(path.stat().st_size for path in files)
    return {"step": step_s, "returns": returns, "stall": lost, "written": written, "bytes": size}


def _watch(trainer: Trainer, folder: Path) -> tuple[float, float]:
    """Seconds of a line of metrics, which every step writes, and of the monitor, which looks every `log_every` steps."""
    batch = trainer.batch(trainer.done)
    norms = torch.ones(len(trainer.sparse_model.tensors))
    roles: dict[str, float] = {}

    def look() -> None:
        roles.update(trainer.diagnostics(batch, norms))

    watch = _timed(look)
    record = {"step": trainer.done, "loss": 5.5, "lr": 0.01, "grad_norm": 1.0, "grad_norm_by_role": roles}
    with run_directory.Metrics(folder, trainer.done) as metrics:
        line = _timed(lambda: metrics.write(record))
    return line, watch


def _timed(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _spread(values: list[float]) -> dict[str, Any]:
    """A share of a step with its quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"share": round(middle, 5), "quartiles": [round(low, 5), round(high, 5)]}


def measure_processes(plan: Plan, steps: int) -> dict[str, Any]:
    """A process's step when it is alone, beside another that it has nothing to do with, and exchanging gradients with it.

    The work of a process is the same in all three: the plan's batch. Their steps are interleaved.
    """
    train = plan.train.model_copy(update={"batch_size": PROCESSES * plan.train.batch_size})
    together = plan.model_copy(update={"train": train})
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder, ProcessPoolExecutor(PROCESSES, context) as pool:
        calls = [pool.submit(_process, rank, folder, plan, together, steps) for rank in range(PROCESSES)]
        alone, beside, exchanging = calls[0].result()
    return {
        "processes": PROCESSES,
        "threads_each": _threads(),
        "steps": steps,
        **{
            f"{name}_ms": _ms(statistics.median(times))
            for name, times in (("alone", alone), ("beside", beside), ("exchanging", exchanging))
        },
        "over_alone": _spread([a / b for a, b in zip(exchanging, alone, strict=True)]),
        "over_beside": _spread([a / b for a, b in zip(exchanging, beside, strict=True)]),
    }


def _threads() -> int:
    return max(1, (os.cpu_count() or 1) // PROCESSES)


def _process(rank: int, folder: str, plan: Plan, together: Plan, steps: int) -> tuple[list[float], ...]:
    torch.set_num_threads(_threads())
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    times = _turns(Ranks(rank, PROCESSES, rank, PROCESSES, is_distributed=True), plan, together, steps)
    gc.collect()  # as `init_distributed` does
    dist.destroy_process_group()
    return times


def _turns(ranks: Ranks, plan: Plan, together: Plan, steps: int) -> tuple[list[float], ...]:
    own = Trainer(plan, random_task(plan))
    shared = Trainer(together, random_task(together), ranks=ranks)
    times: tuple[list[float], ...] = ([], [], [])
    for turn in range(WARMUP + steps):
        for kind, trainer, takes_part in ((0, own, ranks.is_main), (1, own, True), (2, shared, True)):
            dist.barrier()
            if takes_part:
                seconds = _timed(trainer.step)
                if turn >= WARMUP:
                    times[kind].append(seconds)
    dist.barrier()
    return times
