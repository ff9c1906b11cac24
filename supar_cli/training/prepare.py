"""Preparing a plan's model for training: build it, draw masks and initial values, choose engines, check against the plan.

A masked tensor is stored as its live values in row-major order, whichever engine multiplies with them.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import log2, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from supar_cli.errors import InputError
from supar_cli.models.transformer import Transformer, named_tensors
from supar_cli.models.vit import VisionTransformer
from supar_cli.planning.plan import Plan, PlanTensor, PlanViT
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.sparse import autotune, masks
from supar_cli.sparse.autotune import EngineChoice, LayerCase
from supar_cli.sparse.linear import Dense, DenseGroup, Engine, Linear
from supar_cli.sparse.mask_files import read_masks, read_values
from supar_cli.sparse.masks import Mask, WantedMask
from supar_cli.streams import stream
from supar_cli.training.distributed import Ranks
from supar_cli.training.runtime import Runtime

DRAWN_AT_ONCE = 2**16  # chosen: positions drawn at once, in whole rows, to keep the live ones of `draw: positions`
CHECKED_AT_ONCE = 2**20  # chosen: 8 MiB in double precision


@dataclass(slots=True)
class SparseModel:
    """A model, its parameters by the plan's names, and the masks. A masked parameter holds live values only."""

    model: nn.Module
    tensors: dict[str, nn.Parameter]
    masks: dict[str, Mask]
    group: DenseGroup | None = None  # of small tensors, where each launch counts

    def group_engines(self) -> None:
        """Let all small tensors under the dense engine be refreshed at once."""
        self.group = DenseGroup.of([self.linear(name) for name in self.masks])

    def sync_engines(self) -> None:
        """Tell the engines that parameters have changed in place."""
        if self.group is not None:
            self.group.refresh()
        for layer in map(self.linear, self.masks):
            if self.group is None or layer not in self.group.layers:
                layer.refresh()

    def linear(self, name: str) -> Linear:
        """The layer of a masked tensor."""
        found = self.model.get_submodule(name)
        assert isinstance(found, Linear)
        return found

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """A copy of a tensor in the plan's shape, dead weights zero."""
        return to_dense(self.tensors[name].detach(), self.masks.get(name))


def to_dense(values: Tensor, mask: Mask | None) -> Tensor:
    """The dense tensor, in the mask's shape, of live values (live,) in row-major order; a copy of a tensor that is whole."""
    if mask is None or tuple(values.shape) == mask.shape != (mask.count,):
        return values.clone()
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    dense.view(-1)[torch.from_numpy(mask.live()).to(values.device)] = values
    return dense


def transformer(plan: Plan) -> Transformer | VisionTransformer:
    """The plan's transformer without its initial values."""
    model = plan.decoder
    return VisionTransformer(model) if isinstance(model, PlanViT) else Transformer(model)


def prepare(
    plan: Plan,
    device: torch.device,
    engine_of: Callable[[str, Mask], Engine] | None = None,
    build_model: Callable[[Plan], nn.Module] = transformer,
    masks: Mapping[str, Mask] | None = None,
    values: Mapping[str, Tensor] | None = None,
    stores_dense: bool = False,
) -> SparseModel:
    """Build a plan's model and set its masks and values.

    `engine_of` makes the engine of a masked tensor, by default the dense one in float32. `build_model` makes a model whose
    parameters have the plan's names and shapes. `values` are by name, live ones in row-major order for a masked tensor; by
    default they are the plan's initial values, which are checked. With `stores_dense` masked tensors, and their `values`,
    are whole, zero where dead. Raises InputError if the check fails.
    """
    masks = make_masks(plan) if masks is None else masks
    engine_of = engine_of or (lambda _, mask: Dense(mask, torch.float32))
    model = build_model(plan)
    made = SparseModel(model, named_tensors(model), dict(masks))
    rows = start_rows(plan)
    start = starting_values(plan, masks) if values is None else ((row, values[row.name]) for row in rows)
    with torch.no_grad():
        for row, value in start:
            mask = masks.get(row.name)
            if stores_dense or mask is None:
                made.tensors[row.name].copy_(value if values is not None else to_dense(value, mask))
            else:
                made.linear(row.name).remask(mask, value.to(device), engine_of(row.name, mask).to(device))
    model.to(device)
    made.tensors = named_tensors(model)
    if device.type == "cuda":
        made.group_engines()
    if values is None:
        for row in rows:
            check_init(row, made.tensors[row.name], plan.sparsity.pattern, masks.get(row.name))
    return made


