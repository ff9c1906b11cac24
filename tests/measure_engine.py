"""The sparse engine of this checkout against that of another one, in one process, with interleaved rounds.

`python -m tests.measure_engine CHECKOUT [ROUNDS]` times a layer 1024→4096 of 4096 tokens, forward and both gradients, at three
densities, against masked dense too; `… CHECKOUT ROUNDS PLAN` a step of a plan, on random tokens. Ratios are of medians; both of
wall time and of the process's CPU time, which other programs on the machine change less.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

SHAPE, TOKENS, DENSITIES = (4096, 1024), 4096, (1 / 128, 1 / 32, 1 / 8)
HERE = Path(__file__).resolve().parent.parent


class Checkout:
    """The modules of a checkout, of which one process can hold several: only one is importable at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.modules = path, dict[str, ModuleType]()

    @contextmanager
    def active(self) -> Iterator[None]:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "supar_cli"}
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.path))
        try:
            yield
        finally:
            sys.path.remove(str(self.path))
            self.modules = {
                name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "supar_cli"
            }
            sys.modules.update(hidden)

    def layer(self, density: float) -> Callable[[], object]:
        layer, autotune = import_module("supar_cli.bench.layer"), import_module("supar_cli.sparse.autotune")
        autotune.keep_large_blocks()
        case = autotune.LayerCase(torch.device("cpu"), torch.float32, TOKENS)
        mask = layer.draw_mask(SHAPE, density)
        arm = layer.make("sparse", mask, autotune.draw_values(mask, case.device), case)
        inputs = autotune.draw_inputs(SHAPE, case, torch.float32)
        return lambda: arm.step(*inputs)

    def step(self, plan: str) -> Callable[[], object]:
        read, step = import_module("supar_cli.planning.document"), import_module("supar_cli.bench.step")
        problems, plans = import_module("supar_cli.planning.problems"), import_module("supar_cli.planning.plan")
        made = problems.parse(plans.Plan, read.read(Path(plan).read_text("utf-8"), plan)[0])
        trainer = import_module("supar_cli.training.trainer").Trainer(made, step.RandomTokens(made))
        return trainer.step  # type: ignore[no-any-return]


def masked(density: float) -> Callable[[], object]:
    """A dense weight, multiplied by its mask in every pass."""
    alive = torch.rand(SHAPE) < density
    weight = (torch.randn(SHAPE) * alive).requires_grad_()
    x, gradient = torch.randn(TOKENS, SHAPE[1], requires_grad=True), torch.randn(TOKENS, SHAPE[0])

    def step() -> None:
        x.grad = weight.grad = None
        F.linear(x, weight * alive).backward(gradient)

    return step


def compare(
    make: Callable[[Checkout], Callable[[], object]], other: Path, rounds: int, dense: Any = None
) -> dict[str, Any]:
    """Milliseconds of each arm, wall and CPU; its medians divide those of this checkout."""
    arms: dict[str, tuple[Checkout | None, Callable[[], object]]] = {"masked": (None, dense)} if dense else {}
    for name, path in (("now", HERE), ("before", other)):
        checkout = Checkout(path)
        with checkout.active():
            arms[name] = checkout, make(checkout)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in arms if turn % 2 else reversed(list(arms)):
            checkout, run = arms[name]
            if checkout is None:
                spent[name].append(timed(run))
                continue
            with checkout.active():
                spent[name].append(timed(run))
    medians = {
        name: [statistics.median(one) * 1000 for one in zip(*each[1:], strict=True)] for name, each in spent.items()
    }
    rounded = {name: [round(one, 2) for one in each] for name, each in medians.items()}
    ratios = {
        name: [round(a / b, 3) for a, b in zip(each, medians["now"], strict=True)]
        for name, each in medians.items()
        if name != "now"
    }
    return {"ms (wall, CPU)": rounded, "times as long as now (wall, CPU)": ratios}


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call: on the wall, and of all the process's threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main(checkout: str, rounds: str = "7", plan: str | None = None) -> None:
    print(json.dumps({"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}))
    if plan is not None:
        print(json.dumps({"plan": plan, **compare(lambda one: one.step(plan), Path(checkout), int(rounds))}))
        return
    for density in DENSITIES:
        found = compare(lambda one, d=density: one.layer(d), Path(checkout), int(rounds), masked(density))  # type: ignore[misc]
        print(json.dumps({"density": density, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
