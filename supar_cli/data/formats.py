"""What a file is, known from its first bytes and named; what supar does not read is refused with what to do."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, cast

from supar_cli.errors import InputError, SetupError
from supar_cli.files import naming_read_errors
from supar_cli.planning.plan import Data

HEAD_BYTES = 2**16  # chosen: enough to tell formats apart, little enough to read of each file of a large folder
SAMPLE_ITEMS = 8  # chosen: a pattern in fewer integers than these may be chance
UPPER_HALF = 3  # chosen: the largest upper half of an id; no vocabulary in use has more than 2^18 tokens
CONTROL_SHARE = 100  # chosen: text has fewer control characters than one in a hundred; of random bytes one in ten is

TEXT_KINDS = ("text", "jsonl", "parquet", "arrow")  # kinds that a tokenizer reads; the others hold tokens
SUFFIXES = {
    **dict.fromkeys((".txt", ".md", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **{".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".bin": "bin", ".npy": "npy"},
}
PACKED = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd"}
LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # llm.c, dev/data/data_common.py: magic → version, integers
_KNOWN = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"\x93NUMPY": "npy"}

_CONVERT = "expected its text in a .txt, .jsonl or .parquet file"
_UNPACK = "expected what is in it, unpacked"
_FOREIGN = {  # the first bytes of what is not read, its name, and what to do
    b"%PDF-": ("a PDF", "expected its text, as pdftotext writes it"),
    b"{\\rtf": ("a rich text document", _CONVERT),
    b"version https://git-lfs": ("a pointer of Git LFS", "expected the file itself, which `git lfs pull` fetches"),
    b"PK\x03\x04": ("a zip archive, as .docx, .xlsx, .npz and PyTorch's files are", _UNPACK),
    b"BZh": ("compressed by bzip2", "expected it unpacked, or as .gz or .zst"),
    b"\xfd7zXZ": ("compressed by xz", "expected it unpacked, or as .gz or .zst"),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"\x89PNG": ("a PNG image", _CONVERT),
    b"\xff\xd8\xff": ("a JPEG image", _CONVERT),
    b"GIF8": ("a GIF image", _CONVERT),
    b"RIFF": ("a WebP image or a sound", _CONVERT),
    b"\xd0\xcf\x11\xe0": ("an old Office document", _CONVERT),
    b"SQLite format 3": ("a SQLite database", _CONVERT),
    b"\x89HDF": ("an HDF5 file", "expected its text in .jsonl or .parquet, or its tokens in .npy"),
    b"\x7fELF": ("a program (ELF)", _CONVERT),
    b"GGUF": ("a model (GGUF)", _CONVERT),
}
_NEVER_TEXT = (b"%PDF-", b"{\\rtf", b"version https://git-lfs")  # though they are readable
_LLMC_DATES = range(20240101, 20250101)  # other first integers of files of llm.c: evaluations, models


class Kind(NamedTuple):
    """What a file is: one of the formats of `data.format`, and whether it is compressed."""

    name: str
    is_packed: bool = False


def kind_of(path: Path, data: Data) -> Kind:
    """What a file is. Raises InputError that says what to do about one that is not read, or not as `data.format` says."""
    with naming_read_errors(path), path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    suffix, is_packed = suffix_of(path)
    wanted = data.format if data.format != "auto" else SUFFIXES.get(suffix)
    packed = next((name for name, magic in PACKED.items() if head.startswith(magic)), None)
    unpacks = packed is not None and (is_packed or wanted != "nanogpt")  # raw tokens may begin with any bytes
    if unpacks:
        with naming_damage(path), open_bytes(path) as inner:
            head = inner.read(HEAD_BYTES)
    elif is_packed and head:
        _refuse(path, "is not compressed, as its name says", "expected it without .gz or .zst in its name")
    with naming_damage(path):
        kind = _known_kind(path, head, wanted, data)
    if unpacks and kind not in ("text", "jsonl"):
        _refuse(path, f"is {kind}, compressed", "expected it unpacked")
    if data.format not in ("auto", kind):
        _refuse(path, f"is {kind}, not {data.format}", f"expected data.format (--format): {kind}")
    return Kind(kind, unpacks)


def suffix_of(path: Path) -> tuple[str, bool]:
    """The suffix of a file's name without that of compression, and whether it has the latter."""
    is_packed = path.suffix.lower() in PACKED
    return (Path(path.stem).suffix if is_packed else path.suffix).lower(), is_packed


