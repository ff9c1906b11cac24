"""Files of masks and of values: safetensors by tensor name, read for a plan's numbers.

Masks are packed as supar writes them, or plain 0 and 1. A packed file has the shapes in its metadata, `shapes`:
{"blocks.0.mlp.up": [4096, 1024]}, and a vector of ceil(size / 8) bytes a tensor. Any other file of masks
has a tensor of booleans or bytes 0 and 1 in each weight's own shape. A file of values has float32: of a masked tensor its
live values in row-major order, else the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from safetensors.torch import save_file
from torch import Tensor

from supar_cli.errors import InputError, SetupError
from supar_cli.files import file_hash, naming_read_errors, naming_write_errors, replacing, write_file
from supar_cli.planning.patterns import describe
from supar_cli.sparse.masks import Mask, WantedMask, row_parts, select, to_matrix


def write_masks(path: Path, masks: Mapping[str, Mask]) -> str:
    """Write masks packed and atomically; returns the file's hash, the same for the same masks.

    Raises SetupError where it can't be written.
    """
    names = sorted(masks)
    shapes = json.dumps({name: masks[name].shape for name in names})
    with naming_write_errors(path):
        write_file(path, save({name: masks[name].bits for name in names}, metadata={"shapes": shapes}))
        return file_hash(path)


def read_masks(path: Path, wanted_hash: str | None, wanted: Mapping[str, WantedMask]) -> dict[str, Mask]:
    """The masks of a file, by name, those that `wanted` asks for and no others.

    Raises SetupError where the file can't be read or is not a file of masks, and InputError for another content than
    `wanted_hash` says and, naming every tensor, for a mask that is missing or not asked for, of another shape or number of
    live weights, not of its pattern, or with values that are not 0 and 1.
    """
    problems: list[str] = []
    masks: dict[str, Mask] = {}
    with _opened(path, "numpy", wanted_hash, "mask file") as file:
        shapes, is_packed = _shapes(path, file)
        problems += [f"{path}: has no mask of {name}" for name in wanted if name not in shapes]
        for name, shape in shapes.items():
            try:
                mask = Mask(shape, file.get_tensor(name)) if is_packed else _read_plain(file.get_slice(name))
                require_mask(mask, wanted.get(name))
                masks[name] = mask
            except ValueError as error:
                problems.append(f"{path}: {name}: {error}")
    if problems:
        raise InputError(*problems)
    return {name: masks[name] for name in wanted}


def write_values(path: Path, values: Mapping[str, Tensor]) -> str:
    """Write values atomically; returns the file's hash, the same for the same values. Raises SetupError where it can't."""
    with naming_write_errors(path):
        with replacing(path) as aside:
            try:
                save_tensors({name: values[name].contiguous() for name in sorted(values)}, aside)
            except SafetensorError as error:
                raise OSError(error) from None
        return file_hash(path)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """As safetensors' `save_file`, but readable for others as any other new file: that makes its files for their owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def read_values(path: Path, wanted_hash: str | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The values of a file by name, of these shapes: (live,) for a masked tensor.

    Raises SetupError where the file can't be read, and InputError for another content than `wanted_hash` says and, naming
    every tensor, for one that is missing or unknown, of another shape or type, or not finite.
    """
    values: dict[str, Tensor] = {}
    with _opened(path, "pt", wanted_hash, "file of values") as file:
        found = set(file.keys())
        problems = [f"{path}: has no values of {name}" for name in shapes if name not in found]
        problems += [f"{path}: {name}: the plan has no such tensor" for name in sorted(found - shapes.keys())]
        for name in shapes.keys() & found:
            values[name] = value = file.get_tensor(name)
            if tuple(value.shape) != shapes[name]:
                problems.append(f"{path}: {name}: has the shape {list(value.shape)}; expected {list(shapes[name])}")
            elif value.dtype != torch.float32:
                problems.append(f"{path}: {name}: holds {value.dtype}; expected torch.float32")
            elif not bool(value.isfinite().all()):
                problems.append(f"{path}: {name}: holds values that are not finite")
    if problems:
        raise InputError(*sorted(problems))
    return values


@contextmanager
def _opened(path: Path, framework: str, wanted_hash: str | None = None, what: str = "") -> Iterator[Any]:
    """A safetensors file. Raises InputError for another hash, SetupError where it can't be read, then or while it is used."""
    with naming_read_errors(path):
        found = file_hash(path) if wanted_hash is not None else None
    if found is not None and wanted_hash is not None and found != wanted_hash:
        raise InputError(f"{path}: is not the plan's {what} ({found[:19]}…); expected {wanted_hash[:19]}…")
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SetupError(f"{path}: is not an intact safetensors file: {error}") from None


