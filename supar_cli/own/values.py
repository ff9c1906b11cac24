"""What is known of a value in a forward pass: which parameters it holds, and what it was made of.

A *mention* is the presence of a parameter's own values in a tensor. It keeps, for each position, which element of the
parameter stands there, so that views, copies, repeats and look-ups of any kind can be followed exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Names = frozenset[str]
NONE: Names = frozenset()
NO_AXES: frozenset[int] = frozenset()
CONSTANT = ""  # stands among the names of a sum for a summand that is no parameter


@dataclass
class Sighting:
    """One use of a parameter. `fan` are its axes that a product sums over.

    `kind`: contract, scale, shift, stream (what comes from it is added to it), look up, join (its values become
    activations), input (another parameter multiplies it), statistic, distance (added, then summed), average (multiplied,
    then averaged), made weight (its result is used as a weight), unknown. `is_weak`: contracted with a constant.
    `derived`: by a function of it. `after`: the
    products that it is added to or scales. `partners`: other parameters in the same product.
    """

    kind: str
    op: str
    where: str
    fan: frozenset[int] = frozenset()
    derived: bool = False
    picked: bool = False
    is_weak: bool = False
    after: Names = NONE
    partners: Names = NONE


@dataclass
class Readers:
    """Who reads a value that multipliers may be folded into: the result of a norm, or a sum of first activations.

    `names`: the parameters that made it. `by`: what reads it, by the bit of what that made. Of a sum: `parents` are the
    sums that are part of it, `through` the one that a norm read to make it.
    """

    names: Names
    by: dict[int, str] = field(default_factory=dict)
    parents: list[Readers] = field(default_factory=list)
    is_weak: bool = False  # of a product with constants alone: no activation by itself
    through: Readers | None = None


@dataclass
class Mention:
    """A parameter's values in a tensor: `index` says which of its elements stands at each position, -1: none.

    `met`: its uses that go on: as a factor of an activation, until that product is summed; in a product, while extents of
    its `is_result` may be summed; as a summand, while it `is_shift` whose distance may be measured; in a product of two
    parameters, which `is_merged` into one weight. `is_normed`: divided by its size.
    """

    index: Tensor
    picked: bool = False
    derived: bool = False
    met: tuple[Sighting, ...] = ()
    is_result: bool = False
    is_shift: bool = False
    is_merged: bool = False
    is_normed: bool = False

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter as it is or a function of it, neither looked up nor multiplied by activations."""
        return not self.picked and (not self.met or self.is_merged)


@dataclass
class Value:
    """What is known of a tensor. `bits`: all that it was made of, itself with them; `bit`: itself.

    `is_live`: an activation, not only parameters and constants. `products`: parameters' products that it comes from,
    none between. `trail`: those whose result it is but for sums, views, dropout and scaling, with their biases.
    `norm`, `sum`: whether it is a norm's result or a sum of first activations. `is_normalised`: divided by its own size,
    as was `normalised_sum`; `after_norm_of`: and then multiplied by a gain. `parts`: the bits of what was added to it.
    `is_data`: it depends on the example. `is_touched`: it depends on parameters. `roots`: parameters of the first sums
    that it comes from, but for those that only condition it; `ancestry`: all of them. `bent`: those
    from which functions alone, not products, lead here.
    `is_share`: a softmax, whose shares weigh other values.
    """

    mentions: dict[str, Mention] = field(default_factory=dict)
    is_live: bool = False
    is_data: bool = False
    is_touched: bool = False
    bit: int = 0
    bits: int = 0
    products: Names = NONE
    trail: Names = NONE
    norm: Readers | None = None
    sum: Readers | None = None
    roots: Names = NONE
    ancestry: Names = NONE
    bent: Names = NONE
    is_share: bool = False
    is_normalised: bool = False
    normalised_sum: Readers | None = None
    after_norm_of: Readers | None = None
    parts: int = 0
    numel: int = 0

    @property
    def weights(self) -> dict[str, Mention]:
        """The parameters that it holds as weights."""
        return {name: mention for name, mention in self.mentions.items() if mention.is_weight}

    @property
    def picks(self) -> dict[str, Mention]:
        """The parameters whose looked-up values it holds."""
        return {name: one for name, one in self.mentions.items() if one.picked and (not one.met or one.is_merged)}

    @property
    def is_active(self) -> bool:
        """Whether it is an activation."""
        return self.is_live or (self.is_data and not self.mentions)

    @property
    def acts(self) -> bool:
        """Whether it is an activation to a weight that meets it: looked-up values too."""
        return self.is_active or bool(self.picks)

    @property
    def is_constant(self) -> bool:
        """Whether neither parameters nor activations are in it."""
        return not self.is_active and not self.mentions

    @property
    def origin(self) -> Names:
        """The roots of what is made of it."""
        return self.roots if self.sum is None else self.roots | self.sum.names

    @property
    def is_raw(self) -> bool:
        """Whether no table, learned input or product of a parameter is in it."""
        return not (self.products or self.origin or self.weights or self.picks)

    def descends_from(self, other: Value) -> bool:
        """Whether it was made of another value, or of what that was made of by additions."""
        return self is not other and bool((other.bit | other.parts) & self.bits)


def axes_along(index: Tensor, dims: tuple[int, ...], shape: tuple[int, ...]) -> frozenset[int]:
    """The axes of a parameter of this shape along which one moves along these dimensions of a tensor that holds it."""
    found = set[int]()
    for dim in dims:
        lines = index.movedim(dim, 0)
        for other in range(1, len(lines.shape)):
            extent = lines.shape[other]
            lines = lines.index_select(other, torch.tensor(sorted({0, extent // 2, extent - 1})))
        lines = lines.reshape(lines.shape[0], -1)
        held, stride = lines >= 0, 1
        for axis in reversed(range(len(shape))):
            places = lines // stride % shape[axis]
            most = torch.where(held, places, -1).amax(0)
            least = torch.where(held, places, shape[axis]).amin(0)
            if bool(((most > least) & held.any(0)).any()):
                found.add(axis)
            stride *= shape[axis]
    return frozenset(found)


def tensors_in(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """Every tensor in nested containers and in the attributes of objects, such as distributions."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, str | bytes | int | float | type | torch.nn.Module):
        return
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one, depth - 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for one in value:
            yield from tensors_in(one, depth - 1)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value), depth - 1)
