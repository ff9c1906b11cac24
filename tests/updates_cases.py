"""What two processes do with masks that change, as `torchrun --nproc-per-node 2 tests/updates_cases.py FOLDER` prints it: JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from supar_cli import load
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint_reader, mask_updates
from supar_cli.training.distributed import Ranks, init_distributed
from supar_cli.training.trainer import Trainer
from tests.parallel_cases import error_of, planned, saved

STEPS, HALF = 9, 5


def losses(trainer: Trainer, until: int) -> list[float]:
    return [trainer.step().loss for _ in range(until - trainer.done)]


def fingerprints(trainer: Trainer) -> list[str]:
    return [mask.fingerprint for mask in trainer.capture().masks.values()]


def trained(plan: Plan, ranks: Ranks, kind: str, other: str, one: Path) -> dict[str, Any]:
    """Losses of a run of one kind, of one of another kind that goes on from its checkpoint, and of one that goes on from `one`'s."""
    trainer = Trainer(planned(plan, parallel=kind), ranks=ranks)
    found: dict[str, Any] = {"whole": losses(trainer, HALF)}
    path = saved(trainer, one.parent / f"{one.name}-{kind}")
    found["whole"] += losses(trainer, STEPS)
    found["masks"] = fingerprints(trainer)
    resumed = Trainer(planned(plan, parallel=other), ranks=ranks)
    for name, place in (("restored", path), ("from one", checkpoint_reader.available(one)[-1])):
        resumed.restore(place)
        found[name] = losses(resumed, STEPS)
    return found


def grown_apart(plan: Plan, ranks: Ranks, kind: str) -> list[Any]:
    """Rank 1 grows other weights than rank 0."""
    grow = mask_updates.grow_largest

    def other(scores: torch.Tensor, *rest: Any) -> torch.Tensor:
        return grow(scores.flip(0) if ranks.rank else scores, *rest)

    mask_updates.grow_largest = other
    try:
        return error_of(lambda: losses(Trainer(planned(plan, parallel=kind), ranks=ranks), STEPS))
    finally:
        mask_updates.grow_largest = grow


def own_gradients(plan: Plan, ranks: Ranks) -> list[Any]:
    """Each rank grows by the gradient of its own rows."""
    total = Ranks.sum
    trainer = Trainer(planned(plan, parallel="ddp"), ranks=ranks)
    Ranks.sum = lambda self, tensor: tensor if tensor.ndim == 2 else total(self, tensor)  # type: ignore[method-assign]
    try:
        return error_of(lambda: losses(trainer, STEPS))
    finally:
        Ranks.sum = total  # type: ignore[method-assign]


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    plans = {path.stem: load(path) for path in sorted(folder.glob("*.yaml"))}
    with init_distributed() as ranks:
        found: dict[str, Any] = {
            name: {
                kind: trained(plan, ranks, kind, other, folder / name)  # type: ignore[arg-type]
                for kind, other in (("ddp", "fsdp"), ("fsdp", "ddp"))
            }
            for name, plan in plans.items()
        }
        found["grown apart"] = [grown_apart(plans["set"], ranks, kind) for kind in ("ddp", "fsdp")]  # type: ignore[arg-type]
        found["own gradients"] = own_gradients(plans["rigl"], ranks)  # type: ignore[arg-type]
        everyone = ranks.gather(found)
        if ranks.is_main:
            sys.stdout.write(json.dumps(everyone))


if __name__ == "__main__":
    main()
