"""What `test_step_graph` does on the shadow device, in a process of its own: `python -m tests.graph_cases` prints a JSON line a case."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from tests.shadow_graph import graphed

import torch  # isort: skip
from supar_cli.errors import InputError, UnusableResult  # isort: skip
from supar_cli.planning.plan import Plan  # isort: skip
from supar_cli.sparse import block  # isort: skip
from supar_cli.training import run_directory, step_graph  # isort: skip
from supar_cli.training.step import ClippedUpdate  # isort: skip
from supar_cli.training.trainer import Trainer  # isort: skip
from tests.cuda_cases import BLOCKS, plan_on  # isort: skip

TRAIN = {"steps": 9, "eval_every": 5, "warmup_fraction": 0.25, "schedule": "cosine"}
MOMENTUM = {"optimizer": "sgd", "momentum": 0.9}
# by name, what is changed of a small masked gpt2 under AdamW
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {},
    "clipped": {"train": {**MOMENTUM, "grad_clip": 2.9}},
    "micro-batches, dense": {
        "model": {"family": "llama", "tied": False},
        "target": {"width": 32, "sparsity": {"density": 1.0}},
        "run": {"micro_batch_size": 2},
    },
    "block": {"target": {"width": 32, **BLOCKS}, "run": {"engine": "block"}},
    "bfloat16": {"run": {"precision": "bfloat16"}},
}
RESUMED = ("adamw", "clipped")  # those of each optimizer


def planned(folder: Path, device: str, case: str = "adamw", **run: Any) -> Plan:
    changes = CASES[case]
    run = {"precision": "float32", "checkpoint_every": 4, "log_every": 4, "keep": 9, **changes.get("run", {}), **run}
    train = {**TRAIN, **changes.get("train", {})}
    model = {"layers": 1, **changes.get("model", {})}
    return plan_on(device, folder, **{"target": {"width": 32}, **changes, "model": model, "train": train, "run": run})


class Cut(Exception):
    pass


def cut(*_: object) -> None:
    raise Cut


def compared(folder: Path, case: str) -> dict[str, Any]:
    """Losses of a run on the CPU and with its graph, whole, and cut and resumed; what a step waits for and launches."""
    found: dict[str, Any] = {"launches": {}}
    histories = {"cpu": Trainer(planned(folder, "cpu", case)).run()}
    with graphed() as watching:
        plan, here = planned(folder, "cuda", case, cuda_graph="on"), folder / case
        run_directory.begin_run(here / "whole", plan, resume=False, force=False)
        trainer = Trainer(plan)
        histories["whole"] = trainer.run(here / "whole")
        for name, one in {"off": Trainer(planned(folder, "cuda", case)), "on": trainer}.items():
            one.done = 0
            one.step()  # the first one makes moments
            watching.clear()
            one.step()
            found["launches"][name], found["waits"] = watching.launches, dict(watching.waits)
        if case in RESUMED:
            run_directory.begin_run(here / "cut", plan, resume=False, force=False)
            with suppress(Cut):
                Trainer(plan).run(here / "cut", on_evaluation=cut)
            histories["resumed"] = Trainer(plan).run(here / "cut", resume=True)
            found["resumed_at"] = histories["resumed"].resumed_at
    for name, history in histories.items():
        found[name] = [*history.losses, *(loss for _, loss in history.evaluations)]
    return {**found, "clipped": histories["cpu"].clipped}


def unfinite(folder: Path) -> dict[str, Any]:
    """Whether a replay whose loss is not finite, and one launched after it, change a weight or moment."""
    with graphed():
        trainer = Trainer(planned(folder, "cuda", cuda_graph="on"))
        for _ in range(5):
            trainer.step()
        gain = trainer.sparse_model.tensors["final_norm"]
        value, gain.data[0] = float(gain.detach()[0]), math.inf
        before = trainer.capture()
        late = [trainer._launch(), trainer._launch()]
        try:
            trainer._read(late[0])
        except UnusableResult as error:
            why = str(error)
        after = trainer.capture()
        pairs = [(before.values[name], after.values[name]) for name in before.values]
        pairs += [
            (before.moments[name][key], after.moments[name][key])
            for name in before.values
            for key in before.moments[name]
        ]
        gain.data[0] = value
        return {
            "why": why,
            "same": all(torch.equal(*pair) for pair in pairs),
            "next": trainer.step().loss,
            "done": trainer.done,
        }


# Planted faults: each is a loop that is right kernel by kernel and wrong, or refused, as a graph.


def rates_of_the_host(trainer: Trainer) -> AbstractContextManager[Any]:
    """As where there is no graph: numbers, which a graph takes for its kernels' arguments."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    return nullcontext()


