"""From a tuned proxy and a target to a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import ceil, gcd
from typing import TYPE_CHECKING, Any, get_args

from supar_cli.errors import InputError
from supar_cli.planning import density, layout, patterns, rules
from supar_cli.planning.advice import WPN_IMPOSSIBLE, remedy
from supar_cli.planning.layout_document import LAYERS, OwnShape
from supar_cli.planning.live_counts import GivenMasks, asked_density, live_counts, plan_updates
from supar_cli.planning.plan import CURRENT_RULES, Plan, PlanModel, PlanTensor, PlanTrain
from supar_cli.planning.plan_sections import (
    Base,
    Multipliers,
    OwnModel,
    Parameterization,
    PlanSparsity,
    PlanTask,
    PlanViT,
    Values,
    derived_keys,
)
from supar_cli.planning.problems import validate
from supar_cli.planning.schema import LARGEST
from supar_cli.planning.spec import Model, Proxy, Sparsity, Target
from supar_cli.planning.updates import PlanUpdates, exponent_of, start_density

if TYPE_CHECKING:
    from supar_cli.planning.own_shapes import OwnTensors


@dataclass(frozen=True)
class _DecoderTensors:
    """The tensors of one of supar's families, and those of its proxy."""

    proxy: Proxy
    model: Model
    base: Base
    edition: rules.Edition

    @cached_property
    def tensors(self) -> list[layout.Tensor]:
        return layout.tensors(self.model)

    @cached_property
    def base_tensors(self) -> list[layout.Tensor]:
        return layout.tensors(self.proxy.decoder)

    @cached_property
    def narrow(self) -> dict[str, layout.Tensor]:
        """The proxy's tensors by site."""
        return {tensor.site: tensor for tensor in self.base_tensors}

    def context(self, tensor: layout.Tensor, m_rho: float) -> rules.TensorContext:
        """What the rules need to know of a tensor at its density ratio."""
        own = self.proxy.decoder
        m_d, m_fan_out = layout.ratios(tensor, self.narrow[tensor.site])
        m_width = self.model.width / own.width
        return rules.TensorContext(
            tensor.role,
            m_width if self.edition == 1 and tensor.role != "hidden" else m_d,
            m_fan_out=m_fan_out,
            m_out=m_width,
            m_rho=m_rho,
            m_L=self.model.layers / own.layers,
            layers=self.model.layers,
            in_block=tensor.block is not None,
            writes_residual=tensor.writes_residual,
            first_sum=tensor.role == "embedding",
            head=tensor.role == "unembedding",
        )


def transfer(
    proxy: Proxy,
    target: Target,
    parameterization: rules.ParameterizationName = "supar",
    *,
    allow_low_wpn: bool = False,
    edition: rules.Edition = CURRENT_RULES,
    masks: GivenMasks | None = None,
    draw: patterns.Draw = "live",
) -> Plan:
    """The plan of training `target` with the hyperparameters of `proxy`; with `masks` their densities are the tensors'.

    `draw` is how masks, and values of sparse tensors, are drawn: studies over density draw `positions`, so that their runs
    share the values of what lives in several of them. Raises InputError for a target that can't work.
    """
    if parameterization not in (names := get_args(rules.ParameterizationName)):
        raise InputError(f"parameterization: {parameterization!r}; expected one of {', '.join(names)}")
    options = proxy.parameterization.model_dump(include=rules.OPTIONS)
    updates, follows = target.sparsity.updates, parameterization in rules.DENSITY_IN_RATE
    exponent = exponent_of(updates, proxy.parameterization.density_exponent) if follows else 0.0
    scheme = rules.Scheme(
        parameterization, proxy.train.optimizer, **options, density_exponent=exponent, edition=edition
    )
    static_exponent = None if updates is not None or exponent == 1 or not follows else exponent
    if scheme.depth_rule == "completep" and scheme.optimizer == "sgd":
        raise InputError("parameterization.depth_rule: completep has no rule for SGD; expected the optimizer adamw")
    planned = _plan_own if isinstance(proxy.model, OwnShape) else _plan_decoder
    model, base, rows, task = planned(proxy, target, scheme, masks)
    train = _train(proxy, target, model, sum(row.kept for row in rows))
    moving = plan_updates(updates, exponent, train.steps, rows)
    draw = draw if any(row.kept < row.size for row in rows) else "positions"
    plan = Plan(
        kind="supar.plan/v2",
        parents={"proxy": proxy.hash()},
        model=model,
        parameterization=Parameterization(
            name=parameterization, **options, density_exponent=static_exponent, base=base, edition=edition
        ),
        hyperparameters=proxy.hyperparameters,
        sparsity=_plan_sparsity(target.sparsity, rows, masks, moving, edition, draw),
        values=Values(draw=draw),
        tensors=rows,
        task=task,
        data=proxy.data,
        train=train,
        run=proxy.run,
    )
    low = min((row for row in plan.tensors if row.role == "hidden"), key=lambda row: row.wpn, default=None)
    if low is not None and low.wpn < WPN_IMPOSSIBLE and not allow_low_wpn:
        few = f"{low.wpn:.3g} weights per neuron (fan-in {low.fan_in} × density {low.density:g})"
        remedies = f"{remedy(plan, low)}; --allow-low-wpn plans it anyway"
        raise InputError(f"{low.name}: {few}: most outputs would have no input at all; {remedies}")
    return plan


