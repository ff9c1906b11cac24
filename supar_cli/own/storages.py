"""Values by the memory that holds them, so that every view of a tensor is known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from supar_cli.own.values import NONE, Value


class Storages:
    """Values by the memory that holds them, so that every view of a tensor is known."""

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}
        self._sizes: dict[int, int] = {}
        self._bits: dict[tuple[int, int, int], int] = {}
        self._alive: list[Tensor] = []  # so that no address is used twice
        self._serial: dict[int, int] = {}
        self._parts: dict[tuple[int, int, int], Value] = {}  # written through a view
        self._next = 0
        self._last_bit = 1

    def key(self, tensor: Tensor) -> int:
        """The memory of a tensor; 0: it has no numbers."""
        if tensor.layout is not torch.strided:
            return -id(tensor)
        return tensor.untyped_storage().data_ptr() if tensor.numel() else 0

    def holds(self, tensor: Tensor) -> bool:
        return self.key(tensor) in self._values

    def read(self, tensor: Tensor) -> Value:
        """What is known of a tensor: its mentions have its shape."""
        key = self.key(tensor)
        self._alive.append(tensor)
        if key not in self._values:
            self._keep(key, tensor, Value(is_live=key == 0))
        stored = self._values[key]
        bit = self._bit(key, tensor)
        part = self._parts.get(self._place(key, tensor))
        mentions = {}
        for name, mention in stored.mentions.items() if self._sizes[key] == tensor.element_size() else ():
            index = _as_view(mention.index, tensor)
            if bool((index >= 0).any()):
                mentions[name] = replace(mention, index=index)
        numel = tensor.numel()
        stored = stored if part is None else part
        return replace(stored, mentions=mentions, bit=bit, bits=stored.bits | bit, numel=numel)

    def unread(self, tensor: Tensor) -> list[str]:
        """The parameters in a tensor's memory that it shows as numbers of another width, such as complex ones."""
        key = self.key(tensor)
        return list(self._values[key].mentions) if self._sizes[key] != tensor.element_size() else []

    def write(self, tensor: Tensor, value: Value, same_as: Value | None = None) -> None:
        """Keep what is known of a tensor. `same_as`: the value that it is a copy of."""
        key = self.key(tensor)
        self._alive.append(tensor)
        if key == 0:
            return
        old = self._values.get(key)
        is_strided = tensor.layout is torch.strided
        part = is_strided and tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        if not tensor.is_floating_point():  # a result that was rounded or compared is the model's no longer
            value = replace(value, products=NONE, roots=NONE, trail=NONE, norm=None, sum=None)
        mentions = dict(old.mentions) if old and part else {}
        for name, mention in value.mentions.items():
            whole = _whole(tensor, mentions[name].index if name in mentions else None)
            _as_view(whole, tensor).copy_(mention.index)
            met = mention.met + (mentions[name].met if name in mentions and mention.met else ())
            mentions[name] = replace(mention, index=whole, met=met)
        if old and part:
            for name in set(mentions) - set(value.mentions):
                whole = mentions[name].index.clone()
                _as_view(whole, tensor).fill_(-1)
                mentions[name] = replace(mentions[name], index=whole)
            place = self._place(key, tensor)
            self._parts[place] = value
            self._bits[place] = self._new_bit()
            value = replace(
                value,
                is_live=value.is_live or old.is_live,
                is_data=value.is_data or old.is_data,
                is_touched=value.is_touched or old.is_touched,
                bits=value.bits | old.bits,
                products=value.products | old.products,
                roots=value.roots | old.roots,
                parts=value.parts | old.parts,
                trail=value.trail | old.trail,
            )
            self._values[key] = replace(value, mentions=mentions)
            return
        self._keep(key, tensor, replace(value, mentions=mentions))
        if same_as is not None and same_as.numel == tensor.numel():
            self._bits[self._place(key, tensor)] = same_as.bit

    def bit_of(self, tensor: Tensor) -> int:
        key = self.key(tensor)
        return self._bit(key, tensor) if key in self._values else 0

    def _keep(self, key: int, tensor: Tensor, value: Value) -> None:
        self._values[key] = value
        self._sizes[key] = tensor.element_size()
        self._serial[key] = self._next
        self._next += 1

    def _place(self, key: int, tensor: Tensor) -> tuple[int, int, int]:
        offset = int(tensor.storage_offset()) if tensor.layout is torch.strided else 0
        return self._serial[key], offset, tensor.numel()

    def _bit(self, key: int, tensor: Tensor) -> int:
        place = self._place(key, tensor)
        if place not in self._bits:
            self._bits[place] = self._new_bit()
        return self._bits[place]

    def _new_bit(self) -> int:
        self._last_bit <<= 1
        return self._last_bit


def _whole(tensor: Tensor, old: Tensor | None) -> Tensor:
    """Elements of a parameter at all places of a tensor's memory: as before, or none."""
    if old is not None:
        return old.clone()
    return torch.full((tensor.untyped_storage().nbytes() // tensor.element_size(),), -1)


def _as_view(whole: Tensor, tensor: Tensor) -> Tensor:
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
