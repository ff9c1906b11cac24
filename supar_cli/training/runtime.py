"""What a plan resolves to on this machine: device, precision, compiling, rows at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from supar_cli.errors import InputError, SetupError
from supar_cli.planning.plan import Plan
from supar_cli.training.distributed import World

# Dense bf16 matrix peaks in FLOP/s, from NVIDIA's datasheets, by a word of the device's name
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "A10": 125e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of a CUDA device in FLOP/s; None of one that is not known."""
    name = torch.cuda.get_device_name(device)
    return next((value for word, value in PEAK_FLOPS.items() if word in name), None)


def device_of(plan: Plan, world: World) -> torch.device:
    """The device a plan asks for, one for each process. Raises SetupError when it is not there, InputError when it is none."""
    word = plan.run.device
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(word)
    except RuntimeError:
        raise InputError(f"run.device: {word!r} is no device; expected auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"run.device: {word!r}; expected auto, cpu or cuda")
    if device.type == "cuda" and world.grouped:
        if device.index is not None:
            raise InputError(
                f"run.device: {word} with {world.size} processes; expected cuda, of which each takes its own"
            )
        device = torch.device("cuda", world.local_rank)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise SetupError(
            f"run.device: {device}: this machine has no such CUDA device that torch {torch.__version__} can use"
        )
    if device.type == "cuda" and device.index is None:  # torch selects devices by number only
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def on_device(device: torch.device, name: str) -> ThreadPoolExecutor:
    """A thread that works for a device, CUDA's current one being each thread's own."""
    if device.type == "cuda":
        return ThreadPoolExecutor(1, name, torch.cuda.set_device, (device,))
    return ThreadPoolExecutor(1, name)


@dataclass(slots=True)
class Setup:
    """What a plan resolves to on this machine. `micro_batch` and `rows` are sequences of one process."""

    device: torch.device
    precision: torch.dtype
    compiles: bool
    micro_batch: int
    rows: int

    @classmethod
    def of(cls, plan: Plan, world: World | None = None) -> Setup:
        world = world or World()
        device = device_of(plan, world)
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        word = plan.run.precision
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = native if word == "auto" else word == "bfloat16"
        compiles = cuda if plan.run.compile == "auto" else plan.run.compile == "on"
        rows, left = divmod(plan.train.batch_size, world.size)
        if left:
            raise InputError(
                f"train.batch_size: {plan.train.batch_size} sequences can't be shared evenly by {world.size} processes"
            )
        micro = plan.run.micro_batch_size or rows
        if rows % micro:
            what = "the batch size" if world.size == 1 else f"a process's share of {world.size} of the batch,"
            raise InputError(f"run.micro_batch_size: {micro} does not divide {what} {rows}")
        return cls(device, torch.bfloat16 if bf16 else torch.float32, compiles, micro, rows)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)
