"""What sums and products of values by elements make of what is known of them."""

from __future__ import annotations

from dataclasses import replace

from supar_cli.own.record import Call
from supar_cli.own.values import CONSTANT, NONE, Mention, Names, Readers, Sighting, Value


def add(call: Call, left: Value, right: Value) -> Value:
    made = call.union(left, right)
    made.is_live = left.is_active or right.is_active
    made.trail = left.trail | right.trail
    for one, other in ((left, right), (right, left)):
        for name, mention in one.mentions.items():
            if mention.met is not None:
                _revert(call, mention.met, other)
                made.mentions[name] = call.spread(mention)
            elif (mention.is_weight and other.acts) or (mention.picked and other.is_active):
                kind = "stream" if other.descends_from(one) else "shift"
                call.see(name, kind, mention, after=other.trail)
                made.trail |= {name} if other.trail and kind == "shift" and mention.is_weight else NONE
                made.is_live = True
            elif name not in made.mentions:
                is_function = mention.is_weight and other.is_constant and not _is_zero(call, other)
                made.mentions[name] = call.spread(mention, is_function)
        _note_residual(call, one, other)
        if one.weights and other.norm is not None and other.acts:
            made.norm = call.start(call.record.norms, other.norm.names | set(one.weights))
            if other.normalised_sum is not None:
                other.normalised_sum.norms |= set(one.weights)
        elif other.norm is not None:
            call.consumed.append((other.norm, call.name))
        _note_centring(call, one, other, made)
    made.sum = sum_of(call, [left, right])
    if made.sum is None:
        _bar(call, left, right)
        _bar(call, right, left)
        _condition(call, left, right, made)
    return made


def _note_centring(call: Call, one: Value, statistic: Value, made: Value) -> None:
    if _is_own_statistic(call, statistic, one):
        made.normalised_sum = one.normalised_sum or one.sum
        _relabel(call, made.normalised_sum, statistic)


def _is_own_statistic(call: Call, statistic: Value, one: Value) -> bool:
    """Whether one number or a few say how large a value is, and it is shifted or divided by them."""
    own = one.products | set(one.mentions)
    fewer = statistic.numel < call.shape.numel()
    return fewer and statistic.descends_from(one) and statistic.products <= own


def _relabel(call: Call, readers: Readers | None, statistic: Value) -> None:
    if readers is not None:
        for bit in [bit for bit in readers.by if bit & statistic.bits]:
            readers.by[bit] = "norm"
        call.consumed = [one for one in call.consumed if one[0] is not readers]
        call.consumed.append((readers, "norm"))


def sum_of(call: Call, values: list[Value]) -> Readers | None:
    """The sum of first activations that values add or join to, if they do."""
    names: Names = NONE
    for value in values:
        if value.sum is not None:
            names |= value.sum.names
        elif value.weights and not value.is_active:
            names |= set(value.weights)
        elif not value.is_touched:
            names |= NONE if _is_zero(call, value) else {CONSTANT}
        else:
            for other in values:
                if other.sum is not None:
                    call.consumed.append((other.sum, call.name))
            return None
    return call.start(call.record.sums, names) if names - {CONSTANT} else None


def _bar(call: Call, table: Value, other: Value, is_sum: bool = True) -> None:
    """A table that is added to activations that are not the first, or again and again, is no first summand."""
    names = table.sum.names if table.sum is not None else frozenset(table.weights)
    if not other.is_active or not other.is_touched or not names or (table.is_active and table.sum is None):
        return
    call.record.streams[table.bit] += int(is_sum)
    if not other.descends_from(table) or call.record.streams[table.bit] > 1:
        call.record.barred |= names


def _condition(call: Call, left: Value, right: Value, made: Value) -> None:
    """What only scales or shifts an activation from outside, the same at many of its places, is no root of it."""
    whole = call.shape.numel()
    for one, other in ((left, right), (right, left)):
        if one.numel == whole > other.numel and one.is_active and other.is_active and one.origin:
            made.roots = one.origin


def _note_residual(call: Call, stream: Value, branch: Value) -> None:
    if branch.is_active and branch.trail and branch.descends_from(stream) and (stream.acts or stream.weights):
        names = stream.sum.names if stream.sum is not None else frozenset(stream.weights)
        call.record.residuals.append((names, branch.trail))


