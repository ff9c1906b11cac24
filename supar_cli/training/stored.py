"""Reading a checkpoint's files: a manifest whose hashes fit, and tensors that are whole in the files it names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from supar_cli.errors import InputError, SetupError
from supar_cli.files import file_hash
from supar_cli.planning import document
from supar_cli.training.distributed import Ranks

KIND = "supar.checkpoint/v3"
OLDER = {"supar.checkpoint/v1", "supar.checkpoint/v2"}  # with zeros where dead; with one hash, and of no other file
State = dict[str, torch.Tensor]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as it was written. Raises SetupError."""
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
        if manifest["kind"] in OLDER:
            raise SetupError(f"{path}: a checkpoint of an older version ({manifest['kind']}); expected {KIND}")
        if manifest["kind"] != KIND:
            raise ValueError(manifest["kind"])
        if manifest.pop("hash") != document.content_hash(manifest):
            raise ValueError("hash")
        for key, kind in (("step", int), ("plan", str), ("data", str), ("masks", dict), ("files", dict)):
            if type(manifest[key]) is not kind:
                raise ValueError(key)
        if path.name != f"step-{manifest['step']:08d}" or not (manifest["plan"] + manifest["data"]).isprintable():
            raise ValueError("step")
        if any(Path(name).name != name for name in manifest["files"]):  # outside of the folder
            raise ValueError("files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SetupError(
            f"{path / 'manifest.json'}: a corrupt checkpoint manifest; delete the folder to use the one before"
        ) from None
    return dict(manifest)


def verify(path: Path, manifest: dict[str, Any], ranks: Ranks) -> None:
    """Raise SetupError, naming the file, where one is not what was written; the processes of a ranks share them out."""
    _refuse_others(path, manifest["files"])
    for name in sorted(manifest["files"])[ranks.rank :: ranks.size]:
        with _reading(path / name):
            if not (path / name).is_file():
                raise SafetensorError("it is not there")
            if file_hash(path / name) != manifest["files"][name]:
                raise SafetensorError("its content is not what was written")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raises SetupError that names the file where what is inside can't read it."""
    try:
        yield
    except SetupError:
        raise
    except (Exception, CheckpointException) as error:  # whatever the readers raise of headers that nobody wrote
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SetupError(f"{file}: a corrupt checkpoint: {text}; delete its folder to use the one before") from None


class Stored:
    """The tensors of a checkpoint's files: `shapes` by key, and `read` to fill tensors, plain or in shards, with them."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self._path = path
        for name in manifest["files"]:
            if name.endswith(".safetensors"):
                with _reading(path / name), safe_open(path / name, framework="pt"):
                    pass
        self._reader = HuggingFaceStorageReader(str(path))
        with _reading(path):
            found: dict[str, Any] = dict(self._reader.read_metadata().state_dict_metadata)
            for key, entry in found.items():  # the reader leaves as it was what no file holds
                if not _are_whole(entry):
                    raise SafetensorError(f"parts of {key} are missing or there twice")
            self.shapes = {key: tuple(entry.size) for key, entry in found.items()}

    def read(self, targets: State) -> None:
        """Fill each tensor from its key. Raises InputError where that is not there or has another shape."""
        for key, tensor in targets.items():
            if self.shapes.get(key) != tuple(tensor.shape):
                raise InputError(f"{self._path}: {key} is missing or has another shape than {tuple(tensor.shape)}")
        with _reading(self._path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself
            state_dict_loader.load(targets, storage_reader=self._reader, no_dist=True)


def _refuse_others(path: Path, files: Collection[str]) -> None:
    """Raise SetupError where a folder holds tensors in another file: they would be read with the others."""
    others = sorted({file.name for file in path.glob("*.safetensors")} - set(files))
    if others:
        raise SetupError(f"{path / others[0]}: is no part of the checkpoint; delete it")


def _are_whole(stored: Any) -> bool:
    """Whether the parts of a stored tensor, some rows each, follow one on the other from its first row to its last.

    `stored` is torch's metadata of it. Its reader leaves as they were rows that are in no file.
    """
    if not stored.size:
        return len(stored.chunks) == 1
    row, rest = 0, [0] * (len(stored.size) - 1)
    for chunk in sorted(stored.chunks, key=lambda chunk: (*chunk.offsets, *chunk.sizes)):
        if list(chunk.offsets) != [row, *rest] or chunk.sizes[1:] != stored.size[1:]:
            return False
        row += chunk.sizes[0]
    return row == int(stored.size[0])
