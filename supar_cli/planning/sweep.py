"""Document type of a transfer study, `supar.sweep/v1`: what is swept over which sizes, and the plan of each of its runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from supar_cli.errors import InputError
from supar_cli.planning import density as shares
from supar_cli.planning import rules
from supar_cli.planning.axes import LEVELS, SHARES, Grid, axis_values, parts_of
from supar_cli.planning.decoder import Model, ViT
from supar_cli.planning.document import content_hash
from supar_cli.planning.layout_document import OwnShape
from supar_cli.planning.live_counts import asked_density
from supar_cli.planning.patterns import Block, Pattern
from supar_cli.planning.plan import Plan
from supar_cli.planning.schema import Field, Section
from supar_cli.planning.spec import (
    Data,
    Hyperparameters,
    Options,
    Proxy,
    Run,
    Search,
    Shaped,
    Sparsity,
    Target,
    Train,
)
from supar_cli.planning.transfer import transfer
from supar_cli.planning.updates import Updates

TUNED = Search.SEARCHED


@dataclass(frozen=True, slots=True)
class Level:
    """A size that runs are transferred to. `share` is its density as documents have it, exactly.

    Of a user's model a width or a number of layers that nobody asks for is None: its layout says it.
    """

    axis: str
    value: float
    share: shares.Share
    width: int | None
    layers: int | None

    @property
    def density(self) -> float:
        return float(shares.literal(self.share))

    @property
    def measure(self) -> str:
        """What drift is measured against: `density`, `width` or `layers`."""
        return "density" if self.axis == "sparsity" else self.axis

    @property
    def scale(self) -> float:
        """Its density, width or number of layers."""
        return float(getattr(self, self.measure))


Aggregate = Literal["mean", "iqm"]
AGGREGATES: dict[Aggregate, str] = {"mean": "mean", "iqm": "interquartile mean"}
Mark = Literal["drift", "shift", "regret"]
MARKS: dict[Mark, float] = {"drift": 0.15, "shift": 0.5, "regret": 0.005}  # SPEC §9: |γ|, octaves, share of the loss


class Arm(Section):
    """What one of a sweep's arms has of its own; None means the sweep's.

    `pattern` may be a mapping from densities to patterns: the arm then has these densities alone, and density 1. At density 1
    nothing is sparse, so that arms share those runs.
    """

    parameterization: rules.ParameterizationName = "supar"
    weight_decay_rule: rules.DecayRule | None = None
    density_exponent: float | None = Field(default=None, ge=0, le=2)
    pattern: Pattern | dict[str, Pattern] | None = None
    block: Block | None = None
    updates: Updates | None = None
    prune: Literal["none", "energy"] | None = None  # dense runs are pruned to the density; how the values are scaled
    control: bool | None = None  # None: as its parameterization is
    marks: dict[Mark, float] | None = None  # those that it is judged by; None: MARKS

    def check(self) -> None:
        for name, mark in (self.marks or {}).items():
            if name not in MARKS or mark <= 0:
                raise ValueError(f"marks.{name}: {mark:g}; expected numbers above 0 of {', '.join(MARKS)}")

    def own(self, *names: str) -> dict[str, Any]:
        """Those of the keys that it has a value of."""
        return {name: value for name in names if (value := vars(self)[name]) is not None}

    def pattern_at(self, level: Level) -> str | None:
        """The pattern of a density."""
        if not isinstance(self.pattern, dict):
            return self.pattern
        return next((word for share, word in self.pattern.items() if _is_density(share, level)), None)


def _is_density(share: str, level: Level) -> bool:
    return shares.literal(share) == shares.literal(level.share)


class Sweep(Shaped, Section):
    """`supar.sweep/v1`: a proxy, one hyperparameter swept around its values, and the sizes at which its optimum should stay the same."""

    kind: Literal["supar.sweep/v1"]
    name: str = "sweep"
    title: str = ""
    model: Model | ViT | OwnShape
    hyperparameters: Hyperparameters
    parameterization: Options = Field(default_factory=Options)
    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(density=1.0))
    data: Data | None = Field(default_factory=Data)
    train: Train
    target: Target = Field(default_factory=Target)
    over: dict[str, Any]
    parameterizations: list[rules.ParameterizationName] = Field(default_factory=list, neutral=True, omit=True)
    arms: dict[str, Arm] = Field(default_factory=dict, neutral=True, omit=True)  # in place of parameterizations
    own: dict[str, dict[str, float]] = Field(default_factory=dict)  # hyperparameters of one arm
    iso: Literal["none", "parameters", "wpn"] = "none"
    seeds: int = Field(default=2, gt=0, le=1000)
    first_seeds: int | None = Field(default=None, neutral=True, omit=True, gt=0, le=1000)  # at the first size
    widen: int = Field(default=6, ge=0, le=30)
    refine: int = Field(default=0, ge=0, le=4)
    robustness: bool = Field(default=False, neutral=True, omit=True)  # half and twice the re-used value measured
    aggregate: Aggregate = Field(default="mean", neutral=True, omit=True)  # what the runs of several seeds become
    run: Run = Field(default_factory=Run)
    meta: dict[str, Any] = Field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if bool(self.arms) == bool(self.parameterizations):
            given = "and arms are both given" if self.arms else "is missing, as arms are"
            raise ValueError(f"parameterizations: {given}; expected exactly one of them")
        known = list(self.arms) or get_args(rules.ParameterizationName)
        for name in self.over:
            if name not in (*TUNED, *LEVELS):
                raise ValueError(f"over.{name}: not an axis; expected some of {', '.join((*TUNED, *LEVELS))}")
        for what, names, least in (("hyperparameter", TUNED, 1), ("size", LEVELS, 0)):
            count = sum(name in names for name in self.over)
            if not least <= count <= 1:
                raise ValueError(
                    f"over: {count} axes of a {what}; expected {'exactly' if least else 'at most'} one of {', '.join(names)}"
                )
        if not self.name.replace("-", "").replace("_", "").replace(".", "").isalnum() or self.name.startswith("."):
            raise ValueError(f"name: {self.name!r} can't name a folder; expected letters, digits, dots, - and _")
        if len(set(self.parameterizations)) < len(self.parameterizations):
            raise ValueError("parameterizations: one appears twice; expected each once")
        for name, values in self.own.items():
            if name not in known:
                what = "an arm" if self.arms else "a parameterization"
                raise ValueError(f"own.{name}: not {what}; expected {', '.join(known)}")
            for key, value in values.items():
                if key not in TUNED or value <= 0:
                    raise ValueError(f"own.{name}.{key}: {value:g}; expected values above 0 of {', '.join(TUNED)}")
        if self.iso != "none" and self.level_axis not in SHARES:
            raise ValueError(f"iso: {self.iso} needs a density axis; expected over.sparsity or over.density")
        if self.first_seeds is not None and self.first_seeds < self.seeds:
            raise ValueError(f"first_seeds: {self.first_seeds}; expected at least as many as seeds, {self.seeds}")
        if isinstance(self.model, OwnShape):
            self._check_own()
        levels = self.levels
        for name, arm in self.all_arms.items():
            self.grid(name)
            if arm.prune and (self.tuned != "lr" or levels[0].density < 1 or arm.updates or arm.pattern):
                expected = "expected over.lr, over.density from 1 on, and neither updates nor a pattern"
                raise ValueError(f"arms.{name}.prune: {arm.prune}; {expected}")
            if ":" in name:
                raise ValueError(f"arms: {name!r}; expected names without a colon")
            for share in arm.pattern if isinstance(arm.pattern, dict) else ():
                shares.density_from("density", share, f"arms.{name}.pattern")
                if not any(_is_density(share, level) for level in levels):
                    raise ValueError(f"arms.{name}.pattern: {share} is no density of the sweep; expected those of over")

    def _check_own(self) -> None:
        """Raise ValueError for what can't be asked of a user's model."""
        what = "is for supar's own families; expected none with a model of your own"
        if self.iso != "none":
            raise ValueError(f"iso: {self.iso} {what}")
        for name, arm in self.arms.items():
            if arm.prune:
                raise ValueError(f"arms.{name}.prune: {arm.prune} {what}")
        if self.level_axis in (self.target.size or {}):
            raise ValueError(
                f"target.size.{self.level_axis}: over.{self.level_axis} says it too; expected only one of them"
            )

    @property
    def all_arms(self) -> dict[str, Arm]:
        """The arms by name; without `arms`, one for each parameterization."""
        return self.arms or {name: Arm(parameterization=name) for name in self.parameterizations}

    @property
    def tuned(self) -> str:
        """The hyperparameter that is swept."""
        return next(name for name in self.over if name in TUNED)

    @property
    def level_axis(self) -> str:
        return next((name for name in self.over if name in LEVELS), "")

    def centre(self, name: str) -> dict[str, float]:
        """The hyperparameters of a parameterization before anything is swept."""
        return {**vars(self.hyperparameters), **self.own.get(name, {})}

    def grid(self, name: str) -> Grid:
        return Grid(axis_values(self.tuned, self.over[self.tuned], self.centre(name)[self.tuned]))

    @property
    def levels(self) -> list[Level]:
        """Sizes from the densest, narrowest or shallowest on: the first is the one whose optimum is re-used."""
        axis, own = self.level_axis, self.target.sparsity
        share = _share("sparsity", str(own.sparsity)) if own.sparsity is not None else own.density or 1.0
        shape: dict[str, int | None] = {"width": self.target.width, "layers": self.target.layers}
        if not isinstance(self.model, OwnShape):
            shape = {name: value or getattr(self.model, name) for name, value in shape.items()}
        if not axis:
            return [Level("density", float(shares.literal(share)), share, **shape)]
        values = axis_values(axis, self.over[axis])  # rising; refuses what is wrong with them
        if axis not in SHARES:
            return [Level(axis, value, share, **{**shape, axis: int(value)}) for value in values]
        found = [Level(axis, shares.number(part), _share(axis, part), **shape) for part in parts_of(self.over[axis])]
        found.sort(key=lambda level: -level.density)
        return found if self.iso == "none" else [self._widened(level, found[0]) for level in found]

    def levels_of(self, name: str) -> list[Level]:
        """The sizes of an arm: all, but where its pattern names its densities those alone, and density 1."""
        arm = self.all_arms[name]
        return [level for level in self.levels if level.density == 1 or arm.pattern is None or arm.pattern_at(level)]

    def _widened(self, level: Level, first: Level) -> Level:
        """A level at the width, in whole heads, that keeps the first one's live parameters or weights per neuron."""
        step, width = self.decoder.width_step, self.size_at(level)["width"]
        ratio = rules.power(first.density / level.density, 0.5 if self.iso == "parameters" else 1.0)
        return replace(level, width=max(1, round(width * ratio / step)) * step)

    def size_at(self, level: Level | None = None) -> dict[str, int]:
        """Every size of a level by its name; without one the proxy's. Raises InputError for one that a layout doesn't have."""
        if isinstance(self.model, OwnShape):
            layout = self.model.read_layout()
            given = {} if level is None else {"width": level.width, "layers": level.layers, **(self.target.size or {})}
            return layout.complete({name: size for name, size in given.items() if size is not None})
        return {name: getattr(level or self.model, name) for name in ("width", "layers")}

    def plan(self, name: str, level: Level, index: float, seed: int) -> Plan:
        """The plan of one run of an arm, its hyperparameter at an index of the grid. Raises InputError for a size that has no plan."""
        arm = self.all_arms[name]
        keys = ("model", "parameterization", "sparsity", "data", "train", "target", "run")
        values = {**self.centre(name), self.tuned: self.grid(name).value(index)}
        sections = {key: getattr(self, key) for key in keys}
        is_dense = level.density == 1 and not self.target.sparsity.overrides
        size = (level.density, self.size_at(level))
        if size != (self._density, self.size_at()):  # there these change nothing
            options = arm.own("weight_decay_rule", "density_exponent")
            sections["parameterization"] = self.parameterization.model_copy(update=options)
        proxy = Proxy(kind="supar.proxy/v1", hyperparameters=values, **sections)  # type: ignore[arg-type]
        swept_width = level.width if self.iso != "none" or level.axis == "width" else None
        changes = {} if is_dense else {**arm.own("block", "updates"), "pattern": arm.pattern_at(level)}
        target = self.target.override(width=swept_width, density=level.share, **changes)
        sparsity = target.sparsity.model_copy(update={"updates": None}) if is_dense else target.sparsity
        fixed = {"width": level.width, "layers": level.layers, "seed": seed, "sparsity": sparsity}
        target = target.model_copy(update=fixed)
        return transfer(proxy, target, arm.parameterization, allow_low_wpn=True, draw="positions")

    def plan_to_prune(self, name: str, seed: int) -> Plan:
        """The plan of the dense run that an arm prunes: at the study's own learning rate."""
        own = self.model_copy(update={"over": {**self.over, self.tuned: [self.centre(name)[self.tuned]]}})
        return own.plan(name, self.levels[0], 0, seed)

    @property
    def _density(self) -> float:
        """The proxy's own."""
        return float(asked_density(self.sparsity))

    def seeds_at(self, level: Level) -> list[int]:
        """The same for all runs at a size, so that they share batches, initial noise and masks; more of them at the first."""
        first = self.train.seed if self.target.seed is None else self.target.seed
        count = self.first_seeds if self.first_seeds is not None and level == self.levels[0] else self.seeds
        return [first + i for i in range(count)]

    def hash(self) -> str:
        """Identity of the study: everything but `run` and `meta`."""
        return content_hash(self.identity(exclude={"run", "meta"}))


