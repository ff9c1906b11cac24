"""A user's model with its plan's masks on it: gradients masked, weights checked, norms taken as the plan means them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supar_cli.errors import InputError
from supar_cli.own import dead_weights, modules
from supar_cli.own.clip_watch import ClipWatch
from supar_cli.own.initial import live_text
from supar_cli.own.oversights import InitialValues
from supar_cli.own.parameters import local_shard, match, named_parameters, shown, submodules, sum_shards_, total_square
from supar_cli.planning.plan import Plan, PlanTensor
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.sparse.masks import Mask


class MaskedModel:
    """A model under its plan. `tensors` are its present parameters, `rows` their numbers, `masks` which weights live.

    `schedule` says how masks change, None where they stay; `step` counts the finished steps of a plan whose masks change.
    """

    def __init__(self, model: nn.Module, plan: Plan, masks: Mapping[str, Mask], engine: str | None = None) -> None:
        self.plan, self.masks = plan, dict(masks)
        self.rows = {row.name: row for row in plan.tensors if row.tied_to is None}
        self.schedule, self.step = MaskSchedule.of(plan), 0
        self._engine, self.clips = engine, ClipWatch({}, {}, ())
        self.initial_values = InitialValues({})
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Take over a model's parameters: after fully_shard, of a copy, or after a part of it was made anew.

        Gradients are masked from now on; weights are not changed, and live ones where the plan has dead ones are an error
        at the first step.
        """
        self.tensors = match(model, self.plan)
        self.model = model
        hooked = {name: dead_weights.hook(tensor, self.masks.get(name)) for name, tensor in self.tensors.items()}
        self.dead = {name: dead for name, dead in hooked.items() if dead is not None}
        self.by_id = {id(tensor): self.rows[name] for name, tensor in self.tensors.items()}
        self._versions: dict[str, int] = {}
        self.clips.close()
        self.clips = ClipWatch(self.tensors, self.rows, self.dead)
        inside = submodules(model, self.tensors)
        modules.multiply_inputs(inside, getattr(self.plan.model, "hooks", {}))
        self._engine_now = self._engine
        modules.use_engine(inside, self.masks, self._engine)
        modules.call_after_load(inside[""], self._check_load)
        self.get_ready()

    def get_ready(self) -> None:
        """Let the next step keep what the change of masks after it needs."""
        if self.schedule is None:
            return
        updates, is_update = self.schedule.updates, self.schedule.is_update(self.step + 1)
        keeps, is_free = self.schedule.stores_dense(self.step), updates.grow == "magnitude"
        collects = is_update and updates.grow == "gradient"
        for dead in self.dead.values():
            dead.keeps_moments, dead.keeps_gradients, dead.collects = keeps, keeps and is_free, collects
            dead.is_chosen_next = is_update and is_free
            dead.forget()
        # the sparse engine makes gradients of live weights alone
        engine = None if (keeps and is_free) or collects else self._engine
        if self._engine is not None and (engine != self._engine_now or self.schedule.is_update(self.step)):
            modules.use_engine(submodules(self.model, self.tensors), self.masks, engine)
            self._engine_now = engine

    def density_key(self, row: PlanTensor) -> tuple[int, ...]:
        """What tensors of one group have in common where density moves, so that one factor on their rate is right for all."""
        return (row.size, row.kept) if self.schedule is not None and self.schedule.moves(row) else ()

    def replaced(self) -> list[str]:
        """Names of parameters that the model holds no longer, or in another shape. What FSDP2 gathers replaces none."""
        now, found = named_parameters(self.model, self.rows), list[str]()
        for name, held in self.tensors.items():
            present = now.get(name)
            is_gathered = isinstance(held, DTensor) and present is not None and not isinstance(present, DTensor)
            if (present is not held and not is_gathered) or list(held.shape) != self.rows[name].shape:
                found.append(name)
        return found

    def require_current(self) -> None:
        """Raise InputError if the model has other parameters than those that the masks are on."""
        if names := self.replaced():
            what = "the model has other parameters than when its optimizer was made (sharded, resized or converted)"
            remedy = "call prepared.optimizer(model) or, for an optimizer of yours, prepared.attach(model) after that"
            raise InputError(f"{shown(names)}: {what}; {remedy}")
        if names := [name for name, dead in self.dead.items() if dead_weights.of(self.tensors[name]) is not dead]:
            remedy = "make the optimizer from what that call of prepare returned"
            raise InputError(f"{shown(names)}: the model was prepared again, with other masks; {remedy}")

    def changed(self) -> list[str]:
        """Names of masked tensors that were written to since `mark`, as far as torch counts what writes to a tensor."""
        return [name for name in self.dead if self._versions.get(name) != self.tensors[name]._version]

    def mark(self, names: Iterable[str]) -> None:
        """Remember that the dead weights of these tensors are 0 now."""
        self._versions |= {name: self.tensors[name]._version for name in names}

    def require_dead(self, names: Iterable[str]) -> None:
        """Raise InputError, with their count by tensor, if weights live where the plan has dead ones, in this process."""
        counts = {name: self.dead[name].count_live(self.tensors[name]) for name in names}
        device = next(iter(counts.values())).device if counts else None
        found = torch.stack([count.to(device) for count in counts.values()]).tolist() if counts else []
        if problems := [live_text(name, count) for name, count in zip(counts, found, strict=True) if count]:
            what = "weights: expected those of a model of this plan and seed"
            if self.schedule is not None:
                what += f", after step {self.step} (prepared.load_state_dict has the masks of another step)"
            raise InputError(*problems, f"{what}; nothing was changed")

    def _check_load(self, module: nn.Module) -> None:
        """After a load_state_dict, before the first forward pass with its values."""
        self.initial_values.forget()
        is_whole = module is submodules(self.model, self.tensors)[""] and not self.replaced()
        if is_whole and self.schedule is None:  # else the masks of its step may be loaded later; the next step asks
            self.require_dead(self.dead)

    @torch.no_grad()
    def clip_grad_norm_(self, limit: float, *, scale: Tensor | None = None) -> Tensor:
        """Scale all gradients so that their global norm is at most `limit`; returns the norm before, ().

        It is the norm that the gradients would have with the plan's multipliers in the forward pass: √Σ‖fold·g‖², over all
        ranks where tensors are sharded, without dead weights. A nan or inf at a live weight makes all gradients nan, as
        with torch's. `scale`: a factor that the gradients still have. Raises InputError for a limit that is not above 0.
        """
        if not limit > 0:
            raise InputError(f"clip: {limit}; expected a number above 0")
        self.require_current()
        self.clips.look()
        found = {name: tensor.grad for name, tensor in self.tensors.items() if tensor.grad is not None}
        for name in found.keys() & self.dead.keys():
            if not self.dead[name].keeps_gradients:
                self.dead[name].zero_(found[name])
        norm = total_square((self.rows[name].fold or 1.0, grad) for name, grad in found.items()).sqrt()
        norm = norm if scale is None else norm / scale
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        alike: dict[torch.device, list[Tensor]] = {}
        for grad in found.values():
            alike.setdefault(grad.device, []).append(local_shard(grad))
        for device, grads in alike.items():
            torch._foreach_mul_(grads, factor.to(device))
        self.clips.forget()
        return norm

    @torch.no_grad()
    def check(self) -> dict[str, int]:
        """How many weights are not 0 where the plan has dead ones, by tensor; empty where all is well.

        Every rank calls it where tensors are sharded.
        """
        counts = {name: dead.count_live(self.tensors[name]) for name, dead in self.dead.items()}
        for name, count in counts.items():
            if isinstance(tensor := self.tensors[name], DTensor):
                sum_shards_(count, tensor.device_mesh, tensor.placements)
        return {name: found for name, count in counts.items() if (found := int(count))}
