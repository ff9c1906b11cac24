"""What the fuzz tests share: how many inputs, damaged bytes, a watch over each input, and counts of how they ended.

The suite tries the same inputs every time. With SUPAR_FUZZ=N it tries N times as many, others at every `--hypothesis-seed`.
"""

from __future__ import annotations

import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

MORE = int(os.environ.get("SUPAR_FUZZ", "0"))
LONGEST_S = 20.0  # chosen: far more than any input takes, on a machine that others use too
LARGEST_BYTES = 2**29  # chosen: far more memory than any of these small inputs needs
KINDS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def tries(count: int) -> Callable[[Any], Any]:
    """Settings of a property that is tried so often."""
    return settings(
        max_examples=count * max(1, MORE),
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=KINDS,
        print_blob=True,
    )


class Hang(BaseException):
    """An input took too long. Not an Exception, so that nothing takes it for one of its own."""


class Tried:
    """Counts how inputs ended; `ends` watches one for a hang and for memory that no such input needs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @contextmanager
    def ends(self) -> Iterator[Callable[[str], None]]:
        """Call what it gives with how the input ended."""

        def late(*_: object) -> None:
            raise Hang(f"no end after {LONGEST_S} s")

        before = signal.signal(signal.SIGALRM, late)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
        try:
            yield lambda how: self.counts.update([how])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) * 1024
        assert grown < LARGEST_BYTES, f"{grown} bytes more for one input"

    @property
    def text(self) -> str:
        ends = ", ".join(f"{count} {how}" for how, count in sorted(self.counts.items()))
        return f"{sum(self.counts.values())} inputs: {ends}"


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Iterator[Tried]:
    """Its counts are shown when pytest ends."""
    counts = Tried()
    yield counts
    record_property("tried", counts.text)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, other: bytes = b"") -> bytes:
    """Bytes with bits flipped, cut, torn (the beginning is another's), a part doubled, zeroed or lost: others in any case."""
    size = len(content)
    kind = draw(st.sampled_from(["flip", "flips", "cut", "tear", "double", "zero", "lose", "insert"]))
    start, end = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
    made = content
    if kind == "tear":
        made = other[:start] + content[start:]
    elif kind == "double":
        made = content[:end] + content[start:end] + content[end:]
    elif kind == "zero":
        made = content[:start] + bytes(end - start) + content[end:]
    elif kind == "lose":
        made = content[:start] + content[end:]
    elif kind == "insert":
        made = content[:start] + draw(st.binary(min_size=1, max_size=16)) + content[start:]
    elif kind == "cut":
        made = content[:start]
    if made != content or not size:
        return made
    changed = bytearray(content)
    for _ in range(draw(st.integers(2, 8)) if kind == "flips" else 1):
        changed[draw(st.integers(0, size - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)
