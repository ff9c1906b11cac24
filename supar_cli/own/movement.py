"""What copies, look-ups, norms, sums over extents and all other operations make of what is known of values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from supar_cli.own import operations
from supar_cli.own.elementwise import sum_of
from supar_cli.own.record import Call
from supar_cli.own.values import NONE, Mention, Names, Value, axes_along, tensors_in


def reduce(call: Call) -> Value:
    """A sum or a mean over extents: of a parameter times activations, a contraction."""
    value = call.values[0]
    made = call.union(value)
    dims = _dims(call)
    made.trail = value.trail
    for name, mention in value.mentions.items():
        if not mention.met:
            if mention.is_weight and not value.is_active:
                call.see(name, "statistic", mention)
            continue
        fan = axes_along(mention.index, dims, call.shape_of(name))
        if not fan or len(dims) == len(call.inputs[0].shape):
            continue
        if mention.is_result:
            for sighting in mention.met if call.is_open(name, mention) else ():
                sighting.fan |= fan
        else:
            call.note_sum(name, mention, fan, value, made)
        if call.is_open(name, mention) and call.name != "cumsum":
            index = mention.index
            for dim in sorted(dims, reverse=True):
                index = index.select(dim, 0)
            made.mentions[name] = replace(mention, index=index.reshape(call.shape), is_result=True)
    if value.weights and not value.is_active:
        made.is_live = False
    call.consume(value)
    return made


def _dims(call: Call) -> tuple[int, ...]:
    dims = call.args[1] if len(call.args) > 1 else None
    count = len(call.inputs[0].shape)
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return tuple(range(count))
    return tuple(dim % count for dim in ([dims] if isinstance(dims, int) else dims))


def normalise(call: Call) -> Value:
    """A norm with its gain and shift."""
    value = call.values[0]
    made = call.union(value)
    gains: Names = NONE
    for position, kind in zip(operations.NORMS[call.name], ("scale", "shift"), strict=True):
        argument = call.args[position] if 0 <= position < len(call.args) else None
        for name, mention in call.operand(argument).weights.items():
            call.see(name, kind, mention)
            gains |= {name}
    if value.weights and not value.is_active:  # a norm of weights or of learned inputs
        made.is_live = False
        made.mentions = {name: replace(one, is_normed=True) for name, one in value.weights.items()}
        for name, mention in value.weights.items():
            call.see(name, "statistic", mention)
    call.record.undone |= value.trail
    made.trail = gains
    made.norm = call.start(call.record.norms, gains) if gains else None
    if not gains:  # a gain may be multiplied behind it
        made.is_normalised, made.normalised_sum = True, value.sum
    elif value.sum is not None:
        made.sum = call.start(call.record.sums, gains, value.sum)
    call.consume(value, "norm")
    return made


def weight_norm(call: Call) -> Value:
    """torch's weight norm: the direction of its first argument times the second."""
    made = Value()
    direction, gain = call.values[:2]
    for name, mention in direction.weights.items():
        call.see(name, "statistic", mention)
        made.mentions[name] = replace(mention, derived=True)
    for name, mention in gain.weights.items():
        call.see(name, "scale", mention)
    return made


def move(call: Call) -> Value:
    """Values copied, joined or looked up, none of them changed."""
    sources = [
        value
        for tensor, value in zip(call.inputs, call.values, strict=True)
        if tensor.is_floating_point() or value.mentions or value.is_live
    ]
    picks = call.name in operations.LOOKED_UP
    sources = sources[-1:] if call.name in ("copy", "_to_copy") else sources[:1] if picks else sources
    if not sources:
        return call.union(*call.values)
    made = call.union(*sources)
    acts = len(sources) > 1 and any(value.acts or (value.is_data and not value.weights) for value in sources)
    made.is_live = any(value.is_active for value in sources) or acts
    mentioned: dict[str, Mention] = {}
    for value in sources:
        for name, mention in value.mentions.items():
            if mention.is_weight and acts:
                call.see(name, "join", mention)
            elif mention.met or not acts or not mention.picked:
                met = mention.met + (mentioned[name].met if name in mentioned else ())
                mentioned[name] = replace(mention, met=met)
    for name, mention in mentioned.items():
        if picks and mention.is_weight:
            call.see(name, "look up", mention)
        index = None if call.name == "_embedding_bag" else _moved_index(call, name)
        if index is not None:
            made.mentions[name] = replace(mention, index=index, picked=mention.picked or picks)
        elif mention.is_weight and call.name != "_embedding_bag":
            call.see(name, "unknown", mention)
        elif mention.is_weight:  # looked up and summed
            made.is_live = True
    _keep_through_move(call, sources, made, picks)
    return made


