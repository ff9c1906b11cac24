"""Tokens in files, read a window at a time, and files that must stay what they were when their hash was taken.

Files are read and not mapped: where a mapped file is cut, the process ends without a message, and where one is written
to, the tokens change.
"""

from __future__ import annotations

import os
import resource
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from supar_cli.errors import SetupError
from supar_cli.files import naming_read_errors

TICK_S = 0.02  # chosen: two ticks of the slowest clock that a kernel stamps files with, 100 Hz
AT_ONCE = 2**22  # chosen: tokens, a few MB, of a file that is gone through as a whole

REMEDY = "; expected the data that it began with: put them back, and the same command goes on from the last checkpoint"


class Stamp(NamedTuple):
    """What tells that a file is the one it was, without reading it. The time is in ns."""

    device: int
    inode: int
    size_bytes: int
    changed: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """Of a path or of an open file. Raises OSError."""
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@contextmanager
def require_unchanged(files: list[Path]) -> Iterator[dict[Path, Stamp]]:
    """The stamps of files that must not change meanwhile. Raises SetupError, naming the file, where one does."""
    before = {path: _stamp(path) for path in files}
    newest_s = max((stamp.changed for stamp in before.values()), default=0) / 1e9
    time.sleep(min(TICK_S, max(0.0, newest_s + TICK_S - time.time())))  # so that whatever changes now has another time
    yield before
    for path, stamp in before.items():
        if _stamp(path) != stamp:
            raise SetupError(f"{path}: was written to while it was read; expected data that stay as they are")


def _stamp(path: Path) -> Stamp:
    with naming_read_errors(path):
        return Stamp.of(path)


def raise_open_file_limit(count: int) -> None:
    """Have the system allow so many open files, where it does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count > soft // 2:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class StampedFile:
    """A file that stays open, so that one put in its place, or its removal, leaves what is read as it was."""

    __slots__ = ("__weakref__", "number", "path", "stamp")

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self.path, self.stamp = path, stamp
        with naming_read_errors(path):
            self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)
        if Stamp.of(self.number) != stamp:
            raise self._changed()

    def read(self, at: int, count: int) -> bytes:
        """So many bytes from there on. Raises SetupError where the file is not what it was, or can't be read."""
        with naming_read_errors(self.path, REMEDY):
            found = os.pread(self.number, count, at)
            while 0 < len(found) < count and (more := os.pread(self.number, count - len(found), at + len(found))):
                found += more
            now = Stamp.of(self.number)  # after reading: what was written before it shows
        if now != self.stamp or len(found) < count:
            raise self._changed()
        return found

    def _changed(self) -> SetupError:
        now, size = Stamp.of(self.number), self.stamp.size_bytes
        cut = now.size_bytes < size
        what = f"was cut to {now.size_bytes:,} of its {size:,} bytes" if cut else "was written to"
        return SetupError(f"{self.path}: {what} since its hash was taken{REMEDY}")


class TokenFile:
    """Tokens of a file from a byte on, as an array that is not in memory: a slice is another such array, `np.asarray` reads it.

    Reading raises SetupError where the file was cut or written to since its stamp was taken.
    """

    __slots__ = ("_dtype", "_file", "_length", "_start")

    def __init__(
        self, file: StampedFile, dtype: str | np.dtype[Any], start: int = 0, length: int | None = None
    ) -> None:
        self._file, self._dtype, self._start = file, np.dtype(dtype), start
        self._length = (file.stamp.size_bytes - start) // self._dtype.itemsize if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> TokenFile:
        start, stop, _ = part.indices(self._length)
        return TokenFile(self._file, self._dtype, self._start + start * self._dtype.itemsize, max(0, stop - start))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        read = np.frombuffer(self._file.read(self._start, self._length * self._dtype.itemsize), self._dtype)
        return read if dtype is None else read.astype(dtype)

    def max(self) -> int:
        """The largest token."""
        return max(int(np.asarray(self[at : at + AT_ONCE]).max()) for at in range(0, self._length, AT_ONCE))