def _known_kind(path: Path, head: bytes, wanted: str | None, data: Data) -> str:
    """The format of a file from its first bytes, and where these allow several from what is wanted."""
    is_text = _is_text(head)
    if wanted in ("nanogpt", "bin", "llmc"):
        return _token_kind(path, head, wanted, is_text, data)
    if found := next((kind for magic, kind in _KNOWN.items() if head.startswith(magic)), None):
        return found
    if head and wanted in ("parquet", "arrow", "npy"):
        _refuse_foreign(path, head, False, shortest=2)
        _refuse(path, f"does not begin as {wanted} does", "expected it whole, or another data.format (--format)")
    if head[:4] and int.from_bytes(head[:4], "little") in _LLMC_DATES:
        return _token_kind(path, head, "llmc", is_text, data)
    if data.encoding == "utf-8" or not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        _refuse_foreign(path, head, is_text or data.encoding != "utf-8")
    if data.format == "text" or wanted == "text" or not head:
        return wanted or "text"
    return _text_kind(path, head.decode(data.encoding, "ignore"), wanted)


def _text_kind(path: Path, head: str, wanted: str | None) -> str:
    """`text` or `jsonl`. Raises InputError for JSON that is not in lines."""
    first, newline, _ = head.lstrip("\ufeff \t\r\n").partition("\n")
    if wanted == "jsonl" and first.startswith("["):
        _refuse(path, "is a JSON array", f"expected JSON lines, an object a line: jq -c '.[]' {path.name} > x.jsonl")
    if not first.startswith("{"):
        return wanted or "text"
    try:
        is_record = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        is_record = False
    if wanted is None and is_record:
        _refuse(path, "has a JSON object in its first line", "expected data.format (--format): jsonl, or text")
    is_json = suffix_of(path)[0] == ".json" or first.strip() == "{"
    if wanted == "jsonl" and not is_record and newline and is_json:
        _refuse(path, "is one JSON object over several lines", f"expected one a line: jq -c . {path.name} > x.jsonl")
    return wanted or "text"


def _token_kind(path: Path, head: bytes, wanted: str, is_text: bool, data: Data) -> str:
    """`nanogpt` (raw integers), `llmc`, or what else the first bytes of a .bin file say."""
    magic = int.from_bytes(head[:4], "little")
    if magic in LLMC and len(head) >= 4:
        if data.dtype not in ("auto", "uint16" if LLMC[magic][1] == "<u2" else "uint32"):
            _refuse(path, f"holds other integers than data.dtype: {data.dtype}", "expected it without data.dtype")
        return "llmc"
    if magic in _LLMC_DATES:
        _refuse(path, "is another file of llm.c, such as an evaluation's or a model's", "expected a shard of tokens")
    if wanted == "llmc":
        raise SetupError(f"{path}: not an llm.c shard; expected its first integer to be 20240520 or 20240801")
    if found := next((kind for first, kind in _KNOWN.items() if head.startswith(first) and first.strip(b"\xff")), None):
        return found
    _refuse_foreign(path, head, False, shortest=4)
    if len(head) >= 2 * SAMPLE_ITEMS and is_text and len(head.decode(errors="ignore").encode()) > len(head) - 4:
        _refuse(path, "is text", "expected a name that ends in .txt or .jsonl, or data.format: text")
    _refuse_wider(path, head, data)
    return "nanogpt"


