"""What sums and products of values by elements make of what is known of them."""

from __future__ import annotations

from dataclasses import replace

from supar_cli.own.record import Call
from supar_cli.own.values import CONSTANT, NO_AXES, NONE, Mention, Names, Readers, Value


def add(call: Call, left: Value, right: Value) -> Value:
    """The sum of two values."""
    made = call.union(left, right)
    made.is_live = left.is_active or right.is_active
    pairs = ((left, right), (right, left))
    for one, other in pairs:
        for name, mention in one.mentions.items():
            _shift(call, name, mention, one, other, made)
    for one, statistic in pairs:
        if _is_own_statistic(call, statistic, one):  # values are centred
            made.trail, made.roots, made.parts = one.trail, one.origin, one.bit | one.parts
            _note_normalising(call, one, statistic, made)
            return made
    made.trail |= left.trail | right.trail
    for one, other in pairs:
        _note_residual(call, one, other, made)
        if one.weights and other.norm is not None and other.acts:
            made.norm = call.start(call.record.norms, other.norm.names | set(one.weights))
            if other.after_norm_of is not None:
                made.sum = call.start(call.record.sums, made.norm.names, other.after_norm_of)
        elif other.norm is not None:
            call.consumed.append((other.norm, call.name))
    made.sum = made.sum or sum_of(call, [left, right], adds=True)
    for one, other in pairs:
        if one.bent and other.acts and other.is_touched and _comes_later(call, one.bent, other.ancestry | other.origin):
            call.record.barred |= one.bent  # bent by a function, then added to activations
            if other.sum is not None and made.sum is None:
                made.sum = other.sum
                call.consumed = [found for found in call.consumed if found[0] is not other.sum]
    for one, other in pairs:
        _bar(call, one, other, is_first=made.sum is not None)
    if made.sum is None:
        _condition(call, left, right, made)
    return made


def _comes_later(call: Call, names: Names, others: Names) -> bool:
    """Whether the first sums of these names began after those of others, and are none of them."""
    firsts = [next((n for n, one in enumerate(call.record.sums) if one.names & group), -1) for group in (names, others)]
    return not names & others and firsts[0] > firsts[1] >= 0


def _shift(call: Call, name: str, mention: Mention, one: Value, other: Value, made: Value) -> None:
    """One parameter's values with others added."""
    if mention.met:
        _revert(call, name, other)
        twin = other.mentions.get(name)
        if mention.is_result and twin is not None:
            _sum_across(call, name, mention, twin)
        if name not in made.mentions and (not mention.is_shift) and _stays(call, name, mention, other):
            made.mentions[name] = call.spread(mention)
    elif (mention.is_weight and other.acts) or (mention.picked and other.is_active):
        kind = "stream" if other.descends_from(one) else "shift"
        seen = call.see(name, kind, mention, after=other.trail)
        made.trail |= {name} if other.trail and kind == "shift" and mention.is_weight else NONE
        made.is_live = True
        if kind == "shift" and mention.is_weight and _is_table(call, name):
            made.mentions[name] = call.spread(replace(mention, met=(seen,), is_shift=True))
    elif name not in made.mentions:
        is_function = mention.is_weight and other.is_constant and not _is_zero(call, other)
        made.mentions[name] = call.spread(mention, is_function)


def _stays(call: Call, name: str, mention: Mention, other: Value) -> bool:
    """Whether a mention is worth following when activations are added: a result only while extents could be summed."""
    return not (mention.is_result and other.is_active and name not in other.mentions) or call.is_open(name, mention)


def _is_table(call: Call, name: str) -> bool:
    scales = call.record.scales[name]
    return bool(scales) and any(extent > 1 and axis not in scales for axis, extent in enumerate(call.shape_of(name)))


def _sum_across(call: Call, name: str, mine: Mention, theirs: Mention) -> None:
    """Results of several parts of a weight are added: the axis that tells the parts apart is summed over too."""
    here, there = (call.axis_values(name, mention) for mention in (mine, theirs))
    for axis, (first, second) in enumerate(zip(here, there, strict=True)):
        if first is not None and second is not None and first != second:
            for sighting in (*mine.met, *theirs.met):
                sighting.fan |= {axis}


