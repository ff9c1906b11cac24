"""A plan at a glance: a row of texts for each set of equal tensors, its warnings, and remedies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from decimal import ROUND_DOWN, Context
from fractions import Fraction
from math import ceil, exp, inf
from typing import Any, get_args

from supar_cli.planning.density import literal
from supar_cli.planning.layout import largest_over_head
from supar_cli.planning.layout_document import LAYERS
from supar_cli.planning.patterns import Block, has_equal_rows
from supar_cli.planning.plan import Plan, PlanModel, PlanTensor
from supar_cli.planning.plan_sections import OwnModel
from supar_cli.planning.rules import DENSITY_IN_RATE, SP
from supar_cli.planning.updates import METHODS

# [P §3.1]: the smallest weights-per-neuron count the paper trained; below 4, Bernoulli rows are empty with P ≈ e^-WPN
WPN_TRAINED, WPN_EMPTY_ROWS, WPN_IMPOSSIBLE = 16, 4, 1
# measured: widths 128 and 256; a tuned ratio gains .01 to .05 nat at 100 steps, loses .02 at 400 and .03 at 1200
RATIO_STEPS = 1000
# measured: 3×3 convolutions of 32 channels, 120 steps: alpha_output 1 costs 3.5 % at 18 weights a neuron, under 1 % from 50
WPN_OVER_HEAD = 50
LEAST_BLOCKS = 4  # measured: the rules by density hold while about as many feed a row of blocks
COLUMNS = ("tensor", "shape", "m_d", "m_ρ", "WPN", "init std", "peak lr", "λ", "decay")  # of `plan_rows`


def timescale_steps(row: PlanTensor) -> float | None:
    """Steps in which weight decay alone shrinks a weight by e at the peak rate: 1/(lr·λ). None without decay."""
    rate = row.lr * row.weight_decay
    return 1.0 / rate if rate >= sys.float_info.min else None  # a smaller one has no finite reciprocal, decays nothing


def warnings(plan: Plan, tuned_on: str | None = None, evidence: Any = None) -> list[str]:
    """The warnings about this plan. Of its proxy: `tuned_on`, the hash of the data that it was tuned on, and `evidence`, if known."""
    hidden = [row for row in plan.tensors if row.role == "hidden"]
    calibration = evidence.get("density_exponent") if isinstance(evidence, dict) else None
    known = (
        calibration if isinstance(calibration, dict) and calibration.get("exponent") == density_exponent(plan) else {}
    )
    found = [*_of_sparsity(plan, hidden), *_of_decay(plan, hidden), *_of_updates(plan, bool(known))] if hidden else []
    if isinstance(plan.model, OwnModel):
        ranges = evidence.get("ranges") if isinstance(evidence, dict) else None
        found += _of_head(plan, isinstance(ranges, dict) and "alpha_output" in ranges)
    if tuned_on is not None and plan.data is not None and plan.data.hash not in (None, tuned_on):
        found.append(f"data: not the proxy's, or read in another way: {_TRANSFER} alone; tune the proxy on these")
    steps, ratio = plan.parameterization.base.steps, plan.hyperparameters.embedding_lr_ratio
    if ratio != 1 and steps < RATIO_STEPS:
        found.append(f"hyperparameters.embedding_lr_ratio: {ratio:g}, tuned on {short_ratio(steps)}")
    return [*found, *_of_changes(plan), *(_of_calibration(plan, known) if known else ())]


def density_exponent(plan: Plan) -> float:
    """β of a plan: the power of the density in its rates."""
    static, updates = plan.parameterization.density_exponent, plan.sparsity.updates
    return updates.exponent if updates is not None else 1.0 if static is None else static


def _of_calibration(plan: Plan, known: dict[str, Any]) -> Iterator[str]:
    """What the exponent of a plan was not calibrated for, by its proxy's evidence."""
    updates, used = plan.sparsity.updates, density_exponent(plan)
    if all(row.density == 1 for row in plan.tensors):
        return
    where, remedy = f"density_exponent: {used:g}", "`supar sweep --calibrate` fits one for this"
    own: dict[str, Any] = {"method": updates.method if updates else "none", "moments": updates and updates.moments}
    own |= {"pattern": plan.sparsity.pattern, "steps": plan.train.steps}
    if other := [f"{key} {known[key]}, not {value}" for key, value in own.items() if known.get(key, value) != value]:
        yield f"{where} was calibrated for {', '.join(other)}; {remedy}"
    if not known.get("verified"):
        yield f"{where} was not verified on fresh seeds; {remedy}, with more seeds"


