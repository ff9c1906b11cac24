"""From a tuned proxy and a target to a plan, and what in that plan deserves a warning."""

from __future__ import annotations

import sys
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import Any

from pydantic_core import ValidationError

from supar_cli.errors import InputError
from supar_cli.planning import density as sparsity
from supar_cli.planning import layout, rules
from supar_cli.planning.plan import (
    Base,
    Multipliers,
    Parameterization,
    Plan,
    PlanModel,
    PlanSparsity,
    PlanTensor,
    PlanTrain,
)
from supar_cli.planning.schema import LARGEST
from supar_cli.planning.spec import Model, Proxy, Sparsity, Target

# [P §3.1]: the smallest weights-per-neuron count the paper trained; below 4, Bernoulli rows are empty with P ≈ e^-WPN
WPN_TRAINED, WPN_EMPTY_ROWS, WPN_IMPOSSIBLE = 16, 4, 1


def transfer(
    proxy: Proxy,
    target: Target,
    parameterization: rules.ParameterizationName = "supar",
    *,
    allow_low_wpn: bool = False,
    edition: rules.Edition = 2,
) -> Plan:
    """The plan of training `target` with the hyperparameters of `proxy`. Raises InputError for a target that can't work."""
    model = target_model(proxy.model, target)
    options = proxy.parameterization.model_dump()
    scheme = rules.Scheme(parameterization, proxy.train.optimizer, **options, edition=edition)
    if scheme.depth_rule == "completep" and scheme.optimizer == "sgd":
        raise InputError("parameterization.depth_rule: completep is not known for SGD; expected adamw")
    wanted = target.sparsity
    density = _density(wanted)
    all_tensors = layout.tensors(model)
    hidden = [tensor for tensor in all_tensors if tensor.role == "hidden"]
    where = "target.sparsity.overrides"
    kept = sparsity.distribute(
        hidden, density, wanted.distribution, wanted.pattern, wanted.overrides, where, wanted.block
    )
    base_density, base_shape = _base(proxy)
    tuned = rules.ProxyValues(
        proxy.hyperparameters.init_std,
        proxy.hyperparameters.lr,
        proxy.hyperparameters.weight_decay,
        proxy.hyperparameters.eps,
    )
    m_width, m_L = model.width / proxy.model.width, model.layers / proxy.model.layers
    rows = []
    for tensor in all_tensors:
        own = kept.get(tensor.name, sparsity.Kept(1.0, tensor.size))
        is_hidden = tensor.role == "hidden"
        base = base_shape[tensor.site]
        m_d = tensor.fan_in / base[-1] if is_hidden or edition == 2 else m_width
        m_rho = own.density / base_density[tensor.site] if is_hidden else 1.0
        if own.count == 0:
            raise InputError(f"{tensor.name}: density {own.density} keeps none of its {tensor.size} weights")
        context = rules.TensorContext(
            tensor.role,
            m_d,
            m_fan_out=tensor.shape[0] / base[0] if is_hidden else None,
            m_out=m_width,
            m_rho=m_rho,
            m_L=m_L,
            layers=model.layers,
            in_block=tensor.block is not None,
            writes_residual=tensor.writes_residual,
        )
        rows.append(_row(scheme, tuned, tensor, own, context))
    plan = Plan(
        kind="supar.plan/v1",
        parents={"proxy": proxy.hash()},
        model=PlanModel(
            **model.model_dump(),
            multipliers=Multipliers(
                input=rules.input_multiplier(scheme, proxy.hyperparameters.alpha_input).value,
                output=rules.output_multiplier(scheme, proxy.hyperparameters.alpha_output, m_width).value,
                attention=rules.attention_multiplier(scheme, model.head_width).value,
                residual=rules.residual_multiplier(scheme, m_L).value,
            ),
        ),
        parameterization=Parameterization(
            name=parameterization, **proxy.parameterization.model_dump(), base=_base_section(proxy)
        ),
        hyperparameters=proxy.hyperparameters,
        sparsity=PlanSparsity(
            density=float(density),
            sparsity=float(1 - density),
            pattern=wanted.pattern,
            block=wanted.block,
            distribution=wanted.distribution,
            overrides=wanted.overrides,
        ),
        tensors=rows,
        data=proxy.data,
        train=_train(proxy, target, model, sum(row.kept for row in rows)),
        run=proxy.run,
        meta={},
    )
    too_low = [row for row in plan.tensors if row.role == "hidden" and row.wpn < WPN_IMPOSSIBLE]
    if too_low and not allow_low_wpn:
        row = min(too_low, key=lambda row: row.wpn)
        raise InputError(
            f"{row.name}: {row.wpn:.3g} weights per neuron (fan-in {row.shape[-1]} × density {row.density:g}): most outputs would have "
            f"no input at all; {remedy(plan, row)}, or --allow-low-wpn"
        )
    return plan


