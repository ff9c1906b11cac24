"""Clipping between the backward pass and the step by torch's functions, which know nothing of folded multipliers: noticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from supar_cli.own.parameters import local_shard, warn_caller
from supar_cli.planning.plan import PlanTensor

TENSORS, ENTRIES = 2, 256  # chosen: enough to tell one factor for all from values limited one by one

_REMEDY = (
    "it knows nothing of the multipliers that the plan folded into tensors; write prepared.clip_grad_norm_(limit) in its "
    "place, or prepared.optimizer(clip=limit)"
)


class ClipWatch:
    """Warns, once, of gradients that were clipped after they were made. Looks at a few entries of the smallest tensors.

    Nothing is read from the device unless gradients were written to. A gradient that was divided by a whole number (the
    scale of a GradScaler, accumulated steps, tokens) or changed in another way was not clipped.
    """

    def __init__(
        self, tensors: Mapping[str, nn.Parameter], rows: Mapping[str, PlanTensor], masked: Iterable[str]
    ) -> None:
        self._made: dict[nn.Parameter, tuple[int, Tensor]] = {}
        self._handles = []
        if all(row.fold in (None, 1.0) for row in rows.values()):
            return  # torch's norm is that of the plan
        dense = [tensor for name, tensor in tensors.items() if tensor.requires_grad and name not in {*masked}]
        for tensor in sorted(dense, key=Tensor.numel)[:TENSORS]:
            self._handles.append(tensor.register_post_accumulate_grad_hook(self._note))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Look at nothing any longer."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._made = [], {}

    def forget(self) -> None:
        """Take the gradients for what they are now, after a clip that the plan allows."""
        self._made = {}

    @torch.no_grad()
    def look(self) -> None:
        """Warn if gradients were clipped since they were made; then look at nothing any longer."""
        made, self._made = self._made, {}
        kept = [(tensor, version, values) for tensor, (version, values) in made.items() if tensor.grad is not None]
        if all(_gradient(tensor)._version == version for tensor, version, _ in kept):
            return
        before = torch.cat([values for *_, values in kept]).double().cpu()
        after = torch.cat([_gradient(tensor).reshape(-1)[:ENTRIES] for tensor, *_ in kept]).double().cpu()
        precision = max(torch.finfo(values.dtype).eps for *_, values in kept)
        if what := describe_clip(before[before != 0], after[before != 0], 4 * precision):
            self.close()
            warn_caller(f"{what}; {_REMEDY}")

    @torch.no_grad()
    def _note(self, tensor: nn.Parameter) -> None:
        if tensor.grad is not None:
            self._made[tensor] = _gradient(tensor)._version, _gradient(tensor).reshape(-1)[:ENTRIES].clone()


def describe_clip(before: Tensor, after: Tensor, tolerance: float) -> str | None:
    """What clipping made `after` of gradients that were `before`, all not 0; None for anything else."""
    ratio = after / before
    if not len(ratio) or not bool(ratio.isfinite().all()) or float(ratio.min()) <= 0 or float(ratio.max()) > 1:
        return None
    least, most = float(ratio.min()), float(ratio.max())
    if most - least <= tolerance * most:
        parts = {1, dist.get_world_size() if dist.is_initialized() else 1}
        if any(abs(part / most - round(part / most)) <= tolerance * part / most for part in parts):
            return None  # an average, or a scale that was taken back
        return (
            f"gradients were multiplied by {most:.3g} between backward and step, as torch.nn.utils.clip_grad_norm_ does"
        )
    limit = float(after.abs().max())
    is_limited = (after.abs() >= limit * (1 - tolerance)) | (after == before)
    if bool(is_limited.all()):
        return (
            f"gradients were limited to {limit:.3g} between backward and step, as torch.nn.utils.clip_grad_value_ does"
        )
    return None


def _gradient(tensor: nn.Parameter) -> Tensor:
    """What this process holds of a parameter's gradient; its version counts what writes to it."""
    assert tensor.grad is not None
    return local_shard(tensor.grad)
