"""Document types a user starts from: the spec (what to tune) and the proxy (what was found), and the sections they share."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from supar_cli.errors import InputError, suggestion
from supar_cli.planning.data_section import Data as Data  # re-exported: a section of these documents
from supar_cli.planning.decoder import MOST_LAYERS as MOST_LAYERS
from supar_cli.planning.decoder import Model as Model
from supar_cli.planning.decoder import ViT as ViT
from supar_cli.planning.decoder import require_kind as require_kind
from supar_cli.planning.density import Share, density_from
from supar_cli.planning.document import content_hash
from supar_cli.planning.layout_document import OwnShape
from supar_cli.planning.patterns import Block, Pattern, PatternKeys
from supar_cli.planning.problems import validate
from supar_cli.planning.rules import DecayRule, DepthRule, Optimizer, ProxyValues, ResidualInit, UnembeddingInit
from supar_cli.planning.schema import Field, Section
from supar_cli.planning.updates import Updates

Engine = Literal["auto", "dense", "sparse", "block"]
Distribution = Literal["uniform", "erk"]


class Hyperparameters(Section):
    """What is tuned on the proxy and holds for every target."""

    lr: float = Field(gt=0)
    init_std: float | None = Field(gt=0)  # None, in own models only: each tensor's own, measured at the base
    alpha_input: float = Field(gt=0)
    alpha_output: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    eps: float = Field(default=1e-8, gt=0)
    embedding_lr_ratio: float = Field(default=1.0, neutral=True, omit=True, gt=0)
    head_lr_ratio: float = Field(default=1.0, neutral=True, omit=True, gt=0)

    def with_sigma(self, sigma: float) -> ProxyValues:
        """What the rules take of them, for a tensor that starts with the deviation `sigma` in the proxy."""
        return ProxyValues(sigma, self.lr, self.weight_decay, self.eps, self.embedding_lr_ratio, self.head_lr_ratio)


class Options(Section):
    """The options of the rules, without the parameterization's name."""

    weight_decay_rule: DecayRule = "independent"
    depth_rule: DepthRule = "none"
    residual_init: ResidualInit = "none"
    unembedding_init: UnembeddingInit = "normal"
    density_exponent: float | None = Field(default=None, neutral=True, omit=True, ge=0, le=2)  # β; None: the method's

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
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    cuda_graph: Literal["on", "off"] = Field(default="off", neutral=True, omit=True)
    engine: Engine | dict[str, Engine] = "auto"  # in a plan also by tensor, site or part; what is not named is `auto`
    micro_batch_size: int | None = Field(default=None, gt=0)
    loss_chunk_tokens: int | None = Field(
        default=None, neutral=True, omit=True, gt=0
    )  # logits at a time; None: by memory
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
    updates: Updates | None = Field(default=None, neutral=True, omit=True)

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
    **{name: ("hash",) for name in ("kind", "size", "image", "label")},
}


