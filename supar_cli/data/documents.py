"""The documents of text files, and the one place that decodes text: what can't be decoded is counted by file and line."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supar_cli.data.formats import naming_damage, open_bytes
from supar_cli.errors import InputError, SetupError
from supar_cli.planning.plan import Data

MOST_UNDECODED = (
    1000  # chosen: damage is rarer than one character in a thousand, accents in another encoding are more frequent
)
LINES_NAMED = 3
CHUNK_BYTES = 2**22
REPLACEMENT = "\ufffd"


class Decoding:
    """Characters decoded so far and those that could not be, each of which becomes U+FFFD.

    `is_raw`: the bytes themselves are the tokens, so nothing is replaced, only counted.
    """

    def __init__(self, is_raw: bool = False) -> None:
        self.is_raw, self.characters = is_raw, 0
        self.places: Counter[tuple[Path, int]] = Counter()

    def mend(self, text: str, path: Path, line: int, is_one_line: bool = False) -> str:
        """The text with U+FFFD for lone surrogates: what JSON escapes, and what `open_text` makes of undecodable bytes.

        `line` is the place in the file where it begins, and of all of it if `is_one_line`.
        """
        self.characters += len(text)
        if text.isascii():
            return text
        try:
            text.encode()
            return text
        except UnicodeEncodeError:
            for number, part in enumerate([text] if is_one_line else text.split("\n"), line):
                if count := sum("\ud800" <= letter <= "\udfff" for letter in part):
                    self.places[path, number] += count
            return "".join(REPLACEMENT if "\ud800" <= letter <= "\udfff" else letter for letter in text)

    @property
    def undecoded(self) -> int:
        return self.places.total()

    def by_file(self) -> dict[str, str]:
        """By file the number of characters that could not be decoded and the lines of the first of them."""
        lines: dict[str, list[int]] = {}
        counts: Counter[str] = Counter()
        for (path, line), count in self.places.items():
            lines.setdefault(str(path), []).append(line)
            counts[str(path)] += count
        return {
            name: f"{counts[name]} in lines {', '.join(map(str, own[:LINES_NAMED]))}" + ("…" * (len(own) > LINES_NAMED))
            for name, own in lines.items()
        }

    def warnings(self) -> list[str]:
        """What to say of bytes that could not be decoded. Raises InputError where they are more than damage."""
        found = self.by_file()
        if not found:
            return []
        name, first = next(iter(found.items()))
        others = f", and in {len(found) - 1} other files" if len(found) > 1 else ""
        what = f"{name}: not UTF-8: {self.undecoded} of {self.characters} characters ({first}{others})"
        if self.is_raw:
            return [f"{what}; as byte tokens they are kept; data.encoding: latin-1 (or another) would decode them"]
        if self.undecoded * MOST_UNDECODED > self.characters:
            raise InputError(f"{what}; expected UTF-8, or data.encoding: latin-1 (or another)")
        return [f"{what} became U+FFFD"]


def decoding_of(kind: str, data: Data) -> Decoding:
    """A count for a corpus of a kind: plain text in UTF-8 whose bytes are the tokens is taken as it is."""
    return Decoding(is_raw=data.tokenizer == "bytes" and kind == "text" and data.encoding == "utf-8")


def texts(kind: str, files: list[Path], data: Data, decoding: Decoding) -> Iterator[str]:
    """The documents of files. Raises InputError naming file and line of a bad one, SetupError where a file can't be read."""
    for path in files:
        with naming_damage(path):
            if kind in ("parquet", "arrow"):
                yield from _column(kind, path, data, decoding)
                continue
            with open_text(path, data, decoding.is_raw) as lines:
                if kind == "text":
                    text = lines.read()
                    _refuse_nul(text, path, 1)
                    mended = decoding.mend(text, path, 1)
                    yield text if decoding.is_raw else mended
                    continue
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _checked(_text_of(line, path, number, data), path, number, data, decoding)


@contextmanager
def open_text(path: Path, data: Data, is_raw: bool = False) -> Iterator[io.TextIOWrapper]:
    """A file as text in lines that end with a line feed; an undecodable byte becomes a lone surrogate."""
    encoding = data.encoding if data.encoding != "utf-8" or is_raw else "utf-8-sig"  # without a mark of the byte order
    errors = (
        "surrogatepass"
        if data.encoding.lower().startswith(("utf-16", "utf-32", "utf16", "utf32"))
        else "surrogateescape"
    )
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding, errors, newline="\n") as lines:
        try:
            yield lines
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not {data.encoding}: {error.reason}; expected another data.encoding") from None


