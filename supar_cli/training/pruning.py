"""Pruning a run by magnitude: masks from its newest checkpoint, and the values of an earlier step under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path

import numpy as np
from torch import Tensor

from supar_cli.errors import InputError
from supar_cli.planning.document import content_hash
from supar_cli.planning.plan import Plan
from supar_cli.sparse.mask_files import require_spread, write_masks, write_values
from supar_cli.sparse.masks import Mask, select
from supar_cli.training import checkpoint_reader
from supar_cli.training.prepare import CHECKED_AT_ONCE, starting_values, to_dense
from supar_cli.training.state import State


def read_run(directory: Path) -> tuple[Plan, State, dict[str, str]]:
    """The plan of a run, the state of its newest checkpoint without moments, and the hashes of both.

    Raises InputError if it has no checkpoint and for masks that moved.
    """
    path = checkpoint_reader.newest(directory)
    plan, state = checkpoint_reader.read_values(path)
    if plan.sparsity.updates is not None:
        what = f"its masks moved while it trained ({plan.sparsity.updates.method})"
        raise InputError(f"{directory}: {what}; expected a run whose masks stay as they are")
    return plan, state, {"plan": plan.hash(), "checkpoint": _hash(path)}


def state_at(directory: Path, plan: Plan, state: State, step: int) -> tuple[State, dict[str, str]]:
    """A run after a step, under the masks that it trained with, and the hash of its checkpoint; 0: as it started.

    Raises InputError for a step whose checkpoint is not there, or is another plan's.
    """
    if step == 0:
        values = {row.name: value for row, value in starting_values(plan, state.masks)}
        return State(0, state.masks, values, {name: {} for name in values}), {}
    steps = {
        int(path.name.removeprefix("step-")): path for path in checkpoint_reader.available(directory / "checkpoints")
    }
    if step not in steps:
        what = f"{directory} has no checkpoint of step {step}, but those of 0 (its start), {', '.join(map(str, steps))}"
        raise InputError(f"rewind: {what}; expected one of them, or a run with another --checkpoint-every and --keep")
    own, found = checkpoint_reader.read_values(steps[step])
    if own.hash() != plan.hash():
        what = f"{steps[step]} belongs to another plan than the newest checkpoint ({own.hash()[:19]}…)"
        raise InputError(f"rewind: {what}; expected {plan.hash()[:19]}…")
    return found, {"rewind": _hash(steps[step])}


def choose_masks(plan: Plan, state: State, groups: Sequence[Mapping[str, int]]) -> dict[str, Mask]:
    """The masks of the largest weights: of each group of tensors, given as name: live weights, as many as these add up to.

    What is dead stays dead. Raises InputError, naming every tensor, where none of its weights would live, where whole rows
    and columns would be dead, and for weights that are not numbers.
    """
    rows, problems, masks = {row.name: row for row in plan.tensors}, list[str](), dict[str, Mask]()
    for group in groups:
        keys = np.concatenate([_keys(state, name) for name in group])  # what is smallest lives
        try:
            alive = select("exact", keys[None], sum(group.values())).alive()[0]
        except ValueError as error:
            raise InputError(f"{', '.join(group)}: {error}") from None
        ends = np.cumsum([rows[name].size for name in group])[:-1]
        for name, part in zip(group, np.split(alive, ends), strict=True):
            masks[name] = Mask.of(part.reshape(rows[name].shape))
            try:
                require_spread(masks[name], tuple(rows[name].shape), tuple(rows[name].fan_in_axes))
            except ValueError as error:
                problems.append(f"{name}: {error}")
    if problems:
        remedy = ", or --scope tensor" if max(map(len, groups)) > 1 else ""
        raise InputError(*problems, f"density: is too low for these tensors; expected a higher one{remedy}")
    return {name: mask for name, mask in masks.items() if mask.count < mask.size}


def _keys(state: State, name: str) -> np.ndarray:
    """Minus the magnitude of each weight, and infinity where it is dead."""
    mask = state.masks.get(name)
    keys: np.ndarray = -to_dense(state.values[name], mask).abs().numpy().reshape(-1)
    return keys if mask is None else np.where(mask.alive().reshape(-1), keys, np.inf)


def mask_values(
    start: State, masks: Mapping[str, Mask], scale: str
) -> tuple[dict[str, Tensor], dict[str, tuple[float, float | None]]]:
    """The values of a state that live under fewer weights, and by name their root mean square and factor g (None: none).

    With the scale `energy`, g = √(‖W‖² / ‖M⊙W‖²) multiplies what lives of a masked tensor. [D, measured at width 128: g is
    1.04 to 1.8, gains .016 nats at density 1/16 and nothing at 1/4; 1/√density in its place loses.] Raises InputError,
    naming every tensor, where all that lives is 0.
    """
    if scale not in ("none", "energy"):
        raise InputError(f"scale: {scale}; expected none or energy")
    values, sizes, problems = start.remasked(masks).values, dict[str, tuple[float, float | None]](), list[str]()
    for name, value in values.items():
        energy, gain = sum_of_squares(value), None
        if name in masks and not energy:
            problems.append(f"{name}: all weights that would live start at 0; expected another step for --rewind")
        elif name in masks and scale == "energy":
            gain = sqrt(sum_of_squares(start.values[name]) / energy)
            values[name] = value * gain
        sizes[name] = sqrt(sum_of_squares(values[name]) / value.numel()), gain
    if problems:
        raise InputError(*problems)
    return values, sizes


def write(
    masks_path: Path, masks: Mapping[str, Mask], values_path: Path, values: Mapping[str, Tensor]
) -> tuple[str, str]:
    """Write both files of a pruned net; returns their hashes. Raises SetupError where they can't be written."""
    return write_masks(masks_path, masks), write_values(values_path, values)


def sum_of_squares(values: Tensor) -> float:
    """Of all values, in numpy, where it does not depend on the number of threads, some at a time."""
    flat = values.numpy().reshape(-1)
    parts = (flat[first : first + CHECKED_AT_ONCE] for first in range(0, flat.size, CHECKED_AT_ONCE))
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)


def _hash(path: Path) -> str:
    """What identifies a checkpoint: the hash of its manifest, which has those of all its files."""
    return content_hash(checkpoint_reader.read_manifest(path))
