"""Benchmark documents: the machine they were made on, and the comparison of one with an earlier one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from supar_cli.errors import InputError
from supar_cli.training.runtime import device_name, versions

WORSE = 0.1  # chosen: a smaller loss than a tenth is not worth an alarm, even where it is certain
# What has to be the same for two documents of a benchmark to be compared. Rounds are not: more only narrow the spread
SETTINGS = {
    "layer": ("shape", "tokens", "density", "block", "device", "precision"),
    "step": ("shape", "batch_size", "sparsity", "block", "device", "precision", "compiled", "engine"),
    "run": ("shape", "batch_size", "sparsity", "block", "device", "precision", "compiled", "engine"),
    "memory": ("shape", "tokens", "density", "device", "precision"),
}


def where(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """The settings that come from the machine."""
    return {"device": device_name(device), "precision": str(precision).removeprefix("torch.")}


def environment(device: torch.device) -> dict[str, Any]:
    """What a measurement ran on and with, when (UTC), and the command line."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        **versions(),
        "numba": importlib.metadata.version("numba") if importlib.util.find_spec("numba") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["supar", *sys.argv[1:]]),
    }


def require_same(name: str, earlier: Any, settings: dict[str, Any]) -> None:
    """Raise InputError, naming every difference, where the document `earlier` of a file is not of these settings."""
    if not isinstance(earlier, dict) or earlier.get("kind") != "supar.bench/v1":
        raise InputError(f"{name}: kind: is no supar.bench/v1; expected what `supar bench {settings['bench']}` wrote")
    if earlier.get("bench") != settings["bench"]:
        raise InputError(f"{name}: bench: is {earlier.get('bench')!r}; expected {settings['bench']}")
    different = [
        f"{name}: {key}: was {earlier.get(key)!r} then, is {settings[key]!r} now; expected the same settings"
        for key in SETTINGS[settings["bench"]]
        if earlier.get(key) != settings[key]
    ]
    if different:
        raise InputError(*different)


@dataclass(frozen=True, slots=True)
class Reading:
    """A number with the quartiles of its rounds. `gain`: whether more of it is better."""

    value: float
    low: float
    high: float
    gain: bool = True


def readings(result: dict[str, Any]) -> dict[str, Reading]:
    """What a document is compared by: ratios of times as gains of ours, or bytes."""
    if result["bench"] == "layer":
        return {
            f"{name} at {row['density']:g}": Reading(arm["ratio"], *arm["ratio_quartiles"])
            for row in result["densities"]
            for name, arm in row["arms"].items()
            if name != "masked"
        }
    if result["bench"] == "step":
        low, high = result["ratio_quartiles"]
        return {
            "masked dense ÷ ours": Reading(result["masked_dense_ratio"], *result["masked_dense_ratio_quartiles"]),
            "plain dense ÷ ours": Reading(1 / result["ratio"], 1 / high, 1 / low),
        }
    if result["bench"] == "run":
        found = {"checkpoint": result["checkpoint"], "metrics and monitors": result["metrics"]}
        found |= {"two processes ÷ one beside another": result["parallel"]["over_beside"]} if result["parallel"] else {}
        return {
            f"{what}, of a step": Reading(one["share"], one["quartiles"][0], one["quartiles"][1], gain=False)
            for what, one in found.items()
        }
    return {
        f"{name}, bytes per position": Reading(bytes_, bytes_, bytes_, gain=False)  # one measurement has no spread
        for name, bytes_ in ((name, arm["bytes_per_position"]) for name, arm in result["arms"].items())
    }


def compared(name: str, earlier: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """Each ratio then and now. It is worse when it lost more than WORSE and the quartiles of both runs lie apart."""
    try:
        before = readings(earlier)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{name}: is no whole document of `supar bench {now['bench']}` ({error!r})") from None
    after = readings(now)
    rows: list[dict[str, Any]] = []
    for what, old in before.items():
        new = after.get(what)
        if new is None:
            rows.append({"what": what, "then": old.value, "now": None, "change": None, "worse": False})
            continue
        if old.gain:
            worse = new.value < old.value * (1 - WORSE) and new.high < old.low
        else:
            worse = new.value > old.value * (1 + WORSE) and new.low > old.high
        change = new.value / old.value - 1
        rows.append(
            {
                "what": what,
                "then": round(old.value, 4),
                "now": round(new.value, 4),
                "change": round(change, 4),
                "worse": worse,
            }
        )
    return rows
