"""From a tuned proxy and a target to a plan."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any, get_args

from supar_cli.errors import InputError
from supar_cli.planning import density, layout, patterns, rules
from supar_cli.planning.advice import WPN_IMPOSSIBLE, remedy
from supar_cli.planning.plan import (
    CURRENT_RULES,
    Base,
    Multipliers,
    Parameterization,
    Plan,
    PlanModel,
    PlanSparsity,
    PlanTensor,
    PlanTrain,
)
from supar_cli.planning.problems import validate
from supar_cli.planning.schema import LARGEST
from supar_cli.planning.spec import Model, Proxy, Sparsity, Target


def transfer(
    proxy: Proxy,
    target: Target,
    parameterization: rules.ParameterizationName = "supar",
    *,
    allow_low_wpn: bool = False,
    edition: rules.Edition = CURRENT_RULES,
) -> Plan:
    """The plan of training `target` with the hyperparameters of `proxy`. Raises InputError for a target that can't work."""
    model = target_model(proxy.model, target)
    if parameterization not in get_args(rules.ParameterizationName):
        names = ", ".join(get_args(rules.ParameterizationName))
        raise InputError(f"parameterization: {parameterization!r}; expected one of {names}")
    options = proxy.parameterization.model_dump(include=rules.OPTIONS)
    scheme = rules.Scheme(parameterization, proxy.train.optimizer, **options, edition=edition)
    if scheme.depth_rule == "completep" and scheme.optimizer == "sgd":
        raise InputError("parameterization.depth_rule: completep is not known for SGD; expected adamw")
    wanted, hyper = target.sparsity, proxy.hyperparameters
    share = _density(wanted)
    rows = _rows(proxy, scheme, model, wanted, share)
    m_width, m_L = model.width / proxy.model.width, model.layers / proxy.model.layers
    plan = Plan(
        kind="supar.plan/v2",
        parents={"proxy": proxy.hash()},
        model=PlanModel(
            **model.model_dump(),
            multipliers=Multipliers(
                input=rules.input_multiplier(scheme, hyper.alpha_input).value,
                output=rules.output_multiplier(scheme, hyper.alpha_output, m_width).value,
                attention=rules.attention_multiplier(scheme, model.head_width).value,
                residual=rules.residual_multiplier(scheme, m_L).value,
            ),
        ),
        parameterization=Parameterization(
            name=parameterization,
            **options,
            base=_base_section(proxy),
            edition=edition,
        ),
        hyperparameters=hyper,
        sparsity=PlanSparsity(
            density=float(share),
            sparsity=float(1 - share),
            pattern=wanted.pattern,
            block=wanted.block,
            distribution=wanted.distribution,
            overrides={name: float(density.literal(value)) for name, value in wanted.overrides.items()},
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
            f"{row.name}: {row.wpn:.3g} weights per neuron (fan-in {row.fan_in} × density {row.density:g}): most outputs would have "
            f"no input at all; {remedy(plan, row)}, or --allow-low-wpn"
        )
    return plan


def _rows(proxy: Proxy, scheme: rules.Scheme, model: Model, wanted: Sparsity, share: Fraction) -> list[PlanTensor]:
    """Every tensor of `model` with its numbers."""
    tensors = layout.tensors(model)
    hidden = [tensor for tensor in tensors if tensor.role == "hidden"]
    where = "target.sparsity.overrides"
    kept = density.distribute(hidden, share, wanted.distribution, wanted.pattern, wanted.overrides, where, wanted.block)
    base, base_density = {tensor.site: tensor for tensor in layout.tensors(proxy.model)}, _base_density(proxy)
    hyper = proxy.hyperparameters
    tuned = rules.ProxyValues(hyper.init_std, hyper.lr, hyper.weight_decay, hyper.eps)
    m_width, m_L = model.width / proxy.model.width, model.layers / proxy.model.layers
    rows = []
    for tensor in tensors:
        own = kept.get(tensor.name, patterns.LiveCount(1.0, tensor.size))
        m_d, m_fan_out = layout.ratios(tensor, base[tensor.site])
        if scheme.edition == 1 and tensor.role != "hidden":
            m_d = m_width
        m_rho = own.density / base_density[tensor.site] if tensor.role == "hidden" else 1.0
        if own.count == 0:
            raise InputError(f"{tensor.name}: density {own.density} keeps none of its {tensor.size} weights")
        context = rules.TensorContext(
            tensor.role,
            m_d,
            m_fan_out=m_fan_out,
            m_out=m_width,
            m_rho=m_rho,
            m_L=m_L,
            layers=model.layers,
            in_block=tensor.block is not None,
            writes_residual=tensor.writes_residual,
        )
        rows.append(_row(scheme, tuned, tensor, base[tensor.site].fan_in, own, context))
    return rows


def as_trial(proxy: Proxy) -> Plan:
    """The plan of training the proxy itself: m_d = m_rho = 1."""
    return transfer(proxy, Target(sparsity=proxy.sparsity))


def _density(wanted: Sparsity) -> Fraction:
    own = patterns.density_of(wanted.pattern)
    if wanted.sparsity is None and wanted.density is None:
        if own is None:
            raise InputError("how sparse the target is to be was not said; expected --sparsity or --density")
        return own
    given = density.density_from(sparsity=wanted.sparsity, density=wanted.density)
    if own is not None and float(given) not in (float(own), 1.0):  # a document's float is only the nearest to N/M
        word, expected = ("density", f"{own}, or 1") if wanted.sparsity is None else ("sparsity", f"{1 - own}, or 0")
        raise InputError(f"{word}: {getattr(wanted, word)} with the pattern {wanted.pattern}; expected {expected}")
    return given


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
    return validate(Model, {**proxy.model_dump(), **changes}, "target")


def _base_density(proxy: Proxy) -> dict[str, float]:
    """The proxy's density by site; its blocks are alike, so the site says enough."""
    hidden = [tensor for tensor in layout.tensors(proxy.model) if tensor.role == "hidden"]
    own = proxy.sparsity
    kept = density.distribute(hidden, _density(own), own.distribution, own.pattern, own.overrides, block=own.block)
    densities: dict[str, float] = {}
    for tensor in hidden:
        if densities.setdefault(tensor.site, kept[tensor.name].density) != kept[tensor.name].density:
            raise InputError(
                f"sparsity.overrides: the proxy's blocks differ in the density of {tensor.site}; expected overrides by site, not by tensor"
            )
    return densities


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
    base_fan_in: int,
    own: patterns.LiveCount,
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
    constant = rules.STARTS.get(tensor.role)
    return PlanTensor(
        name=tensor.name,
        role=tensor.role,
        site=tensor.site,
        block=tensor.block,
        shape=list(tensor.shape),
        fan_in_axes=list(tensor.fan_in_axes),
        fan_in=tensor.fan_in,
        base_fan_in=base_fan_in,
        density=own.density,
        kept=own.count,
        init_std=rules.init_std(scheme, tuned, context).value if constant is None else None,
        init_constant=constant,
        lr=rules.learning_rate(scheme, tuned, context).value,
        weight_decay=rules.weight_decay(scheme, tuned, context).value,
        eps=rules.adam_eps(scheme, tuned, context).value,
        because=because,
    )


def _train(proxy: Proxy, target: Target, model: Model, live: int) -> PlanTrain:
    batch_size = target.batch_size or proxy.train.batch_size
    step_tokens = batch_size * model.context
    if target.tokens_per_parameter is not None:
        steps = ceil(Fraction(density.literal(target.tokens_per_parameter)) * live / step_tokens)
    elif target.tokens is not None:
        steps = ceil(Fraction(target.tokens, step_tokens))
    else:
        steps = target.steps or proxy.train.steps
    if steps * step_tokens > LARGEST:
        raise InputError(f"train.steps: {steps} steps of {step_tokens} tokens are more than any run can have")
    fields: dict[str, Any] = proxy.train.model_dump()
    fields |= {"steps": steps, "batch_size": batch_size, "tokens": steps * step_tokens}
    fields["warmup_steps"] = int(Fraction(density.literal(proxy.train.warmup_fraction)) * steps)
    if target.seed is not None:
        fields["seed"] = target.seed
    return PlanTrain(**fields)
