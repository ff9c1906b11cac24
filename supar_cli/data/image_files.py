"""Which files a data section of images means, how they are split, and the hash that identifies content and reading."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from supar_cli.data.formats import name_of, naming_damage, open_bytes
from supar_cli.data.splits import SPLITS, is_card, split_word, words_of
from supar_cli.errors import InputError, SetupError
from supar_cli.files import naming_read_errors
from supar_cli.planning.plan import DIGITS, Data

Kind = Literal["digits", "npz", "idx", "parquet", "folders"]

READER = 1  # the edition of how images are read
NAMED = 3  # chosen: names of files in a message
HEAD_BYTES = 264  # chosen: what tells formats apart, up to the mark of a tar archive
ZIP, PARQUET = b"PK\x03\x04", b"PAR1"
IDX = {b"\0\0\x08\x03": "images", b"\0\0\x08\x01": "labels"}  # bytes along three axes, along one
SOURCES = "expected digits, a folder of classes, idx or Parquet files, or an .npz file (`supar help vision`)"
_OF_SYSTEMS = ("thumbs.db", "desktop.ini")  # besides hidden files


@dataclass(frozen=True)
class ImageFiles:
    """Files of images by split, in a fixed order: `train`, `validation`, `test`.

    `held_out` is the split that is held out; empty: the last tenth of each class of `train`. `scored` is the only split that
    is read, where images are to be scored. `classes` are the names of folders, where these are the classes. `left_out` says
    why other files are no data.
    """

    kind: Kind
    root: Path
    by_split: dict[str, list[Path]]
    held_out: str = ""
    scored: str = ""
    classes: list[str] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)
    depth: int = 1

    def class_of(self, path: Path) -> str:
        """The name of the folder that is an image's class, as many folders below the root as `depth` says."""
        return path.relative_to(self.root).parts[self.depth - 1]

    @property
    def splits(self) -> list[str]:
        """The splits that are read: what is trained on, and what is held out if that is one of its own; or what is scored."""
        if self.scored:
            return [self.scored]
        return ["train", self.held_out] if self.held_out else ["train"]

    def lines(self) -> list[str]:
        """What is trained on, what is held out, and what is neither."""
        held_out = self._describe(self.held_out) if self.held_out else "the last tenth of each class"
        found = [f"data: {self.kind}: training: {self._describe('train')}; held out: {held_out}"]
        name = Path(self.by_split["train"][0].name)
        is_alone = len(self.by_split["train"]) == 1 and self.kind in ("npz", "parquet")
        if is_alone and split_word(name) in ("test", "validation"):
            found[0] += f"; by its name {name} is a {split_word(name)} split"
        others = {f"the {name} split": "it is never trained on" for name in self.by_split if name not in self.splits}
        for why in dict.fromkeys(self.left_out.values()):
            paths = [path for path, own in self.left_out.items() if own == why]
            more = f" and {len(paths) - NAMED} more files" if len(paths) > NAMED else ""
            others[", ".join(path.relative_to(self.root).as_posix() for path in paths[:NAMED]) + more] = why
        return found + [f"data: left out: {names} ({why})" for names, why in others.items()]

    def _describe(self, split: str) -> str:
        count = len(self.by_split[split])
        return f"the {split} split" + (f", {count} files" if count > 1 else "")


