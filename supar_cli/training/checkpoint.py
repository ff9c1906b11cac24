"""Checkpoints: a run's state as safetensors with the plan beside them, written all or nothing, verified on load.

A checkpoint is a folder `step-N` holding weights, packed masks and optimizer state in `state.safetensors`, or in one
`shard-…` file of each rank where the model is sharded; `plan.yaml`; and `manifest.json`, which has the hash of every file
and its own. A masked weight is its live values in row-major order, and so is its optimizer state: neither the engine nor
the number of processes that trained it is in the file. It is written under another name, flushed to disk and renamed, so a
folder of that name is complete. Nothing in it is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from supar_cli.errors import InputError, SetupError
from supar_cli.files import file_hash
from supar_cli.planning import document
from supar_cli.planning.plan import Plan, read_plan
from supar_cli.training.checkpoint_reader import (
    KIND,
    CheckpointReader,
    Tensors,
    keyed,
    read_manifest,
    verify,
)
from supar_cli.training.distributed import Ranks
from supar_cli.training.prepare import to_dense
from supar_cli.training.runtime import device_thread
from supar_cli.training.state import State

UNSHARDED = "state.safetensors"


def available(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "manifest.json").is_file())


def load(path: Path, plan: Plan, data_hash: str, ranks: Ranks | None = None) -> CheckpointReader:
    """A checkpoint of this plan and these data, its files verified, ready to fill a state.

    However many ranks wrote it, each of those that call this reads its own part. Raises InputError when it is of another
    plan or other data, SetupError when it is corrupt.
    """
    manifest = read_manifest(path)
    for what, of, wanted in (
        ("plan", "is of another plan", plan.hash()),
        ("data", "was trained on other data", data_hash),
    ):
        if manifest[what] != wanted:
            raise InputError(f"{path}: {of} ({manifest[what][:19]}…, this one is {wanted[:19]}…)")
    verify(path, manifest, ranks or Ranks())
    if not 0 < manifest["step"] <= plan.train.steps:
        raise SetupError(f"{path}: a corrupt checkpoint: the plan has no step {manifest['step']}")
    return CheckpointReader(path, manifest)


def weights(path: Path, plan: Plan | None = None) -> Tensors:
    """A checkpoint's tensors by plan name, in the plan's shapes, zero where dead. Raises InputError or SetupError.

    Without a `plan` it is the one beside them.
    """
    manifest = read_manifest(path)
    verify(path, manifest, Ranks())
    plan, reader = plan or read_plan(path / "plan.yaml"), CheckpointReader(path, manifest)
    masks = reader.masks(plan)
    values = State.zeros(plan, masks).values
    reader.read({f"weight/{name}": value for name, value in values.items()})
    return {name: to_dense(value, masks.get(name)) for name, value in values.items()}


class Writer:
    """Writes a run's checkpoints while training goes on, one at a time; all but the newest `run.keep` are dropped.

    Without a folder it writes nothing. `ranks` are those that each write a shard of it; a rank that writes whole states
    leaves them out. `before_publish` is called when a checkpoint has all its files and not yet its name. Raises
    SetupError of a checkpoint that failed at the next call.
    """

    def __init__(
        self,
        folder: Path | None,
        plan: Plan,
        data_hash: str,
        *,
        device: torch.device,
        ranks: Ranks | None = None,
        before_publish: Callable[[], None] = lambda: None,
        saved_step: int | None = None,
    ) -> None:
        self.folder, self._plan, self._data_hash, self._saved_step = folder, plan, data_hash, saved_step
        self._ranks = (ranks or Ranks()).new_group()
        self._before_publish, self._publish_lock = before_publish, Lock()
        self._thread = device_thread(device, "checkpoints")
        self._pending: Future[Path] | None = None

    def save(self, step: int, capture: Callable[[], State]) -> None:
        """Take a copy of the state after a step and return; the copy is written meanwhile. Waits for the checkpoint before.

        Does nothing where the state of that step is saved already.
        """
        if self.folder is None or step == self._saved_step:
            return
        self.wait()
        self._saved_step = step
        self._pending = self._thread.submit(
            save,
            self.folder,
            capture(),
            self._plan,
            self._data_hash,
            self._ranks,
            self._before_publish,
            self._publish_lock,
        )

    @property
    def is_writing(self) -> bool:
        """Whether one is being written now."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Return when all is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None and self.folder is not None:
            with _naming_write_errors(self.folder):
                pending.result()

    def cancel(self) -> None:
        """Have no checkpoint appear from now on, though one is being written: the folder may soon be another process's."""
        self._publish_lock.acquire()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif not issubclass(kind, Exception):  # at once
            self.cancel()
        else:
            with suppress(SetupError, RuntimeError):  # of the checkpoint before: there is something else to report
                self.wait()


