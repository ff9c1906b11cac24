"""Which files a data section of images means, how they are split, and the hash that identifies content and reading."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from supar_cli.errors import InputError, SetupError
from supar_cli.files import naming_read_errors
from supar_cli.planning.plan import DIGITS, Data

READER = 1  # the edition of how images are read


@dataclass(frozen=True)
class ImageFiles:
    """Files of images in a fixed order. Where `held_out` is empty, a tenth of each class is held out."""

    kind: str
    root: Path
    train: list[Path]
    held_out: list[Path] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What is trained on and what is held out."""
        held_out = f"{len(self.held_out)} files" if self.held_out else "the last tenth of each class"
        return [f"data: {self.kind}: training: {len(self.train)} files; held out: {held_out}"]


def find(data: Data) -> ImageFiles:
    """The files of a data section. Raises InputError where there are none, SetupError without scikit-learn's digits."""
    if data.source == DIGITS:
        found = importlib.util.find_spec("sklearn")
        file = Path(found.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if found else None
        if file is None or not file.is_file():
            raise SetupError("data.source: digits are inside scikit-learn; expected it: pip install scikit-learn")
        return ImageFiles(DIGITS, file.parent, [file])
    raise InputError(f"data.source: {data.source}: expected {DIGITS}")


def identify(data: Data, files: ImageFiles | None = None) -> Data:
    """The data section with its hash filled in. Raises InputError if it has one that is not the content's."""
    files = files or find(data)
    total = hashlib.sha256()
    reading = {"size": data.size, "image": data.image, "label": data.label, "kind": files.kind}
    total.update(f"images {READER}: {json.dumps(reading, sort_keys=True)}\0".encode())
    for split, paths in (("train", files.train), ("held out", files.held_out)):
        for path in paths:
            with naming_read_errors(path), path.open("rb") as file:
                total.update(f"{split}: {path.relative_to(files.root).as_posix()}\0".encode())
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
