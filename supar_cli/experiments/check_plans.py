"""Which plans a coordinate check runs: sweeps over density and width of a proxy, or a given plan beside references."""

from __future__ import annotations

from math import log2
from typing import Any

from supar_cli.errors import InputError
from supar_cli.experiments.coordinate_check import Sweep
from supar_cli.planning.density import Share, literal
from supar_cli.planning.plan import Plan, PlanTrain, decoder_base
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.spec import Model, Options, Proxy, Sparsity, Spec, Target, Train
from supar_cli.planning.transfer import transfer

DENSITIES = (1.0, 1 / 4, 1 / 16)
WIDTHS = (1, 2, 4, 8)  # times the proxy's
CONTROLS: tuple[tuple[ParameterizationName, str], ...] = (("sp", "density"), ("mup", "density"), ("sp", "width"))
CONTROL_SEEDS = 2  # chosen: a control is off by far more than two seeds differ


def proxy_sweeps(
    proxy: Spec | Proxy,
    name: ParameterizationName,
    *,
    widths: list[int],
    densities: list[Share],
    seeds: int,
    steps: int,
    batch_size: int,
) -> list[Sweep]:
    """The parameterization over density, at the second largest width, and over width, dense; then the controls.

    `seeds` are planned; `Sweep.grow` plans more.

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

    def plan(arm: ParameterizationName, width: int, density: Share, seed: int) -> Plan:
        wanted = Sparsity(density=density, pattern=drawn.pattern, block=drawn.block, distribution=drawn.distribution)
        return transfer(base, Target(width=width, sparsity=wanted, seed=first_seed + seed), arm, allow_low_wpn=True)

    def sweep(arm: ParameterizationName, axis: str, control: bool) -> Sweep:
        points = [(wide, d) for d in densities] if axis == "density" else [(w, densities[0]) for w in widths]
        sizes = [float(literal(density)) if axis == "density" else float(width) for width, density in points]
        fall = -0.5 if axis == "width" else 0.0
        made = Sweep(arm, axis, sizes, lambda seed: [plan(arm, *point, seed) for point in points], control, fall)
        return made.grow(min(seeds, CONTROL_SEEDS) if control else seeds)

    axes = [axis for axis, sizes in (("density", densities), ("width", widths)) if len(sizes) > 1]
    if not axes:
        raise InputError("--density and --width: one of them needs at least two sizes for a slope")
    own = [sweep(name, axis, False) for axis in axes]
    return own + [sweep(arm, axis, True) for arm, axis in CONTROLS if axis in axes and arm != name]


def plan_sweeps(plan: Plan, *, seeds: int, steps: int, batch_size: int) -> list[Sweep]:
    """A plan as it stands, beside what SμPar's rules make of its proxy: dense at the plan's shape, and the proxy itself.

    The control is what SP makes of that proxy at the plan's shape and density.

    Over density only the plan's numbers can move a size; over the whole way from the proxy narrow ends bend it too.
    """
    proxy = _proxy_of(plan, steps, batch_size)
    shape = {
        key: getattr(plan.decoder, key) for key in ("width", "ffn_width", "heads", "kv_heads", "layers", "context")
    }

    def own(seed: int) -> Plan:
        train: dict[str, Any] = plan.train.model_dump() | _train(plan.train, steps, batch_size).model_dump()
        train |= {
            "tokens": steps * batch_size * plan.decoder.context,
            "warmup_steps": 0,
            "seed": plan.train.seed + seed,
        }
        return plan.model_copy(update={"train": PlanTrain(**train)})

    def reference(
        seed: int, arm: ParameterizationName = "supar", sparsity: Sparsity = proxy.sparsity, **target: Any
    ) -> Plan:
        wanted = Target(sparsity=sparsity, seed=plan.train.seed + seed, **target)
        return transfer(proxy, wanted, arm, allow_low_wpn=True, edition=plan.parameterization.edition)

    drawn = Sparsity(density=plan.sparsity.density, pattern=plan.sparsity.pattern, block=plan.sparsity.block)
    base_density = float(literal(proxy.sparsity.density or 1.0))
    m_rho, m_d = plan.sparsity.density / base_density, plan.decoder.width / decoder_base(plan).width
    sweeps = []
    if m_rho != 1:
        sizes = [base_density, plan.sparsity.density]
        sweeps.append(Sweep("the plan", "density", sizes, lambda r: [reference(r, **shape), own(r)], False))
        controls = lambda r: [reference(r, "sp", **shape), reference(r, "sp", drawn, **shape)]  # noqa: E731
        sweeps.append(Sweep("sp", "density", sizes, controls, True))
    if m_d != 1:
        small = {key: shape[key] for key in ("layers", "context")}
        scale = m_d / m_rho
        sizes, fall = [1.0, scale], -0.5 * log2(m_d) / log2(scale)
        sweeps.append(Sweep("the plan", "plan", sizes, lambda r: [reference(r, **small), own(r)], False, fall))
        if m_rho == 1:
            controls = lambda r: [reference(r, "sp", **small), reference(r, "sp", **shape)]  # noqa: E731
            sweeps.append(Sweep("sp", "plan", sizes, controls, True))
    if not sweeps:
        raise InputError(
            "the plan has its proxy's own width and density: there is no slope to measure; check the proxy instead"
        )
    return [sweep.grow(min(seeds, CONTROL_SEEDS) if sweep.control else seeds) for sweep in sweeps]


def _proxy_of(plan: Plan, steps: int, batch_size: int) -> Proxy:
    """The proxy that a plan came from, as far as rules need it; its head width is the plan's where that divides its width."""
    base, model = decoder_base(plan), plan.decoder
    heads = base.width // model.head_width if base.width % model.head_width == 0 else 1
    kv_heads = max(1, round(heads * base.kv_share))
    fields = model.model_dump(include=Model.keys())
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
        sparsity=Sparsity(density=max(densities), pattern=plan.sparsity.pattern, block=plan.sparsity.block),
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