def _plan_sparsity(
    wanted: Sparsity,
    rows: list[PlanTensor],
    masks: GivenMasks | None,
    updates: PlanUpdates | None,
    edition: rules.Edition,
    draw: patterns.Draw,
) -> PlanSparsity:
    """The plan's section: the density asked for, or the share of all hidden weights that masks from a file leave alive."""
    if masks is not None:
        return masks.section(rows, updates)
    share, drawn = asked_density(wanted), wanted.model_dump(include=("pattern", "block", "distribution"))
    drawn["overrides"] = {name: float(density.literal(value)) for name, value in wanted.overrides.items()}
    if wanted.block is not None and edition > 1:
        drawn["block_rows"] = "even"
    if wanted.pattern in patterns.DRAWN_LIVE:
        drawn["draw"] = draw
    return PlanSparsity(density=float(share), sparsity=float(1 - share), **drawn, updates=updates)


_Planned = tuple[PlanModel | OwnModel, Base, list[PlanTensor], PlanTask]


def _plan_decoder(proxy: Proxy, target: Target, scheme: rules.Scheme, masks: GivenMasks | None) -> _Planned:
    """Model, proxy's shape, rows and task of a model of supar's own families."""
    own, hyper = proxy.decoder, proxy.hyperparameters
    if target.size is not None:
        raise InputError("target.size: is for models of your own; expected target.width, layers, …")
    for_text = ("context", "tokens", "tokens_per_parameter") if own.data_kind == "images" else ()
    if given := [name for name in for_text if getattr(target, name) is not None]:
        raise InputError(*(f"target.{name}: is for text; expected none with the family {own.family}" for name in given))
    if own.tied and hyper.head_lr_ratio != 1:
        what = f"{hyper.head_lr_ratio:g}, but the head embedding is tied and has the embeddings' rate"
        raise InputError(f"hyperparameters.head_lr_ratio: {what}; expected 1")
    model = target_model(own, target)
    base = _base(proxy, model)
    shapes = _DecoderTensors(proxy, model, base, scheme.edition)
    derived, rows = derived_keys(model, base), []
    kept = live_counts(shapes.tensors, target.sparsity, "target.sparsity.overrides", masks)
    start = start_density(target.sparsity.updates)
    for tensor, keys in _numbers(proxy, scheme, shapes, kept, start, lambda _: hyper.init_std or 0.0):
        if tensor.role in rules.STARTS:
            del keys["init_std"]
            keys["init_constant"] = rules.STARTS[tensor.role]
        keys |= derived[tensor.name]
        rows.append(PlanTensor(name=tensor.name, role=tensor.role, **keys))
    m_width, m_L = model.width / own.width, model.layers / own.layers
    factors = rules.forward_rules(scheme, hyper.alpha_input, hyper.alpha_output, m_width, m_L, model.head_width)
    multipliers = Multipliers(**{name: rule.value for name, rule in factors.items()})
    is_text = model.data_kind == "tokens"
    made = (PlanModel if is_text else PlanViT)(**model.model_dump(), multipliers=multipliers)
    return made, base, rows, PlanTask(kind="next_token" if is_text else "classification")


