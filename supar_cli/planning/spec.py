"""Document types a user starts from: the spec (what to tune) and the proxy (what was found), and the sections they share."""

from __future__ import annotations

from collections.abc import Collection
from math import gcd
from typing import Any, ClassVar, Literal

from supar_cli.errors import InputError, suggestion
from supar_cli.planning.data_section import Data as Data  # re-exported: a section of these documents
from supar_cli.planning.density import Share, density_from
from supar_cli.planning.document import content_hash
from supar_cli.planning.patterns import Block, Pattern, PatternKeys
from supar_cli.planning.problems import validate
from supar_cli.planning.rules import DecayRule, DepthRule, Optimizer, ResidualInit, UnembeddingInit
from supar_cli.planning.schema import Field, Section

Family = Literal["gpt2", "llama"]
Engine = Literal["auto", "dense", "sparse", "block"]
Distribution = Literal["uniform", "erk"]

MOST_LAYERS = 10_000  # chosen: ten times the deepest transformer trained; a plan has a line for each layer's tensors

FAMILY_PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layernorm", "activation": "gelu", "positions": "learned"},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope"},
}


class Model(Section):
    """Shape of a decoder-only transformer. What is left out follows from the family and the width, and is written out."""

    family: Family
    width: int = Field(gt=0, le=2**31)
    layers: int = Field(gt=0, le=MOST_LAYERS)
    heads: int = Field(gt=0, le=2**31)
    kv_heads: int = Field(gt=0, le=2**31)
    ffn_width: int = Field(gt=0, le=2**31)
    context: int = Field(gt=0, le=2**31)
    vocab: int = Field(gt=1, le=2**31)
    head_width: int = Field(default=None, neutral=True, gt=0, le=2**31)  # never None in a valid section
    norm: Literal["layernorm", "rmsnorm"]
    activation: Literal["gelu", "gelu_tanh", "swiglu"]
    positions: Literal["learned", "rope", "alibi"]
    bias: bool = False
    tied: bool = True
    norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)

    @classmethod
    def fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = {**FAMILY_PARTS.get(str(data.get("family")), FAMILY_PARTS["gpt2"]), **data}
        # where the key it follows from is wrong, a filled-in value is not reported as a second mistake
        heads, width = (found if isinstance(found := filled.get(key), int) else 1 for key in ("heads", "width"))
        filled.setdefault("kv_heads", max(1, heads))
        filled.setdefault("ffn_width", 4 * max(1, width))
        if filled.get("head_width") is None and width % max(1, heads) == 0:
            filled["head_width"] = max(1, width // max(1, heads))
        return filled

    def check(self) -> None:
        if self.head_width is None:
            what = f"heads: {self.heads} heads don't divide the width {self.width}"
            raise ValueError(f"{what}; expected a divisor of it, or head_width")
        if self.attention_width > 2**31:
            raise ValueError(f"head_width: {self.heads} heads of {self.head_width} are wider than {2**31}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} don't divide the {self.heads} heads; expected a divisor")
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"heads: rope positions need an even head width, not {self.head_width}")

    def model_dump(self, *, exclude: Collection[str] = (), **options: Any) -> dict[str, Any]:
        """As every section's; documents and hashes leave the head width out where it is the usual one, width / heads."""
        usual = {"head_width"} if self.attention_width == self.width else set()
        return super().model_dump(exclude={*exclude, *usual}, **options)

    @property
    def attention_width(self) -> int:
        """Extent of the queries and of the output projection's input: that of all heads together."""
        return self.heads * self.head_width

    @property
    def width_step(self) -> int:
        """The widths with as many heads per width, in whole heads, are the multiples of this one."""
        return self.width // gcd(self.width, self.heads)


class Hyperparameters(Section):
    """What is tuned on the proxy and holds for every target."""

    lr: float = Field(gt=0)
    init_std: float = Field(gt=0)
    alpha_input: float = Field(gt=0)
    alpha_output: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    eps: float = Field(default=1e-8, gt=0)


class Options(Section):
    """The options of the rules, without the parameterization's name."""

    weight_decay_rule: DecayRule = "independent"
    depth_rule: DepthRule = "none"
    residual_init: ResidualInit = "none"
    unembedding_init: UnembeddingInit = "normal"

    def check(self) -> None:
        if self.depth_rule == "completep" and self.residual_init == "gpt2":
            raise ValueError("residual_init: gpt2 scales the residual branches again; expected none with completep")


