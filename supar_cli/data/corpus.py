"""Which files a data section means, how they are split, and the hash that identifies their content and how it is read."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from supar_cli.data import image_files
from supar_cli.data.formats import LLMC, SUFFIXES, TEXT_KINDS, kind_of, suffix_of
from supar_cli.data.splits import is_card, split_word
from supar_cli.errors import InputError, SetupError
from supar_cli.files import naming_read_errors
from supar_cli.planning.plan import Data

DocumentT = TypeVar("DocumentT")

READER = 2  # the edition of how files are read; where it gives the tokens of the first, the hash is that of the first
BYTES = 256  # the tokens of text that is read as bytes
_NOT_CORPUS = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idle_test"}
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "metadata.json")
_ABOUT = {  # files about data or models
    *(*_ABOUT_DATA, "state.json", "config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("generation_config.json", "merges.txt", "vocab.txt", "requirements.txt"),
}
_WEAK = {".md", ".py", ".json"}  # data only where nothing else is
NAMED = 3  # chosen: names of files in a message


@dataclass(frozen=True)
class Corpus:
    """Files in a fixed order. With one file only, `validation` is empty and the tail of the file is held out.

    `why` says how they were split, `left_out` why other files of the folder are no data.
    """

    kind: str
    root: Path
    train: list[Path]
    validation: list[Path]
    why: str = ""
    left_out: dict[Path, str] = field(default_factory=dict)
    is_packed: bool = False

    @property
    def files(self) -> list[Path]:
        return sorted([*self.train, *self.validation])

    @property
    def is_text(self) -> bool:
        """Whether a tokenizer reads the files; if not, they hold tokens."""
        return self.kind in TEXT_KINDS

    def names(self, files: list[Path]) -> list[str]:
        """The files' names below the root."""
        return [path.relative_to(self.root).as_posix() for path in files]

    def by_reason(self) -> dict[str, str]:
        """Some names of files that are left out, by the reason."""
        reasons = dict.fromkeys(self.left_out.values())
        return {why: _some(self.names([path for path, own in self.left_out.items() if own == why])) for why in reasons}

    def lines(self) -> list[str]:
        """What is trained on, what is held out, and what is neither."""
        held_out = f"{_some(self.names(self.validation))} ({self.why})" if self.validation else self.why
        found = [f"data: {self.kind}: training: {_some(self.names(self.train))}; validation: {held_out}"]
        return found + [f"data: left out: {names} ({why})" for why, names in self.by_reason().items()]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more files" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def find(data: Data, to_score: bool = False) -> Corpus:
    """The corpus of a data section; `to_score`: of the validation split that a folder names, else of its test split, else all.

    Raises InputError when there is none at its path, or a file that is not read.
    """
    if data.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - _NOT_CORPUS)
            found += [Path(folder) / name for name in names if name.endswith(".py")]
        if not found:
            raise SetupError(f"data.source: stdlib: no Python sources under {root}; expected --data FILE")
        return _split(Corpus("text", root, sorted(found), []))
    path = Path(os.path.expanduser(data.source))
    if not os.path.exists(path):  # unlike Path.exists, False for an invalid file name
        raise InputError(f"data.source: {data.source}: no such file or folder")
    if path.is_file():
        is_test = split_word(Path(path.name)) == "test"
        kind = kind_of(path, data)
        corpus = _split(Corpus(kind.name, path.parent, [path], [], is_packed=kind.is_packed))
        return replace(corpus, why=f"{corpus.why}; by its name it is a test split") if is_test else corpus
    if not path.is_dir():
        raise InputError(
            f"data.source: {data.source}: neither a file nor a folder; expected one, as it is read more than once"
        )
    files, left_out = _data_files(path, data, to_score)
    kinds = {one: kind_of(one, data) for one in files}
    names = sorted({kind.name for kind in kinds.values()})
    if len(names) > 1:
        what = f"holds files of several formats ({', '.join(names)}); expected data.format (--format) to choose one"
        raise InputError(f"data.source: {data.source}: {what}")
    corpus = Corpus(names[0] if names else "", path, files, [], "by their names", left_out)
    if not files:
        others = "".join(f"; {names}: {why}" for why, names in corpus.by_reason().items())
        expected = f"expected {', '.join(SUFFIXES)} files, or labelled images (`supar help vision`)"
        raise InputError(f"data.source: {data.source}: no data in it{others}; {expected}")
    corpus = replace(corpus, is_packed=any(kind.is_packed for kind in kinds.values()))
    held_out = [one for one in files if not to_score and split_word(one.relative_to(path)) == "validation"]
    if held_out == files:
        what = f"no training split, only one for validation ({_some(corpus.names(held_out))})"
        raise InputError(f"data.source: {data.source}: {what}; expected a training file, or one file as the source")
    if held_out:
        return replace(corpus, train=[one for one in files if one not in set(held_out)], validation=held_out)
    return _split(corpus)


