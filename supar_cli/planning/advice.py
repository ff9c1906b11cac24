"""What a person should know of a plan before spending time on it, and what would help."""

from __future__ import annotations

import sys
from fractions import Fraction
from math import ceil, exp

from supar_cli.planning.density import literal
from supar_cli.planning.patterns import has_equal_rows
from supar_cli.planning.plan import Plan, PlanModel, PlanTensor

# [P §3.1]: the smallest weights-per-neuron count the paper trained; below 4, Bernoulli rows are empty with P ≈ e^-WPN
WPN_TRAINED, WPN_EMPTY_ROWS, WPN_IMPOSSIBLE = 16, 4, 1


def timescale_steps(row: PlanTensor) -> float | None:
    """Steps in which weight decay alone shrinks a weight by e at the peak rate: 1/(lr·λ). None without decay."""
    rate = row.lr * row.weight_decay
    return 1.0 / rate if rate >= sys.float_info.min else None  # what is less has no reciprocal, and decays nothing


def warnings(plan: Plan) -> list[str]:
    """What a person should know before spending time on this plan."""
    found = []
    hidden = [row for row in plan.tensors if row.role == "hidden"]
    if not hidden:
        return []
    low = min(hidden, key=lambda row: row.wpn)
    sparse = any(row.density < 1 for row in hidden)
    if sparse and low.wpn < WPN_TRAINED:
        empty = ""
        per_row = low.wpn / (plan.sparsity.block or 1)  # what is drawn, weights or blocks, of a row
        if per_row < WPN_EMPTY_ROWS and not has_equal_rows(plan.sparsity.pattern):
            empty = f"; rows with no weight at all appear (about {100 * exp(-per_row):.2g} % of them)"
        found.append(
            f"{low.name}: {low.wpn:.3g} weights per neuron, below the {WPN_TRAINED} the paper trained{empty}; {remedy(plan, low)}"
        )
    if plan.sparsity.block and low.wpn >= WPN_TRAINED and low.wpn / plan.sparsity.block < WPN_EMPTY_ROWS and sparse:
        share = 100 * exp(-low.wpn / plan.sparsity.block)
        found.append(
            f"{low.name}: {low.wpn / plan.sparsity.block:.3g} blocks per row of blocks: about {share:.2g} % of rows have no weight at all; "
            "a smaller block or more width has fewer"
        )
    if plan.sparsity.pattern in ("fixed_fan_in", "block"):
        off = max(hidden, key=lambda row: abs(row.density / plan.sparsity.density - 1))
        if (
            plan.sparsity.distribution == "uniform"
            and not plan.sparsity.overrides
            and abs(off.density / plan.sparsity.density - 1) > 0.01
        ):
            found.append(
                f"{off.name}: whole {'blocks' if plan.sparsity.block else 'weights per row'} make its density {off.density:.4g}, "
                f"not {plan.sparsity.density:g}"
            )
    short = [row for row in hidden if (timescale_steps(row) or plan.train.steps) < plan.train.steps / 10]
    if short:
        row = min(short, key=lambda row: timescale_steps(row) or 0.0)
        found.append(
            f"{row.name}: weight decay has a timescale of {timescale_steps(row):.0f} steps, under a tenth of the run's {plan.train.steps} "
            f"(weight_decay_rule: {plan.parameterization.weight_decay_rule})"
        )
    base = plan.parameterization.base
    if isinstance(plan.model, PlanModel) and base.kv_share is not None:
        kv_share = plan.model.kv_heads / plan.model.heads
        if abs(kv_share - base.kv_share) > 1e-9:
            found.append(
                f"kv_heads/heads is {kv_share:g}, the proxy's {base.kv_share:g}: grouped-query attention was tuned otherwise"
            )
    if plan.train.batch_size != base.batch_size:
        found.append(
            f"batch size {plan.train.batch_size}, the proxy's {base.batch_size}: learning rates transfer over width "
            "and density, not over batch size"
        )
    return found


def remedy(plan: Plan, row: PlanTensor) -> str:
    """The width or the sparsity at which `row` would have the weights per neuron that the paper trained."""
    most = 1 - WPN_TRAINED / row.fan_in
    sparsity = f"a sparsity of at most {int(most * 10000) / 10000:g}" if most > 0 else ""
    if not isinstance(plan.model, PlanModel):
        fan_in = ceil(WPN_TRAINED / _asked_density(plan, row))
        return f"{WPN_TRAINED} need a fan-in of {fan_in}" + (f" or {sparsity}" if sparsity else "")
    ratio = Fraction(row.fan_in, plan.model.width)
    step = plan.model.head_width
    width = ceil(WPN_TRAINED / _asked_density(plan, row) / ratio / step) * step
    return f"{WPN_TRAINED} need a width of {width}" + (f" or {sparsity}" if sparsity else "")


def _asked_density(plan: Plan, row: PlanTensor) -> Fraction:
    """The density that was asked of `row`, or the least it can be: fixed fan-in rounds it to whole weights per row."""
    if plan.sparsity.pattern not in ("fixed_fan_in", "block"):
        return literal(row.density)
    if plan.sparsity.distribution == "uniform" and not plan.sparsity.overrides:
        return literal(plan.sparsity.density)
    if plan.sparsity.block:
        return Fraction(row.kept, row.size)
    return (Fraction(row.kept * row.fan_in, row.size) - Fraction(1, 2)) / row.fan_in
