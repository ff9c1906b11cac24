"""A forward pass watched: every ATen operation that a model runs, followed by what it does with parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the one way to see every operation; torch names no other

from supar_cli.own import contraction, elementwise, movement, operations
from supar_cli.own.record import Call, Record
from supar_cli.own.values import Sighting, Value, tensors_in


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows a model's parameters through passes and notes their uses in a record."""

    def __init__(self, record: Record) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record
        self._modules: list[str] = [""]
        self._own: set[int] = set()

    def begin(self) -> None:
        """Begin a pass: forget the values of the last one."""
        self.record.begin()
        self._own = {self.record.storages.key(parameter) for parameter in self.record.parameters.values()}

    def take(self, example: Any) -> None:
        """Note that tensors are the example's, not constants of the model."""
        storages = self.record.storages
        for tensor in tensors_in(example):
            if storages.key(tensor) not in self._own and not storages.read(tensor).is_touched:
                storages.write(tensor, Value(is_live=tensor.is_floating_point(), is_data=True))

    def leave(self, result: Any) -> None:
        """Note what leaves the model."""
        for tensor in tensors_in(result):
            value = self.record.storages.read(tensor)
            self.record.leaving |= value.products
            self.record.roots |= value.origin
            for name in value.weights:
                self.record.see(name, Sighting("join", "output", ""))
            for readers in (value.norm, value.sum):
                if readers is not None:
                    readers.by[0] = "output"

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Follow a pass of this model, and know which module runs. What enters from outside is data."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._going, always_call=True))
        self._modules = [""]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if len(self._modules) == 1:
                self.take((args, kwargs))
            self._modules.append(name)

        return enter

    def _going(self, module: nn.Module, args: Any, result: Any) -> None:
        if len(self._modules) > 1:
            self._modules.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(tensors_in([args, kwargs]))
        values = [self._read(tensor) for tensor in inputs]
        result = func(*args, **kwargs)
        # what a backward pass does with a parameter says nothing of its role
        if torch._C._current_graph_task_id() == -1:
            call = Call(self.record, func, self._modules[-1], (args, kwargs), inputs, values)
            outputs = list(tensors_in(result))
            if not self._is_view(call, outputs):
                self._follow(call, outputs)
        return result

    def _read(self, tensor: Tensor) -> Value:
        """What is known of an argument. Parameters whose memory is read as other numbers can't be followed."""
        value = self.record.storages.read(tensor)
        for name in self.record.storages.unread(tensor):
            self.record.see(name, Sighting("unknown", "a view as other numbers", self._modules[-1]))
        return value

    def _is_view(self, call: Call, outputs: list[Tensor]) -> bool:
        """Whether nothing is made: a view, which has the memory of its argument, or an optimizer's step."""
        key = self.record.storages.key
        if call.func._schema.is_mutable:
            return any(key(tensor) in self._own for tensor in call.inputs[:1])
        keys = {key(tensor) for tensor in call.inputs}
        return call.func.is_view or (bool(outputs) and all(o.numel() and key(o) in keys for o in outputs))

    def _follow(self, call: Call, outputs: list[Tensor]) -> None:
        call.shape = outputs[0].shape if outputs else call.shape
        call.note_numbers()
        made = Value()
        if call.name not in operations.SHAPES and call.inputs:
            made = follow(call)
            for value in call.values:
                made.bits |= value.bits
                made.is_data |= value.is_data
                made.is_touched |= value.is_touched
        for number, output in enumerate(outputs):
            shaped = {name: one for name, one in made.mentions.items() if one.index.shape == output.shape}
            shaped = shaped if output.is_floating_point() or output.is_complex() else {}
            whole = made if number == 0 else replace(made, norm=None, sum=None)
            self.record.storages.write(output, replace(whole, mentions=shaped), call.copied)
        if outputs:
            bit = self.record.storages.bit_of(outputs[0])
            self.record.summed += [(bit, *summed) for summed in call.summed]
            for readers, label in call.consumed:
                readers.by[bit] = label


BY_TABLE: list[tuple[frozenset[str], Callable[[Call], Value]]] = [
    (operations.PRODUCTS, contraction.product),
    (operations.CONVOLUTIONS, contraction.convolution),
    (frozenset(["_trilinear"]), contraction.trilinear),
    (frozenset(operations.NORMS), movement.normalise),
    (operations.LOOKED_UP | operations.MOVED | operations.RESAMPLED, movement.move),
    (operations.SUMS, movement.reduce),
    (frozenset(["_weight_norm_interface"]), movement.weight_norm),
    (operations.ACCUMULATED, elementwise.accumulate),
]


def follow(call: Call) -> Value:
    """What is known of an operation's result."""
    handler = next((handler for table, handler in BY_TABLE if call.name in table), None)
    if handler is not None:
        return handler(call)
    pair = [call.operand(argument) for argument in call.args[:2]]
    if call.name in operations.ADDED and len(pair) == 2:
        return elementwise.add(call, pair[0], pair[1])
    if call.name in operations.MULTIPLIED and len(pair) == 2:
        return elementwise.multiply(call, pair[0], pair[1], divides=call.name == "div")
    if call.name in ("neg", "positive"):
        return elementwise.multiply(call, pair[0], Value(numel=1))
    if call.name in ("addcmul", "addcdiv"):
        third = call.operand(call.args[2])
        return elementwise.add(call, pair[0], elementwise.multiply(call, pair[1], third, call.name == "addcdiv"))
    if call.name == "lerp":
        moved = elementwise.multiply(call, elementwise.add(call, pair[1], pair[0]), call.operand(call.args[2]))
        return elementwise.add(call, pair[0], moved)
    return movement.apply(call)
