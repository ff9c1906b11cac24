"""Side-by-side timing of one masked layer: forward pass and both gradients, by each engine and by dense layers."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import exp, log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_cli.bench.results import Benchmark, Document, Reading, machine_settings
from supar_cli.errors import InputError
from supar_cli.reporting.result import Figure, Line, Panel, Table
from supar_cli.sparse import autotune
from supar_cli.sparse.autotune import (
    LayerCase,
    device_seconds,
    draw_inputs,
    draw_values,
    interleave,
    keep_large_blocks,
    layer_step,
)
from supar_cli.sparse.block_structure import BLOCKS
from supar_cli.sparse.csr import Sparse
from supar_cli.sparse.linear import Engine
from supar_cli.sparse.masks import Mask, RandomKeys, select
from supar_cli.training.prepare import to_dense
from supar_cli.training.runtime import Runtime, is_slow

BASELINE = "masked"
DENSE = (BASELINE, "dense", "dense_bf16", "dense_fp32")
ENGINES = ("sparse", "sparse_torch", "block")  # engines whose time scales with the density


class WholeWeight(Engine):
    """A dense weight parameter (out, in). If it has a mask, every forward pass multiplies the weight by it."""

    alive: Tensor | None

    def __init__(self, alive: Tensor | None) -> None:
        nn.Module.__init__(self)  # no packed mask: peers store none, so it would distort the memory comparison
        self.register_buffer("alive", alive, persistent=False)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight if self.alive is None else weight * self.alive)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to hold and multiply a masked weight. `parameter` is the leaf that gets the gradient."""

    engine: Engine
    parameter: Tensor
    precision: torch.dtype

    def step(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Compute Y from X, and the gradients of `x` and of the parameter."""
        return layer_step(self.engine, self.parameter, x, gradient)


def make(name: str, mask: Mask, values: Tensor, case: LayerCase) -> Arm:
    """Make the arm with this name. Each arm has its own parameter. Raises InputError for an engine that can't run here."""
    if name in ("masked", "dense_bf16", "dense_fp32"):
        precision = torch.bfloat16 if name == "dense_bf16" else torch.float32
        weight = to_dense(values.detach(), mask).to(precision).requires_grad_()
        alive = torch.from_numpy(mask.alive()).to(case.device) if name == "masked" else None
        return Arm(WholeWeight(alive), weight, precision)
    engine = Sparse(mask, "torch") if name == "sparse_torch" else autotune.make(name, mask, case)
    return Arm(engine, values.detach().clone().requires_grad_(), case.precision)


def make_all(mask: Mask, case: LayerCase) -> tuple[dict[str, Arm], str]:
    """Every arm that can run for this case, and the engine that `auto` chooses.

    The dense one in bfloat16 only where that is not slow, or asked for: on a CPU it may take minutes.
    """
    engines = autotune.candidates(case)[1:]
    left_out = is_slow(case.device, torch.bfloat16) and case.precision != torch.bfloat16
    names = [name for name in DENSE if not (left_out and name == "dense_bf16")]
    names += (name for name in ENGINES if name.removesuffix("_torch") in engines)
    if case.device.type == "cpu":
        keep_large_blocks()  # for dense arms too, so that the allocator favours no arm
    chosen = autotune.fastest(mask, case).name
    values = draw_values(mask, case.device)
    arms = {name: make(name, mask, values, case) for name in names}
    return {**arms, "auto": make(chosen, mask, values, case)}, chosen


def draw_mask(shape: tuple[int, int], density: float, block: int | None = None) -> Mask:
    """A mask (out, in) with this share of its weights, or of its aligned blocks, alive (rounded, at least one)."""
    edge = block or 1
    keys = RandomKeys(0, "mask", (shape[0] // edge, shape[1] // edge))
    live = max(1, round(density * keys.size)) * edge**2
    return select("block" if block else "exact", keys, live, block=block)


def benchmark(
    shape: tuple[int, int], densities: list[float], tokens: int, block: int | None, rounds: int, runtime: Runtime
) -> Benchmark:
    """The benchmark of a layer (out, in) at some densities. Raises InputError for a block that doesn't divide it."""
    if block is not None and (block not in BLOCKS or shape[0] % block or shape[1] % block):
        edges = ", ".join(map(str, BLOCKS))
        raise InputError(f"--block {block}: expected one of {edges} that divides both of {shape[0]}×{shape[1]}")
    case = LayerCase(runtime.device, runtime.precision, tokens, block)

    def measure() -> Document:
        with runtime.products():
            found = [measure_density(shape, density, case, rounds) for density in densities]
        return {"rounds": rounds, "densities": found, "break_even": break_evens(found)}

    settings = {"shape": list(shape), "tokens": tokens, "density": densities, "block": block}
    settings |= machine_settings(case.device, runtime.precision_name)
    return Benchmark("layer", settings, case.device, measure, tables, readings, figure)


def measure_density(shape: tuple[int, int], density: float, case: LayerCase, rounds: int) -> Document:
    """One density's times in milliseconds and ratios; `over_dense` is the best dense arm of the same precision ÷ arm."""
    mask = draw_mask(shape, density, case.block)
    arms, chosen = make_all(mask, case)
    inputs = {precision: draw_inputs(shape, case, precision) for precision in {a.precision for a in arms.values()}}

    def step(arm: Arm) -> None:
        arm.step(*inputs[arm.precision])
        arm.parameter.grad = None  # no arm holds memory while another one runs

    steps = {name: partial(step, arm) for name, arm in arms.items()}
    seconds = interleave(steps, rounds, case.device, timer=device_seconds)
    median = {name: statistics.median(spent) for name, spent in seconds.items()}
    by_time = sorted((name for name in DENSE if name in arms), key=lambda name: median[name])
    rows: Document = {}
    for name, arm in arms.items():
        best = next(dense for dense in by_time if arms[dense].precision == arm.precision)
        rows[name] = {
            "precision": str(arm.precision).removeprefix("torch."),
            "ms": round(1000 * median[name], 4),
            **Reading.ratio(seconds[BASELINE], seconds[name]).fields("ratio"),
            **Reading.ratio(seconds[best], seconds[name]).fields("over_dense"),
            "best_dense": best,
        }
    return {"density": density, "live": mask.count, "auto": chosen, "arms": rows}


def break_even(points: list[tuple[float, float]]) -> Document:
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
        text = f"above {points[-1][0]:.3g} (faster at every measured density)"
    else:
        text = f"below {points[0][0]:.3g} (slower at every measured density)"
    return {"density": None, "text": text}


def break_evens(found: list[Document]) -> Document:
    """By engine, against masked dense and against the best dense arm of the same precision."""
    against = {"masked": "ratio", "best_dense": "over_dense"}
    return {
        name: {
            dense: break_even([(row["density"], row["arms"][name][ratio]) for row in found])
            for dense, ratio in against.items()
        }
        for name in ENGINES
        if name in found[0]["arms"]
    }


def tables(document: Document) -> list[Table]:
    """A table for each density, and one of where the engines break even."""
    out, width = document["shape"]
    blocks = f", blocks of {document['block']}" if document["block"] else ""
    columns = ["arm", "ms", "masked ÷", "quartiles", "best dense ÷", "quartiles"]
    found = []
    for one in document["densities"]:
        rows = [
            [
                f"auto ({one['auto']})" if name == "auto" else name,
                f"{arm['ms']:.1f}" if arm["ms"] >= 10 else f"{arm['ms']:.3g}",
                *Reading.read(arm, "ratio").cells(),
                *Reading.read(arm, "over_dense").cells(),
            ]
            for name, arm in one["arms"].items()
        ]
        title = (
            f"{out}×{width}, {document['tokens']} tokens, density {one['density']:g} ({one['live']:,} live{blocks})\n"
            "masked ÷: time of `weight * mask` ÷ time of this arm; above 1 the arm is faster"
        )
        found.append(Table(title=title, columns=columns, rows=rows))
    even = [[name, one["masked"]["text"], one["best_dense"]["text"]] for name, one in document["break_even"].items()]
    if even:
        columns = ["breaks even", "with masked dense", "with the best dense"]
        found.append(Table(title="", columns=columns, rows=even))
    return found


def readings(document: Document) -> dict[str, Reading]:
    return {
        f"{name} at {row['density']:g}": Reading.read(arm, "ratio")
        for row in document["densities"]
        for name, arm in row["arms"].items()
        if name != BASELINE
    }


def figure(document: Document) -> Figure:
    """Ratio over density, one line per arm."""
    found = sorted(document["densities"], key=lambda row: row["density"])
    lines = []
    for name in found[0]["arms"]:
        line = Line.through(name, {row["density"]: row["arms"][name]["ratio"] for row in found})
        line.low, line.high = ([row["arms"][name]["ratio_quartiles"][end] for row in found] for end in (0, 1))
        lines.append(line)
    out, width = document["shape"]
    return Figure(
        name="layer",
        title="Time of one layer against masked dense",
        x="density",
        y="masked dense ÷ arm, higher is faster",
        x_log2=True,
        y_log2=True,
        panels=[Panel(title=f"{out}×{width}, {document['tokens']} tokens", lines=lines)],
    )
