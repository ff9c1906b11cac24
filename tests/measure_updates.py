"""What changes of masks cost, as ratios of steps that alternate: `python -m tests.measure_updates [WIDTH]` prints JSON.

`between`: a step of RigL between two changes over a static step. `update`: what a step that ends with a change takes beyond
one that does not, over the dense steps of all its masked layers. Sparse engine, density 1/32, one layer, 1024 tokens.
"""

from __future__ import annotations

import json
import statistics
import sys
from time import perf_counter

import torch

import supar_cli
from supar_cli.planning.spec import Proxy
from supar_cli.sparse.autotune import LayerCase, draw_inputs, draw_values, layer_step, make
from supar_cli.training.trainer import Trainer

TOKENS, ROUNDS, EVERY = 1024, 12, 3


def trainer(width: int, updates: dict[str, object] | None) -> Trainer:
    model = {"family": "gpt2", "width": width, "layers": 1, "heads": width // 64, "context": 256, "vocab": 256}
    hyper = {"lr": 0.01, "init_std": 0.08, "alpha_input": 5.0, "alpha_output": 1.0, "weight_decay": 0.0}
    train = {"steps": 10_000, "batch_size": TOKENS // 256}
    run = {"device": "cpu", "engine": "sparse", "compile": "off"}
    proxy = Proxy(kind="supar.proxy/v1", model=model, hyperparameters=hyper, train=train, run=run)  # type: ignore[arg-type]
    return Trainer(supar_cli.transfer(proxy, density="1/32", **({"updates": updates} if updates else {})))


def seconds_of_step(one: Trainer) -> float:
    started_s = perf_counter()
    one.step()
    return perf_counter() - started_s


def dense_seconds(one: Trainer) -> float:
    """Seconds of a training step of every masked layer by itself, in the dense engine."""
    case, total = LayerCase(torch.device("cpu"), torch.float32, TOKENS, None, False), 0.0
    for mask in one.sparse_model.masks.values():
        values, (x, gradient) = draw_values(mask, case.device), draw_inputs(mask.shape, case, torch.float32)
        engine, spent = make("dense", mask, case), []
        for _ in range(5):
            started_s = perf_counter()
            layer_step(engine, values, x, gradient)
            spent.append(perf_counter() - started_s)
        total += statistics.median(spent)
    return total


def main(width: int) -> None:
    static, moving = trainer(width, None), trainer(width, {"method": "rigl", "every_steps": EVERY})
    assert moving._updates.schedule is not None
    spent: dict[str, list[float]] = {"static": [], "between": [], "update": []}
    for _ in range(EVERY * (ROUNDS + 1)):
        is_update = moving._updates.schedule.is_update(moving.done + 1)
        spent["static"].append(seconds_of_step(static))
        spent["update" if is_update else "between"].append(seconds_of_step(moving))
    median = {name: statistics.median(values[2:]) for name, values in spent.items()}
    found = {
        "width": width,
        "step_ms": round(1000 * median["static"], 1),
        "between": round(median["between"] / median["static"], 3),
        "update": round((median["update"] - median["between"]) / dense_seconds(moving), 2),
        "machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