# what the schedule wsd has by default: the cooldown that Hägele et al. 2024 (arXiv 2405.18392) recommend, a fifth of the
# steps falling as 1 - √; MiniCPM (Hu et al. 2024, arXiv 2404.06395), which named it, has a tenth and an exponential
DecayShape = Literal["sqrt", "linear", "cosine", "exponential"]
WSD = {"decay_fraction": 0.2, "decay_shape": "sqrt"}


class Train(Section):
    """All settings of the training loop that change a loss. `batch_size` counts sequences, over all devices."""

    optimizer: Optimizer = "adamw"
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.95], min_length=2, max_length=2)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    decay_fraction: float | None = Field(default=None, neutral=True, omit=True, ge=0, le=1)  # of the steps, under wsd
    decay_shape: DecayShape | None = Field(default=None, neutral=True, omit=True)
    grad_clip: float = Field(default=1.0, ge=0)
    eval_every: int = Field(default=100, gt=0)
    eval_batches: int = Field(default=8, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @classmethod
    def fill_defaults(cls, data: Any) -> Any:
        return {**WSD, **data} if isinstance(data, dict) and data.get("schedule") == "wsd" else data

    def check(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas}; expected two numbers in [0, 1)")
        for key in WSD:
            if (vars(self)[key] is None) == (self.schedule == "wsd"):
                expected = "expected a value" if self.schedule == "wsd" else "expected it with schedule: wsd only"
                raise ValueError(f"{key}: {vars(self)[key]} with the schedule {self.schedule}; {expected}")
        if self.decay_fraction is not None and self.warmup_fraction + self.decay_fraction > 1 + 1e-9:
            raise ValueError(f"decay_fraction: {self.decay_fraction} and the warm-up are more than the whole run")
        if self.decay_shape == "exponential" and self.final_lr_fraction == 0:
            raise ValueError("final_lr_fraction: 0; an exponential decay never gets there, expected a number above 0")


class Run(Section):
    """Where and how a plan is executed: never a number that changes the result but for rounding."""

    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    engine: Engine | dict[str, Engine] = "auto"  # in a plan also by tensor, site or part; what is not named is `auto`
    micro_batch_size: int | None = Field(default=None, gt=0)
    loss_chunk_tokens: int | None = Field(default=None, neutral=True, omit=True, gt=0)  # logits at a time; None: all
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"  # how several processes hold the model; one holds it whole
    log_every: int = Field(default=10, gt=0)
    checkpoint_every: int = Field(default=1000, gt=0)
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list)
    keep: int = Field(default=2, gt=0)  # chosen: the newest checkpoint, and the one before in case it is damaged
    # what trains a plan of a user's model, and how long it may report nothing; None: there is none, and no limit
    command: str | None = Field(default=None, neutral=True, omit=True)
    timeout_s: float | None = Field(default=None, neutral=True, omit=True, gt=0)

    def check(self) -> None:
        if self.command is not None and "{plan}" not in self.command:
            expected = "expected {plan} where the file of each trial's plan goes"
            raise ValueError(f"command: {self.command!r}; {expected}, such as python train.py {{plan}}")


class Sparsity(PatternKeys):
    """Which hidden weights live. Give `sparsity` or `density`; `overrides` are densities by tensor, site or part.

    A number in its place is the sparsity.
    """

    SHORT = "sparsity"

    sparsity: Share | None = None
    density: Share | None = None
    pattern: Pattern = "exact"
    block: Block | None = Field(default=None, neutral=True, omit=True)
    distribution: Distribution = "uniform"
    overrides: dict[str, Share] = Field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if self.sparsity is not None and self.density is not None:
            raise ValueError("density: sparsity is given too; expected only one of them")
        for word, given in (("sparsity", self.sparsity), ("density", self.density)):
            if given is not None:
                density_from(word, given)
        for key, value in self.overrides.items():
            density_from("density", value, f"overrides.{key}")


# the keys of its section that a changed value drops unless they are given too, as they belonged to the old value
_LENGTHS = ("steps", "tokens", "tokens_per_parameter")
DROPPED_BY = {
    "width": ("heads", "kv_heads", "ffn_width"),  # a target's own head count and FFN width belong to its own width
    **{name: _LENGTHS for name in _LENGTHS},
    "sparsity": ("density",),
    "density": ("sparsity",),
    "pattern": ("block",),
    "source": ("hash", "sources"),
    **{name: ("hash",) for name in ("format", "tokenizer", "field", "dtype", "encoding", "separator")},
}


