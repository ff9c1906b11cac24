"""Document type of the plan: every number a training run needs, resolved per tensor."""

from __future__ import annotations

from collections.abc import Collection
from math import nan, prod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from supar_cli.errors import InputError
from supar_cli.planning import layout
from supar_cli.planning.document import content_hash, read_file
from supar_cli.planning.patterns import Block, Pattern, PatternKeys, describe
from supar_cli.planning.problems import parse
from supar_cli.planning.rules import ParameterizationName, Role
from supar_cli.planning.schema import Field, Section
from supar_cli.planning.spec import MOST_LAYERS, Distribution, Hyperparameters, Model, Options, Run, Train
from supar_cli.planning.spec import Data as Data  # re-exported: `training` reads plans, never specs
from supar_cli.planning.spec import Engine as Engine

CURRENT_RULES: Literal[2] = 2  # the edition of the rules that new plans are made by; 1 is that of supar.plan/v1


class Multipliers(Section):
    """Constant factors of the forward pass: embeddings, logits, q·k, residual branches."""

    input: float
    output: float
    attention: float
    residual: float


class PlanModel(Model):
    """A decoder of supar's own families."""

    multipliers: Multipliers

    @property
    def label(self) -> str:
        """The shape in a few letters, as run directories are called."""
        return f"w{self.width}-l{self.layers}"

    @property
    def attention_flops_per_token(self) -> float:
        """Forward and backward FLOPs of q·k and of the mixing of values, as if no pair were masked."""
        return 12.0 * self.layers * self.context * self.width

    @property
    def tied_head_size(self) -> int:
        """Weights of a head that is the embedding, which no row of its own stands for."""
        return self.vocab * self.width if self.tied else 0


class OwnModel(Section):
    """A user's model: made by `factory` (`module:function`) at the size `target`, its tensors those of a layout.

    Its multipliers are folded into the numbers of its tensors.
    """

    family: Literal["own"]
    layout: str
    factory: str
    base: dict[str, int]
    target: dict[str, int]

    attention_flops_per_token: ClassVar[float] = 0.0  # not known; its products with weights are
    tied_head_size: ClassVar[int] = 0

    @property
    def label(self) -> str:
        return "-".join(["own", *(f"{name}{value}" for name, value in self.target.items())])


class Base(Section):
    """The proxy's shape and training, from which the multipliers come. Of a user's model only the training is known."""

    width: int | None = Field(default=None, gt=0, le=2**31)
    ffn_width: int | None = Field(default=None, gt=0, le=2**31)
    layers: int | None = Field(default=None, gt=0, le=MOST_LAYERS)
    kv_share: float | None = Field(default=None, gt=0, le=1)
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)

    @property
    def text(self) -> str:
        """The proxy's shape, as far as it is known."""
        if self.width is None:
            return "a model of your own;"
        return f"width {self.width}, FFN width {self.ffn_width}, layers {self.layers};"


class DecoderBase(NamedTuple):
    """The proxy's shape where it is a decoder of supar's own families."""

    width: int
    ffn_width: int
    layers: int
    kv_share: float


class Parameterization(Options):
    """The rules. `edition` is that of their formulas; it changes no number, which all are stored."""

    name: ParameterizationName
    base: Base
    edition: Literal[1, 2] = Field(default=1, neutral=True)


