"""GELU and its slope inside the sparse engine's loops, in float32: exact and by tanh. LLVM makes vectors of these loops.

Measured: within 2.7 (exact; torch's 9.5, as its 1 + erf cancels) and 3.2 (by tanh) units in the last place of exact numbers,
of |x| / 2 and of a slope of 1/2 where those are larger.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

F = np.float32
INTEGER = F(1.5 * 2**23)  # a number added to this one is rounded to an integer, which lies in the lowest bits
# 2^r of |r| ≤ 1/2, from the highest power down: fitted by least squares, whose weights made the largest error small: 1e-7
POWER = tuple(F(c) for c in (0.0013264726, 0.0096715130, 0.055507336, 0.24022242, 0.69314700, 1.0))
# the chance of a normal number above x ≥ 0 is exp(-x²/2) times a function that falls from 1/2 like 1/x: a polynomial of
# v = x / (x + 3), fitted by least squares, whose weights made its largest error small: 3e-9 of the chance
CHANCE = tuple(
    F(c) for c in (-0.041811381, 0.095926732, 0.028910110, -0.15156391, -0.28780562, 1.0532006, -1.1968273, 0.5)
)
_fused = njit(error_model="numpy", fastmath={"contract"})  # x · y + z rounded once where the processor can


@intrinsic  # type: ignore[untyped-decorator]
def memory(typing: Any, address: Any) -> Any:
    """A pointer to an address."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), lower


@_fused  # type: ignore[untyped-decorator]
def _exponential(x: Any, factor: float) -> Any:
    """e^(factor · x) of x ≥ 0 and a negative factor, in 2 ulp where it is above 1/8; 0 below 2^-126.5."""
    scaled = max(x * F(factor / math.log(2)), F(-127))  # whose power has the bits of 0, so that no large x meets a rest
    moved = scaled + INTEGER
    rest = scaled - (moved - INTEGER)
    series = F(0)
    for coefficient in POWER:
        series = series * rest + coefficient
    power = (np.float32(moved).view(np.int32) << np.int32(23)) + np.int32(127 << 23)
    return series * np.int32(power).view(np.float32)


@_fused  # type: ignore[untyped-decorator]
def _exact(x: Any) -> Any:
    """x·Φ(x) and Φ(x) + x·φ(x)."""
    bell, v = _exponential(x * x, -0.5), abs(x) / (abs(x) + F(3))
    tail = F(0)
    for coefficient in CHANCE:
        tail = tail * v + coefficient
    chance = F(1) - tail * bell if x > F(0) else tail * bell
    return x * chance, chance + x * (bell * F(1 / math.sqrt(2 * math.pi)))


@_fused  # type: ignore[untyped-decorator]
def _by_tanh(x: Any) -> Any:
    """x·s and its slope, s = (1 + tanh(√(2/π)·(x + .044715·x³))) / 2."""
    # chosen: as large as changes nothing, so that none of the slope's factors is infinite
    part = min(F(0.044715) * x * x, F(100))
    small = _exponential(abs(x + x * part), -math.sqrt(8 / math.pi))  # e^-2|y|: tanh y is made without a difference
    share = F(1) / (F(1) + small)
    s = share if x > F(0) else small * share
    return x * s, s + x * (small * share * share) * (F(math.sqrt(8 / math.pi)) * (F(1) + F(3) * part))


@_fused  # type: ignore[untyped-decorator]
def activate(form: int, place: int, slopes: int, count: int) -> None:
    """Put GELU in the place of `count` floats, and its slopes at another address."""
    x, slope = carray(memory(place), count, np.float32), carray(memory(slopes), count, np.float32)
    if form == 1:
        for i in range(count):
            x[i], slope[i] = _exact(x[i])
    else:
        for i in range(count):
            x[i], slope[i] = _by_tanh(x[i])


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def scale(place: int, slopes: int, count: int) -> None:
    """Multiply `count` floats by those at another address."""
    x, slope = carray(memory(place), count, np.float32), carray(memory(slopes), count, np.float32)
    for i in range(count):
        x[i] *= slope[i]
