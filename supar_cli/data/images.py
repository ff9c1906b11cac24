"""Labelled images. A batch is a function of (seed, step): each epoch is a permutation, so every image is seen once in it.

Shape suffixes: N images of a split, B of a batch, C channels, H height, W width, all in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from supar_cli.data import image_files, image_readers
from supar_cli.data.image_arrays import Pixels
from supar_cli.errors import InputError
from supar_cli.planning.plan import Data
from supar_cli.streams import stream

ALL = slice(None)
TAIL_SHARE = 10  # chosen: without a split of its own a data set holds out the last tenth of each class, as text does
NAMED = 5  # chosen: classes in a message
CHUNK = 4096  # chosen: images that are counted at a time, so that counting takes little memory


@dataclass(frozen=True)
class Split:
    """Images at some places (N,) of pixels (M, C, H, W) of 8 bits, which splits may share, and of their classes (M,)."""

    pixels_MCHW: Pixels
    classes_M: NDArray[np.int64]
    places_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places_N)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The number of each image's class (N,)."""
        return self.classes_M[self.places_N]

    def pixels(self, index: slice | NDArray[np.int64]) -> Pixels:
        """The pixels of some of its images (B, C, H, W)."""
        return self.pixels_MCHW[self.places_N[index]]


@dataclass(frozen=True)
class Images:
    """A data set: what is trained on, what is held out, the names of the classes, the hash of all.

    Training images are mirrored at random if `flip`, and moved by up to `shift` pixels along both axes; pixels from outside
    are black.
    """

    train: Split
    held_out: Split
    classes: list[str]
    hash: str
    flip: bool = False
    shift: int = 0
    read: tuple[str, ...] = ()  # which files were

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self.train.pixels_MCHW.shape[1:]  # type: ignore[return-value]

    @property
    def described(self) -> dict[str, list[float]]:
        """How images are normalised: mean and standard deviation of each channel of the training images, in [0, 1]."""
        return {name: values.tolist() for name, values in zip(("mean", "std"), self.scale, strict=True)}

    @property
    def lines(self) -> tuple[str, ...]:
        """Which files were read, and what they hold."""
        (channels, height, width), (mean_C, std_C) = self.shape, self.scale
        size_bytes = (len(self.train) + len(self.held_out)) * channels * height * width
        scale = f"mean {_format(mean_C)}, standard deviation {_format(std_C)}"
        counts = f"{len(self.train):,} training images, {len(self.held_out):,} held out, {len(self.classes)} classes"
        memory = f"{size_bytes / 2**20:.1f} MiB" if size_bytes >= 2**20 else f"{size_bytes / 2**10:.1f} KiB"
        what = f"{height} × {width} pixels, {channels} channel{'s' * (channels > 1)}; {memory} in each process"
        return (*self.read, f"data: {counts}; {what}", f"data: pixels from 0 to 1 are normalised by {scale}")

    @cached_property
    def scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each channel (C,) over the training images, in [0, 1]."""
        counts = np.zeros((self.shape[0], 256), np.int64)
        for start in range(0, len(self.train), CHUNK):
            for channel, own in enumerate(self.train.pixels(slice(start, start + CHUNK)).swapaxes(0, 1)):
                counts[channel] += np.bincount(own.reshape(-1), minlength=256)
        total = int(counts[0].sum())
        # in whole numbers, so that every machine has the same
        sums = [[sum(value**power * n for value, n in enumerate(own.tolist())) for own in counts] for power in (1, 2)]
        variances = [(total * square - one**2) / total**2 for one, square in zip(*sums, strict=True)]
        return np.array([one / total for one in sums[0]]) / 255, np.sqrt(variances) / 255

    def batch(self, seed: int, step: int, rows: int, share: slice = ALL) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 and labels (B,) int64 of a training step; `share` selects rows of its batch."""
        places = np.arange(step * rows, (step + 1) * rows)[share]
        epochs = places // len(self.train)
        orders = [
            self._order(seed, int(epoch))[places[epochs == epoch] % len(self.train)] for epoch in np.unique(epochs)
        ]
        index = np.concatenate(orders)
        pixels_BCHW = self.train.pixels(index)
        if self.flip or self.shift:
            pixels_BCHW = self._augment(pixels_BCHW, stream(seed, "augmentation", step).random_raw(rows)[share])
        return self._normalise(pixels_BCHW), torch.from_numpy(self.train.labels[index])

    def evaluation(self, index: int, rows: int, total: int) -> tuple[Tensor, Tensor]:
        """Batch `index` of `total` evenly spaced held-out images, the same at every evaluation; a last one fills it up."""
        numbers = np.minimum(np.arange(index * rows, (index + 1) * rows), total - 1)
        places = numbers * len(self.held_out) // total
        return self._normalise(self.held_out.pixels(places)), torch.from_numpy(self.held_out.labels[places])

    def _augment(self, pixels_BCHW: Pixels, draws_B: NDArray[np.uint64]) -> Pixels:
        """Images of their own memory, mirrored and moved as their draws say."""
        if self.flip:
            is_mirrored = (draws_B & 1).astype(bool)
            pixels_BCHW[is_mirrored] = pixels_BCHW[is_mirrored][..., ::-1]
        if self.shift:
            edge = 2 * self.shift + 1
            down, across = np.divmod((draws_B >> 1) % edge**2, edge)
            outside = (self.shift, self.shift)
            padded = np.pad(pixels_BCHW, ((0, 0), (0, 0), outside, outside))
            windows = sliding_window_view(padded, self.shape[1:], (2, 3))  # type: ignore[call-overload]
            pixels_BCHW = windows[np.arange(len(draws_B)), :, down.astype(np.int64), across.astype(np.int64)]
        return pixels_BCHW

    def _normalise(self, pixels_BCHW: Pixels) -> Tensor:
        """What the model reads: mean 0 and variance 1 over the training images; a channel that is constant is 0."""
        mean_C, std_C = (255 * values for values in self.scale)
        factor_C = 1 / np.where(std_C > 0, std_C, 255)
        found = pixels_BCHW.astype(np.float32)
        found *= factor_C.astype(np.float32)[:, None, None]
        found -= (mean_C * factor_C).astype(np.float32)[:, None, None]
        return torch.from_numpy(found)

    @cached_property
    def _order(self) -> Callable[[int, int], NDArray[np.int64]]:
        """The permutation of the training images in an epoch of a seed."""

        @lru_cache(maxsize=2)  # chosen: a batch across the end of an epoch takes two
        def order(seed: int, epoch: int) -> NDArray[np.int64]:
            return np.argsort(stream(seed, "images", epoch).random_raw(len(self.train)), kind="stable")

        return order


