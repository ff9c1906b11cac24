"""Compiled loops of the sparse engine: a tile of tokens at a time, transposed so that a live weight meets whole vectors.

A tile of TILE tokens of X is turned into (in, TILE) in cache. A live weight is then one multiply-add of a vector of TILE
floats, and a tile of Y is turned back as it is written: X and Y cross memory once. Threads share the tiles; each sums the
gradients of the values over its own, so the order of that sum depends only on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

TILE = 64  # measured: on EPYC (Zen 4, 1 MiB L2 a core) best of 32, 64, 96 and 128 tokens, by 1.0 to 3.5 times
PANEL = 64  # chosen: columns turned at a time, and rows of Y held back: 64 × 64 floats stay in the first-level cache
# sums may be reordered for vectors; NaN and infinity keep their meaning
FAST = {"reassoc", "contract", "nsz", "arcp"}


def _in_threads(loop: Any) -> Any:
    """Compile a loop, and keep its machine code for other processes if numba finds a folder that it may write to."""
    options: dict[str, Any] = {"parallel": True, "fastmath": FAST}
    try:
        return njit(cache=True, **options)(loop)
    except RuntimeError:
        return njit(**options)(loop)


def use_threads() -> int:
    """Make numba use torch's number of threads, up to numba's own limit; return the number."""
    wanted = torch.get_num_threads()
    count = min(wanted, int(numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(count)
    if torch.get_num_threads() != wanted:  # numba's OpenMP layer, when it starts, sets it for the whole process
        torch.set_num_threads(wanted)
    return count


@njit(fastmath=FAST, inline="always")  # type: ignore[untyped-decorator]
def _turn(x: Any, first: int, count: int, turned: Any) -> None:
    """Rows first … first + count of x, transposed; zero in the rest of the tile."""
    width = x.shape[1]
    whole = count // 4 * 4
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        for t in range(0, whole, 4):
            for i in range(start, stop):  # four at a time by name: loops over them become slow gathers
                four = turned[i, t : t + 4]
                four[0] = x[first + t, i]
                four[1] = x[first + t + 1, i]
                four[2] = x[first + t + 2, i]
                four[3] = x[first + t + 3, i]
        for t in range(whole, TILE):
            for i in range(start, stop):
                turned[i, t] = x[first + t, i] if t < count else 0.0


@njit(fastmath=FAST, inline="always")  # type: ignore[untyped-decorator]
def _turn_back(panel: Any, y: Any, first: int, count: int, start: int, stop: int) -> None:
    """Write a panel (PANEL, TILE) of outputs start … stop to rows first … first + count of y."""
    flat = panel.reshape(-1)
    whole = start + (stop - start) // 8 * 8
    for o in range(start, whole, 8):
        for t in range(count):
            at = (o - start) * TILE + t
            eight = y[first + t, o : o + 8]
            eight[0] = flat[at]
            eight[1] = flat[at + TILE]
            eight[2] = flat[at + 2 * TILE]
            eight[3] = flat[at + 3 * TILE]
            eight[4] = flat[at + 4 * TILE]
            eight[5] = flat[at + 5 * TILE]
            eight[6] = flat[at + 6 * TILE]
            eight[7] = flat[at + 7 * TILE]
    for o in range(whole, stop):
        for t in range(count):
            y[first + t, o] = panel[o - start, t]


@njit(fastmath=FAST, inline="always")  # type: ignore[untyped-decorator]
def _sum_row(turned: Any, index: Any, values: Any, at: int, stop: int, row: Any) -> None:
    """row = Σ values[j] · turned[index[j]], four weights at a time so that the row is read and written less often."""
    for t in range(TILE):
        row[t] = 0.0
    while stop - at >= 4:
        x0, x1, x2, x3 = turned[index[at]], turned[index[at + 1]], turned[index[at + 2]], turned[index[at + 3]]
        w0, w1, w2, w3 = values[at], values[at + 1], values[at + 2], values[at + 3]
        for t in range(TILE):
            row[t] += w0 * x0[t] + w1 * x1[t] + w2 * x2[t] + w3 * x3[t]
        at += 4
    while at < stop:
        x0, w0 = turned[index[at]], values[at]
        for t in range(TILE):
            row[t] += w0 * x0[t]
        at += 1


@njit(fastmath=FAST, inline="always")  # type: ignore[untyped-decorator]
def _multiply(turned: Any, starts: Any, index: Any, values: Any, y: Any, first: int, count: int, panel: Any) -> None:
    width = y.shape[1]
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        for o in range(start, stop):
            _sum_row(turned, index, values, starts[o], starts[o + 1], panel[o - start])
        _turn_back(panel, y, first, count, start, stop)


@_in_threads
def product(x: Floats, starts: Ints, columns: Ints, values: Floats, y: Floats, threads: int) -> None:
    """y (N, out) = x (N, in) times the transpose of the rows given by starts, columns and values."""
    tiles = (x.shape[0] + TILE - 1) // TILE
    for thread in prange(threads):
        turned = np.empty((x.shape[1], TILE), np.float32)
        panel = np.empty((PANEL, TILE), np.float32)
        for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
            first = tile * TILE
            count = min(TILE, x.shape[0] - first)
            _turn(x, first, count, turned)
            _multiply(turned, starts, columns, values, y, first, count, panel)


@njit(fastmath=FAST, inline="always")  # type: ignore[untyped-decorator]
def _add_dots(gradient: Any, turned: Any, starts: Any, columns: Any, sums: Any) -> None:
    for o in range(starts.shape[0] - 1):
        row = gradient[o]
        for j in range(starts[o], starts[o + 1]):
            column = turned[columns[j]]
            total = np.float32(0)
            for t in range(TILE):
                total += row[t] * column[t]
            sums[j] += total


@_in_threads
def gradients(
    x: Floats,
    gradient: Floats,
    starts: Ints,
    columns: Ints,
    starts_by_column: Ints,
    rows: Ints,
    values_by_column: Floats,
    by_x: Floats,
    by_values: Floats,
) -> None:
    """From the gradient (N, out) of y those of x (N, in) and of the values (threads, live), the latter added by thread.

    Either is left out where its array has no columns.
    """
    threads = by_values.shape[0]
    tiles = (x.shape[0] + TILE - 1) // TILE
    for thread in prange(threads):
        turned_gradient = np.empty((gradient.shape[1], TILE), np.float32)
        turned = np.empty((x.shape[1] if by_values.shape[1] else 0, TILE), np.float32)
        panel = np.empty((PANEL, TILE), np.float32)
        for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
            first = tile * TILE
            count = min(TILE, x.shape[0] - first)
            _turn(gradient, first, count, turned_gradient)
            if by_x.shape[1]:
                _multiply(turned_gradient, starts_by_column, rows, values_by_column, by_x, first, count, panel)
            if by_values.shape[1]:
                _turn(x, first, count, turned)
                _add_dots(turned_gradient, turned, starts, columns, by_values[thread])
