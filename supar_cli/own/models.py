"""Users' models: built at a size, refused where they can't be read, and run with plain operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from supar_cli.planning.layout import MOST_EXTENTS
from supar_cli.user_code import can_be_called

Shapes = dict[str, list[int]]
QUANTISED = ("bitsandbytes", "torchao", "deepspeed", "fairscale", "megatron", "transformer_engine", "apex")


def shapes_of(parameters: Mapping[str, Tensor]) -> Shapes:
    """Shapes by name; a single number has one extent of 1."""
    return {name: list(parameter.shape) or [1] for name, parameter in parameters.items()}


def refusals(model: nn.Module) -> list[str]:
    """What of a model can't be read: parameters that are not whole, not there, or no real numbers."""
    found = []
    for name, parameter in model.named_parameters():
        kind = type(parameter)
        if is_lazy(parameter):
            found.append(f"{name}: has no shape before the first pass; expected a layer that is told its inputs")
        elif parameter.is_complex() or not parameter.is_floating_point():
            found.append(
                f"{name}: holds {parameter.dtype}; expected real numbers, not complex, integer or quantised ones"
            )
        elif kind not in (nn.Parameter, Tensor):
            found.append(f"{name}: is a {kind.__name__}; expected a plain parameter, before sharding or quantising")
        elif len(parameter.shape) > MOST_EXTENTS:
            found.append(f"{name}: has {len(parameter.shape)} extents; expected {MOST_EXTENTS} at most")
        elif parameter.numel() == 0:
            found.append(f"{name}: is empty; expected a parameter with values")
        elif parameter.is_nested or parameter.layout is not torch.strided:
            found.append(f"{name}: is not a dense tensor; expected one")
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel) or type(module).__module__.partition(".")[0] in QUANTISED:
            found.append(f"{name or 'the model'}: is a {type(module).__name__}; expected the plain module inside")
    return found


def arguments_of(example: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keywords of a forward pass: from a function of the model or of nothing, or from the values."""
    if callable(example) and not isinstance(example, Tensor | Mapping):
        example = example() if can_be_called(example) else example(model)
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


@contextmanager
def plain_operations() -> Iterator[None]:
    """Run with operations that show what they do with parameters: nothing fused, nothing compiled."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None))  # None: as it is
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
