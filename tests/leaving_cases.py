"""How two ranks end, as `python tests/leaving_cases.py PLAN CASE…` prints it: JSON, for each case what each rank met.

A rank is a fork of this process, which has imported everything: `train` in a script that outlives what it raises.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import supar_cli
from supar_cli.errors import InputError
from supar_cli.planning.plan import Plan
from supar_cli.training import distributed
from supar_cli.training.distributed import collective_error
from supar_cli.training.trainer import StepResult, Trainer

LINGER_S = 4.0  # a rank's process outlives its training by this
LIMIT_S = 8.0  # after which what has not ended is killed
SHORT = timedelta(seconds=1)

step = Trainer.step
destroy = dist.destroy_process_group


def fail(case: str, rank: int) -> None:
    """What the case does in the middle of a run."""
    match case.split():
        case ["together"] | ["own"]:
            raise collective_error(InputError, "told by all")
        case ["alone", kind, *_] if rank == 1:
            raise {"bug": ValueError, "refusal": InputError, "interrupt": KeyboardInterrupt}[kind]("of rank 1")
        case ["hung", *_] if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)


def plant(case: str) -> None:
    """The fault of a case that is a control."""
    if case.endswith("with frames held"):
        traceback.clear_frames = lambda tb: None  # type: ignore[assignment]
    if case.endswith("not left"):
        dist.destroy_process_group = lambda group=None: None  # type: ignore[assignment]


def be_rank(case: str, rank: int, plan: Plan, port: int, out: int) -> None:
    """Train, and write what came of it to a descriptor."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found: dict[str, Any] = {"models": []}

    def looked(group: Any = None) -> None:
        found["models"].append(sum(isinstance(one, DistributedDataParallel) for one in gc.get_objects()))
        destroy(group)

    def at_step_3(self: Trainer, diagnose: bool = False) -> StepResult:
        if self.done == 3:
            found["failed"] = time.monotonic()
            fail(case, rank)
        return step(self, diagnose)

    dist.destroy_process_group, Trainer.step = looked, at_step_3  # type: ignore[method-assign]
    if case.startswith("hung") and not case.endswith("patient"):
        distributed.PEER_TIMEOUT = SHORT
    if case.startswith("own"):
        dist.init_process_group("gloo")
    plant(case)
    gc.disable()
    try:
        supar_cli.train(plan, f"run {case}")
    except BaseException as error:
        found["raised"] = [type(error).__name__, str(error)]
    found["seconds"] = time.monotonic() - found.pop("failed")
    found["is_left"] = not dist.is_initialized()
    if not found["is_left"] and case.startswith("own"):
        dist.barrier()  # a script's own group goes on
    os.write(out, json.dumps(found).encode())
    time.sleep(LINGER_S)
    os._exit(0)


def start(case: str, plan: Plan) -> list[tuple[int, int]]:
    """The two ranks of a case: each its process number and the descriptor to read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        reader, writer = os.pipe()
        if not (process := os.fork()):
            try:
                be_rank(case, rank, plan, port, writer)
            finally:
                os._exit(1)
        os.close(writer)
        ranks.append((process, reader))
    return ranks


def main() -> None:
    plan = supar_cli.load(Path(sys.argv[1]))
    assert isinstance(plan, Plan)
    found = {}
    for case in sys.argv[2:]:
        ranks, texts = start(case, plan), []
        end = time.monotonic() + LIMIT_S
        for _, reader in ranks:
            os.set_blocking(reader, False)
            text = None
            while text is None and time.monotonic() < end:
                try:
                    text = os.read(reader, 2**16)
                except BlockingIOError:
                    time.sleep(0.02)
            texts.append(json.loads(text) if text else None)
        for process, _ in ranks:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        found[case] = texts
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