def as_trial(proxy: Proxy) -> Plan:
    """The plan of training the proxy itself: m_d = m_rho = 1."""
    return transfer(proxy, Target(sparsity=proxy.sparsity))


def _density(wanted: Sparsity) -> Decimal:
    if wanted.sparsity is None and wanted.density is None:
        raise InputError("how sparse the target is to be was not said; expected --sparsity or --density")
    return sparsity.density_from(sparsity=wanted.sparsity, density=wanted.density)


def target_model(proxy: Model, target: Target) -> Model:
    """The proxy's shape with the target's changes; head width and FFN ratio are kept unless given."""
    width = target.width or proxy.width
    heads = target.heads
    if heads is None:
        if width % proxy.head_width:
            raise InputError(
                f"target.width: {width} is no multiple of the proxy's head width {proxy.head_width}; expected one that is, or --heads"
            )
        heads = width // proxy.head_width
    kv_heads = target.kv_heads
    if kv_heads is None:
        group = proxy.heads // proxy.kv_heads
        kv_heads = heads // group if heads % group == 0 else 1
    ffn_width = target.ffn_width
    if ffn_width is None:
        if (width * proxy.ffn_width) % proxy.width:
            raise InputError(
                f"target.width: the FFN ratio {proxy.ffn_width}/{proxy.width} gives no whole FFN width at {width}; expected --ffn-width"
            )
        ffn_width = width * proxy.ffn_width // proxy.width
    changes = {"width": width, "heads": heads, "kv_heads": kv_heads, "ffn_width": ffn_width}
    changes |= {"layers": target.layers or proxy.layers, "context": target.context or proxy.context}
    try:
        return Model(**{**proxy.model_dump(), **changes})
    except ValidationError as error:
        found = [item["msg"].removeprefix("Value error, ") for item in error.errors()]
        raise InputError(*(f"target.{problem}" for problem in found)) from None


def _base(proxy: Proxy) -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
    """The proxy's density and shape by site; its blocks are alike, so the site says enough."""
    every = layout.tensors(proxy.model)
    hidden = [tensor for tensor in every if tensor.role == "hidden"]
    own = proxy.sparsity
    kept = sparsity.distribute(hidden, _density(own), own.distribution, own.pattern, own.overrides, block=own.block)
    densities: dict[str, float] = {}
    for tensor in hidden:
        if densities.setdefault(tensor.site, kept[tensor.name].density) != kept[tensor.name].density:
            raise InputError(
                f"sparsity.overrides: the proxy's blocks differ in the density of {tensor.site}; expected overrides by site, not by tensor"
            )
    return densities, {tensor.site: tensor.shape for tensor in every}


def _base_section(proxy: Proxy) -> Base:
    return Base(
        width=proxy.model.width,
        ffn_width=proxy.model.ffn_width,
        layers=proxy.model.layers,
        kv_share=proxy.model.kv_heads / proxy.model.heads,
        steps=proxy.train.steps,
        batch_size=proxy.train.batch_size,
    )


def _row(
    scheme: rules.Scheme,
    tuned: rules.ProxyValues,
    tensor: layout.Tensor,
    own: sparsity.Kept,
    context: rules.TensorContext,
) -> PlanTensor:
    because = {"m_d": context.m_d}
    if scheme.edition == 2 and scheme.name != "sp":  # what else the numbers come from, where it is another ratio
        by_output = {"m_out": context.m_out} if scheme.optimizer == "adamw" else {"m_fan_out": context.fan_out}
        because |= {key: value for key, value in by_output.items() if value != context.m_d}
    if tensor.role == "hidden":
        because["m_rho"] = context.m_rho
    if scheme.depth_rule == "completep" and context.in_block:
        because["m_L"] = context.m_L
    return PlanTensor(
        name=tensor.name,
        role=tensor.role,
        shape=list(tensor.shape),
        density=own.density,
        kept=own.count,
        init_std=rules.init_std(scheme, tuned, context).value,
        lr=rules.learning_rate(scheme, tuned, context).value,
        weight_decay=rules.weight_decay(scheme, tuned, context).value,
        eps=rules.adam_eps(scheme, tuned, context).value,
        because=because,
    )


