"""The sections of a plan: model, rules, sparsity, values, task, training, and the row of a tensor."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Literal

from supar_cli.planning import layout
from supar_cli.planning.patterns import DRAWN_LIVE, Block, BlockRows, Draw, Pattern, PatternKeys, describe
from supar_cli.planning.rules import Edition, ParameterizationName, Role
from supar_cli.planning.schema import Field, Section
from supar_cli.planning.spec import MOST_LAYERS, Distribution, Model, Options, Train, ViT
from supar_cli.planning.updates import METHODS, PlanUpdates


class Multipliers(Section):
    """Constant factors of the forward pass: embeddings, logits, q·k, residual branches."""

    input: float
    output: float
    attention: float
    residual: float


class PlanModel(Model):
    """A transformer of supar's own families."""

    multipliers: Multipliers

    @property
    def label(self) -> str:
        """The shape in a few letters, for the names of run directories."""
        return f"w{self.width}-l{self.layers}"

    @property
    def shape_text(self) -> str:
        """The shape in words."""
        return f"width {self.width}, {self.layers} layer{'s' * (self.layers > 1)}"

    @property
    def attention_flops_per_token(self) -> float:
        """Forward and backward FLOPs of q·k and of the mixing of values, as if no pair were masked."""
        return 12.0 * self.layers * self.context * self.attention_width

    @property
    def tied_head_size(self) -> int:
        """Number of weights of a head that is the embedding; it has no row of its own."""
        return self.vocab * self.width if self.tied else 0

    def positions_of(self, role: Role) -> int:
        """How many positions of a row the weights of a role multiply."""
        return self.context


class PlanViT(ViT, PlanModel):
    """A vision transformer."""

    def positions_of(self, role: Role) -> int:
        return {"embedding": self.patches, "unembedding": 1}.get(role, self.context)


class OwnModel(Section):
    """A user's model: made by `factory` (`module:function`) at the size `target`, its tensors those of a layout.

    Its multipliers are folded into the numbers of its tensors. `hooks` are those that can't be: factors on the inputs of
    modules by name, and under `""` on the logits, which the user's own forward pass has to apply.
    """

    family: Literal["own"]
    layout: str
    factory: str | None
    base: dict[str, int]
    target: dict[str, int]
    hooks: dict[str, float] = Field(default_factory=dict, neutral=True, omit=True)
    ignored: list[str] = Field(default_factory=list, neutral=True, omit=True)  # parameters that stay as they are

    def check(self) -> None:
        if not self.target or set(self.target) != set(self.base):
            raise ValueError(f"target: {self.target}; expected the same names as base: {', '.join(self.base)}")
        for name, value in self.target.items():
            if not name.isidentifier() or value < 1:
                raise ValueError(f"target.{name}: {value}; expected a word and a whole number above 0")

    attention_flops_per_token: ClassVar[float] = 0.0  # not known for a user's model; only its products with weights are
    tied_head_size: ClassVar[int] = 0
    data_kind: ClassVar[str] = "rows"
    rows: ClassVar[str] = "rows"
    loss_unit: ClassVar[str] = "as the script has them"

    @property
    def shape_text(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.target.items())

    @property
    def label(self) -> str:
        return "-".join(["own", *(f"{name}{value}" for name, value in self.target.items())])


class Base(Section):
    """The proxy's shape and training, from which the multipliers come. Of a user's model only the training is known."""

    UNHASHED = ("context", "clipped_share")  # what warnings compare; no number of the plan comes from them

    width: int | None = Field(default=None, gt=0, le=2**31)
    ffn_width: int | None = Field(default=None, gt=0, le=2**31)
    layers: int | None = Field(default=None, gt=0, le=MOST_LAYERS)
    kv_share: float | None = Field(default=None, gt=0, le=1)
    attention_width: int | None = Field(default=None, neutral=True, omit=True, gt=0, le=2**31)  # None: the width
    context: int | None = Field(default=None, neutral=True, omit=True, gt=0)  # None: the plan's own
    clipped_share: float | None = Field(default=None, neutral=True, omit=True, ge=0, le=1)  # of steps; None: not known
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)

    @property
    def text(self) -> str:
        """The proxy's shape, as far as it is known."""
        if self.width is None:
            return "a model of your own;"
        attention = f" attention width {self.attention_width}," if self.attention_width else ""
        return f"width {self.width}, FFN width {self.ffn_width},{attention} layers {self.layers};"


