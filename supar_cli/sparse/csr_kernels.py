"""Compiled loops of the sparse engine: a tile of tokens at a time, transposed so that a live weight meets whole vectors.

A tile of X is turned into (in, tile) and stays in the second-level cache. A live weight is then one multiply-add of the
tile's tokens, whose sums stay in registers for a whole row, and a tile of Y is turned back as it is written: X and Y cross
memory once. Backwards a live weight loads its tile of dY once, for dX and for its own gradient.

Vectors are written out as LLVM's, of eight floats, from which it makes AVX2, AVX-512 or NEON. Threads are torch's own. The
order of every sum follows from the shape and the tile, never from the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic

from supar_cli.sparse.csr_call import BLOCK, CALL, LANES, PANEL, TILES
from supar_cli.sparse.csr_gelu import activate, memory, scale

FLOAT, INDEX, ADDRESS = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
Value = Any  # of llvmlite, which has no types

THREADS, UNITS = 0, 1  # places of the counters: threads that have begun, units that have been taken


def _pointer(b: Any, kind: Any, base: Value, offset: Value | int) -> Value:
    """To the number or vector that lies `offset` floats behind an address."""
    offset = ADDRESS(offset) if isinstance(offset, int) else offset
    return b.inttoptr(b.add(base, b.shl(offset, ADDRESS(2))), kind.as_pointer())


def _load(b: Any, kind: Any, base: Value, offset: Value | int = 0) -> Value:
    return b.load(_pointer(b, kind, base, offset), align=4)


def _store(b: Any, value: Value, base: Value, offset: Value | int = 0, is_streamed: bool = False) -> None:
    """Streamed past the caches, which then read no line of memory that is wholly written; to whole vectors' addresses only."""
    store = b.store(value, _pointer(b, value.type, base, offset), align=4 * LANES if is_streamed else 4)
    if is_streamed:
        store.set_metadata("nontemporal", b.module.add_metadata([INDEX(1)]))


def _multiply_add(b: Any, x: Value, y: Value, z: Value) -> Value:
    """x · y + z, rounded once where the processor can."""
    name = f"llvm.fmuladd.v{LANES}f32"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(VECTOR, [VECTOR] * 3), name)
    return b.call(function, [x, y, z])


def _pick(b: Any, x: Value, y: Value, lanes: list[int]) -> Value:
    """Lanes of x (0 … 7) and of y (8 … 15)."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(INDEX, len(lanes)), lanes))


def _transpose(b: Any, rows: list[Value]) -> list[Value]:
    """8 × 8 in 24 shuffles, each one instruction of AVX."""
    stages = (
        (1, [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
        (2, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
        (4, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
    )
    for apart, low, high in stages:
        pairs = ((rows[k & ~apart], rows[k | apart], high if k & apart else low) for k in range(LANES))
        rows = [_pick(b, *pair) for pair in pairs]
    return [rows[k] for k in (0, 2, 1, 3, 4, 6, 5, 7)]


def _sums(b: Any, vectors: list[Value]) -> Value:
    """The sums of eight vectors' lanes as one vector, in 7 additions: each ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))."""
    neighbours = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
    halves = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    for one, other in (neighbours, neighbours, halves):
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(_pick(b, x, y, one), _pick(b, x, y, other)) for x, y in pairs]
    return vectors[0]


