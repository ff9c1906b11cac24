"""Side-by-side timing of one masked layer: forward pass and both gradients, by each engine and by dense layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from supar_cli.errors import InputError
from supar_cli.sparse import autotune
from supar_cli.sparse.allocator import keep_large_blocks
from supar_cli.sparse.autotune import LayerCase
from supar_cli.sparse.block_structure import BLOCKS
from supar_cli.sparse.csr import Sparse
from supar_cli.sparse.linear import Engine
from supar_cli.sparse.masks import Mask
from supar_cli.training.prepare import to_dense

BASELINE = "masked"
DENSE = (BASELINE, "dense", "dense_bf16", "dense_fp32")
ENGINES = ("sparse", "sparse_torch", "block")  # those whose time follows the density
SEED = 0  # of masks and numbers


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to hold and multiply a masked weight. `parameter` is the leaf that gets the gradient.

    `refresh` is what has to be done after the parameter was changed and before the next forward pass.
    """

    precision: torch.dtype
    parameter: Tensor
    forward: Callable[[Tensor], Tensor]
    refresh: Callable[[], None]


def require_blocks(shape: tuple[int, int], block: int | None) -> None:
    """Raise InputError where the block engine has no blocks of this edge, or the shape (out, in) none of them."""
    if block is not None and block not in BLOCKS:
        raise InputError(f"--block {block}: expected one of {', '.join(map(str, BLOCKS))}")
    if block is not None and (shape[0] % block or shape[1] % block):
        raise InputError(f"--block {block}: {shape[0]}×{shape[1]} is not made of such blocks; expected multiples of it")


