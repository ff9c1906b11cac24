"""Changes of masks while a plan trains: which weights are dropped and grown after a step, by the plan's schedule.

Tensors are stored by their live weights, and RigL's dense gradients are made one at a time in the backward pass of a step that
ends with a change; where such a step has several micro-batches, sums of all tensors are held in host memory. Where every
position keeps its moments (top-k, `moments: keep`) tensors are whole while masks move, zero where dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from supar_cli.errors import InputError
from supar_cli.planning.plan import Plan, PlanTensor
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.sparse.linear import Engine
from supar_cli.sparse.masks import IndexMap, Mask
from supar_cli.sparse.updates import grow_largest, keep_largest, random_scores
from supar_cli.training.distributed import Ranks
from supar_cli.training.prepare import SparseModel, stream_name, to_dense
from supar_cli.training.state import GrownMoments, carry


def alive_of(mask: Mask, device: torch.device) -> Tensor:
    """True where a weight lives, in the mask's shape, on a device."""
    return torch.from_numpy(mask.alive()).to(device)


class MaskUpdates:
    """The changes of a plan's masks; none without a schedule. `rows` are the tensors whose masks change."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.schedule, self._seed = MaskSchedule.of(plan), plan.train.seed
        self.rows = [row for row in plan.tensors if self.schedule is not None and self.schedule.moves(row)]
        self._by_gradient = self.schedule is not None and self.schedule.updates.grow == "gradient"
        self._ranks = ranks.new_group(is_default_backend=True) if self._by_gradient else ranks
        self._alive: dict[str, Tensor] = {}  # of tensors that are stored whole
        self._gradients: dict[str, Tensor] = {}  # of the micro-batches before the last one, in host memory
        self._grown: dict[str, Tensor] = {}  # positions
        self._moved: Tensor | None = None  # how many weights the last change brought to life, on their device

    def stores_dense(self, step: int) -> bool:
        """Whether tensors whose masks change are stored whole after a step."""
        return self.schedule is not None and self.schedule.stores_dense(step)

    def changes_masks(self, step: int) -> bool:
        """Whether masks change after a step."""
        return self.schedule is not None and self.schedule.is_update(step)

    def is_reported(self, step: int) -> bool:
        """Whether a record is due because masks changed after a step; not where they do after every one."""
        return self.schedule is not None and self.schedule.updates.every_steps > 1 and self.schedule.is_update(step)

    @property
    def grown(self) -> GrownMoments:
        """What the second moments of grown weights start at."""
        return "mean" if self.schedule is not None and self.schedule.updates.moments == "mean" else "zero"

    def require_counts(self, masks: Mapping[str, Mask], step: int) -> None:
        """Raise InputError where masks don't have as many live weights as the schedule says of this step."""
        for row in self.rows:
            assert self.schedule is not None
            live, kept = (masks[row.name].count if row.name in masks else row.size), self.schedule.kept(row, step)
            if live != kept:
                raise InputError(
                    f"the mask of {row.name} has {live} live weights; the plan keeps {kept} after step {step}"
                )

    def begin(self, model: SparseModel, step: int) -> None:
        """Take up a model after `step` steps."""
        self._alive = {}
        if self.stores_dense(step):
            for row in self.rows:
                device, mask = model.tensors[row.name].device, model.masks.get(row.name)
                self._alive[row.name] = (
                    torch.ones(row.shape, dtype=torch.bool, device=device) if mask is None else alive_of(mask, device)
                )

    @contextmanager
    def watch(self, model: SparseModel, step: int, is_last: bool) -> Iterator[None]:
        """Score dead weights in the passes of a micro-batch of the step that `step` counts, the `is_last` one at its end."""
        if self._alive or not self._grows_by_gradient(step):
            yield
            return
        for row in self.rows:
            model.linear(row.name).watch = partial(self._score, model.masks[row.name], row, step, is_last)
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled graphs have no such hooks
                yield
        finally:
            for row in self.rows:
                model.linear(row.name).watch = None

    def _grows_by_gradient(self, step: int) -> bool:
        return self._by_gradient and self.changes_masks(step)

    def _score(self, mask: Mask, row: PlanTensor, step: int, is_last: bool, x: Tensor, gradient: Tensor) -> None:
        """Choose what grows by the dense gradient (out, in), summed over micro-batches and ranks."""
        dense = gradient.float().flatten(0, -2).t() @ x.float().flatten(0, -2)
        if row.name in self._gradients:
            dense += self._gradients.pop(row.name).to(dense.device)
        if not is_last:
            self._gradients[row.name] = dense.cpu()
            return
        self._grown[row.name] = self._positions(row, step, self._ranks.sum(dense), alive_of(mask, dense.device))

    def _positions(self, row: PlanTensor, step: int, scores: Tensor, alive: Tensor) -> Tensor:
        """Row-major positions of what grows after a step."""
        assert self.schedule is not None
        count, floor = self.schedule.dropped(row, step), self.schedule.updates.min_per_neuron
        return grow_largest(scores, alive, count, row.fan_in_axes, floor)

    @torch.no_grad()
    def mask_gradients(self, model: SparseModel, step: int) -> None:
        """Clear the gradients of dead weights of tensors that are stored whole, but for top-k, which trains them too."""
        if not self._alive or self.schedule is None or self.schedule.updates.method == "topk":
            return
        for row in self.rows:
            gradient, alive = model.tensors[row.name].grad, self._alive[row.name]
            assert gradient is not None
            if self._grows_by_gradient(step):
                self._grown[row.name] = self._positions(row, step, _whole(gradient), alive)
            _clear(gradient, alive)

    @torch.no_grad()
    def after_step(self, model: SparseModel, step: int) -> dict[str, Mask]:
        """The masks that change after `step` steps; of tensors that are stored whole they are changed here."""
        changed: dict[str, Mask] = {}
        if self.schedule is not None and self.schedule.updates.method != "topk":
            self._clear_dead(model)  # which moments that are kept have moved, and a weight that grows starts at 0
        if self.schedule is not None and self.schedule.is_update(step):
            moved = [self._change(model, row, self.schedule, step, changed) for row in self.rows]
            self._moved = torch.stack(moved).sum()
        self._grown = {}
        self._clear_dead(model)
        if self.stores_dense(step - 1) and not self.stores_dense(step):  # the last change: only live weights are left
            return {name: self.mask_of(model, name) for name in self._alive}
        return changed

    def _change(
        self, model: SparseModel, row: PlanTensor, schedule: MaskSchedule, step: int, changed: dict[str, Mask]
    ) -> Tensor:
        """Change one mask; return the number () of weights that came to life."""
        name, updates, old = row.name, schedule.updates, self._alive.get(row.name)
        mask, tensor = model.masks.get(name), model.tensors[name].detach()
        kept, count = schedule.kept(row, step), schedule.dropped(row, step)
        nothing = torch.zeros((), device=tensor.device)
        if updates.method != "topk" and not count and kept == (row.size if mask is None else mask.count):
            return nothing
        if old is None and mask is not None:
            old = alive_of(mask, tensor.device)
        weight = to_dense(_whole(tensor), mask)
        candidates = None if updates.method == "topk" else old
        alive = keep_largest(weight, kept - count, row.fan_in_axes, updates.min_per_neuron, candidates)
        if count:
            assert old is not None
            grown = self._grown.get(name)
            if grown is None:
                scores = random_scores(row.shape, self._seed, stream_name(row), step).to(tensor.device)
                grown = self._positions(row, step, scores, old)
            alive.view(-1)[grown] = True
        if name in self._alive:
            self._alive[name] = alive
        else:
            changed[name] = Mask.of(alive.cpu().numpy())
        return nothing if old is None else (alive & ~old).sum()

    def _clear_dead(self, model: SparseModel) -> None:
        for name, alive in self._alive.items():
            _clear(model.tensors[name], alive)

    def mask_of(self, model: SparseModel, name: str) -> Mask:
        """The present mask of a tensor."""
        return Mask.of(self._alive[name].cpu().numpy()) if name in self._alive else model.masks[name]

    def sync_masks(self, model: SparseModel) -> None:
        """Give the model the present masks of tensors that are stored whole."""
        model.masks |= {name: self.mask_of(model, name) for name in self._alive}

    def measurements(self, model: SparseModel, step: int) -> dict[str, float | int]:
        """What a record says of the masks: density, the share of live weights exchanged, rows without a live weight."""
        if self.schedule is None:
            return {}
        live = sum(self.schedule.kept(row, step) for row in self.rows)
        found: dict[str, float | int] = {"density": live / sum(row.size for row in self.rows)}
        if self._moved is not None and self.schedule.is_update(step):
            found["mask_changed"] = float(self._moved) / live
        whole = [(alive, row) for row in self.rows if (alive := self._alive.get(row.name)) is not None]
        found["dead_rows"] = sum(int((~alive.any(dim=tuple(row.fan_in_axes))).sum()) for alive, row in whole)
        masks = [
            (model.masks[row.name], row) for row in self.rows if row.name in model.masks.keys() - self._alive.keys()
        ]
        found["dead_rows"] += sum(_dead_rows(mask, row.fan_in_axes) for mask, row in masks)
        return found


