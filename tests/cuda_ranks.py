"""Rank 3 of 8 on simulated CUDA devices: `python -m tests.cuda_ranks` prints a JSON line for each way to hold a model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.simulated_cuda import Watching, simulated

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
from torch.testing._internal.distributed.fake_pg import FakeStore  # isort: skip
from torch.utils._python_dispatch import _disable_current_modes  # isort: skip

from supar_cli.sparse import block  # isort: skip
from supar_cli.training import distributed, prepare, runtime  # isort: skip
from supar_cli.training.distributed import Ranks, local_shard  # isort: skip
from supar_cli.training.trainer import Trainer  # isort: skip
from tests.cuda_cases import BLOCKS, plan_on, watched  # isort: skip
from tests.parallel_cases import Exchanged  # isort: skip

RANK, SIZE = 3, 8
CASES: dict[str, dict[str, Any]] = {
    "ddp dense": {"run": {"parallel": "ddp"}},
    "fsdp dense": {"run": {"parallel": "fsdp"}, "target": {"sparsity": {"density": 0.1}}},
    "fsdp float32": {"run": {"parallel": "fsdp", "precision": "float32"}},
    "fsdp block": {"target": BLOCKS, "run": {"parallel": "fsdp", "engine": "block"}},
}
# planted in the case "fsdp dense": what is replaced, and by what
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "gathers in float32": (distributed, "MixedPrecisionPolicy", lambda *_, **__: real_policy()),
    "averages in bfloat16": (distributed, "MixedPrecisionPolicy", lambda *dtypes, **how: real_policy(dtypes[0], **how)),
    "sums on the host": (Ranks, "sum", lambda _, tensor: (dist.all_reduce(tensor.cpu()), tensor)[1]),
}
real_policy, real_prepare, real_mesh = distributed.MixedPrecisionPolicy, prepare.prepare, distributed.init_device_mesh


@dataclass(frozen=True, slots=True)
class Alike(Ranks):
    """Ranks that all say what this one says: the fake group exchanges nothing."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def on_main(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class Hooked(torch.nn.parallel.DistributedDataParallel):
    """DDP with the sum of a bucket said in Python: the fake group's own gives DDP nothing back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, lambda _, bucket: summed(bucket))
        self.logger = mock.MagicMock()  # torch's own takes times of CUDA events
        self.reducer: Any = mock.Mock(
            wraps=self.reducer, _rebuild_buckets=lambda: False
        )  # the ranks agree in their memory


def summed(bucket: Any) -> Any:
    dist.all_reduce(bucket.buffer())
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def mesh_of(*args: Any, **kwargs: Any) -> Any:
    with _disable_current_modes():  # a mesh is numbers on the host
        return real_mesh(*args, **kwargs)


def prepared(plan: Any, home: Any, *args: Any, **kwargs: Any) -> Any:
    """On the device from the start: FSDP2 moves by `tensor.data = …`, which fake tensors can't do."""
    return real_prepare(plan, torch.device("cuda", RANK), *args, **kwargs)


def exchanging(watching: Watching, call: Callable[[], Any]) -> dict[str, Any]:
    """What a call waits for, launches and exchanges."""
    with Exchanged() as found:
        made = watched(watching, call)
    return {**made, "exchanged": dict(found.bytes)}


def held(folder: Path, changes: dict[str, Any], *whats: str) -> dict[str, Any]:
    """What a trainer holds, and what it exchanges and waits for in some of its calls."""
    with simulated(cards=SIZE) as watching:
        ranks = Alike(RANK, SIZE, RANK, SIZE, is_distributed=True)
        trainer = Trainer(plan_on("cuda", folder, train={"batch_size": 16}, **changes), ranks=ranks)
        trainer.step()
        model, tensors = trainer.sparse_model.model, trainer.sparse_model.tensors
        calls = {"step": trainer.step, "watched": lambda: trainer.step(diagnose=True), "evaluation": trainer.evaluate}
        whole = {row.name: (row.kept, row.name in trainer.sparse_model.masks) for row in trainer.plan.tensors}
        return {
            "places": sorted({f"{tensor.device} {tensor.dtype}" for tensor in tensors.values()}),
            "buffers": sorted({str(buffer.device) for buffer in model.buffers()}),
            "numbers": {name: (*whole[name], local_shard(tensor).numel()) for name, tensor in tensors.items()},
            **{what: exchanging(watching, calls[what]) for what in whats},
        }


def main() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=SIZE)
    patches: list[tuple[Any, str, Any]] = [
        (block, "_importable", lambda: False),
        (prepare, "check_init", lambda *_: None),
        (prepare, "prepare", prepared),
        (distributed, "init_device_mesh", mesh_of),
        (distributed, "DistributedDataParallel", Hooked),
        (runtime, "require_own_devices", lambda *_: None),
        (dist, "_verify_params_across_processes", lambda *_: None),  # DDP's, which reads memory
    ]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        for name, changes in CASES.items():
            print(
                json.dumps({"case": name, **held(Path(folder), changes, "step", "watched", "evaluation")}), flush=True
            )
        for name, fault in FAULTS.items():
            with mock.patch.object(*fault):
                print(json.dumps({"case": name, **held(Path(folder), CASES["fsdp dense"], "step")}), flush=True)


if __name__ == "__main__":
    main()
