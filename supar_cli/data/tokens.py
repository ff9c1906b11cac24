"""Tokens in files, read a window at a time, and files that must stay what they were when their hash was taken.

Files are read, not memory-mapped: truncating a mapped file kills the process without a message, and writing to it
changes the tokens.
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

from supar_cli.data.formats import LLMC
from supar_cli.errors import SetupError
from supar_cli.files import naming_read_errors

TICK_S = 0.02  # chosen: two ticks of the slowest clock that a kernel stamps files with, 100 Hz
LLMC_HEADER_BYTES = 1024
AT_ONCE = 2**22  # chosen: tokens per chunk, a few MB, when a whole file is scanned

REMEDY = "; expected the data that the run started with: restore them, and the same command continues from the last checkpoint"


class Stamp(NamedTuple):
    """Identifies an unchanged file without reading it. The time is in ns."""

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
    """The stamps of files that must not change inside the block. Raises SetupError that names a file that does."""
    before = {path: _stamp(path) for path in files}
    newest_s = max((stamp.changed for stamp in before.values()), default=0) / 1e9
    time.sleep(min(TICK_S, max(0.0, newest_s + TICK_S - time.time())))  # so that any later change gets another time
    yield before
    for path, stamp in before.items():
        if _stamp(path) != stamp:
            raise SetupError(f"{path}: changed while it was read; expected files that don't change")


def _stamp(path: Path) -> Stamp:
    with naming_read_errors(path):
        return Stamp.of(path)


def raise_open_file_limit(count: int) -> None:
    """Raise the limit on open files to allow this many, if the system permits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count > soft // 2:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class StampedFile:
    """A file kept open, so that replacing or deleting it does not affect what is read."""

    __slots__ = ("__weakref__", "number", "path", "stamp")

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self.path, self.stamp = path, stamp
        with naming_read_errors(path):
            self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)
        if Stamp.of(self.number) != stamp:
            raise self._changed()

    def read(self, at: int, count: int) -> bytes:
        """`count` bytes from offset `at`. Raises SetupError if the file has changed or can't be read."""
        with naming_read_errors(self.path, REMEDY):
            found = os.pread(self.number, count, at)
            while 0 < len(found) < count and (more := os.pread(self.number, count - len(found), at + len(found))):
                found += more
            now = Stamp.of(self.number)  # checked after reading, so that any earlier write is noticed
        if now != self.stamp or len(found) < count:
            raise self._changed()
        return found

    def _changed(self) -> SetupError:
        now, size = Stamp.of(self.number), self.stamp.size_bytes
        cut = now.size_bytes < size
        what = f"was truncated to {now.size_bytes:,} of its {size:,} bytes" if cut else "was written to"
        return SetupError(f"{self.path}: {what} since its hash was taken{REMEDY}")


class TokenFile:
    """Tokens of a file from a byte on, as an array that is not in memory: a slice is another such array, `np.asarray` reads it.

    Reading raises SetupError if the file has changed since its stamp was taken.
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

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        read = np.frombuffer(self._file.read(self._start, self._length * self._dtype.itemsize), self._dtype)
        return read if dtype is None else read.astype(dtype)

    def max(self) -> int:
        """The largest token."""
        return max(int(chunk.max()) for chunk in chunks(self))


def chunks(tokens: NDArray[Any] | TokenFile) -> Iterator[NDArray[Any]]:
    """Tokens a few MB at a time."""
    return (np.asarray(tokens[at : at + AT_ONCE]) for at in range(0, len(tokens), AT_ONCE))


def open_tokens(file: StampedFile, kind: str, dtype: str) -> TokenFile:
    """The tokens of a file: raw integers (nanogpt), an llm.c shard, or an array in numpy's format.

    llm.c: a header of 256 int32 (magic, version, count), then tokens. Raises SetupError for a corrupt file.
    """
    if kind == "npy":
        return _open_array(file)
    path, size, start, integer = file.path, file.stamp.size_bytes, 0, "<u4" if dtype == "uint32" else "<u2"
    if kind == "llmc":
        header = np.asarray(TokenFile(file, "<i4")[:256])
        if len(header) < 256 or header[0] not in LLMC or header[1] != LLMC[int(header[0])][0]:
            raise SetupError(f"{path}: not an llm.c shard of version 1 (uint16) or 7 (uint32)")
        start, integer = LLMC_HEADER_BYTES, LLMC[int(header[0])][1]
    width = np.dtype(integer).itemsize
    if kind == "llmc" and size != start + width * int(header[2]):
        what = f"its header counts {header[2]} tokens, it holds {(size - start) / width:g}"
        raise SetupError(f"{path}: a corrupt token file: {what}")
    if (size - start) % width or size == start:
        raise SetupError(f"{path}: a corrupt token file: {size} bytes are not {np.dtype(integer)} tokens")
    return TokenFile(file, integer, start)


def _open_array(file: StampedFile) -> TokenFile:
    path = file.path
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)  # for its header alone
    except (ValueError, EOFError, OSError) as error:
        raise SetupError(f"{path}: a corrupt .npy file: {error}") from None
    if len(found.shape) != 1 or found.dtype.kind not in "iu" or not isinstance(found, np.memmap):
        what = f"holds {found.dtype} of shape {list(found.shape)}"
        raise SetupError(
            f"{path}: {what}; expected integers along one axis and at least one, as array.reshape(-1) makes them"
        )
    if (more := file.stamp.size_bytes - found.offset - found.nbytes) > 0:
        raise SetupError(f"{path}: holds {more:,} bytes after the array of its header; expected one array a file")
    return TokenFile(file, found.dtype, found.offset, len(found))