def not_capturable(trainer: Trainer) -> AbstractContextManager[Any]:
    for group in trainer.optimizer.param_groups:
        group["capturable"] = False
    return nullcontext()


def batch_not_copied(trainer: Trainer) -> AbstractContextManager[Any]:
    made, recorded = step_graph.StepGraph.step, trainer.batch(step_graph.WARM_UP_STEPS)
    return mock.patch.object(
        step_graph.StepGraph,
        "step",
        lambda graph, update, batch: made(
            graph, update, recorded if trainer.done > step_graph.WARM_UP_STEPS else batch
        ),
    )


@contextmanager
def gradients_left(trainer: Trainer) -> Iterator[None]:
    """The step before the recorded one leaves its gradients: replays add to that memory, which nothing clears."""
    clear, calls = trainer.optimizer.zero_grad, []

    def zero_grad(set_to_none: bool = True) -> None:
        calls.append(None)
        if len(calls) != step_graph.WARM_UP_STEPS:
            clear(set_to_none)

    with mock.patch.object(trainer.optimizer, "zero_grad", zero_grad):
        yield


def clip_on_the_host(trainer: Trainer) -> AbstractContextManager[Any]:
    return mock.patch.object(trainer.update, "runs_ahead", False)


def value_read(trainer: Trainer) -> AbstractContextManager[Any]:
    made = ClippedUpdate.apply

    def apply(update: Any, gradients: Any, figures: Any) -> None:
        if float(figures[0]) > 0:
            made(update, gradients, figures)

    return mock.patch.object(ClippedUpdate, "apply", apply)


def batch_of_another_shape(trainer: Trainer) -> AbstractContextManager[Any]:
    batch = trainer.batch

    def fewer(step: int) -> Any:
        return tuple(tensor[: 2 if step == 6 else 4] for tensor in batch(step))

    return mock.patch.object(trainer, "batch", fewer)


FAULTS: dict[str, tuple[str, Callable[[Trainer], AbstractContextManager[Any]]]] = {
    "rates of the host": ("clipped", rates_of_the_host),
    "not capturable": ("adamw", not_capturable),
    "batch not copied": ("clipped", batch_not_copied),
    "gradients left": ("clipped", gradients_left),
    "clip on the host": ("clipped", clip_on_the_host),
    "a value read": ("clipped", value_read),
    "a batch of another shape": ("adamw", batch_of_another_shape),
}


def faulty(folder: Path, case: str, plant: Callable[[Trainer], AbstractContextManager[Any]]) -> dict[str, Any]:
    with graphed():
        trainer = Trainer(planned(folder, "cuda", case, cuda_graph="on"))
        with plant(trainer):
            try:
                return {"losses": trainer.run().losses}
            except (RuntimeError, InputError) as error:
                return {"error": str(error)}


def stale(folder: Path) -> dict[str, Any]:
    """Losses after a checkpoint that is loaded into a trainer whose graph was recorded before; and with that graph kept."""
    found: dict[str, Any] = {}
    with graphed():
        plan = planned(folder, "cuda", cuda_graph="on")
        for name in ("new", "kept"):
            trainer = Trainer(plan)
            for _ in range(5):
                trainer.step()
            graph = trainer._graph
            trainer.restore(folder / "adamw" / "whole" / "checkpoints" / "step-00000004")
            if name == "kept":
                trainer._graph = graph
            found[name] = [trainer.step().loss for _ in range(5)]
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Callable[[], dict[str, Any]]] = {
            case: lambda case=case: compared(folder, case) for case in CASES
        }
        found |= {f"fault: {fault}": lambda made=made: faulty(folder, *made) for fault, made in FAULTS.items()}
        found |= {"not finite": lambda: unfinite(folder), "stale": lambda: stale(folder)}
        with mock.patch.object(block, "_importable", lambda: False):  # the block engine in plain torch
            for case, call in found.items():
                print(json.dumps({"case": case, **call()}), flush=True)


if __name__ == "__main__":
    main()