def short_ratio(steps: int) -> str:
    """What is wrong with a ratio of embeddings that was tuned on runs of fewer than RATIO_STEPS steps, and the remedy."""
    gain = f"{steps} steps: what it gains in runs under {RATIO_STEPS:,} turns into a loss in longer ones"
    return f"{gain}; tune it on longer runs, or leave it at 1"


def _of_sparsity(plan: Plan, hidden: list[PlanTensor]) -> Iterator[str]:
    low, sparsity = min(hidden, key=lambda row: row.wpn), plan.sparsity
    per_row = low.wpn / (sparsity.block or 1)  # weights or blocks that are drawn for a row
    is_even = sparsity.block_rows == "even"
    empty = f"{100 * (1 - per_row):.2g} %" if is_even else f"about {100 * exp(-per_row):.2g} %"
    if any(row.density < 1 for row in hidden):
        floor = sparsity.updates.min_per_neuron if sparsity.updates else 0
        may_be_empty = per_row < (1 if is_even else WPN_EMPTY_ROWS) and not has_equal_rows(sparsity.pattern)
        rows = f"; {empty} of rows have no weight at all" if may_be_empty and not floor else ""
        if sparsity.block and per_row < LEAST_BLOCKS:
            few = f"{per_row:.3g} blocks per row of blocks, fewer than the {LEAST_BLOCKS} from which the rules hold"
            smaller = max((edge for edge in get_args(Block) if low.wpn >= LEAST_BLOCKS * edge), default=None)
            helps = remedy(plan, low, sparsity.block) if smaller is None else f"`--block {smaller}` has as many"
            yield f"{low.name}: {few}{rows}; {helps}"
        elif low.wpn < WPN_TRAINED:
            few = f"{low.wpn:.3g} weights per neuron, fewer than the {WPN_TRAINED} that the paper trained"
            yield f"{low.name}: {few}{rows}; {remedy(plan, low)}"
    dense = [row.name for row in hidden if row.density == 1]
    if sparsity.source.kind == "file" and dense:
        yield f"masks: {len(dense)} of {len(hidden)} hidden tensors have none and stay dense: {dense[0]}{', …' * (len(dense) > 1)}"
    if sparsity.pattern in ("fixed_fan_in", "block") and sparsity.distribution == "uniform" and not sparsity.overrides:
        off = max(hidden, key=lambda row: abs(row.density / sparsity.density - 1))
        if abs(off.density / sparsity.density - 1) > 0.01:
            whole = "blocks" if sparsity.block else "weights per row"
            yield f"{off.name}: its density is {off.density:.4g}, not {sparsity.density:g}: rounded to a whole number of {whole}"


def _of_head(plan: Plan, is_searched: bool) -> Iterator[str]:
    """What is known where hidden tensors have a far larger fan-in than the head. [D, measured: 3×3 convolutions]"""
    found, sparse = largest_over_head(plan.tensors), [row for row in plan.tensors if row.density < 1]
    if found is None or not sparse or plan.parameterization.name in SP:
        return
    name, low = found[0].name, min(sparse, key=lambda row: row.wpn)
    if plan.hyperparameters.alpha_output == 1 and not is_searched:
        what = f"alpha_output: 1, but the fan-in of {name} is {found[1]:.3g} times the head's"
        cost = "the best rate of 3×3 convolutions moved 1 to 2.5 octaves from dense to 1/16 (2 to 7 % of the loss)"
        yield f"{what}: {cost}; tune it with lr on the dense proxy, `search.alpha_output: [1, 4, 8, 16]`"
    if low.wpn < WPN_OVER_HEAD:
        few = f"{low.wpn:.3g} weights per neuron, fewer than {WPN_OVER_HEAD}, where fan-ins are far larger than the head's"
        yield f"{low.name}: {few}: expect a loss up to 5 % above that of a search at this density"


def _of_decay(plan: Plan, hidden: list[PlanTensor]) -> Iterator[str]:
    steps, timescales = plan.train.steps, {row.name: timescale_steps(row) or inf for row in hidden}
    name, rule = min(timescales, key=timescales.__getitem__), plan.parameterization.weight_decay_rule
    least, most = timescales[name], max(timescales.values())
    if least < steps / 10:
        enough = _ROUND_DOWN.create_decimal_from_float(plan.hyperparameters.weight_decay * least * 10 / steps)
        short = f"{least:.0f} steps, under a tenth of the run's {steps} (weight_decay_rule: {rule})"
        which = "all hidden weights" if most < 1.001 * least else name
        yield f"{which}: weight decay has a timescale of {short}; `-s hyperparameters.weight_decay={enough:g}` avoids it"