def _loop(b: Any, first: Value, stop: Value, step: int, carried: list[Value], body: Callable[..., Any]) -> Any:
    """Carry values through body(j, values), j in range(first, stop, step); gives the first j not taken and the last values."""
    before, head, inside, after = b.basic_block, *(b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    phis = [b.phi(value.type) for value in (first, *carried)]
    b.cbranch(b.icmp_signed("<", phis[0], stop), inside, after)
    b.position_at_end(inside)
    changed = [b.add(phis[0], ADDRESS(step)), *body(phis[0], phis[1:])]
    for phi, start, following in zip(phis, (first, *carried), changed, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(following, b.basic_block)
    b.branch(head)
    b.position_at_end(after)
    return phis[0], phis[1:]


def _emit_turn(
    b: Any,
    source: Value,
    stride: Value,
    target: Value,
    target_stride: Value,
    blocks: int = 1,
    is_streamed: bool = False,
) -> None:
    turned = []
    for block in range(blocks):
        places = (b.mul(stride, ADDRESS(block * LANES + k)) for k in range(LANES))
        turned.append(_transpose(b, [_load(b, VECTOR, source, place) for place in places]))
    for k, row in enumerate(zip(*turned, strict=True)):  # a row's vectors one after another: a line of memory at once
        for block, vector in enumerate(row):
            place = b.add(b.mul(target_stride, ADDRESS(k)), ADDRESS(block * LANES))
            _store(b, vector, target, place, is_streamed)


def _dot(b: Any, xs: list[Value], ys: list[Value]) -> Value:
    """The products of some vectors, summed lane by lane."""
    total = b.fmul(xs[0], ys[0])
    for x, y in zip(xs[1:], ys[1:], strict=True):
        total = _multiply_add(b, x, y, total)
    return total


def _emit_row(b: Any, tile: Value, *arguments: Value) -> None:
    """What `_sum_row` and `_sum_row_and_dots` say, for each size that a tile can have, of which one runs."""
    turned, index, values, first, stop, row, *more = arguments

    def emit(vectors: int) -> None:
        others = [_load(b, VECTOR, more[0], v * LANES) for v in range(vectors)] if more else []

        def add(size: int, j: Value, sums: list[Value]) -> list[Value]:
            dots = []
            for at in (b.add(j, ADDRESS(k)) for k in range(size)):
                start = b.mul(b.sext(_load(b, INDEX, index, at), ADDRESS), ADDRESS(vectors * LANES))
                loaded = [_load(b, VECTOR, turned, b.add(start, ADDRESS(v * LANES))) for v in range(vectors)]
                number = b.insert_element(ir.Constant(VECTOR, ir.Undefined), _load(b, FLOAT, values, at), INDEX(0))
                weight = _pick(b, number, number, [0] * LANES)
                sums = [_multiply_add(b, weight, x, total) for x, total in zip(loaded, sums, strict=True)]
                if others:
                    dots.append(_dot(b, loaded, others))
            if others:
                total = _sums(b, dots * (LANES // size))
                total = _pick(b, total, total, list(range(size)))
                _store(b, b.fadd(_load(b, total.type, more[1], j), total), more[1], j)
            return sums

        j, sums = first, [VECTOR([0.0] * LANES)] * vectors
        for size in (LANES, 1) if others else (1,):
            j, sums = _loop(b, j, b.sub(stop, ADDRESS(size - 1)), size, sums, partial(add, size))
        for v, total in enumerate(sums):
            _store(b, total, row, v * LANES)

    after = b.append_basic_block()
    switch = b.switch(tile, after)
    for size in TILES:
        block = b.append_basic_block()
        switch.add_case(ADDRESS(size), block)
        b.position_at_end(block)
        emit(size // LANES)
        b.branch(after)
    b.position_at_end(after)


def _lowered(emit: Callable[..., None], arguments: int) -> tuple[Any, Any]:
    """What numba asks of an intrinsic that takes integers and returns nothing."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Value:
        emit(builder, *values)
        return context.get_dummy_value()

    return types.void(*[types.intp] * arguments), lower


@intrinsic  # type: ignore[untyped-decorator]
def _turn_block(typing: Any, source: Any, stride: Any, target: Any, target_stride: Any) -> Any:
    """8 rows of 8 floats → 8 rows of 8. Addresses; strides in floats."""
    return _lowered(_emit_turn, 4)


@intrinsic  # type: ignore[untyped-decorator]
def _stream_blocks(typing: Any, source: Any, stride: Any, target: Any, target_stride: Any) -> Any:
    """16 rows of 8 floats → 8 rows of 16, past the caches."""
    return _lowered(partial(_emit_turn, blocks=2, is_streamed=True), 4)


@intrinsic  # type: ignore[untyped-decorator]
def _sum_row(typing: Any, tile: Any, turned: Any, index: Any, values: Any, first: Any, stop: Any, row: Any) -> Any:
    """row = Σ values[j] · turned[index[j]] over first ≤ j < stop."""
    return _lowered(_emit_row, 7)


@intrinsic  # type: ignore[untyped-decorator]
def _sum_row_and_dots(
    typing: Any, tile: Any, turned: Any, index: Any, values: Any, first: Any, stop: Any, row: Any, other: Any, dots: Any
) -> Any:
    """The same, and dots[j] += other · turned[index[j]]."""
    return _lowered(_emit_row, 9)


@intrinsic  # type: ignore[untyped-decorator]
def _take(typing: Any, call: Any, counter: Any) -> Any:
    """A counter of a call, to which 1 is added, in one step for all threads. What was streamed before is then in memory."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Value:
        counters = builder.bitcast(values[0], ADDRESS.as_pointer())
        return builder.atomic_rmw("add", builder.gep(counters, [values[1]]), ADDRESS(1), "acq_rel")

    return types.intp(call, types.intp), lower


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _turn(source: int, width: int, count: int, columns: int, target: int, tile: int) -> None:
    """`count` rows of `columns` floats, `width` apart, turned into (columns, tile); zero in the rest of the tile."""
    x, turned = carray(memory(source), count * width, np.float32), carray(memory(target), columns * tile, np.float32)
    rows, whole = count // LANES * LANES, columns // LANES * LANES
    for t in range(0, rows, LANES):
        for i in range(0, whole, LANES):
            _turn_block(source + 4 * (t * width + i), width, target + 4 * (i * tile + t), tile)
    for t in range(tile):
        for i in range(whole if t < rows else 0, columns):
            turned[i * tile + t] = x[t * width + i] if t < count else np.float32(0)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _turn_back(source: int, width: int, count: int, columns: int, target: int, tile: int, streams: int) -> None:
    """A panel (columns, tile) turned back into `count` rows of `columns` floats, `width` apart."""
    panel, y = carray(memory(source), columns * tile, np.float32), carray(memory(target), count * width, np.float32)
    step = 2 * LANES if streams else LANES
    rows, whole = count // LANES * LANES, columns // step * step
    for t in range(0, rows, LANES):
        for o in range(0, whole, step):
            if streams:
                _stream_blocks(source + 4 * (o * tile + t), tile, target + 4 * (t * width + o), width)
            else:
                _turn_block(source + 4 * (o * tile + t), tile, target + 4 * (t * width + o), width)
    for t in range(count):
        for o in range(whole if t < rows else 0, columns):
            y[t * width + o] = panel[o * tile + t]


_compiled = cfunc(types.void(types.CPointer(from_dtype(CALL))), error_model="numpy")


@_compiled  # type: ignore[untyped-decorator]
def product(call: Any) -> None:
    """y (tokens, out) = x (tokens, width) times the transpose of a weight, given by its rows. A unit is a tile."""
    a = carray(call, 1)[0]
    tile, tokens, width, out, index, values = a.tile, a.tokens, a.width, a.out, a.index, a.values
    starts = carray(memory(a.starts), out + 1, np.int32)
    turned = a.scratch + a.scratch_bytes * _take(call, THREADS)
    panel = turned + 4 * width * tile
    while True:
        first = _take(call, UNITS) * tile
        if first >= tokens:
            return
        count = min(tile, tokens - first)
        _turn(a.x + 4 * first * width, width, count, width, turned, tile)
        for start in range(0, width if a.gelu else 0, PANEL):
            activate(a.gelu, turned + 4 * start * tile, panel, min(PANEL, width - start) * tile)
        for start in range(0, out, PANEL):
            rows = min(PANEL, out - start)
            for row in range(rows):
                one, stop = types.intp(starts[start + row]), types.intp(starts[start + row + 1])
                _sum_row(tile, turned, index, values, one, stop, panel + 4 * row * tile)
            _turn_back(panel, out, count, rows, a.y + 4 * (first * out + start), tile, a.streams)


@_compiled  # type: ignore[untyped-decorator]
def gradients(call: Any) -> None:
    """From the gradient (tokens, out) of y that of x, and those of the values by column, summed over each chunk of tokens.

    The weight is given by its columns. A unit is a chunk of whole tiles and a group of x's columns.
    """
    a = carray(call, 1)[0]
    tile, tokens, width, out, index, values = a.tile, a.tokens, a.width, a.out, a.index, a.values
    starts = carray(memory(a.starts), width + 1, np.int32)
    turned = a.scratch + a.scratch_bytes * _take(call, THREADS)
    panel = turned + 4 * out * tile
    slopes = panel + 4 * PANEL * tile
    turned_x = slopes + 4 * PANEL * tile
    tiles, panels = (tokens + tile - 1) // tile, (width + PANEL - 1) // PANEL
    while True:
        unit = _take(call, UNITS)
        if unit >= a.chunks * a.groups:
            return
        chunk, group = unit // a.groups, unit % a.groups
        left, right = group * panels // a.groups * PANEL, min((group + 1) * panels // a.groups * PANEL, width)
        dots = a.sums + 4 * chunk * a.live
        sums = carray(memory(dots), a.live, np.float32)
        for j in range(starts[left], starts[right]):
            sums[j] = 0
        for number in range(chunk * tiles // a.chunks, (chunk + 1) * tiles // a.chunks):
            first = number * tile
            count = min(tile, tokens - first)
            _turn(a.gradient + 4 * first * out, out, count, out, turned, tile)
            _turn(a.x + 4 * (first * width + left), width, count, right - left, turned_x, tile)
            for start in range(left, right, PANEL):
                columns, place = min(PANEL, right - start), 4 * (first * width + start)
                inputs = turned_x + 4 * (start - left) * tile
                if a.gelu:
                    activate(a.gelu, inputs, slopes, columns * tile)
                for column in range(columns):
                    one, stop = types.intp(starts[start + column]), types.intp(starts[start + column + 1])
                    row, x = panel + 4 * column * tile, inputs + 4 * column * tile
                    _sum_row_and_dots(tile, turned, index, values, one, stop, row, x, dots)
                if a.gelu:
                    scale(panel, slopes, columns * tile)
                _turn_back(panel, width, count, columns, a.by_x + place, tile, a.streams)


@_compiled  # type: ignore[untyped-decorator]
def total(call: Any) -> None:
    """The gradients of the values, by row: those by column, added up from the first chunk to the last. A unit is BLOCK of them."""
    a = carray(call, 1)[0]
    sums, order = carray(memory(a.sums), (a.chunks, a.live), np.float32), carray(memory(a.order), a.live, np.int32)
    by_values = carray(memory(a.by_values), a.live, np.float32)
    while True:
        first = _take(call, UNITS) * BLOCK
        if first >= a.live:
            return
        gradients, places = sums[0, first : first + BLOCK], order[first : first + BLOCK]
        for chunk in range(1, a.chunks):
            more = sums[chunk, first : first + BLOCK]
            for j in range(len(gradients)):
                gradients[j] += more[j]
        for j in range(len(gradients)):
            by_values[places[j]] = gradients[j]
