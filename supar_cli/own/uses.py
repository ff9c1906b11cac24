"""Where multipliers of the forward pass can be folded: first sums, heads, norms before them, writers of the residual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from supar_cli.own.parameters import shown
from supar_cli.own.record import Record
from supar_cli.own.roles import Reading
from supar_cli.own.values import CONSTANT, Names, Readers
from supar_cli.planning.layout_document import Use


@dataclass
class Uses:
    """Uses by parameter; writers of the residual; modules whose input a multiplier may go to; what has to be said."""

    of: dict[str, list[Use]] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    multiply_at: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, use: Use, names: Names | set[str]) -> None:
        for name in names:
            if name in self.of and use not in self.of[name]:
                self.of[name].append(use)


def find_uses(record: Record, readings: Mapping[str, Reading], model: nn.Module, returns: bool) -> Uses:
    """Find the uses of all parameters. `returns`: whether the pass returned what leaves the model."""
    found = Uses({name: [] for name in readings})
    _first_sums(record, readings, found)
    heads = _heads(record, readings, found, returns)
    for name in readings:
        after = [one.after & heads for one in record.sightings[name] if one.kind != "statistic"]
        if after and all(after) and readings[name].role in ("bias", "norm"):
            found.add("after_head", {name})
    for name in sorted(heads):
        if readings[name].is_tied:
            _before_head(record, name, readings, model, found)
    for names, writers in record.residuals:
        if not names & record.barred:
            wide = {name for name in writers if name in readings and record.scales[name]}
            found.writers |= {name for name in wide if readings[name].role != "unembedding"}
    for name, reading in readings.items():
        if reading.derived:
            found.add("derived", {name})
    weights = [name for name, one in readings.items() if one.derived and one.role in ("hidden", "unembedding")]
    if scaled := [n for n in weights if any(one.kind == "statistic" or one.is_weak for one in record.sightings[n])]:
        why = "the forward pass divides it by its own size, so that only its direction counts"
        found.notes.append(
            f"{shown(scaled)}: {why}; no rule was tried on such weights: see that both sizes agree (supar check)"
        )
    return found


def _first_sums(record: Record, readings: Mapping[str, Reading], found: Uses) -> None:
    """All summands of the first activations, or gain and shift of the norm that alone reads their sum, or none."""
    sums = [one for one in record.sums if _is_first(one, record)]
    barred = set(record.barred) | _norms_used_elsewhere(record, sums)
    for one in sums[::-1]:  # what is added to a copy of the first activations is not part of them
        read = [parent for parent in one.parents if set(parent.by.values()) - {"output"}]
        strange = {name for name in one.names if name in readings and readings[name].role in ("hidden", "unembedding")}
        if one.parents and (read or strange):
            kept = {name for parent in one.parents for name in parent.names} - strange
            barred |= one.names - (kept if strange else {name for parent in read for name in parent.names})
            for parent in one.parents:
                parent.by.setdefault(-1, "sum")
            sums = [other for other in sums if other is not one]
            sums += [parent for parent in one.parents if not any(parent is other for other in sums)]
    summands = {name for one in sums for name in one.names}
    while True:
        broken = [one for one in sums if one.names & barred or not _can_take(one, summands, readings)]
        lost = {name for one in broken for name in one.names} & summands
        if not lost:
            break
        summands -= lost
    found.add("first_sum", summands)
    for one in sums:
        tables = sorted(name for name in one.names if name in readings and readings[name].role in ("embedding", "bias"))
        if tables and CONSTANT in one.names and not one.names & barred:
            why = "a constant is added to the first activations, so no multiplier of theirs can be folded"
            found.notes.append(f"{', '.join(tables)}: {why}")


def _is_first(one: Readers, record: Record) -> bool:
    """Whether a sum is read as it is, by more than a norm alone; behind a norm that alone reads a first sum."""
    labels = set(one.by.values())
    if not any(record.scales[name] for name in one.names if name) and not one.names & record.fed:
        return False
    if not labels or labels == {"norm"} or one.is_weak or one.names <= record.conditions - record.roots:
        return False
    through = one.through
    return through is None or (set(through.by.values()) == {"norm"} and not through.names & record.barred)


def _norms_used_elsewhere(record: Record, sums: list[Readers]) -> set[str]:
    """Gains and shifts behind first sums that the forward pass uses in another place too."""
    found = set[str]()
    for name in {name for one in sums if one.through is not None for name in one.names}:
        here = sum(one.through is not None and name in one.names for one in sums)
        uses = sum(one.kind in ("scale", "shift") for one in record.sightings[name])
        if uses > here:
            found.add(name)
    return found


def _can_take(one: Readers, summands: set[str], readings: Mapping[str, Reading]) -> bool:
    roles = ("norm", "bias", "embedding") if one.through is not None or one.parents else ("embedding", "bias")
    return one.names <= summands and all(n in readings and readings[n].role in roles for n in one.names)


def _heads(record: Record, readings: Mapping[str, Reading], found: Uses, returns: bool) -> set[str]:
    """Weights of products that leave the model with no other weight behind them."""
    heads = set[str]()
    for name, reading in readings.items():
        if reading.role != "unembedding" and not reading.is_tied:
            continue
        if (returns and name not in record.leaving) or name in record.inner:
            continue
        if name in record.undone:
            why = "a norm divides its result by its size, which undoes every multiplier"
            found.notes.append(
                f"{name}: {why}: it is no head; if it should be trained as a hidden weight, say so in roles"
            )
            continue
        heads.add(name)
    found.add("head", heads)
    return heads


def _before_head(record: Record, head: str, readings: Mapping[str, Reading], model: nn.Module, found: Uses) -> None:
    """Gain and shift of the norm that only a tied head reads; else the module whose input can be multiplied."""
    norms = record.heads[head]
    names: set[str] = set()
    for one in norms:
        names |= one.names if one is not None else set()
    every = [one for one in record.norms if one.names & names]
    alone = all(label == f"product {head}" for one in every for label in one.by.values())
    takes = any(readings[name].role == "norm" for name in names if name in readings)
    if names and alone and takes and all(one is not None for one in norms):
        found.add("before_head", names)
        if not any(readings[name].derived for name in names if name in readings):
            return
    at = record.at.get(head, "")
    module = model.get_submodule(at)
    if at and any(own is record.parameters[head] for own in module.parameters(recurse=False)):
        found.multiply_at[head] = at
    if not found.multiply_at.get(head):
        found.notes.append(
            f"{head}: no norm is read by this tied head alone; the forward pass has to apply its multiplier"
        )