class MaskSource(Section):
    """Where masks come from: drawn from the seed, or read from a file whose hash is given."""

    kind: Literal["random", "file"] = "random"
    path: str | None = Field(default=None, neutral=True, omit=True)
    hash: str | None = Field(default=None, neutral=True, omit=True)

    def check(self) -> None:
        for key in ("path", "hash"):
            if (self.kind == "file") != (vars(self)[key] is not None):
                expected = "expected with kind: file" if self.kind == "random" else "is missing"
                raise ValueError(f"{key}: {expected}")

    def identity(self, *, include: Collection[str] | None = None, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Without the path: the hash says which masks they are."""
        return super().identity(include=include, exclude={"path", *exclude})


class PlanSparsity(PatternKeys):
    """The target density and how it is spread and drawn. `updates`: how masks change while training; null: they don't."""

    density: float = Field(gt=0, le=1)
    sparsity: float = Field(ge=0, lt=1)
    pattern: Pattern
    block: Block | None = Field(default=None, neutral=True, omit=True)
    distribution: Distribution
    overrides: dict[str, float] = Field(default_factory=dict)
    source: MaskSource = Field(default_factory=MaskSource, neutral=True)
    updates: None = Field(default=None, neutral=True)

    def check(self) -> None:
        self.check_pattern()

    @property
    def pattern_text(self) -> str:
        """The pattern in words."""
        return describe(self.pattern, self.block)


class Values(Section):
    """Where initial values come from. `draw: positions`: every position has its draw, whatever the mask."""

    source: Literal["random"] = "random"
    draw: Literal["positions"] = "positions"


class PlanTask(Section):
    """What is learned: the next token of text."""

    kind: Literal["next_token"] = "next_token"


class PlanTrain(Train):
    """As the spec's, with the length resolved. `tokens` = steps · batch_size · context, where a task has tokens."""

    tokens: int | None = Field(default=None, gt=0)
    warmup_steps: int = Field(ge=0)

    def check(self) -> None:
        super().check()
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} is more than the {self.steps} steps")


class PlanTensor(Section):
    """One tensor. `kept` is its number of live weights (its expectation for `bernoulli`); `because` the multipliers.

    `fan_in` and `base_fan_in` are the products of the extents along `fan_in_axes`, here and in the proxy. The start is
    `init_constant` or normal with deviation `init_std`. `fold` is a factor of the forward pass that was moved into these
    numbers. A tensor that is `tied_to` another is that one's memory and has no numbers of its own to follow.
    """

    name: str
    role: Role
    site: str
    block: int | None = Field(default=None, neutral=True, omit=True, ge=0)
    shape: list[int] = Field(min_length=1, max_length=layout.MOST_EXTENTS)
    fan_in_axes: list[int]
    fan_in: int = Field(gt=0)
    base_fan_in: int = Field(gt=0)
    density: float = Field(gt=0, le=1)
    kept: int = Field(gt=0)
    init_std: float | None = Field(default=None, neutral=True, omit=True, ge=0)
    init_constant: float | None = Field(default=None, neutral=True, omit=True)
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    eps: float = Field(ge=0)
    fold: float | None = Field(default=None, neutral=True, omit=True, gt=0)
    tied_to: str | None = Field(default=None, neutral=True, omit=True)
    because: dict[str, float]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def setting_names(self) -> tuple[str, ...]:
        """What settings by tensor may call it, the most specific first."""
        return layout.setting_names(self.name, self.site, self.role)

    @property
    def wpn(self) -> float:
        """Weights per neuron: expected live weights feeding one output."""
        return self.fan_in * self.density

    def check(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"shape: {self.shape} must be positive")
        layout.check_axes(self.fan_in_axes, len(self.shape))
        if self.fan_in != prod(self.shape[axis] for axis in self.fan_in_axes):
            raise ValueError(
                f"fan_in: {self.fan_in} is not the product of {self.shape} along the axes {self.fan_in_axes}"
            )
        if self.role == "hidden" and not self.fan_in_axes:
            raise ValueError("fan_in_axes: none; expected the axes that the product of a hidden weight sums over")
        if abs(self.kept - self.density * self.size) > 0.51:
            raise ValueError(f"kept: {self.kept} is not density {self.density} of {self.size} weights")
        if (self.init_std is None) == (self.init_constant is None):
            raise ValueError("init_std: expected either init_std or init_constant")
        for key, value in self.because.items():
            if value <= 0:
                raise ValueError(f"because.{key}: {value}; expected a multiplier above 0")
        if self.role != "hidden" and self.density != 1:
            raise ValueError(f"density: {self.density} on a tensor of role {self.role}; only hidden weights are sparse")


# keys of a row that follow from the model's own section in supar's families, where `Plan.check` holds them to it
_DERIVED = ("site", "block", "fan_in_axes", "fan_in", "base_fan_in")


