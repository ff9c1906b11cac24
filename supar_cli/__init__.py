"""supar: tune a small dense proxy, transfer with SμPar to a wide sparse target, train it.

The Python API is documents in, documents out: `load`, `transfer`, `explain`, `tune`, `train`, `check`, `sweep`, `compare`,
`report`; `weights` gives what was trained. torch is imported by what runs something only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from supar_cli.version import __version__

__all__ = [
    "__version__",
    "check",
    "compare",
    "explain",
    "load",
    "report",
    "sweep",
    "train",
    "transfer",
    "tune",
    "weights",
]

if TYPE_CHECKING:
    from supar_cli.api import check, compare, explain, load, report, sweep, train, transfer, tune, weights


def __getattr__(name: str) -> Any:
    if name in __all__:
        from supar_cli import api

        return getattr(api, name)
    raise AttributeError(f"module 'supar_cli' has no attribute {name!r}")