def _is_zero(call: Call, value: Value) -> bool:
    if not value.is_constant:
        return False
    tensors = [t for t, known in zip(call.inputs, call.values, strict=True) if known is value]
    return bool(tensors) and not bool(tensors[0].any())


def accumulate(call: Call) -> Value:
    """Values added at places that an index names."""
    target, source = call.values[0], call.values[-1]
    made = call.union(*call.values)
    made.is_live, made.trail = True, target.trail | source.trail
    for name, mention in (target.weights | source.weights).items():
        call.see(name, "join", mention)
    _note_residual(call, target, source)
    call.consume(target)
    call.consume(source)
    return made


def multiply(call: Call, left: Value, right: Value, divides: bool = False) -> Value:
    made = call.union(left, right)
    made.is_live = left.is_active or right.is_active
    for one, other in ((left, right), (right, left)):
        is_divisor = divides and one is right
        for name, mention in one.mentions.items():
            _scale(call, name, mention, other, is_divisor, made)
        if is_divisor:
            continue
        if not other.is_active:
            _pass_on(call, one, other, made)
        if other.is_active and _is_own_statistic(call, other, one):
            made.is_normalised = True
            made.normalised_sum = one.normalised_sum or one.sum
            _relabel(call, made.normalised_sum, other)
    if left.is_active and right.is_active:
        for one in (left, right):
            _consume_unless_norm(call, one, made)
        if not made.is_normalised:
            _bar(call, left, right, is_sum=False)
            _bar(call, right, left, is_sum=False)
            made.trail = NONE if left.trail and right.trail else left.trail | right.trail
    elif divides and right.acts:
        call.consume(right)
    _condition(call, left, right, made)
    return made


def _consume_unless_norm(call: Call, one: Value, made: Value) -> None:
    if one.norm is not None:
        call.consumed.append((one.norm, call.name))
    if one.sum is not None and one.sum is not made.normalised_sum:
        call.consumed.append((one.sum, call.name))


def _pass_on(call: Call, one: Value, factor: Value, made: Value) -> None:
    """What stays true of a value when constants or parameters scale it."""
    gains = frozenset(factor.weights)
    if not gains:
        if one.acts or one.weights:
            made.trail, made.norm, made.sum = one.trail, one.norm, one.sum
            made.is_normalised, made.normalised_sum = one.is_normalised, one.normalised_sum
            if factor.is_constant and not made.sum and one.weights and not one.is_active:
                made.sum = None
        return
    if one.acts:
        made.trail = gains if one.is_normalised else one.trail
        made.norm = call.start(call.record.norms, gains)
        if one.is_normalised and one.normalised_sum is not None:
            one.normalised_sum.norms |= gains
            made.normalised_sum = one.normalised_sum
        call.consume(one)


def _scale(call: Call, name: str, mention: Mention, other: Value, is_divisor: bool, made: Value) -> None:
    """One parameter's values times or divided by others."""
    own = name in other.mentions
    if mention.met is not None:
        _revert(call, mention.met, other)
        if not is_divisor:
            made.mentions[name] = call.spread(mention, own)
    elif mention.is_weight and other.acts:
        met = call.see(name, "scale", mention, after=other.trail)
        made.is_live = True
        if not is_divisor:
            made.mentions[name] = call.spread(replace(mention, met=met))
    elif mention.picked and other.is_active and other.is_touched:
        if other.bits & _bits_of(call, name):
            made.is_live = True  # it is divided by its own size
        else:
            met = call.see(name, "scale", mention)
            made.mentions[name] = call.spread(replace(mention, met=met))
    elif name not in made.mentions:
        function = is_divisor or own or bool(other.weights and mention.is_weight)
        function |= bool(other.bits & _bits_of(call, name))
        made.mentions[name] = call.spread(mention, function)


def _bits_of(call: Call, name: str) -> int:
    return call.record.storages.bit_of(call.record.parameters[name])


def _revert(call: Call, met: Sighting, other: Value) -> None:
    """A sum that only centres or divides the values that were summed is no contraction."""
    if any(sighting is met and bit & other.bits for bit, sighting in call.record.reverted):
        met.kind, met.fan = "scale", frozenset()