def check_text(path: Path, data: Data, decoding: Decoding) -> None:
    """Count what can't be decoded in a file of byte tokens. Raises InputError for a NUL, their separator."""
    line = 1
    with naming_damage(path), open_text(path, data, is_raw=True) as lines:
        while chunk := lines.read(CHUNK_BYTES):
            _refuse_nul(chunk, path, line)
            decoding.mend(chunk, path, line)
            line += chunk.count("\n")


def _refuse_nul(text: str, path: Path, line: int) -> None:
    if (at := text.find("\0")) >= 0:
        raise InputError(f"{path}:{line + text.count(chr(10), 0, at)}: a NUL; expected text, or another data.encoding")


def _checked(text: str, path: Path, number: int, data: Data, decoding: Decoding) -> str:
    if data.tokenizer == "bytes" and data.separator is None:
        _refuse_nul(text, path, number)
    return decoding.mend(text, path, number, is_one_line=True)


def _text_of(line: str, path: Path, number: int, data: Data) -> str:
    """The text of a line of JSONL."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", None) or "nested too deeply"
        raise InputError(f"{path}:{number}: line {number} is not JSON: {why}; expected a JSON object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}:{number}: is {_describe(record)}; expected a JSON object")
    value = record
    for part in [data.field] if data.field in record else data.field.split("."):
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(record) or "none"
            raise InputError(
                f"{path}:{number}: no text under {data.field!r}; expected data.field, one of its keys: {known}"
            )
        value = value[part]
    if isinstance(value, str):
        return value
    what = f"{data.field!r} is {_describe(value)}"
    raise InputError(f"{path}:{number}: {what}; expected a text, or another data.field: {', '.join(record)}")


def _describe(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "a text"}
    return names.get(type(value), "a number")


def _column(kind: str, path: Path, data: Data, decoding: Decoding) -> Iterator[str]:
    """The texts of a column of a Parquet or Arrow file, a batch of rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise SetupError(f"{path}: {kind} needs pyarrow: pip install pyarrow") from None
    row = 0
    try:
        for batch in _batches(kind, path, data, pyarrow):
            for value in _binary(batch, path, data, pyarrow).to_pylist():
                row += 1
                if value is None:
                    raise InputError(f"{path}: row {row}: {data.field!r} is null; expected a text")
                yield _checked(value.decode("utf-8", "surrogateescape"), path, row, data, decoding)
    except pyarrow.ArrowException as error:
        raise SetupError(f"{path}: is damaged: {str(error).splitlines()[0]}; expected a whole {kind} file") from None


def _batches(kind: str, path: Path, data: Data, pyarrow: Any) -> Iterator[Any]:
    """Batches of rows; Arrow files are of either of its two layouts, with an index or as a stream."""
    with path.open("rb") as file:
        if kind == "parquet":
            reader = pyarrow.parquet.ParquetFile(file)
            wanted = [name for name in reader.schema_arrow.names if name in (data.field, data.field.split(".")[0])]
            yield from reader.iter_batches(columns=wanted or None)
        elif file.peek(6).startswith(b"ARROW1"):
            reader = pyarrow.ipc.open_file(file)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(file)


def _binary(batch: Any, path: Path, data: Data, pyarrow: Any) -> Any:
    """The column of a batch that holds the text, as bytes. Raises InputError."""
    names = batch.schema.names
    column: Any
    first, *rest = [data.field] if data.field in names else data.field.split(".")
    column = batch.column(first) if names.count(first) == 1 else None
    for part in rest:
        is_struct = column is not None and pyarrow.types.is_struct(column.type)
        has_part = is_struct and column.type.get_field_index(part) >= 0
        column = pyarrow.compute.struct_field(column, part) if has_part else None
    if column is None:
        raise InputError(
            f"{path}: no column {data.field!r}; expected data.field, one of its columns: {', '.join(names)}"
        )
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) not in ("string", "large_string", "string_view"):
        what = f"the column {data.field!r} holds {column.type}"
        raise InputError(f"{path}: {what}; expected texts, or another data.field: {', '.join(names)}")
    return column.cast(pyarrow.large_binary())
