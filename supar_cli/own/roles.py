"""The role of a parameter, decided from its uses in a forward pass; or a question, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import get_args

from supar_cli.own.record import Record
from supar_cli.own.values import Sighting
from supar_cli.planning.rules import Role

ODD = {
    "distance": "it is added to activations, and then sums run over its extents that scale",
    "average": "activations times it are averaged over an extent that scales, which divides by the width already",
    "made weight": "its result is itself used as a weight of another product",
}


# chosen: words that let a person decide: keys of a fixed number of heads are hidden, a router's scores a readout
NARROW = (
    "its fan-in scales, its fan-out does not, and other weights take its result: 'hidden' if that is one of many features "
    "(keys, values, mixed tokens), 'unembedding' if it is a score (a router) or a narrow bottleneck"
)


@dataclass
class Reading:
    """What a parameter was found to be. `question`: why that can't be decided. `answers`: the roles that could be meant."""

    role: Role | None = None
    fan: tuple[int, ...] = ()
    question: str = ""
    answers: tuple[Role, ...] = ()
    is_looked_up: bool = False
    is_tied: bool = False
    derived: bool = False
    said: bool = False
    sightings: list[Sighting] = field(default_factory=list)

    @property
    def operations(self) -> list[str]:
        return sorted({sighting.op for sighting in self.sightings})


def read(record: Record, name: str, shape: Sequence[int], scales: frozenset[int], is_constant: bool) -> Reading:
    """Decide what one parameter is. `is_constant`: all its values start equal."""
    found = Reading(sightings=record.sightings[name])
    sightings = _that_count(found.sightings)
    contracts = [one for one in sightings if one.kind == "contract"]
    found.is_looked_up = any(one.kind == "look up" for one in sightings)
    found.derived = any(one.derived for one in sightings if one.kind in ("contract", "scale", "shift"))
    fans = {one.fan for one in contracts}
    found.fan = tuple(sorted(next(iter(fans)))) if len(fans) == 1 else ()
    unknown = sorted({one.op for one in sightings if one.kind == "unknown"})
    if not sightings:
        found.question = "it is not read on the example"
    elif unknown:
        found.question = f"it is read by {', '.join(unknown)}, of which supar does not know what it does with a weight"
    elif {one.kind for one in sightings} == {"statistic"}:
        found.question = f"only {', '.join(found.operations)} read it, and no activation meets it"
    elif odd := sorted({ODD[one.kind] for one in sightings if one.kind in ODD}):
        found.question = odd[0]
        found.answers = (
            get_args(Role) if "made weight" in {one.kind for one in sightings} else ("norm", "unembedding", "embedding")
        )
        averages = {one.fan for one in sightings if one.kind in ("average", "distance")}
        found.fan = tuple(sorted(next(iter(averages)))) if len(averages) == 1 else found.fan
    elif contracts:
        _contracted(record, name, found, sightings, shape, scales)
    else:
        _uncontracted(record, found, sightings, shape, scales, is_constant)
    return found


def _that_count(sightings: list[Sighting]) -> list[Sighting]:
    """Uses by activations; products with constants and statistics only where there is nothing else."""
    strong = [one for one in sightings if not one.is_weak and one.kind != "statistic"]
    if any(one.kind == "contract" for one in strong) or not any(one.is_weak for one in sightings):
        return strong or sightings
    return [one for one in sightings if one.kind != "statistic"]


def _contracted(
    record: Record, name: str, found: Reading, sightings: list[Sighting], shape: Sequence[int], scales: frozenset[int]
) -> None:
    contracts = [one for one in sightings if one.kind == "contract"]
    fans = {one.fan for one in contracts}
    partners = sorted({partner for one in contracts for partner in one.partners})
    kinds = {one.kind for one in sightings} - {"contract", "look up"}
    whole_table = found.is_looked_up and any(not one.picked for one in contracts)
    if len(fans) > 1:
        axes = " and over ".join(str(sorted(fan)) for fan in sorted(fans, key=sorted))
        both = "it is used both ways round: " if not frozenset.intersection(*fans) else ""
        found.question = f"{both}products sum over its extents {axes}"
        return
    fan = next(iter(fans))
    infan, free = bool(fan & scales), bool(scales - fan)
    found.is_tied = whole_table and not free
    if partners:
        found.question = f"it meets another parameter in a product: {', '.join(partners)}"
        found.answers = ("hidden", "embedding", "unembedding") if infan else ("embedding",)
        if found.is_looked_up:
            found.answers = ("embedding", "unembedding")
    elif kinds - {"input", "join", "stream"} and not (kinds <= {"shift"} and found.is_looked_up):
        found.question = f"products sum over it and it is also {_words(kinds)}"
        found.answers = _possible(infan, free)
    elif kinds and not found.is_looked_up:
        found.question = "it is a weight in one product and what another weight multiplies in another"
        found.answers = _possible(infan, free)
    elif whole_table and not found.is_tied:
        found.question = "it is looked up and contracted, but not as a table that is also the head"
        found.answers = _possible(infan, free)
    elif found.is_tied:
        found.role = "embedding"
    elif infan and free:
        found.role = "hidden"
    elif not infan:
        found.role = "embedding"
    elif name in record.inner:
        found.question = NARROW
        found.answers = ("hidden", "unembedding")
    else:
        found.role = "unembedding"


def _possible(infan: bool, free: bool) -> tuple[Role, ...]:
    if infan:
        return ("hidden",) if free else ("unembedding", "hidden")
    return ("embedding",)


def _words(kinds: set[str]) -> str:
    said = {"scale": "a factor", "shift": "a summand", "join": "used as an activation", "input": "used as an input"}
    return " and ".join(sorted(said.get(kind, kind) for kind in kinds))


def _uncontracted(
    record: Record,
    found: Reading,
    sightings: list[Sighting],
    shape: Sequence[int],
    scales: frozenset[int],
    is_constant: bool,
) -> None:
    kinds = {one.kind for one in sightings}
    extents = [axis for axis, extent in enumerate(shape) if extent > 1]
    is_table = bool(scales) and any(axis not in scales for axis in extents)
    if len(scales) > 1:
        found.question = f"no product sums over it, yet its extents {sorted(scales)} scale"
        found.answers = ("norm",) if "scale" in kinds else ("embedding", "bias")
    elif found.is_looked_up:
        gain = is_constant and "scale" in kinds
        expert = any(_has_picked_weight(record, one) for one in sightings if one.kind == "shift")
        single = len(extents) < 2
        gain |= single and "scale" in kinds and "shift" not in kinds
        found.role = "norm" if gain else "bias" if expert or single else "embedding"
    elif kinds & {"join", "input", "stream"}:
        found.role = "embedding" if scales or len(extents) > 1 else "bias"
    elif "scale" in kinds:
        found.role = "norm"
    elif is_table and not any(_is_bias_of(record, one, shape) for one in sightings):
        found.role = "embedding"  # such as positions
    else:
        found.role = "bias"


def _has_picked_weight(record: Record, sighting: Sighting) -> bool:
    """Whether it is added to a product with a weight that is looked up itself: an expert's bias."""
    return any(other.picked and other.kind == "contract" for name in sighting.after for other in record.sightings[name])


def _is_bias_of(record: Record, sighting: Sighting, shape: Sequence[int]) -> bool:
    """Whether it is added to a product that has as many outputs as it has values, in several extents."""
    for name in sighting.after:
        weight = record.parameters[name].shape
        for other in record.sightings[name]:
            outputs = prod(extent for axis, extent in enumerate(weight) if axis not in other.fan)
            if other.kind == "contract" and outputs == prod(shape):
                return True
    return False
