"""Labelled images. A batch is a function of (seed, step): each epoch is a permutation, so every image is seen once in it.

Shape suffixes: N images of a split, B of a batch, C channels, H height, W width, all in pixels.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supar_cli.data import image_files
from supar_cli.data.image_files import ImageFiles
from supar_cli.planning.plan import Data
from supar_cli.streams import stream

ALL = slice(None)
TAIL_SHARE = 10  # chosen: without a split of its own a data set holds out the last tenth of each class, as text does


@dataclass(frozen=True)
class Split:
    """Pixels (N, C, H, W) of 8 bits, and the number of each image's class (N,)."""

    pixels_NCHW: NDArray[np.uint8]
    labels_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class Images:
    """A data set: what is trained on, what is held out, the names of the classes, the hash of all."""

    train: Split
    held_out: Split
    classes: list[str]
    hash: str
    flip: bool = False
    shift: int = 0
    lines: tuple[str, ...] = ()

    @cached_property
    def scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each channel (C,) over the training images, in [0, 1]."""
        axes = (0, 2, 3)
        pixels = self.train.pixels_NCHW
        return pixels.mean(axes, dtype=np.float64) / 255, pixels.std(axes, dtype=np.float64) / 255

    def batch(self, seed: int, step: int, rows: int, share: slice = ALL) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 and labels (B,) int64 of a training step; `share` selects rows of its batch."""
        places = np.arange(step * rows, (step + 1) * rows)[share]
        index = [self._order(seed, int(place) // len(self.train))[place % len(self.train)] for place in places]
        return self._normalised(self.train.pixels_NCHW[index]), torch.from_numpy(self.train.labels_N[index])

    def evaluation(self, index: int, count: int, rows: int) -> tuple[Tensor, Tensor]:
        """Batch `index` of `count` evenly spaced evaluation batches, the same at every evaluation."""
        places = [(index * rows + row) * len(self.held_out) // (count * rows) for row in range(rows)]
        return self._normalised(self.held_out.pixels_NCHW[places]), torch.from_numpy(self.held_out.labels_N[places])

    def _normalised(self, pixels_BCHW: NDArray[np.uint8]) -> Tensor:
        mean_C, std_C = self.scale
        scaled = (pixels_BCHW / 255 - mean_C[:, None, None]) / std_C[:, None, None]
        return torch.from_numpy(scaled.astype(np.float32))

    @cached_property
    def _order(self):  # type: ignore[no-untyped-def]
        return cache(
            lambda seed, epoch: np.random.Generator(stream(seed, "images", epoch)).permutation(len(self.train))
        )


def load(data: Data) -> Images:
    """Read the images of a data section. Raises InputError, SetupError."""
    files = image_files.find(data)
    known = image_files.identify(data, files)
    pixels, labels = _digits(files)
    held_out = np.zeros(len(labels), bool)
    for number in np.unique(labels):
        own = np.flatnonzero(labels == number)
        held_out[own[len(own) - max(1, len(own) // TAIL_SHARE) :]] = True
    train, rest = (Split(pixels[part], labels[part]) for part in (~held_out, held_out))
    return Images(train, rest, [str(number) for number in range(10)], known.hash or "", data.flip, data.shift)


def _digits(files: ImageFiles) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with gzip.open(files.train[0], "rt") as file:
        rows = np.loadtxt(file, delimiter=",")
    pixels = (rows[:, :-1] * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    return pixels, rows[:, -1].astype(np.int64)
