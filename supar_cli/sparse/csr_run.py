"""Kernels of the sparse engine run: their tiles and chunks of tokens, their memory, and the threads that run them.

Shape suffixes: N tokens, I in, O out, L live weights.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from supar_cli.sparse.csr_call import BLOCK, CALL, FORMS, LANES, PANEL, TILES
from supar_cli.sparse.csr_machine import address_of

CHUNKS = 16  # chosen: of tokens, at most, over which gradients of values are summed apart, whatever the threads
# in all chunks, unless one has more; measured: of 524288 live weights 8 chunks take .85 of the time of 16
MOST_SUMS = 2**22
L2_BYTES = 2**20  # chosen: where the system doesn't say
STREAMED_BYTES = 2**22  # chosen: a result this large has left a core's caches before anyone reads it


@cache
def second_level_cache() -> int:
    """Bytes of a core's second-level cache."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text("ascii")
        return int(text.strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return L2_BYTES


def tile_of(width: int) -> int:
    """Tokens of a tile: the most of which `width` floats each stay in the second-level cache."""
    return next((tile for tile in TILES if 4 * width * tile <= second_level_cache()), TILES[-1])


@cache
def openmp() -> Any:
    """What runs a function in the threads of torch's OpenMP, as compilers call it; None where torch has no such OpenMP."""
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


def run(kernel: str, units: int, scratch: int, /, **arguments: int | Tensor) -> None:
    """Run a kernel's units in torch's threads, each with `scratch` floats of its own.

    Where torch's own can't be called, in threads of Python: compiled code doesn't hold Python's lock.
    """
    threads = max(1, min(torch.get_num_threads(), units))
    own = torch.empty(threads, -(-scratch // 16) * 16)  # whole lines of 64 bytes
    call, address = np.zeros(1, CALL), address_of(kernel)
    for name, value in {"scratch": own, "scratch_bytes": 4 * own.shape[1], **arguments}.items():
        call[name] = value.data_ptr() if isinstance(value, Tensor) else value
    if threads > 1 and openmp() is not None:
        openmp()(address, call.ctypes.data, threads, 0)
        return
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    others = [threading.Thread(target=function, args=(call.ctypes.data,)) for _ in range(threads - 1)]
    for other in others:
        other.start()
    function(call.ctypes.data)
    for other in others:
        other.join()


def _shape(x_NI: Tensor, out: int, tile: int, result: Tensor, gelu: str | None) -> dict[str, int | Tensor]:
    tokens, width = x_NI.shape
    streams = result.shape[1] % LANES == 0 and result.nbytes >= STREAMED_BYTES
    sizes = {"tokens": tokens, "width": width, "out": out, "tile": tile}
    return {"x": x_NI, **sizes, "streams": streams, "gelu": FORMS.index(gelu)}


def product(x_NI: Tensor, starts: Tensor, columns_L: Tensor, values_L: Tensor, gelu: str | None) -> Tensor:
    """Y (N, out) of contiguous X, or of its GELU; the weight by its rows."""
    (tokens, width), out = x_NI.shape, len(starts) - 1
    tile, y_NO = tile_of(width), x_NI.new_empty(tokens, out)
    weight = {"starts": starts, "index": columns_L, "values": values_L}
    shape = _shape(x_NI, out, tile, y_NO, gelu)
    run("product", -(-tokens // tile), (width + PANEL) * tile, y=y_NO, **shape, **weight)
    return y_NO


def gradients(
    x_NI: Tensor,
    gradient_NO: Tensor,
    starts: Tensor,
    rows_L: Tensor,
    order_L: Tensor,
    values_L: Tensor,
    gelu: str | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of X and, by row, of the values, from contiguous X and gradient of Y.

    The weight is given by its columns; `order_L`: the place of each of its weights by row.
    """
    (tokens, width), out, live = x_NI.shape, gradient_NO.shape[1], len(values_L)
    tile, by_x_NI, by_values_L = tile_of(out), torch.empty_like(x_NI), torch.empty_like(values_L)
    chunks = max(1, min(CHUNKS, -(-tokens // tile), MOST_SUMS // max(1, live)))
    groups = max(1, min(-(-torch.get_num_threads() // chunks), -(-width // PANEL)))
    shares: dict[str, int | Tensor] = {"chunks": chunks, "sums": values_L.new_empty(chunks, live), "live": live}
    by_column_L = values_L.index_select(0, order_L)  # measured: a third of [order_L]'s time
    weight = {"starts": starts, "index": rows_L, "values": by_column_L}
    tensors = {"gradient": gradient_NO, "by_x": by_x_NI}
    shape = _shape(x_NI, out, tile, by_x_NI, gelu)
    scratch = (out + 2 * PANEL + width) * tile
    run("gradients", chunks * groups, scratch, groups=groups, **shares, **shape, **weight, **tensors)
    run("total", -(-live // BLOCK), 0, order=order_L, by_values=by_values_L, **shares)
    return by_x_NI, by_values_L