def _data_files(root: Path, data: Data, to_score: bool) -> tuple[list[Path], dict[Path, str]]:
    """The files of a folder that are data, and why others are not."""
    files: dict[Path, str] = {}  # with their suffixes
    left_out: dict[Path, str] = {}

    def leave_out(paths: Iterable[Path], reason: str) -> None:
        for path in list(paths):
            left_out[path] = reason
            files.pop(path, None)

    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        leave_out((Path(folder, name) for name in folders if Path(folder, name).is_symlink()), "links to folders")
        files |= {Path(folder, name): suffix_of(Path(name))[0] for name in names if not name.startswith(".")}
    leave_out((path for path in files if path.exists() and not path.is_file()), "neither files nor folders")
    words = {path: split_word(path.relative_to(root)) for path in files}
    leave_out((path for path in files if _is_about(path)), "about data, such as a card or a licence")
    leave_out((path for path, suffix in files.items() if suffix not in SUFFIXES), "of no format that supar reads")
    kept = next((word for word in ("validation", "test") if to_score and word in map(words.get, files)), "")
    leave_out((path for path in files if kept and words[path] != kept), f"not of the {kept} split")
    leave_out((path for path in files if words[path] == "test" != kept), "a test split; it is never trained on")
    if data.format != "auto":
        suffix_kind = "bin" if data.format in ("nanogpt", "llmc") else data.format
        leave_out((path for path, suffix in files.items() if SUFFIXES[suffix] != suffix_kind), f"not {data.format}")
    for suffix in (".bin", ".npy"):
        if {"train", "validation"} <= {words[path] for path in files if files[path] == suffix}:
            leave_out((path for path in files if files[path] != suffix), "beside token files for both splits")
    strong = set(files.values()) - _WEAK
    weak = {".py", ".json"} if strong else {".py", ".md"} if ".json" in files.values() else set()
    weak |= {".md"} if strong - {".txt"} else set()
    leave_out((path for path in files if files[path] in weak), "beside data")
    return sorted(files), dict(sorted(left_out.items()))


def _is_about(path: Path) -> bool:
    """Whether a file is about data, by its name, or a cache that `datasets` keeps beside them."""
    name = path.name.lower()
    stem = name.split(".")[0] + ".json"
    is_about_data = is_card(path) or (stem in _ABOUT_DATA and suffix_of(path)[0] in SUFFIXES)
    return is_about_data or name in _ABOUT or (name.endswith(".arrow") and name.startswith(("cache-", "tmp")))


def _split(corpus: Corpus) -> Corpus:
    """About one file in twenty for validation, by the hash of its name, so that adding files moves no other."""
    files = corpus.train
    if len(files) == 1:
        return replace(corpus, why="the last tenth of the file")
    ranked = dict(zip(files, (hashlib.sha256(name.encode()).digest() for name in corpus.names(files)), strict=True))
    held_out = [path for path in files if ranked[path][0] < 13] or [min(files, key=lambda path: ranked[path])]
    train = [path for path in files if path not in set(held_out)]
    train, held_out = (train, held_out) if train else (held_out, train)
    return replace(corpus, train=train, validation=held_out, why="about one file in twenty, by the hash of its name")


