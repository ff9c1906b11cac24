"""The documents of text files, and the one place that decodes text: what can't be decoded is counted by file and line."""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from supar_cli.data.formats import naming_damage, open_bytes
from supar_cli.errors import InputError, SetupError
from supar_cli.planning.plan import Data

MOST_UNDECODED = (
    1000  # chosen: damage is rarer than one character in a thousand, accents in another encoding are more frequent
)
FILES_NAMED = 3  # chosen: warnings of one kind that are read
CHUNK_BYTES = 2**22  # chosen: a few MB
REPLACEMENT = "\ufffd"
_MARKS = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


class Decoding:
    """Characters decoded so far and those that could not be, each of which becomes U+FFFD.

    `is_raw`: the bytes themselves are the tokens, so nothing is replaced, only counted.
    """

    def __init__(self, is_raw: bool = False, encoding: str = "utf-8") -> None:
        self.is_raw, self.characters, self._encoding = is_raw, 0, encoding.upper()
        self.undecoded: Counter[str] = Counter()  # by file
        self._first: dict[str, tuple[int, str]] = {}

    def mend(self, text: str, path: Path, line: int, is_one_line: bool = False) -> str:
        """The text with U+FFFD for lone surrogates: what JSON escapes, and what `open_text` makes of undecodable bytes.

        `line` is the place in the file where it begins, and of all of it if `is_one_line`.
        """
        self.characters += len(text)
        try:
            text.encode()
            return text
        except UnicodeEncodeError as error:
            first, at = ord(text[error.start]), line + (0 if is_one_line else text.count("\n", 0, error.start))
        what = f"byte 0x{first - 0xDC00:02X}" if 0xDC80 <= first <= 0xDCFF else f"lone surrogate U+{first:04X}"
        self._first.setdefault(str(path), (at, what))
        mended = "".join(REPLACEMENT if "\ud800" <= letter <= "\udfff" else letter for letter in text)
        self.undecoded[str(path)] += mended.count(REPLACEMENT) - text.count(REPLACEMENT)
        return mended

    def places(self) -> list[str]:
        """For each file the first character that could not be decoded, and how many there are."""
        found = zip(self._first.items(), self.undecoded.values(), strict=True)
        return [
            f"{name}:{line}: {what} is not {self._encoding}; {count:,} such in the file"
            for (name, (line, what)), count in found
        ]

    def warnings(self) -> list[str]:
        """What to say of what could not be decoded. Raises InputError where that is more than damage."""
        found, total = self.places(), self.undecoded.total()
        if total * MOST_UNDECODED > self.characters and not self.is_raw:
            share = f"{total:,} of {self.characters:,} characters"
            remedy = f"expected {self._encoding}, or another data.encoding, such as latin-1"
            raise InputError(f"{found[0]}, {share} in all; {remedy}")
        more = [f"{len(found) - FILES_NAMED} more files are not either"] if len(found) > FILES_NAMED else []
        became = "kept as byte tokens" if self.is_raw else "read as U+FFFD"
        return [f"{one}, {became}" for one in found[:FILES_NAMED]] + more


def decoding_of(kind: str, data: Data) -> Decoding:
    """A count for a corpus of a kind: plain text in UTF-8 whose bytes are the tokens is taken as it is."""
    encoding = codecs.lookup(data.encoding).name
    return Decoding(data.tokenizer == "bytes" and kind == "text" and encoding == "utf-8", encoding)


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
    name = codecs.lookup(data.encoding).name
    encoding = name if name != "utf-8" or is_raw else "utf-8-sig"  # without a mark of the byte order
    errors = "surrogatepass" if name.startswith(("utf-16", "utf-32")) else "surrogateescape"
    with open_bytes(path) as file:
        _skip_mark(file, path, name)
        with io.TextIOWrapper(file, encoding, errors, newline="\n") as lines:
            yield lines


def _skip_mark(file: Any, path: Path, encoding: str) -> None:
    """Skip the mark of the byte order that an encoding names. Raises InputError where the file has the other one."""
    if mark := _MARKS.get(encoding):
        start = file.peek(len(mark))[: len(mark)]
        if start == mark[::-1]:
            what = f"its mark of the byte order is not that of {encoding}"
            raise InputError(f"{path}: {what}; expected data.encoding: {encoding[:6]}")
        file.read(len(mark) if start == mark else 0)


