"""Which plans a coordinate check runs: sweeps over density and width of a proxy, or a given plan and references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import log2

from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.experiments.dry_run import Part
from supar_cli.files import Record
from supar_cli.planning import layout
from supar_cli.planning.density import Share, density_from, literal
from supar_cli.planning.layout_document import LAYERS, Layout, OwnShape
from supar_cli.planning.patterns import density_of
from supar_cli.planning.plan import Plan, decoder_base
from supar_cli.planning.plan_sections import OwnModel
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.spec import WSD, Model, Options, Proxy, Sparsity, Spec, Target, Train, ViT
from supar_cli.planning.transfer import transfer

DENSITIES = (1.0, 1 / 4, 1 / 16)
WIDTHS = (1, 2, 4, 8)  # times the proxy's
CONTROLS: tuple[tuple[ParameterizationName, str], ...] = (("sp", "density"), ("mup", "density"), ("sp", "width"))
CONTROL_SEEDS = 2  # chosen: a control's slope is off by far more than the difference between two seeds
# A constant rate without clipping: clipping would hide the size of a gradient
CONSTANT = {"schedule": "constant", "warmup_fraction": 0.0, "grad_clip": 0.0, **dict.fromkeys(WSD)}
TOKENS = 512  # chosen: positions per batch; fewer make single gradients noisy, more make the check slow
IMAGES = (
    128  # chosen: images per batch, of each of which one position has a loss; by 30 the losses of steps differ by .1
)


LAYOUT = "layout.yaml"

Subject = Spec | Proxy | Plan
Maker = Callable[[int], Plan]  # makes the plan of a seed number


@dataclass(slots=True)
class SlopeSweep:
    """Plans over one axis under one parameterization, `plans[r][z]` with seed number r at `sizes[z]`; the first size is the base.

    `makers` make a seed's plan at each size. `logits_slope` is the slope that the rules predict for the
    logits at step 1: over width they fall by 1/√m_d.
    """

    name: str
    axis: str
    makers: Mapping[float, Maker]
    is_control: bool = False
    logits_slope: float = 0.0
    writers: frozenset[str] = frozenset()  # the tensors that write the residual stream
    plans: list[list[Plan]] = field(default_factory=list)

    def grow(self, seeds: int) -> SlopeSweep:
        """Make the plans of this many seeds; a control gets no more than it needs."""
        wanted = min(seeds, CONTROL_SEEDS) if self.is_control else seeds
        self.plans += [[make(seed) for make in self.makers.values()] for seed in range(len(self.plans), wanted)]
        return self

    @property
    def label(self) -> str:
        return f"{self.name} over {self.word}"

    @property
    def word(self) -> str:
        """The axis in words: from the proxy to the plan it is the scale, width ÷ density."""
        return "scale" if self.axis == "plan" else self.axis

    @property
    def sizes(self) -> list[float]:
        return list(self.makers)

    @property
    def base(self) -> list[Plan]:
        return [plans[0] for plans in self.plans]


def sweeps_of(
    subject: Spec | Proxy | Plan,
    name: ParameterizationName = "supar",
    *,
    widths: Sequence[int] = (),
    densities: Sequence[Share] = (),
    seeds: int = 4,
    steps: int = 10,
    batch_size: int | None = None,
    lr_factor: float = 1.0,
    own: OwnShape | None = None,
) -> list[SlopeSweep]:
    """The sweeps that a check of a document needs, all rates times a factor. Raises InputError for what can't be planned.

    `own` is the model section of the proxy, where the model is a user's: see `with_layout`.
    """
    for width in widths:
        if not isinstance(width, int) or width < 1:
            raise InputError(f"width: {width!r}; expected a whole number above 0")
        if not own and not isinstance(subject, Plan) and width % subject.decoder.head_width:
            what = f"{width} is not a multiple of the proxy's head width {subject.decoder.head_width}"
            raise InputError(f"width: {what}; expected a multiple of it")
    whole = {
        "precision": "float32",
        "compile": "off",
        "cuda_graph": "off",
        "micro_batch_size": None,
        "loss_chunk_tokens": None,
    }
    hyper = subject.hyperparameters.model_copy(update={"lr": subject.hyperparameters.lr * lr_factor})
    subject = subject.model_copy(update={"run": subject.run.model_copy(update=whole), "hyperparameters": hyper})
    train = {"steps": steps, **CONSTANT}
    if not own:
        is_text = subject.decoder.data_kind == "tokens"
        train["batch_size"] = batch_size or (max(1, TOKENS // subject.decoder.context) if is_text else IMAGES)
    elif batch_size is not None:
        raise InputError(f"batch_size: {batch_size}; of a model of your own, --batches says how large its batches are")
    if not isinstance(subject, Plan):
        sweeps = _proxy_sweeps(subject, name, widths, densities, train)
    elif widths or densities or name != "supar":
        raise InputError(
            "a plan is checked as written; expected a proxy or a spec to vary width, density or parameterization"
        )
    else:
        rows = [row.model_copy(update={"lr": row.lr * lr_factor}) for row in subject.tensors]
        sweeps = _plan_sweeps(subject.model_copy(update={"tensors": rows}), train, own)
    for sweep in sweeps:
        sweep.grow(seeds)
        sweep.writers = writers_of(sweep.base[0], own)
    return sweeps


def with_layout(subject: Subject, path: str | None) -> tuple[Subject, OwnShape | None]:
    """The subject with all hashes filled in, and the model section of its proxy where the model is a user's.

    `path` is that of the layout: None: a proxy's own, and for a plan `layout.yaml`. Raises InputError, SetupError.
    """
    model = subject.model
    if isinstance(model, OwnModel):
        return subject, OwnShape(family="own", layout=path or LAYOUT, hash=model.layout, factory=model.factory)
    if not isinstance(model, OwnShape) and path is not None:
        raise InputError(f"layout: {path} is for a model of your own; expected none with the family {model.family}")
    if isinstance(model, OwnShape) and path is not None:
        subject = subject.model_copy(update={"model": model.model_copy(update={"layout": path})})
    subject = corpus.with_hash(subject)
    return subject, subject.model if isinstance(subject.model, OwnShape) else None


def _width_of(document: Layout) -> str:
    """The name among a layout's sizes that a check varies as the width: width, else the first that differs."""
    scale = (name for name, value in document.base.items() if document.wider[name] != value)
    return "width" if "width" in document.base else next(scale)


