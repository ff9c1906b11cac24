"""Reading a checkpoint's files: a manifest whose hashes fit, and tensors that are whole in the files it names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator, Mapping
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
from supar_cli.planning.plan import Plan
from supar_cli.sparse.masks import Mask
from supar_cli.training.distributed import Ranks
from supar_cli.training.state import State

KIND = "supar.checkpoint/v3"
OLDER = {"supar.checkpoint/v1", "supar.checkpoint/v2"}  # with zeros where dead; with one hash, and of no other file
Tensors = dict[str, torch.Tensor]


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
    """Raise SetupError, naming the file, where one is not what was written. Each rank looks at its share of the files."""
    _refuse_others(path, manifest["files"])
    for name in sorted(manifest["files"])[ranks.rank :: ranks.size]:
        with _naming_read_errors(path / name):
            if not (path / name).is_file():
                raise SafetensorError("it is missing")
            if file_hash(path / name) != manifest["files"][name]:
                raise SafetensorError("its content is not what was written")


@contextmanager
def _naming_read_errors(file: Path) -> Iterator[None]:
    """Raise SetupError that names the file where what is inside can't read it."""
    try:
        yield
    except SetupError:
        raise
    except (Exception, CheckpointException) as error:  # whatever the readers raise of headers that nobody wrote
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SetupError(f"{file}: a corrupt checkpoint: {text}; delete its folder to use the one before") from None


class CheckpointReader:
    """The tensors of a checkpoint's files, after `step` steps: `shapes` by key, and what fills a run's state with them."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.step, self._fingerprints = path, int(manifest["step"]), manifest["masks"]
        for name in manifest["files"]:
            if name.endswith(".safetensors"):
                with _naming_read_errors(path / name), safe_open(path / name, framework="pt"):
                    pass
        self._reader = HuggingFaceStorageReader(str(path))
        with _naming_read_errors(path):
            found: dict[str, Any] = dict(self._reader.read_metadata().state_dict_metadata)
            for key, entry in found.items():  # the reader leaves as it was what no file holds
                if not _are_whole(entry):
                    raise SafetensorError(f"parts of {key} are missing or appear twice")
            self.shapes = {key: tuple(entry.size) for key, entry in found.items()}

    def read(self, targets: Tensors) -> None:
        """Fill each tensor, whole or a shard, from its key. Raises InputError where that is missing or of another shape."""
        for key, tensor in targets.items():
            if self.shapes.get(key) != tuple(tensor.shape):
                raise InputError(f"{self.path}: {key} is missing or has another shape than {tuple(tensor.shape)}")
        with _naming_read_errors(self.path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself
            state_dict_loader.load(targets, storage_reader=self._reader, no_dist=True)

    def masks(self, plan: Plan) -> dict[str, Mask]:
        """The masks by name. Raises SetupError where they are none of tensors of the plan's shapes."""
        rows = {row.name: row for row in plan.tensors if f"mask/{row.name}" in self.shapes}
        bits = {f"mask/{row.name}": torch.zeros((row.size + 7) // 8, dtype=torch.uint8) for row in rows.values()}
        self.read(bits)
        found = {}
        for name, row in rows.items():
            with _naming_read_errors(self.path):
                found[name] = Mask(tuple(row.shape), bits[f"mask/{name}"].numpy())
        if self._fingerprints != {name: mask.fingerprint for name, mask in found.items()}:
            raise SetupError(f"{self.path}: a corrupt checkpoint: its masks are not those of its manifest")
        return found

    def require_masks(self, masks: Mapping[str, Mask]) -> None:
        """Raise InputError, naming the tensor, unless the checkpoint has these masks, which a plan draws, and no others."""
        stored = {
            f"mask/{name}": torch.zeros(mask.bits.shape, dtype=torch.uint8)
            for name, mask in masks.items()
            if self.shapes.get(f"mask/{name}") == mask.bits.shape
        }
        self.read(stored)
        for name, mask in masks.items():
            bits = stored.get(f"mask/{name}")
            is_same = bits is not None and torch.equal(bits, torch.from_numpy(mask.bits))
            if not is_same or self._fingerprints.get(name) != mask.fingerprint:
                raise InputError(f"{self.path}: the mask of {name} is not the one this plan draws")
        if extra := set(self._fingerprints) - set(masks):
            raise InputError(f"{self.path}: has a mask for {sorted(extra)[0]}, which is dense in this plan")

    def fill(self, state: State) -> None:
        """Fill a state's values and moments, which have the masks of the checkpoint, in place.

        Raises InputError for tensors of other shapes, SetupError where counters are not of the checkpoint's step.
        """
        self.read(keyed(state))
        counters = [float(moments["step"]) for moments in state.moments.values() if "step" in moments]
        if any(counter != self.step for counter in counters):
            raise SetupError(f"{self.path}: a corrupt checkpoint: its tensors are not those of step {self.step}")


def keyed(state: State) -> Tensors:
    """A state's values and moments by the keys that a checkpoint has for them."""
    found = {f"weight/{name}": value for name, value in state.values.items()}
    for name, moments in state.moments.items():
        found |= {f"optimizer/{name}/{key}": moment for key, moment in moments.items()}
    return found


def _refuse_others(path: Path, files: Collection[str]) -> None:
    """Raise SetupError where a folder holds tensors in another file: they would be read with the others."""
    others = sorted({file.name for file in path.glob("*.safetensors")} - set(files))
    if others:
        raise SetupError(f"{path / others[0]}: is not part of the checkpoint; delete it")


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