class DecoderBase(Base):
    """The proxy's shape where it is a decoder of supar's own families: all of it is known."""

    width: int
    ffn_width: int
    layers: int
    kv_share: float


class Parameterization(Options):
    """The rules. `edition` is that of their formulas; no number depends on it, as all are stored."""

    name: ParameterizationName
    base: Base
    edition: Edition = Field(default=1, neutral=True)


def _check_file(section: MaskSource | Values, key: str) -> None:
    """Raise ValueError unless a file is named exactly where the key says `file`."""
    is_file = vars(section)[key] == "file"
    for name in ("path", "hash"):
        if is_file != (vars(section)[name] is not None):
            what = "is missing" if is_file else f"is given; expected it with {key}: file only"
            raise ValueError(f"{name}: {what}")


class MaskSource(Section):
    """Where masks come from: drawn from the seed, or read from a file whose hash is given."""

    UNHASHED = ("path",)  # the hash says which masks they are

    kind: Literal["random", "file"] = "random"
    path: str | None = Field(default=None, neutral=True, omit=True)
    hash: str | None = Field(default=None, neutral=True, omit=True)

    def check(self) -> None:
        _check_file(self, "kind")


class PlanSparsity(PatternKeys):
    """The target density and how it is spread and drawn. `updates`: how masks change while training; null: they don't."""

    density: float = Field(gt=0, le=1)
    sparsity: float = Field(ge=0, lt=1)
    pattern: Pattern
    block: Block | None = Field(default=None, neutral=True, omit=True)
    block_rows: BlockRows = Field(default="random", neutral=True, omit=True)  # random: as older plans were drawn
    draw: Draw = Field(default="positions", neutral=True, omit=True)
    distribution: Distribution
    overrides: dict[str, float] = Field(default_factory=dict)
    source: MaskSource = Field(default_factory=MaskSource, neutral=True)
    updates: PlanUpdates | None = Field(default=None, neutral=True)

    def check(self) -> None:
        super().check()
        if self.block_rows == "even" and self.block is None:
            raise ValueError(f"block_rows: even with the pattern {self.pattern}; expected the pattern block")
        if self.draw == "live" and self.pattern not in DRAWN_LIVE:
            raise ValueError(f"draw: live with the pattern {self.pattern}; expected one of {', '.join(DRAWN_LIVE)}")
        if self.updates is None:
            return
        if self.pattern != "exact":
            raise ValueError(f"updates: can't be combined with the pattern {self.pattern}; expected the pattern exact")
        if self.updates.start is not None and self.source.kind == "file":
            name = METHODS[self.updates.method]
            raise ValueError(
                f"updates: {name} starts at density {self.updates.start:g}; expected no masks from a file, or updates: null"
            )

    @property
    def pattern_text(self) -> str:
        """The pattern in words."""
        return describe(self.pattern, self.block)


class Values(Section):
    """Where initial values come from: drawn, or read from a file of tensors by name, of a masked one its live values.

    `draw: positions`: every position has its draw, whatever the mask; `live`: live weights alone do, in row-major order.
    Where all weights live the two are the same. `scale: energy` says that the file's values of masked tensors were
    multiplied so that they have the energy from before pruning (each row's `because.g`). `model` is where the model was that
    the file's values are of.
    """

    UNHASHED = ("path", "model")

    source: Literal["random", "file"] = "random"
    draw: Draw = Field(default="positions", neutral=True)
    path: str | None = Field(default=None, neutral=True, omit=True)
    hash: str | None = Field(default=None, neutral=True, omit=True)
    scale: Literal["none", "energy"] = Field(default="none", neutral=True, omit=True)
    model: str | None = Field(default=None, neutral=True, omit=True)

    @property
    def text(self) -> str:
        """Where they come from, in words."""
        scaled = ", live weights scaled by g to keep each tensor's energy" if self.scale == "energy" else ""
        model = f", those of the model at {self.model}" if self.model else ""
        return "drawn" if self.path is None else f"of {self.path}{model}{scaled}"

    def check(self) -> None:
        _check_file(self, "source")
        if self.scale != "none" and self.source != "file":
            raise ValueError(f"scale: {self.scale}; expected it with source: file only")