def _keep_through_move(call: Call, values: list[Value], made: Value, picks: bool) -> None:
    if len(values) == 1:
        (value,) = values
        made.trail, made.norm, made.sum, made.parts = value.trail, value.norm, value.sum, value.parts
        made.is_normalised, made.normalised_sum = value.is_normalised, value.normalised_sum
        made.after_norm_of, made.is_share, made.bent = value.after_norm_of, value.is_share, value.bent
        if not picks:
            call.copied = value
        elif value.weights and not value.is_active:
            made.sum = call.start(call.record.sums, value.weights)
        return
    for value in values:
        made.trail |= value.trail
        made.parts |= value.bit | value.parts
        if value.norm is not None:
            call.consumed.append((value.norm, call.name))
    made.sum = sum_of(call, values) if made.is_live or any(value.picks for value in values) else None


SAME_PLACES = ("clone", "_to_copy", "copy", "native_dropout", "nan_to_num", "lift_fresh", "_unsafe_view")


def _moved_index(call: Call, name: str) -> Tensor | None:
    """Which elements of a parameter stand where after this operation: it is done to their numbers, counted from 1."""

    def counted(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            value = call.known[id(argument)]
            if name in value.mentions and argument.is_floating_point():
                return value.mentions[name].index + 1
            return torch.tensor(0).expand(argument.shape) if argument.is_floating_point() else argument
        if isinstance(argument, list | tuple):
            return type(argument)(counted(one) for one in argument)
        return 0 if isinstance(argument, float) else argument

    index = next(value.mentions[name].index for value in call.values if name in value.mentions)
    if call.name in SAME_PLACES:
        return index.expand(call.shape) if call.name == "copy" else index.reshape(call.shape)
    if call.name in operations.RESAMPLED:
        return interpolate(index.double(), size=call.shape[2:], mode="nearest").long()
    function = call.func
    if function._schema.is_mutable:
        function = getattr(getattr(torch.ops.aten, call.name, None), function._overloadname, None)
    try:
        result = function(*[counted(one) for one in call.args], **call.kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    moved = next(tensors_in(result), None)
    return moved - 1 if moved is not None and moved.shape == call.shape else None


def apply(call: Call) -> Value:
    """Any other operation: a function of each value, a choice between two, a statistic, or one that is not known."""
    values = [call.operand(argument) for argument in call.args[1:3]] if call.name == "where" else call.values
    made = call.union(*values)
    is_chosen = call.name in operations.CHOSEN
    acts = any(value.acts for value in values)
    live = any(value.is_active for value in values)
    for value in values:
        if not is_chosen:
            call.consume(value)
        elif value.norm is not None:
            call.consumed.append((value.norm, call.name))
        for name, mention in value.mentions.items():
            live |= _apply_to(call, name, mention, acts, made)
    made.is_live = live or (acts and not made.mentions)
    for value in values:
        made.bent |= value.bent | (value.sum.names if value.sum is not None else NONE)
    made.is_share = call.name in ("softmax", "_softmax", "_safe_softmax")
    if is_chosen:
        made.sum = sum_of(call, values)
    return made


def _apply_to(call: Call, name: str, mention: Mention, acts: bool, made: Value) -> bool:
    """What an operation does with one parameter's values; returns whether they become activations."""
    is_chosen = call.name in operations.CHOSEN
    if mention.is_shift and call.name in ("pow", "abs", "square"):
        made.mentions[name] = mention
    elif mention.is_shift and call.name in ("linalg_vector_norm", "norm"):
        call.note_sum(name, mention, frozenset(call.record.scales[name]), Value(), made)
    if not mention.is_weight or call.name in operations.COMPARED:
        return mention.picked or bool(mention.met)
    if call.name in operations.STATISTICS:
        call.see(name, "statistic", mention)
    elif call.name in ("_prelu_kernel", "pow") and acts:
        call.see(name, "scale", mention)
    elif is_chosen and acts:
        call.see(name, "join" if call.name == "where" else "shift", mention)
    elif (is_chosen or call.name in operations.FUNCTIONS) and mention.index.numel() <= call.shape.numel():
        made.mentions[name] = call.spread(mention, not is_chosen)
    else:
        call.see(name, "unknown", mention)
    return False
