"""What the compiled loops of the sparse engine are given: the numbers of a call, and the sizes that they are compiled for."""

from __future__ import annotations

import numpy as np

# measured: on EPYC (Zen 4, 1 MiB of L2), at widths 256 to 32768 and densities 1/512 to 1/4, 32 tokens take the least time or at
# most a sixth more than that; 64 took up to 1.5 times as long as 32, and 8 up to 1.9 times as long as 16
TILES = (32, 16)
PANEL = 64  # chosen: rows of Y, or columns of dX, turned back at a time: 8 KiB
BLOCK = 4096  # chosen: live weights whose sums a thread adds up at a time
LANES = 8
FORMS = (None, "none", "tanh")  # of GELU, by their numbers, as torch calls them
NUMBERS = (
    "threads units scratch scratch_bytes tile tokens width out streams starts index values"
    " x y gradient by_x sums live chunks groups order by_values gelu"
)
CALL = np.dtype([(name, np.int64) for name in NUMBERS.split()])  # what a kernel is given; addresses for tensors
