"""Which engine multiplies with a masked tensor: the configured one, or the fastest measured on this machine.

A measurement is of one layer's forward pass and both gradients on random numbers, kept in a file of the user's cache
folder, so that it is made once for each device, shape, density, edge of blocks, precision and number of tokens. On CUDA it is of
the kernels' time, of as many tokens as the run has: on few, launches and weights decide, and not products. Of a large layer
only the first rows are measured, by each engine alike: a whole dense weight and its gradient would not fit where the live
weights do. What cannot win is not measured, what loses clearly on a few tokens no further.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from supar_cli.errors import InputError
from supar_cli.files import cache_folder, write_file
from supar_cli.sparse.block import Block
from supar_cli.sparse.csr import Sparse, numba_version
from supar_cli.sparse.linear import Dense, Engine, multiplies_in_tf32
from supar_cli.sparse.masks import Mask

FIRST_TOKENS, FIRST_ROUNDS = 64, 3  # chosen: milliseconds; of a few rounds the fastest is free of what else runs
CPU_TOKENS = 256  # chosen: more change the ratio of the engines little and make the measurement long
DRAWN_TOKENS = 1024  # chosen: drawn for a CUDA device and repeated; all of a large micro-batch take seconds
# chosen: more than a device's caches hold, so that a layer finds them as in a model; a tenth of a millisecond
AHEAD_BYTES = 2**28
FEWEST_FILLS, MOST_FILLS = 8, 64  # chosen: of so many bytes, about 1 and 6 ms; a layer's step is launched in less
ROUNDS = 5  # chosen: interleaved; their median decides
MOST_SECONDS = 5.0  # chosen: for the layers of a plan
LOST = 2.0  # chosen: times the fastest; few tokens measured narrow the gap, as what each pass does once weighs more
MOST_PER_LIVE = 256  # measured: there the sparse engine is 14 to 27 times as fast, by either kernel (EPYC, Zen 4)
MIN_SPEEDUP = 1.1  # chosen: the speedup that another engine needs over the dense one, so that noise does not decide
# chosen: a layer of fewer on so many tokens is dense unmeasured: a few milliseconds of a step
MIN_MULTIPLY_ADDS = 2**23
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


def fastest(mask: Mask, case: LayerCase, seconds: float = MOST_SECONDS) -> EngineChoice:
    """The dense engine, or another that is faster by MIN_SPEEDUP at least, measured in about `seconds` at most."""
    if case.device.type == "cpu":
        case = replace(case, tokens=min(case.tokens, CPU_TOKENS))
    if mask.size * case.tokens < MIN_MULTIPLY_ADDS:
        return EngineChoice("dense", {})
    names = can_win(mask, case)
    if len(names) == 1:
        return EngineChoice(names[0], {})
    rows = rows_measured(mask.shape, case.block)
    path, key = cache_folder() / "engines.json", _key(mask, rows, case)
    found = _read(path).get(key, {})
    measured_now = not is_valid(found, names)
    if measured_now:
        part = mask if rows == mask.shape[0] else Mask.of(mask.alive(slice(rows)))
        found = times({name: make(name, part, case) for name in names}, part, case, seconds)
        if _keeps[-1]:
            with suppress(OSError):  # measured again next time
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, json.dumps({**_read(path), key: found}, indent=1, sort_keys=True) + "\n")
    best = min(found, key=lambda name: found[name] * (1.0 if name == "dense" else MIN_SPEEDUP))
    return EngineChoice(best, found, measured_now, None if rows == mask.shape[0] else rows)


def can_win(mask: Mask, case: LayerCase) -> list[str]:
    """The candidates without what loses at any speed: the sparse engine where most weights live, the dense one where few do."""
    names = candidates(case)
    if "sparse" in names and 2 * mask.count > mask.size:
        names.remove("sparse")
    elif "sparse" in names and MOST_PER_LIVE * mask.count < mask.size:
        names.remove("dense")
    return names


def rows_measured(shape: tuple[int, ...], block: int | None) -> int:
    """Number of rows of a mask (out, in) to measure: at most MOST_POSITIONS positions, in whole blocks, at least one."""
    unit = block or 1
    return min(shape[0], max(1, MOST_POSITIONS // shape[1] // unit) * unit)


@torch.enable_grad()
def times(engines: dict[str, Engine], mask: Mask, case: LayerCase, seconds: float = MOST_SECONDS) -> dict[str, float]:
    """Seconds of a layer's step by engine: medians over the case's tokens, of those that did not lose on a few.

    Where only one did not, or there is no time for more, the seconds on a few tokens, of all engines.
    """
    end_s, values = inf, draw_values(mask, case.device)

    def measure(names: Iterable[str], tokens: int, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
        x, gradient = draw_inputs(mask.shape, replace(case, tokens=tokens), case.precision)
        steps = {name: partial(layer_step, engines[name], values, x, gradient) for name in names}
        return interleave(steps, rounds, case.device, warmup, end_s, device_seconds)

    few = min(case.tokens, FIRST_TOKENS) if case.device.type == "cpu" else case.tokens
    # kernels are compiled here, on a machine's first use, and not in the time of a measurement
    measure(engines, few, 0)
    end_s = time.perf_counter() + seconds
    first = {name: min(spent) for name, spent in measure(engines, few, FIRST_ROUNDS, warmup=0).items()}
    left = {name: spent for name, spent in first.items() if spent <= LOST * min(first.values())}
    two_rounds_s = 2 * sum(left.values()) * case.tokens / few
    if len(left) == 1 or time.perf_counter() + two_rounds_s > end_s:
        return first
    return {name: statistics.median(spent) for name, spent in measure(left, case.tokens, ROUNDS).items()}


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, all that it put on a CUDA device included."""
    started_s = _now(device)
    run()
    return _now(device) - started_s


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a CUDA device takes for a call which waits for nothing; on a CPU, the call's.

    The device is kept busy until all is launched, so that the time holds no launch; where it was done before, once more.
    """
    if device.type == "cpu":
        return timed(run, device)
    ahead, stream = torch.empty(AHEAD_BYTES, dtype=torch.int8, device=device), torch.cuda.current_stream(device)
    fills = FEWEST_FILLS
    while True:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(fills):
            ahead.zero_()
        begin.record(stream)
        run()
        end.record(stream)
        is_launched = not begin.query()  # type: ignore[no-untyped-call]
        end.synchronize()
        if is_launched or fills >= MOST_FILLS:
            return float(begin.elapsed_time(end)) / 1000
        fills *= 2


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    end_s: float = inf,
    timer: Callable[[Callable[[], object], torch.device], float] = timed,
) -> dict[str, list[float]]:
    """Seconds of each run by round, after `warmup` rounds that do not count; the order alternates between rounds.

    So whatever else the machine does falls on all of them. After `end_s`, by time.perf_counter(), only a first round begins.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        if turn > warmup and time.perf_counter() > end_s:
            break
        for name in runs if turn % 2 else reversed(list(runs)):
            seconds[name].append(timer(runs[name], device))
    return {name: spent[warmup:] for name, spent in seconds.items()}  # earlier ones compile and touch memory


