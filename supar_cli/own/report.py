"""What a training script reports to `supar tune-proxy`: its losses, as JSON lines in a file. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from supar_cli.errors import InputError
from supar_cli.files import append_lines, naming_write_errors

RESULT = "SUPAR_RESULT"  # the environment variable with the path of the file, which `jobs.command` sets and reads


def report_loss(loss: Any, step: int | None = None) -> None:
    """Report the validation loss of a run: with `step`, one on the way; the last one reported is the run's result.

    `loss` is a number or a tensor of one; one that is not finite says that the run diverged. Outside of `supar
    tune-proxy`, and in every process of a run but its first, nothing is written. Raises InputError, SetupError.
    """
    value = _number(loss)
    if step is not None and (isinstance(step, bool) or int(step) != step or step < 0):
        raise InputError(f"report_loss: step: {step!r}; expected a whole number from 0 on")
    path = os.environ.get(RESULT)
    if not path or not _is_first_process():
        return
    record = {"loss": value if math.isfinite(value) else None} | ({} if step is None else {"step": int(step)})
    with naming_write_errors(Path(path)):
        append_lines(Path(path), json.dumps(record, allow_nan=False) + "\n")


def _number(loss: Any) -> float:
    """The number of a loss. Raises InputError."""
    try:
        value = loss.item() if hasattr(loss, "item") else loss
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except (RuntimeError, ValueError, TypeError):  # what libraries raise for an array of several numbers
        pass
    shape = getattr(loss, "shape", None)
    what = repr(loss) if shape is None else f"{type(loss).__name__} of shape {list(shape)}"
    raise InputError(f"report_loss: loss: {what}; expected a number, or a tensor of one")


def _is_first_process() -> bool:
    """Whether this is the first process of its run: by torch.distributed where it is in use, else by the launcher's rank."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"
