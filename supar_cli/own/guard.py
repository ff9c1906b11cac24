"""The guard of an optimizer: at every step its groups have the plan's numbers, all rates times one common factor."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from supar_cli.errors import InputError
from supar_cli.own.masked_model import MaskedModel
from supar_cli.own.oversights import PeakRate, warn_of_untrained
from supar_cli.own.parameters import match, named_parameters, shown, warn_caller
from supar_cli.planning.plan import PlanTensor
from supar_cli.planning.schedule import MaskSchedule

# chosen: schedulers in double precision keep proportions to 1e-13, rates in float32 tensors to 1e-7
RATE_TOLERANCE, TENSOR_RATE_TOLERANCE = 1e-9, 1e-6
# chosen: steps between checks of all dead weights; what torch sees being written is checked at once, and what a loop does
# at each step through `.data`, which it does not see, at one of the first
CHECK_EVERY, CHECKED_FIRST = 100, 3

_LABELS = ("names", "ratio")  # what groups have beside torch's own settings
STEP = "masks_step"  # and the step that masks are of, where they move

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


@dataclass
class _Group:
    """A group of an optimizer that has planned tensors: its `place` in words, its settings and its first row."""

    place: str
    settings: dict[str, Any]
    row: PlanTensor

    @property
    def factor(self) -> float:
        """Its rate divided by the plan's."""
        return float(self.settings["lr"]) / self.row.lr


