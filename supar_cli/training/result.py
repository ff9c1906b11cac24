"""The outcome of a run: its losses, and the document result.json with its environment and hashes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supar_cli.files import Record, naming_write_errors, write_file
from supar_cli.planning.plan import Plan
from supar_cli.sparse.masks import Mask
from supar_cli.training.distributed import Parallel
from supar_cli.training.runtime import Runtime, device_name, versions


@dataclass(slots=True)
class RunHistory:
    """The losses of a run: `losses[i]` is the training loss of step i before its update, `evaluations` are (step, loss).

    Only rank 0 knows those of steps before `resumed_at`; a loss is nan if its record is lost.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed_at: int = 0

    @classmethod
    def of(cls, records: list[Record], done: int) -> RunHistory:
        """The history of a run that continues after `done` steps, from the records of those steps."""
        known = {record["step"]: record["loss"] for record in records}
        losses = [known.get(step, math.nan) for step in range(1, done + 1)]
        evaluations = [(record["step"], record["validation_loss"]) for record in records if "validation_loss" in record]
        return cls(losses, evaluations, resumed_at=done)

    def add(self, record: Record) -> None:
        """Add the losses in a step's record."""
        if "loss" in record:
            self.losses.append(record["loss"])
        if "validation_loss" in record:
            self.evaluations.append((record["step"], record["validation_loss"]))


def document(
    plan: Plan, data_hash: str, drawn: Mapping[str, Mask], history: RunHistory, environment: Record
) -> dict[str, Any]:
    """The result document: losses, sizes, environment and the hashes that identify the run."""
    return {
        "kind": "supar.result/v1",
        "plan": plan.hash(),
        "data": data_hash,
        "masks": {name: mask.fingerprint for name, mask in drawn.items()},
        "steps": len(history.losses),
        "train_loss": history.losses[-1] if history.losses and math.isfinite(history.losses[-1]) else None,
        "validation_loss": history.evaluations[-1][1] if history.evaluations else None,
        "parameters": plan.parameters,
        "live_parameters": sum(row.size for row in plan.tensors)
        - sum(mask.size - mask.count for mask in drawn.values()),
        "resumed_at": history.resumed_at,
        "seconds": history.seconds,
        "environment": environment,
    }


def environment(runtime: Runtime, parallel: Parallel, engines: Mapping[str, str]) -> Record:
    """Versions, device, precision and parallelism of a run; `engines` are by the name of each masked tensor."""
    return {
        **versions(),
        "device": device_name(runtime.device),
        "processes": parallel.ranks.size,
        "parallel": parallel.kind,
        "precision": str(runtime.precision).removeprefix("torch."),
        "compiled": runtime.compiles,
        "engines": engines,
    }


def write(directory: Path, found: Record) -> None:
    """Write a run's result.json. Raises SetupError if it can't be written."""
    with naming_write_errors(directory):
        write_file(directory / "result.json", json.dumps(found, indent=1) + "\n")
