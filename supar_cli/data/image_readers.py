"""Images and labels read from files: arrays as they are, encoded images decoded by Pillow once, into 8 bits a channel.

Shape suffixes: N images, C channels, H height, W width, all in pixels.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from supar_cli.data.formats import name_of, naming_damage, open_bytes
from supar_cli.data.image_files import HEAD_BYTES, IDX, ImageFiles, array_names
from supar_cli.errors import InputError, SetupError
from supar_cli.planning.plan import Data

Pixels = NDArray[np.uint8]
Encoded = Callable[[], Iterator[tuple[str, bytes, int]]]  # a name, an encoded image and its label, as often as asked
Log = Callable[[str], None]

EVERY_S = 5.0  # chosen: a line of progress so often, as long waits are told elsewhere
TABLE_ROWS = 256  # chosen: rows of Parquet in memory at a time; of photographs about 100 MB
_PNM = tuple(b"P" + digit + space for digit in (b"1", b"2", b"3", b"4", b"5", b"6") for space in (b"\n", b" ", b"\r"))
PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", *_PNM)
SIDEWAYS = (5, 6, 7, 8)  # orientations of EXIF in which width and height change places
GREY = ("1", "L", "LA", "La")  # Pillow's modes of one channel of 8 bits or fewer, with an opacity or without


class Labelled(NamedTuple):
    """Pixels (N, C, H, W) of 8 bits and labels (N,) of a split, and where they are from."""

    pixels: Pixels
    labels: NDArray[np.int64]
    place: str


def read(files: ImageFiles, data: Data, log: Log) -> tuple[list[Labelled], list[str]]:
    """The images of each split that is read, and the names of the classes, where the source has names.

    Raises InputError for files that are no such images, SetupError for damaged ones, and where Pillow or pyarrow is missing.
    """
    if files.kind == "folders":
        return _decode_all([_of_folders(files, split) for split in files.splits], files, data, log), files.classes
    if files.kind == "parquet":
        tables = _Tables(files, data)
        found = _decode_all([tables.rows(split) for split in files.splits], files, data, log)
        return found, tables.classes
    found = [_READERS[files.kind](files, split) for split in files.splits]
    return [one._replace(pixels=_resize(one.pixels, data.size)) for one in found], []


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
                names = array_names(stored.files, split)
                assert names is not None  # `find` saw them
                pixels, labels = (stored[name] for name in names)
        except (ValueError, zipfile.BadZipFile) as error:
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


_READERS = {"digits": _digits, "npz": _npz, "idx": _idx}


def _of_folders(files: ImageFiles, split: str) -> Encoded:
    numbers = {name: number for number, name in enumerate(files.classes)}

    def rows() -> Iterator[tuple[str, bytes, int]]:
        for path in files.by_split[split]:
            name = files.class_of(path)
            if name not in numbers:
                known = ", ".join(files.classes[:8])
                raise InputError(f"{path}: the class {name} is not one that is trained on; expected one of {known}")
            with naming_damage(path):
                yield str(path), path.read_bytes(), numbers[name]

    return rows


class _Tables:
    """Parquet files of images, as the Hugging Face Hub has them: a struct with `bytes`, or bytes, and an integer."""

    def __init__(self, files: ImageFiles, data: Data) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise SetupError(f"{files.root}: Parquet needs pyarrow: pip install pyarrow") from None
        self._open, self._files = pyarrow.parquet.ParquetFile, files
        first = files.by_split["train"][0]
        schema = self._file(first).schema_arrow
        encoded, integers = [], []
        for column in schema:
            type_ = str(column.type)
            is_struct = type_.startswith("struct<") and any(part.name == "bytes" for part in column.type)
            encoded += [column.name] if is_struct or type_ in ("binary", "large_binary") else []
            integers += [column.name] if type_.startswith(("int", "uint")) else []
        self._image = _column(first, "image", data.image, encoded)
        self._label = _column(first, "label", data.label, integers)
        self.classes = _class_names(schema.metadata or {}, self._label)

    def _file(self, path: Path) -> Any:
        with naming_damage(path):
            try:
                return self._open(path)
            except OSError:
                raise
            except Exception as error:  # pyarrow's own classes, which are not imported here
                raise EOFError(str(error)) from None

    def rows(self, split: str) -> Encoded:
        """The rows of a split."""

        def made() -> Iterator[tuple[str, bytes, int]]:
            for path in self._files.by_split[split]:
                at = 0
                for batch in self._batches(path):
                    for one in batch.to_pylist():
                        image, label, name = one[self._image], one[self._label], f"{path}: row {at}"
                        content = image.get("bytes") if isinstance(image, dict) else image
                        if content is None or label is None:
                            what = "no image" if content is None else "no label"
                            raise InputError(f"{name}: {what}; expected the bytes of an image and an integer")
                        yield name, content, label
                        at += 1

        return made

    def _batches(self, path: Path) -> Iterator[Any]:
        file, columns = self._file(path), [self._image, self._label]
        if missing := set(columns) - set(file.schema_arrow.names):
            raise InputError(f"{path}: has no column {missing.pop()}; expected the columns of the other files")
        batches = file.iter_batches(TABLE_ROWS, columns=columns)
        while True:
            with naming_damage(path):
                try:
                    batch = next(batches, None)
                except Exception as error:
                    raise EOFError(str(error)) from None
            if batch is None:
                return
            yield batch


def _column(path: Path, key: str, asked: str | None, found: list[str]) -> str:
    """The column of images or of labels: the asked one, or the only one."""
    if asked in found or (asked is None and len(found) == 1):
        return asked or found[0]
    names = ", ".join(found) or "none"
    what = f"no column {asked}" if asked else f"{len(found)} columns may hold it"
    raise InputError(f"data.{key}: {path}: {what}; expected one of these: {names}")


def _class_names(metadata: dict[bytes, bytes], label: str) -> list[str]:
    """The names of classes that the Hub writes beside a schema, if it does."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


