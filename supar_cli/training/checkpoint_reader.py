"""Reading checkpoints: find them, verify their files and load their tensors. Nothing is unpickled."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import api, hf_storage, state_dict_loader

from supar_cli.errors import InputError, SetupError
from supar_cli.files import file_hash
from supar_cli.planning import document
from supar_cli.planning.plan import Plan, read_plan
from supar_cli.sparse.masks import Mask
from supar_cli.training.distributed import ALONE, Ranks
from supar_cli.training.prepare import to_dense
from supar_cli.training.state import State

KIND = "supar.checkpoint/v3"
# v1 stored zeros for dead weights; v2 had a hash of one file only
OLDER = {"supar.checkpoint/v1", "supar.checkpoint/v2"}
Tensors = dict[str, torch.Tensor]


def available(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "manifest.json").is_file())


def load(path: Path, plan: Plan, data_hash: str, ranks: Ranks) -> CheckpointReader:
    """Open a checkpoint of this plan and these data.

    All ranks call it, and any number of ranks may have written it. Raises InputError for another plan or other data,
    SetupError if the checkpoint is corrupt.
    """
    reader = CheckpointReader(path, ranks)
    wanted = {"plan": plan.hash(), "data": data_hash}
    for key, what in (("plan", "belongs to another plan"), ("data", "was trained on other data")):
        if reader.manifest[key] != wanted[key]:
            raise InputError(f"{path}: {what} ({reader.manifest[key][:19]}…); expected {wanted[key][:19]}…")
    if not 0 < reader.step <= plan.train.steps:
        raise SetupError(f"{path}: a corrupt checkpoint: the plan has no step {reader.step}")
    return reader


def read_values(path: Path) -> tuple[Plan, State]:
    """The plan of a checkpoint, and its masks and values without moments. Raises InputError or SetupError."""
    reader, plan = CheckpointReader(path), read_plan(path / "plan.yaml")
    state = State.zeros(reader.step, plan, reader.masks(plan))
    reader.fill(state)
    return plan, state


def weights(path: Path) -> Tensors:
    """A checkpoint's tensors by the plan's names and in its shapes, dead weights zero. Raises InputError or SetupError."""
    _, state = read_values(path)
    return {name: to_dense(value, state.masks.get(name)) for name, value in state.values.items()}


def weights_of_run(directory: str | Path) -> Tensors:
    """The tensors of a run's newest checkpoint by the plan's names and in its shapes, float32, dead weights zero.

    `directory` may be one of its checkpoints, too. Raises InputError if there is none, SetupError if it is corrupt.
    """
    return weights(find(Path(directory)))


def find(path: Path) -> Path:
    """The checkpoint at a path, or the newest one of the run directory there. Raises InputError where there is none."""
    return path if (path / "manifest.json").is_file() else newest(path)


def newest(directory: Path) -> Path:
    """A run's newest checkpoint. Raises InputError if it has none."""
    found = available(directory / "checkpoints")
    if not found:
        what = "has no checkpoint" if directory.exists() else "no such folder"
        raise InputError(f"{directory}: {what}; expected a run directory with a checkpoint")
    return found[-1]


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check its hash and its fields. Raises SetupError."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text("utf-8"))
        if manifest["kind"] in OLDER:
            raise SetupError(f"{path}: a checkpoint of an older version ({manifest['kind']}); expected {KIND}")
        fields = {"kind": str, "step": int, "plan": str, "data": str, "masks": dict, "files": dict}
        if (
            manifest.pop("hash") != document.content_hash(manifest)
            or manifest["kind"] != KIND
            or any(type(manifest[key]) is not kind for key, kind in fields.items())
            or path.name != f"step-{manifest['step']:08d}"
            or not (manifest["plan"] + manifest["data"]).isprintable()
            or any(Path(name).name != name for name in manifest["files"])  # a path out of the folder
        ):
            raise ValueError("not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = "a corrupt checkpoint manifest; expected an intact one (delete the folder to continue from the previous checkpoint)"
        raise SetupError(f"{path / 'manifest.json'}: {what}") from None
    return manifest


@contextmanager
def _naming_read_errors(file: Path) -> Iterator[None]:
    """Turn a failure to read into a SetupError that names the file."""
    try:
        yield
    except SetupError:
        raise
    except (Exception, api.CheckpointException) as error:  # the readers raise anything for a broken header
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SetupError(
            f"{file}: a corrupt checkpoint: {text}; expected an intact one (delete its folder to continue from the previous checkpoint)"
        ) from None


class CheckpointReader:
    """The verified files of a checkpoint written after `step` steps. `shapes` are those of its tensors by key.

    Raises SetupError that names the file which is not what the manifest says.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path, self.manifest = path, read_manifest(path)
        self.step: int = self.manifest["step"]
        files: dict[str, str] = self.manifest["files"]
        if others := {file.name for file in path.glob("*.safetensors")} - set(files):  # torch would read them too
            raise SetupError(f"{path / min(others)}: is not part of the checkpoint; delete it")
        for name in sorted(files)[ranks.rank :: ranks.size]:  # each rank its share
            with _naming_read_errors(path / name):
                if not (path / name).is_file():
                    raise SafetensorError("it is missing")
                if file_hash(path / name) != files[name]:
                    raise SafetensorError("its content has changed since it was written")
                if name.endswith(".safetensors"):
                    with safe_open(path / name, framework="pt"):  # raises for a broken header
                        pass
        self._reader = hf_storage.HuggingFaceStorageReader(str(path))
        with _naming_read_errors(path):
            found: dict[str, Any] = dict(self._reader.read_metadata().state_dict_metadata)
            for key, entry in found.items():  # torch would leave a missing part as it was
                if not _are_whole(entry):
                    raise SafetensorError(f"parts of {key} are missing or appear twice")
            self.shapes = {key: tuple(entry.size) for key, entry in found.items()}

    def read(self, targets: Tensors) -> None:
        """Fill each tensor, whole or a shard, from its key. Raises InputError for a missing key or another shape."""
        for key, tensor in targets.items():
            if self.shapes.get(key) != tuple(tensor.shape):
                raise InputError(f"{self.path}: {key} is missing or has another shape than {tuple(tensor.shape)}")
        with _naming_read_errors(self.path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads on its own
            state_dict_loader.load(targets, storage_reader=self._reader, no_dist=True)

    def masks(self, plan: Plan) -> dict[str, Mask]:
        """The masks by name. Raises SetupError if they don't fit the plan's shapes."""
        rows = [row for row in plan.tensors if f"mask/{row.name}" in self.shapes]
        bits = {f"mask/{row.name}": torch.zeros((row.size + 7) // 8, dtype=torch.uint8) for row in rows}
        self.read(bits)
        with _naming_read_errors(self.path):
            return {row.name: Mask(tuple(row.shape), bits[f"mask/{row.name}"].numpy()) for row in rows}

    def fill(self, state: State) -> None:
        """Fill the values and moments of a state, whose masks are the checkpoint's, in place.

        Raises InputError for tensors of other shapes, SetupError if the masks are not those of the manifest or the optimizer's
        counters show another step.
        """
        if self.manifest["masks"] != {name: mask.fingerprint for name, mask in state.masks.items()}:
            raise SetupError(f"{self.path}: a corrupt checkpoint: its masks are not those of its manifest")
        self.read(keyed(state))
        counters = [float(moments["step"]) for moments in state.moments.values() if "step" in moments]
        if any(counter != self.step for counter in counters):
            raise SetupError(f"{self.path}: a corrupt checkpoint: its tensors are not those of step {self.step}")


def keyed(state: State) -> Tensors:
    """A state's values and moments by their keys in a checkpoint."""
    found = {f"weight/{name}": value for name, value in state.values.items()}
    for name, moments in state.moments.items():
        found |= {f"optimizer/{name}/{key}": moment for key, moment in moments.items()}
    return found


def _are_whole(stored: Any) -> bool:
    """Whether a stored tensor's parts, some rows each, cover it from its first row to its last without gap or overlap.

    `stored` is torch's metadata of the tensor. Torch's reader does not notice missing rows.
    """
    if not stored.size:
        return len(stored.chunks) == 1
    row, rest = 0, [0] * (len(stored.size) - 1)
    for chunk in sorted(stored.chunks, key=lambda chunk: (*chunk.offsets, *chunk.sizes)):
        if list(chunk.offsets) != [row, *rest] or chunk.sizes[1:] != stored.size[1:]:
            return False
        row += chunk.sizes[0]
    return row == int(stored.size[0])
