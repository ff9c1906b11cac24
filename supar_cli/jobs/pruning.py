"""A run → the plan of its largest weights, with its files of masks and values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from supar_cli.errors import InputError, TransferWarning
from supar_cli.planning import advice, pruning
from supar_cli.planning.live_counts import GivenMasks
from supar_cli.planning.plan import Plan
from supar_cli.planning.plan_sections import MaskSource, Values
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.spec import Sparsity
from supar_cli.training.pruning import choose_masks, mask_values, read_run, state_at, write


def prune(
    run: str | Path,
    *,
    density: float | str | None = None,
    sparsity: float | str | None = None,
    rewind: int = 0,
    scope: Literal["tensor", "global"] = "tensor",
    scale: Literal["none", "energy"] = "energy",
    parameterization: ParameterizationName | None = None,
    masks_out: str | Path = "masks.safetensors",
    values_out: str | Path = "values.safetensors",
) -> Plan:
    """Prune a run by magnitude and make the plan that trains what is left, for as many steps; keywords as `supar prune`'s flags.

    `density` or `sparsity` (0.25 or "1/4") is a share of all weights of each hidden tensor. Masks are written to `masks_out`,
    the values after step `rewind` to `values_out`. Warns of a run that has not finished (TransferWarning). Raises SuparError.
    """
    if density is None and sparsity is None:
        raise InputError("density: is missing; expected a density or a sparsity")
    own, state, hashes = read_run(Path(run))
    rules = pruning.rules_of(own, parameterization)
    groups = pruning.live_by_group(own, Sparsity(density=density, sparsity=sparsity), scope)
    masks = choose_masks(own, state, groups)
    start, rewind_hash = state_at(Path(run), own, state, rewind)
    values, starts = mask_values(start, masks, scale)
    files = Path(masks_out).resolve(), Path(values_out).resolve()
    written = write(files[0], masks, files[1], values)
    source = MaskSource(kind="file", path=str(files[0]), hash=written[0])
    given = GivenMasks(source, {name: mask.count for name, mask in masks.items()})
    start_values = Values(source="file", path=str(files[1]), hash=written[1], scale=scale)
    plan = pruning.plan_pruned(own, given, start_values, starts, hashes | rewind_hash, rules)
    found = {"run": str(run), "step": state.step, "rewind": rewind, "scope": scope}
    plan = plan.model_copy(update={"meta": {**own.meta, "pruned": found}})
    for message in [*advice.of_pruning(own, str(run), state.step), *advice.warnings(plan)]:
        warnings.warn(message, TransferWarning, stacklevel=2)
    return plan