def _of_updates(plan: Plan, is_calibrated: bool) -> Iterator[str]:
    """What is known to fail, or not known, where masks change. [SPEC §9: D, measured]"""
    updates, rule, betas = plan.sparsity.updates, plan.parameterization.weight_decay_rule, plan.train.betas
    moving = [row for row in plan.tensors if row.kept < row.size]
    if updates is None or not moving:
        return
    from supar_cli.planning import density_over_run  # most plans don't need it

    where, name = "sparsity.updates", METHODS[updates.method]
    if (count := density_over_run.changes(plan)) < FEWEST_CHANGES:
        more = f"{where}.every_steps below {updates.every_steps}" if updates.every_steps > 1 else "longer run"
        often = "once" if count == 1 else f"{count} times"
        yield f"{where}: {name} changes the masks only {often}; a {more} makes it more"
    row = min(moving, key=lambda row: row.wpn)
    share = updates.min_per_neuron / row.wpn
    if share > FLOOR_SHARE:
        floor = f"{updates.min_per_neuron} for each neuron is {100 * share:.0f} % of the live weights of {row.name}"
        yield f"{where}.min_per_neuron: {floor}: every neuron has nearly as many (fixed fan-in); {remedy(plan, row)}"
    if updates.moments == "zero" and plan.train.optimizer == "adamw" and betas[1] >= 0.99:
        yield f"{where}.moments: zero with β₂ {betas[1]:g}: a grown weight's first steps are too large; `mean` is safe"
    if plan.parameterization.name not in DENSITY_IN_RATE:
        return
    if updates.rates_follow == "end":
        yield f"{where}.rates_follow: end is a control that fails: {density_over_run.FAILS}; `now` is the rule"
    if rule == "coupled" and updates.start is not None and any(row.weight_decay for row in moving):
        moves = "weight_decay_rule: coupled moves the best rate by .5 to 1 octave while the density changes"
        yield f"{moves} (400 steps, λ 0.1); `-s parameterization.weight_decay_rule=independent` keeps it"
    if not is_calibrated and (others := density_over_run.not_measured(plan)):
        rates = f"the rates of {name} were not measured with {', '.join(others)}"
        yield f"{where}: {rates}; `supar sweep --calibrate` measures them"


FEWEST_CHANGES, FLOOR_SHARE = 5, 0.8  # chosen: with fewer, or above, it is hardly the method that its name says
_ROUND_DOWN = Context(prec=2, rounding=ROUND_DOWN)
_TRANSFER = "hyperparameters transfer over width and density"


def of_pruning(plan: Plan, run: str, step: int) -> Iterator[str]:
    """The warnings about a run that is pruned after a step. [D, measured at width 128, 2 layers, 400 steps]"""
    if step < plan.train.steps:
        yield f"{run}: has not finished: its magnitudes are those after step {step} of {plan.train.steps}"
    if "checkpoint" in plan.parents:
        what = "a second round's rate is not settled (density 1/16: the best one .8 octaves lower, .5 % of the loss)"
        yield f"{run}: was pruned before: {what}; `supar sweep --calibrate` fits an exponent"
    if plan.sparsity.pattern not in ("exact", "bernoulli"):
        yield f"{run}: its masks are {plan.sparsity.pattern_text}; those of the largest weights are not"


def _of_changes(plan: Plan) -> Iterator[str]:
    """What differs from the proxy though it does not transfer, and the remedy. [SPEC §12]"""
    train, base, length, base_length, unit = plan.train, plan.parameterization.base, 1, 1, "rows"
    if isinstance(model := plan.model, PlanModel):
        if model.data_kind == "tokens":
            length, base_length = model.context, base.context or model.context
        unit = model.data_kind
        if model.layers != base.layers and plan.parameterization.depth_rule == "none":
            remedy = "`-s parameterization.depth_rule=completep` corrects for it (with adamw and residual_init: none)"
            yield f"layers: {model.layers}, but {base.layers} in the proxy: {_TRANSFER}, not over depth; {remedy}"
        if length != base_length:
            remedy = f"tune the proxy with model.context: {length}"
            yield f"context: {length}, but {base_length} in the proxy: {_TRANSFER}, not over context; {remedy}"
        kv_share = model.kv_heads / model.heads
        if base.kv_share is not None and abs(kv_share - base.kv_share) > 1e-9:
            shares = f"kv_heads/heads is {kv_share:g}, but {base.kv_share:g} in the proxy"
            yield f"{shares}: the proxy was tuned with another grouped-query attention"
    elif (layers := model.target.get(LAYERS)) != model.base.get(LAYERS) and plan.parameterization.depth_rule == "none":
        yield f"layers: {layers}, but {model.base.get(LAYERS)} at the base: {_TRANSFER}, not over depth"
    if isinstance(model, OwnModel) and "" in model.hooks:
        yield f"logits: no tensor can take their multiplier; multiply them by {model.hooks['']!r} in your forward pass"
    batch, base_batch = train.batch_size * length, base.batch_size * base_length
    if batch != base_batch:
        rows, rest = divmod(base_batch, length)
        remedy = f"tune the proxy with batches of {batch:,}" if rest else f"`--batch-size {rows}` has as many"
        yield f"a batch has {batch:,} {unit}, but {base_batch:,} in the proxy: {_TRANSFER}, not over batch size; {remedy}"
    if train.steps != base.steps:
        decay = min((found for row in plan.tensors if (found := timescale_steps(row))), default=inf)
        covered = " beyond" if max(train.steps, base.steps) > decay else ", or only roughly within"
        limit = f"{covered} weight decay's timescale of {decay:.0f} steps" if decay < inf else ""
        remedy = f"tune the proxy with train.steps: {train.steps}, or try rates around its own (`supar sweep`)"
        yield f"steps: {train.steps}, but {base.steps} in the proxy: {_TRANSFER}, not over length{limit}; {remedy}"


