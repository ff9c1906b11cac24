"""The guard of an optimizer: at every step its groups have the plan's numbers, all rates times one common factor."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from supar_cli.errors import InputError
from supar_cli.own.masked_model import MaskedModel
from supar_cli.own.parameters import match
from supar_cli.planning.plan import PlanTensor

# chosen: schedulers in double precision keep proportions to 1e-13, rates in float32 tensors to 1e-7
RATE_TOLERANCE, TENSOR_RATE_TOLERANCE = 1e-9, 1e-6
NAMES_SHOWN = 3  # chosen: enough to find a group by
CHECK_EVERY = 100  # chosen: steps between checks of all dead weights; what torch sees being written is checked at once

_LINE = "for g in optimizer.param_groups: g['lr'] = lr * g['ratio']"
_ONE_NUMBER = (
    f"all groups have one rate; write prepared.set_rate(lr) or `{_LINE}`, or give the scheduler a list, such as "
    "OneCycleLR(optimizer, max_lr=[g['lr'] for g in optimizer.param_groups], …)"
)
_FIRST_ONLY = f"only the first group was changed; write prepared.set_rate(lr) or `{_LINE}`"
_FLOOR = (
    f"a floor or an increment of one number breaks the plan's proportions (eta_min, min_lr); use a factor for all groups: "
    f"LambdaLR(optimizer, factor), or prepared.set_rate(lr), or `{_LINE}`; after load_state_dict: a state of this plan"
)


class Numbers:
    """The plan's numbers of the groups of one optimizer."""

    def __init__(self, masked: MaskedModel, optimizer: torch.optim.Optimizer) -> None:
        self._masked, self._has_warned = masked, False
        self.labels = [{key: group.get(key) for key in ("names", "ratio")} for group in optimizer.param_groups]

    def restore_labels(self, optimizer: torch.optim.Optimizer) -> None:
        """Write names and ratios into the groups again, after a state was loaded over them."""
        for group, label in zip(optimizer.param_groups, self.labels, strict=False):
            group.update({key: value for key, value in label.items() if value is not None})

    def require_same_names(self, state: Mapping[str, Any]) -> None:
        """Raise InputError for an optimizer's state whose groups are those of another plan."""
        for at, (label, group) in enumerate(zip(self.labels, state["param_groups"], strict=False)):
            if group.get("names", label["names"]) != label["names"]:
                raise InputError(
                    f"load_state_dict: group {at} of the state holds {_shown(group['names'])}; expected a state of this "
                    f"plan, whose group {at} holds {_shown(label['names'])}"
                )

    def require(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise InputError, naming the group and the line to write, unless the groups have the plan's numbers."""
        planned = self._masked.by_id
        factors, rates, tolerance = dict[int, float](), dict[int, float](), RATE_TOLERANCE
        decays, problems = list[tuple[float, float]](), list[str]()
        for at, group in enumerate(optimizer.param_groups):
            rows = [planned[id(tensor)] for tensor in group["params"] if id(tensor) in planned]
            if not rows:
                continue
            if len({(row.lr, row.weight_decay, row.eps) for row in rows}) > 1:
                problems.append(
                    f"group {at} ({_shown(row.name for row in rows)}): its tensors have several rates or decays"
                )
                continue
            if isinstance(group["lr"], torch.Tensor):
                tolerance = TENSOR_RATE_TOLERANCE
            rates[at] = float(group["lr"])
            factors[at] = rates[at] / rows[0].lr
            decays.append((float(group["weight_decay"]), rows[0].weight_decay))
            if "eps" in group and rows[0].eps and group["eps"] != rows[0].eps:
                place = f"group {at} ({_shown(row.name for row in rows)})"
                problems.append(f"{place}: eps is {group['eps']:g}; the plan says {rows[0].eps:g}")
        problems += self._decay_problems(decays)
        problems += _rate_problems(optimizer, factors, rates, tolerance, planned)
        if problems:
            raise InputError(*problems)

    def _decay_problems(self, decays: list[tuple[float, float]]) -> list[str]:
        wrong = [(found, planned) for found, planned in decays if found != planned]
        if wrong and not any(found for found, _ in decays):
            if not self._has_warned:
                warnings.warn("weight_decay: is 0 in all groups; the plan has others, which are not used", stacklevel=5)
                self._has_warned = True
            return []
        remedy = "expected the groups' decay as prepared.groups() has it, or 0 in all groups"
        return [
            f"weight_decay: {found:g} in a group; the plan says {planned:g}; {remedy}" for found, planned in wrong[:1]
        ]


def _rate_problems(
    optimizer: torch.optim.Optimizer,
    factors: Mapping[int, float],
    rates: Mapping[int, float],
    tolerance: float,
    rows: Mapping[int, PlanTensor],
) -> list[str]:
    """What is wrong with the rates of groups, `factors` times the plan's; empty where all factors are one number."""
    if not factors:
        return []
    values = list(factors.values())
    common = sorted(values)[(len(values) - 1) // 2]
    off = [at for at, factor in factors.items() if not math.isclose(factor, common, rel_tol=tolerance)]
    if not off and common >= 0:
        return []
    at = off[0] if off else next(iter(factors))
    names = _shown(rows[id(tensor)].name for tensor in optimizer.param_groups[at]["params"] if id(tensor) in rows)
    remedy = _FLOOR
    if len(set(rates.values())) == 1:
        remedy = _ONE_NUMBER
    elif off == [next(iter(factors))]:
        remedy = _FIRST_ONLY
    what = f"its rate is {rates[at]:g}, {factors[at]:g} times the plan's, where others have {common:g} times the plan's"
    return [f"optimizer.param_groups[{at}] ({names}): {what}; {remedy}"]


def _shown(names: Any) -> str:
    found = list(names)
    more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
    return ", ".join(found[:NAMES_SHOWN]) + more


def _with_closure(args: tuple[Any, ...], kwargs: dict[str, Any], after: Callable[[], object]) -> Any:
    """The arguments of `step` (optimizer first) with `after` called at the end of its closure; None without a closure."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None

    def wrapped() -> Any:
        loss = closure()
        after()
        return loss

    if len(args) > 1:
        return (args[0], wrapped, *args[2:]), kwargs
    return args, {**kwargs, "closure": wrapped}


class Kept:
    """The hooks of one optimizer: checks and clipping before each step, dead weights set to 0 after it."""

    def __init__(
        self, masked: MaskedModel, optimizer: torch.optim.Optimizer, clip: float | None, is_whole: bool, numbers: bool
    ) -> None:
        self.masked, self.clip, self.is_whole = masked, clip, is_whole
        self.numbers = Numbers(masked, optimizer) if numbers else None
        self.steps = 0
        self._present = _parameters(optimizer)
        self._names = {key: row.name for key, row in masked.by_id.items() if key in self._present}
        handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        for handle in kept.pop(optimizer, (None, []))[1]:
            handle.remove()
        kept[optimizer] = (self, handles)
        self._zero(optimizer, with_moments=True)

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        masked = self.masked
        if not _is_capturing():
            masked.require_current()
            self._require_parameters(optimizer)
            if self.numbers is not None:
                self.numbers.require(optimizer)
            is_full = self.steps % CHECK_EVERY == 0
            if is_full:
                match(masked.model, masked.plan)
            masked.require_dead(masked.dead if is_full else masked.changed())
        self.steps += 1
        if (changed := _with_closure(args, kwargs, lambda: self._with_gradients(optimizer))) is not None:
            return changed
        self._with_gradients(optimizer)
        return None

    def _with_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """What is done when all gradients are there: they are clipped, or it is seen whether others clipped them."""
        if self.clip is not None:
            scale = getattr(optimizer, "grad_scale", None)  # fused, under a GradScaler
            self.masked.clip_grad_norm_(self.clip, scale=scale)
        elif not _is_capturing():
            self.masked.clips.look()

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._zero(optimizer)

    def _before_load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if self.numbers is not None:
            self.numbers.require_same_names(state)

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        if self.numbers is not None:
            self.numbers.restore_labels(optimizer)
        self._zero(optimizer, with_moments=True)

    @torch.no_grad()
    def _zero(self, optimizer: torch.optim.Optimizer, with_moments: bool = False) -> None:
        """Set dead weights, and the moments of an optimizer that had others, to 0."""
        zeroed: list[str] = []
        for name, dead in self.masked.dead.items():
            tensor = self.masked.tensors[name]
            if id(tensor) not in self._present:
                continue
            if with_moments:
                dead.zero_moments_(optimizer.state.get(tensor, {}), tensor.shape)
            else:
                dead.zero_(tensor)
                zeroed.append(name)
        self.masked.mark(zeroed)

    def _require_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise InputError unless the optimizer's parameters are the masked ones and, where it has to, it has all of them."""
        self._present = _parameters(optimizer)
        masked = self.masked
        stale = [name for key, name in self._names.items() if key in self._present and key not in masked.by_id]
        if stale:
            what = "the optimizer's parameter is not the prepared model's"
            raise InputError(f"{_shown(stale)}: {what}; make the optimizer after attach, by prepared.optimizer(model)")
        missing = [
            name for name, tensor in masked.tensors.items() if tensor.requires_grad and id(tensor) not in self._present
        ]
        if missing and self.is_whole:
            others = set[int]().union(*(_parameters(other) for other, (one, _) in kept.items() if one.masked is masked))
            if names := [name for name in missing if id(masked.tensors[name]) not in others]:
                what = "requires_grad and is in no group of the optimizer, so it would not be trained"
                raise InputError(f"{_shown(names)}: {what}; make the optimizer again, by prepared.optimizer()")


# the kept optimizers, so that keeping one twice replaces its hooks
kept: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[Kept, list[Any]]] = weakref.WeakKeyDictionary()


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded, when nothing can be read from the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
