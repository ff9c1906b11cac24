"""CUDA graphs on the shadow device: a capture keeps its operations with their tensors, a replay makes them again in the same memory.

As on a device, an operation has no effect while it is captured, and a replay knows no value of the host but those of the
capture. What a graph can't hold is refused: a value that the host reads, and the host's memory. Import it before torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.shadow_cuda import Shadow, _run, shadowed
from tests.simulated_cuda import Watching

import torch  # isort: skip
from torch import Tensor  # isort: skip
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # isort: skip
from torch.utils._pytree import tree_leaves, tree_map  # isort: skip

Operation = tuple[Any, Any, Any, list[Shadow]]  # function, arguments, keywords, results


def place(tensor: Shadow) -> int:
    """The memory of a tensor and its views."""
    return tensor.held.untyped_storage().data_ptr()


def shadows(values: Any) -> list[Shadow]:
    return [value for value in tree_leaves(values) if isinstance(value, Shadow)]


class Graph:
    """The operations of a capture."""

    watching: Watching
    recording: Graph | None = None

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def replay(self) -> None:
        self.watching.ops["replay"] += 1
        with _disable_current_modes():
            for function, args, kwargs, recorded in self.operations:
                made = _run(function, args, kwargs)
                for old, new in zip(recorded, shadows(made), strict=True):
                    if place(old) != place(new):  # else a change in place, or a view, whose memory has the result
                        old.held.copy_(new.held)


class Capture(TorchDispatchMode):
    """Keeps the operations on the device, and what its memory held before them."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph, self._made = graph, dict[int, Shadow]()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = shadows((args, kwargs))
        for one in given:
            if place(one) not in self._made:
                memory = one.held.untyped_storage()
                self._before.setdefault(place(one), (memory, memory.clone()))
        # numbers () of the host become arguments of a kernel, which a replay doesn't read again
        args, kwargs = tree_map(
            lambda it: it.clone() if isinstance(it, Tensor) and not isinstance(it, Shadow) else it, (args, kwargs)
        )
        found = function(*args, **kwargs)
        if not given and not shadows(found):
            return found
        of_host = [
            it for it in tree_leaves((args, kwargs, found)) if isinstance(it, Tensor) and not isinstance(it, Shadow)
        ]
        if function is torch.ops.aten._local_scalar_dense.default or any(it.dim() for it in of_host):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function} of the host's memory")
        for one in shadows(found):
            if place(one) not in self._before:
                self._made.setdefault(place(one), one)
        self._graph.operations.append((function, args, kwargs, shadows(found)))
        return found

    def undo(self) -> None:
        """Leave memory as it was; what the graph makes has no sensible value before it is replayed."""
        with _disable_current_modes():
            for memory, content in self._before.values():
                memory.copy_(content)
            for one in self._made.values():
                one.held.fill_(float("nan") if one.is_floating_point() else 0)


@contextmanager
def recorded(graph: Graph, capture_error_mode: str = "global") -> Iterator[None]:
    """As `torch.cuda.graph`. Nothing is launched within it."""
    assert capture_error_mode == "thread_local", "another thread pins the next batch meanwhile, which this would refuse"
    capture, launched = Capture(graph), graph.watching.ops.copy()
    Graph.recording = graph
    try:
        with capture:
            yield
    finally:
        Graph.recording = None
        graph.watching.ops = launched
    capture.undo()


@contextmanager
def graphed(cards: int = 1) -> Iterator[Watching]:
    """As `shadowed`, with CUDA graphs."""
    with shadowed(cards) as watching, ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(torch.cuda, "CUDAGraph", type("CUDAGraph", (Graph,), {"watching": watching}))
        )
        stack.enter_context(mock.patch.object(torch.cuda, "graph", recorded))
        # an optimizer asks whether its step is captured, and refuses if it isn't made for that
        stream = SimpleNamespace(is_capturing=lambda: Graph.recording is not None)
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", lambda device=None: stream))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", stream.is_capturing))  # 2.11
        yield watching