def start_rows(plan: Plan) -> list[PlanTensor]:
    """The plan's rows with the densities of step 0."""
    schedule = MaskSchedule.of(plan)
    return plan.tensors if schedule is None else [schedule.at_start(row) for row in plan.tensors]


def make_masks(plan: Plan) -> dict[str, Mask]:
    """The masks of all sparse tensors by name, drawn or read from the plan's file of masks.

    Raises InputError for masks that don't fit the plan, SetupError if the file can't be read.
    """
    source = plan.sparsity.source
    if source.path is None:
        return draw_masks(plan)
    wanted = {row.name: wanted_mask(plan, row) for row in start_rows(plan) if row.kept < row.size}
    return read_masks(Path(source.path), source.hash, wanted)


def draw_masks(plan: Plan) -> dict[str, Mask]:
    """The random masks of all sparse tensors by name, a tensor a thread. Another layer in the plan changes no mask of the others."""
    rows = [row for row in start_rows(plan) if row.kept < row.size]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # numpy draws without Python's lock
        drawn = threads.map(
            lambda row: masks.draw(stream_name(row), wanted_mask(plan, row), row.density, plan.train.seed), rows
        )
        return {row.name: mask for row, mask in zip(rows, drawn, strict=True)}


def wanted_mask(plan: Plan, row: PlanTensor) -> WantedMask:
    """What the plan says of a tensor's mask."""
    sparsity = plan.sparsity
    even_rows, shape, axes = sparsity.block_rows == "even", tuple(row.shape), tuple(row.fan_in_axes)
    return WantedMask(shape, row.kept, axes, sparsity.pattern, sparsity.block, even_rows, sparsity.draw)


def require_same_tensors(plan: Plan, build_model: Callable[[Plan], nn.Module] = transformer) -> None:
    """Raise InputError unless the plan and the model have the same tensors. Needs no memory for them."""
    with torch.device("meta"):
        tensors = named_tensors(build_model(plan))
    planned = {row.name: tuple(row.shape) for row in plan.tensors}
    built = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shared = [name for name in planned if name in built]
    different = [f"  {n}: the plan has {planned[n]}, the model {built[n]}" for n in shared if planned[n] != built[n]]
    different += [f"  {name}: in the plan only" for name in planned if name not in built]
    different += [f"  {name}: in the model only" for name in built if name not in planned]
    if different:
        what = "the plan's tensors are not the model's; expected the same names and shapes"
        raise InputError("\n".join([f"tensors: {what}:", *different]))


def stream_name(row: PlanTensor) -> str:
    """The name that a tensor's mask and values are drawn under: a module's weight under its module's, as in supar's families.

    No two tensors of a model share one, as a module has no parameter and submodule of one name.
    """
    return row.name.removesuffix(".weight")


def starting_values(plan: Plan, masks: Mapping[str, Mask]) -> Iterator[tuple[PlanTensor, Tensor]]:
    """Each row with its initial values, drawn or from the plan's file; only those of live weights if there is a mask.

    Raises InputError for a file that doesn't fit the plan, SetupError if it can't be read.
    """
    given = None
    if plan.values.path is not None:
        shapes = {row.name: (masks[row.name].count,) if row.name in masks else tuple(row.shape) for row in plan.tensors}
        given = read_values(Path(plan.values.path), plan.values.hash, shapes)
    for row in start_rows(plan):
        yield row, given[row.name] if given else initial_values(plan, row, masks.get(row.name))


