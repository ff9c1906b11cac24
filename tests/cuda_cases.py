"""What the tests of CUDA do on simulated devices, in a process of its own: `python -m tests.cuda_cases KIND` prints a JSON line a case."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.shadow_cuda import shadowed
from tests.simulated_cuda import Watching, simulated

import torch  # isort: skip
from torch import Tensor  # isort: skip
from torch.nn.attention import SDPBackend, sdpa_kernel  # isort: skip

from supar_cli.errors import SetupError  # isort: skip
from supar_cli.exporting import evaluate, generate  # isort: skip
from supar_cli.files import file_hash  # isort: skip
from supar_cli.planning.plan import Plan  # isort: skip
from supar_cli.sparse import block  # isort: skip
from supar_cli.training import prepare, run_directory, tasks  # isort: skip
from supar_cli.training.run_directory import Metrics  # isort: skip
from supar_cli.training.runtime import Runtime  # isort: skip
from supar_cli.training.trainer import Trainer  # isort: skip
from tests.conftest import plan_from, proxy_fields, real_text  # isort: skip

Changes = dict[str, dict[str, Any]]

BLOCKS = {"sparsity": {"density": 0.25, "pattern": "block", "block": 16}}
RIGL = {"sparsity": {"density": 0.25, "updates": {"method": "rigl", "every_steps": 3, "end": 1.0}}}

# by name, what is changed of the plan of a small gpt2
STEPS: dict[str, Changes] = {
    "gpt2": {"model": {"layers": 3}},
    "float32": {"run": {"precision": "float32"}},
    "biases, untied": {"model": {"bias": True, "tied": False}},
    "alibi": {"model": {"family": "llama", "positions": "alibi"}},
    "llama, rope, grouped": {"model": {"family": "llama", "heads": 4, "kv_heads": 2}},
    "micro-batches": {"run": {"micro_batch_size": 2}},
    "momentum": {"train": {"optimizer": "sgd", "momentum": 0.9}},
    "block": {"target": BLOCKS, "run": {"engine": "block"}},
}
RUNS: dict[str, Changes] = {
    "dense": {},
    "clipped": {"train": {"grad_clip": 1.0}},
    "bfloat16": {"run": {"precision": "bfloat16"}},
    "block": {"target": BLOCKS, "run": {"engine": "block"}},
    "rigl": {"target": RIGL},
    "momentum, micro-batches": {"train": {"optimizer": "sgd", "momentum": 0.9}, "run": {"micro_batch_size": 2}},
}
CUT = 4  # the step after which a run is cut


def plan_on(device: str, folder: Path, **changes: dict[str, Any]) -> Plan:
    """The small plan with changes, of the dense engine, not compiled."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(real_text(24_000))
    run = {"device": device, "compile": "off", "engine": "dense", **changes.pop("run", {})}
    return plan_from(proxy_fields(str(text), run=run, **changes))


def of_one_layer(changes: Changes) -> Changes:
    return {**changes, "model": {"layers": 1, **changes.get("model", {})}}


def in_plain_torch() -> AbstractContextManager[Any]:
    """The block engine without Triton."""
    return mock.patch.object(block, "_importable", lambda: False)


def watched(watching: Watching, call: Callable[[], Any]) -> dict[str, Any]:
    """What a call waits for and launches."""
    watching.clear()
    call()
    return {"waits": dict(watching.waits), "launches": watching.launches}


def step(folder: Path, changes: Changes, fault: Callable[[Trainer], None] = lambda _: None) -> dict[str, Any]:
    """What a trainer does on a device that computes nothing, and where its tensors lie."""
    unread = mock.patch.object(prepare, "check_init", lambda *_: None)  # it reads values
    with in_plain_torch(), unread, simulated() as watching:
        trainer = Trainer(plan_on("cuda", folder, **of_one_layer(changes)))
        fault(trainer)
        trainer.step()
        model, states = trainer.sparse_model.model, trainer.optimizer.state.values()
        moments = [moment for state in states for moment in state.values() if moment is not None]
        found: dict[str, Any] = {
            "devices": sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers(), *moments)}),
            "engines": sorted({choice.name for choice in trainer.engines.choices.values()}),
            "precision": str(trainer.runtime.precision),
        }
        run_on = partial(trainer._launch_ahead, Metrics(None, 0), is_needed=False)
        run_on()
        calls = {
            "ahead": run_on,
            "step": trainer.step,
            "watched": lambda: trainer.step(diagnose=True),
            "evaluation": trainer.evaluate,
        }
        calls |= {"capture": trainer.capture, "refresh": trainer.sparse_model.sync_engines}
        found |= {what: watched(watching, call) for what, call in calls.items()}
        trainer.sparse_model.group = None
        return found | {"refresh each": watched(watching, trainer.sparse_model.sync_engines)}


class _Cut(Exception):
    pass


def _cut(step: int, loss: float) -> None:
    if step == CUT:
        raise _Cut


