"""Learning-rate schedules: the factor on every tensor's peak rate as a function of the step."""

from __future__ import annotations

from math import cos, pi, sqrt


def factor(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    schedule: str,
    final_lr_fraction: float,
    decay_steps: int | None = None,
    decay_shape: str | None = None,
) -> float:
    """Factor at `step` (0-based): linear warm-up to 1, then `constant`, `linear` or `cosine` to `final_lr_fraction`.

    `wsd` (Hu et al. 2024, arXiv 2404.06395) stays at 1 and falls over the last `decay_steps`, as `decay_shape` says: linear,
    cosine, exponential, or sqrt, 1 - √ of the progress (Hägele et al. 2024, arXiv 2405.18392).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    length, shape = (decay_steps or 0, decay_shape) if schedule == "wsd" else (steps - warmup_steps, schedule)
    progress = max(0, step - (steps - length)) / max(1, length)
    if shape == "exponential":
        return float(final_lr_fraction**progress)
    if shape == "cosine":
        return final_lr_fraction + (1.0 - final_lr_fraction) * 0.5 * (1.0 + cos(pi * progress))
    return 1.0 - (1.0 - final_lr_fraction) * (sqrt(progress) if shape == "sqrt" else progress)
