"""Trained models on disk: a run, or one of its checkpoints, read tensor by tensor under the plan's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from supar_cli.planning.folding import standard_factors
from supar_cli.training import checkpoint_reader
from supar_cli.training.prepare import to_dense


@dataclass(frozen=True)
class StoredModel:
    """A model on disk. `model` has the keys of a plan's model section, but for the multipliers.

    `read(name)` returns a tensor by the plan's name and in its shape, float32, dead weights zero. `factors` says for each
    name what the forward pass makes of it: with every tensor times its factor, a model without multipliers, whose attention
    divides by the root of the head width, has the same logits.
    """

    path: Path
    what: str
    model: Mapping[str, Any]
    factors: Mapping[str, float]
    read: Callable[[str], Tensor]


def open_run(path: Path) -> StoredModel:
    """The model of a run's newest checkpoint, or of one checkpoint. Raises InputError or SetupError."""
    checkpoint = checkpoint_reader.find(path)
    plan, state = checkpoint_reader.read_values(checkpoint)
    shape = {key: value for key, value in plan.decoder.model_dump().items() if key != "multipliers"}
    return StoredModel(
        path=checkpoint,
        what="a run of supar",
        model={**shape, "head_width": plan.decoder.head_width},
        factors=standard_factors(plan.decoder),
        read=lambda name: to_dense(state.values[name], state.masks.get(name)),
    )