def _plan_own(proxy: Proxy, target: Target, scheme: rules.Scheme, masks: GivenMasks | None) -> _Planned:
    """Model, proxy's shape, rows and task of a user's model, its multipliers folded into the rows."""
    from supar_cli.planning.own_shapes import OwnTensors, folded  # most plans don't need it

    assert isinstance(proxy.model, OwnShape)
    document, hyper = proxy.model.read_layout(), proxy.hyperparameters
    if scheme.residual_init == "gpt2" and hyper.init_std is None:
        what = "gpt2 scales the residual branches, whose own deviations a model of your own already has"
        raise InputError(f"parameterization.residual_init: {what}; expected none, or hyperparameters.init_std")
    if scheme.residual_init == "gpt2" and LAYERS not in document.base:
        what = f"gpt2 divides by the number of blocks, and the layout's sizes are {', '.join(document.base)}"
        raise InputError(f"parameterization.residual_init: {what}; expected {LAYERS} among them, or none")
    shapes = OwnTensors.of(document, target)
    shapes.require_ratios_used(hyper)
    factors, hooks = shapes.folds(scheme, hyper)
    rows = []
    kept = live_counts(shapes.tensors, target.sparsity, "target.sparsity.overrides", masks)
    first = start_density(target.sparsity.updates)
    for tensor, keys in _numbers(proxy, scheme, shapes, kept, first, lambda one: shapes.sigma(one, hyper)):
        start = shapes.start(tensor, keys.pop("init_std"), hyper)
        if (start.get("init_std") and hyper.init_std is None) or start.get("init") == "own":
            keys["because"]["own_std"] = shapes.sigma(tensor, hyper)
        keys = folded(keys | start, factors.get(tensor.name, 1.0), scheme.optimizer)
        keys |= {"site": tensor.site, "block": tensor.block, "fan_in_axes": list(tensor.fan_in_axes)}
        keys |= {"base_fan_in": shapes.base[tensor.name].fan_in, "tied_to": tensor.tied_to}
        rows.append(PlanTensor(name=tensor.name, role=tensor.role, **keys))
    base = Base(
        steps=proxy.train.steps, batch_size=proxy.train.batch_size, clipped_share=proxy.evidence.get("clipped_share")
    )
    factory = proxy.model.factory or document.factory
    sizes = document.base, shapes.size
    model = OwnModel(
        family="own",
        layout=document.hash(),
        factory=factory,
        base=sizes[0],
        target=sizes[1],
        hooks=hooks,
        ignored=document.ignored,
    )
    return model, base, rows, PlanTask(kind="own")


def _numbers(
    proxy: Proxy,
    scheme: rules.Scheme,
    shapes: _DecoderTensors | OwnTensors,
    kept: dict[str, patterns.LiveCount],
    start: float,
    sigma_of: Callable[[layout.Tensor], float],
) -> Iterator[tuple[layout.Tensor, dict[str, Any]]]:
    """Every tensor with the keys of its row that hold numbers.

    Sparse tensors start at the density `start` where it is above their own: the init is that of step 0.
    """
    base_density, hyper = _base_density(proxy, shapes), proxy.hyperparameters
    for tensor in shapes.tensors:
        own = kept.get(tensor.name, patterns.LiveCount(1.0, tensor.size))
        if own.count == 0:
            raise InputError(f"{tensor.name}: density {own.density} keeps none of its {tensor.size} weights")
        base = base_density.get(tensor.site, 1.0)
        context = shapes.context(tensor, own.density / base)
        if own.count < tensor.size and start > own.density:
            context = replace(context, m_rho_start=start / base)
        tuned = hyper.with_sigma(sigma_of(tensor))
        keys: dict[str, Any] = {name: rule.value for name, rule in rules.tensor_rules(scheme, tuned, context).items()}
        keys |= {"shape": list(tensor.shape), "fan_in": tensor.fan_in, "density": own.density, "kept": own.count}
        keys["because"] = rules.because(scheme, tuned, context)
        yield tensor, keys


def as_trial(proxy: Proxy) -> Plan:
    """The plan of training the proxy itself: m_d = m_rho = 1."""
    return transfer(proxy, Target(sparsity=proxy.sparsity), draw="positions")  # so that older searches go on