class Plan(Section):
    """`supar.plan/v2`."""

    EARLIER: ClassVar[dict[str, Any]] = {"supar.plan/v1": lambda data: _from_v1(data)}
    WHOLE_SECTIONS = ("model", "hyperparameters", "parameterization", "sparsity", "train", "data")

    kind: Literal["supar.plan/v2"]
    parents: dict[str, str] = Field(default_factory=dict)
    model: PlanModel | OwnModel
    parameterization: Parameterization
    hyperparameters: Hyperparameters
    sparsity: PlanSparsity
    values: Values = Field(default_factory=Values, neutral=True)
    tensors: list[PlanTensor] = Field(min_length=1)
    task: PlanTask = Field(default_factory=PlanTask, neutral=True)
    data: Data
    train: PlanTrain
    run: Run = Field(default_factory=Run)
    meta: dict[str, Any] = Field(default_factory=dict)

    def check(self) -> None:
        share = self.sparsity.sparsity + self.sparsity.density
        if abs(share - 1) > 1e-9:
            raise ValueError(
                f"sparsity.density: {self.sparsity.density} and sparsity {self.sparsity.sparsity} don't add up to 1"
            )
        if isinstance(self.model, PlanModel):
            self._check_decoder(self.model)
        if isinstance(self.run.engine, dict):
            known = {key for row in self.tensors if row.role == "hidden" for key in row.setting_names}
            for name in self.run.engine:
                if name not in known:
                    raise ValueError(f"run.engine.{name}: no hidden tensor, site (`attn.q`), part (`attn`) or `hidden`")

    def _check_decoder(self, model: PlanModel) -> None:
        """Hold what follows from the model section to it. Raises ValueError."""
        train, tokens = self.train, self.train.steps * self.train.batch_size * model.context
        if train.tokens != tokens:
            raise ValueError(
                f"train.tokens: {train.tokens} is not {train.steps} steps of {train.batch_size} sequences of {model.context} "
                f"tokens; expected {tokens}"
            )
        base = self.parameterization.base
        for key in ("width", "ffn_width", "layers", "kv_share"):
            if vars(base)[key] is None:
                raise ValueError(f"parameterization.base.{key}: is missing")
        if model.layers > len(self.tensors):
            raise ValueError(f"model.layers: {model.layers} layers have more than the {len(self.tensors)} tensors")
        derived = derived_keys(model, base)
        for at, row in enumerate(self.tensors):
            for key, value in derived.get(row.name, {}).items():
                if vars(row)[key] != value:
                    raise ValueError(
                        f"tensors.{at}.{key}: {vars(row)[key]}; the model's shape gives {value} to {row.name}"
                    )

    @property
    def decoder(self) -> PlanModel:
        """The model section of supar's own families. Raises InputError for a user's model, which has no such shape."""
        if isinstance(self.model, PlanModel):
            return self.model
        raise InputError("model.family: own: this needs a model of supar's own families, gpt2 or llama")

    def engine(self, row: PlanTensor) -> Engine:
        """What the run section says of a hidden tensor: by its name, site or part, or of all."""
        engine = self.run.engine
        if not isinstance(engine, dict):
            return engine
        return next((engine[key] for key in row.setting_names if key in engine), "auto")

    def hash(self) -> str:
        """Identity of the experiment: everything but `run`, `meta` and where the data lie, which have a hash of their own."""
        return content_hash(self.experiment())

    def experiment(self) -> dict[str, Any]:
        """What decides the run's result, as plain data.

        Of supar's own families in the form of supar.plan/v1, extended by what that could not say: the same experiment
        has the same hash as when it was written there.
        """
        found = self.identity(exclude={"run", "meta"})
        found["parameterization"].pop("edition", None)  # the numbers are all here, whoever worked them out
        if self.data.hash is not None:
            del found["data"]["source"]
        if isinstance(self.model, PlanModel):
            found["kind"] = "supar.plan/v1"
            for row in found["tensors"]:
                for key in _DERIVED:
                    row.pop(key, None)
                if row.get("init_constant", nan) == _constant_of_v1(row["role"]):
                    del row["init_constant"]
                    row["init_std"] = 0.0
        return found

    @property
    def name(self) -> str:
        """Name of the run directory this plan gets by default."""
        shape = f"{self.model.label}-s{self.sparsity.sparsity:g}"
        return f"{self.parameterization.name}-{shape}-{self.hash()[7:15]}"

    @property
    def parameters(self) -> int:
        return sum(row.size for row in self.tensors if row.tied_to is None)

    @property
    def live(self) -> int:
        return sum(row.kept for row in self.tensors if row.tied_to is None)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward FLOPs as computed, zeros included: 6 a weight in a product, and those of attention."""
        products = sum(row.size for row in self.tensors if row.fan_in_axes) + self.model.tied_head_size
        return 6.0 * products + self.model.attention_flops_per_token


def decoder_base(plan: Plan) -> DecoderBase:
    """The shape of a plan's proxy. Raises InputError for a user's model, which has no such shape."""
    _, base = plan.decoder, plan.parameterization.base
    assert base.width and base.ffn_width and base.layers and base.kv_share  # `Plan.check` has seen to that
    return DecoderBase(base.width, base.ffn_width, base.layers, base.kv_share)


def derived_keys(model: Model, base: Base) -> dict[str, dict[str, Any]]:
    """By a tensor's name, what the shapes of a decoder and of its proxy say of it: `_DERIVED`."""
    # the proxy's fan-ins by site depend on its two widths only
    shape = {"width": base.width, "ffn_width": base.ffn_width, "layers": 1, "heads": 1, "kv_heads": 1}
    base_fan_in = {tensor.site: tensor.fan_in for tensor in layout.tensors(model.model_copy(update=shape))}
    return {
        tensor.name: {
            "site": tensor.site,
            "block": tensor.block,
            "fan_in_axes": list(tensor.fan_in_axes),
            "base_fan_in": base_fan_in[tensor.site],
        }
        for tensor in layout.tensors(model)
    }


