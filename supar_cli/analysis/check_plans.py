"""Which plans a coordinate check runs: sweeps over density and width of a proxy, or a given plan beside references."""

from __future__ import annotations

from math import log2
from typing import Any

from supar_cli.analysis.check import Sweep
from supar_cli.errors import InputError
from supar_cli.planning.plan import Plan, PlanTrain
from supar_cli.planning.rules import Name
from supar_cli.planning.spec import Model, Options, Proxy, Sparsity, Spec, Target, Train
from supar_cli.planning.transfer import transfer

DENSITIES = (1.0, 1 / 4, 1 / 16)
WIDTHS = (1, 2, 4, 8)  # times the proxy's
CONTROLS: tuple[tuple[Name, str], ...] = (("sp", "density"), ("mup", "density"), ("sp", "width"))
CONTROL_SEEDS = 2  # chosen: a control is off by far more than two seeds differ


def proxy_sweeps(
    proxy: Spec | Proxy,
    name: Name,
    *,
    widths: list[int],
    densities: list[float],
    seeds: int,
    steps: int,
    batch_size: int,
) -> list[Sweep]:
    """The parameterization over density, at the second largest width, and over width, dense; then the controls.

    Rates are constant, without warm-up and clipping; the rest is the proxy's. Raises InputError for what can't be planned.
    """
    base = Proxy(
        kind="supar.proxy/v1",
        train=_train(proxy.train, steps, batch_size),
        **{
            key: getattr(proxy, key)
            for key in ("model", "hyperparameters", "parameterization", "sparsity", "data", "run")
        },
    )
    wide = sorted(widths)[-2 if len(widths) > 1 else -1]
    drawn = proxy.target.sparsity
    first_seed = proxy.train.seed

    def plan(arm: Name, width: int, density: float, seed: int) -> Plan:
        wanted = Sparsity(density=density, pattern=drawn.pattern, distribution=drawn.distribution)
        return transfer(base, Target(width=width, sparsity=wanted, seed=first_seed + seed), arm, allow_low_wpn=True)

    def sweep(arm: Name, axis: str, control: bool) -> Sweep:
        points = [(wide, d) for d in densities] if axis == "density" else [(w, densities[0]) for w in widths]
        sizes = [density if axis == "density" else float(width) for width, density in points]
        count = min(seeds, CONTROL_SEEDS) if control else seeds
        plans = [[plan(arm, width, density, seed) for seed in range(count)] for width, density in points]
        return Sweep(arm, axis, sizes, plans, control, logits_slope=-0.5 if axis == "width" else 0.0)

    axes = [axis for axis, sizes in (("density", densities), ("width", widths)) if len(sizes) > 1]
    if not axes:
        raise InputError("--density and --width: one of them needs at least two sizes for a slope")
    own = [sweep(name, axis, False) for axis in axes]
    return own + [sweep(arm, axis, True) for arm, axis in CONTROLS if axis in axes and arm != name]


def plan_sweeps(plan: Plan, *, seeds: int, steps: int, batch_size: int) -> list[Sweep]:
    """A plan as it stands, beside what SμPar's rules make of its proxy: dense at the plan's shape, and the proxy itself.

    Over density only the plan's numbers can move a size; over the whole way from the proxy narrow ends bend it too.
    """
    proxy = _proxy_of(plan, steps, batch_size)
    shape = {key: getattr(plan.model, key) for key in ("width", "ffn_width", "heads", "kv_heads", "layers", "context")}

    def own(seed: int) -> Plan:
        train: dict[str, Any] = plan.train.model_dump() | _train(plan.train, steps, batch_size).model_dump()
        train |= {"tokens": steps * batch_size * plan.model.context, "warmup_steps": 0, "seed": plan.train.seed + seed}
        return plan.model_copy(update={"train": PlanTrain(**train)})

    def reference(seed: int, **target: Any) -> Plan:
        return transfer(proxy, Target(sparsity=proxy.sparsity, seed=plan.train.seed + seed, **target))

    itself = [own(seed) for seed in range(seeds)]
    base_density = proxy.sparsity.density or 1.0
    m_rho, m_d = plan.sparsity.density / base_density, plan.model.width / plan.parameterization.base.width
    sweeps = []
    if m_rho != 1:
        dense = [reference(seed, **shape) for seed in range(seeds)]
        sweeps.append(Sweep("the plan", "density", [base_density, plan.sparsity.density], [dense, itself], False))
    if m_d != 1:
        small = [reference(seed, layers=plan.model.layers, context=plan.model.context) for seed in range(seeds)]
        scale = m_d / m_rho
        fall = -0.5 * log2(m_d) / log2(scale)
        sweeps.append(Sweep("the plan", "plan", [1.0, scale], [small, itself], False, logits_slope=fall))
    if not sweeps:
        raise InputError(
            "the plan has its proxy's own width and density: there is no slope to measure; check the proxy instead"
        )
    return sweeps


def _proxy_of(plan: Plan, steps: int, batch_size: int) -> Proxy:
    """The proxy that a plan came from, as far as rules need it; its head width is the plan's where that divides its width."""
    base, model = plan.parameterization.base, plan.model
    heads = base.width // model.head_width if base.width % model.head_width == 0 else 1
    kv_heads = max(1, round(heads * base.kv_share))
    fields = {key: value for key, value in model.model_dump().items() if key != "multipliers"}
    fields |= {"width": base.width, "ffn_width": base.ffn_width, "heads": heads}
    fields |= {"kv_heads": kv_heads if heads % kv_heads == 0 else heads}
    hidden = [row for row in plan.tensors if row.role == "hidden"]
    densities = {min(1.0, row.density / row.because["m_rho"]) for row in hidden}
    if max(densities) - min(densities) > 1e-6:
        raise InputError("the plan's proxy was sparse unevenly: its density differs by tensor; check the proxy instead")
    options = {key: getattr(plan.parameterization, key) for key in Options.keys()}  # noqa: SIM118
    return Proxy(
        kind="supar.proxy/v1",
        model=Model(**fields),
        hyperparameters=plan.hyperparameters,
        parameterization=Options(**options),
        sparsity=Sparsity(density=max(densities), pattern=plan.sparsity.pattern),
        data=plan.data,
        train=_train(plan.train, steps, batch_size),
        run=plan.run,
    )


def _train(train: Train, steps: int, batch_size: int) -> Train:
    """A few steps at a constant rate, without clipping: what scales a gradient would hide its size."""
    fields = {key: getattr(train, key) for key in Train.keys()}  # noqa: SIM118
    fields |= {
        "steps": steps,
        "batch_size": batch_size,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "grad_clip": 0.0,
    }
    return Train(**fields)
