"""An independent statement of masks that change while training: which weights live after each step, and with what state.

From the methods' papers (Mocanu et al. 2018, Evci et al. 2020, Zhu and Gupta 2017, Gao et al. 2025); it imports nothing of
supar_cli. Everything is dense float64 arrays with dead weights at 0, every step is listed, and counts are exact fractions.
`section` is the plan's section `sparsity.updates` as plain data, `t` the number of finished optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import cos, floor, pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Alive = NDArray[np.bool_]


def exact(number: float) -> Fraction:
    """The number as written: 0.3 is three tenths."""
    return Fraction(repr(number))


def nearest(number: Fraction) -> int:
    """The nearest whole number, the larger of two."""
    return floor(number + Fraction(1, 2))


class Schedule:
    """The steps of a run after which masks change, and the counts and factors of each of them, all listed in advance."""

    def __init__(self, section: Mapping[str, Any], steps: int, decay_rule: str = "independent") -> None:
        self.section, self.steps, self.decay_rule = section, steps, decay_rule
        self.begin, self.end = (nearest(exact(section[key]) * steps) for key in ("begin", "end"))
        every = section["every_steps"]
        inside = range(self.begin + 1, self.end + 1)
        self.updates = [t for t in inside if (t - self.begin) % every == 0 or t == self.end]

    def kept(self, size: int, kept: int) -> list[int]:
        """The live weights of a tensor after each step from 0 to the last one; `kept` at the end."""
        start = self.section.get("start")
        if start is None or kept == size:
            return [kept] * (self.steps + 1)
        first = max(kept, nearest(exact(start) * size))
        found, arrival = [first], nearest(exact(self.section["anneal"]) * self.steps)
        for t in range(1, self.steps + 1):
            if t not in self.updates:
                found.append(found[-1])
            elif t >= arrival:
                found.append(kept)
            else:
                left = Fraction(arrival - t, arrival - self.begin) ** {"linear": 1, "cubic": 3}[self.section["shape"]]
                found.append(kept + floor((first - kept) * left))
        return found

    def dropped(self, size: int, kept: int, neurons: int) -> dict[int, int]:
        """How many weights SET and RigL drop at each update: never those that the neurons' floors may need."""
        found, spare = {}, kept - self.section["min_per_neuron"] * neurons
        for t in self.updates:
            done = t / self.end
            share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}
            wanted = self.section["drop"] * share[self.section["drop_schedule"]] * kept
            found[t] = min(spare, size - kept, round(round(wanted, 6)))  # of two nearest ones the even one
        return found

    def rates(self, size: int, kept: int) -> list[float]:
        """The factor on a tensor's rate in each step: that of the mask it is made with."""
        follows = self.section["rates_follow"] == "now"
        counts = self.kept(size, kept)[:-1]
        return [(kept / now) ** self.section["exponent"] if follows else 1.0 for now in counts]

    def decays(self, size: int, kept: int) -> list[float]:
        """The factor on its weight decay: what rate times decay falls by, a part or none of it is undone."""
        power = {"independent": -1.0, "sqrt": -0.5, "coupled": 0.0}[self.decay_rule]
        return [factor**power for factor in self.rates(size, kept)]


def neurons(shape: Sequence[int], fan_in_axes: Sequence[int]) -> NDArray[np.int64]:
    """The number of the neuron that each weight of a tensor feeds."""
    extents = [1 if axis in fan_in_axes else extent for axis, extent in enumerate(shape)]
    return np.broadcast_to(np.arange(np.prod(extents)).reshape(extents), shape).reshape(-1)


def per_neuron(alive: Alive, fan_in_axes: Sequence[int]) -> NDArray[np.int64]:
    """The live weights of each neuron."""
    return np.count_nonzero(alive, axis=tuple(fan_in_axes)).reshape(-1)


def largest(
    scores: Array, among: Alive, count: int, fan_in_axes: Sequence[int], least: int | NDArray[np.int64] = 0
) -> Alive:
    """The `count` largest of the weights `among`, but first each neuron's `least` largest; equal ones by position."""
    of = neurons(scores.shape, fan_in_axes)
    least = np.broadcast_to(np.asarray(least), (of.max() + 1,))
    flat, chosen = scores.reshape(-1), np.flatnonzero(among)
    by_neuron = chosen[np.lexsort((chosen, -flat[chosen], of[chosen]))]
    _, first, lengths = np.unique(of[by_neuron], return_index=True, return_counts=True)
    rank = np.arange(len(by_neuron)) - np.repeat(first, lengths)
    is_extra = rank >= least[of[by_neuron]]
    order = by_neuron[np.lexsort((by_neuron, -flat[by_neuron], is_extra))]
    found = np.zeros(flat.shape, np.bool_)
    found[order[:count]] = True
    return found.reshape(scores.shape)


@dataclass
class Tensor:
    """A tensor between two steps: value, moments and mask, all of its whole shape."""

    value: Array
    alive: Alive
    fan_in_axes: tuple[int, ...]
    m: Array
    v: Array
    kept: int

    @classmethod
    def start(cls, value: Array, alive: Alive, row: Mapping[str, Any]) -> Tensor:
        value = np.where(alive, value, 0.0).astype(np.float64)
        return cls(value, alive, tuple(row["fan_in_axes"]), np.zeros(value.shape), np.zeros(value.shape), row["kept"])