class Numbers:
    """The plan's numbers of the groups of one optimizer."""

    def __init__(self, masked: MaskedModel, optimizer: torch.optim.Optimizer) -> None:
        self._masked, self._has_warned = masked, False
        self.factor = 1.0  # of all rates, at the last step
        self.peak: PeakRate | None = PeakRate()
        groups: list[dict[str, Any]] = optimizer.param_groups
        self.labels = [{key: one[key] for key in _LABELS if key in one} for one in groups]

    def require_same_names(self, state: Mapping[str, Any]) -> None:
        """Raise InputError for an optimizer's state whose groups are those of another plan."""
        for at, (label, group) in enumerate(zip(self.labels, state["param_groups"], strict=False)):
            if "names" in group and group["names"] != label.get("names"):
                what = f"load_state_dict: group {at} of the state holds {shown(group['names'])}"
                raise InputError(f"{what}; expected a state of this plan, with {shown(label.get('names', ()))} there")

    def restore_labels(self, optimizer: torch.optim.Optimizer) -> None:
        """Write names and ratios into the groups again, after a state was loaded over them."""
        for group, label in zip(optimizer.param_groups, self.labels, strict=False):
            group.update(label)

    def require(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise InputError, naming the group and the line to write, unless the groups have the plan's numbers."""
        planned, groups, problems = self._masked.by_id, list[_Group](), list[str]()
        for at, settings in enumerate(optimizer.param_groups):
            rows = [planned[id(tensor)] for tensor in settings["params"] if id(tensor) in planned]
            if rows:
                groups.append(_Group(f"param_groups[{at}] ({shown(row.name for row in rows)})", settings, rows[0]))
            if len({(row.lr, row.weight_decay, row.eps, *self._masked.density_key(row)) for row in rows}) > 1:
                problems.append(f"{groups[-1].place}: its tensors have several rates or decays in the plan")
        if not groups or problems:
            raise InputError(*problems or ["param_groups: none has a tensor of the plan"])
        is_undecayed = not any(group.settings["weight_decay"] for group in groups)
        if is_undecayed and not self._has_warned and any(group.row.weight_decay for group in groups):
            self._has_warned = True
            warn_caller("weight_decay: is 0 in all groups; the plan has others, which are not used")
        for group in groups:
            if group.settings.get("eps") not in (group.row.eps, None):
                wanted = f"the plan says {group.row.eps:g}, as groups() has it"
                problems.append(f"{group.place}: eps: {group.settings['eps']:g}; {wanted}")
        problems += _decay_problems(groups)
        problems += _rate_problems(groups, self.factor)
        if problems:
            raise InputError(*problems)
        self.factor = _common_factor(groups)
        if self.peak is not None:
            self.peak.see(self.factor, self._masked.plan.hyperparameters.lr)


def _decay_problems(groups: list[_Group]) -> list[str]:
    """What is wrong with the decays: empty where they are the plan's times one common factor, which may be 0."""
    factors = [group.settings["weight_decay"] / group.row.weight_decay for group in groups if group.row.weight_decay]
    common = 1.0 if 1.0 in factors or not factors else sorted(factors)[(len(factors) - 1) // 2]
    return [
        f"{group.place}: weight_decay: {found:g}; the plan says {wanted:g}, as groups() has it; a schedule multiplies all alike"
        for group in groups
        if not math.isclose(
            found := group.settings["weight_decay"], common * (wanted := group.row.weight_decay), rel_tol=RATE_TOLERANCE
        )
    ]


def _common_factor(groups: list[_Group]) -> float:
    """The factor of most of the rates."""
    return sorted(group.factor for group in groups)[(len(groups) - 1) // 2]


def _rate_problems(groups: list[_Group], last: float) -> list[str]:
    """What is wrong with the rates: empty where they are the plan's times one common factor; `last` is the step's before."""
    in_tensors = any(isinstance(group.settings["lr"], torch.Tensor) for group in groups)
    tolerance = TENSOR_RATE_TOLERANCE if in_tensors else RATE_TOLERANCE
    common = _common_factor(groups)
    off = [group for group in groups if not math.isclose(group.factor, common, rel_tol=tolerance)]
    if not off:
        return [] if common >= 0 else [f"param_groups: the rates are {common:g} times the plan's; expected 0 or more"]
    is_one = len({float(group.settings["lr"]) for group in groups}) == 1
    is_first_only = all(math.isclose(group.factor, last, rel_tol=tolerance) for group in groups[1:])
    if is_first_only:
        off, common = groups[:1], last
    remedy = _ONE_NUMBER if is_one else _FIRST_ONLY if is_first_only else _FLOOR
    found = f"its rate is {float(off[0].settings['lr']):g}, {off[0].factor:g} times the plan's"
    return [f"{off[0].place}: {found}, where others have {common:g} times the plan's; {remedy}"]


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
        self.unfinished = 0  # steps since the last `update`, which a plan needs whose masks move
        self._planned: list[tuple[dict[str, Any], Any, float]] = []  # groups, and their rate and decay outside of steps
        if masked.schedule is not None:
            for group in optimizer.param_groups:
                group.setdefault(STEP, masked.step)
        self._present = _parameters(optimizer)
        self._names = {key: row.name for key, row in masked.by_id.items() if key in self._present}
        handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        before, earlier = kept.pop(optimizer, (None, []))
        if before is not None and before.masked is masked:
            self.unfinished = before.unfinished
        for handle in earlier:
            handle.remove()
        kept[optimizer] = (self, handles)
        self._zero(optimizer, with_moments=True)

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        masked = self.masked
        self._restore()
        if masked.schedule is not None:
            self._require_updated(optimizer)
        if not _is_capturing():
            masked.require_current()
            self._require_parameters(optimizer)
            if self.numbers is not None:
                self.numbers.require(optimizer)
                self._require_one_factor(self.numbers.factor)
            is_full = self.steps < CHECKED_FIRST or self.steps % CHECK_EVERY == 0
            if is_full:
                match(masked.model, masked.plan)
                if self.is_whole and self.steps == 0:
                    self._warn_of_ignored()
            masked.require_dead(masked.dead if is_full else masked.changed())
            masked.initial_values.warn_if_replaced(masked.tensors)
        self.steps += 1
        if (changed := _with_closure(args, kwargs, lambda: self._with_gradients(optimizer))) is not None:
            return changed
        self._with_gradients(optimizer)
        return None

    def _with_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """What is done when all gradients are there: they are clipped, or it is seen whether others clipped them."""
        if self.steps == 1:
            warn_of_untrained(self.masked.tensors, self._held(), self._present)
        if self.clip is not None:
            scale = getattr(optimizer, "grad_scale", None)  # a GradScaler leaves it to fused optimizers
            self.masked.clip_grad_norm_(self.clip, scale=scale)
        elif not _is_capturing():
            self.masked.clips.look()

        if self.masked.schedule is not None and self.numbers is not None:
            self._scale(optimizer, self.masked.schedule)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()
        self._zero(optimizer)
        if self.masked.schedule is not None:
            overflow = getattr(
                optimizer, "found_inf", None
            )  # a GradScaler leaves it to fused optimizers to skip a step
            if overflow is not None and overflow.any():
                self.masked.get_ready()
            else:
                self.unfinished += 1

    def _scale(self, optimizer: torch.optim.Optimizer, schedule: MaskSchedule) -> None:
        """Multiply rates and decays by the factors of the density now, for this step: loops and schedulers see the plan's."""
        self._planned = self._planned or [(one, one["lr"], one["weight_decay"]) for one in optimizer.param_groups]
        for group, lr, decay in self._planned:
            row = next((self.masked.by_id[id(one)] for one in group["params"] if id(one) in self.masked.by_id), None)
            if row is not None:
                group["lr"] = lr * schedule.rate_factor(row, self.masked.step)
                group["weight_decay"] = decay * schedule.decay_factor(row, self.masked.step)

    def _restore(self) -> None:
        for group, lr, decay in self._planned:
            group["lr"], group["weight_decay"] = lr, decay
        self._planned = []

    def _require_updated(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise InputError where the masks are not those of the step that the optimizer is at."""
        if _is_capturing():
            raise InputError("a CUDA graph is recorded, which keeps its masks; expected none, as the plan's masks move")
        if self.unfinished:
            what = "the plan's masks move, and nothing was told of the last step"
            remedy = "write prepared.update() after each optimizer.step(); callbacks of supar's do so"
            raise InputError(f"prepared.update: {what}; {remedy}")
        if (at := _steps(optimizer)) != {self.masked.step}:
            found = ", ".join(map(str, at))
            what = f"the optimizer's state is of step {found}, the masks are of step {self.masked.step}"
            remedy = "load both: optimizer.load_state_dict and prepared.load_state_dict, or make the optimizer later"
            raise InputError(f"prepared.load_state_dict: {what}; {remedy}")

    def _before_load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if self.numbers is not None:
            self.numbers.require_same_names(state)

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        if self.numbers is not None:
            self.numbers.restore_labels(optimizer)
            self.numbers.peak = None  # it was before
        self.unfinished = 0  # of the state before
        self._zero(optimizer, with_moments=True)

    @torch.no_grad()
    def _zero(self, optimizer: torch.optim.Optimizer, with_moments: bool = False) -> None:
        """Set dead weights, and the moments of an optimizer that had others, to 0."""
        zeroed: list[str] = []
        is_now = self.masked.schedule is None or _steps(optimizer) == {self.masked.step}  # else masks are loaded later
        for name, dead in self.masked.dead.items():
            tensor = self.masked.tensors[name]
            if id(tensor) not in self._present:
                continue
            if with_moments and is_now and not dead.keeps_moments:
                dead.zero_moments_(optimizer.state.get(tensor, {}), tensor.shape)
            elif not with_moments and not dead.is_chosen_next:
                dead.zero_(tensor)
                zeroed.append(name)
        self.masked.mark(zeroed)

    def _warn_of_ignored(self) -> None:
        """Warn of parameters that the plan leaves out as unread and that have a gradient."""
        named = named_parameters(self.masked.model, self.masked.rows)
        others = {name: tensor for name, tensor in named.items() if id(tensor) not in self.masked.by_id}
        if read := [name for name, tensor in others.items() if tensor.grad is not None and tensor.grad.any()]:
            what = "model.ignored leaves it out, but it has a gradient, so something reads it"
            warn_caller(f"{shown(read)}: {what}; it is not trained by the plan's optimizer")

    def _require_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise InputError unless the optimizer's parameters are the masked ones and, where it has to, it has all of them."""
        masked, self._present = self.masked, _parameters(optimizer)
        unknown = self._present - masked.by_id.keys()
        if stale := [name for key, name in self._names.items() if key in unknown]:
            what = "the optimizer's parameter is not the prepared model's"
            raise InputError(f"{shown(stale)}: {what}; make the optimizer after attach, by prepared.optimizer(model)")
        missing = {id(tensor) for tensor in masked.tensors.values() if tensor.requires_grad} - self._present
        if self.is_whole and (missing := missing - self._held()):
            what = "requires_grad and is in no group of the optimizer, so it would not be trained"
            names = shown(masked.by_id[key].name for key in masked.by_id if key in missing)
            raise InputError(f"{names}: {what}; make the optimizer again, by prepared.optimizer()")

    def _require_one_factor(self, factor: float) -> None:
        """Raise InputError where another optimizer of the model has made this step at other rates."""
        for _, other in kept_of(self.masked):
            is_beside = other.steps == self.steps + 1 and not other._present & self._present
            if other.numbers is None or not is_beside:
                continue
            if not math.isclose(found := other.numbers.factor, factor, rel_tol=TENSOR_RATE_TOLERANCE):
                what = f"{shown(self._names.values())}: the rates are {factor:g} times the plan's"
                where = f"where the model's other optimizer has {found:g} times the plan's"
                raise InputError(f"{what}, {where}; write prepared.set_rate(lr) for both")

    def _held(self) -> set[int]:
        """The parameters of all kept optimizers of the model."""
        return set().union(*(_parameters(optimizer) for optimizer, _ in kept_of(self.masked)))


# the kept optimizers, so that keeping one twice replaces its hooks
kept: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[Kept, list[Any]]] = weakref.WeakKeyDictionary()


def kept_of(masked: MaskedModel) -> list[tuple[torch.optim.Optimizer, Kept]]:
    """The kept optimizers of a model."""
    return [(optimizer, one) for optimizer, (one, _) in kept.items() if one.masked is masked]


def _steps(optimizer: torch.optim.Optimizer) -> set[int | None]:
    """The steps that the masks were of when the groups were last updated."""
    return {group.get(STEP) for group in optimizer.param_groups}


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded, when nothing can be read from the device."""
    is_used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_used and torch.cuda.is_current_stream_capturing()
