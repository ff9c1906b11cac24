"""Peak memory of training one masked layer with AdamW, each arm in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from supar_cli.bench import layer
from supar_cli.bench.results import Benchmark, Document, Reading, machine_settings
from supar_cli.errors import SetupError
from supar_cli.files import naming_write_errors
from supar_cli.reporting.result import Table
from supar_cli.sparse.autotune import LayerCase, draw_inputs, draw_values
from supar_cli.training.runtime import Runtime

STEPS = 3  # chosen: step 1 creates the optimizer's state, so step 2 is the first with all memory in use
WARM_SHAPE = (256, 256)  # chosen: negligible next to a measured layer, but starts every kernel and thread pool
WARM_DENSITY = 0.125  # chosen: arbitrary, as the compiled code does not depend on it
STATUS = Path("/proc/self/status")


def benchmark(shape: tuple[int, int], density: float, tokens: int, runtime: Runtime) -> Benchmark:
    """The benchmark of a layer (out, in)."""
    case = LayerCase(runtime.device, runtime.precision, tokens)
    settings = {"shape": list(shape), "tokens": tokens, "density": density}
    settings |= machine_settings(case.device, str(case.precision).removeprefix("torch."))
    return Benchmark("memory", settings, case.device, lambda: measure_arms(shape, density, case), tables, readings)


def measure_arms(shape: tuple[int, int], density: float, case: LayerCase) -> Document:
    """`measure`'s result for every arm, masked dense first, and its peak as a share of masked dense's."""
    names = ["masked", "dense", *(["sparse"] if case.device.type == "cpu" else [])]
    arms = {name: measure(name, shape, density, case) for name in names}
    for one in arms.values():
        one["share_of_masked"] = round(one["peak_bytes"] / arms["masked"]["peak_bytes"], 4)
    return {"arms": arms}


def measure(arm: str, shape: tuple[int, int], density: float, case: LayerCase) -> Document:
    """Peak bytes above what the process had before the layer; per position and per live weight.

    Raises SetupError where neither Linux's /proc nor CUDA can tell.
    """
    return in_own_process("bench memory", _measure_here, arm, shape, density, case)


def in_own_process(name: str, measure: Callable[..., Document], *arguments: Any) -> Document:
    """Call a function whose last argument is the case in a new process, so that it finds no memory that earlier code used.

    Raises SetupError where neither Linux's /proc nor CUDA can tell.
    """
    if arguments[-1].device.type == "cpu" and not STATUS.exists():
        raise SetupError(f"{name}: reads Linux's /proc or a CUDA device's counters; this machine has neither")
    with naming_write_errors(Path("/dev/shm")):  # where its semaphores are
        executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with executor as pool:
        return pool.submit(measure, *arguments).result()


def _measure_here(arm: str, shape: tuple[int, int], density: float, case: LayerCase) -> Document:
    """The peak of STEPS training steps in this process."""
    is_cuda = case.device.type == "cuda"
    _make_training(arm, WARM_SHAPE, WARM_DENSITY, case)[0](1)
    free_memory()
    before = torch.cuda.memory_allocated(case.device) if is_cuda else bytes_of("VmRSS")
    train, live = _make_training(arm, shape, density, case)
    free_memory()
    is_reset = reset_peak(case.device)
    train(STEPS)
    peak = (torch.cuda.max_memory_allocated(case.device) if is_cuda else bytes_of("VmHWM")) - before
    return {
        "peak_bytes": peak,
        "bytes_per_position": round(peak / (shape[0] * shape[1]), 4),
        "bytes_per_live": round(peak / live, 4),
        "peak_reset": is_reset,  # False if Linux did not allow it: then the peak includes creating the layer
    }


def _make_training(
    name: str, shape: tuple[int, int], density: float, case: LayerCase
) -> tuple[Callable[[int], None], int]:
    """A function that trains one layer on one batch, and the layer's number of live weights. Temporary memory is freed."""
    mask = layer.draw_mask(shape, density)
    values = draw_values(mask, case.device)
    arm = layer.make(name, mask, values, case)
    optimizer = torch.optim.AdamW([arm.parameter], lr=1e-3, fused=True)
    x, gradient = draw_inputs(shape, case, arm.precision)

    def train(steps: int) -> None:
        for _ in range(steps):
            arm.step(x, gradient)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        arm.engine.refresh(arm.parameter.detach())

    return train, len(values)


def free_memory() -> None:
    """Give freed memory back to the system, so that a layer can't reuse memory that earlier code freed."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def bytes_of(word: str) -> int:
    """A figure of this process in Linux's /proc, such as VmRSS."""
    stated = dict(line.split(":", 1) for line in STATUS.read_text("utf-8").splitlines())
    return 1024 * int(stated[word].split()[0])  # in kB


def reset_peak(device: torch.device) -> bool:
    """Reset the peak to the memory in use now; return whether that worked."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set
        return True
    return False


def tables(document: Document) -> list[Table]:
    out, width = document["shape"]
    title = f"peak: {out}×{width}, {document['tokens']} tokens, AdamW, density {document['density']:g}"
    formats = {"bytes_per_position": ".3g", "bytes_per_live": ".4g", "share_of_masked": ".3g"}
    rows = [
        [name, f"{one['peak_bytes'] / 2**20:.1f}", *(format(one[key], digits) for key, digits in formats.items())]
        for name, one in document["arms"].items()
    ]
    columns = ["arm", "MiB", "bytes per position", "bytes per live weight", "÷ masked dense"]
    return [Table(title=title, columns=columns, rows=rows)]


def readings(document: Document) -> dict[str, Reading]:
    """One measurement has no spread."""
    found = {name: float(arm["bytes_per_position"]) for name, arm in document["arms"].items()}
    return {f"{name}, bytes per position": Reading(each, each, each, is_gain=False) for name, each in found.items()}
