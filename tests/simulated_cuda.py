"""A CUDA device that computes nothing, in torch's CPU build: fake tensors with gradients, waits and launches counted.

What goes through has all tensors of each operation on one device, and dtypes and shapes that fit. Import it before torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

GUARD = Path(__file__).with_name("cuda_guard.cpp")


def load_guard() -> None:
    """Register the guard and the hooks of `cuda_guard.cpp`, compiled once for a version of torch."""
    if "torch" in sys.modules:
        raise ImportError("tests.simulated_cuda is imported after torch, which has looked for CUDA's hooks already")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    key = hashlib.sha256((folder / "version.py").read_bytes() + GUARD.read_bytes()).hexdigest()[:16]
    made = Path(tempfile.gettempdir(), f"supar-cuda-guard-{os.getuid()}-{key}.so")
    if not made.exists() or made.stat().st_uid != os.getuid():
        with tempfile.TemporaryDirectory(dir=made.parent) as aside:
            to, libraries = Path(aside, "guard.so"), folder / "lib"
            paths = [f"-I{folder / 'include'}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
            flags = ["-std=c++20", "-shared", "-fPIC", *paths]
            subprocess.run(["g++", *flags, GUARD, "-lc10", "-ltorch_cpu", "-o", to], check=True)
            to.rename(made)
    ctypes.CDLL(str(made))


load_guard()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

import supar_cli  # noqa: E402

# torch says of all optimizers but this one what fake tensors become
torch.library.impl("aten::_fused_sgd_", "Meta", lambda *_, **__: None)

aten = torch.ops.aten
ROOT = os.path.join(os.path.dirname(supar_cli.__file__), "")
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
COPIES = (aten._to_copy.default, aten.copy_.default)
# what starts no kernel: memory, and other looks at it
FREE = ("prim.", "aten.empty", "aten.new_empty", "aten._unsafe_view", "aten._reshape_alias", "aten.record_stream")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dictionaries; torch's own walk knows more and takes several times as long."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def is_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def pinned(tensor: Tensor) -> Tensor:
    tensor._is_pinned = True  # type: ignore[attr-defined]
    return tensor


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    return getattr(tensor, "_is_pinned", False)


def is_free_copy(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a copy between host and device was asked to be `non_blocking`."""
    return bool(kwargs.get("non_blocking", func is aten.copy_.default and args[2:3] == (True,)))


class Watching(TorchDispatchMode):
    """Counts what makes the host wait for the device, what is copied, and what is launched, by file:line of supar_cli.

    Values of fake tensors that the host reads are 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()

    @property
    def launches(self) -> int:
        """How many operations start a kernel on the device; attention is counted as plain operations, without its own kernel."""
        return sum(self.ops.values())

    def clear(self) -> None:
        for counter in (self.waits, self.copies, self.ops):
            counter.clear()

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {_place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func._schema.name == "aten::to":  # as torch.tensor calls it
            with self:
                return func.decompose(*args, **kwargs)
        is_pinning = kwargs.pop("pin_memory", False)
        tensors = list(tensors_in((args, kwargs)))
        if func in COPIES:
            self._count_copy(func, args, kwargs)
        elif func not in INDEXING:
            _require_one_device(func, tensors)
        if any(map(is_cuda, tensors)) and (func in READS or (func in INDEXING and _moves_indices(args[1]))):
            self.wait(func._schema.name.removeprefix("aten::"))
            if isinstance(args[0], FakeTensor) and func in READS:
                return _read(func, args)
        found = func(*args, **kwargs)
        is_view = getattr(func, "is_view", False)
        if any(map(is_cuda, (*tensors, *tensors_in(found)))) and not is_view and not str(func).startswith(FREE):
            self.ops[str(func)] += 1
        is_copy_to_host = func is aten._to_copy.default and is_cuda(args[0]) and is_free_copy(func, args, kwargs)
        if is_pinning or (is_view and is_pinned(args[0])) or is_copy_to_host:  # torch allocates the last so
            for tensor in tensors_in(found):
                pinned(tensor)
        return found

    def _count_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        source = args[1] if func is aten.copy_.default else args[0]
        goal = args[0].device if func is aten.copy_.default else torch.device(kwargs.get("device") or source.device)
        if source.device.type == goal.type:
            return
        to_host = goal.type == "cpu"
        host = args[0] if to_host and func is aten.copy_.default else None if to_host else source
        is_free, is_staged = is_free_copy(func, args, kwargs), host is None or is_pinned(host)
        way = "to the host" if to_host else "to the device"
        what = f"{'free' if is_free else 'blocking'} copy {way}{'' if is_staged else ', pageable'}"
        self.copies[f"{what} at {_place()}"] += 1
        if not (is_free and is_staged):
            self.wait(what)


def _require_one_device(func: Any, tensors: list[Tensor]) -> None:
    """Raise RuntimeError as CUDA would; a number () may lie on the host, but for fused optimizers."""
    is_fused = str(func).startswith("aten._fused_")
    places = {str(tensor.device): tuple(tensor.shape) for tensor in tensors if tensor.dim() or is_fused}
    if len(places) > 1:
        raise RuntimeError(f"{func} at {_place()}: expected all tensors on one device, found {places}")


def _place() -> str:
    """The line of supar_cli that is being run."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(ROOT):
        frame = frame.f_back
    return "autograd" if frame is None else f"{frame.f_code.co_filename.removeprefix(ROOT)}:{frame.f_lineno}"


