"""Which engine multiplies with a masked tensor: the configured one, or the fastest measured on this machine.

A measurement is of one layer's forward pass and both gradients on random numbers, kept in a file of the user's cache
folder, so that it is made once for each device, shape, density, edge of blocks, precision and number of tokens. Of a large layer
only the first rows are measured, by each engine alike: a whole dense weight and its gradient would not fit where the live
weights do.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from supar_cli.errors import InputError
from supar_cli.files import write_file
from supar_cli.sparse.block import Block
from supar_cli.sparse.csr import Sparse, numba_version
from supar_cli.sparse.linear import Dense, Engine
from supar_cli.sparse.masks import Mask

TOKENS = 1024  # chosen: more change the ratio of the engines little and make the measurement long
ROUNDS = 5  # chosen: interleaved; their median decides
MIN_SPEEDUP = 1.1  # chosen: the speedup that another engine needs over the dense one, so that noise does not decide
MIN_MULTIPLY_ADDS = 2**25  # chosen: a layer of fewer is dense unmeasured: a few milliseconds at most
MOST_POSITIONS = 2**24  # chosen: of a mask that are measured: 64 MiB of a dense weight, as much of its gradient
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names for them, from malloc.h
LARGEST_BYTES = 2**30  # chosen: a tensor above this goes back to the system when it is freed
KEPT_BYTES = 2**31 - 1  # chosen: the most that mallopt's int can say
_keeps = [True]  # whether new measurements are kept; the last one holds


@dataclass(frozen=True, slots=True)
class LayerCase:
    """The conditions under which a layer runs. `tokens` are those of a micro-batch; `block` is the edge of the mask's blocks, None without.

    `sharded`: values are sharded between passes, when nothing as large as the weight may be held.
    """

    device: torch.device
    precision: torch.dtype
    tokens: int
    block: int | None = None
    sharded: bool = False


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine chosen and the measured seconds of each engine; no seconds if there was only one engine.

    `rows` is the number of measured rows if not all were measured.
    """

    name: str
    seconds: dict[str, float]
    measured_now: bool = False
    rows: int | None = None

    def text(self) -> str:
        """What was chosen, and by how much."""
        if not self.seconds:
            return self.name
        times = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in self.seconds.items())
        what = "per layer" if self.rows is None else f"for {self.rows} of its rows"
        return f"{self.name} ({times} {what}, {'measured now' if self.measured_now else 'as measured before'})"


def make(name: str, mask: Mask, case: LayerCase) -> Engine:
    """An engine for a mask (out, in), on the case's device. Raises InputError if it can't run there."""
    if case.device.type == "cpu":
        keep_large_blocks()
    if name == "dense":
        return Dense(mask, case.precision, keeps_weight=not case.sharded).to(case.device)
    if name == "sparse":
        if case.device.type != "cpu":
            raise InputError("run.engine: sparse runs on CPU only; expected dense, or block for a plan with blocks")
        return Sparse(mask)
    if name == "block":
        if case.block is None:
            raise InputError("run.engine: block needs a plan whose sparsity.pattern is block; expected dense or sparse")
        return Block(mask, case.block).to(case.device)
    raise AssertionError(name)


@cache
def keep_large_blocks() -> bool:
    """Keep up to KEPT_BYTES of freed memory in this process; return whether that worked. glibc on Linux only, once per process.

    Each step frees a layer's activations and asks for them again. By default glibc returns blocks of 32 MiB and more to
    the system and gets them back as pages that fault one by one. SUPAR_KEEP_MEMORY=0 leaves it so.
    measured: a sparse layer 1024→4096 of 4096 tokens at density 1/128 takes 35 ms instead of 56 (2 cores of EPYC);
    transparent huge pages brought 4 % more and are left to the system.
    """
    if sys.platform != "linux" or os.environ.get("SUPAR_KEEP_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_BYTES) and mallopt(TRIM_THRESHOLD, KEPT_BYTES))


def candidates(case: LayerCase) -> list[str]:
    """Engines that can run under a case, the dense one first."""
    can_run = {"dense": True, "sparse": case.device.type == "cpu", "block": case.block is not None}
    return [name for name, can in can_run.items() if can]


@contextmanager
def keeping_no_measurement() -> Iterator[None]:
    """Inside, new measurements are not kept in the user's cache folder."""
    _keeps.append(False)
    try:
        yield
    finally:
        _keeps.pop()


def fastest(mask: Mask, case: LayerCase) -> EngineChoice:
    """The dense engine, or another that is faster by MIN_SPEEDUP at least."""
    names = candidates(case)
    case = replace(case, tokens=min(case.tokens, TOKENS))
    if len(names) == 1 or mask.size * case.tokens < MIN_MULTIPLY_ADDS:
        return EngineChoice("dense", {})
    rows = rows_measured(mask.shape, case.block)
    path, key = _cache(), _key(mask, rows, case)
    seconds = _read(path).get(key, {})
    measured_now = not is_valid(seconds, names)
    if measured_now:
        part = mask if rows == mask.shape[0] else Mask.of(mask.alive(slice(rows)))
        seconds = times({name: make(name, part, case) for name in names}, part, case, ROUNDS)
        if _keeps[-1]:
            with suppress(OSError):  # measured again next time
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, json.dumps({**_read(path), key: seconds}, indent=1, sort_keys=True) + "\n")
    best = min(names, key=lambda name: seconds[name] * (1.0 if name == "dense" else MIN_SPEEDUP))
    return EngineChoice(best, seconds, measured_now, None if rows == mask.shape[0] else rows)


