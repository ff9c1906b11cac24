"""Random streams: drawn from (seed, name) by a counter-based generator, the same on every rank, device and platform."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, name: str, position: int = 0) -> np.random.Philox:
    """Philox generator keyed by (seed, name), at a position of its own. Salmon et al. 2011, "Random numbers: 1, 2, 3"."""
    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, position], dtype=np.uint64))