def _train(proxy: Proxy, target: Target, model: Model, live: int) -> PlanTrain:
    batch_size = target.batch_size or proxy.train.batch_size
    step_tokens = batch_size * model.context
    if target.tokens_per_parameter is not None:
        steps = ceil(Fraction(sparsity.literal(target.tokens_per_parameter)) * live / step_tokens)
    elif target.tokens is not None:
        steps = ceil(Fraction(target.tokens, step_tokens))
    else:
        steps = target.steps or proxy.train.steps
    if steps * step_tokens > LARGEST:
        raise InputError(f"train.steps: {steps} steps of {step_tokens} tokens are more than any run can have")
    fields: dict[str, Any] = proxy.train.model_dump()
    fields |= {"steps": steps, "batch_size": batch_size, "tokens": steps * step_tokens}
    fields["warmup_steps"] = int(Fraction(sparsity.literal(proxy.train.warmup_fraction)) * steps)
    if target.seed is not None:
        fields["seed"] = target.seed
    return PlanTrain(**fields)


def timescale_steps(row: PlanTensor) -> float | None:
    """Steps in which weight decay alone shrinks a weight by e at the peak rate: 1/(lr·λ). None without decay."""
    rate = row.lr * row.weight_decay
    return 1.0 / rate if rate >= sys.float_info.min else None  # what is less has no reciprocal, and decays nothing


def warnings(plan: Plan) -> list[str]:
    """What a person should know before spending time on this plan."""
    found = []
    hidden = [row for row in plan.tensors if row.role == "hidden"]
    low = min(hidden, key=lambda row: row.wpn)
    sparse = any(row.density < 1 for row in hidden)
    if sparse and low.wpn < WPN_TRAINED:
        empty = ""
        per_row = low.wpn / (plan.sparsity.block or 1)  # what is drawn, weights or blocks, of a row
        if per_row < WPN_EMPTY_ROWS and plan.sparsity.pattern != "fixed_fan_in":
            empty = f"; rows with no weight at all appear (about {100 * 2.718281828459045**-per_row:.2g} % of them)"
        found.append(
            f"{low.name}: {low.wpn:.3g} weights per neuron, below the {WPN_TRAINED} the paper trained{empty}; {remedy(plan, low)}"
        )
    if plan.sparsity.block and low.wpn >= WPN_TRAINED and low.wpn / plan.sparsity.block < WPN_EMPTY_ROWS and sparse:
        share = 100 * 2.718281828459045 ** -(low.wpn / plan.sparsity.block)
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
    kv_share = plan.model.kv_heads / plan.model.heads
    if abs(kv_share - plan.parameterization.base.kv_share) > 1e-9:
        found.append(
            f"kv_heads/heads is {kv_share:g}, the proxy's {plan.parameterization.base.kv_share:g}: "
            "grouped-query attention was tuned otherwise"
        )
    if plan.train.batch_size != plan.parameterization.base.batch_size:
        found.append(
            f"batch size {plan.train.batch_size}, the proxy's {plan.parameterization.base.batch_size}: learning rates transfer over width "
            "and density, not over batch size"
        )
    return found


def remedy(plan: Plan, row: PlanTensor) -> str:
    """The width or the sparsity at which `row` would have the weights per neuron that the paper trained."""
    ratio = Fraction(row.shape[-1], plan.model.width)
    step = plan.model.head_width
    width = ceil(WPN_TRAINED / _asked_density(plan, row) / ratio / step) * step
    most = 1 - WPN_TRAINED / row.shape[-1]
    other = f" or a sparsity of at most {int(most * 10000) / 10000:g}" if most > 0 else ""
    return f"{WPN_TRAINED} need a width of {width}{other}"


def _asked_density(plan: Plan, row: PlanTensor) -> Fraction:
    """The density that was asked of `row`, or the least it can be: fixed fan-in rounds it to whole weights per row."""
    if plan.sparsity.pattern not in ("fixed_fan_in", "block"):
        return Fraction(sparsity.literal(row.density))
    if plan.sparsity.distribution == "uniform" and not plan.sparsity.overrides:
        return Fraction(sparsity.literal(plan.sparsity.density))
    if plan.sparsity.block:
        return Fraction(row.kept, row.size)
    return (Fraction(row.kept, row.shape[0]) - Fraction(1, 2)) / row.shape[1]