def writers_of(plan: Plan, own: OwnShape | None = None) -> frozenset[str]:
    """The tensors of a plan that write the residual stream."""
    if own is not None and isinstance(plan.model, OwnModel):
        tensors = own.read_layout().at(plan.model.target)
    else:
        tensors = layout.tensors(plan.decoder)
    return frozenset(tensor.name for tensor in tensors if tensor.writes_residual)


def parts(sweeps: list[SlopeSweep]) -> list[Part]:
    """What a check runs, for a dry run: each plan once, the largest first."""
    plans = {plan.hash(): plan for sweep in sweeps for row in sweep.plans for plan in row}
    return [Part("runs of the check", sorted(plans.values(), key=lambda plan: -plan.parameters), "at least ")]


def _proxy_sweeps(
    proxy: Spec | Proxy, own: ParameterizationName, widths: Sequence[int], densities: Sequence[Share], train: Record
) -> list[SlopeSweep]:
    """The parameterization over density, at the second largest width, and over width, dense; then the controls."""
    drawn, pattern_density = proxy.target.sparsity, density_of(proxy.target.sparsity.pattern)  # N:M has its own density
    densities = densities or (DENSITIES if pattern_density is None else (1.0, str(pattern_density)))
    try:
        densities = sorted(set(densities), key=lambda share: density_from("density", share), reverse=True)
    except ValueError as error:
        raise InputError(str(error)) from None
    document = proxy.model.read_layout() if isinstance(proxy.model, OwnShape) else None
    name_of_width = _width_of(document) if document else "width"
    base_width = document.base[name_of_width] if document else proxy.decoder.width
    widths = sorted(set(widths or [base_width * factor for factor in WIDTHS]))
    kept = ("model", "hyperparameters", "parameterization", "sparsity", "data", "run")
    fields = {key: getattr(proxy, key) for key in kept}
    base = Proxy(kind="supar.proxy/v1", train=proxy.train.model_copy(update=train), **fields)

    def plan(name: ParameterizationName, width: int, density: Share, seed: int) -> Plan:
        sparsity = Sparsity(density=density, pattern=drawn.pattern, block=drawn.block, distribution=drawn.distribution)
        size: Record = {"size": {name_of_width: width}} if document else {"width": width}
        target = Target(**size, sparsity=sparsity, seed=proxy.train.seed + seed)
        return transfer(base, target, name, allow_low_wpn=True, draw="positions")

    points: dict[str, dict[float, tuple[int, Share]]] = {
        "density": {float(literal(density)): (widths[-2:][0], density) for density in densities},
        "width": {float(width): (width, densities[0]) for width in widths},
    }
    axes = [axis for axis, at in points.items() if len(at) > 1]
    if not axes:
        raise InputError(
            "--density and --width: give one size each; expected at least two sizes of one of them, for a slope"
        )

    def sweep(name: ParameterizationName, axis: str, is_control: bool) -> SlopeSweep:
        makers = {size: partial(plan, name, *point) for size, point in points[axis].items()}
        return SlopeSweep(name, axis, makers, is_control, -0.5 if axis == "width" else 0.0)

    controls = [sweep(name, axis, True) for name, axis in CONTROLS if axis in axes and name != own]
    return [*(sweep(own, axis, False) for axis in axes), *controls]