def find(data: Data, to_score: bool = False) -> ImageFiles:
    """The files of a data section; `to_score`: of its validation split, else of its test split, else all.

    Raises InputError where there are none or a file is another than its place says, SetupError for damaged ones and
    without scikit-learn's digits.
    """
    if data.source == DIGITS:
        package = importlib.util.find_spec("sklearn")
        file = Path(package.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if package else None
        if file is None or not file.is_file():
            raise SetupError("data.source: digits are inside scikit-learn; expected it: pip install scikit-learn")
        found = ImageFiles("digits", file.parent, {"train": [file]})
    else:
        path = Path(os.path.expanduser(data.source))
        if not os.path.exists(path):  # unlike Path.exists, False for an invalid file name
            raise InputError(f"data.source: {data.source}: no such file or folder; {SOURCES}")
        found = _find_in_folder(path) if path.is_dir() else _find_in_file(path)
    for key in ("image", "label"):
        if found.kind != "parquet" and vars(data)[key] is not None:
            raise InputError(f"data.{key}: is a column of Parquet files, not of {found.kind}; expected no such key")
    if to_score:
        scored = next(split for split in ("validation", "test", "train") if found.by_split.get(split))
        names = {found.class_of(path) for path in found.by_split[scored]} if found.kind == "folders" else set[str]()
        return replace(found, scored=scored, classes=sorted(names))
    if not found.by_split.get("train"):
        others = ", ".join(found.by_split) or "none"
        raise InputError(f"data.source: {data.source}: no training split ({others}); expected one, such as train/")
    return replace(found, held_out="validation" if found.by_split.get("validation") else "")


def _find_in_file(path: Path) -> ImageFiles:
    head = _read_head(path)
    if head.startswith(PARQUET):
        return ImageFiles("parquet", path.parent, {"train": [path]})
    if head[:4] in IDX:
        what = f"is an idx file of {IDX[head[:4]]}"
        raise InputError(f"{path}: {what}; expected the folder that holds those of images and of labels")
    if not head.startswith(ZIP):
        raise InputError(f"{path}: is {name_of(head)}; {SOURCES}")
    with naming_damage(path):
        try:
            names = zipfile.ZipFile(path).namelist()
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise EOFError(str(error)) from None
    splits = {split: [path] for split in dict.fromkeys(SPLITS.values()) if array_names(names, split, path)}
    if not splits:
        what = f"holds {', '.join(names[: 2 * NAMED])}"
        raise InputError(f"{path}: {what}; expected the arrays x and y (and x_val, y_val, x_test, y_test)")
    return ImageFiles("npz", path.parent, splits)


def array_names(names: Iterable[str], split: str, path: Path) -> tuple[str, str] | None:
    """The names of the arrays of images and of labels of a split in an .npz file: x and y, x_train and y_train, x_val, …

    Raises InputError for one without the other, and for two of a kind.
    """
    found: dict[str, str] = {}
    for name in (one.removesuffix(".npy") for one in names):
        part, _, word = name.partition("_")
        if part in ("x", "y") and SPLITS.get(word, "" if word else "train") == split:
            if part in found:
                raise InputError(
                    f"{path}: {found[part]} and {name} are both of the {split} split; expected one of them"
                )
            found[part] = name
    if len(found) == 1:
        (name,) = found.values()
        raise InputError(f"{path}: {name} is there alone; expected an array of images, x…, and one of labels, y…")
    return (found["x"], found["y"]) if found else None


def _find_in_folder(root: Path) -> ImageFiles:
    files, left_out = _walk(root, root)
    idx = [path for path in files if {"idx", "ubyte"} <= set(words_of(path.name))]
    tables = [path for path in files if path.suffix.lower() == ".parquet"]
    if idx or tables:
        chosen = idx or tables
        left_out |= dict.fromkeys((path for path in files if path not in set(chosen)), "beside the data")
        found: dict[str, list[Path]] = {}
        for path in chosen:
            split = "test" if idx and path.name.startswith("t10k") else split_word(path.relative_to(root)) or "train"
            found.setdefault(split, []).append(path)
        for split, paths in found.items():
            if idx:
                found[split] = _idx_pair(split, paths)
            else:
                _require_parquet(paths)
        return ImageFiles("idx" if idx else "parquet", root, found, left_out=left_out)
    if arrays := [path for path in files if path.suffix.lower() == ".npz"]:
        raise InputError(f"data.source: {root}: holds {arrays[0].name}; expected that file as the source")
    return _find_classes(root, files, left_out)


def _walk(root: Path, top: Path) -> tuple[list[Path], dict[Path, str]]:
    """All files below a folder that may be data, sorted, and why others are not."""
    found: list[Path] = []
    left_out: dict[Path, str] = {}
    for folder, folders, names in os.walk(top, followlinks=True):
        if len(Path(folder).relative_to(root).parts) > 8:
            raise InputError(f"{folder}: folders more than 8 deep; expected the folder of the data (or no link to one)")
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or name.lower() in _OF_SYSTEMS:
                left_out[path] = "hidden, or of the system"
            elif is_card(path) or not path.is_file():
                left_out[path] = "about data, such as a card or a licence" if path.is_file() else "no file"
            else:
                found.append(path)
    return sorted(found), left_out


def _find_classes(root: Path, files: list[Path], left_out: dict[Path, str]) -> ImageFiles:
    """A folder for each class, below a folder for each split if a folder is called as splits are."""
    has_splits = any(name.lower() in SPLITS for name in _folders(root))
    depth = 2 if has_splits else 1
    found: dict[str, list[Path]] = {}
    for path in files:
        parts = path.relative_to(root).parts
        split = SPLITS.get(parts[0].lower(), "") if has_splits else "train"
        if len(parts) <= depth or not split:
            left_out[path] = "in no class's folder" if split else "in the folder of no split"
        else:
            found.setdefault(split, []).append(path)
    if not found:
        what = "no files in folders of classes" + (", below train/, val/ and test/" if has_splits else "")
        raise InputError(f"data.source: {root}: {what}; {SOURCES}")
    if not has_splits and any(split_word(Path(name)) == "train" for name in _folders(root)):
        names = [name for name in _folders(root) if split_word(Path(name))]
        if len(names) == len(_folders(root)):
            what = f"{', '.join(names[:NAMED])} look like splits"
            raise InputError(f"data.source: {root}: {what}; expected them called train, val and test")
    made = ImageFiles("folders", root, found, left_out=left_out, depth=depth)
    used = {made.class_of(path) for path in found.get("train", ())}
    for top in (
        (root / name for name in _folders(root) if SPLITS.get(name.lower()) == "train") if has_splits else [root]
    ):
        for name in _folders(top):
            if name not in used:
                raise InputError(f"{top / name}: no image of this class; expected one or more, or no such folder")
            if "\ufffd" in name.encode(errors="surrogateescape").decode(errors="replace"):
                raise InputError(f"{top / name}: the name of this class is not in UTF-8; expected another name")
    return replace(made, classes=sorted(used))


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _idx_pair(split: str, paths: list[Path]) -> list[Path]:
    """The file of images and that of labels."""
    found: dict[str, Path] = {}
    for path in paths:
        kind = IDX.get(_read_head(path)[:4])
        named = next((word for word in IDX.values() if word in words_of(path.name)), "images or labels")
        if kind != named:
            what = f"is {f'an idx file of {kind}' if kind else name_of(_read_head(path))}"
            raise InputError(f"{path}: {what}; expected an idx file of {named}, of bytes")
        if kind in found:
            raise InputError(f"{path}: a second file of {kind} of the {split} split, beside {found[kind].name}")
        found[kind] = path
    if missing := set(IDX.values()) - found.keys():
        raise InputError(f"{paths[0]}: the {split} split has no {missing.pop()}; expected an idx file of each")
    return [found["images"], found["labels"]]


def _require_parquet(paths: list[Path]) -> None:
    for path in paths:
        if not (head := _read_head(path)).startswith(PARQUET):
            raise InputError(f"{path}: is {name_of(head)}; expected Parquet")


def _read_head(path: Path) -> bytes:
    """The first bytes of a file, unpacked."""
    with naming_damage(path), open_bytes(path) as file:
        return file.read(HEAD_BYTES)


def identify(data: Data, files: ImageFiles | None = None) -> Data:
    """The data section with its hash filled in. Raises InputError if it has one that is not the content's."""
    files = files or find(data)
    total = hashlib.sha256()
    reading = {"size": data.size, "image": data.image, "label": data.label, "kind": files.kind}
    total.update(f"images {READER}: {json.dumps(reading, sort_keys=True)}\0".encode())
    for split in files.splits:
        for path in files.by_split[split]:
            with naming_read_errors(path), path.open("rb") as file:
                name = "train" if split == "train" else "held out"
                total.update(os.fsencode(f"{name}: {path.relative_to(files.root).as_posix()}\0"))
                total.update(hashlib.file_digest(file, "sha256").digest())
    found = "sha256:" + total.hexdigest()
    if data.hash not in (None, found):
        what = f"{data.source} is not the data this document was made with"
        raise InputError(f"data.hash: {what}: {found[:19]}…, not {data.hash[:19]}…")
    return data.model_copy(update={"hash": found})


def with_hash(data: Data, log: Callable[[str], None]) -> Data:
    """The data section with the hash it has, or else that of its files, of which `log` is told."""
    if data.hash is not None:
        return data
    files = find(data)
    for line in files.lines():
        log(line)
    return identify(data, files)
