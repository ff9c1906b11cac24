"""What the files of a checkpoint have to be together: those of its manifest, each tensor whole in them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from supar_cli.errors import SetupError


def refuse_others(path: Path, files: Collection[str]) -> None:
    """Raise SetupError where a folder holds tensors in another file: they would be read with the others."""
    others = sorted({file.name for file in path.glob("*.safetensors")} - set(files))
    if others:
        raise SetupError(f"{path / others[0]}: is no part of the checkpoint; delete it")


def are_whole(stored: Any) -> bool:
    """Whether the parts of a stored tensor, some rows each, follow one on the other from its first row to its last.

    `stored` is torch's metadata of it. Its reader leaves as they were rows that are in no file.
    """
    if not stored.size:
        return len(stored.chunks) == 1
    row, rest = 0, [0] * (len(stored.size) - 1)
    for chunk in sorted(stored.chunks, key=lambda chunk: (*chunk.offsets, *chunk.sizes)):
        if list(chunk.offsets) != [row, *rest] or chunk.sizes[1:] != stored.size[1:]:
            return False
        row += chunk.sizes[0]
    return row == int(stored.size[0])
