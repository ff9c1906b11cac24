"""Peak memory of training one masked layer with AdamW, each arm in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from supar_cli.bench import layer as bench_layers
from supar_cli.errors import SetupError
from supar_cli.sparse.autotune import LayerCase

STEPS = 3  # chosen: the first makes the optimizer's state, so the second is the first with everything there
WARM_SHAPE = (256, 256)  # chosen: nothing beside a layer of interest, large enough for every kernel and thread pool
WARM_DENSITY = 0.125  # chosen: any: what is compiled does not depend on it
STATUS = Path("/proc/self/status")


def arms_of(device: torch.device) -> list[str]:
    """The arms that run on a device, the baseline first."""
    return ["masked", "dense", "sparse"] if device.type == "cpu" else ["masked", "dense"]


def measure_all(shape: tuple[int, int], density: float, case: LayerCase) -> dict[str, Any]:
    """`measure` of every arm, with its share of the baseline's peak."""
    arms = {name: measure(name, shape, density, case) for name in arms_of(case.device)}
    for one in arms.values():
        one["share_of_masked"] = round(one["peak_bytes"] / arms["masked"]["peak_bytes"], 4)
    return arms


def measure(arm: str, shape: tuple[int, int], density: float, case: LayerCase) -> dict[str, Any]:
    """Peak bytes above what the process had before the layer; per position and per live weight.

    Raises SetupError where neither Linux's /proc nor CUDA can tell.
    """
    if case.device.type == "cpu" and not STATUS.exists():
        raise SetupError("bench memory: reads Linux's /proc or a CUDA device's counters; this machine has neither")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        peak, live, reset = pool.submit(_peak, arm, shape, density, case).result()
    return {
        "peak_bytes": peak,
        "bytes_per_position": round(peak / (shape[0] * shape[1]), 4),
        "bytes_per_live": round(peak / live, 4),
        "peak_reset": reset,  # false where Linux did not allow it: then the making of the layer counts too
    }


def _peak(arm: str, shape: tuple[int, int], density: float, case: LayerCase) -> tuple[int, int, bool]:
    """Peak bytes of STEPS training steps, the live weights, and whether the peak is that of the steps alone."""
    cuda = case.device.type == "cuda"
    _Training(arm, WARM_SHAPE, WARM_DENSITY, case).steps(1)
    _tidy()
    before = torch.cuda.memory_allocated(case.device) if cuda else _bytes("VmRSS")
    training = _Training(arm, shape, density, case)
    _tidy()
    reset = _reset(case.device)
    training.steps(STEPS)
    peak = torch.cuda.max_memory_allocated(case.device) if cuda else _bytes("VmHWM")
    return peak - before, training.live, reset


class _Training:
    """One layer, its optimizer, and a batch; nothing of the making of them is kept."""

    def __init__(self, arm: str, shape: tuple[int, int], density: float, case: LayerCase) -> None:
        mask = bench_layers.random_mask(shape, density)
        values = bench_layers.draw_values(mask, case.device)
        self.live = len(values)
        self.arm = bench_layers.make(arm, mask, values, case)
        self.optimizer = torch.optim.AdamW([self.arm.parameter], lr=1e-3, fused=True)
        self.x, self.gradient = bench_layers.draw_inputs(shape, case, self.arm.precision)

    def steps(self, count: int) -> None:
        for _ in range(count):
            bench_layers.step(self.arm, self.x, self.gradient)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.arm.refresh()


def _tidy() -> None:
    """Give freed memory back to the system, so that a layer can't hide in what something else had left."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # another C library keeps what it keeps
        ctypes.CDLL(None).malloc_trim(0)


def _bytes(word: str) -> int:
    for line in STATUS.read_text("utf-8").splitlines():
        if line.startswith(word + ":"):
            return 1024 * int(line.split()[1])
    raise SetupError(f"{STATUS}: has no {word}")


def _reset(device: torch.device) -> bool:
    """Let the peak start from what is there now; whether it does."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set
        return True
    return False