def initial_values(
    plan: Plan, row: PlanTensor, mask: Mask | None, dtype: type[np.floating[Any]] = np.float32
) -> Tensor:
    """A tensor's initial values, constant or normal as the plan says; only those of live weights if there is a mask.

    Normal ones are the first of the stream of (seed, name), one a live weight in row-major order, or with `draw: positions`
    one a position: then a live weight's value does not depend on the mask, and the time follows the positions.
    """
    shape = row.shape if mask is None else [mask.count]
    if not row.init_std:
        return torch.from_numpy(np.full(shape, row.init_constant or 0.0, dtype))
    generator = np.random.Generator(stream(plan.train.seed, f"init:{stream_name(row)}"))
    if mask is None or plan.values.draw == "live":
        values = generator.standard_normal(shape, np.float32)
    else:
        step = max(1, DRAWN_AT_ONCE * mask.shape[0] // mask.size)
        parts = (mask.alive(slice(first, first + step)) for first in range(0, mask.shape[0], step))
        drawn = [generator.standard_normal(alive.shape, np.float32)[alive] for alive in parts]
        values = np.concatenate(drawn)
    scaled = values.astype(dtype, copy=False)
    scaled *= dtype(row.init_std)
    return torch.from_numpy(scaled)


def check_init(row: PlanTensor, tensor: Tensor, pattern: str, mask: Mask | None) -> None:
    """Raise InputError unless a tensor's live count and measured deviation agree with the plan.

    The deviation of n normal numbers has the relative standard error 1/√(2n): within 6 of them a false alarm has a chance
    below 1e-8. The root mean square of values from a file is known exactly, and is not 0 under a mask.
    """
    alive = row.size if mask is None else mask.count
    allowed = 6 * sqrt(row.kept * (1 - row.density)) if pattern == "bernoulli" else 0
    if abs(alive - row.kept) > allowed:
        raise InputError(f"{row.name}: {alive} weights are alive, the plan keeps {row.kept}")
    if not alive:
        raise InputError(f"{row.name}: its mask has no live weight; expected a higher density or another seed")
    values, wanted, start = tensor.detach().flatten(), row.init_std or 0.0, float(np.float32(row.init_constant or 0.0))
    parts = (values[first : first + CHECKED_AT_ONCE] for first in range(0, len(values), CHECKED_AT_ONCE))
    squares = sum(float((part.double() - start).square().sum()) for part in parts)
    measured = sqrt(squares / alive)
    by_chance = 6 / sqrt(2 * alive) if row.init == "normal" else 0.0
    if abs(measured - wanted) > wanted * (by_chance + 1e-6):
        raise InputError(f"{row.name}: measured init std {measured:.6g}, the plan says {wanted:.6g}")
    if row.init == "file" and mask is not None and not measured:
        raise InputError(f"{row.name}: all its live weights start at 0; expected values that can be trained")


class EngineSelector:
    """The engines of a plan's masked tensors: `choose` all of them, then `make` each while the model is built.

    Only rank 0 measures, and all ranks take its choice. `units` is the number of tokens, or other units, in a micro-batch.
    """

    def __init__(self, plan: Plan, runtime: Runtime, ranks: Ranks, units: int, sharded: bool) -> None:
        self.plan, self.choices, self._ranks = plan, dict[str, EngineChoice](), ranks
        self.case = LayerCase(runtime.device, runtime.precision, units, plan.sparsity.block, sharded)
        self._rows, self._products = {row.name: row for row in plan.tensors}, runtime.products
        self._fastest: dict[tuple[object, ...], EngineChoice] = {}  # layers of one shape and size share a measurement

    def choose(self, masks: Mapping[str, Mask]) -> list[str]:
        """Choose an engine for every mask (out, in). Every rank calls it with the same masks.

        Returns the measurements that were not known before, one line for each shape, and a hint at what would be faster.
        """
        texts, counts = dict[tuple[object, ...], str](), Counter[tuple[object, ...]]()
        alike = {name: (mask.shape, self._measured_density(mask)) for name, mask in masks.items()}
        named = {name: self.plan.engine(self._rows[name]) for name in masks}
        new = {alike[name] for name in masks if named[name] == "auto"} - set(self._fastest)
        for name, mask in masks.items():
            if alike[name] in new - set(self._fastest):
                limit_s = autotune.MOST_SECONDS / len(new)
                with self._products():
                    self._fastest[alike[name]] = self._ranks.on_main(autotune.fastest, mask, self.case, limit_s)
            is_auto = named[name] == "auto"
            self.choices[name] = self._fastest[alike[name]] if is_auto else EngineChoice(named[name], {})
            if is_auto and alike[name] in new and self.choices[name] != EngineChoice("dense", {}):
                size = f"{'×'.join(map(str, mask.shape))} at density {mask.count / mask.size:.3g}"
                texts.setdefault(alike[name], f"{size}: {self.choices[name].text()}")
                counts[alike[name]] += 1
        lines = [f"engine of {counts[key]} tensor{'s' * (counts[key] > 1)} {text}" for key, text in texts.items()]
        if lines and self.case.device.type == "cpu" and not importlib.util.find_spec("numba"):
            lines.append("numba is not installed: `pip install numba` makes the sparse engine faster")
        return lines

    def _measured_density(self, mask: Mask) -> int:
        """The density that a measurement holds for, in octaves where it moves, else in eighths of one: counts may be random."""
        parts = 8 if self.plan.sparsity.updates is None else 1
        return round(parts * log2(mask.size / max(1, mask.count)))

    def make(self, name: str, mask: Mask) -> Engine:
        """Make the chosen engine of a tensor."""
        return autotune.make(self.choices[name].name, mask, self.case)
