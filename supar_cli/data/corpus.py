"""Which files a data section means, how they are split, and the hash that identifies their content."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from supar_cli.errors import InputError, SetupError
from supar_cli.files import naming_read_errors
from supar_cli.planning.plan import Data

DocumentT = TypeVar("DocumentT")

LLMC_MAGIC = 20240520  # llm.c, dev/data/data_common.py: first int32 of a shard's 256-int32 header
BYTES = 256  # the tokens of text that is read as bytes
_NOT_CORPUS = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idle_test"}
_VALIDATION = {"val", "valid", "validation"}
_SUFFIXES = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".bin": "bin"}


@dataclass(frozen=True)
class Corpus:
    """Files in a fixed order. With one file only, `validation` is empty and the tail of the file is held out."""

    kind: str
    root: Path
    train: list[Path]
    validation: list[Path]

    @property
    def files(self) -> list[Path]:
        return sorted([*self.train, *self.validation])


def find(data: Data) -> Corpus:
    """The corpus of a data section. Raises InputError when there is none at its path."""
    if data.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - _NOT_CORPUS)
            found += [Path(folder) / name for name in names if name.endswith(".py")]
        if not found:
            raise SetupError(f"data.source: stdlib: no Python sources under {root}; expected --data FILE")
        return Corpus("text", root, *_split(sorted(found), root))
    path = Path(data.source)
    if not os.path.exists(path):  # unlike Path.exists, False for an invalid file name
        raise InputError(f"data.source: {data.source}: no such file or folder")
    if path.is_file():
        return Corpus(_kind(path, data), path.parent, [path], [])
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _SUFFIXES and not p.name.startswith("."))
    if not found:
        raise InputError(f"data.source: {data.source}: no {', '.join(_SUFFIXES)} files in it")
    kinds = {_kind(p, data) for p in found}
    if len(kinds) > 1:
        what = f"holds files of several formats ({', '.join(sorted(kinds))}); expected data.format to choose one"
        raise InputError(f"data.source: {data.source}: {what}")
    held_out = [p for p in found if _VALIDATION & set(p.stem.lower().replace("-", "_").replace(".", "_").split("_"))]
    if held_out and len(held_out) < len(found):
        return Corpus(kinds.pop(), path, [p for p in found if p not in held_out], held_out)
    return Corpus(kinds.pop(), path, *_split(found, path))


def _kind(path: Path, data: Data) -> str:
    if data.format != "auto":
        return data.format
    kind = _SUFFIXES.get(path.suffix, "text")
    if kind != "bin":
        return kind
    with naming_read_errors(path), path.open("rb") as file:
        return "llmc" if int.from_bytes(file.read(4), "little") == LLMC_MAGIC else "nanogpt"


def _split(files: list[Path], root: Path) -> tuple[list[Path], list[Path]]:
    """About one file in twenty for validation, by the hash of its name, so that adding files moves no other."""
    if len(files) == 1:
        return files, []
    ranked = {path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest() for path in files}
    held_out = [path for path in files if ranked[path][0] < 13] or [min(files, key=lambda path: ranked[path])]
    train = [path for path in files if path not in set(held_out)]
    return (train, held_out) if train else (held_out, train)


def content_hash(corpus: Corpus, tokenizer: str = "bytes") -> str:
    """SHA-256 over names and contents, a tokenizer file's too. Raises SetupError when a file can't be read."""
    named = [(path.relative_to(corpus.root).as_posix(), path) for path in corpus.files]
    if tokenizer != "bytes" and corpus.kind in ("text", "jsonl"):
        named.append(("/tokenizer", Path(tokenizer)))  # no relative path begins with a slash
    total = hashlib.sha256()
    for name, path in named:
        with naming_read_errors(path), path.open("rb") as file:
            total.update(f"{name}\0".encode())
            total.update(hashlib.file_digest(file, "sha256").digest())
    return "sha256:" + total.hexdigest()


def identify(data: Data, corpus: Corpus | None = None) -> Data:
    """The data section with its hash filled in; `corpus` is its corpus if already found.

    Raises InputError if it has a hash that is not the content's.
    """
    if data.tokenizer != "bytes" and not os.path.isfile(data.tokenizer):
        raise InputError(f"data.tokenizer: {data.tokenizer}: no such file; expected `bytes` or a tokenizer.json")
    found = content_hash(corpus or find(data), data.tokenizer)
    if data.hash is not None and data.hash != found:
        why = " (the standard library's sources differ between Python versions)" if data.source == "stdlib" else ""
        what = f"{data.source} is not the data this document was made with"
        raise InputError(f"data.hash: {what}: {found[:19]}…, not {data.hash[:19]}…{why}")
    return data.model_copy(update={"hash": found})


def with_hash(document: DocumentT) -> DocumentT:
    """A document with the hash of its data filled in; an existing hash is kept. Raises InputError, SetupError."""
    found: Any = document
    check_vocabulary(found.data, getattr(found.model, "vocab", BYTES))
    return document if found.data.hash is not None else found.model_copy(update={"data": identify(found.data)})


def check_vocabulary(data: Data, vocab: int) -> None:
    """Raise InputError for a vocabulary that text read as bytes does not fit; data that are not here are not looked at."""
    is_here = data.source == "stdlib" or Path(data.source).exists()
    if vocab < BYTES and data.tokenizer == "bytes" and is_here and find(data).kind in ("text", "jsonl"):
        raise InputError(f"model.vocab: {vocab} is less than the {BYTES} tokens of the tokenizer 'bytes'")
