"""Files: written whole or not at all, and JSON and JSONL read with errors that name the file and the line."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supar_cli.errors import SetupError

Record = dict[str, Any]
LINES_BYTES = 2**16  # chosen: more than a line usually has


def write_file(path: Path, content: str | bytes) -> None:
    """Write a temporary file, flush, rename: readers see the old file or the new one, never a part. Devices and pipes: directly."""
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    with replacing(path) as aside, aside.open("wb") as file:
        file.write(data)


def cache_folder() -> Path:
    """Where measurements and machine code are kept for later processes; nowhere for a user without a home."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "supar"
    try:
        return Path.home() / ".cache" / "supar"
    except RuntimeError:  # a container's user whom the system doesn't know
        return Path(os.devnull) / "supar"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside another to write, which then takes its place: readers see the old file or the whole new one."""
    path = path.resolve()  # a link stays a link
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """`sha256:` and the digest of a file's content, as documents and manifests have it. Raises OSError."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming_write_errors(place: Path) -> Iterator[None]:
    """Raise SetupError that names `place` where a file in it can't be written."""
    try:
        yield
    except OSError as error:
        raise SetupError(f"{place}: can't be written: {error.strerror or error}") from None


@contextmanager
def naming_read_errors(path: Path, remedy: str = "") -> Iterator[None]:
    """Raise SetupError that names the file where it can't be read."""
    try:
        yield
    except OSError as error:
        raise SetupError(f"{path}: can't be read: {error.strerror or error}{remedy}") from None


def read_json(path: Path, *, is_finite: bool = False) -> Any:
    """A JSON file's data; NaN and infinities are read as null, or refused. Raises SetupError that names the file."""
    try:
        return _parse_json(_read_bytes(path), is_finite)
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path}: is corrupt: {error}; expected JSON") from None


def read_jsonl(path: Path, key: str) -> list[Record]:
    """Records of a JSONL file, each with `key`. A last line that is cut off is left out; a missing file has no records.

    Raises SetupError that names the file and line.
    """
    if not path.exists():
        return []
    return [parse_record(path, at, line, key) for at, line in enumerate(_read_bytes(path).split(b"\n")[:-1], 1)]


def append_lines(path: Path, lines: str) -> None:
    """Append whole lines and flush them to disk: all or none, replacing a truncated last line. Raises OSError."""
    with path.open("a+b", buffering=0) as file:
        end = _end_of_lines(file)
        rest = memoryview(lines.encode())
        try:
            file.truncate(end)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, end)
            raise


def _end_of_lines(file: io.FileIO) -> int:
    """The end of the last complete line; what follows was cut off by a kill or a full disk."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - LINES_BYTES)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def parse_record(path: Path, at: int, line: bytes, key: str) -> Record:
    """The record in a line of a JSONL file. Raises SetupError that names the file and line."""
    try:
        record = _parse_json(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or key not in record:
        raise SetupError(f"{path}:{at}: not a record; expected a JSON object with `{key}`")
    return record


def _parse_json(content: bytes, is_finite: bool = False) -> Any:
    return json.loads(content.decode("utf-8"), parse_constant=_refuse if is_finite else lambda _: None)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _read_bytes(path: Path) -> bytes:
    with naming_read_errors(path):
        return path.read_bytes()


def template(name: str) -> Path:
    """Path of a shipped template file: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "templates"
    return (inside if inside.exists() else package.parent / "templates") / name