def save(
    folder: Path,
    state: State,
    plan: Plan,
    data_hash: str,
    ranks: Ranks,
    before_publish: Callable[[], None],
    publish_lock: Lock,
) -> Path:
    """Write `folder/step-N`, by all ranks together, and return its path. Raises SetupError.

    Whoever holds `publish_lock` keeps the checkpoint from appearing.
    """
    final = folder / f"step-{state.step:08d}"
    staging = folder / f".{final.name}.{os.getpid()}"
    try:
        staging = ranks.on_main(make_staging, folder, staging)
        ranks.run_on_all(write_tensors, staging, state, ranks)
        own_hashes = ranks.run_on_all(hash_files, staging, ranks)
        hashes = {name: value for found in ranks.gather(own_hashes) for name, value in found.items()}
        ranks.on_main(write_manifest, staging, state, plan, data_hash, hashes)
        ranks.on_main(publish, staging, final, plan.run.keep, before_publish, publish_lock)
    except Exception:
        if ranks.is_main:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk has better uses
        raise
    return final


@contextmanager
def _naming_write_errors(folder: Path) -> Iterator[None]:
    """Raise SetupError that names the folder where what is inside can't write."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        why: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            why = next(iter(error.failures.values()))[0]
        text = getattr(why, "strerror", None) or str(why)
        raise SetupError(f"{folder}: the checkpoint can't be written: {text}") from None


def make_staging(folder: Path, staging: Path) -> Path:
    """Make the folder that a checkpoint is written in until it is complete."""
    with _naming_write_errors(folder):
        for left in folder.glob(".step-*"):  # of a process killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        staging.mkdir(parents=True)
    return staging


def write_tensors(staging: Path, state: State, ranks: Ranks) -> None:
    """Write this rank's file of tensors and see it on disk."""
    packed = {f"mask/{name}": torch.from_numpy(mask.bits) for name, mask in state.masks.items()}
    tensors = keyed(state) | packed
    with _naming_write_errors(staging.parent):
        if not ranks.is_distributed:
            save_file(tensors, staging / UNSHARDED)
            _flush(staging / UNSHARDED)
            return
        storage = HuggingFaceStorageWriter(str(staging), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=storage, process_group=ranks.group)


def hash_files(staging: Path, ranks: Ranks) -> dict[str, str]:
    """The hashes, by name, of the files that this rank wrote."""
    pattern = f"shard-{ranks.rank + 1:05d}-*" if ranks.is_distributed else UNSHARDED
    with _naming_write_errors(staging.parent):
        return {path.name: file_hash(path) for path in staging.glob(pattern)}


def write_manifest(staging: Path, state: State, plan: Plan, data_hash: str, hashes: dict[str, str]) -> None:
    """Write the plan and the manifest beside all the tensors, and see them on disk."""
    with _naming_write_errors(staging.parent):
        missing = [name for name in hashes if not (staging / name).is_file()]
        if missing:
            raise OSError(f"{missing[0]} is missing; expected a folder that all machines of the run share")
        (staging / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
        manifest = {
            "kind": KIND,
            "step": state.step,
            "plan": plan.hash(),
            "data": data_hash,
            "masks": {name: mask.fingerprint for name, mask in state.masks.items()},
            "files": {**dict(sorted(hashes.items())), "plan.yaml": file_hash(staging / "plan.yaml")},
        }
        manifest["hash"] = document.content_hash(manifest)
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        for name in ("plan.yaml", "manifest.json"):
            _flush(staging / name)
        _flush(staging)


def publish(staging: Path, final: Path, keep: int, before: Callable[[], None], lock: Lock) -> None:
    """Make a checkpoint valid, by the rename of its folder, and drop the oldest where there are more than `keep`."""
    with _naming_write_errors(final.parent):
        before()
        if not lock.acquire(blocking=False):
            raise SetupError(f"{final}: the checkpoint was cancelled")
        try:
            dropped = [move_aside(final)] if final.exists() else []
            staging.rename(final)
        finally:
            lock.release()
        _flush(final.parent)
        dropped += [move_aside(old) for old in available(final.parent)[:-keep]]
        for path in dropped:
            shutil.rmtree(path, ignore_errors=True)


def move_aside(path: Path) -> Path:
    """Move a checkpoint out of sight whole: a kill while its files are deleted leaves no part of one."""
    return path.rename(path.with_name(f".{path.name}.old"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