def random_mask(shape: tuple[int, int], density: float, block: int | None = None) -> Mask:
    """A mask (out, in) of round(density · size) live weights, 1 at least, or of as many whole aligned blocks."""
    edge = block or 1
    cells = np.zeros((shape[0] // edge, shape[1] // edge), np.bool_)
    count = max(1, round(density * cells.size))
    cells.reshape(-1)[np.random.default_rng(SEED).choice(cells.size, count, replace=False, shuffle=False)] = True
    return Mask.of(cells if edge == 1 else cells.repeat(edge, axis=0).repeat(edge, axis=1))


def draw_values(mask: Mask, device: torch.device) -> Tensor:
    """Normal live values (live,), float32, in row-major order."""
    return torch.randn(mask.count, generator=torch.Generator().manual_seed(SEED)).to(device)


def make(name: str, mask: Mask, values: Tensor, case: LayerCase) -> Arm:
    """An arm by its name; each has a parameter of its own. Raises InputError for an engine that can't run here."""
    if name == BASELINE:
        weight = to_dense(values, mask).requires_grad_()
        alive = torch.from_numpy(mask.alive()).to(case.device)
        return Arm(torch.float32, weight, lambda x: F.linear(x, weight * alive), lambda: None)
    if name in ("dense_bf16", "dense_fp32"):
        precision = torch.bfloat16 if name == "dense_bf16" else torch.float32
        weight = to_dense(values, mask).to(precision).requires_grad_()
        return Arm(precision, weight, lambda x: F.linear(x, weight), lambda: None)
    if name in ("sparse", "sparse_torch"):
        return _of_engine(Sparse(mask, "torch" if name == "sparse_torch" else "auto"), values, case)
    if name in ("dense", "block"):
        return _of_engine(autotune.make(name, mask, case), values, case)  # type: ignore[arg-type]
    raise AssertionError(name)


def _of_engine(engine: Engine, values: Tensor, case: LayerCase) -> Arm:
    if case.device.type == "cpu":
        keep_large_blocks()  # as training with engines does
    own = values.clone().requires_grad_()
    return Arm(case.precision, own, lambda x: engine(x, own), lambda: engine.refresh(own.detach()))


def make_all(mask: Mask, case: LayerCase) -> tuple[dict[str, Arm], str]:
    """Every arm that can run under a case, and which engine `auto` is."""
    names = [*DENSE, *(["sparse", "sparse_torch"] if case.device.type == "cpu" else [])]
    names += ["block"] if case.block else []
    if case.device.type == "cpu":
        keep_large_blocks()  # for dense arms too, so that no arm owes its ratio to the allocator
    chosen = autotune.fastest(mask, case).name
    values = draw_values(mask, case.device)
    arms = {name: make(name, mask, values, case) for name in names}
    return {**arms, "auto": make(chosen, mask, values, case)}, chosen


def draw_inputs(shape: tuple[int, int], case: LayerCase, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """X (tokens, in), a leaf, and the gradient of Y (tokens, out), the same numbers in any precision."""
    random = torch.Generator().manual_seed(SEED + 1)
    x, gradient = (torch.randn(case.tokens, width, generator=random) for width in reversed(shape))
    return x.to(case.device, precision).requires_grad_(), gradient.to(case.device, precision)


def step(arm: Arm, x: Tensor, gradient: Tensor) -> Tensor:
    """Take over new values, Y, and the gradients of X and of the parameter."""
    x.grad = arm.parameter.grad = None
    arm.refresh()
    y = arm.forward(x)
    torch.autograd.backward(y, gradient)
    return y


def times(arms: dict[str, Arm], shape: tuple[int, int], case: LayerCase, rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm's step by round, after one that is not counted; the order alternates between rounds."""
    inputs = {precision: draw_inputs(shape, case, precision) for precision in {a.precision for a in arms.values()}}
    found: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            started = _now(case.device)
            step(arms[name], *inputs[arms[name].precision])
            seconds = _now(case.device) - started
            arms[name].parameter.grad = None
            if turn:
                found[name].append(seconds)
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(shape: tuple[int, int], density: float, case: LayerCase, rounds: int) -> dict[str, Any]:
    """One density's times in milliseconds and ratios; `over_dense` is the best dense arm of the same precision ÷ arm."""
    mask = random_mask(shape, density, case.block)
    arms, chosen = make_all(mask, case)
    seconds = times(arms, shape, case, rounds)
    median = {name: statistics.median(spent) for name, spent in seconds.items()}
    rows: dict[str, Any] = {}
    for name, arm in arms.items():
        alike = [other for other in DENSE if arms[other].precision == arm.precision]
        best = min(alike, key=lambda other: median[other])
        rows[name] = {
            "precision": str(arm.precision).removeprefix("torch."),
            "ms": round(1000 * median[name], 4),
            **_ratio("ratio", seconds[BASELINE], seconds[name]),
            **_ratio("over_dense", seconds[best], seconds[name]),
            "best_dense": best,
        }
    return {"density": density, "live": mask.count, "auto": chosen, "arms": rows}


def _ratio(word: str, above: list[float], below: list[float]) -> dict[str, Any]:
    """Median and quartiles over rounds; both arms of a ratio ran in the same round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return {word: round(middle, 4), f"{word}_quartiles": [round(low, 4), round(high, 4)]}


def break_even(points: list[tuple[float, float]]) -> dict[str, Any]:
    """The density at which a ratio is 1, from (density, ratio); None, and why, where no two points bracket it.

    Interpolated on logarithmic axes, in the densest interval that brackets it.
    """
    points = sorted(points)
    for (sparser, above), (denser, below) in reversed(list(pairwise(points))):
        if (above >= 1) != (below >= 1):
            share = log(above) / log(above / below)
            found = exp(log(sparser) + share * log(denser / sparser))
            return {"density": float(f"{found:.4g}"), "text": f"at density {found:.3g}"}
    if all(ratio >= 1 for _, ratio in points):
        text = f"above {points[-1][0]:.3g}, not measured: faster at every density measured"
    else:
        text = f"below {points[0][0]:.3g}, not measured: slower at every density measured"
    return {"density": None, "text": text}


def break_evens(found: list[dict[str, Any]]) -> dict[str, Any]:
    """By engine, against masked dense and against the best dense arm of the same precision."""
    words = {"masked": "ratio", "best_dense": "over_dense"}
    return {
        name: {
            against: break_even([(row["density"], row["arms"][name][word]) for row in found])
            for against, word in words.items()
        }
        for name in ENGINES
        if name in found[0]["arms"]
    }


def picture(result: dict[str, Any]) -> dict[str, Any]:
    """The figure of a `bench layer` document: ratio over density, a line an arm."""
    from supar_cli.reporting import result as figures

    found = sorted(result["densities"], key=lambda row: row["density"])
    lines = []
    for name in found[0]["arms"]:
        rows = [row["arms"][name] for row in found]
        line = figures.line(name, {row["density"]: row["arms"][name]["ratio"] for row in found})
        low, high = ([row["ratio_quartiles"][end] for row in rows] for end in (0, 1))
        lines.append({**line, "low": low, "high": high})
    out, width = result["shape"]
    return {
        "name": "layer",
        "title": "Time of one layer against masked dense",
        "x": "density",
        "y": "masked dense ÷ arm, higher is faster",
        "x_log2": True,
        "y_log2": True,
        "y_limits": None,
        "panels": [{"title": f"{out}×{width}, {result['tokens']} tokens", "vertical": None, "lines": lines}],
    }