def _format(values: NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def load(data: Data, log: Callable[[str], None] = lambda _: None) -> Images:
    """Read the images of a data section; they match its hash.

    `log` is told of the progress of a long reading. Raises InputError, SetupError.
    """
    files = image_files.find(data)
    known = image_files.identify(data, files)
    splits, classes = image_readers.read(files, data, log)
    first = splits[0]
    largest = int(first.labels.max(initial=-1))
    if not classes and largest >= len(first.labels):
        raise InputError(f"{first.place}: the label {largest} of {len(first.labels)} images; expected 0, 1, …")
    classes = classes or [str(number) for number in range(largest + 1)]
    if len(classes) == 1:
        raise InputError(f"{first.place}: all of one class, {classes[0]}; expected two classes or more")
    for one in splits:
        wrong = one.labels[(one.labels < 0) | (one.labels >= len(classes))]
        if len(wrong):
            what = f"the label {wrong[0]} is of no class that is trained on"
            raise InputError(f"{one.place}: {what}; expected 0 to {max(0, len(classes) - 1)}")
        if one.pixels.shape[1:] != first.pixels.shape[1:]:
            found, other = ("channels {}, height {}, width {}".format(*each.pixels.shape[1:]) for each in (one, first))
            raise InputError(f"{one.place}: {found}; expected {other}, as the training images have")
    places = [np.arange(len(one.labels)) for one in splits] if len(splits) > 1 else _hold_out(first.labels)
    train, held_out = (Split(one.pixels, one.labels, own) for one, own in zip((first, splits[-1]), places, strict=True))
    counts = np.bincount(train.labels, minlength=len(classes))
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    if missing:
        named = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
        is_taken = len(splits) == 1 and not counts[first.labels].all()
        named += " (its only image is held out)" if is_taken else ""
        raise InputError(f"{first.place}: no training image of the class {named}; expected one or more of each")
    if not all(first.pixels.shape[1:]):
        raise InputError(f"{first.place}: images of {first.pixels.shape[1:]}; expected channels and pixels")
    if not len(held_out):
        raise InputError(f"{first.place}: no image is held out; expected one or more")
    return Images(train, held_out, classes, known.hash or "", data.flip, data.shift, tuple(files.lines()))


def _hold_out(labels_M: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The places to train on, and those held out: the last tenth of each class, at least one image."""
    is_held_out = np.zeros(len(labels_M), bool)
    for number in np.unique(labels_M):
        own = np.flatnonzero(labels_M == number)
        is_held_out[own[len(own) - max(1, len(own) // TAIL_SHARE) :]] = True
    return [np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)]