def _moves_indices(indices: Any) -> bool:
    """Whether indexing waits: a mask's shape depends on data, and indices on the host are copied first."""
    return any(
        index is not None and (index.dtype in (torch.bool, torch.uint8) or not is_cuda(index)) for index in indices
    )


def _read(func: Any, args: Any) -> Any:
    """What the host reads of a fake tensor: one number, as the rest depends on data."""
    if func is not aten._local_scalar_dense.default:
        raise AssertionError(f"{func} at {_place()}: what it makes depends on data")
    return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)


class Inert:
    """A stream or a context in which everything is done at once; what waits for it is counted."""

    device, stream_id, cuda_stream = torch.device("cuda", 0), 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Inert:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in ("wait_stream", "wait_event", "wait", "record"):
            raise AttributeError(name)
        return lambda *_, **__: None


def card_patches(cards: int, wait: Callable[[str], None], memory: int = 80 * 2**30) -> list[Any]:
    """What makes torch say that the machine has `cards` devices. `wait(what)` is called where the host waits for one."""

    class Stream(Inert):
        def synchronize(self) -> None:
            wait("stream.synchronize")

        def query(self) -> bool:
            return True

        def record_event(self, event: Any = None) -> Any:
            event = event or torch.cuda.Event()
            event.record(self)
            return event

    class Event(Inert):
        def synchronize(self) -> None:
            wait("event.synchronize")

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    def properties(device: Any = None) -> Any:
        index = torch.device("cuda" if device is None else device).index if not isinstance(device, int) else device
        return SimpleNamespace(
            **{"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32},
            **{"total_memory": memory, "L2_cache_size": 50 * 2**20, "uuid": f"card-{index or 0}"},
        )

    current, state = [0], torch.zeros(16, dtype=torch.uint8)
    nothing = lambda *_, **__: None  # noqa: E731
    found = {
        **dict.fromkeys(("_lazy_init", "init", "manual_seed", "manual_seed_all", "set_rng_state"), nothing),
        **dict.fromkeys(("reset_peak_memory_stats", "set_stream", "empty_cache", "ipc_collect"), nothing),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_: 2**20),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "set_device": lambda device: current.append(
            device if isinstance(device, int) else torch.device(device).index or 0
        ),
        "current_device": lambda: current[-1],
        "device_count": lambda: cards,
        "get_device_name": lambda device=None: properties().name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": properties,
        "mem_get_info": lambda device=None: (memory, memory),
        "get_rng_state": lambda device=None: state.clone(),
        "synchronize": lambda device=None: wait("cuda.synchronize"),
        **{"Stream": Stream, "Event": Event, "stream": Inert, "device": Inert},
        **dict.fromkeys(("current_stream", "default_stream"), lambda device=None: Stream()),
    }
    patches = [mock.patch.object(torch.cuda, name, value) for name, value in found.items()]
    return [
        *patches,
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(Tensor, "pin_memory", lambda self, device=None: pinned(self.clone())),
        mock.patch.object(Tensor, "is_pinned", is_pinned),
        mock.patch.object(Tensor, "record_stream", nothing),
        mock.patch.object(torch.nn.Module, "_apply", _apply),
    ]


@contextlib.contextmanager
def simulated(cards: int = 1) -> Iterator[Watching]:
    """Within it torch has `cards` CUDA devices, and all tensors that are made are fake."""
    watching = Watching()
    with contextlib.ExitStack() as stack:
        for patch in (
            *card_patches(cards, watching.wait),
            mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None),
            mock.patch.object(FakeTensor, "tolist", lambda tensor: _tolist(tensor, watching)),
        ):
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watching)
        yield watching


def _tolist(tensor: FakeTensor, watching: Watching) -> Any:
    if is_cuda(tensor):
        watching.wait("tolist")
    with _disable_current_modes():
        return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()


def _apply(module: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """As torch's own, but parameters are made anew: these can be neither swapped nor changed in place."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(module, name, torch.nn.Parameter(fn(parameter), parameter.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return module
