"""Products that sum over extents: which factor is the weight, and over which of its axes the product sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from supar_cli.own.record import Call
from supar_cli.own.values import NO_AXES, NONE, Mention, Value, axes_along


@dataclass
class Side:
    """One factor of a product: what is known of it, and the dimensions that are summed over or that both factors share.

    `result`: from the indices of a weight, those in the product's result with the summed dimensions left out.
    """

    value: Value
    tensor: Tensor
    dims: tuple[int, ...]
    batch: tuple[int, ...] = ()
    result: Callable[[Tensor], Tensor] | None = None

    @property
    def candidates(self) -> dict[str, Mention]:
        """The parameters that are its weight, if it is one."""
        return self.value.weights or self.value.picks or self.value.mentions

    @property
    def free(self) -> tuple[int, ...]:
        """The dimensions that the result keeps from this factor alone."""
        return tuple(dim for dim in range(len(self.tensor.shape)) if dim not in self.dims and dim not in self.batch)


def product(call: Call) -> Value:
    """mm, bmm and their like."""
    shift = 1 if call.name in ("addmm", "_sparse_addmm", "baddbmm", "addmv", "addbmm") else 0
    left, right = call.args[shift], call.args[shift + 1]
    bias = call.args[0] if shift else None
    rows, columns = len(left.shape) - 1, max(len(right.shape) - 2, 0)
    if call.name == "linear":
        bias = call.args[2] if len(call.args) > 2 else None
        columns = len(right.shape) - 1
    batch = (0,) if min(len(left.shape), len(right.shape)) > 2 else ()
    whole = min(len(left.shape), len(right.shape)) > 1 and call.name != "_grouped_mm"

    def of_left(index: Tensor) -> Tensor:
        return index.select(rows, 0).unsqueeze(-1).expand(call.shape)

    def of_right(index: Tensor) -> Tensor:
        return index.select(columns, 0).unsqueeze(-2).expand(call.shape)

    sides = (
        Side(call.known[id(left)], left, (rows,), batch, of_left if whole else None),
        Side(call.known[id(right)], right, (columns,), batch, of_right if whole else None),
    )
    return _contract(call, sides, bias)


def convolution(call: Call) -> Value:
    """A convolution, transposed or not."""
    inputs, weight, bias, transposed, groups = call.args[0], call.args[1], call.args[2], call.args[6], call.args[8]
    out = 1 if transposed else 0
    dims = tuple(dim for dim in range(len(weight.shape)) if dim != out)
    if transposed and groups > 1:
        if groups != weight.shape[0]:  # its first axis holds groups and inputs of one at once
            for name, mention in call.known[id(weight)].weights.items():
                call.see(name, "unknown", mention)
        dims = tuple(range(2, len(weight.shape)))
    sides = Side(call.known[id(inputs)], inputs, ()), Side(call.known[id(weight)], weight, dims)
    return _contract(call, sides, bias, is_filter=True)


def trilinear(call: Call) -> Value:
    """A product of three factors of which the second may be a weight: nn.Bilinear."""
    left, weight, right = (call.known[id(argument)] for argument in call.args[:3])
    axes = [axis for axis in range(len(call.inputs[1].shape) + len(call.args[4])) if axis not in call.args[4]]
    dims = tuple(dim for dim, axis in enumerate(axes) if axis in call.args[6])
    other = replace(call.union(left, right), is_live=True, is_touched=left.is_touched or right.is_touched)
    if not weight.weights:
        return other
    return _meet(call, Side(weight, call.inputs[1], dims), other)


def _contract(call: Call, sides: tuple[Side, Side], bias: Tensor | None, is_filter: bool = False) -> Value:
    chosen = _weight_side(call, sides, is_filter)
    if chosen is not None:
        return _with_bias(call, _meet(call, sides[chosen], sides[1 - chosen].value), bias)
    left, right = sides[0].value, sides[1].value
    made = call.union(left, right)
    if _are_two_parameters(sides):
        _merge(call, sides, made)
        made.is_live = bool(left.picks or right.picks)
        for side in sides:
            call.consume(side.value)
            made.products |= set(side.candidates) if made.is_live else NONE
        return _with_bias(call, made, bias)
    for name, mention in {**left.weights, **right.weights}.items():
        call.see(name, "statistic", mention)  # a product of a parameter with itself
    if left.acts and right.acts and not is_filter:
        extent = sides[0].tensor.shape[sides[0].dims[0]]
        call.record.numbers.append((call.where, f"{call.name} of activations", (float(extent),)))
        for side in sides:
            _note_made_weight(call, side)
    for side, other in (sides, sides[::-1]):
        call.consume(side.value)
        if other.value.is_constant or (other.value.is_active and not other.value.is_touched):  # mixed by constants
            made.trail, made.sum = side.value.trail, side.value.sum
            call.consumed = [found for found in call.consumed if found[0] is not made.sum]
        if side.value.is_share and not other.value.is_share and other.value.origin:
            made.roots = other.value.origin  # shares weigh values, they do not become part of them
            call.record.conditions |= side.value.origin - other.value.origin
        if other.value.is_constant and other.tensor.numel() == side.tensor.shape[side.dims[0]]:
            _sum_by_constant(call, side, made)
    return _with_bias(call, made, bias)


def _are_two_parameters(sides: tuple[Side, Side]) -> bool:
    """Whether both factors are parameters, and not the same ones."""
    left, right = (side.value.weights or side.value.picks for side in sides)
    return bool(left) and bool(right) and not left.keys() & right.keys()


def _sum_by_constant(call: Call, side: Side, made: Value) -> None:
    """A product with a vector of constants is a sum."""
    for name, mention in side.value.mentions.items():
        fan = axes_along(mention.index, side.dims, call.shape_of(name))
        if mention.met and not mention.is_result and fan:
            call.note_sum(name, mention, fan, side.value, made)


def _note_made_weight(call: Call, side: Side) -> None:
    """One axis of a weight's result is split over summed and kept extents: the result is itself used as a weight."""
    for name, mention in side.value.mentions.items():
        if mention.is_result and side.free:
            shape = call.shape_of(name)
            split = axes_along(mention.index, side.dims, shape) & axes_along(mention.index, side.free, shape)
            kept = mention.index
            for dim in sorted((*side.dims, *side.batch), reverse=True):
                kept = kept.select(dim, 0)
            if split & call.record.scales[name] and len(set(kept.flatten().tolist())) == kept.numel():
                call.see(name, "made weight", mention)


