"""Which engine multiplies with a masked tensor: the one its plan names, or the fastest by a measurement on this machine.

A measurement is of one layer's forward pass and both gradients on random numbers, kept in a file of the user's cache
folder, so that it is made once for each device, shape, density, pattern, precision and number of tokens.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from supar_cli.errors import InputError
from supar_cli.files import write_file
from supar_cli.planning.plan import Engine as Name
from supar_cli.planning.plan import Plan
from supar_cli.sparse.allocator import keep_large_blocks
from supar_cli.sparse.block import Block
from supar_cli.sparse.csr import Sparse
from supar_cli.sparse.dense import Dense
from supar_cli.sparse.linear import Engine
from supar_cli.training.distributed import Ranks
from supar_cli.training.runtime import Runtime

Mask = NDArray[np.bool_]

TOKENS = 1024  # chosen: more change the ratio of the engines little and make the measurement long
ROUNDS = 5  # chosen: interleaved; their median decides
WORTH = 1.1  # chosen: by how much another engine has to beat the dense one, so that noise does not choose
SMALL = 2**25  # chosen: multiply-adds of a layer below which it is dense unmeasured: a few milliseconds at most


@dataclass(frozen=True, slots=True)
class Setting:
    """What an engine works under. `tokens` are those of a micro-batch; `block` is the plan's, None without blocks.

    `sharded`: the values lie in shards between passes, and nothing as large as the weight may.
    """

    device: torch.device
    precision: torch.dtype
    tokens: int
    block: int | None = None
    sharded: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine chosen and the seconds measured of each; none where there was nothing to choose between."""

    name: Name
    seconds: dict[str, float]
    measured_now: bool = False

    def text(self) -> str:
        """What was chosen, and by how much."""
        if not self.seconds:
            return self.name
        times = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in self.seconds.items())
        return f"{self.name} ({times} a layer, {'measured now' if self.measured_now else 'as measured before'})"


class Engines:
    """The engines of a plan's masked tensors: `make` each as the model is built; `choices` then says which they are.

    Of several processes the first one measures, alone, and all choose alike.
    """

    def __init__(self, plan: Plan, setup: Runtime, ranks: Ranks, sharded: bool) -> None:
        self.plan, self.choices, self._world = plan, dict[str, Choice](), ranks
        tokens = setup.micro_batch * plan.model.context
        self.setting = Setting(setup.device, setup.precision, tokens, plan.sparsity.block, sharded)
        self._rows = {row.name: row for row in plan.tensors}
        self._fastest: dict[tuple[object, ...], Choice] = {}  # one measurement for all layers of a shape and size

    def make(self, name: str, mask: Mask) -> Engine:
        """The engine of a tensor's mask (out, in)."""
        named = self.plan.engine(name)
        alike = (mask.shape, int(mask.sum()))
        if named != "auto":
            choice = Choice(named, {})
        elif alike in self._fastest:
            choice = self._fastest[alike]
        else:
            choice = self._fastest[alike] = self._world.on_main(fastest, mask, self.setting)
        self.choices[name] = choice
        return make(choice.name, mask, self.setting)

    def lines(self) -> list[str]:
        """What was measured, a line a shape, and what would make it faster."""
        said: dict[str, int] = {}
        for name, choice in self.choices.items():
            row = self._rows[name]
            text = f"{'×'.join(map(str, row.shape))} at density {row.density:.3g}: {choice.text()}"
            said[text] = said.get(text, 0) + (1 if choice.seconds else 0)
        lines = [f"engine of {count} tensors {text}" for text, count in said.items() if count]
        if lines and self.setting.device.type == "cpu" and not importlib.util.find_spec("numba"):
            lines.append("numba is not installed: `pip install 'supar[sparse]'` makes the sparse engine faster")
        return lines


def make(name: Name, mask: Mask, setting: Setting) -> Engine:
    """An engine for a mask (out, in), on the setting's device. Raises InputError where it can't be."""
    if setting.device.type == "cpu":
        keep_large_blocks()
    if name == "dense":
        return Dense(mask, setting.precision, kept=not setting.sharded).to(setting.device)
    if name == "sparse":
        if setting.device.type != "cpu":
            raise InputError("run.engine: sparse runs on CPU only; expected dense, or block for a plan with blocks")
        return Sparse(mask)
    if name == "block":
        if setting.block is None:
            raise InputError("run.engine: block needs a plan whose sparsity.pattern is block; expected dense or sparse")
        return Block(mask, setting.block).to(setting.device)
    raise AssertionError(name)


def candidates(setting: Setting) -> list[Name]:
    """Engines that can run under a setting, the dense one first."""
    found: list[Name] = ["dense"]
    if setting.device.type == "cpu":
        found.append("sparse")
    if setting.block is not None:
        found.append("block")
    return found


def fastest(mask: Mask, setting: Setting) -> Choice:
    """The dense engine, or another that is faster by WORTH at least."""
    names = candidates(setting)
    tokens = min(setting.tokens, TOKENS)
    if len(names) == 1 or mask.size * tokens < SMALL:
        return Choice("dense", {})
    path, key = _cache(), _key(mask, setting, tokens)
    known = _read(path)
    seconds = known.get(key)
    measured_now = not _sound(seconds, names)
    if measured_now or seconds is None:
        seconds = times({name: make(name, mask, setting) for name in names}, mask, setting, tokens, ROUNDS)
        with suppress(OSError):  # measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps({**_read(path), key: seconds}, indent=1, sort_keys=True) + "\n")
    best = min(names, key=lambda name: seconds[name] * (1.0 if name == "dense" else WORTH))
    return Choice(best, seconds, measured_now)


@torch.enable_grad()
def times(engines: dict[Name, Engine], mask: Mask, setting: Setting, tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of a layer's step by engine: forward, both gradients, and taking over new values."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(setting.device, dtype)

    out, width = mask.shape
    x = normal(tokens, width, dtype=setting.precision).requires_grad_()
    gradient = normal(tokens, out, dtype=setting.precision)
    values = normal(int(mask.sum()), dtype=torch.float32).requires_grad_()
    found: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            x.grad = values.grad = None
            started = _now(setting.device)
            engine.refresh(values.detach())
            torch.autograd.backward(engine(x, values), gradient)
            if turn:  # the first compiles and touches memory
                found[name].append(_now(setting.device) - started)
    return {name: statistics.median(spent) for name, spent in found.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _key(mask: Mask, setting: Setting, tokens: int) -> str:
    """Everything that the times depend on, in words."""
    cuda = setting.device.type == "cuda"
    where = torch.cuda.get_device_name(setting.device) if cuda else f"{_processor()}, {torch.get_num_threads()} threads"
    kernels = f"numba {importlib.metadata.version('numba')}" if importlib.util.find_spec("numba") else "no numba"
    pattern = f"blocks of {setting.block}" if setting.block else "single weights"
    shape = f"{mask.shape[0]}x{mask.shape[1]}, {int(mask.sum())} live, {pattern}"
    precision = str(setting.precision).removeprefix("torch.") + (", sharded" if setting.sharded else "")
    return f"{where}; torch {torch.__version__}, {kernels}; {shape}; {tokens} tokens, {precision}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "cpu"


def _cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "supar" / "engines.json"


def _sound(seconds: object, names: list[Name]) -> bool:
    """Whether a cached measurement is one of these engines."""
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