def is_here(data: Data) -> bool:
    """Whether a source is on this machine."""
    return data.source == "stdlib" or os.path.exists(os.path.expanduser(data.source))


def tokenizer_file(data: Data) -> Path:
    """The tokenizer.json that a data section names, itself or by its folder. Raises InputError where there is none."""
    path = os.path.expanduser(data.tokenizer)
    path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(path):
        what = "expected `bytes`, a tokenizer.json, or a folder with one, as save_pretrained writes it"
        raise InputError(f"data.tokenizer: {path}: no such file; {what}")
    return Path(path)


def content_hash(corpus: Corpus, tokenizer: Path | None = None, reading: dict[str, Any] | None = None) -> str:
    """SHA-256 over names and contents, a tokenizer file's too, and over `reading` where it is not that of the first reader.

    Raises SetupError when a file can't be read.
    """
    named = list(zip(corpus.names(corpus.files), corpus.files, strict=True))
    if tokenizer is not None and corpus.is_text:
        named.append(("/tokenizer", tokenizer))  # no relative path begins with a slash
    total = hashlib.sha256()
    if reading:
        total.update(f"reader {READER}: {json.dumps(reading, sort_keys=True)}\0".encode())
    for name, path in named:
        with naming_read_errors(path), path.open("rb") as file:
            total.update(f"{name}\0".encode())
            total.update(hashlib.file_digest(file, "sha256").digest())
    return "sha256:" + total.hexdigest()


def _reading(data: Data, corpus: Corpus, before: Corpus | None) -> dict[str, Any]:
    """How a corpus is read, as far as that makes other tokens of its files than the first reader did."""
    found: dict[str, Any] = {}
    if corpus.is_text:
        encoding = codecs.lookup(data.encoding).name
        found |= {"encoding": encoding} if encoding != "utf-8" else {}
        found |= {"separator": data.separator} if data.separator is not None else {}
        found |= {"tokenizer": "vocabulary"} if data.tokenizer != "bytes" else {}
        found |= {"field": data.field} if corpus.kind != "text" and data.field != "text" else {}
    elif data.dtype == "uint32":
        found["dtype"] = data.dtype
    same = before and (before.kind, before.train, before.validation) == (corpus.kind, corpus.train, corpus.validation)
    # its hash did not cover the format, so that auto's is the one it had
    if data.format != "auto" and data.source != "stdlib":
        usual = _first_reader(data.model_copy(update={"format": "auto"}))
        same = same and usual is not None and usual.kind == corpus.kind
    if not same or corpus.is_packed:
        splits = {name: corpus.names(getattr(corpus, name)) for name in ("train", "validation")}
        found |= {"kind": corpus.kind, **splits}
    return found


def _first_reader(data: Data) -> Corpus | None:
    """The corpus that supar's first reader found, which knew a file by its suffix and one split word in its stem."""
    suffixes = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".bin": "bin"}
    path = Path(os.path.expanduser(data.source))

    def kind_of(one: Path) -> str:
        kind = suffixes.get(one.suffix, "text") if data.format == "auto" else data.format
        if kind != "bin":
            return kind
        with naming_read_errors(one), one.open("rb") as file:
            return "llmc" if LLMC.get(int.from_bytes(file.read(4), "little")) == (1, "<u2") else "nanogpt"

    if path.is_file():
        return Corpus(kind_of(path), path.parent, [path], [])
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in suffixes and not p.name.startswith("."))
    kinds = {kind_of(one) for one in files}
    if len(kinds) != 1:
        return None
    (kind,) = kinds
    words = {one: set(one.stem.lower().replace("-", "_").replace(".", "_").split("_")) for one in files}
    held_out = [one for one in files if words[one] & {"val", "valid", "validation"}]
    if held_out and len(held_out) < len(files):
        return Corpus(kind, path, [one for one in files if one not in held_out], held_out)
    return _split(Corpus(kind, path, files, []))