def override(section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A section's data with the changes that are not None; the keys that these drop are set to None."""
    given = {name: value for name, value in changes.items() if value is not None}
    dropped = {name for changed in given for name in DROPPED_BY.get(changed, ()) if name not in given}
    if given.get("pattern") == "block":  # a document's own blocks go with its pattern
        dropped.discard("block")
    if ":" in str(given.get("pattern")):  # N:M states the density
        dropped |= {"sparsity", "density"} - given.keys()
    return {**section, **{name: None for name in dropped if name in section}, **given}


class Target(Section):
    """What `supar transfer` plans unless flags say otherwise. None means the proxy's value."""

    width: int | None = Field(default=None, gt=0, le=2**31)
    layers: int | None = Field(default=None, gt=0, le=MOST_LAYERS)
    size: dict[str, int] | None = Field(default=None, neutral=True, omit=True)  # of an own model, by its layout's names
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
    """How the proxy is tuned. A range is [low, high], searched on a log scale, or three or more choices; null: not searched."""

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
    embedding_lr_ratio: list[float] | None = Field(default=None, neutral=True, omit=True)
    head_lr_ratio: list[float] | None = Field(default=None, neutral=True, omit=True)

    SEARCHED: ClassVar[tuple[str, ...]] = (
        "lr",
        "init_std",
        "alpha_input",
        "alpha_output",
        "weight_decay",
        "embedding_lr_ratio",
        "head_lr_ratio",
    )

    def check(self) -> None:
        for name, bounds in self.ranges().items():
            if len(bounds) < 2 or bounds[0] <= 0 or any(low >= high for low, high in pairwise(bounds)):
                choices = "three or more values to choose from, in ascending order"
                raise ValueError(f"{name}: {bounds}; expected [low, high] with 0 < low < high, or {choices}")

    def ranges(self) -> dict[str, list[float]]:
        """Searched names and their [low, high], or their choices."""
        return {name: bounds for name in self.SEARCHED if (bounds := vars(self)[name]) is not None}


class Shaped:
    """What a spec, a proxy and a sweep know of their model."""

    __slots__ = ()
    model: Model | ViT | OwnShape
    hyperparameters: Hyperparameters
    data: Data | None
    run: Run

    @classmethod
    def fill_defaults(cls, data: Any) -> Any:
        model = data.get("model") if isinstance(data, dict) else None
        family = model.get("family") if isinstance(model, dict) else None
        given = data.get("data", {}) if isinstance(data, dict) else None
        if family == "vit" and isinstance(given, dict):
            return {**data, "data": {"kind": "images", **given}}
        return {"data": None, **data} if family == "own" else data

    def check(self) -> None:
        own = isinstance(self.model, OwnShape)
        if not own and self.data is None:
            raise ValueError("data: null; expected the data to train on")
        if isinstance(self.model, Model):
            require_kind(self.model, self.data)
        if own and self.data is not None:
            raise ValueError("data: is for supar's own families; expected none, as your script reads its own data")
        if not own and self.hyperparameters.init_std is None:
            raise ValueError("hyperparameters.init_std: null; expected a number; null is for a model of your own")
        if not own and (self.run.command, self.run.timeout_s) != (None, None):
            raise ValueError("run.command: is for a model of your own; expected none, as supar trains this one itself")

    @property
    def loss_unit(self) -> str | None:
        """The unit of its losses; None: that of the user's script."""
        return self.model.loss_unit if isinstance(self.model, Model) else None

    @property
    def decoder(self) -> Model:
        """The shape of supar's own families. Raises InputError for a user's model, which has no such shape."""
        if isinstance(self.model, Model):
            return self.model
        raise InputError("model.family: own; this needs one of supar's own families, gpt2, llama or vit")

    def beside(self, document: str) -> Self:
        """The document with the path of its layout resolved from its folder; for `-`, from the working directory."""
        if isinstance(self.model, Model) or document == "-" or Path(self.model.layout).is_absolute():
            return self
        return self._with_layout(str((Path(document).parent / self.model.layout).resolve()))

    def seen_from(self, folder: Path) -> Self:
        """The document with the path of its layout as seen from a folder that it is written to."""
        return self if isinstance(self.model, Model) else self._with_layout(os.path.relpath(self.model.layout, folder))

    def _with_layout(self, path: str) -> Self:
        model = self.model.model_copy(update={"layout": path})
        return self.model_copy(update={"model": model})  # type: ignore[attr-defined,no-any-return]


class Spec(Shaped, Section):
    """`supar.spec/v1`: the proxy's shape, data and training, what to search, and the target it is for."""

    kind: Literal["supar.spec/v1"]
    model: Model | ViT | OwnShape
    hyperparameters: Hyperparameters
    parameterization: Options = Field(default_factory=Options)
    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(density=1.0))
    data: Data | None = Field(default_factory=Data)
    train: Train
    search: Search = Field(default_factory=Search)
    target: Target = Field(default_factory=Target)
    run: Run = Field(default_factory=Run)
    meta: dict[str, Any] = Field(default_factory=dict)


class Proxy(Shaped, Section):
    """`supar.proxy/v1`: hyperparameters, the shape, data and training they hold for, and the evidence."""

    UNHASHED = ("run", "meta", "target")  # which flags set and the plan resolves

    kind: Literal["supar.proxy/v1"]
    parents: dict[str, str] = Field(default_factory=dict)
    model: Model | ViT | OwnShape
    hyperparameters: Hyperparameters
    parameterization: Options = Field(default_factory=Options)
    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(density=1.0))
    data: Data | None = Field(default_factory=Data)
    train: Train
    target: Target = Field(default_factory=Target)
    run: Run = Field(default_factory=Run)
    evidence: dict[str, Any] = Field(default_factory=dict)
    meta: dict[str, Any] = Field(default_factory=dict)

    def hash(self) -> str:
        """Identity of what was tuned."""
        return content_hash(self.identity())