class PlanTask(Section):
    """What is learned: the next token of text, the class of an image, or what the training script of an own model says."""

    kind: Literal["next_token", "classification", "own"] = "next_token"


class PlanTrain(Train):
    """As the spec's, with the length resolved. `tokens` = steps · batch_size · context, where a task has tokens."""

    tokens: int | None = Field(default=None, gt=0)
    warmup_steps: int = Field(ge=0)
    decay_steps: int | None = Field(default=None, neutral=True, omit=True, ge=0)

    def check(self) -> None:
        super().check()
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} is more than the {self.steps} steps")
        if (self.decay_steps is None) == (self.schedule == "wsd"):
            raise ValueError(f"decay_steps: {self.decay_steps} with the schedule {self.schedule}; expected it with wsd")
        if self.warmup_steps + (self.decay_steps or 0) > self.steps:
            raise ValueError(f"decay_steps: {self.decay_steps} and the warm-up are more than the {self.steps} steps")


class PlanTensor(Section):
    """One tensor. `kept` is its number of live weights (its expectation for `bernoulli`); `because` the multipliers.

    `fan_in` and `base_fan_in` are the products of the extents along `fan_in_axes`, here and in the proxy. The start is
    `init_constant` or normal with deviation `init_std`; with `init: own` it is that of the model's constructor, scaled so
    that its root mean square is `init_std`; with `init: file` it is in the plan's file of values, whose root mean square
    `init_std` is. `fold` is a factor of the forward pass that was moved into these numbers. A tensor that is `tied_to`
    another shares its memory, and its own numbers are not used.
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
    init: Literal["normal", "own", "file"] = Field(default="normal", neutral=True, omit=True)
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
    def wpn(self) -> float:
        """Weights per neuron: expected live weights feeding one output."""
        return self.fan_in * self.density

    def check(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"shape: {self.shape}; expected extents of 1 or more")
        layout.check_axes(self.fan_in_axes, len(self.shape), self.role)
        if self.fan_in != prod(self.shape[axis] for axis in self.fan_in_axes):
            raise ValueError(f"fan_in: {self.fan_in}; expected the product of {self.shape} at axes {self.fan_in_axes}")
        if abs(self.kept - self.density * self.size) > 0.51:
            raise ValueError(
                f"kept: {self.kept}; expected {self.density * self.size:.0f}, density {self.density} of {self.size} weights"
            )
        if (self.init_std is None) == (self.init_constant is None):
            raise ValueError("init_std: expected either init_std or init_constant")
        if self.init == "file" and self.init_std is None:
            raise ValueError("init_std: is missing; expected the root mean square of the file's values")
        for key, value in self.because.items():
            if value <= 0:
                raise ValueError(f"because.{key}: {value}; expected a multiplier above 0")
        if self.role != "hidden" and self.density != 1:
            raise ValueError(f"density: {self.density} on a tensor of role {self.role}; only hidden weights are sparse")
        if self.tied_to == self.name:
            raise ValueError(f"tied_to: {self.tied_to}, the tensor itself; expected another tensor of the plan")
        if self.role == "norm" and self.init_std is not None and self.init == "normal":
            raise ValueError(f"init_std: {self.init_std}; expected init_constant: a gain starts at a number")


def derived_keys(model: Model, base: Base) -> dict[str, dict[str, Any]]:
    """The keys of a row that follow from the shapes of a decoder and of its proxy, by the tensor's name."""
    # the proxy's fan-ins by site depend on its three widths only
    shape = {"width": base.width, "ffn_width": base.ffn_width, "layers": 1, "heads": 1, "kv_heads": 1}
    shape["head_width"] = base.attention_width or base.width
    narrow = {tensor.site: tensor.fan_in for tensor in layout.tensors(model.model_copy(update=shape))}
    found: dict[str, dict[str, Any]] = {}
    for tensor in layout.tensors(model):
        site, axes = {"site": tensor.site, "block": tensor.block}, {"fan_in_axes": list(tensor.fan_in_axes)}
        found[tensor.name] = {**site, **axes, "base_fan_in": narrow[tensor.site]}
    return found