def _share(axis: str, text: str) -> shares.Share:
    """A density as documents have it, from the text of a sparsity or a density."""
    exact = shares.density_from(axis, text)
    return str(exact) if "/" in text else float(exact)


def require_comparison(sweep: Sweep) -> None:
    """Raise InputError unless a study has one value of the hyperparameter, and several sizes."""
    if sweep.arms or not sweep.level_axis or any(len(sweep.grid(name).values) > 1 for name in sweep.all_arms):
        expected = "expected one value of a hyperparameter at several sizes (`supar sweep` takes several values)"
        raise InputError(f"over: can't be compared; {expected}")


def plan_all(sweep: Sweep) -> list[Plan]:
    """A plan of each arm at each size, to find errors before runs start. Raises InputError."""
    sizes, axis = sweep.size_at(), sweep.level_axis
    if axis not in ("", *SHARES, *sizes):
        what = f"the layout has no such size, only {', '.join(sizes)}"
        raise InputError(f"over.{axis}: {what}; expected a density, or a layout whose size has that name")
    if isinstance(sweep.model, Model) and not (sweep.target.heads or sweep.target.head_width):
        step = sweep.model.width_step
        for width in (sweep.size_at(level)["width"] for level in sweep.levels):
            if width % step:
                what = f"width {width} is not a multiple of {step}, the least one with whole heads"
                raise InputError(f"over.{axis or 'density'}: {what}; expected one that is")
    (first, *_) = sweep.seeds_at(sweep.levels[0])
    return [sweep.plan(name, level, 0, first) for name in sweep.all_arms for level in sweep.levels_of(name)]
