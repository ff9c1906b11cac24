"""What copies, look-ups, norms, sums over extents and all other operations make of what is known of values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from supar_cli.own import operations
from supar_cli.own.elementwise import sum_of
from supar_cli.own.record import Call
from supar_cli.own.values import NONE, Names, Value, axes_along, tensors_in


def reduce(call: Call) -> Value:
    value = call.values[0]
    made = call.union(value)
    dims = _dims(call)
    for name, mention in value.mentions.items():
        if mention.met is None:
            if mention.is_weight and not value.is_active:
                call.see(name, "statistic", mention)
            continue
        fan = axes_along(mention.index, dims, call.shape_of(name))
        if fan and len(dims) < call.inputs[0].dim():
            mention.met.kind, mention.met.fan = "contract", mention.met.fan | fan
            call.summed.append(mention.met)
            call.record.at[name] = call.where
            call.record.inner |= value.products - {name}
            made.products = frozenset([name])
            made.trail |= {name}
    if value.weights and not value.is_active:
        made.is_live = False
    call.consume(value)
    if not made.trail:
        made.trail = value.trail
    return made


def _dims(call: Call) -> tuple[int, ...]:
    dims = call.args[1] if len(call.args) > 1 else None
    count = call.inputs[0].dim()
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return tuple(range(count))
    return tuple(dim % count for dim in ([dims] if isinstance(dims, int) else dims))


def normalise(call: Call) -> Value:
    value = call.values[0]
    made = call.union(value)
    gains: Names = NONE
    for position in operations.NORMS[call.name]:
        argument = call.args[position] if 0 <= position < len(call.args) else None
        if isinstance(argument, Tensor):
            for name, mention in call.known[id(argument)].weights.items():
                kind = "scale" if position == operations.NORMS[call.name][0] else "shift"
                call.see(name, kind, mention)
                gains |= {name}
    if value.weights and not value.is_active:  # a norm of weights or of learned inputs
        made.is_live = False
        made.mentions = {name: replace(one, derived=True) for name, one in value.weights.items()}
    made.trail = gains
    made.norm = call.start(call.record.norms, gains) if gains else None
    if value.sum is not None:
        value.sum.norms |= gains
    call.consume(value, "norm")
    return made


def move(call: Call) -> Value:
    sources = [
        (tensor, value)
        for tensor, value in zip(call.inputs, call.values, strict=True)
        if tensor.is_floating_point() or value.mentions or value.is_live
    ]
    if call.name in ("copy", "_to_copy"):
        sources = sources[-1:]
    picks = call.name in operations.LOOKED_UP
    if picks:
        sources = sources[:1]
    if not sources:
        return call.union(*call.values)
    values = [value for _, value in sources]
    made = call.union(*call.values) if picks else call.union(*values)
    acts = any(value.acts or (value.is_data and not value.weights) for value in values)
    if call.name == "nan_to_num" or len(values) == 1:
        acts = False
    made.is_live = any(value.is_active for value in values) or acts
    mentioned = {}
    for value in values:
        for name, mention in value.mentions.items():
            if mention.is_weight and acts:
                call.see(name, "join", mention)
            elif mention.met is not None or not acts or not mention.picked:
                mentioned[name] = mention
    for name, mention in mentioned.items():
        index = _moved_index(call, name)
        if index is None:
            if mention.is_weight:
                call.see(name, "unknown", mention)
            continue
        if picks and mention.is_weight:
            call.see(name, "look up", mention)
        made.mentions[name] = replace(mention, index=index, picked=mention.picked or picks)
    _keep_through_move(call, values, made, picks)
    return made


def _keep_through_move(call: Call, values: list[Value], made: Value, picks: bool) -> None:
    if len(values) == 1:
        (value,) = values
        made.trail, made.norm, made.sum = value.trail, value.norm, value.sum
        made.is_normalised, made.normalised_sum = value.is_normalised, value.normalised_sum
        if not picks:
            call.copied = value
        elif value.weights and not value.is_active:
            made.sum = call.start(call.record.sums, frozenset(value.weights))
        return
    for value in values:
        made.trail |= value.trail
        if value.norm is not None:
            call.consumed.append((value.norm, call.name))
    made.sum = sum_of(call, values) if made.is_live or any(v.picks for v in values) else None


def _moved_index(call: Call, name: str) -> Tensor | None:
    """Which elements of a parameter stand where after this operation: it is done to the elements' numbers."""

    def replaced(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            value = call.known[id(argument)]
            if name in value.mentions:
                return value.mentions[name].index
            if argument.is_floating_point():
                return torch.tensor(-1).expand(argument.shape)
            return argument
        if isinstance(argument, list | tuple):
            return type(argument)(replaced(one) for one in argument)
        return -1 if isinstance(argument, float) else argument

    if call.name in ("clone", "_to_copy", "copy", "native_dropout", "nan_to_num", "lift_fresh", "_unsafe_view"):
        source = next(value for value in call.values if name in value.mentions)
        index = source.mentions[name].index
        if call.name == "copy":
            return index.expand(call.shape)
        return index.reshape(call.shape)
    if call.name == "_embedding_bag":
        return None
    function = call.func
    if function._schema.is_mutable:
        function = getattr(torch.ops.aten, call.name).default if hasattr(torch.ops.aten, call.name) else None
    try:
        result = function(*[replaced(one) for one in call.args], **call.kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    first = next(tensors_in(result), None)
    return first if first is not None and first.shape == call.shape else None


def apply(call: Call) -> Value:
    made = call.union(*call.values)
    is_function = call.name in operations.FUNCTIONS
    chosen = call.name in operations.CHOSEN
    acts = any(value.acts for value in call.values)
    live = any(value.is_active for value in call.values)
    for value in call.values:
        if not chosen or value.norm is not None:
            call.consume(value)
        for name, mention in value.mentions.items():
            if not mention.is_weight or call.name in operations.COMPARED:
                live |= mention.picked
            elif call.name in operations.STATISTICS:
                call.see(name, "statistic", mention)
            elif call.name in ("_prelu_kernel", "pow") and acts:
                call.see(name, "scale", mention)
            elif chosen and acts:
                call.see(name, "join", mention)
            elif (is_function or chosen) and mention.index.numel() <= call.shape.numel():
                made.mentions[name] = call.spread(mention, not chosen)
            else:
                call.see(name, "unknown", mention)
    made.is_live = live or (acts and not made.mentions)
    if chosen:
        made.sum = sum_of(call, call.values)
    return made