def check_text(path: Path, decoding: Decoding) -> None:
    """Count what can't be decoded in a file of byte tokens. Raises InputError for a NUL, their separator."""
    line, decoder = 1, codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with naming_damage(path), path.open("rb") as file:
        for chunk in chain(iter(lambda: file.read(CHUNK_BYTES), b""), [b""]):
            text = decoder.decode(chunk, final=not chunk)
            _refuse_nul(text, path, line)
            decoding.mend(text, path, line)
            line += chunk.count(b"\n")


def _refuse_nul(text: str, path: Path, line: int) -> None:
    if (at := text.find("\0")) >= 0:
        raise InputError(f"{path}:{line + text.count(chr(10), 0, at)}: a NUL; expected text, or another data.encoding")


def _checked(text: str, path: Path, number: int, data: Data, decoding: Decoding) -> str:
    if data.tokenizer == "bytes" and data.separator is None:
        _refuse_nul(text, path, number)
    return decoding.mend(text, path, number, is_one_line=True)


def _text_of(line: str, path: Path, number: int, data: Data) -> str:
    """The text of a line of JSONL. Raises InputError that says whether it is JSON and what is under the field."""
    place, what = f"{path}:{number}", "nested too deeply"
    try:
        record = json.loads(line.rstrip("\n"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValueError):
            what = str(error)
        if isinstance(error, json.JSONDecodeError):
            what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise InputError(f"{place}: line {number} is not JSON: {what}; expected a JSON object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{place}: is {_describe(record)}; expected a JSON object")
    value, keys = record, ", ".join(record) or "none"
    for part in [data.field] if data.field in record else data.field.split("."):
        if not isinstance(value, dict) or part not in value:
            what = f"no text under {data.field!r}"
            raise InputError(f"{place}: {what}; expected data.field (--field), one of its keys: {keys}")
        value = value[part]
    if not isinstance(value, str):
        what = f"{data.field!r} is {_describe(value)}"
        raise InputError(f"{place}: {what}; expected a text, or another data.field (--field): {keys}")
    return value


def _describe(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "a text"}
    return names.get(type(value), "a number")


def _column(kind: str, path: Path, data: Data, decoding: Decoding) -> Iterator[str]:
    """The texts of a column of a Parquet or Arrow file, a batch of rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SetupError(f"{path}: {kind} needs pyarrow: pip install pyarrow") from None
    row = 0
    try:
        for table in _batches(kind, path, data, pyarrow):
            for value in _binary(table, path, data, pyarrow).to_pylist():
                row += 1
                if value is None:
                    raise InputError(f"{path}: row {row}: {data.field!r} is null; expected a text")
                yield _checked(value.decode("utf-8", "surrogateescape"), path, row, data, decoding)
    except pyarrow.ArrowException as error:
        raise SetupError(f"{path}: is damaged: {str(error).splitlines()[0]}; expected a whole {kind} file") from None


def _batches(kind: str, path: Path, data: Data, pyarrow: Any) -> Iterator[Any]:
    """Tables of a few rows; Arrow files are of either of its two layouts, with an index or as a stream."""
    with path.open("rb") as file:
        if kind == "parquet":
            reader = pyarrow.parquet.ParquetFile(file)
            wanted = [name for name in reader.schema_arrow.names if name in (data.field, data.field.split(".")[0])]
            batches = reader.iter_batches(columns=wanted or None)
        elif file.peek(6).startswith(b"ARROW1"):
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(file)
        yield from (pyarrow.Table.from_batches([batch]) for batch in batches)


def _binary(table: Any, path: Path, data: Data, pyarrow: Any) -> Any:
    """The column that holds the text, as bytes. Raises InputError."""
    while data.field not in table.column_names and any(map(pyarrow.types.is_struct, table.schema.types)):
        table = table.flatten()  # a struct `a` of `b` becomes a column `a.b`
    names = ", ".join(table.column_names)
    if table.column_names.count(data.field) != 1:
        raise InputError(
            f"{path}: no column {data.field!r}; expected data.field (--field), one of its columns: {names}"
        )
    column = table[data.field]
    column = column.cast(column.type.value_type) if pyarrow.types.is_dictionary(column.type) else column
    if str(column.type) not in ("string", "large_string", "string_view"):
        what = f"the column {data.field!r} holds {column.type}"
        raise InputError(f"{path}: {what}; expected texts, or another data.field (--field): {names}")
    return column.cast(pyarrow.large_binary())
