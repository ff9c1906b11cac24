"""What a file is, known from its first bytes and named; what supar does not read is refused with what to do."""

from __future__ import annotations

import codecs
import io
import json
import re
import struct
import warnings
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
LONG_BYTES = 1024  # chosen: so many bytes of ids include a NUL or control characters
CONTROL_SHARE = 100  # chosen: text has fewer control characters than one in a hundred; of random bytes one in ten is

TEXT_KINDS = ("text", "jsonl", "parquet", "arrow")  # kinds that a tokenizer reads; the others hold tokens
SUFFIXES = {
    **dict.fromkeys((".txt", ".md", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **{".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".bin": "bin", ".npy": "npy"},
}
PACKED = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd"}
LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # llm.c, dev/data/data_common.py: magic → version, integers
_KNOWN = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\x93NUMPY": "npy"}

_CONVERT = "expected its text in a .txt, .jsonl or .parquet file"
_LABELLED = "expected text, or data.kind: images, which the family vit reads"
_UNPACK = "expected what is in it, unpacked"
_REPACK = "expected it unpacked, or as .gz or .zst"
_FOREIGN = {  # how the first bytes of what is not read look, its name, and what to do
    rb"%PDF-": ("a PDF", "expected its text, as pdftotext writes it"),
    rb"{\\rtf": ("a rich text document", _CONVERT),
    rb"version https://git-lfs": ("a pointer of Git LFS", "expected the file itself, which `git lfs pull` fetches"),
    rb"PK(\x03\x04|\x05\x06)": ("a zip archive, as .docx, .xlsx, .npz and PyTorch's files are", _UNPACK),
    rb"BZh[1-9]1AY&SY": ("compressed by bzip2", _REPACK),
    rb"\xfd7zXZ\0|\]\0\0.{2}(\xff{8}|.{4}\0{4})": ("compressed by xz", _REPACK),
    rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18": ("compressed by lz4", _REPACK),
    rb"\xff\x06\0\0sNaPpY": ("compressed by snappy", _REPACK),
    rb"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    rb"Rar!\x1a": ("a RAR archive", _UNPACK),
    rb".{257}ustar": ("a tar archive", _UNPACK),
    rb"\x89PNG": ("a PNG image", _LABELLED),
    rb"\xff\xd8\xff[\xc0-\xfe]": ("a JPEG image", _LABELLED),
    rb"GIF8": ("a GIF image", _LABELLED),
    rb"BM.{4}\0{4}|II\*\0|MM\0\*": ("a bitmap image", _LABELLED),
    rb"RIFF": ("a WebP image or a sound", _CONVERT),
    rb"ID3[\x02-\x04]\0|fLaC\0|OggS\0": ("a sound", _CONVERT),
    rb".{4}ftyp|\x1a\x45\xdf\xa3": ("a film", _CONVERT),
    rb"\xd0\xcf\x11\xe0": ("an old Office document", _CONVERT),
    rb"SQLite format 3": ("a SQLite database", _CONVERT),
    rb"\x89HDF": ("an HDF5 file", "expected its text in .jsonl or .parquet, or its tokens in .npy"),
    rb"ORC|Obj\x01|FEA1|PARE|SEQ[\x04-\x06]": ("ORC, Avro, old Feather or encrypted Parquet", "expected it as Parquet"),
    rb"MMIDIDX\0": ("an index of Megatron's tokens", "expected the .bin file beside it"),
    rb"\x7fELF": ("a program (ELF)", _CONVERT),
    rb"MZ\x90\0": ("a program (Windows)", _CONVERT),
    rb"[\xce\xcf]\xfa\xed\xfe|\xfe\xed\xfa[\xce\xcf]|\xca\xfe\xba\xbe": ("a program (Mach-O or Java)", _CONVERT),
    rb"\0asm\x01|.[\x0c-\x0f]\r\n[\0-\x03]\0{3}": ("a program (WebAssembly or Python)", _CONVERT),
    rb"GGUF|lmgg|fmgg|tjgg": ("a model (GGUF)", _CONVERT),
    rb"(?!\0{4}).{4}\0{4}\s*{\s*\"": ("a safetensors file", _CONVERT),
}
_NEVER_TEXT = (rb"%PDF-", rb"{\\rtf", rb"version https://git-lfs")  # though they are readable
_ARROW = (  # a message's length, the place of its first table below 256, and as the first versions wrote it
    rb"\xff{4}.{3}\0.\0\0\0",
    rb".{2}\0\0\x10\0\0\0\0\0\x0a\0\x0c\0",
)
_LLMC_DATES = range(20240101, 20250101)  # other first integers of files of llm.c: evaluations, models
_OPCODES = 6  # chosen: operations that a pickle begins with and that chance does not form; without its mark, five times
_ODD_SHARE = 100  # chosen: text has fewer unprintable characters than one in a hundred, ids read as UTF-16 have more
_FLOATS = 64  # chosen: numbers of which nearly all are of everyday size as floats, which ids of a vocabulary are not


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
    if found := _container(head):
        return found
    if head and wanted in ("parquet", "arrow", "npy"):
        _refuse_foreign(path, head, False, is_text_expected=False)
        _refuse(path, f"does not begin as {wanted} does", "expected it whole, or another data.format (--format)")
    if int.from_bytes(head[:4], "little") in _LLMC_DATES or _has_llmc_header(head):
        return _token_kind(path, head, "llmc", is_text, data)
    encoding = codecs.lookup(data.encoding).name
    if encoding == "utf-8" or not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        _refuse_foreign(path, head, is_text or encoding != "utf-8")
    if data.format == "text" or suffix_of(path)[0] == ".py" or not head:
        return wanted or "text"
    return _text_kind(path, head.decode(data.encoding, "ignore"), wanted)


def _text_kind(path: Path, head: str, wanted: str | None) -> str:
    """`text` or `jsonl`. Raises InputError for JSON that is not in lines."""
    first, newline, _ = head.lstrip("\ufeff \t\r\n").partition("\n")
    is_array = re.match(r'\ufeff?\s*\[\s*\{\s*"(\\.|[^"\\])*"\s*:', head)
    if is_array or (wanted == "jsonl" and first.startswith("[")):
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
    if _has_llmc_header(head):
        what = "has a header of llm.c with another version or byte order"
        _refuse(path, what, "expected 20240520 or 20240801 for its first integer, little-endian")
    if found := _container(head):
        return found
    _refuse_foreign(path, head, False, is_text_expected=False)
    is_utf8 = len(head) >= 2 * SAMPLE_ITEMS and len(head.decode(errors="ignore").encode()) > len(head) - 4
    if is_text and (is_utf8 or len(head) >= LONG_BYTES):
        _refuse(path, "is text", "expected a name that ends in .txt or .jsonl, or data.format: text")
    if data.dtype != "uint16":
        _refuse_wide_text(path, head)
        _refuse_wider(path, head, data)
    return "nanogpt"


def _container(head: bytes) -> str | None:
    """The format that says itself what it holds, if it is one."""
    if any(re.match(pattern, head, re.DOTALL) for pattern in _ARROW):
        return "arrow"
    return next((kind for magic, kind in _KNOWN.items() if head.startswith(magic)), None)


def _has_llmc_header(head: bytes) -> bool:
    """Whether a file begins as llm.c's do: 256 integers, of which the first is a date and the fourth and later are 0."""
    dates = (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    return len(head) >= 1024 and not any(head[12:1024]) and any(20200101 <= date < 20991231 for date in dates)


def _refuse_wider(path: Path, head: bytes, data: Data) -> None:
    """Refuse floats, and integers that are wider than they would be read: every second word is the upper half of one."""
    for code in "fd":  # of 32 and 64 bits; without numpy, which light commands do without
        floats = struct.unpack(f"<{len(head) // 8 * 8 // struct.calcsize(code)}{code}", head[: len(head) // 8 * 8])
        usual = sum(1e-6 < abs(number) < 1e6 for number in floats)
        if usual >= _FLOATS and 10 * usual >= 9 * sum(number != 0 for number in floats):
            _refuse(path, "holds floats", "expected integers (data.dtype: uint16 if they are)")
    size = 4 if data.dtype == "uint32" else 2
    count = len(head) // (2 * size) * 2
    items = struct.unpack(f"<{count}{'I' if size == 4 else 'H'}", head[: count * size])
    low, high = items[::2], items[1::2]
    if len(high) < SAMPLE_ITEMS:
        return
    ids = sum(map(bool, low))
    is_zero = not any(high) and (2 * ids >= len(low) or ids >= 2 * SAMPLE_ITEMS)
    if is_zero or (max(high) <= UPPER_HALF and max(low) > 255):
        what = f"every second {8 * size}-bit word is at most {max(high)}, as if the integers were wider"
        is_64 = size == 2 and not any(low[1::2])
        remedy = "expected integers of 16 or 32 bits, or a .npy file (data.dtype: uint16 if they are of 16)"
        remedy = remedy if is_64 else "expected data.dtype: uint32 (uint16 if it is so)"
        _refuse(path, what, remedy if size == 2 else "expected uint32")


def _refuse_wide_text(path: Path, head: bytes) -> None:
    """Refuse text in UTF-16. Below 256, its words are those of bytes as tokens, which are the text too."""
    for name, mark in (("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE)):
        text = head.removeprefix(mark)[: len(head) // 2 * 2 - 2].decode(name, "replace")
        odd = sum(not (one in "\t\n\r" or (one >= " " and (one.isprintable() or one.isspace()))) for one in text)
        chinese, stops = (len(re.findall(part, text)) for part in ("[\u3041-\u30ff\u4e00-\u9fff]", "[，。、]"))
        is_chinese = 2 * chinese >= len(text) and stops * _ODD_SHARE >= len(text) and name == "utf-16-le"
        is_known = len(text) >= 128 and (is_chinese or 2 * len(re.findall(r"[\t\n\r -~]", text)) >= len(text))
        is_wide = name == "utf-16-be" or max(text, default="") > "\xff"
        if odd * _ODD_SHARE <= len(text) >= SAMPLE_ITEMS and (head.startswith(mark) or (is_known and is_wide)):
            remedy = f"expected a name that ends in .txt or .jsonl, with data.encoding: {name[:6]}"
            _refuse(path, "is text in UTF-16", f"{remedy} (data.dtype: uint16 for tokens)")


def _is_text(head: bytes) -> bool:
    """Whether bytes may be text in an encoding that has ASCII's characters."""
    controls = len(head) - len(head.translate(None, bytes([*range(1, 8), *range(14, 27), *range(28, 32)])))
    return b"\0" not in head and controls * CONTROL_SHARE <= len(head)


def _is_pickle(head: bytes) -> bool:
    """Whether a file begins with operations of a pickle."""
    import pickletools

    has_mark, count = re.match(rb"\x80[\x02-\x05]", head) is not None, 0
    try:
        with warnings.catch_warnings(action="ignore"):
            for _ in pickletools.genops(head):
                count += 1
                if count == 5 * _OPCODES:
                    return has_mark or not _is_text(head)
    except (ValueError, UnicodeError, OverflowError):
        return has_mark and count >= _OPCODES
    return has_mark


def _refuse_foreign(path: Path, head: bytes, is_text: bool, is_text_expected: bool = True) -> None:
    """Raise InputError for what is known not to be read, and, if text is expected and it is none, for all else."""
    for pattern, (what, remedy) in _FOREIGN.items():
        found = re.match(pattern, head, re.DOTALL)
        if found and not (is_text and found[0].isascii() and pattern not in _NEVER_TEXT):
            _refuse(path, f"is {what}", remedy)
    if not is_text and _is_pickle(head):
        _refuse(path, "is a pickle", _CONVERT)
    if not is_text_expected:
        return
    for mark, name in ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if head.startswith(mark):
            _refuse(path, f"is text in {name.upper()}", f"expected UTF-8, or data.encoding: {name}")
    if is_text:
        return
    for name, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
        if 3 * zeros.count(0) > len(zeros) and 3 * head.count(0) < 2 * len(head):
            what = "has a NUL in every second byte, as text in UTF-16 or a file of tokens"
            _refuse(path, what, f"expected UTF-8, data.encoding: {name}, or data.format: nanogpt for tokens")
    what = f"a NUL at byte {head.index(0)}" if b"\0" in head else "control characters throughout"
    _refuse(path, f"is not text: {what}", "expected text, JSONL, Parquet, Arrow or tokens (data.format: nanogpt)")


def name_of(head: bytes) -> str:
    """What a file that begins so is, in words, for a message."""
    found = next((what for start, (what, _) in _FOREIGN.items() if re.match(start, head, re.DOTALL)), None)
    return found or _container(head) or ("empty" if not head else "text" if _is_text(head) else "of an unknown format")


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
        import gzip

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
