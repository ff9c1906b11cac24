"""Masks that change while a plan is trained: the methods, their keys and their defaults.

A method is SET (drop the smallest weights, grow random ones: Mocanu et al. 2018, arXiv 1707.04780), RigL (grow by gradient:
Evci et al. 2020, arXiv 1911.11134), GMP (gradual magnitude pruning: Zhu and Gupta 2017, arXiv 1710.01878) or top-k (the
largest after every step, with dense gradients and moments, their number annealed: Gao et al. 2025, arXiv 2511.13653).
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

from supar_cli.planning.density import literal
from supar_cli.planning.schema import Field, Section

Method = Literal["set", "rigl", "gmp", "topk"]
METHODS: dict[str, str] = {"set": "SET", "rigl": "RigL", "gmp": "GMP", "topk": "top-k"}

_FIXED = {"begin": 0.0, "end": 0.75, "drop": 0.3, "drop_schedule": "cosine", "moments": "mean", "min_per_neuron": 0}
# as published; β by SPEC §9 [D, measured]: widths 128 and 256, 100 to 1000 steps, densities 1/4 to 1/32
DEFAULTS: dict[str, dict[str, Any]] = {
    "set": {**_FIXED, "grow": "random", "exponent": 1.0},
    "rigl": {**_FIXED, "grow": "gradient", "exponent": 0.9},
    "gmp": {
        "start": 1.0,
        "begin": 0.2,
        "end": 0.75,
        "anneal": 0.75,
        "shape": "cubic",
        "min_per_neuron": 0,
        "exponent": 1.0,
    },
    "topk": {
        **{"start": 1.0, "every_steps": 1, "begin": 0.0, "end": 1.0, "anneal": 0.5, "shape": "linear"},
        **{"grow": "magnitude", "moments": "keep", "min_per_neuron": 4, "exponent": 1.0},
    },
}
ZERO_MOMENTS_EXPONENT = 0.8  # of RigL, measured at 100 steps: m = v = 0 makes a grown weight's first steps larger
LONGEST_INTERVAL, LEAST_INTERVALS = 100, 40  # chosen: 100 steps as published, and 40 intervals in a shorter run
_OWN_KEYS = ("start", "anneal", "shape", "drop", "drop_schedule", "grow", "moments")  # which some methods don't have


class Updates(Section):
    """How masks change while training. None means the method's default; a text in its place is the method.

    `begin`, `anneal` and `end` are shares of the run: masks change after `begin` until `end`, every `every_steps` steps,
    and the density has gone from `start` to the tensor's own, as `shape` says, at `anneal`.
    """

    SHORT = "method"

    method: Method
    every_steps: int | None = Field(default=None, gt=0)
    start: float | None = Field(default=None, neutral=True, omit=True, gt=0, le=1)
    shape: Literal["linear", "cubic"] | None = Field(default=None, neutral=True, omit=True)
    begin: float | None = Field(default=None, ge=0, lt=1)
    anneal: float | None = Field(default=None, neutral=True, omit=True, gt=0, le=1)
    end: float | None = Field(default=None, gt=0, le=1)
    drop: float | None = Field(default=None, neutral=True, omit=True, gt=0, le=1)
    drop_schedule: Literal["cosine", "linear", "constant"] | None = Field(default=None, neutral=True, omit=True)
    grow: Literal["random", "gradient", "magnitude"] | None = Field(default=None, neutral=True, omit=True)
    moments: Literal["mean", "zero", "keep"] | None = Field(default=None, neutral=True, omit=True)
    min_per_neuron: int | None = Field(default=None, ge=0)
    rates_follow: Literal["now", "end"] | None = None
    exponent: float | None = Field(default=None, ge=0, le=2)

    def check(self) -> None:
        name, known, given = METHODS[self.method], DEFAULTS[self.method], vars(self)
        for key in _OWN_KEYS:
            if given[key] is not None and key not in known:
                raise ValueError(
                    f"{key}: {given[key]} with the method {self.method}; expected none: {name} has no such key"
                )
        for key, methods in (("grow", tuple(DEFAULTS)), ("moments", ("topk",))):
            if self.method in methods and given[key] not in (None, known.get(key)):
                raise ValueError(f"{key}: {given[key]} with the method {self.method}; expected {known[key]}")
        if self.method == "topk" and self.every_steps not in (None, 1):
            raise ValueError(
                f"every_steps: {self.every_steps} with the method topk; expected 1: it selects after every step"
            )
        shares = [(key, given[key]) for key in ("begin", "anneal", "end") if given[key] is not None]
        for (key, share), (later, other) in pairwise(shares):
            if share > other or (key == "begin" and share == other):
                raise ValueError(f"{later}: {other} is not after {key}, {share}; expected begin < anneal <= end")


class PlanUpdates(Updates):
    """As the target's, with every key of the method resolved. `exponent` is β: rates go as 1/m_ρ^β, of the density now."""

    every_steps: int = Field(gt=0)
    begin: float = Field(ge=0, lt=1)
    end: float = Field(gt=0, le=1)
    min_per_neuron: int = Field(ge=0)
    rates_follow: Literal["now", "end"] = Field()
    exponent: float = Field(ge=0, le=2)

    def check(self) -> None:
        super().check()
        for key in DEFAULTS[self.method]:
            if vars(self)[key] is None:
                raise ValueError(f"{key}: is missing; expected a value with the method {self.method}")

    def step_at(self, share: float, steps: int) -> int:
        """The step at a share of a run of `steps` steps, to the nearest."""
        return int(literal(share) * steps + Fraction(1, 2))


def exponent_of(wanted: Updates | None, tuned: float | None) -> float:
    """β, the exponent of the density in rates: of the target's section, else of the proxy, else the method's; 1 of masks that stay."""
    if wanted is not None and wanted.exponent is not None:
        return wanted.exponent
    if tuned is not None:
        return tuned
    if wanted is None:
        return 1.0
    return (
        ZERO_MOMENTS_EXPONENT
        if wanted.moments == "zero" and wanted.method == "rigl"
        else float(DEFAULTS[wanted.method]["exponent"])
    )


def start_density(wanted: Updates | None) -> float:
    """The density at step 0 of tensors that are sparser at the end; 0 where it is their own."""
    if wanted is None:
        return 0.0
    return float(wanted.start if wanted.start is not None else DEFAULTS[wanted.method].get("start", 0.0))


def resolve(wanted: Updates, exponent: float, steps: int) -> PlanUpdates:
    """The section of a plan of `steps` steps, whose rates have the exponent."""
    given = {key: value for key, value in wanted.model_dump().items() if value is not None}
    interval = min(LONGEST_INTERVAL, max(1, steps // LEAST_INTERVALS))
    known = {"every_steps": interval, "rates_follow": "now", **DEFAULTS[wanted.method], **given}
    return PlanUpdates(**{**known, "exponent": exponent})
