"""Learning-rate schedules: the factor on every tensor's peak rate as a function of the step."""

from __future__ import annotations

from math import cos, pi


def factor(step: int, *, steps: int, warmup_steps: int, schedule: str, final_lr_fraction: float) -> float:
    """Factor at `step` (0-based): linear warm-up to 1, then `constant`, `linear` or `cosine` to `final_lr_fraction`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return 1.0 - (1.0 - final_lr_fraction) * progress
    return final_lr_fraction + (1.0 - final_lr_fraction) * 0.5 * (1.0 + cos(pi * progress))
