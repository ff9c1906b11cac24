"""Stages of `gpu_first.py` as they run on a GPU, on the shadow device and at small sizes: a JSON line a row."""

from __future__ import annotations

import json
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from tests.shadow_graph import graphed

import torch  # isort: skip
from supar_cli.sparse import autotune, block  # isort: skip
from tests import gpu_speed, gpu_stages  # isort: skip
from tests.gpu_first import STAGES, Session  # isort: skip

SMALL = {
    "SHAPE": (256, 256),
    "TOKENS": 512,
    "EDGE": 64,
    "COPIED_BYTES": 2**12,
    "LARGE": {"run": {"compile": "off"}},
    "device_seconds": autotune.timed,  # the shadow device computes at once
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        watching = stack.enter_context(graphed())
        for name, value in SMALL.items():
            stack.enter_context(mock.patch.object(gpu_speed, name, value))
        stack.enter_context(mock.patch.object(gpu_stages, "SMALL", {}))
        stack.enter_context(mock.patch.object(block, "_importable", lambda: False))
        modes: list[int] = []

        def set_mode(mode: int) -> None:  # as torch does
            modes.append(mode)
            what = "prototype feature and does not yet detect all synchronizing operations"
            warnings.warn(f"Synchronization debug mode is a {what}", stacklevel=2)

        def wait(what: str) -> None:
            if modes and modes[-1] and not what.startswith("event"):
                warnings.warn(f"{gpu_stages.TOLD} (Triggered internally)", stacklevel=2)

        stack.enter_context(mock.patch.object(torch._C, "_cuda_set_sync_debug_mode", set_mode, create=True))
        stack.enter_context(mock.patch.object(watching, "wait", wait))
        for name in ("facts", "waits", "layers", "model"):
            rows: list[dict[str, Any]] = []
            session = Session(is_cpu=False, is_long=False, folder=Path(folder), tell=rows.append)
            with session.part("it"):
                getattr({"tests.gpu_speed": gpu_speed}.get(STAGES[name].module, gpu_stages), name)(session)
            print(json.dumps({"case": name, "rows": rows, "modes": modes}, default=str), flush=True)


if __name__ == "__main__":
    main()