def remask_in_place(
    model: SparseModel,
    optimizer: torch.optim.Optimizer,
    masks: Mapping[str, Mask],
    grown: GrownMoments,
    engine_of: Callable[[str, Mask], Engine],
) -> bool:
    """Change masks of as many live weights as before, so that parameters, optimizer and DDP's buckets stay.

    Returns whether the engines took the masks in place.
    """
    is_moved = True
    for name, mask in masks.items():
        linear, tensor = model.linear(name), model.tensors[name]
        values, moments = carry(
            IndexMap.between(model.masks[name], mask), tensor.detach(), optimizer.state[tensor], grown
        )
        engine = linear.engine
        if engine is None or not engine.move(mask):
            engine, is_moved = engine_of(name, mask).to(tensor.device), False
        linear.remask(mask, values, engine)
        for key, moment in moments.items():
            optimizer.state[tensor][key].copy_(moment)
        model.masks[name] = mask
    return is_moved


def _dead_rows(mask: Mask, fan_in_axes: list[int]) -> int:
    return int(np.count_nonzero(~mask.alive().any(axis=tuple(fan_in_axes))))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _clear(tensor: Tensor, alive: Tensor) -> None:
    """Set a tensor, or this rank's shard of it, to 0 where a weight is dead."""
    if isinstance(tensor, DTensor):
        alive = distribute_tensor(alive, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        tensor = tensor.to_local()
    tensor.masked_fill_(~alive, 0.0)