def target_model(proxy: Model, target: Target) -> Model:
    """The proxy's shape with the target's changes: unless given, head width, heads per width and FFN ratio are kept."""
    width, group = target.width or proxy.width, proxy.heads // proxy.kv_heads
    is_usual = target.head_width is None and proxy.attention_width == proxy.width  # width / heads
    head_width = target.head_width or proxy.head_width
    heads, beyond_heads = divmod(width * proxy.attention_width, proxy.width * head_width)
    if target.heads is None and beyond_heads:
        step = proxy.width * head_width // gcd(proxy.width * head_width, proxy.attention_width)
        which = "the proxy's head width" if is_usual else "the least width with whole heads,"
        raise InputError(
            f"target.width: {width} is not a multiple of {which} {step}; expected a multiple of it, or other heads"
        )
    heads = target.heads or heads
    ffn_width, beyond_ffn = divmod(width * proxy.ffn_width, proxy.width)
    if target.ffn_width is None and beyond_ffn:
        what = f"at {width} the proxy's FFN ratio {proxy.ffn_width}/{proxy.width} gives no whole number"
        raise InputError(f"target.width: {what}; expected another width, or target.ffn_width")
    kv_heads = target.kv_heads or (heads // group if heads % group == 0 else 1)
    changes = {"width": width, "heads": heads, "kv_heads": kv_heads, "ffn_width": target.ffn_width or ffn_width}
    changes["layers"] = target.layers or proxy.layers
    if target.context is not None:
        changes["context"] = target.context
    if not is_usual:
        changes["head_width"] = head_width
    return validate(type(proxy), {**proxy.model_dump(), **changes}, "target")


def _base_density(proxy: Proxy, shapes: _DecoderTensors | OwnTensors) -> dict[str, float]:
    """The proxy's density by site. Raises InputError where its blocks differ."""
    tensors = shapes.base_tensors
    kept = live_counts(tensors, proxy.sparsity, "sparsity.overrides")
    densities: dict[str, float] = {}
    for tensor in tensors:
        own = kept.get(tensor.name)
        if own is not None and densities.setdefault(tensor.site, own.density) != own.density:
            what = f"the density of {tensor.site} differs between the proxy's blocks"
            raise InputError(f"sparsity.overrides: {what}; expected overrides by site, not by tensor")
    return densities


def _base(proxy: Proxy, model: Model) -> Base:
    own = proxy.decoder
    found: dict[str, Any] = own.model_dump(include=("width", "ffn_width", "layers"))
    found |= proxy.train.model_dump(include=("steps", "batch_size"))
    found |= {"kv_share": own.kv_heads / own.heads, "clipped_share": proxy.evidence.get("clipped_share")}
    found["attention_width"] = own.attention_width if own.attention_width != own.width else None
    found["context"] = own.context if own.context != model.context else None
    return validate(Base, found, "evidence")  # all else was validated with the proxy


def _train(proxy: Proxy, target: Target, model: PlanModel | OwnModel, live: int) -> PlanTrain:
    batch_size = target.batch_size or proxy.train.batch_size
    has_tokens = isinstance(model, PlanModel) and model.data_kind == "tokens"
    step_tokens = batch_size * (model.context if isinstance(model, PlanModel) and has_tokens else 1)
    if batch_size % (proxy.run.micro_batch_size or 1):
        what = f"{proxy.run.micro_batch_size} does not divide the batch size {batch_size}"
        close = gcd(proxy.run.micro_batch_size or 1, batch_size)
        raise InputError(f"run.micro_batch_size: {what}; expected a divisor, such as -s run.micro_batch_size={close}")
    if target.tokens_per_parameter is not None:
        steps = ceil(Fraction(density.literal(target.tokens_per_parameter)) * live / step_tokens)
    elif target.tokens is not None:
        steps = ceil(Fraction(target.tokens, step_tokens))
    else:
        steps = target.steps or proxy.train.steps
    if steps * step_tokens > LARGEST:
        raise InputError(f"train.steps: {steps} steps of {step_tokens} tokens are more than a run can have")
    fields: dict[str, Any] = proxy.train.model_dump()
    fields |= {"steps": steps, "batch_size": batch_size}
    fields["tokens"] = steps * step_tokens if has_tokens else None
    fields["warmup_steps"] = int(Fraction(density.literal(proxy.train.warmup_fraction)) * steps)
    if proxy.train.decay_fraction is not None:
        fields["decay_steps"] = int(Fraction(density.literal(proxy.train.decay_fraction)) * steps)
    if target.seed is not None:
        fields["seed"] = target.seed
    return PlanTrain(**fields)
