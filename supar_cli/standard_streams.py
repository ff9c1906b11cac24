"""Standard streams that fail no program: /dev/null stands in for a missing one, and what can't be written is dropped."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any

_LOST: dict[int, OSError] = {}  # by a stream's number, why some of it was lost


class _Output(io.FileIO):
    """The file of an output stream."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # type: ignore[unreachable]
                select.select([], [self], [])  # a pipe that is full and set not to block
            return written
        except OSError as error:
            _LOST[self.fileno()] = error
            return len(data)


def protect() -> None:
    """Make this process's standard streams, and those that its children inherit, safe to use. Call it before anything is written.

    Characters that a stream's encoding lacks are escaped, as in `\\u03bc`.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened gets its number, which is the lowest free one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        before = getattr(sys, name)
        if number == 0:
            sys.stdin = before or os.fdopen(0, closefd=False)
            continue
        buffer = io.BufferedWriter(_Output(number, "wb", closefd=False))
        by_line = number == 2 or os.isatty(number)
        after = io.TextIOWrapper(
            buffer, before.encoding if before else "utf-8", "backslashreplace", line_buffering=by_line
        )
        setattr(sys, name, after)


def lost_output() -> OSError | None:
    """Flush the output streams; why some of standard output was lost, None if it was not or if its reader is gone."""
    for name in ("stdout", "stderr"):
        getattr(sys, name).flush()
    return None if isinstance(_LOST.get(1), BrokenPipeError) else _LOST.get(1)


def is_output_lost() -> bool:
    """Whether writing more to standard output is in vain: its reader is gone, or it can't be written."""
    return 1 in _LOST
