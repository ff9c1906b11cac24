"""What the tests of CUDA do on simulated devices, in a process of its own: `python -m tests.cuda_cases KIND` prints a JSON line a case."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tests.simulated_cuda import Watching, simulated

from supar_cli.planning.plan import Plan  # isort: skip
from supar_cli.sparse import block  # isort: skip
from supar_cli.training import prepare  # isort: skip
from supar_cli.training.run_directory import Metrics  # isort: skip
from supar_cli.training.trainer import Trainer  # isort: skip
from tests.conftest import plan_from, proxy_fields, real_text  # isort: skip

BLOCKS = {"sparsity": {"density": 0.25, "pattern": "block", "block": 16}}

# by name, what is changed of the plan of a small gpt2
STEPS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": {},
    "float32": {"run": {"precision": "float32"}},
    "biases, untied": {"model": {"bias": True, "tied": False}},
    "alibi": {"model": {"positions": "alibi"}},
    "llama, grouped": {"model": {"family": "llama", "heads": 4, "kv_heads": 2}},
    "micro-batches": {"run": {"micro_batch_size": 2}},
    "momentum": {"train": {"optimizer": "sgd", "momentum": 0.9}},
    "block": {"target": BLOCKS, "run": {"engine": "block"}},
}


def plan_on(device: str, folder: Path, **changes: dict[str, Any]) -> Plan:
    """The small plan with changes, of the dense engine, not compiled."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(real_text(24_000))
    run = {"device": device, "compile": "off", "engine": "dense", **changes.pop("run", {})}
    return plan_from(proxy_fields(str(text), run=run, **changes))


def watched(watching: Watching, call: Callable[[], Any]) -> dict[str, Any]:
    """What a call waits for and launches."""
    watching.clear()
    call()
    return {"waits": dict(watching.waits), "launches": watching.launches}


def step(folder: Path, changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a trainer does on a device that computes nothing, and where its tensors lie."""
    never = mock.patch.object(block, "_importable", lambda: False)  # the block engine in plain torch
    unread = mock.patch.object(prepare, "check_init", lambda *_: None)  # it reads values
    with never, unread, simulated() as watching:
        trainer = Trainer(plan_on("cuda", folder, **changes))
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


def main(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if kind == "steps":
            for name, changes in STEPS.items():
                print(json.dumps({"case": name, **step(Path(folder), changes)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