class _Header(NamedTuple):
    height: int
    width: int
    is_grey: bool


def _decode_all(splits: list[Encoded], files: ImageFiles, data: Data, log: Log) -> list[Labelled]:
    """All images in one array a split: sizes and channels are read first, so that nothing grows."""
    labels: list[list[int]] = []
    sizes: dict[tuple[int, int], str] = {}
    is_grey = True
    progress = _Progress(log)
    for rows in splits:
        labels.append([])
        for name, content, label in rows():
            header = _header(name, content)
            sizes.setdefault((header.height, header.width), name)
            if len(sizes) > 1 and data.size is None:
                (one, first), (other, second) = list(sizes.items())[:2]
                what = f"{second} is {other[0]} × {other[1]} pixels, {first} is {one[0]} × {one[1]}"
                raise InputError(f"data.size: none, yet {what}; expected a height and a width to resize all to")
            is_grey &= header.is_grey
            labels[-1].append(label)
            progress.say("looked at", sum(map(len, labels)))
    if not sizes:
        raise InputError(f"{files.root}: holds no image; expected one or more")
    height, width = data.size or next(iter(sizes))
    channels, total = 1 if is_grey else 3, sum(map(len, labels))
    require_memory(total * channels * height * width, f"{total:,} images of {channels} × {height} × {width}")
    found, done = [], 0
    for rows, own in zip(splits, labels, strict=True):
        pixels = np.empty((len(own), channels, height, width), np.uint8)
        for at, (name, content, _) in enumerate(rows()):
            pixels[at] = _decode(name, content, (height, width), is_grey)
            done += 1
            progress.say("decoded", done, total)
        found.append(Labelled(pixels, np.array(own, np.int64), str(files.root)))
    return found


def require_memory(needed_bytes: int, what: str) -> None:
    """Raise SetupError where pixels don't fit in this machine's memory: Linux would kill the process without a message."""
    has_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed_bytes > has_bytes:
        what = f"{what} need {needed_bytes / 2**30:.1f} GiB, this machine has {has_bytes / 2**30:.1f}"
        raise SetupError(f"data.source: out of memory: {what}; expected fewer images or a smaller data.size")


class _Progress:
    """Tells now and then how many images are done."""

    def __init__(self, log: Log) -> None:
        self._log, self._said_s = log, time.monotonic()

    def say(self, done: str, count: int, total: int | None = None) -> None:
        if time.monotonic() - self._said_s > EVERY_S:
            self._said_s = time.monotonic()
            self._log(f"data: {done} {count:,}{f' of {total:,}' if total else ''} images")


def _import_pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise SetupError("data.source: images in files need Pillow: pip install pillow") from None
    return Image, ImageOps


def _open_image(name: str, content: bytes) -> Any:
    """An image that is not decoded yet. Raises InputError for what is no image, or one that 8 bits don't hold."""
    if not content.startswith(PICTURES):
        what = f"is {name_of(content[:HEAD_BYTES])}"
        raise InputError(f"{name}: {what}; expected a PNG, JPEG, WebP, GIF, BMP, TIFF or PNM image")
    image = _guard(name, lambda: _import_pillow()[0].open(io.BytesIO(content)))
    is_deep = content.startswith(b"\x89PNG") and content[24:25] == b"\x10"
    if is_deep or image.mode.startswith(("I", "F")):
        raise InputError(f"{name}: has 16 bits or more a channel; expected 8")
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:  # cameras put previews into an MPO
        raise InputError(f"{name}: is animated or has {frames} pages; expected one image")
    return image


def _guard(name: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (InputError, SetupError):
        raise
    except Exception as error:  # a decoder may raise anything
        raise SetupError(f"{name}: is damaged: {error}; expected it whole") from None


def _header(name: str, content: bytes) -> _Header:
    image = _open_image(name, content)
    orientation = _guard(name, lambda: image.getexif().get(0x0112, 1))
    width, height = image.size[::-1] if orientation in SIDEWAYS else image.size
    return _Header(height, width, image.mode in GREY)


def _decode(name: str, content: bytes, size: tuple[int, int] | list[int], is_grey: bool) -> Pixels:
    """An image's pixels (C, H, W): turned upright, in grey or in red, green and blue, resized."""
    image_module, image_ops = _import_pillow()

    def work() -> Pixels:
        image = image_ops.exif_transpose(_open_image(name, content))
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise InputError(f"{name}: has transparent pixels, which have no colour; expected it on a background")
        image = image.convert("L" if is_grey else "RGB")
        if image.size != (size[1], size[0]):
            image = image.resize((size[1], size[0]), image_module.Resampling.BILINEAR)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)

    return _guard(name, work)  # type: ignore[no-any-return]


def _resize(pixels: Pixels, size: list[int] | None) -> Pixels:
    """Pixels (N, C, H, W) in another height and width."""
    if size is None or list(pixels.shape[2:]) == size:
        return pixels
    image_module, _ = _import_pillow()
    found = np.empty((*pixels.shape[:2], *size), np.uint8)
    for at, channel in np.ndindex(*pixels.shape[:2]):
        image = image_module.fromarray(pixels[at, channel]).resize((size[1], size[0]), image_module.Resampling.BILINEAR)
        found[at, channel] = np.asarray(image)
    return found