def draw_values(mask: Mask, device: torch.device) -> Tensor:
    """Normal live values (live,), a leaf in float32, in row-major order."""
    return torch.randn(mask.count, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()


def draw_inputs(shape: tuple[int, ...], case: LayerCase, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """X (tokens, in), a leaf, and the gradient of Y (tokens, out), the same numbers in any precision."""
    random = torch.Generator().manual_seed(1)
    drawn = case.tokens if case.device.type == "cpu" else min(case.tokens, DRAWN_TOKENS)
    both = (torch.randn(drawn, width, generator=random).to(case.device, precision) for width in reversed(shape))
    if drawn < case.tokens:
        both = (one.repeat(-(-case.tokens // drawn), 1)[: case.tokens] for one in both)
    x, gradient = both
    return x.requires_grad_(), gradient


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
    if cuda:
        precision += f"{' in TF32' if multiplies_in_tf32() else ''}, time of the kernels"
    return f"{where}; torch {torch.__version__}, {kernels}; {shape}; {case.tokens} tokens, {precision}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "cpu"


def is_valid(seconds: object, names: list[str]) -> bool:
    """Whether a cached measurement is of these engines, or of those that did not lose at once."""
    if not isinstance(seconds, dict) or not seconds or not set(seconds) <= set(names):
        return False
    return all(isinstance(value, float) and value > 0 for value in seconds.values())


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Earlier measurements; none where the file is not there or not whole."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict):
            return found
    return {}
