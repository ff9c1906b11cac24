"""Document type of the plan: every number a training run needs, resolved per tensor."""

from __future__ import annotations

from typing import Any, Literal

from supar_cli.planning import layout
from supar_cli.planning.density import Block, Blocks, Pattern
from supar_cli.planning.document import content_hash
from supar_cli.planning.rules import Edition, ParameterizationName, Role
from supar_cli.planning.schema import Field, Section
from supar_cli.planning.spec import MOST_LAYERS, Distribution, Hyperparameters, Model, Options, Run, Train
from supar_cli.planning.spec import Data as Data  # re-exported: `training` reads plans, never specs
from supar_cli.planning.spec import Engine as Engine
from supar_cli.planning.spec import parse as parse


class Multipliers(Section):
    """Constant factors of the forward pass: embeddings, logits, q·k, residual branches."""

    input: float
    output: float
    attention: float
    residual: float


class PlanModel(Model):
    multipliers: Multipliers


class Base(Section):
    """The proxy's shape, from which the multipliers come."""

    width: int = Field(gt=0, le=2**31)
    ffn_width: int = Field(gt=0, le=2**31)
    layers: int = Field(gt=0, le=MOST_LAYERS)
    kv_share: float = Field(gt=0, le=1)
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)


class Parameterization(Options):
    name: ParameterizationName
    base: Base


class PlanSparsity(Blocks):
    """The target density and how it is spread and drawn."""

    density: float = Field(gt=0, le=1)
    sparsity: float = Field(ge=0, lt=1)
    pattern: Pattern
    block: Block | None = None
    distribution: Distribution
    overrides: dict[str, float] = Field(default_factory=dict)

    def fits(self) -> None:
        self.blocks_fit()

    @property
    def drawn(self) -> str:
        """The pattern in words."""
        return self.pattern if self.block is None else f"blocks of {self.block}"


class PlanTrain(Train):
    """As the spec's, with the length resolved. `tokens` = steps · batch_size · context."""

    tokens: int = Field(gt=0)
    warmup_steps: int = Field(ge=0)

    def fits(self) -> None:
        super().fits()
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} is more than the {self.steps} steps")


class PlanTensor(Section):
    """One tensor. `kept` is its number of live weights (its expectation for `bernoulli`); `because` the multipliers."""

    name: str
    role: Role
    shape: list[int] = Field(min_length=1, max_length=2)
    density: float = Field(gt=0, le=1)
    kept: int = Field(gt=0)
    init_std: float = Field(ge=0)
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    eps: float = Field(ge=0)
    because: dict[str, float]

    @property
    def size(self) -> int:
        return self.shape[0] * (self.shape[1] if len(self.shape) == 2 else 1)

    @property
    def wpn(self) -> float:
        """Weights per neuron: expected live weights feeding one output."""
        return self.shape[-1] * self.density

    def fits(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"shape: {self.shape} must be positive")
        if abs(self.kept - self.density * self.size) > 0.51:
            raise ValueError(f"kept: {self.kept} is not density {self.density} of {self.size} weights")
        for key, value in self.because.items():
            if value <= 0:
                raise ValueError(f"because.{key}: {value}; expected a multiplier above 0")
        if self.role != "hidden" and self.density != 1:
            raise ValueError(f"density: {self.density} on a tensor of role {self.role}; only hidden weights are sparse")


class Plan(Section):
    """`supar.plan/v1`."""

    kind: Literal["supar.plan/v1"]
    parents: dict[str, str] = Field(default_factory=dict)
    model: PlanModel
    parameterization: Parameterization
    hyperparameters: Hyperparameters
    sparsity: PlanSparsity
    tensors: list[PlanTensor] = Field(min_length=1)
    data: Data
    train: PlanTrain
    run: Run = Field(default_factory=Run)
    meta: dict[str, Any] = Field(default_factory=dict)

    def fits(self) -> None:
        train, context = self.train, self.model.context
        if train.tokens != train.steps * train.batch_size * context:
            raise ValueError(
                f"train.tokens: {train.tokens} is not {train.steps} steps of {train.batch_size} sequences of {context} tokens; "
                f"expected {train.steps * train.batch_size * context}"
            )
        share = self.sparsity.sparsity + self.sparsity.density
        if abs(share - 1) > 1e-9:
            raise ValueError(
                f"sparsity.density: {self.sparsity.density} and sparsity {self.sparsity.sparsity} don't add up to 1"
            )

        if self.model.layers > len(self.tensors):
            raise ValueError(f"model.layers: {self.model.layers} layers have more than the {len(self.tensors)} tensors")
        if isinstance(self.run.engine, dict):
            known = {key for tensor in layout.tensors(self.model) if tensor.role == "hidden" for key in tensor.keys}
            for name in self.run.engine:
                if name not in known:
                    raise ValueError(f"run.engine.{name}: no hidden tensor, site (`attn.q`), part (`attn`) or `hidden`")

    def engine(self, name: str) -> Engine:
        """What the run section says of a hidden tensor: by its name, site or part, or of all."""
        said = self.run.engine
        if not isinstance(said, dict):
            return said
        keys = next(tensor.keys for tensor in layout.tensors(self.model) if tensor.name == name)
        return next((said[key] for key in keys if key in said), "auto")

    def hash(self) -> str:
        """Identity of the experiment: everything but `run`, `meta` and where the data lie, which have a hash of their own."""
        return content_hash(self.experiment())

    def experiment(self) -> dict[str, Any]:
        """What decides the run's result, as plain data."""
        found = self.model_dump(exclude={"run", "meta"})
        if self.data.hash is not None:
            del found["data"]["source"]
        return found

    @property
    def name(self) -> str:
        """Name of the run directory this plan gets by default."""
        shape = f"w{self.model.width}-l{self.model.layers}-s{self.sparsity.sparsity:g}"
        return f"{self.parameterization.name}-{shape}-{self.hash()[7:15]}"

    @property
    def edition(self) -> Edition:
        """Of the rules that made this plan: since 2 a row names m_fan_out and m_out where they are not its m_d.

        2 where both editions give the same numbers, because the FFN's and the keys' share of the width are the proxy's.
        """
        base, model = self.parameterization.base, self.model
        same_ffn = model.ffn_width * base.width == base.ffn_width * model.width
        same_kv = abs(model.kv_heads / model.heads - base.kv_share) < 1e-9
        named = any("m_out" in row.because or "m_fan_out" in row.because for row in self.tensors)
        return 2 if named or (same_ffn and same_kv) else 1

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @property
    def live(self) -> int:
        return sum(tensor.kept for tensor in self.tensors)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward FLOPs as computed, zeros included: 6 a matrix weight, 12·layers·context·width for attention."""
        matrices = sum(tensor.size for tensor in self.tensors if tensor.role in ("hidden", "unembedding"))
        head = self.model.vocab * self.model.width if self.model.tied else 0
        return 6.0 * (matrices + head) + 12.0 * self.model.layers * self.model.context * self.model.width


def with_steps(plan: Plan, steps: int) -> Plan:
    """The plan for another number of steps, its warm-up the same share of them."""
    warmup = round(plan.train.warmup_steps * steps / plan.train.steps)
    tokens = steps * plan.train.batch_size * plan.model.context
    train = plan.train.model_copy(update={"steps": steps, "warmup_steps": warmup, "tokens": tokens})
    return plan.model_copy(update={"train": train})