def _plan_sweeps(plan: Plan, train: Record, shape: OwnShape | None) -> list[SlopeSweep]:
    """A plan as written, compared with SμPar's plans from its proxy: dense at the plan's shape, and the proxy itself.

    The control is SP's plan from that proxy at the plan's shape and density. Over density only the plan's numbers can
    change a size; from the proxy to the plan, narrow widths bend the slope too.
    """
    proxy, sparsity = _proxy_of(plan, train, shape), plan.sparsity
    small, whole, m_d = _shapes(plan, proxy)
    own_train = {**train, "warmup_steps": 0, "decay_steps": None}
    if plan.train.tokens is not None:
        own_train["tokens"] = train["steps"] * train["batch_size"] * plan.decoder.context

    def own(seed: int) -> Plan:
        changed = {**own_train, "seed": plan.train.seed + seed}
        return plan.model_copy(update={"train": plan.train.model_copy(update=changed)})

    def reference(name: ParameterizationName, size: Record, sparsity: Sparsity, seed: int) -> Plan:
        target = Target(sparsity=sparsity, seed=plan.train.seed + seed, **size)
        edition, draw = plan.parameterization.edition, plan.values.draw
        return transfer(proxy, target, name, allow_low_wpn=True, edition=edition, draw=draw)

    drawn = Sparsity(density=sparsity.density, pattern=sparsity.pattern, block=sparsity.block)
    supar_dense, sp_dense = (partial(reference, name, whole, proxy.sparsity) for name in ("supar", "sp"))
    base_density = float(literal(proxy.sparsity.density or 1.0))
    m_rho = sparsity.density / base_density
    sweeps = []
    if m_rho != 1:
        by_density: dict[float, Maker] = {base_density: supar_dense, sparsity.density: own}
        sp_by_density = {base_density: sp_dense, sparsity.density: partial(reference, "sp", whole, drawn)}
        sweeps = [SlopeSweep("the plan", "density", by_density), SlopeSweep("sp", "density", sp_by_density, True)]
    if m_d not in (1, m_rho):
        scale = m_d / m_rho
        by_scale: dict[float, Maker] = {1.0: partial(reference, "supar", small, proxy.sparsity), scale: own}
        fall = -0.5 * log2(m_d) / log2(scale)
        sweeps.append(SlopeSweep("the plan", "plan", by_scale, logits_slope=fall))
        if m_rho == 1:
            sp_by_scale = {1.0: partial(reference, "sp", small, proxy.sparsity), scale: sp_dense}
            sweeps.append(SlopeSweep("sp", "plan", sp_by_scale, is_control=True))
    if not sweeps:
        expected = "there is no slope to measure; check the proxy instead"
        raise InputError(f"the plan has its proxy's own width and density: {expected}")
    return sweeps


def _shapes(plan: Plan, proxy: Proxy) -> tuple[Record, Record, float]:
    """Keys of a target: of the proxy's shape, which differs from the plan's in width alone, and of the plan's; their ratio."""
    if isinstance(proxy.model, OwnShape) and isinstance(plan.model, OwnModel):
        document, size = proxy.model.read_layout(), plan.model.target
        name = _width_of(document)
        small = {**document.base, **{key: size[key] for key in size if key == LAYERS}}
        return {"size": small}, {"size": size}, size[name] / document.base[name]
    same = ("layers", "context") if plan.decoder.data_kind == "tokens" else ("layers",)
    of_width = ("width", "ffn_width", "heads", "kv_heads", "head_width")
    small, whole = ({key: getattr(plan.decoder, key) for key in keys} for keys in (same, (*of_width, *same)))
    return small, whole, plan.decoder.width / proxy.decoder.width


def _decoder_of(plan: Plan) -> Model:
    """The shape of a plan's proxy; its head width is the plan's where that divides its width."""
    base, model = decoder_base(plan), plan.decoder
    attention = base.attention_width or base.width
    heads = attention // model.head_width if attention % model.head_width == 0 else 1
    kv_heads = max(1, round(heads * base.kv_share))
    shape = {"width": base.width, "ffn_width": base.ffn_width, "heads": heads, "head_width": attention // heads}
    shape["kv_heads"] = kv_heads if heads % kv_heads == 0 else heads
    kind = ViT if isinstance(model, ViT) else Model
    return kind(**model.model_dump(include=kind.keys()) | shape)


def _proxy_of(plan: Plan, train: Record, shape: OwnShape | None) -> Proxy:
    """The proxy that a plan came from, as far as rules need it."""
    hidden = [row for row in plan.tensors if row.role == "hidden"]
    densities = {min(1.0, row.density / row.because["m_rho"]) for row in hidden}
    if max(densities) - min(densities) > 1e-6:
        raise InputError(
            "the plan's proxy has a different density per tensor; expected a plan of an evenly sparse proxy, or the proxy itself"
        )
    return Proxy(
        kind="supar.proxy/v1",
        model=shape or _decoder_of(plan),
        hyperparameters=plan.hyperparameters,
        parameterization=Options(**plan.parameterization.model_dump(include=Options.keys())),
        sparsity=Sparsity(density=max(densities), pattern=plan.sparsity.pattern, block=plan.sparsity.block),
        data=plan.data,
        train=Train(**plan.train.model_dump(include=Train.keys()) | train),
        run=plan.run,
    )
