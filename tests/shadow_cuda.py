"""A CUDA device with real numbers: tensors that say `cuda` and are computed on the CPU. Whole runs go through CUDA's paths.

What mixes devices is refused, as CUDA would. A copy that is `non_blocking` is done when the host waits: a copy to the host
holds nothing sensible before, and the source of one to the device may not change. Import it before torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tests.simulated_cuda import COPIES, Inert, Watching, card_patches, is_free_copy, is_pinned, tensors_in

import torch  # isort: skip
from torch import Tensor  # isort: skip
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # isort: skip

aten = torch.ops.aten
WRONG = 77  # what memory on the host holds before a copy to it is done


class Shadow(Tensor):
    """A tensor on a CUDA device; `held` has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Shadow:
        layout = held.size(), held.stride(), held.storage_offset()
        with torch.inference_mode(False):  # else no view of it could be made
            made: Shadow = Tensor._make_wrapper_subclass(cls, *layout, dtype=held.dtype, device=_indexed(device))  # type: ignore[attr-defined]
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Shadow({self.held}, device={self.device})"

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Stream:
    """The work of the device that the host has not waited for, in order."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []
        self.done = 0

    @property
    def enqueued(self) -> int:
        return self.done + len(self.pending)

    def wait(self, until: int | None = None) -> None:
        """Do what was enqueued before, or all of it."""
        while self.pending and (until is None or self.done < until):
            self.done += 1
            self.pending.pop(0)()


STREAM = Stream()


class Event(Inert):
    """An event of the one stream."""

    until: int | None = None

    def record(self, stream: Any = None) -> None:
        self.until = STREAM.enqueued

    def synchronize(self) -> None:
        Event.count("event.synchronize")
        STREAM.wait(self.until or 0)

    def query(self) -> bool:
        return STREAM.done >= (self.until or 0)

    def elapsed_time(self, other: Event) -> float:
        return 1.0

    count: Callable[[str], None] = staticmethod(lambda what: None)


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def held(value: Any) -> Any:
    """What is computed with, in lists and dictionaries too."""
    if isinstance(value, list | tuple):
        return [held(part) for part in value]
    if isinstance(value, dict):
        return {key: held(part) for key, part in value.items()}
    return value.held if isinstance(value, Shadow) else value


def shadows(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(shadows(part, device) for part in value)
    return Shadow(value, device) if isinstance(value, Tensor) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    own = next((value.device for value in tensors_in((args, kwargs)) if isinstance(value, Shadow)), torch.device("cpu"))
    device = torch.device(own if kwargs.get("device") is None else kwargs["device"])
    if "cuda" not in (own.type, device.type):
        return func(*args, **kwargs)
    if func is aten._fused_sdp_choice.default:
        return 0  # its kernels are of one device only; this is the choice of plain operations
    if func is aten._local_scalar_dense.default:
        STREAM.wait()
    if func in COPIES:
        return _copy(func, args, kwargs)
    plain = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    found = func(*held(args), **held(plain))
    if device.type == "cpu":
        return found
    made = shadows(found, device)
    has_aliases = func.is_view or func._schema.is_mutable
    return return_and_correct_aliasing(func, args, kwargs, made) if has_aliases else made


def _copy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A copy within the device, or between it and the host."""
    is_free = is_free_copy(func, args, kwargs)
    source = args[1] if func is aten.copy_.default else args[0]
    if func is aten.copy_.default:
        target = args[0]
    else:
        device = torch.device(kwargs.get("device") or source.device)
        dtype = kwargs.get("dtype") or source.dtype
        layout = {"memory_format": kwargs.get("memory_format") or torch.preserve_format}
        target = torch.empty_like(held(source), dtype=dtype, **layout)
        target = Shadow(target, device) if device.type == "cuda" else target
    real, copied = held(target), held(source).clone()
    if isinstance(source, Shadow) == isinstance(target, Shadow):
        real.copy_(copied)
    elif isinstance(target, Shadow):
        real.copy_(copied)
        if is_free and is_pinned(source):
            STREAM.pending.append(lambda: _require_same(source, copied))
        else:
            STREAM.wait()
    elif is_free:
        real.fill_(WRONG)
        STREAM.pending.append(lambda: _land(real, copied))
    else:
        STREAM.wait()
        real.copy_(copied)
    return target


@torch.utils._python_dispatch._disable_current_modes()
def _land(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


@torch.utils._python_dispatch._disable_current_modes()
def _require_same(source: Tensor, copied: Tensor) -> None:
    if not torch.equal(source, copied):
        raise RuntimeError("memory on the host was changed before its copy to the device was done")


class Making(TorchDispatchMode):
    """Sees what makes tensors on the device of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def shadowed(cards: int = 1) -> Iterator[Watching]:
    """Within it torch has `cards` CUDA devices, whose tensors hold real numbers."""
    watching = Watching()

    def wait(what: str) -> None:
        watching.wait(what)
        if what != "event.synchronize":
            STREAM.wait()

    with contextlib.ExitStack() as stack:
        for patch in card_patches(cards, wait):
            stack.enter_context(patch)
        stack.callback(STREAM.wait)
        stack.enter_context(mock.patch.object(torch.cuda, "Event", Event))
        stack.enter_context(mock.patch.object(Event, "count", staticmethod(watching.wait)))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # what is made of Python's numbers is seen when it is copied
        stack.enter_context(Making())
        stack.enter_context(watching)
        yield watching