def rows_measured(shape: tuple[int, ...], block: int | None) -> int:
    """Number of rows of a mask (out, in) to measure: at most MOST_POSITIONS positions, in whole blocks, at least one."""
    unit = block or 1
    return min(shape[0], max(1, MOST_POSITIONS // shape[1] // unit) * unit)


@torch.enable_grad()
def times(engines: dict[str, Engine], mask: Mask, case: LayerCase, rounds: int) -> dict[str, float]:
    """Median seconds of a layer's step by engine."""
    values, (x, gradient) = draw_values(mask, case.device), draw_inputs(mask.shape, case, case.precision)
    steps = {name: partial(layer_step, engine, values, x, gradient) for name, engine in engines.items()}
    return {name: statistics.median(spent) for name, spent in interleave(steps, rounds, case.device).items()}


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each run by round, after `warmup` rounds that do not count; the order alternates between rounds.

    So whatever else the machine does falls on all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        for name in runs if turn % 2 else reversed(list(runs)):
            seconds[name].append(timed(runs[name], device))
    return {name: spent[warmup:] for name, spent in seconds.items()}  # earlier ones compile and touch memory


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, all that it put on a CUDA device included."""
    started_s = _now(device)
    run()
    return _now(device) - started_s


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def draw_values(mask: Mask, device: torch.device) -> Tensor:
    """Normal live values (live,), a leaf in float32, in row-major order."""
    return torch.randn(mask.count, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()


def draw_inputs(shape: tuple[int, ...], case: LayerCase, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """X (tokens, in), a leaf, and the gradient of Y (tokens, out), the same numbers in any precision."""
    random = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(case.tokens, width, generator=random) for width in reversed(shape))
    return x.to(case.device, precision).requires_grad_(), gradient.to(case.device, precision)


def layer_step(engine: Engine, values: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """A training step of one layer: take over new values, Y of X, and the gradients of both leaves, `values` and `x`."""
    x.grad = values.grad = None
    engine.refresh(values.detach())
    y: Tensor = engine(x, values)
    torch.autograd.backward(y, gradient)
    return y


def _key(mask: Mask, rows: int, case: LayerCase) -> str:
    """Everything that the times depend on, in words."""
    cuda = case.device.type == "cuda"
    where = torch.cuda.get_device_name(case.device) if cuda else f"{_processor()}, {torch.get_num_threads()} threads"
    numba = numba_version()
    kernels = f"vectors by numba {numba}" if numba else "no numba"
    pattern = f"blocks of {case.block}" if case.block else "single weights"
    part = "" if rows == mask.shape[0] else f"{rows} rows of "
    shape = f"{part}{mask.shape[0]}x{mask.shape[1]}, {mask.count} live, {pattern}"
    precision = str(case.precision).removeprefix("torch.") + (", sharded" if case.sharded else "")
    return f"{where}; torch {torch.__version__}, {kernels}; {shape}; {case.tokens} tokens, {precision}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "cpu"


def _cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "supar" / "engines.json"


def is_valid(seconds: object, names: list[str]) -> bool:
    """Whether a cached measurement covers these engines."""
    if not isinstance(seconds, dict) or set(seconds) != set(names):
        return False
    return all(isinstance(value, float) and value > 0 for value in seconds.values())


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Earlier measurements; none where the file is not there or not whole."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict):
            return found
    return {}