def _constant_of_v1(role: str) -> float | None:
    """Where supar.plan/v1 writes init_std 0: every gain starts at 1, every bias at 0."""
    return {"norm": 1.0, "bias": 0.0}.get(role)


def _from_v1(data: dict[str, Any]) -> dict[str, Any]:
    """A plan of supar.plan/v1 in today's form: the same run, by the first edition of the rules.

    What is not as it should be stays as it is, for the validation that follows to name.
    """
    found = {**data, "kind": "supar.plan/v2"}
    model, parameterization, tensors = data.get("model"), data.get("parameterization"), data.get("tensors")
    if isinstance(parameterization, dict):
        found["parameterization"] = {**parameterization, "edition": 1}
    if not isinstance(tensors, list):
        return found
    derived: dict[str, dict[str, Any]] = {}
    try:
        assert isinstance(model, dict) and isinstance(parameterization, dict)
        shape = Model.model_validate({key: value for key, value in model.items() if key != "multipliers"})
        if shape.layers <= len(tensors):
            derived = derived_keys(shape, Base.model_validate(parameterization["base"]))
    except (ValueError, AssertionError, KeyError, TypeError):
        pass
    found["tensors"] = [_row_from_v1(row, derived) if isinstance(row, dict) else row for row in tensors]
    return found


def _row_from_v1(row: dict[str, Any], derived: dict[str, dict[str, Any]]) -> dict[str, Any]:
    shape, name = row.get("shape"), row.get("name")
    extents = shape if isinstance(shape, list) and shape and all(type(extent) is int for extent in shape) else [1]
    own = derived.get(name if isinstance(name, str) else "")
    if own is None:  # of no tensor of the model, which training refuses by name
        axes = [len(extents) - 1] if row.get("role") in ("hidden", "unembedding") else []
        own = {"site": name, "block": None, "fan_in_axes": axes, "base_fan_in": 1}
    fan_in = prod(extents[axis] for axis in own["fan_in_axes"] if axis < len(extents))
    found = {**own, "fan_in": max(fan_in, 1), **row}
    role = row.get("role")
    constant = _constant_of_v1(role) if isinstance(role, str) else None
    if row.get("init_std") == 0 and constant is not None:
        del found["init_std"]
        found["init_constant"] = constant
    return found


def read_plan(path: Path) -> Plan:
    """The plan in a file, of today's kind or of an earlier one. Raises InputError with every problem in it."""
    return parse(Plan, read_file(str(path))[0])


def with_steps(plan: Plan, steps: int) -> Plan:
    """The plan for another number of steps, its warm-up the same share of them."""
    warmup = round(plan.train.warmup_steps * steps / plan.train.steps)
    tokens = None if plan.train.tokens is None else plan.train.tokens // plan.train.steps * steps
    train = plan.train.model_copy(update={"steps": steps, "warmup_steps": warmup, "tokens": tokens})
    return plan.model_copy(update={"train": train})