def _weight_side(call: Call, sides: tuple[Side, Side], is_filter: bool) -> int | None:
    """Which of two factors is the weight; None: neither, or both."""
    left, right = sides[0].value, sides[1].value
    if is_filter:
        return 1 if right.mentions else None
    if left.weights and right.weights:
        return _of_two_parameters(call, sides)
    if left.weights or right.weights:
        return 0 if left.weights else 1
    for side in (0, 1):  # a weight that was multiplied by activations, or made of several
        other = sides[1 - side].value
        if other.acts and not other.picks.keys() & sides[side].value.mentions and _is_matrix(call, sides[side]):
            return side
    if left.picks and right.picks and set(left.picks) != set(right.picks):
        return _of_two_parameters(call, sides)
    if bool(left.picks) != bool(right.picks):
        side = 0 if left.picks else 1
        return side if sides[1 - side].value.is_active else None
    return None


def _is_matrix(call: Call, side: Side) -> bool:
    """Whether a factor holds a weight that more was done to: kept and summed extents are its own."""
    for name, mention in side.value.mentions.items():
        scales, shape = call.record.scales[name], call.shape_of(name)
        if not mention.met or mention.is_shift:
            continue
        if mention.is_result and any(sighting.fan & scales for sighting in mention.met):
            continue
        fan = axes_along(mention.index, side.dims, shape)
        if fan and (axes_along(mention.index, side.free, shape) - fan) & scales:
            return True
    return False


