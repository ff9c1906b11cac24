"""Images and labels read from files: arrays as they are, encoded images decoded by Pillow once, into 8 bits a channel.

Shape suffixes: N images, C channels, H height, W width, all in pixels.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from supar_cli.data.formats import name_of, naming_damage
from supar_cli.data.image_arrays import READERS, Labelled, Pixels
from supar_cli.data.image_files import HEAD_BYTES, ImageFiles
from supar_cli.errors import InputError, SetupError
from supar_cli.planning.plan import Data

Encoded = Callable[[], Iterator[tuple[str, bytes, int]]]  # a name, an encoded image and its label, as often as asked
Log = Callable[[str], None]

EVERY_S = 5.0  # chosen: a line of progress so often, as long waits are told elsewhere
MOST_CLASSES = 2**31  # chosen: no set of images has so many; a larger label is of something else
TABLE_ROWS = 256  # chosen: rows of Parquet in memory at a time; of photographs about 100 MB
_PNM = tuple(b"P" + digit + space for digit in (b"1", b"2", b"3", b"4", b"5", b"6") for space in (b"\n", b" ", b"\r"))
PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", *_PNM)
SIDEWAYS = (5, 6, 7, 8)  # orientations of EXIF in which width and height change places
GREY = ("1", "L", "LA", "La")  # Pillow's modes of one channel of 8 bits or fewer, with an opacity or without


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
    found = [READERS[files.kind](files, split) for split in files.splits]
    return [one._replace(pixels=_resize(one.pixels, data.size)) for one in found], []


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
        first = files.by_split[files.splits[0]][0]
        schema = self._file(first).schema_arrow
        encoded, integers = _columns(schema)
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
                        if label >= MOST_CLASSES:
                            raise InputError(f"{name}: the label {label}; expected 0, 1, …")
                        yield name, content, label
                        at += 1

        return made

    def _batches(self, path: Path) -> Iterator[Any]:
        file, columns = self._file(path), [self._image, self._label]
        schema = file.schema_arrow
        if missing := sorted(set(columns) - set(schema.names)):
            raise InputError(f"{path}: has no column {missing[0]}; expected the columns of the other files")
        for name, found, what in zip(columns, _columns(schema), ("images", "integers"), strict=True):
            if name not in found:
                raise InputError(
                    f"{path}: {name}: holds {schema.field(name).type}; expected {what}, as other files hold"
                )
        names = _class_names(schema.metadata or {}, self._label)
        if names and names != self.classes:
            own, first = next(pair for pair in zip_longest(names, self.classes) if len(set(pair)) == 2)
            raise InputError(f"{path}: the class {own} is where the first file has {first}; expected the same names")
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


def _columns(schema: Any) -> tuple[list[str], list[str]]:
    """The columns of a table that may hold images, and those that may hold labels."""
    encoded, integers = [], []
    for column in schema:
        type_ = str(column.type)
        is_struct = type_.startswith("struct<") and any(part.name == "bytes" for part in column.type)
        encoded += [column.name] if is_struct or type_ in ("binary", "large_binary") else []
        integers += [column.name] if type_.startswith(("int", "uint")) else []
    return encoded, integers


def _column(path: Path, key: str, asked: str | None, found: list[str]) -> str:
    """The column of images or of labels: the asked one, or the only one."""
    if asked in found or (asked is None and len(found) == 1):
        return asked or found[0]
    what = f"no column {asked}" if asked else f"{len(found) or 'no'} columns may hold it"
    kind = "the bytes of images" if key == "image" else "integers"
    expected = f"one of these: {', '.join(found)}" if found else f"a column of {kind}"
    raise InputError(f"data.{key}: {path}: {what}; expected {expected}")


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
    words = content[:HEAD_BYTES].split(maxsplit=4)
    is_deep |= words[0] in (b"P2", b"P3", b"P5", b"P6") and words[3].isdigit() and int(words[3]) > 255
    if is_deep or image.mode.startswith(("I", "F")):
        raise InputError(f"{name}: has 16 bits or more a channel; expected 8")
    if (
        image.format != "MPO" and (frames := _guard(name, lambda: getattr(image, "n_frames", 1))) > 1
    ):  # cameras put previews into an MPO
        raise InputError(f"{name}: is animated or has {frames} pages; expected one image")
    return image


def _guard(name: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (InputError, SetupError):
        raise
    except Exception as error:  # a decoder may raise anything
        if isinstance(error, (module := _import_pillow()[0]).DecompressionBombError):
            most = 2 * (module.MAX_IMAGE_PIXELS or 0)
            raise InputError(
                f"{name}: has more than the {most:,} pixels that Pillow reads; expected a smaller image"
            ) from None
        what = "Pillow can't tell what it is" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        raise SetupError(f"{name}: is damaged: {what}; expected it whole") from None


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