def _note_normalising(call: Call, one: Value, statistic: Value, made: Value) -> None:
    made.normalised_sum = one.normalised_sum or one.sum
    readers = made.normalised_sum
    if readers is not None:
        for bit in [bit for bit in readers.by if bit & statistic.bits]:
            readers.by[bit] = "norm"
        call.consumed = [found for found in call.consumed if found[0] is not readers]
        call.consumed.append((readers, "norm"))
    if one.norm is not None:
        call.consumed.append((one.norm, call.name))


def _is_own_statistic(call: Call, statistic: Value, one: Value) -> bool:
    """Whether one number or a few say how large a value is, and it is shifted or divided by them."""
    own = one.products | set(one.mentions)
    fewer = statistic.numel < call.shape.numel()
    return statistic.is_active and fewer and statistic.descends_from(one) and statistic.products <= own


def sum_of(call: Call, values: list[Value], adds: bool = False) -> Readers | None:
    """The sum of first activations that values add (`adds`) or join to, if they do."""
    names: Names = NONE
    parents = []
    for value in values:
        if value.sum is not None:
            names |= value.sum.names
            parents.append(value.sum)
        elif value.weights and not value.is_active:
            names |= set(value.weights)
        elif not value.is_touched:
            names |= {CONSTANT} if adds and not _is_zero(call, value) else NONE
        else:
            call.consumed += [(other.sum, call.name) for other in values if other.sum is not None]
            return None
    if not names - {CONSTANT}:
        return None
    made = call.start(call.record.sums, names)
    made.parents = parents
    made.through = next((parent.through for parent in parents if parent.through is not None), None)
    return made


def _bar(call: Call, table: Value, other: Value, is_first: bool) -> None:
    """A table that is added to activations that are not the first, or again to what comes from it, is no first summand."""
    names = table.sum.names if table.sum is not None else frozenset(table.weights)
    if not names or (table.is_active and table.sum is None) or not (other.acts and other.is_touched):
        return
    call.record.streams[table.bit] += 1
    again = call.record.streams[table.bit] > 1 and bool(names & other.ancestry)
    if again or not (is_first or other.descends_from(table) or names <= other.ancestry):
        call.record.barred |= names


def _condition(call: Call, left: Value, right: Value, made: Value) -> None:
    """What only scales or shifts an activation from outside, the same at many of its places, is no root of it."""
    whole = call.shape.numel()
    for one, other in ((left, right), (right, left)):
        if one.numel == whole > other.numel and one.acts and other.is_active and one.origin:
            made.roots = one.origin
            call.record.conditions |= other.origin - one.origin


def _note_residual(call: Call, stream: Value, branch: Value, made: Value) -> None:
    """A branch is added to a stream that it was made of."""
    whole = stream.numel == call.shape.numel()
    is_stream = stream.is_touched or (whole and stream.is_constant)
    lineage = stream.bit | stream.parts
    if branch.is_active and branch.trail and branch.bits & lineage and is_stream and not branch.bit & stream.bits:
        names = stream.sum.names if stream.sum is not None else frozenset(stream.weights)
        call.record.residuals.append((names, branch.trail))
        made.parts |= lineage


def _is_zero(call: Call, value: Value) -> bool:
    if not value.is_constant:
        return False
    tensors = [t for t, known in zip(call.inputs, call.values, strict=True) if known is value]
    return bool(tensors) and not bool(tensors[0].any())


def accumulate(call: Call) -> Value:
    """Values added at places that an index names."""
    target, source = call.values[0], call.values[-1]
    made = call.union(target, source)
    made.is_live, made.trail = True, target.trail | source.trail
    for name, mention in (target.weights | source.weights).items():
        call.see(name, "join", mention)
    _note_residual(call, target, source, made)
    call.consume(target)
    call.consume(source)
    return made