def identify(data: Data, corpus: Corpus | None = None) -> Data:
    """The data section with its hash filled in; `corpus` is its corpus if already found.

    Raises InputError if it has a hash that is not the content's, or that of a reading which gave other tokens.
    """
    if data.kind == "images":
        return image_files.identify(data)
    if data.sources:
        return identify_mixture(data, [identify(part) for _, part in parts(data)])
    tokenizer = tokenizer_file(data) if data.tokenizer != "bytes" else None
    corpus = corpus or find(data)
    before = corpus if data.source == "stdlib" else _first_reader(data)
    reading = _reading(data, corpus, before)
    found = content_hash(corpus, tokenizer, reading)
    if data.hash in (None, found):
        return data.model_copy(update={"hash": found})
    if reading and before is not None and data.hash == content_hash(before, tokenizer):
        if reading.keys() == {"field"}:  # the same tokens, before the hash covered where their text is
            return data
        read = "its files otherwise" if data.format == "auto" else f"its files as {corpus.kind}"
        read = "the text alone, without what tokenizer.json adds or cuts for inference" if tokenizer else read
        remedy = "expected a document made anew, or `-s data.hash=null` to take the tokens as they are now"
        raise InputError(f"data.hash: {data.source}: supar now reads {read}, which gives other tokens; {remedy}")
    why = " (the standard library's sources differ between Python versions)" if data.source == "stdlib" else ""
    more = f", or the tokenizer {tokenizer} or the way of reading it has changed," if tokenizer else ""
    what = f"{data.source}{more} is not the data this document was made with"
    raise InputError(f"data.hash: {what}: {found[:19]}…, not {data.hash[:19]}…{why}")


def parts(data: Data) -> list[tuple[float, Data]]:
    """The weight and the data section of each source of a mixture."""
    shared: dict[str, Any] = {"tokenizer": data.tokenizer, "separator": data.separator}
    return [(one.weight, Data(**shared, **one.model_dump(exclude=("weight",)))) for one in data.sources]


def identify_mixture(data: Data, found: list[Data]) -> Data:
    """A mixture with the hashes of its sources, which are identified, and its own. Raises InputError as `identify`."""
    sources = [one.model_copy(update={"hash": part.hash}) for one, part in zip(data.sources, found, strict=True)]
    text = json.dumps([[one.weight, one.hash] for one in sources])
    total = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    if data.hash not in (None, total):
        raise InputError(
            f"data.hash: the sources are not those this document was made with: {total[:19]}…, not {data.hash[:19]}…"
        )
    return data.model_copy(update={"sources": sources, "hash": total})


def with_hash(document: DocumentT, log: Callable[[str], None] = lambda _: None) -> DocumentT:
    """A document with the hash of its data filled in, or that of an own model's layout; an existing hash is kept.

    `log` is told of the files and the split. Raises InputError, SetupError.
    """
    found: Any = document
    if found.data is None:  # an own model's training script reads its own
        shape = getattr(found.model, "with_hash", None)
        return found.model_copy(update={"model": shape()}) if shape else document  # type: ignore[no-any-return]
    if found.data.kind == "images":
        return found.model_copy(update={"data": image_files.with_hash(found.data, log)})  # type: ignore[no-any-return]
    check_vocabulary(found.data, getattr(found.model, "vocab", BYTES))
    if found.data.hash is not None:
        return document
    sources = [part for _, part in parts(found.data)] or [found.data]
    corpora = [find(part) for part in sources]
    for part, one in zip(sources, corpora, strict=True):
        for line in one.lines() if part.source != "stdlib" else ():
            log(line)
    own = None if found.data.sources else corpora[0]
    return found.model_copy(update={"data": identify(found.data, own)})  # type: ignore[no-any-return]


def check_vocabulary(data: Data, vocab: int) -> None:
    """Raise InputError for a vocabulary that text read as bytes does not fit; data that are not here are not looked at."""
    for _, part in parts(data) or [(1.0, data)]:
        if vocab < BYTES and part.tokenizer == "bytes" and is_here(part) and find(part).is_text:
            raise InputError(f"model.vocab: {vocab} is less than the {BYTES} tokens of the tokenizer 'bytes'")