def override(section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A section's data with the changes that are not None; the keys that these drop are set to None."""
    given = {name: value for name, value in changes.items() if value is not None}
    dropped = {name for changed in given for name in DROPPED_BY.get(changed, ()) if name not in given}
    if given.get("pattern") == "block":  # a document's own blocks go with its pattern
        dropped.discard("block")
    return {**section, **{name: None for name in dropped if name in section}, **given}


class Target(Section):
    """What `supar transfer` plans unless flags say otherwise. None means the proxy's value."""

    width: int | None = Field(default=None, gt=0, le=2**31)
    layers: int | None = Field(default=None, gt=0, le=MOST_LAYERS)
    heads: int | None = Field(default=None, gt=0, le=2**31)
    kv_heads: int | None = Field(default=None, gt=0, le=2**31)
    ffn_width: int | None = Field(default=None, gt=0, le=2**31)
    head_width: int | None = Field(default=None, neutral=True, omit=True, gt=0, le=2**31)
    context: int | None = Field(default=None, gt=0, le=2**31)
    batch_size: int | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    tokens_per_parameter: float | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    sparsity: Sparsity = Field(default_factory=Sparsity)

    def check(self) -> None:
        given = [word for word in ("steps", "tokens", "tokens_per_parameter") if getattr(self, word) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: {given[0]} is given too; expected only one length of training")

    def override(self, **changes: Any) -> Target:
        """The target with some of its keys, or of its `sparsity`'s, changed; see DROPPED_BY for what they drop.

        Raises InputError for an unknown key and for values that are not valid.
        """
        known = [*Target.keys(), *Sparsity.keys()]
        if unknown := [name for name in changes if name not in known]:
            raise InputError(*(f"target.{name}: unknown key {name!r}; {suggestion(name, known)}" for name in unknown))
        level = {name: value for name, value in changes.items() if name in Sparsity.keys()}  # noqa: SIM118
        own = {name: value for name, value in changes.items() if name not in level}
        sparsity = override(self.sparsity.model_dump(), level)
        return validate(Target, {**override(self.model_dump(), own), "sparsity": sparsity}, "target")


class Search(Section):
    """How the proxy is tuned. Each range is [low, high], searched on a log scale; a name left out is not searched."""

    trials: int = Field(default=24, gt=0)
    sampler: Literal["random", "qmc", "tpe", "gp"] = "random"
    pruner: Literal["median", "halving", "none"] = "median"
    finalists: int = Field(default=3, gt=0)
    seeds: int = Field(default=3, gt=0)
    lr_fit_octaves: list[float] = Field(default_factory=lambda: [-1.0, -0.5, 0.5, 1.0])
    seed: int = Field(default=0, ge=0, lt=2**31)
    lr: list[float] | None = None
    init_std: list[float] | None = None
    alpha_input: list[float] | None = None
    alpha_output: list[float] | None = None
    weight_decay: list[float] | None = None

    SEARCHED: ClassVar[tuple[str, ...]] = ("lr", "init_std", "alpha_input", "alpha_output", "weight_decay")

    def check(self) -> None:
        for name, bounds in self.ranges().items():
            if len(bounds) != 2 or not 0 < bounds[0] < bounds[1]:
                raise ValueError(f"{name}: {bounds}; expected [low, high] with 0 < low < high")

    def ranges(self) -> dict[str, list[float]]:
        """Searched names and their [low, high]."""
        return {name: bounds for name in self.SEARCHED if (bounds := vars(self)[name]) is not None}


class Spec(Section):
    """`supar.spec/v1`: the proxy's shape, data and training, what to search, and the target it is for."""

    kind: Literal["supar.spec/v1"]
    model: Model
    hyperparameters: Hyperparameters
    parameterization: Options = Field(default_factory=Options)
    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(density=1.0))
    data: Data = Field(default_factory=Data)
    train: Train
    search: Search = Field(default_factory=Search)
    target: Target = Field(default_factory=Target)
    run: Run = Field(default_factory=Run)
    meta: dict[str, Any] = Field(default_factory=dict)


class Proxy(Section):
    """`supar.proxy/v1`: hyperparameters, the shape, data and training they hold for, and the evidence."""

    UNHASHED = ("run", "meta", "target")  # which flags set and the plan resolves

    kind: Literal["supar.proxy/v1"]
    parents: dict[str, str] = Field(default_factory=dict)
    model: Model
    hyperparameters: Hyperparameters
    parameterization: Options = Field(default_factory=Options)
    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(density=1.0))
    data: Data = Field(default_factory=Data)
    train: Train
    target: Target = Field(default_factory=Target)
    run: Run = Field(default_factory=Run)
    evidence: dict[str, Any] = Field(default_factory=dict)
    meta: dict[str, Any] = Field(default_factory=dict)

    def hash(self) -> str:
        """Identity of what was tuned."""
        return content_hash(self.identity())