def _shapes(path: Path, file: Any) -> tuple[dict[str, tuple[int, ...]], bool]:
    """The shapes of a file's masks by name, and whether they are packed."""
    stated = (file.metadata() or {}).get("shapes")
    if stated is None:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, False  # noqa: SIM118
    try:
        return {str(name): tuple(map(int, shape)) for name, shape in json.loads(stated).items()}, True
    except (ValueError, TypeError, AttributeError):
        raise SetupError(f"{path}: is not a file of masks: its `shapes` are {stated[:60]!r}") from None


def _read_plain(stored: Any) -> Mask:
    """The mask of a tensor of 0 and 1, some rows at a time. Raises ValueError for any other."""
    shape = tuple(stored.get_shape())
    if stored.get_dtype() not in ("BOOL", "U8") or not shape:
        raise ValueError(f"holds {stored.get_dtype()} of shape {shape}; expected booleans, or bytes 0 and 1")

    def alive(part: slice) -> NDArray[np.uint8]:
        rows: NDArray[np.uint8] = stored[part].view(np.uint8)
        if rows.size and rows.max() > 1:
            raise ValueError(f"holds the value {rows.max()}; expected 0 and 1")
        return rows

    return Mask.of_parts(shape, map(alive, row_parts(shape)))


def require_mask(mask: Mask, wanted: WantedMask | None) -> None:
    """Raise ValueError if a mask is not the one wanted; a mask that is not wanted must be dense."""
    if wanted is None:
        if mask.count < mask.size:
            raise ValueError("has a mask here; the plan has no such sparse tensor")
        return
    if mask.shape != wanted.shape:
        raise ValueError(f"has the shape {list(mask.shape)}; the plan's is {list(wanted.shape)}")
    spread = sqrt(wanted.kept * (1 - wanted.kept / mask.size)) if wanted.pattern == "bernoulli" else 0
    if abs(mask.count - wanted.kept) > 6 * spread:  # six standard deviations, as where masks are drawn
        raise ValueError(f"{mask.count} weights live; the plan keeps {wanted.kept}")
    if wanted.pattern in ("exact", "bernoulli"):
        return
    dead = ~to_matrix(mask.alive(), wanted.fan_in_axes)  # as keys, so that live weights are selected first
    edge = wanted.block or 1
    keys: NDArray[np.bool_] = np.all(dead.reshape(len(dead) // edge, edge, -1, edge), axis=(1, 3))
    selected = select(wanted.pattern, keys, wanted.kept, block=wanted.block, even_rows=wanted.even_rows)
    if not np.array_equal(selected.alive(), ~dead):
        words = describe(wanted.pattern, wanted.block) + " in even rows" * wanted.even_rows
        raise ValueError(f"is not {words} along the fan-in, as the plan says")


def find_masks(path: Path, wanted: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, Mask]:
    """The masks of tensors, given as name: (shape, fan-in axes), in a safetensors file or all such files of a folder.

    Packed masks, tensors of booleans, or weights: of those what is not zero lives. Tensors that are not in the files or
    have no dead weight have no mask. Raises SetupError for files that can't be read, and InputError for files without
    any of the tensors, another shape, a tensor without a live weight, and rows or columns that are dead as a whole.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: holds no .safetensors file; expected masks, or the weights of a pruned model")
    problems: list[str] = []
    masks: dict[str, Mask] = {}
    for one in files:
        with _opened(one, "pt") as file:
            shapes, is_packed = _shapes(one, file)
            for name in wanted.keys() & shapes.keys():
                try:
                    stored = file.get_tensor(name)
                    mask = Mask(shapes[name], stored.numpy()) if is_packed else Mask.of((stored != 0).numpy())
                    require_spread(mask, *wanted[name])
                    masks[name] = mask
                except ValueError as error:
                    problems.append(f"{one}: {name}: {error}")
    if problems:
        raise InputError(*problems)
    if not masks:
        expected = f"expected masks or weights of {', '.join(list(wanted)[:3])}, …"
        raise InputError(f"{path}: has none of the target's {len(wanted)} hidden tensors; {expected}")
    return {name: mask for name, mask in masks.items() if mask.count < mask.size}


def require_spread(mask: Mask, shape: tuple[int, ...], fan_in_axes: tuple[int, ...]) -> None:
    """Raise ValueError for another shape, for a mask without live weights, and where whole rows and columns are dead.

    Such a tensor is a narrower dense one, and rules by density are wrong for it [D, measured: slopes .5 to 1.1].
    """
    if mask.shape != shape:
        raise ValueError(f"has the shape {list(mask.shape)}; the target's is {list(shape)}")
    if not mask.count:
        raise ValueError("has no live weight")
    alive = to_matrix(mask.alive(), fan_in_axes)
    rows, columns = int(alive.any(axis=1).sum()), int(alive.any(axis=0).sum())
    if mask.size > 2 * rows * columns:  # chosen: then the density of what is left is more than twice the tensor's
        what = f"only {rows} of {len(alive)} rows and {columns} of {alive.shape[1]} columns have a live weight"
        raise ValueError(f"{what}: it is a narrower tensor; expected a model of that width")
