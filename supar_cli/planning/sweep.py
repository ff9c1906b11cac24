"""Document type of a transfer study, `supar.sweep/v1`: what is swept over which sizes, and the plan of each of its runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2
from typing import Any, Literal, get_args

from supar_cli.errors import InputError
from supar_cli.planning import density as shares
from supar_cli.planning import rules
from supar_cli.planning.density import Share
from supar_cli.planning.document import content_hash
from supar_cli.planning.plan import Plan
from supar_cli.planning.schema import Field, Section
from supar_cli.planning.spec import Data, Hyperparameters, Model, Options, Proxy, Run, Sparsity, Target, Train, override
from supar_cli.planning.transfer import transfer

TUNED = ("lr", "init_std", "alpha_input", "alpha_output", "weight_decay")
SHARES = ("sparsity", "density")
LEVELS = (*SHARES, "width", "layers")
MOST_VALUES = 200  # chosen: a grid with more values is a slip of the pen

GRAMMAR = "log2:-12..-4/0.5, x:-3..3/1 (the proxy's times 2^k) or a list as 0,0.5,0.75"


def axis_values(name: str, given: Any, centre: float = 1.0) -> tuple[float, ...]:
    """The values of an axis, rising: a list, or text of GRAMMAR. Raises ValueError that begins with the key."""
    where = f"over.{name}"
    if isinstance(given, bool) or not isinstance(given, str | list | int | float):
        raise ValueError(f"{where}: {given!r} is no axis; expected {GRAMMAR}")
    scale, colon, span = given.partition(":") if isinstance(given, str) else ("", "", "")
    if colon:
        if name in LEVELS:
            raise ValueError(f"{where}: {given!r} is in octaves; expected a list as 0,0.5,0.75 for {name}")
        values = _octaves(f"{where}: {given!r}", scale.strip(), span, centre)
    else:
        try:
            values = [shares.number(part) for part in _parts(given)]
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {given!r} can't be read; expected {GRAMMAR}") from None
    if not values or len(set(values)) < len(values) or len(values) > MOST_VALUES:
        raise ValueError(f"{where}: {given!r} is no axis; expected 1 to {MOST_VALUES} values, each once")
    for value in values:
        sound = {"sparsity": 0 <= value < 1, "density": 0 < value <= 1}.get(name, 0 < value < float("inf"))
        if not sound or (name in ("width", "layers") and value != int(value)):
            raise ValueError(f"{where}: {value:g} is no {name.replace('_', ' ')}; expected {GRAMMAR}")
    return tuple(sorted(values))


def _parts(given: Any) -> list[str]:
    """The texts of an axis that is a list of values."""
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
    return [str(part).strip() for part in parts if not isinstance(part, bool)]


def _octaves(what: str, scale: str, span: str, centre: float) -> list[float]:
    ends, slash, step_text = span.partition("/")
    low_text, _, high_text = ends.partition("..")
    try:
        low, high, step = float(low_text), float(high_text), float(step_text if slash else 1)
    except ValueError:
        raise ValueError(f"{what} can't be read; expected {GRAMMAR}") from None
    if scale not in ("log2", "x"):
        raise ValueError(f"{what}: {scale!r} is no scale; expected {GRAMMAR}")
    if not (0 < step <= 100 and -100 <= low <= high <= 100) or (high - low) / step > MOST_VALUES:
        raise ValueError(f"{what} is no range; expected LOW..HIGH/STEP, at most {MOST_VALUES} values")
    count = int((high - low) / step + 1e-9) + 1
    return [(centre if scale == "x" else 1.0) * rules.power(2.0, low + i * step) for i in range(count)]


@dataclass(frozen=True, slots=True)
class Grid:
    """Values of the tuned hyperparameter by place: 0, 1, … are those asked for, others lie beyond or between them."""

    values: tuple[float, ...]

    def at(self, place: float) -> float:
        """The value at a place, in equal steps of its logarithm; beyond the ends in steps as the last ones there."""
        last = len(self.values) - 1
        if place == int(place) and 0 <= place <= last:
            return self.values[int(place)]
        start = min(max(int(place // 1), 0), max(last - 1, 0))
        step = self.values[start + 1] / self.values[start] if last else 2.0
        return self.values[start] * rules.power(step, place - start)

    def octaves(self, place: float) -> float:
        return log2(self.at(place))


@dataclass(frozen=True, slots=True)
class Level:
    """A size that runs are transferred to. `scale` is what drift is measured against: its density, width or depth.

    `share` is the density as documents have it: exact where `density` is the nearest float of it.
    """

    axis: str
    value: float
    density: float
    share: Share
    width: int
    layers: int

    @property
    def scale(self) -> float:
        return {"width": float(self.width), "layers": float(self.layers)}.get(self.axis, self.density)


def _share(axis: str, text: str) -> Share:
    """A density as documents have it, from the text of a sparsity or a density."""
    exact = shares.density_from(axis, text)
    return str(exact) if "/" in text else float(exact)


class Sweep(Section):
    """`supar.sweep/v1`: a proxy, one hyperparameter swept around its values, and the sizes at which its optimum is to hold."""

    kind: Literal["supar.sweep/v1"]
    name: str = "sweep"
    title: str = ""
    model: Model
    hyperparameters: Hyperparameters
    parameterization: Options = Field(default_factory=Options)
    sparsity: Sparsity = Field(default_factory=lambda: Sparsity(density=1.0))
    data: Data = Field(default_factory=Data)
    train: Train
    target: Target = Field(default_factory=Target)
    over: dict[str, Any]
    parameterizations: list[rules.ParameterizationName] = Field(min_length=1)
    own: dict[str, dict[str, float]] = Field(default_factory=dict)  # hyperparameters of one parameterization
    iso: Literal["none", "parameters", "wpn"] = "none"
    seeds: int = Field(default=2, gt=0, le=1000)
    widen: int = Field(default=6, ge=0, le=30)
    refine: int = Field(default=0, ge=0, le=4)
    run: Run = Field(default_factory=Run)
    meta: dict[str, Any] = Field(default_factory=dict)

    def check(self) -> None:
        for name in self.over:
            if name not in (*TUNED, *LEVELS):
                raise ValueError(f"over.{name}: no axis; expected some of {', '.join((*TUNED, *LEVELS))}")
        for what, names in (("hyperparameter", TUNED), ("size", LEVELS)):
            found = [name for name in self.over if name in names]
            if len(found) > 1 or (what == "hyperparameter" and not found):
                raise ValueError(f"over: {len(found)} axes of a {what}; expected one of {', '.join(names)}")
        if not self.name.replace("-", "").replace("_", "").replace(".", "").isalnum() or self.name.startswith("."):
            raise ValueError(f"name: {self.name!r} names a folder; expected letters, digits, dots, - and _")
        if len(set(self.parameterizations)) < len(self.parameterizations):
            raise ValueError("parameterizations: one stands twice; expected each once")
        for name, values in self.own.items():
            if name not in get_args(rules.ParameterizationName):
                raise ValueError(
                    f"own.{name}: no parameterization; expected {', '.join(get_args(rules.ParameterizationName))}"
                )
            for key, value in values.items():
                if key not in TUNED or value <= 0:
                    raise ValueError(f"own.{name}.{key}: {value:g}; expected values above 0 of {', '.join(TUNED)}")
        if self.iso != "none" and self.level_axis not in SHARES:
            raise ValueError(
                f"iso: {self.iso} wants levels of sparsity or density, not of {self.level_axis or 'nothing'}"
            )
        for parameterization in self.parameterizations:
            self.grid(parameterization)
        _ = self.levels

    @property
    def tuned(self) -> str:
        """The hyperparameter that is swept."""
        return next(name for name in self.over if name in TUNED)

    @property
    def level_axis(self) -> str:
        return next((name for name in self.over if name in LEVELS), "")

    def centre(self, name: str) -> dict[str, float]:
        """The hyperparameters of a parameterization before anything is swept."""
        return {**self.hyperparameters.model_dump(), **self.own.get(name, {})}

    def grid(self, name: str) -> Grid:
        return Grid(axis_values(self.tuned, self.over[self.tuned], self.centre(name)[self.tuned]))

    @property
    def levels(self) -> list[Level]:
        """Sizes from the densest, narrowest or shallowest on: the first is the one whose optimum is re-used."""
        axis, width = self.level_axis, self.target.width or self.model.width
        layers, own = self.target.layers or self.model.layers, self._own_share()
        if not axis:
            return [Level("density", float(shares.literal(own)), float(shares.literal(own)), own, width, layers)]
        values, found = axis_values(axis, self.over[axis]), []
        exact = {shares.number(part): part for part in _parts(self.over[axis])} if axis in SHARES else {}
        for value in values:
            share = _share(axis, exact[value]) if axis in SHARES else own
            wide, deep = (
                int(value) if axis == name else other for name, other in (("width", width), ("layers", layers))
            )
            found.append(Level(axis, value, float(shares.literal(share)), share, wide, deep))
        found.sort(key=lambda level: -level.density if axis in SHARES else level.scale)
        if self.iso == "none":
            return found
        first, head = found[0].density, self.model.head_width
        exponent = 0.5 if self.iso == "parameters" else 1.0
        widths = [max(1, round(width * rules.power(first / level.density, exponent) / head)) * head for level in found]
        return [replace(level, width=width) for level, width in zip(found, widths, strict=True)]

    def _own_share(self) -> Share:
        own = self.target.sparsity
        if own.sparsity is None and own.density is None:
            return 1.0
        return own.density if own.density is not None else _share("sparsity", str(own.sparsity))

    def proxy(self, name: rules.ParameterizationName, place: float | None = None) -> Proxy:
        """The proxy as a parameterization has it, the swept hyperparameter at a place of its grid."""
        values = self.centre(name)
        if place is not None:
            values[self.tuned] = self.grid(name).at(place)
        keys = ("model", "parameterization", "sparsity", "data", "train", "target", "run")
        parts: dict[str, Any] = {key: getattr(self, key).model_dump() for key in keys}
        parts["hyperparameters"] = values
        return Proxy(kind="supar.proxy/v1", **parts)

    def plan(self, name: rules.ParameterizationName, level: Level, place: float | None, seed: int) -> Plan:
        """The plan of one run. Raises InputError for a size that can't be."""
        target = self.target.model_dump()
        if self.iso != "none" or level.axis == "width":
            target = override(target, {"width": level.width})
        target |= {"width": level.width, "layers": level.layers, "seed": seed}
        target["sparsity"] |= {"sparsity": None, "density": level.share}
        return transfer(self.proxy(name, place), Target(**target), name, allow_low_wpn=True)

    @property
    def run_seeds(self) -> list[int]:
        """The same for all runs of a kind, so that they share batches, initial noise and masks."""
        first = self.train.seed if self.target.seed is None else self.target.seed
        return [first + i for i in range(self.seeds)]

    def hash(self) -> str:
        """Identity of the study: everything but `run` and `meta`."""
        return content_hash(self.identity(exclude={"run", "meta"}))


def checked(sweep: Sweep) -> list[Plan]:
    """A plan of each parameterization at each size, as a trial of what will be run. Raises InputError."""
    for level in sweep.levels:
        if level.width % sweep.model.head_width and not sweep.target.heads:
            raise InputError(
                f"over.{level.axis}: width {level.width} is no multiple of the proxy's head width {sweep.model.head_width}; "
                "expected one that is"
            )
    first = sweep.run_seeds[0]
    return [sweep.plan(name, level, 0, first) for name in sweep.parameterizations for level in sweep.levels]
