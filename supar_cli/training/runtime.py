"""How a plan runs on this machine: device, precision, compilation, micro-batch and parallelism, and whether it fits."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from supar_cli.errors import InputError, SetupError
from supar_cli.planning import estimate
from supar_cli.planning.plan import Plan
from supar_cli.sparse.block import what_triton_lacks
from supar_cli.training.distributed import ALONE, Parallelism, Ranks, collective_error
from supar_cli.version import __version__

USED_SHARE = 0.9  # chosen: of a device's memory; the allocator and the libraries need the rest

# Dense bf16 matrix peaks in TFLOP/s with sums in float32, from NVIDIA's datasheets, by words of the device's name; the first
# row whose words are all there counts. V100 has no bf16
PEAK_TFLOPS = {
    "GB300": 2500,
    "GB200": 2500,
    "B300": 2250,
    "B200": 2250,
    "B100": 1750,
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "5090": 209.5,
    "4090 D": 147,
    "4090": 165,
}
# what torch, CUDA's libraries and the C++ library say when memory is short; other errors speak of memory too
LACKS_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "bad_alloc")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of numpy, torch or CUDA says that memory is short: of the host, or of a device."""
    is_type = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_type or (isinstance(error, RuntimeError) and any(words in str(error) for words in LACKS_MEMORY))


def peak_flops(name: str) -> float | None:
    """The dense bf16 peak in FLOP/s of a CUDA device by its name, None if unknown. A MIG device has its sevenths of it."""
    words = name.replace("-", " ").split()
    peak = next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if set(key.split()) <= set(words)), None)
    if peak is None or "MIG" not in words:
        return peak
    slices = words[words.index("MIG") + 1 :][:1]  # such as 1g.10gb
    sevenths = slices[0].partition("g.")[0] if slices else ""
    return peak * int(sevenths) / 7 if sevenths.isdecimal() else None