class Training:
    """AdamW or SGD, tensor by tensor, with the masks of a plan's data; `scores` are random numbers for SET by (tensor, step)."""

    def __init__(
        self,
        plan: Mapping[str, Any],
        values: Mapping[str, Array],
        alive: Mapping[str, Alive],
        scores: Callable[[str, int], Array] | None = None,
    ) -> None:
        self.plan, self.section, self.scores = plan, plan["sparsity"]["updates"], scores
        self.rows = {row["name"]: row for row in plan["tensors"]}
        rule = plan["parameterization"]["weight_decay_rule"]
        self.schedule = Schedule(self.section, plan["train"]["steps"], rule)
        self.tensors = {
            name: Tensor.start(value, alive.get(name, np.ones(value.shape, np.bool_)), self.rows[name])
            for name, value in values.items()
        }
        self.done = self.clipped = 0

    def _sizes(self, name: str) -> tuple[int, int]:
        return self.tensors[name].value.size, self.tensors[name].kept

    def step(self, gradients: Mapping[str, Array], factor: float) -> None:
        """One step from dense gradients at the schedule's factor, and the update of the masks that follows it."""
        taken = {name: self._taken(one, gradients[name]) for name, one in self.tensors.items()}
        norm, limit = sum(float((one**2).sum()) for one in taken.values()) ** 0.5, self.plan["train"]["grad_clip"]
        scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        self.clipped += scale < 1
        for name, one in self.tensors.items():
            rate = self.rows[name]["lr"] * factor * self.schedule.rates(*self._sizes(name))[self.done]
            decay = self.rows[name]["weight_decay"] * self.schedule.decays(*self._sizes(name))[self.done]
            moved = self._moved(name, one, taken[name] * scale, rate, decay)
            one.value = moved if self._trains_dead(one) else np.where(one.alive, moved, 0.0)
        self.done += 1
        if self.done in self.schedule.updates:
            for name, one in self.tensors.items():
                if one.kept < one.value.size:
                    self._update(name, one, gradients[name])

    def _trains_dead(self, one: Tensor) -> bool:
        """Whether dead weights compete with the size of one step: those of top-k while its masks change."""
        moves = one.kept < one.value.size and self.done < self.schedule.end
        return moves and self.section["method"] == "topk"

    def _taken(self, one: Tensor, gradient: Array) -> Array:
        return gradient if self._trains_dead(one) else np.where(one.alive, gradient, 0.0)

    def _moved(self, name: str, one: Tensor, gradient: Array, rate: float, decay: float) -> Array:
        """The value after a step of AdamW, or of SGD with momentum, whose decay is part of the gradient."""
        train, (b1, b2), t = self.plan["train"], self.plan["train"]["betas"], self.done + 1
        if train["optimizer"] == "sgd":
            one.m = train["momentum"] * one.m + gradient + decay * one.value
            return one.value - rate * one.m
        one.m = b1 * one.m + (1 - b1) * gradient
        one.v = b2 * one.v + (1 - b2) * gradient**2
        root = np.sqrt(one.v / (1 - b2**t)) + self.rows[name]["eps"]
        return one.value * (1 - rate * decay) - rate * one.m / (1 - b1**t) / root

    def _update(self, name: str, one: Tensor, gradient: Array) -> None:
        method, size, floor_ = self.section["method"], np.abs(one.value), self.section["min_per_neuron"]
        if method in ("gmp", "topk"):
            count = self.schedule.kept(*self._sizes(name))[self.done]
            among = one.alive if method == "gmp" else np.ones(one.alive.shape, np.bool_)
            alive = largest(size, among, count, one.fan_in_axes, floor_)
        else:
            of = int(neurons(one.value.shape, one.fan_in_axes).max()) + 1
            number = self.schedule.dropped(*self._sizes(name), of)[self.done]
            stay = largest(size, one.alive, one.kept - number, one.fan_in_axes, floor_)
            lacking = np.maximum(floor_ - per_neuron(stay, one.fan_in_axes), 0)
            by = np.abs(gradient) if method == "rigl" else self.scores(name, self.done)  # type: ignore[misc]
            grown = largest(by, ~one.alive, number, one.fan_in_axes, lacking)
            self._grow(one, stay, grown)
            alive = stay | grown
        one.alive, one.value = alive, np.where(alive, one.value, 0.0)
        if self.section.get("moments") != "keep" or self.done == self.schedule.end:
            one.m, one.v = np.where(alive, one.m, 0.0), np.where(alive, one.v, 0.0)

    def _grow(self, one: Tensor, stay: Alive, grown: Alive) -> None:
        one.value[grown] = 0.0
        if self.section["moments"] != "keep":
            one.m[grown] = 0.0
            one.v[grown] = one.v[stay].mean() if self.section["moments"] == "mean" and stay.any() else 0.0
