"""Images and labels that are arrays already: the digits inside scikit-learn, .npz files and idx files.

Shape suffixes: N images, C channels, H height, W width, all in pixels.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from supar_cli.data.formats import naming_damage, open_bytes
from supar_cli.data.image_files import IDX, ImageFiles, array_names
from supar_cli.errors import InputError, SetupError

Pixels = NDArray[np.uint8]


class Labelled(NamedTuple):
    """Pixels (N, C, H, W) of 8 bits and labels (N,) of a split, and where they are from."""

    pixels: Pixels
    labels: NDArray[np.int64]
    place: str


def _digits(files: ImageFiles, split: str) -> Labelled:
    (path,) = files.by_split[split]
    with naming_damage(path), gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",")
    pixels = (rows[:, :-1] * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    return Labelled(pixels, rows[:, -1].astype(np.int64), str(path))


def _npz(files: ImageFiles, split: str) -> Labelled:
    (path,) = files.by_split[split]
    with naming_damage(path):
        try:
            with np.load(path, allow_pickle=False) as stored:
                names = array_names(stored.files, split, path)
                assert names is not None  # `find` saw them
                pixels, labels = (np.asanyarray(stored[name]) for name in names)
        except OSError:
            raise
        except MemoryError:
            raise SetupError(f"{path}: out of memory: its arrays don't fit; expected fewer images") from None
        except Exception as error:  # of a foreign or damaged archive or array, of which there are many kinds
            if "allow_pickle" in str(error):
                raise InputError(f"{path}: holds Python objects; expected arrays of integers") from None
            raise EOFError(str(error)) from None
    x, y = names
    if labels.dtype.kind not in "iu" or labels.shape[1:] not in ((), (1,)):
        what = f"holds {labels.dtype} of the shape {labels.shape}"
        raise InputError(f"{path}: {y}: {what}; expected an integer for each image")
    match pixels.shape:
        case (_, _, _):
            moved = pixels[:, None]
        case (_, first, _, last) if (first in (1, 3)) != (last in (1, 3)):
            moved = pixels if first in (1, 3) else np.moveaxis(pixels, 3, 1)
        case _:
            moved = None
    if pixels.dtype != np.uint8 or moved is None:
        what = f"holds {pixels.dtype} of the shape {pixels.shape}"
        expected = (
            "uint8, 0 to 255, of images, rows and columns, with 1 or 3 channels along the last axis or the second"
        )
        raise InputError(f"{path}: {x}: {what}; expected {expected}")
    return _same_count(Labelled(np.ascontiguousarray(moved), labels.reshape(-1).astype(np.int64), f"{path}: {x}"), y)


def _idx(files: ImageFiles, split: str) -> Labelled:
    images, labels = (_idx_array(path) for path in files.by_split[split])
    found = Labelled(images[:, None], labels.astype(np.int64), str(files.by_split[split][0]))
    return _same_count(found, files.by_split[split][1].name)


def _idx_array(path: Path) -> Pixels:
    with naming_damage(path), open_bytes(path) as file:
        head = file.read(4)
        assert head in IDX  # `find` saw it
        shape = [int.from_bytes(file.read(4), "big") for _ in range(head[3])]
        content = file.read()
    if len(content) != (size := math.prod(shape)):
        what = f"holds {len(content):,} bytes after its header, which says {size:,}"
        raise SetupError(f"{path}: is damaged: {what}; expected it whole")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _same_count(found: Labelled, labels: str) -> Labelled:
    if len(found.pixels) != len(found.labels):
        what = f"{len(found.pixels)} images, yet {labels} holds {len(found.labels)} labels"
        raise InputError(f"{found.place}: {what}; expected as many")
    return found


READERS = {"digits": _digits, "npz": _npz, "idx": _idx}
