"""A run's model as a module of torch with whole weights, and its masks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from supar_cli.models.transformer import Transformer, named_tensors
from supar_cli.models.vit import VisionTransformer
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint_reader
from supar_cli.training.prepare import to_dense, transformer
from supar_cli.training.runtime import device_of

Model = Transformer | VisionTransformer


def load(path: Path, device: str) -> tuple[Plan, Model]:
    """The plan of a run's newest checkpoint, or of one checkpoint, and its model, as `model` returns it."""
    place = device_of(device)
    plan, state = checkpoint_reader.read_values(checkpoint_reader.find(path))
    made = transformer(plan)
    with torch.no_grad():
        for name, parameter in named_tensors(made).items():
            parameter.copy_(to_dense(state.values[name], state.masks.get(name)))
    return plan, made.to(place).eval()


def model(path: str | Path, device: str = "cpu") -> Model:
    """The model of a run's newest checkpoint, or of one checkpoint, in eval mode.

    Tokens (B, T) → logits (B, T, V); of a vision transformer normalised images (B, C, H, W) → logits (B, V).

    Float32 weights (out, in), which are 0 where dead; nothing keeps them so if you train it: `masks` says which live.
    `device` is auto, cpu, cuda or cuda:N. Raises InputError if there is no checkpoint, or it is of a model of your own;
    SetupError if it is corrupt.
    """
    return load(Path(path), device)[1]


def masks(path: str | Path) -> dict[str, Tensor]:
    """The masks of a run's newest checkpoint, or of one checkpoint, by the plan's names: True where a weight lives.

    Each has its weight's shape. A tensor that is dense has none. Raises InputError, SetupError as `model`.
    """
    _, state = checkpoint_reader.read_values(checkpoint_reader.find(Path(path)))
    return {name: torch.from_numpy(mask.alive()) for name, mask in state.masks.items()}
