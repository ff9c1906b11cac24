"""The record of a forward pass: every use of each parameter, and what became of what the uses made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from supar_cli.own import operations
from supar_cli.own.storages import Storages
from supar_cli.own.values import Mention, Names, Readers, Sighting, Value

Number = tuple[str, str, tuple[float, ...]]  # module, operation, numbers in it


class Record:
    """What passes did with parameters. `scales`: the axes of each that grow with the size.

    `inner`: parameters whose product reaches another parameter's product; `leaving`: those whose product leaves the
    model with no other between; `roots`: those of the first sums of what leaves. `barred`: tables that are added to
    other activations than the first; `conditions`: those of activations that scale or shift others. `undone`: those
    whose result a norm reads. `residuals`: (tables in the stream, what a branch ends with). `heads`: the norm that each
    product reads, if any; `at`: the module that takes it.
    """

    def __init__(self, parameters: Mapping[str, Tensor], scales: Mapping[str, Iterable[int]]) -> None:
        self.parameters = dict(parameters)
        self.scales = {name: frozenset(axes) for name, axes in scales.items()}
        self.sightings: dict[str, list[Sighting]] = {name: [] for name in parameters}
        self.inner: set[str] = set()
        self.leaving: set[str] = set()
        self.roots: set[str] = set()
        self.barred: set[str] = set()
        self.conditions: set[str] = set()
        self.undone: set[str] = set()
        self.residuals: list[tuple[Names, Names]] = []
        self.norms: list[Readers] = []
        self.sums: list[Readers] = []
        self.heads: dict[str, list[Readers | None]] = defaultdict(list)
        self.at: dict[str, str] = {}
        self.numbers: list[Number] = []
        self.storages = Storages()
        self.streams: dict[int, int] = defaultdict(int)  # how often a first sum, by its bit, is added to activations
        # sums over extents: the bit of the result, the parameter, its use, and the use's kind before
        self.summed: list[tuple[int, str, Sighting, str]] = []

    def begin(self) -> None:
        """Forget all values but the parameters'."""
        self.storages = Storages()
        self.streams.clear()
        self.summed.clear()
        for name, parameter in self.parameters.items():
            index = torch.arange(parameter.numel()).view(parameter.shape)
            self.storages.write(parameter.detach(), Value({name: Mention(index)}, is_touched=True))

    def see(self, name: str, sighting: Sighting) -> Sighting:
        """Note one use of a parameter."""
        self.sightings[name].append(sighting)
        return sighting


class Call:
    """One operation: its arguments, and what is known of them. `copied`: the argument that the result is a copy of."""

    def __init__(
        self,
        record: Record,
        func: Any,
        where: str,
        arguments: tuple[Any, Any],
        inputs: list[Tensor],
        values: list[Value],
    ) -> None:
        self.record, self.func, self.where, self.inputs, self.values = record, func, where, inputs, values
        self.args, self.kwargs = arguments
        name = func.overloadpacket.__name__
        self.name = name if name.startswith("__") else name.rstrip("_")
        self.shape = torch.Size()  # of the result
        self.copied: Value | None = None
        self.summed: list[tuple[str, Sighting, str]] = []
        self.consumed: list[tuple[Readers, str]] = []
        self.known = {id(tensor): value for tensor, value in zip(inputs, values, strict=True)}

    def operand(self, argument: Any) -> Value:
        """What is known of an argument; of a plain number, nothing."""
        return self.known[id(argument)] if isinstance(argument, Tensor) else Value(numel=1)

    def shape_of(self, name: str) -> torch.Size:
        """The shape of a parameter."""
        return self.record.parameters[name].shape

    def see(self, name: str, kind: str, mention: Mention, **more: Any) -> Sighting:
        """Note one use of a parameter by this operation."""
        made = Sighting(kind, self.name, self.where, derived=mention.derived, picked=mention.picked, **more)
        return self.record.see(name, made)

    def spread(self, mention: Mention, derived: bool = False) -> Mention:
        """A mention in a result that it is broadcast to."""
        return replace(mention, index=mention.index.expand(self.shape), derived=mention.derived or derived)

    def consume(self, value: Value, label: str = "") -> None:
        """Note that this operation reads a norm's result or a sum of first activations."""
        for readers in (value.norm, value.sum):
            if readers is not None:
                self.consumed.append((readers, label or self.name))

    def union(self, *values: Value) -> Value:
        """An activation or constant made of others in a way of which nothing else is known."""
        made = Value(is_live=any(value.acts for value in values), is_data=any(value.is_data for value in values))
        for value in values:
            made.products |= value.products
            made.roots |= value.origin
        return made

    def start(self, kept: list[Readers], names: Iterable[str], through: Readers | None = None) -> Readers:
        """A new sum or result of a norm, whose readers are noted from now on."""
        kept.append(Readers(frozenset(names), through=through))
        return kept[-1]

    def is_open(self, name: str, mention: Mention) -> bool:
        """Whether two axes or more of a weight are not summed over, so that a later sum may sum over one."""
        fan = frozenset[int]().union(*(sighting.fan for sighting in mention.met))
        return sum(extent > 1 and axis not in fan for axis, extent in enumerate(self.shape_of(name))) > 1

    def axis_values(self, name: str, mention: Mention) -> list[int | None]:
        """For each axis of a parameter, the index along it that a tensor holds, if it holds a single one."""
        held, stride, found = mention.index[mention.index >= 0], 1, list[int | None]()
        for extent in reversed(self.shape_of(name)):
            places = held // stride % extent
            found.append(int(places[0]) if bool((places == places[0]).all()) else None)
            stride *= extent
        return found[::-1]

    def note_sum(self, name: str, mention: Mention, fan: frozenset[int], value: Value, made: Value) -> None:
        """Note that a parameter times activations, or added to them, is summed over these axes of it."""
        scaling = bool(fan & self.record.scales[name])
        if mention.is_shift and not scaling:
            return
        for sighting in mention.met:
            self.summed.append((name, sighting, sighting.kind))
            average = "average" if self.name == "mean" and scaling else "contract"
            sighting.kind, sighting.fan = "distance" if mention.is_shift else average, sighting.fan | fan
        if mention.is_shift:
            made.products |= {name}
            return
        self.record.at[name] = self.where
        self.record.inner |= value.products - {name}
        made.products = made.trail = frozenset([name])
        if value.is_raw:
            made.sum = self.start(self.record.sums, made.products)

    def note_numbers(self) -> None:
        """Note the numbers written in the call, and in elementwise operations those in constants of a single value."""
        if self.name in operations.ADDED | operations.MULTIPLIED | {"pow", "addcmul", "addcdiv", "lerp"}:
            numbers = [float(one) for one in self.args if type(one) in (int, float)]
            for tensor, value in zip(self.inputs, self.values, strict=True):
                if not tensor.shape and not value.is_touched and not value.is_data:
                    numbers.append(float(tensor))
        else:
            numbers = [one for one in self.args if type(one) is float]
        self.record.numbers.append((self.where, self.name, tuple(numbers)))
