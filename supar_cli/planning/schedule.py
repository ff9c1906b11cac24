"""Schedules: the factor on every tensor's peak rate as a function of the step, and each tensor's live weights."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from math import cos, pi, sqrt

from supar_cli.planning.density import literal
from supar_cli.planning.plan import Plan, PlanTensor
from supar_cli.planning.updates import PlanUpdates


def factor(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    schedule: str,
    final_lr_fraction: float,
    decay_steps: int | None = None,
    decay_shape: str | None = None,
) -> float:
    """Factor at `step` (0-based): linear warm-up to 1, then `constant`, `linear` or `cosine` to `final_lr_fraction`.

    `wsd` (Hu et al. 2024, arXiv 2404.06395) stays at 1 and falls over the last `decay_steps`, as `decay_shape` says: linear,
    cosine, exponential, or sqrt, 1 - √ of the progress (Hägele et al. 2024, arXiv 2405.18392).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    length, shape = (decay_steps or 0, decay_shape) if schedule == "wsd" else (steps - warmup_steps, schedule)
    progress = max(0, step - (steps - length)) / max(1, length)
    if shape == "exponential":
        return float(final_lr_fraction**progress)
    if shape == "cosine":
        return final_lr_fraction + (1.0 - final_lr_fraction) * 0.5 * (1.0 + cos(pi * progress))
    return 1.0 - (1.0 - final_lr_fraction) * (sqrt(progress) if shape == "sqrt" else progress)


@dataclass(frozen=True)
class MaskSchedule:
    """When the masks of a plan change, and how many weights of each tensor live after every step.

    `step` counts finished optimizer steps: a mask changes after a step, and holds in the next one.
    """

    updates: PlanUpdates
    steps: int
    decay_rule: str

    @classmethod
    def of(cls, plan: Plan) -> MaskSchedule | None:
        """That of a plan, None where masks don't change."""
        updates = plan.sparsity.updates
        if updates is None:
            return None
        return cls(updates, plan.train.steps, plan.parameterization.weight_decay_rule)

    @cached_property
    def begin(self) -> int:
        return self.updates.step_at(self.updates.begin, self.steps)

    @cached_property
    def end(self) -> int:
        """The step of the last change."""
        return self.updates.step_at(self.updates.end, self.steps)

    @cached_property
    def arrival(self) -> int:
        """The step from which on the density is the row's own."""
        return self.updates.step_at(self.updates.anneal or self.updates.end, self.steps)

    def is_update(self, step: int) -> bool:
        """Whether masks change after this step."""
        return self.begin < step == self.last_update(step)

    def last_update(self, step: int) -> int:
        """The last step up to this one after which masks changed, or `begin`."""
        if step >= self.end:
            return self.end
        passed = max(step, self.begin) - self.begin
        return self.begin + passed - passed % self.updates.every_steps

    def moves(self, row: PlanTensor) -> bool:
        """Whether the tensor's mask changes at all."""
        return row.kept < row.size

    def kept(self, row: PlanTensor, step: int) -> int:
        """A tensor's live weights after a step and the change that follows it: falling from `start` to the row's `kept`."""
        start = self.updates.start
        if start is None or not self.moves(row):
            return row.kept
        passed, way = self.last_update(step) - self.begin, self.arrival - self.begin
        return _falling(start, row.size, row.kept, max(passed, 0), way, self.updates.shape == "cubic")

    def dropped(self, row: PlanTensor, step: int) -> int:
        """How many of a tensor's live weights SET and RigL replace after a step."""
        if self.updates.drop is None:
            return 0
        progress = min(1.0, step / max(self.end, 1))
        factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + cos(pi * progress))}
        wanted = round(round(self.updates.drop * factors[self.updates.drop_schedule or "constant"], 12) * row.kept)
        spare = row.kept - self.updates.min_per_neuron * (row.size // row.fan_in)
        return min(wanted, spare, row.size - row.kept)

    def stores_dense(self, step: int) -> bool:
        """Whether tensors are stored dense after a step: while masks move, where every position keeps its moments."""
        return self.updates.moments == "keep" and step < self.end

    def at_start(self, row: PlanTensor) -> PlanTensor:
        """The row with its density and live weights at step 0."""
        kept = self.kept(row, 0)
        return row if kept == row.kept else row.model_copy(update={"kept": kept, "density": kept / row.size})

    def rate_factor(self, row: PlanTensor, step: int) -> float:
        """The factor on a tensor's rate in the step after this one: (density at the end / density now)^β."""
        if self.updates.rates_follow == "end":
            return 1.0
        now = self.kept(row, step)
        return 1.0 if now == row.kept else float((row.kept / now) ** self.updates.exponent)

    def decay_factor(self, row: PlanTensor, step: int) -> float:
        """The factor on its weight decay: under the rule `independent` rate times decay stays as it is."""
        rate = self.rate_factor(row, step)
        return {"independent": 1.0 / rate, "coupled": 1.0, "sqrt": 1.0 / sqrt(rate)}[self.decay_rule]


@lru_cache(maxsize=2**14)  # the layers of a model have tensors of a few sizes
def _falling(start: float, size: int, kept: int, passed: int, way: int, is_cubic: bool) -> int:
    """Live weights after `passed` of the `way` steps in which they fall from the share `start` of `size` to `kept`."""
    first = max(kept, int(literal(start) * size + Fraction(1, 2)))
    if passed == 0:
        return first
    if passed >= way:
        return kept
    left = 1 - Fraction(passed, way)
    return kept + int((first - kept) * (left**3 if is_cubic else left))
