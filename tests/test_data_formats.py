"""What a file is: read alike in every format, known by its first bytes, refused by name, decoded in one place.

Controls state what the first reader did, which knew a file by its suffix: `corpus._first_reader`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from supar_cli.data import batches, corpus, documents
from supar_cli.data.documents import Decoding
from supar_cli.errors import InputError, SetupError, SuparError
from supar_cli.planning.spec import Data
from tests.conftest import real_text
from tests.fuzzing import tries
from tests.test_data import loaded, text_of, write_shard

TEXTS = [f"{line}\nof document {at}, é" for at, line in enumerate(real_text(6000).decode().splitlines()) if line]


def write(path: Path, content: bytes) -> None:
    """Write a file as if long ago, so that reading does not wait for its clock to tick."""
    path.write_bytes(content)
    os.utime(path, (0, 0))


def lines(key: str = "text") -> bytes:
    records: list[Any] = [
        {"id": at, **({"a": {"b": text}} if key == "a.b" else {key: text})} for at, text in enumerate(TEXTS)
    ]
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def zstd(content: bytes) -> bytes:
    """Two frames, as concatenated files have them."""
    half = len(content) // 2
    return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))


def arrow(new: Callable[..., Any], key: str = "text") -> bytes:
    table, sink = columns(key), io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue()


def columns(key: str) -> pa.Table:
    return pa.table(
        {"id": range(len(TEXTS)), **({"a": [{"b": text} for text in TEXTS]} if key == "a.b" else {key: TEXTS})}
    )


def parquet(key: str = "text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(columns(key), sink, row_group_size=11)
    return sink.getvalue()


def categories() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), sink)
    return sink.getvalue()


def shard(ids: Any, magic: int, version: int, kind: str) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + ids.astype(kind).tobytes()


def npy(array: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


IDS = np.frombuffer(b"".join(text.encode() + b"\0" for text in TEXTS), np.uint8)
FORMATS: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "jsonl": ("x.jsonl", lines(), {}),
    "a name without a suffix": ("x", lines(), {"format": "jsonl"}),
    ".json of lines": ("x.json", lines(), {}),
    "a field": ("x.jsonl", lines("a.b"), {"field": "a.b"}),
    "utf-16": (
        "x.jsonl",
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode("utf-16"),
        {"encoding": "utf-16"},
    ),
    "gz": ("x.jsonl.gz", gzip.compress(lines()), {}),
    "zst": ("x.jsonl.zst", zstd(lines()), {}),
    "gz by its first bytes": ("x.jsonl", gzip.compress(lines()), {}),
    "parquet": ("x.parquet", parquet(), {}),
    "a column of categories": ("x.parquet", categories(), {}),
    "a column of a column": ("x.parquet", parquet("a.b"), {"field": "a.b"}),
    "arrow file": ("x.arrow", arrow(pa.ipc.new_file), {}),
    "arrow stream": ("x.arrow", arrow(pa.ipc.new_stream), {}),
    "bin": ("x.bin", IDS.astype("<u2").tobytes(), {}),
    "bin of uint32": ("x.bin", IDS.astype("<u4").tobytes(), {"dtype": "uint32"}),
    "llm.c": ("x.bin", shard(IDS, 20240520, 1, "<u2"), {}),
    "llm.c of uint32": ("x.bin", shard(IDS, 20240801, 7, "<u4"), {}),
    "npy": ("x.npy", npy(IDS), {}),
    "npy of int64": ("x.npy", npy(IDS.astype(np.int64)), {}),
}


class TestOneCorpus:
    @pytest.mark.parametrize("name", FORMATS)
    def test_has_the_same_tokens_and_batches_in_every_format(self, tmp_path: Path, name: str) -> None:
        file, content, section = FORMATS[name]
        write(tmp_path / file, content)
        found = loaded(tmp_path / file, **section)
        assert text_of(found.train) + text_of(found.validation) == IDS.tobytes()
        assert len(text_of(found.validation)) == len(IDS) // 10
        write(tmp_path / "plain.bin", IDS.astype("<u2").tobytes())
        plain = loaded(tmp_path / "plain.bin")
        for one, other in zip(found.train.batch(1, 2, 4, 8), plain.train.batch(1, 2, 4, 8), strict=True):
            assert one.equal(other)

    def test_of_text_too(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", IDS.tobytes().replace(b"\0", b"\r\n"))
        write(tmp_path / "a.txt.gz", gzip.compress((tmp_path / "a.txt").read_bytes()))
        plain, packed = loaded(tmp_path / "a.txt"), loaded(tmp_path / "a.txt.gz")
        whole = text_of(packed.train) + text_of(packed.validation)
        assert whole == text_of(plain.train) + text_of(plain.validation)

    @pytest.mark.parametrize(
        "name", ["gz", "zst", "parquet", "arrow stream", "bin of uint32", "llm.c of uint32", "npy of int64"]
    )
    def test_the_first_reader_would_train_on_something_else(self, tmp_path: Path, name: str) -> None:
        """The control: it knew these as text or as uint16, and nothing stopped it."""
        file, content, section = FORMATS[name]
        write(tmp_path / file, content)
        before = corpus._first_reader(Data(source=str(tmp_path / file)))
        assert before is not None and before.kind in ("text", "nanogpt")
        read = content if before.kind == "text" else np.frombuffer(content, "<u2").astype(np.uint8).tobytes()
        assert IDS.tobytes() not in read
        known = corpus.identify(Data(source=str(tmp_path / file), **section)).hash
        assert known != corpus.content_hash(before)  # other tokens, other hash

    @pytest.mark.parametrize("name", FORMATS)
    @given(data=st.data())
    @tries(12)
    def test_cut_anywhere_it_is_refused_or_shorter_by_lines(
        self, tmp_path: Path, name: str, data: st.DataObject
    ) -> None:
        file, content, section = FORMATS[name]
        write(tmp_path / file, content[: data.draw(st.integers(2, len(content) - 1))])
        try:
            found = loaded(tmp_path / file, **section)
        except SuparError as error:
            assert file in str(error)
        else:  # a cut at the end of a line or of a whole token
            assert name in (
                "bin",
                "bin of uint32",
                "jsonl",
                ".json of lines",
                "a name without a suffix",
                "a field",
                "utf-16",
                "zst",
            )
            assert IDS.tobytes().startswith(text_of(found.train) + text_of(found.validation))


def archive(open_: Callable[[io.BytesIO], Any], add: Callable[[Any], Any]) -> bytes:
    sink = io.BytesIO()
    with open_(sink) as made:
        add(made)
    return sink.getvalue()


def database(folder: Path) -> bytes:
    with sqlite3.connect(folder / "made.db") as connection:
        connection.execute("create table texts (text)")
    return (folder / "made.db").read_bytes()


TEXT = real_text(3000)
ZIP = archive(lambda sink: zipfile.ZipFile(sink, "w"), lambda made: made.writestr("word/document.xml", TEXT))
TAR = archive(
    lambda sink: tarfile.TarFile(fileobj=sink, mode="w"),
    lambda made: made.addfile(tarfile.TarInfo("a.txt"), io.BytesIO()),
)
REFUSED: dict[str, tuple[bytes, str]] = {
    "pdf": (b"%PDF-1.7\n1 0 obj << /Type /Catalog >>" + TEXT, "a PDF"),
    "docx": (ZIP, "a zip archive"),
    "rtf": (b"{\\rtf1\\ansi " + TEXT, "a rich text"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(64), "a PNG"),
    "jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(64), "a JPEG"),
    "gif": (b"GIF89a" + bytes(64), "a GIF"),
    "webp": (b"RIFF\x24\0\0\0WEBPVP8 " + bytes(64), "a WebP"),
    "bz2": (bz2.compress(TEXT), "bzip2"),
    "xz": (lzma.compress(TEXT), "xz"),
    "tar": (TAR, "a tar archive"),
    "tgz": (gzip.compress(TAR), "a tar archive"),
    "png.gz": (gzip.compress(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(64)), "a PNG"),
    "pkl": (pickle.dumps({"texts": ["abc"] * 9}), "a pickle"),
    "safetensors": (safetensors.numpy.save({"x": np.ones(9, np.float32)}), "safetensors"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "elf": (b"\x7fELF\x02\x01\x01" + bytes(64), "ELF"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
    "array": (json.dumps([{"text": "a"}] * 9).encode(), "a JSON array"),
    "object": (json.dumps({"texts": ["a", "b"]}, indent=1).encode(), "one JSON object over several lines"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "Git LFS"),
    "exe": (b"MZ\x90\0\x03\0\0\0" + bytes(range(256)), r"a program \(Windows\)"),
    "noise": (bytes(range(1, 32)) * 9, "not text: control characters"),
}
SUFFIX_OF = {"array": ("json", "jsonl"), "object": ("json", "jsonl"), "lfs": ("txt", "bin", "parquet", "jsonl")}


class TestRefused:
    @pytest.mark.parametrize("name", [*REFUSED, "sqlite"])
    def test_by_name_whatever_it_is_called(self, tmp_path: Path, name: str) -> None:
        content, what = (database(tmp_path), "SQLite") if name == "sqlite" else REFUSED[name]
        for suffix in SUFFIX_OF.get(name, ("txt", "jsonl", "parquet", "npy", name, "")):
            path = tmp_path / f"x.{suffix}"
            write(path, content)
            data = Data(source=str(path))
            with pytest.raises(
                InputError, match=f"(?s){path.name}: .*({what}|does not begin as {suffix}).*; expected "
            ) as refused:
                corpus.find(data)
            assert len(str(refused.value).splitlines()) == 1
            assert corpus._first_reader(data) is not None  # the control: it was read, as text or as tokens

    @pytest.mark.parametrize("name", ["docx", "png", "webp", "safetensors", "hdf5", "elf", "gguf", "lfs", "pdf"])
    def test_as_tokens_too(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / "x.bin", REFUSED[name][0])
        with pytest.raises(InputError, match=REFUSED[name][1]):
            corpus.find(Data(source=str(tmp_path / "x.bin")))

    @given(
        content=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=40),
        kind=st.sampled_from(["auto", "nanogpt"]),
    )
    @tries(60)
    def test_text_is_not_tokens(self, tmp_path: Path, content: str, kind: Any) -> None:
        (tmp_path / "x.bin").write_text(content, "utf-8")
        with pytest.raises(InputError, match=r"x\.bin: is text; expected a name that ends in \.txt"):
            corpus.find(Data(source=str(tmp_path / "x.bin"), format=kind))

    @pytest.mark.parametrize(
        "start",
        [
            b"PK is a name",
            b"GIF89a is a format",
            b"RIFF\n",
            b"BZh",
            b"ORC",
            b"SQLite format 3 is a format",
            b"[a list]",
            b"{a set}",
        ],
    )
    def test_a_text_may_begin_with_any_word(self, tmp_path: Path, start: bytes) -> None:
        write(tmp_path / "x.txt", start + TEXT)
        assert text_of(loaded(tmp_path / "x.txt").train).startswith(start)

    def test_records_in_a_file_of_no_known_suffix_are_asked_about(self, tmp_path: Path) -> None:
        write(tmp_path / "part-0", lines())
        with pytest.raises(InputError, match=r"part-0: has a JSON object in its first line; expected data\.format"):
            corpus.find(Data(source=str(tmp_path / "part-0")))
        assert loaded(tmp_path / "part-0", format="text").documents == {"train": 1}

    @pytest.mark.parametrize(
        ("file", "kind"),
        [
            ("parquet", "text"),
            ("jsonl", "parquet"),
            ("npy", "nanogpt"),
            ("llm.c", "nanogpt"),
            ("bin", "llmc"),
            ("jsonl", "nanogpt"),
        ],
    )
    def test_a_format_that_it_is_not(self, tmp_path: Path, file: str, kind: Any) -> None:
        name, content, _ = FORMATS[file]
        write(tmp_path / name, content)
        with pytest.raises(SuparError, match=rf"{name}: "):
            corpus.find(Data(source=str(tmp_path / name), format=kind))

    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "x")
        with pytest.raises(InputError, match="neither a file nor a folder"):
            corpus.find(Data(source=str(tmp_path / "x")))


class TestIntegers:
    @given(data=st.data(), vocab=st.sampled_from([200, 50_000, 128_256, 256_000]))
    @tries(60)
    def test_wider_ones_are_refused_and_read_when_named(self, tmp_path: Path, data: st.DataObject, vocab: int) -> None:
        ids = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(
            1, vocab, data.draw(st.integers(20, 400))
        )
        path = tmp_path / "x.bin"
        write(path, ids.astype("<u4").tobytes())
        with pytest.raises(InputError, match=r"every second 16-bit word is .*; expected data\.dtype: uint32"):
            corpus.find(Data(source=str(path)))
        found = loaded(path, vocab=vocab, context=1, dtype="uint32")
        whole = [np.asarray(split.segments[0].tokens) for split in (found.train, found.validation)]
        assert np.array_equal(np.concatenate(whole), ids)
        assert corpus._first_reader(Data(source=str(path))).kind == "nanogpt"  # type: ignore[union-attr]  # twice as many tokens
        write(path, ids.astype("<i8").tobytes())
        for dtype in ("auto", "uint32"):
            with pytest.raises(InputError, match="as if the integers were wider"):
                corpus.find(Data(source=str(path), dtype=dtype))

    @given(
        seed=st.integers(0, 2**32), vocab=st.sampled_from([2, 4, 5, 257, 50_257, 65_536]), size=st.integers(16, 2000)
    )
    @tries(100)
    def test_narrow_ones_are_not(self, tmp_path: Path, seed: int, vocab: int, size: int) -> None:
        ids = np.random.default_rng(seed).integers(0, vocab, size)
        ids[:1] = 0  # so that it is not readable as text
        write(tmp_path / "x.bin", ids.astype("<u2").tobytes())
        assert corpus.find(Data(source=str(tmp_path / "x.bin"))).kind == "nanogpt"

    def test_16_bits_do_not_hold_a_larger_vocabulary(self, tmp_path: Path) -> None:
        write(tmp_path / "x.bin", IDS.astype("<u2").tobytes())
        loaded(tmp_path / "x.bin", vocab=2**16)
        with pytest.raises(InputError, match=r"model\.vocab: 65537, yet .*x\.bin holds 16-bit integers"):
            loaded(tmp_path / "x.bin", vocab=2**16 + 1)

    @pytest.mark.parametrize("magic", [20240522, 20240326])
    def test_other_files_of_llmc_are_named(self, tmp_path: Path, magic: int) -> None:
        write_shard(tmp_path / "x.bin", list(range(100)), magic=magic)
        assert corpus._first_reader(Data(source=str(tmp_path / "x.bin"))).kind == "nanogpt"  # type: ignore[union-attr]
        with pytest.raises(InputError, match=r"x\.bin: is another file of llm\.c"):
            corpus.find(Data(source=str(tmp_path / "x.bin")))

    def test_a_shard_that_contradicts_the_document(self, tmp_path: Path) -> None:
        write_shard(tmp_path / "x.bin", list(range(100)))
        loaded(tmp_path / "x.bin", vocab=100, dtype="uint16")
        with pytest.raises(InputError, match=r"holds other integers than data\.dtype: uint32"):
            corpus.find(Data(source=str(tmp_path / "x.bin"), dtype="uint32"))

    @pytest.mark.parametrize("array", [np.ones((3, 4), int), np.ones(9), np.array(3), np.array(["a"])])
    def test_an_array_that_is_no_tokens(self, tmp_path: Path, array: Any) -> None:
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(SetupError, match=r"x\.npy: (holds|a corrupt)"):
            loaded(tmp_path / "x.npy")

    def test_a_negative_token_is_named(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.array([1, 2, -3] + [1] * 100))
        with pytest.raises(SetupError, match="token 2 is -3; expected less than"):
            loaded(tmp_path / "x.npy").train.window(0, 9)


WORDS = st.text("abc é\n", min_size=40, max_size=200)


class TestDecoding:
    @given(words=WORDS, encoding=st.sampled_from(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]))
    @tries(60)
    def test_wide_characters_are_refused_and_read_when_named(self, tmp_path: Path, words: str, encoding: str) -> None:
        path, words = tmp_path / "x.txt", words + "abc"
        write(path, words.encode(encoding))
        data = Data(source=str(path))
        with pytest.raises(InputError, match=r"x\.txt: (is text in UTF|has a NUL|is not text: a NUL)"):
            corpus.find(data)
        found = loaded(path, encoding=encoding, context=1)
        assert text_of(found.train) + text_of(found.validation) == words.encode() + b"\0"
        assert corpus._first_reader(data).kind == "text"  # type: ignore[union-attr]  # the control: bytes with NULs

    @given(at=st.lists(st.integers(0, 1999), min_size=1, max_size=12, unique=True), packed=st.booleans())
    @tries(60)
    def test_what_is_no_utf8_is_counted_and_placed(self, tmp_path: Path, at: list[int], packed: bool) -> None:
        """2000 lines of 20 characters with an é of latin-1 in some: up to 40 are damage, more an encoding."""
        rows = [b"nineteen characters\n"] * 2000
        for row in at:
            rows[row] = b"nineteen charact\xe9rs\n"
        path = tmp_path / ("x.txt.gz" if packed else "x.txt")
        write(path, gzip.compress(b"".join(rows)) if packed else b"".join(rows))
        found = loaded(path)  # bytes are kept as they are
        assert (text_of(found.train) + text_of(found.validation)).rstrip(b"\0") == b"".join(rows)
        decoding = Decoding()
        (text,) = documents.texts("text", [path], Data(), decoding)
        assert text.count("\ufffd") == decoding.undecoded.total() == len(at)
        said = f"{path}:{min(at) + 1}: byte 0xE9 is not UTF-8; {len(at)} such in the file"
        assert decoding.places() == found.decoding.places() == [said]
        assert decoding.warnings() == [f"{said}, read as U+FFFD"]
        assert found.warnings == [f"{said}, kept as byte tokens"]
        assert b"".join(rows).decode("utf-8", "replace").count("\ufffd") == len(at)  # the control: nobody counted

    def test_too_many_are_another_encoding(self, tmp_path: Path) -> None:
        path, text = tmp_path / "x.txt", "Où est l'été dernier ? " * 200
        write(path, text.encode("latin-1"))
        decoding = Decoding()
        list(documents.texts("text", [path], Data(), decoding))
        with pytest.raises(
            InputError,
            match=r"x\.txt:1: byte 0xF9 is not UTF-8; 600 .*, 600 of 4,600 characters in all; expected UTF-8, or another data\.enc",
        ):
            decoding.warnings()
        assert list(documents.texts("text", [path], Data(encoding="latin-1"), Decoding())) == [text]

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "shift_jis", "ascii", "idna", "utf-7"])
    @pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x"])
    def test_an_encoding_that_it_is_not_is_named(self, tmp_path: Path, encoding: str, name: str) -> None:
        write(tmp_path / name, '{"text": "“quotes” and — dashes"}\n'.encode("cp1252") * 50)
        with pytest.raises(InputError, match=rf"{name}.*(not|can't|BOM|Unsupported|JSON).*; expected"):
            loaded(tmp_path / name, encoding=encoding)

    @given(halves=st.lists(st.sampled_from(["\\ud83d", "\\ude00", "a", "é"]), min_size=1, max_size=6))
    @tries(60)
    def test_lone_surrogates_of_json_become_replacements(self, tmp_path: Path, halves: list[str]) -> None:
        path, text = tmp_path / "x.jsonl", "".join(halves)
        write(path, ('{"text": "good"}\n' * 3000 + f'{{"text": "{text}"}}\n').encode())
        expected = json.loads(f'"{text}"').encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found = loaded(path)
        assert text_of(found.validation).endswith(expected.encode() + b"\0")
        assert found.decoding.undecoded.total() == expected.count("\ufffd")
        if expected.count("\ufffd"):
            assert "x.jsonl:3001: lone surrogate U+D" in found.warnings[0] and "read as U+FFFD" in found.warnings[0]
            with pytest.raises(UnicodeEncodeError):  # the control: this ended it all
                json.loads(f'"{text}"').encode()

    @pytest.mark.parametrize("at", [0, 100_000, 119_999])
    def test_a_nul_is_refused_wherever_it_is(self, tmp_path: Path, at: int) -> None:
        content = bytearray(b"nineteen characters\n" * 6000)
        content[at] = 0
        write(tmp_path / "x.txt", content)
        with pytest.raises(InputError, match=rf"x\.txt:{at // 20 + 1}: a NUL|x\.txt: is not text: a NUL at byte 0"):
            loaded(tmp_path / "x.txt")

    def test_a_nul_in_a_record_would_be_a_separator(self, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_text('{"text": "good"}\n' * 50 + '{"text": "a\\u0000b"}\n')
        with pytest.raises(InputError, match=r"x\.jsonl:51: a NUL"):
            loaded(tmp_path / "x.jsonl")

    @pytest.mark.parametrize(
        ("column", "what"),
        [
            ({"body": ["a"] * 50}, r"no column 'text'; expected data\.field \(--field\), one of its columns: body"),
            ({"text": ["a", None] * 50}, r"row 2: 'text' is null"),
            ({"text": [1] * 50}, r"the column 'text' holds int64; expected texts"),
            ({"text": [{"b": "a"}] * 50}, r"the column 'text' holds struct"),
        ],
    )
    def test_columns_that_hold_no_text(self, tmp_path: Path, column: dict[str, Any], what: str) -> None:
        pq.write_table(pa.table(column), tmp_path / "x.parquet")
        with pytest.raises(InputError, match=rf"x\.parquet: {what}"):
            loaded(tmp_path / "x.parquet")

    def test_what_is_missing_is_named_as_a_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        for name, package in (("parquet", "pyarrow"), ("zst", "zstandard")):
            file, content, _ = FORMATS[name]
            write(tmp_path / file, content)
            monkeypatch.setitem(sys.modules, package, None)
            with pytest.raises(SetupError, match=f"pip install {package}"):
                loaded(tmp_path / file)


def test_a_large_text_is_not_held_in_memory(tmp_path: Path) -> None:
    write(tmp_path / "x.txt", real_text(50_000))
    assert not isinstance(loaded(tmp_path / "x.txt").train.segments[0].tokens, np.ndarray)
    assert isinstance(
        batches.load(Data(source=str(tmp_path / "x.txt"), encoding="latin-1"), vocab=256, context=8)
        .train.segments[0]
        .tokens,
        np.ndarray,
    )
