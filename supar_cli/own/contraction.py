"""Products that sum over extents: which factor is the weight, and over which of its axes the product sums."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from supar_cli.own.record import Call
from supar_cli.own.values import Value, axes_along


def product(call: Call) -> Value:
    shift = 1 if call.name in ("addmm", "baddbmm", "addmv", "addbmm") else 0
    left, right = call.args[shift], call.args[shift + 1]
    dims = (left.dim() - 1,), (max(right.dim() - 2, 0),)
    bias = call.args[0] if shift else None
    if call.name == "linear":
        bias = call.args[2] if len(call.args) > 2 else None
        dims = (left.dim() - 1,), (right.dim() - 1,)
    batch = min(left.dim(), right.dim()) > 2
    return _contract(call, (left, dims[0]), (right, dims[1]), bias, batch)


def convolution(call: Call) -> Value:
    weight, transposed, groups = call.args[1], call.args[6], call.args[8]
    out = 1 if transposed else 0
    dims = tuple(dim for dim in range(weight.dim()) if dim != out)
    if transposed and groups > 1:
        if groups != weight.shape[0]:
            for name, mention in call.known[id(weight)].weights.items():
                call.see(name, "unknown", replace(mention))
        dims = tuple(range(2, weight.dim()))
    return _contract(call, (call.args[0], ()), (weight, dims), call.args[2], False, is_filter=True)


def trilinear(call: Call) -> Value:
    left, weight, right = call.args[:3]
    other = call.union(call.known[id(left)], call.known[id(right)])
    expanded = set(call.args[4])
    dims = tuple(dim for dim in call.args[6] if dim not in expanded) if len(call.args) > 6 else (1, 2)
    dims = dims or (1, 2)
    return _meet(call, call.known[id(weight)], dims, replace(other, is_live=True), None)


def _contract(
    call: Call,
    left: tuple[Tensor, tuple[int, ...]],
    right: tuple[Tensor, tuple[int, ...]],
    bias: Tensor | None,
    batch: bool,
    is_filter: bool = False,
) -> Value:
    sides = [(call.known[id(tensor)], dims, tensor) for tensor, dims in (left, right)]
    chosen = _weight_side(call, sides, batch, is_filter)
    if chosen is None:
        a, b = sides[0][0], sides[1][0]
        made = call.union(a, b)
        made.is_live = a.acts or b.acts
        if a.acts and b.acts and not is_filter:
            extent = left[0].shape[left[1][0]]
            call.record.numbers.append((call.where, f"{call.name} of activations", (float(extent),)))
        for value in (a, b):
            call.consume(value)
        return _with_bias(call, made, bias)
    weight, dims, _ = sides[chosen]
    return _with_bias(call, _meet(call, weight, dims, sides[1 - chosen][0], bias), bias)


def _weight_side(
    call: Call, sides: list[tuple[Value, tuple[int, ...], Tensor]], batch: bool, is_filter: bool
) -> int | None:
    """Which of two factors is the weight; None: neither, or both."""
    (a, _, _), (b, _, _) = sides
    if is_filter:
        return 1 if b.mentions else None
    if a.weights and b.weights:
        return _of_two_parameters(call, sides)
    if a.weights or b.weights:
        return 0 if a.weights else 1
    picked = [bool(value.picks) for value in (a, b)]
    if all(picked) and set(a.picks) != set(b.picks):
        return _of_two_parameters(call, sides)
    if any(picked) and not all(picked):
        side = picked.index(True)
        return side if sides[1 - side][0].is_active else None
    for side in (0, 1):  # a weight that was multiplied by activations
        if sides[1 - side][0].is_active and _is_matrix(call, *sides[side], batch):
            return side
    return None


def _is_matrix(call: Call, value: Value, dims: tuple[int, ...], tensor: Tensor, batch: bool) -> bool:
    for name, mention in value.mentions.items():
        if mention.met is not None:
            shape = call.shape_of(name)
            free = tuple(d for d in range(int(batch), tensor.dim()) if d not in dims)
            fan = axes_along(mention.index, dims, shape)
            if fan and (axes_along(mention.index, free, shape) - fan) & call.record.scales[name]:
                return True
    return False


def _of_two_parameters(call: Call, sides: list[tuple[Value, tuple[int, ...], Tensor]]) -> int | None:
    """Of two parameters in one product the weight is that one whose free extents scale too."""
    a, b = (set(value.weights or value.picks) for value, _, _ in sides)
    if a & b:
        return None
    free, contracted = [], []
    for value, dims, _ in sides:
        scaling, summed = set[int](), set[int]()
        for name, mention in (value.weights or value.picks).items():
            fan = axes_along(mention.index, dims, call.shape_of(name))
            scaling |= call.record.scales[name] - fan
            summed |= call.record.scales[name] & fan
        free.append(bool(scaling))
        contracted.append(bool(summed))
    if free[0] != free[1] and all(contracted):
        return free.index(True)
    for (value, dims, _), partners in zip(sides, (b, a), strict=True):
        for name, mention in (value.weights or value.picks).items():
            fan = axes_along(mention.index, dims, call.shape_of(name))
            call.see(name, "contract", mention, fan=fan, partners=frozenset(partners))
    return None


def _meet(call: Call, weight: Value, dims: tuple[int, ...], other: Value, bias: Tensor | None) -> Value:
    """The product of a weight with an activation."""
    strong = other.acts or bool(other.weights)
    names = weight.weights or weight.picks or weight.mentions
    made = call.union(other)
    made.is_live = strong
    for name, mention in names.items():
        fan = axes_along(mention.index, dims, call.shape_of(name))
        if mention.met is not None:
            mention.met.kind, mention.met.fan = "contract", fan
        else:
            call.see(name, "contract", mention, fan=fan, is_weak=not strong)
        call.record.at[name] = call.where
        call.record.heads[name].append(other.norm)
    for name, mention in other.weights.items():
        call.see(name, "input", mention)
    call.record.inner |= other.products - set(names)
    made.products = made.trail = frozenset(names)
    if strong and not other.is_touched:
        made.sum = call.start(call.record.sums, frozenset(names))
    if other.norm is not None:
        for name in names:
            call.consumed.append((other.norm, f"product {name}"))
    if other.sum is not None:
        call.consumed.append((other.sum, call.name))
    elif other.weights and not other.is_active:
        started = call.start(call.record.sums, frozenset(other.weights))
        call.consumed.append((started, call.name))
    return made


def _with_bias(call: Call, made: Value, bias: Tensor | None) -> Value:
    if bias is None:
        return made
    value = call.known[id(bias)]
    for name, mention in value.weights.items():
        call.see(name, "shift", mention, after=made.trail)
        made.trail |= {name}
    if made.sum is not None:
        made.sum.names |= set(value.weights)
    if value.is_active:
        made.trail |= value.trail
        call.consume(value)
    return made