def versions() -> dict[str, str]:
    """The versions that a document with measurements states."""
    return {"supar": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """The name of a CUDA device, or `cpu` with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def used_device() -> dict[str, str]:
    """The name of the CUDA device that this process has used as `cuda`, for records of its runs; nothing if none."""
    is_used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {"cuda": torch.cuda.get_device_name()} if is_used else {}


def device_of(word: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of this process by a word. Raises SetupError if the machine lacks it, InputError for an unknown word.

    It takes none of the device's memory, as a process whose workers compute asks too.
    """
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "cpu"
    device = None
    with suppress(RuntimeError):
        device = torch.device(word)
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"run.device: {word!r} is not a valid device; expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if ranks.is_distributed:
        if device.index is not None:
            raise InputError(f"run.device: {ranks.size} processes can't all use {word}; expected cuda, one for each")
        # a launcher such as Slurm may show each process its own device alone; `require_own_devices` tells shared ones
        device = torch.device("cuda", 0 if torch.cuda.device_count() == 1 else ranks.local_rank)
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise SetupError(f"run.device: {device}: torch {torch.__version__} finds no such device on this machine")
    index = device.index  # torch selects devices by number only
    if index is None:  # the current device is the first one until CUDA is used, which to ask for it would do
        is_used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if is_used else 0
    return torch.device("cuda", index)


def batch_shares(plan: Plan, ranks: Ranks = ALONE) -> tuple[int, int]:
    """The sequences of a process in a step, and in one of its passes. Raises InputError where they divide nothing evenly."""
    rows, left = divmod(plan.train.batch_size, ranks.size)
    if left:
        what = f"{plan.train.batch_size} {plan.decoder.rows} can't be shared evenly by {ranks.size} processes"
        raise InputError(f"train.batch_size: {what}")
    micro = plan.run.micro_batch_size or rows
    if rows % micro:
        what = "the batch size" if ranks.size == 1 else f"a process's share of {ranks.size} of the batch,"
        raise InputError(f"run.micro_batch_size: {micro} does not divide {what} {rows}; expected a divisor")
    return rows, micro


def require_own_devices(device: torch.device, ranks: Ranks) -> None:
    """Raise SetupError, in every rank, where two ranks of a machine compute on the same CUDA device."""
    if device.type != "cuda" or not ranks.is_distributed:
        return
    own = f"{platform.node()}, {torch.cuda.get_device_properties(device).uuid}"
    first: dict[str, int] = {}
    for rank, one in enumerate(ranks.gather(own)):
        if one in first:
            what = f"ranks {first[one]} and {rank} compute on the same device ({one})"
            raise collective_error(SetupError, f"run.device: {what}; expected a device for each process")
        first[one] = rank


def is_slow(device: torch.device, precision: torch.dtype) -> bool:
    """Whether products are much slower than in float32: bfloat16 on a CPU without units for it."""
    if device.type != "cpu" or precision != torch.bfloat16:
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def device_thread(device: torch.device, name: str) -> ThreadPoolExecutor:
    """A pool of one thread whose current CUDA device is `device`."""
    if device.type == "cuda":
        return ThreadPoolExecutor(1, name, torch.cuda.set_device, (device,))
    return ThreadPoolExecutor(1, name)


@dataclass(slots=True)
class Runtime:
    """How a plan runs on this machine. `micro_batch` and `rows`, its share of the batch, are sequences of one process.

    `precision` is that of products' factors, which `is_tf32` rounds to TensorFloat32. `why_eager`: what is missing to compile,
    where the plan leaves it to the machine. `has_graph`: a step is one CUDA graph.
    """

    device: torch.device
    precision: torch.dtype
    compiles: bool
    micro_batch: int
    rows: int
    why_eager: str | None = None
    is_tf32: bool = False
    has_graph: bool = False

    @classmethod
    def of(cls, plan: Plan, ranks: Ranks = ALONE) -> Runtime:
        device = device_of(plan.run.device, ranks)
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        word = plan.run.precision
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = native if word == "auto" else word == "bfloat16"
        is_tf32 = word == "tf32"
        if is_tf32 and not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
            what = f"tf32 needs a CUDA device of compute capability 8.0 or more, which {device_name(device)} is not"
            raise SetupError(f"run.precision: {what}; expected auto, float32 or bfloat16")
        compiles, lack = plan.run.compile == "on", None
        if cuda and plan.run.compile != "off":
            lack = what_triton_lacks(device)
            if compiles and lack is not None:
                raise SetupError(f"run.compile: on, but {lack}; expected auto or off on this machine")
            compiles = lack is None
        rows, micro = batch_shares(plan, ranks)
        has_graph = plan.run.cuda_graph == "on"
        if has_graph:
            _require_graph(plan, device, ranks)
        precision = torch.bfloat16 if bf16 else torch.float32
        return cls(device, precision, compiles, micro, rows, lack, is_tf32, has_graph)

    def to_device(self, batch: tuple[torch.Tensor, ...], rows: slice = slice(None)) -> tuple[torch.Tensor, ...]:
        """These rows of a batch's tensors on the device."""
        return tuple(tensor[rows].to(self.device, non_blocking=True) for tensor in batch)

    def peak_share(self, flops_per_unit: float | None, units_per_s: float) -> float | None:
        """The FLOP/s of this process divided by its device's dense peak; None if one is unknown, or in float32.

        Masked weights count as dense: that is what is computed. In TF32 the datasheets' peaks are half of those in bf16.
        """
        share_of_bf16 = {"bfloat16": 1.0, "tf32": 0.5}.get(self.precision_name)
        if self.device.type != "cuda" or flops_per_unit is None or share_of_bf16 is None:
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        return None if peak is None else units_per_s * flops_per_unit / (share_of_bf16 * peak)

    @property
    def precision_name(self) -> str:
        """The word for it in documents: float32, tf32 or bfloat16."""
        return "tf32" if self.is_tf32 else str(self.precision).removeprefix("torch.")

    def environment(self, processes: int, parallel: Parallelism) -> dict[str, Any]:
        """What a run's result says of where it was made."""
        return {
            **versions(),
            "device": device_name(self.device),
            "processes": processes,
            "parallel": parallel,
            "precision": self.precision_name,
            "compiled": self.compiles,
        }

    @property
    def warnings(self) -> list[str]:
        """What a user should know before a run begins."""
        what = "bfloat16 on a CPU without units for it takes several times as long as float32"
        return [f"run.precision: {what}; expected float32"] if is_slow(self.device, self.precision) else []

    @contextmanager
    def products(self) -> Iterator[None]:
        """Inside, CUDA multiplies in this precision, whatever the process has set, and adds up in float32 alone."""
        if self.device.type == "cpu":
            yield
            return
        wanted = {"fp32_precision": "tf32" if self.is_tf32 else "ieee", "allow_bf16_reduced_precision_reduction": False}
        matmul = torch.backends.cuda.matmul
        before = {name: getattr(matmul, name) for name in wanted}
        try:
            for name, value in wanted.items():
                setattr(matmul, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(matmul, name, value)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """For forward passes, in this precision."""
        is_cast = self.precision != torch.float32
        with self.products(), torch.autocast(self.device.type, self.precision) if is_cast else nullcontext():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """The gradients of a loss, in this precision."""
        with self.products():
            torch.autograd.backward(loss)


def _require_graph(plan: Plan, device: torch.device, ranks: Ranks) -> None:
    """Raise InputError, or SetupError of this machine, where a plan's step can't be one CUDA graph."""
    if device.type != "cuda":
        raise SetupError(f"run.cuda_graph: on, but the device is {device}; expected off, or a CUDA device")
    why = "several processes exchange gradients" if ranks.is_distributed else None
    if plan.sparsity.updates is not None:
        why = "masks move while it trains (sparsity.updates)"
    if why is not None:
        raise InputError(f"run.cuda_graph: on, but {why}; expected off")


def choose_parallelism(plan: Plan, runtime: Runtime, ranks: Ranks) -> tuple[Parallelism, str]:
    """How the ranks hold the plan's model, the same in each, and the reason if the plan leaves it to the machine.

    Raises SetupError where two of them share a device.
    """
    require_own_devices(runtime.device, ranks)
    return ranks.on_main(_choose_parallelism, plan, runtime, ranks)


def _choose_parallelism(plan: Plan, runtime: Runtime, ranks: Ranks) -> tuple[Parallelism, str]:
    if not ranks.is_distributed:
        return "alone", ""
    if plan.run.parallel != "auto":
        return plan.run.parallel, ""
    is_cuda = runtime.device.type == "cuda"
    engine = plan.run.engine if isinstance(plan.run.engine, str) else "dense"
    engine = "sparse" if engine == "auto" and not is_cuda else engine
    needed_bytes = estimate.state_bytes(plan, engine, runtime.precision.itemsize)
    needed_bytes += estimate.activation_bytes(plan, runtime.micro_batch, runtime.precision.itemsize, is_cuda)
    device_bytes = torch.cuda.mem_get_info(runtime.device)[1] if is_cuda else _host_bytes() // ranks.local_size
    usable_bytes = int(USED_SHARE * device_bytes)
    kind: Parallelism = "fsdp" if needed_bytes > usable_bytes else "ddp"
    words = {"ddp": "fits a device", "fsdp": "does not fit a device"}[kind]
    return kind, f"{kind}: the plan {words}: about {needed_bytes / 2**30:.2f} GiB of {usable_bytes / 2**30:.2f} GiB"


def require_host_memory(plan: Plan, runtime: Runtime, ranks: Ranks) -> None:
    """Raise SetupError if this machine has too little memory for a plan: Linux would kill the process without a message.

    Each process builds the model in host memory: masks and live values, and all the rest if it trains on the CPU.
    """
    masked = sum(row.size for row in plan.tensors if row.kept < row.size)
    needed_bytes = masked + 4 * estimate.start_live(plan.tensors, plan) + estimate.squared_bytes(plan, 0)
    if runtime.device.type == "cpu":
        needed_bytes = masked + estimate.state_bytes(plan, "sparse", 4)
        needed_bytes += estimate.activation_bytes(plan, runtime.micro_batch, runtime.precision.itemsize)
    needed_bytes, host_bytes = needed_bytes * ranks.local_size, _host_bytes()
    if needed_bytes > host_bytes:
        what = f"the plan needs about {needed_bytes / 2**30:.1f} GiB, this machine has {host_bytes / 2**30:.1f}"
        raise SetupError(f"out of memory: {what}; expected a smaller model, context or run.micro_batch_size")


def _host_bytes() -> int:
    """This machine's memory, or the limit of the container."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # there is no control group, or its limit is `max`
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text("utf-8")))
    return found
