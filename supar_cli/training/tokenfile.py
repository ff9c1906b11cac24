"""A file of tokens, read a window at a time while it is what it was when it was opened.

Not memory-mapped: a mapped file that is cut ends the process by SIGBUS, without a word.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supar_cli.errors import SetupError

Stamp = tuple[int, int, int]  # inode, size in bytes, time of the last change in nanoseconds
AT_ONCE = 2**24  # chosen: tokens of a whole file that are held at a time


def stamp(file: Path | int) -> Stamp:
    """What tells a path's or a descriptor's file from another and from itself after a change. Raises SetupError."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise SetupError(f"{file}: can't be read: {error.strerror or error}") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def changed(path: Path) -> SetupError:
    """The error of a file that is no longer what the run began with."""
    return SetupError(
        f"{path}: changed while it is in use; put back what it was, and the same command goes on from the last checkpoint"
    )


class TokenFile:
    """Tokens of `dtype` from byte `offset` to the end, as an array's slices are taken.

    A file that is replaced by another under its name is read on as it was. Reading raises SetupError where the file was
    written to or cut since `known`, its stamp when its content was identified.
    """

    def __init__(self, path: Path, dtype: Any, offset: int, known: Stamp) -> None:
        self._path, self._dtype, self._known = path, np.dtype(dtype), known
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise SetupError(f"{path}: can't be read: {error.strerror or error}") from None
        self._first, self._count = offset, (known[1] - offset) // self._dtype.itemsize
        self._require_unchanged()

    def __len__(self) -> int:
        return int(self._count)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, step = part.indices(self._count)
        size = self._dtype.itemsize
        wanted = max(0, stop - start) * size
        raw = os.pread(self._file.fileno(), wanted, self._first + start * size)
        self._require_unchanged()
        if len(raw) < wanted:
            raise changed(self._path)
        return np.frombuffer(raw, self._dtype)[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)

    def part(self, start: int, stop: int) -> TokenFile:
        """The tokens from `start` to before `stop`, read from the same open file."""
        found = object.__new__(TokenFile)
        found.__dict__.update(self.__dict__)
        found._first, found._count = self._first + start * self._dtype.itemsize, stop - start
        return found

    def _require_unchanged(self) -> None:
        # measured: 1 µs a window, of some 5 for reading it
        if stamp(self._file.fileno()) != self._known:
            raise changed(self._path)


def largest(tokens: NDArray[Any] | TokenFile) -> int:
    """The largest token, a stretch at a time."""
    return max(int(tokens[start : start + AT_ONCE].max()) for start in range(0, len(tokens), AT_ONCE))
