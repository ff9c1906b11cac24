"""Dead weights of a user's parameters: set to 0 in values, gradients and moments, in whole tensors and in shards.

They are set by clearing their bits, never multiplied: 0 · inf is nan, and 0 · (−1) is −0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from supar_cli.errors import InputError
from supar_cli.own.parameters import local_shard, shard_like, whole
from supar_cli.sparse.masks import Mask

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a value


class DeadWeights:
    """The positions that are dead in one parameter, as this process holds it: whole or a shard.

    Where masks move they may have moments (`keeps_moments`), gradients (`keeps_gradients`), and values until a mask is
    chosen by them after the next step (`is_chosen_next`); `collects`: it is chosen by their gradients, which are summed.
    """

    def __init__(self, mask: Mask, parameter: Tensor) -> None:
        self.keeps_moments = self.keeps_gradients = self.is_chosen_next = self.collects = False
        self._gradient: Tensor | None = None
        self.move(mask, parameter)

    def move(self, mask: Mask, parameter: Tensor) -> None:
        """Take another mask; nothing is set to 0."""
        self.mask = mask
        alive = torch.from_numpy(mask.alive()).view(torch.int8)
        self._bits = shard_like(-alive, parameter)  # all bits set where the weight lives

    def collect(self, gradient: Tensor) -> None:
        """Add what one backward pass gave; a gradient that was made anew begins a new sum."""
        if self._gradient is None or not hasattr(gradient, "_supar_collected"):
            self._gradient = gradient.detach().float().clone()
            gradient._supar_collected = True  # type: ignore[attr-defined]
        else:
            self._gradient.add_(gradient)

    def take_gradient(self, name: str, step: int) -> Tensor:
        """The collected gradient of a step, of all processes. Collective. Raises InputError if there is none."""
        found, self._gradient = self._gradient, None
        if found is None:
            what = f"the backward pass of step {step} gave it no gradient to grow weights by"
            raise InputError(f"{name}: {what}; expected loss.backward() in each step, in the prepared model")
        if dist.is_initialized() and not isinstance(found, DTensor):  # that of shards is summed already
            dist.all_reduce(found)
        return whole(found)

    @property
    def live_here(self) -> int:
        """The number of live weights that this process holds."""
        return int(torch.count_nonzero(self._bits))

    def zero_(self, tensor: Tensor) -> None:
        """Set the dead entries of a tensor to 0: the parameter, its gradient or a moment."""
        integers = _integers(local_shard(tensor))
        integers.bitwise_and_(self._like(integers))

    def count_live(self, tensor: Tensor) -> Tensor:
        """How many dead entries are not 0, () on the tensor's device. −0 is 0."""
        values = local_shard(tensor)
        integers = _integers(values)
        return torch.count_nonzero(integers.bitwise_and(~self._like(integers)).view(values.dtype))

    def moments(self, state: Mapping[str, Any], shape: torch.Size) -> Iterator[Tensor]:
        """Everything that an optimizer keeps of the parameter's shape."""
        for moment in state.values():
            if isinstance(moment, Tensor) and moment.shape == shape and moment.is_floating_point():
                yield moment

    def zero_moments_(self, state: Mapping[str, Any], shape: torch.Size) -> None:
        """Set the dead entries of the moments to 0."""
        for moment in self.moments(state, shape):
            self.zero_(moment)

    def _like(self, integers: Tensor) -> Tensor:
        """The bits on the tensor's device: the model may have been moved. On CPUs also in its type, which they would be copied to."""
        dtype = integers.dtype if integers.device.type == "cpu" else torch.int8
        if self._bits.device != integers.device or self._bits.dtype != dtype:
            self._bits = self._bits.to(integers.device, dtype)
        return self._bits


def _integers(values: Tensor) -> Tensor:
    """The bits of values as integers of their size."""
    return values.view(_INTEGERS[values.element_size()])


class _ZeroGradient:
    """Sets dead gradients to 0 as they are accumulated, so that moments and norms never see them."""

    def __init__(self, dead: DeadWeights) -> None:
        self.dead = dead

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if self.dead.collects:
            self.dead.collect(parameter.grad)
        if not self.dead.keeps_gradients:
            self.dead.zero_(parameter.grad)


# what each prepared parameter has, so that preparing twice replaces a hook: (dead weights, handle)
_hooked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def hook(parameter: nn.Parameter, mask: Mask | None) -> DeadWeights | None:
    """Keep the dead gradients of a parameter at 0 under this mask from now on, in place of any earlier one."""
    dead, handle = _hooked.pop(parameter, (None, None))  # type: ignore[no-untyped-call]
    if handle is not None:
        handle.remove()
    if mask is None:
        _hooked[parameter] = (None, None)
        return None
    if dead is None or dead.mask != mask:
        dead = DeadWeights(mask, parameter)
    handle = None
    if parameter.requires_grad:
        zero = _ZeroGradient(dead)
        handle = parameter.register_post_accumulate_grad_hook(zero)  # type: ignore[no-untyped-call]
    _hooked[parameter] = (dead, handle)
    return dead  # type: ignore[no-any-return]


def of(parameter: Tensor) -> DeadWeights | None:
    """The dead weights that a parameter has now."""
    found: tuple[DeadWeights | None, Any] = _hooked.get(parameter, (None, None))  # type: ignore[no-untyped-call]
    return found[0]


def is_prepared(parameters: Iterable[Tensor]) -> bool:
    """Whether any of the parameters is a prepared model's."""
    return any(parameter in _hooked for parameter in parameters)