def run(folder: Path, changes: Changes, fault: AbstractContextManager[Any] | None = None) -> dict[str, Any]:
    """A run on the CPU, the same one on a shadow device, and that cut and continued: losses and the last checkpoint's hash."""
    changes = {
        **of_one_layer(changes),
        "train": {"steps": 8, "eval_every": CUT, "grad_clip": 0.0, **changes.get("train", {})},
    }
    settings = {"precision": "float32", "checkpoint_every": CUT, "log_every": 3, **changes.pop("run", {})}

    def trained(device: str, name: str, is_cut: bool = False) -> dict[str, Any]:
        plan, place = plan_on(device, folder, run=settings, **changes), folder / name
        run_directory.begin_run(place, plan, resume=place.exists(), force=False)
        trainer = Trainer(plan)
        history = trainer.run(place, resume=place.exists(), on_evaluation=_cut if is_cut else None)
        tensors = (*trainer.sparse_model.model.parameters(), *trainer.sparse_model.model.buffers())
        return {
            "losses": history.losses,
            "evaluations": history.evaluations,
            "resumed_at": history.resumed_at,
            "state": file_hash(place / "checkpoints" / "step-00000008" / "state.safetensors"),
            "devices": sorted({str(tensor.device) for tensor in tensors}),
        }

    with sdpa_kernel(SDPBackend.MATH):  # attention in plain operations, as on the shadow device
        found = {"cpu": trained("cpu", "cpu")}
    with in_plain_torch(), shadowed(), fault or nullcontext():
        found["cuda"] = trained("cuda", "cuda")
        try:
            trained("cuda", "cut", is_cut=True)
        except _Cut:
            found["resumed"] = trained("cuda", "cut")
    return found


def used(folder: Path) -> dict[str, Any]:
    """Text and scores of a run's model, on the CPU and on a shadow device."""
    plan = plan_on("cpu", folder, **of_one_layer({}))
    run_directory.begin_run(folder / "used", plan, resume=False, force=False)
    Trainer(plan).run(folder / "used")

    def results(device: str) -> list[Any]:
        text = "".join(generate.generate(folder / "used", "def ", tokens=24, temperature=1.0, device=device))
        return [text, evaluate.evaluate(folder / "used", tokens=500, device=device)["loss"]]

    found = {"cpu": results("cpu")}
    with shadowed():
        found["cuda"] = results("cuda")
    return found


def moving(folder: Path) -> dict[str, Any]:
    """What steps wait for while masks move, by whether masks change after them."""
    with shadowed() as watching:
        trainer = Trainer(plan_on("cuda", folder, **of_one_layer({"target": RIGL})))
        steps = [watched(watching, trainer.step) for _ in range(6)]
        return {"masks": len(trainer.sparse_model.masks), "steps": [found["waits"] for found in steps]}


def of_loss(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Trainer], None]:
    """A fault in the task's loss: `change` gets it and the tokens."""

    def plant(trainer: Trainer) -> None:
        loss = trainer.task.loss
        trainer.task.loss = lambda model, batch, chunk: change(loss(model, batch, chunk), batch[0])  # type: ignore[method-assign]

    return plant


def _read(loss: Tensor, _: Tensor) -> Tensor:
    return loss * (loss.item() > 0)


def _by_mask(loss: Tensor, tokens: Tensor) -> Tensor:
    numbers = tokens.float()
    numbers[tokens > 0] = numbers[0, 0]
    return loss + 0 * numbers.sum()


def _on_host(trainer: Trainer) -> None:
    engine = trainer.sparse_model.linear("blocks.0.mlp.up").engine
    assert engine is not None
    engine.register_buffer("live", engine.get_buffer("live").cpu(), persistent=False)


def _unused_on_host(trainer: Trainer) -> None:
    trainer.sparse_model.model.register_buffer("left", torch.zeros(4, device="cpu"))


def _blocking(trainer: Trainer) -> None:
    def to_device(batch: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
        return tuple(tensor[rows].to("cuda") for tensor in batch)

    trainer.runtime = mock.Mock(wraps=trainer.runtime, to_device=to_device, **_fields(trainer.runtime))


def _pageable(trainer: Trainer) -> None:
    trainer.batch = lambda step: tuple(tensor.clone() for tensor in tasks.load(trainer.plan).batch(step, slice(4)))


def _fields(runtime: Runtime) -> dict[str, Any]:
    return {name: getattr(runtime, name) for name in ("device", "precision", "micro_batch", "rows")}


FAULTS: dict[str, Callable[[Trainer], None]] = {
    "a buffer on the host": _on_host,
    "an unused buffer on the host": _unused_on_host,
    "a loss that is read": of_loss(_read),
    "a mask as an index": of_loss(_by_mask),
    "a tensor made on the host": of_loss(lambda loss, _: (loss * torch.ones(2)).mean()),
    "copies that block": _blocking,
    "batches in pageable memory": _pageable,
}


def faults(folder: Path) -> None:
    for name, fault in FAULTS.items():
        try:
            found = step(folder, {}, fault)
        except RuntimeError as error:
            found = {"error": str(error)}
        tell(name, found)


def early(folder: Path) -> dict[str, Any]:
    """What is said where a checkpoint does not wait for its copies, and where memory changes before it is copied."""
    still = SimpleNamespace(synchronize=lambda: None)
    found = {"unwaited": "", "changed": ""}
    try:
        run(folder, {}, mock.patch.object(torch.cuda, "current_stream", lambda *_: still))
    except SetupError as error:
        found["unwaited"] = str(error)
    with shadowed():
        memory = torch.zeros(8).pin_memory()
        memory.to("cuda", non_blocking=True)
        memory += 1
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            found["changed"] = str(error)
    return found


def tell(case: str, found: dict[str, Any]) -> None:
    print(json.dumps({"case": case, **found}), flush=True)


def main(kind: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "simulated":
            for case, changes in STEPS.items():
                tell(case, step(folder, changes))
            faults(folder)
        else:
            for at, (case, changes) in enumerate(RUNS.items()):
                (folder / str(at)).mkdir()
                tell(case, run(folder / str(at), changes))
            tell("used", used(folder))
            tell("moving", moving(folder))
            tell("early", early(folder))


if __name__ == "__main__":
    main(sys.argv[1])