def _of_two_parameters(call: Call, sides: tuple[Side, Side]) -> int | None:
    """Of two parameters in one product the weight is that one whose free extents scale too, or that is not repeated."""
    names = [set(side.candidates) for side in sides]
    if names[0] & names[1]:
        return None
    free, contracted = [], []
    for side in sides:
        fans = {n: axes_along(m.index, side.dims, call.shape_of(n)) for n, m in side.candidates.items()}
        free.append(any(call.record.scales[name] - fan for name, fan in fans.items()))
        contracted.append(any(call.record.scales[name] & fan for name, fan in fans.items()))
    if free[0] != free[1] and all(contracted):
        return free.index(True)
    repeats = [_repeats(side) for side in sides]
    return repeats.index(False) if repeats[0] != repeats[1] else None


def _repeats(side: Side) -> bool:
    """Whether a parameter stands in a factor several times, as learned inputs do once for each example."""
    return all(one.index.unique().numel() < one.index.numel() for one in side.candidates.values())  # type: ignore[no-untyped-call]


def _merge(call: Call, sides: tuple[Side, Side], made: Value) -> None:
    """A product of two parameters, of which none is the other's input: their result may be a weight."""
    for side, other in (sides, sides[::-1]):
        for name, mention in side.candidates.items():
            fan = axes_along(mention.index, side.dims, call.shape_of(name))
            seen = mention.met or (call.see(name, "contract", mention, partners=frozenset(other.candidates)),)
            for sighting in seen:
                sighting.fan |= fan
            if side.result is not None:
                index = side.result(mention.index)
                made.mentions[name] = replace(mention, index=index, met=seen, is_merged=True)


def _meet(call: Call, side: Side, other: Value) -> Value:
    """The product of a weight with an activation."""
    names = frozenset(side.candidates)
    own = any(other.bits & call.record.storages.bit_of(call.record.parameters[name]) for name in names)
    strong = bool(other.weights) or (other.acts and (other.is_data or not own))  # else a statistic of itself
    made = call.union(other)
    made.is_live = True
    fans = {n: axes_along(m.index, side.dims, call.shape_of(n)) for n, m in side.candidates.items()}
    for name, mention in side.candidates.items():
        if not fans[name] and any(fans.values()) and not mention.is_merged:
            call.see(name, "scale", mention)  # a factor of the weight
            continue
        seen = mention.met or (call.see(name, "contract", mention, is_weak=not strong),)
        for sighting in seen:
            inside = sighting.fan if sighting.fan & call.record.scales[name] else NO_AXES
            if mention.is_merged:
                inside, sighting.partners = NO_AXES if fans[name] else sighting.fan, NONE
            sighting.kind, sighting.fan, sighting.picked = "contract", fans[name] | inside, mention.picked
        if side.result is not None:
            kept = replace(mention, index=side.result(mention.index), met=seen, is_result=True)
            kept = replace(kept, is_shift=False, is_merged=False)
            if strong:
                made.mentions[name] = kept
            elif call.is_open(name, kept):  # weights mixed by constants
                made.mentions[name], made.is_live = replace(kept, met=(), is_result=False), False
        call.record.at[name] = call.where
        call.record.heads[name].append(other.norm)
    for name, mention in other.weights.items():
        call.see(name, "input", mention)
    call.record.inner |= other.products - names
    call.record.fed |= other.ancestry | other.origin | set(other.weights)
    made.products = made.trail = names
    made.roots |= set(other.weights)
    made.ancestry |= made.roots
    if other.is_raw and not made.mentions.keys() - names:
        made.sum = call.start(call.record.sums, names)
        made.sum.is_weak = not strong
    call.consumed += [(other.norm, f"product {name}") for name in names if other.norm is not None]
    if other.sum is not None:
        call.consumed.append((other.sum, call.name))
    elif other.weights and not other.is_active:
        call.consumed.append((call.start(call.record.sums, other.weights), call.name))
    return made


def _with_bias(call: Call, made: Value, bias: Tensor | None) -> Value:
    value = call.known[id(bias)] if bias is not None else Value()
    for name, mention in value.weights.items():
        call.see(name, "shift", mention, after=made.trail)
        made.trail |= {name} if made.trail else NONE
    if made.sum is not None:
        made.sum.names |= set(value.weights)
    if value.is_active:
        made.trail |= value.trail
        call.consume(value)
    return made