def _refuse_wider(path: Path, head: bytes, data: Data) -> None:
    """Refuse raw integers that are wider than they would be read: every second one is the upper half of a small number."""
    size = 4 if data.dtype == "uint32" else 2
    items = [int.from_bytes(head[at : at + size], "little") for at in range(0, len(head) - size + 1, size)]
    low, high = items[::2], items[1::2]
    if data.dtype == "uint16" or len(high) < SAMPLE_ITEMS:
        return
    if (max(high) == 0 and 2 * low.count(0) <= len(low)) or (max(high) <= UPPER_HALF and max(low) > 255):
        what = f"every second {8 * size}-bit word is at most {max(high)}, as if the integers were wider"
        _refuse(path, what, "expected data.dtype: uint32 (uint16 if it is so)" if size == 2 else "expected uint32")


def _is_text(head: bytes) -> bool:
    """Whether bytes may be text in an encoding that has ASCII's characters."""
    controls = len(head) - len(head.translate(None, bytes([*range(1, 8), *range(14, 27), *range(28, 32)])))
    return b"\0" not in head and controls * CONTROL_SHARE <= len(head)


def _refuse_foreign(path: Path, head: bytes, is_text: bool, shortest: int = 0) -> None:
    """Raise InputError for what is known not to be read, and, if it is not text, for all else."""
    for magic, (what, remedy) in _FOREIGN.items():
        may_be_text = is_text and magic.isascii() and magic not in _NEVER_TEXT
        if head.startswith(magic) and len(magic) >= shortest and not may_be_text:
            _refuse(path, f"is {what}", remedy)
    if head[257:262] == b"ustar":
        _refuse(path, "is a tar archive", _UNPACK)
    if head[8:10] == b'{"' and 0 < int.from_bytes(head[:8], "little") < 2**32:
        _refuse(path, "is a safetensors file", _CONVERT)
    if shortest:
        return
    for mark, name in ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if head.startswith(mark):
            _refuse(path, f"is text in {name.upper()}", f"expected UTF-8, or data.encoding: {name}")
    if is_text:
        return
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        _refuse(path, "is a pickle", _CONVERT)
    for name, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
        if 3 * zeros.count(0) > len(zeros) and 3 * head.count(0) < 2 * len(head):
            what = "has a NUL in every second byte, as text in UTF-16 or a file of tokens"
            _refuse(path, what, f"expected UTF-8, data.encoding: {name}, or data.format: nanogpt for tokens")
    what = f"a NUL at byte {head.index(0)}" if b"\0" in head else "control characters throughout"
    _refuse(path, f"is not text: {what}", "expected text, JSONL, Parquet, Arrow or tokens (data.format: nanogpt)")


def _refuse(path: Path, what: str, remedy: str) -> NoReturn:
    raise InputError(f"{path}: {what}; {remedy}")


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Name a file that can't be read or whose compressed content is damaged (SetupError), or that is not in its encoding."""
    try:
        with naming_read_errors(path):
            yield
    except (EOFError, zlib.error) as error:
        raise SetupError(f"{path}: is damaged: {error}; expected it whole") from None
    except UnicodeError as error:
        raise InputError(f"{path}: {error}; expected another data.encoding") from None


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where its first bytes are those of gzip or Zstandard. Raises OSError, SetupError."""
    file = path.open("rb")
    magic = file.peek(4)[:4]
    if magic.startswith(PACKED[".gz"]):
        return cast(IO[bytes], gzip.open(file))
    return io.BufferedReader(_Unpacked(file, path)) if magic == PACKED[".zst"] else file


class _Unpacked(io.RawIOBase):
    """The content of a Zstandard file. A cut file is an error, which the package's own readers take for its end."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        try:
            from zstandard import ZstdDecompressor
        except ImportError:
            raise SetupError(f"{path}: a .zst file needs zstandard: pip install zstandard") from None
        self._file, self._unpacker = file, ZstdDecompressor()
        self._frame: Any = self._unpacker.decompressobj()
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._packed or self._file.read(HEAD_BYTES)
            if not chunk and not self._frame.eof:
                raise EOFError("its end is missing")
            if not chunk:
                return 0
            self._frame = self._unpacker.decompressobj() if self._frame.eof else self._frame
            try:
                self._ready = self._frame.decompress(chunk)
            except Exception as error:  # zstandard's own class, which is not imported here
                raise EOFError(str(error)) from None
            self._packed = self._frame.unused_data
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