def remedy(plan: Plan, row: PlanTensor, block: int | None = None) -> str:
    """The width, and the sparsity, that give `row` the weights per neuron that the paper trained, or enough blocks."""
    needed, gives = (WPN_TRAINED, WPN_TRAINED) if block is None else (LEAST_BLOCKS * block, LEAST_BLOCKS)
    most = 1 - needed / row.fan_in
    sparsity = f" or a sparsity of at most {int(most * 10000) / 10000:g}" if most > 0 else ""
    fan_in = needed / _asked_density(plan, row)
    if not isinstance(plan.model, PlanModel):
        return f"a fan-in of {ceil(fan_in)}{sparsity} gives {gives}"
    step = plan.model.width_step
    width = ceil(fan_in * plan.model.width / row.fan_in / step) * step
    return f"a width of {width}{sparsity} gives {gives}"


def _asked_density(plan: Plan, row: PlanTensor) -> Fraction:
    """The density asked for `row`, or the least it may have been: fixed fan-in rounds it to whole weights per row."""
    if plan.sparsity.pattern not in ("fixed_fan_in", "block"):
        return literal(row.density)
    if plan.sparsity.distribution == "uniform" and not plan.sparsity.overrides:
        return literal(plan.sparsity.density)
    if plan.sparsity.block:
        return Fraction(row.kept, row.size)
    return (Fraction(row.kept * row.fan_in, row.size) - Fraction(1, 2)) / row.fan_in


def _label(row: PlanTensor) -> str:
    """`*.attn.q` for `blocks.3.attn.q`: the name that equal rows of all blocks share."""
    return row.site if row.block is None or "*" in row.site else f"*.{row.site}"


def number(value: float) -> str:
    """Four significant digits, short."""
    return f"{value:.4g}"


def start_text(row: PlanTensor) -> str:
    """A tensor's initial standard deviation, or its initial constant."""
    return number(row.init_std if row.init_std is not None else row.init_constant or 0.0)


def plan_rows(plan: Plan) -> list[list[str]]:
    """One row for each set of equal tensors: name, shape, m_d, m_ρ, WPN, init std, lr, λ, decay timescale in steps."""
    groups: dict[tuple[object, ...], list[PlanTensor]] = {}
    for row in plan.tensors:
        start = (row.init_std, row.init_constant) if row.init != "file" else None  # measured: alike in no two tensors
        key = (row.role, tuple(row.shape), row.kept, start, row.lr, row.weight_decay, row.eps)
        groups.setdefault(key, []).append(row)
    rows = []
    for members in groups.values():
        first, hidden, decay = members[0], members[0].role == "hidden", timescale_steps(members[0])
        names = list(dict.fromkeys(map(_label, members)))
        prefix = names[0].rpartition(".")[0] + "."
        short_names = [names[0], *(name.removeprefix(prefix) for name in names[1:])]
        label = (", " if len(",".join(short_names)) > 16 else ",").join(short_names)  # wraps where it doesn't fit
        parts = {name.rpartition(".")[2] for name in names}
        if len(names) > 3 and len(parts) == 1:  # biases
            label = f"*.{parts.pop()}"
        m_rho, wpn = (first.because.get("m_rho"), first.wpn) if hidden else (None, None)
        sizes = ["" if value is None else number(value) for value in (first.because.get("m_d"), m_rho, wpn)]
        members.sort(key=lambda row: row.init_std or 0.0)
        starts = "–".join(dict.fromkeys(start_text(row) for row in (members[0], members[-1])))
        numbers = [starts, number(first.lr), number(first.weight_decay), f"{decay:.0f}" if decay else "–"]
        rows.append([label, "×".join(map(str, first.shape)), *sizes, *numbers])
    return rows