def multiply(call: Call, left: Value, right: Value, divides: bool = False) -> Value:
    """The product of two values by elements, or their quotient."""
    made = call.union(left, right)
    made.is_live = left.is_active or right.is_active
    pairs = ((left, right), (right, left))
    for one, other in pairs:
        for name, mention in one.mentions.items():
            _scale(call, name, mention, other, divides and one is right, made)
    for one, statistic in pairs:
        if _is_own_statistic(call, statistic, one) and not (divides and one is right):
            made.is_normalised, made.roots = True, one.origin
            call.record.undone |= one.trail
            _note_normalising(call, one, statistic, made)
            return made
    for one, other in pairs:
        is_raw = other.is_active and not other.is_touched and one.is_touched
        if not (divides and one is right) and (not other.acts or is_raw):
            _pass_on(call, one, other, made)
    if left.acts and right.acts and made.sum is None:
        for one, other in pairs:
            if one.sum is not None and one.numel == call.shape.numel() > other.numel and not other.descends_from(one):
                made.sum = one.sum  # scaled from outside, the same at many of its places
            else:
                call.consume(one)
            if other.numel == call.shape.numel() and other.is_active:
                _bar(call, one, other, is_first=other.descends_from(one))
        made.trail = NONE if left.trail and right.trail else left.trail | right.trail
        _condition(call, left, right, made)
    elif divides and right.acts:
        call.consume(right)
    return made


def _pass_on(call: Call, one: Value, factor: Value, made: Value) -> None:
    """What stays true of a value when constants or parameters scale it."""
    gains = frozenset(factor.weights)
    if not gains and (one.acts or one.weights):
        made.trail, made.norm, made.sum, made.parts = one.trail, one.norm, one.sum, one.parts
        made.is_normalised, made.normalised_sum = one.is_normalised, one.normalised_sum
        made.after_norm_of, made.is_share, made.bent = one.after_norm_of, one.is_share, one.bent
        call.copied = one
    elif gains and one.acts:
        made.trail = gains if one.is_normalised else one.trail
        made.norm = call.start(call.record.norms, gains)
        made.sum = one.sum
        if one.norm is not None:
            call.consumed.append((one.norm, call.name))
        if one.is_normalised and one.normalised_sum is not None and factor.numel > 1:
            made.sum = call.start(call.record.sums, gains, one.normalised_sum)
            made.after_norm_of = one.normalised_sum


def _scale(call: Call, name: str, mention: Mention, other: Value, is_divisor: bool, made: Value) -> None:
    """One parameter's values times or divided by others."""
    own = name in other.mentions
    if mention.met:
        _revert(call, name, other)
        is_finished = bool(other.weights) or (other.is_active and (mention.is_result or mention.is_shift))
        if not is_divisor and (own or not is_finished):
            made.mentions[name] = call.spread(mention, own)
    elif mention.is_weight and other.acts and (other.is_data or not other.bits & _bit_of(call, name)):
        met = call.see(name, "scale", mention, after=other.trail)
        made.is_live = True
        if not is_divisor:
            made.mentions[name] = call.spread(replace(mention, met=(met,)))
    elif mention.picked and other.acts and other.is_touched:
        _scale_picked(call, name, mention, other, made)
    elif mention.is_weight and other.weights and not own and not is_divisor and _is_factor(call, name, mention, other):
        call.see(name, "scale", mention)  # a factor of another parameter
    elif name not in made.mentions:
        is_function = is_divisor or own or bool(other.bits & _bit_of(call, name))
        made.mentions[name] = call.spread(mention, is_function)


def _is_factor(call: Call, name: str, mention: Mention, other: Value) -> bool:
    """Whether of two parameters that are multiplied this is the smaller one: a gain of the other."""
    return mention.index.numel() < other.numel and len(call.record.scales[name]) < 2


def _scale_picked(call: Call, name: str, mention: Mention, other: Value, made: Value) -> None:
    """Looked-up values times activations; of two looked-up values a matrix is the weight, of two vectors none is."""
    own = bool(other.bits & _bit_of(call, name)) and other.is_active
    wide = {table: len(call.record.scales[table]) > 1 for table in {*other.picks, name}}
    is_input = not other.is_active and any(wide.values()) and not wide[name]
    if own or is_input or name in other.mentions:
        made.is_live = True
        return
    partners = NONE if other.is_active or wide[name] else frozenset(other.picks)
    met = call.see(name, "scale", mention, partners=partners)
    made.is_live = True
    made.mentions[name] = call.spread(replace(mention, met=(met,)))


def _bit_of(call: Call, name: str) -> int:
    return call.record.storages.bit_of(call.record.parameters[name])


def _revert(call: Call, name: str, other: Value) -> None:
    """A sum that only centres or divides the values that were summed is no contraction."""
    for bit, summed, sighting, kind in call.record.summed:
        if summed == name and bit & other.bits:
            sighting.kind, sighting.fan = kind, NO_AXES
