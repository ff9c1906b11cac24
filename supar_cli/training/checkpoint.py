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
from dataclasses import InitVar, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from supar_cli.errors import SetupError
from supar_cli.files import file_hash, write_file
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training.checkpoint_reader import KIND, available, keyed
from supar_cli.training.distributed import ALONE, Parallel, Ranks
from supar_cli.training.runtime import device_thread
from supar_cli.training.state import State

UNSHARDED = "state.safetensors"


@dataclass
class Writer:
    """Writes a run's checkpoints while training goes on, one at a time; all but the newest `run.keep` are dropped.

    Without a folder it writes nothing. Each rank writes its shard of a sharded model, else the main one writes all.
    `before_publish` is called when a checkpoint has all its files and not yet its name. Raises SetupError of a checkpoint
    that failed at the next call.
    """

    folder: Path | None
    plan: Plan
    data_hash: str
    parallel: InitVar[Parallel]  # not kept, as it has the model
    before_publish: Callable[[], None] = lambda: None
    saved_step: int | None = None

    def __post_init__(self, parallel: Parallel) -> None:
        if not parallel.ranks.is_main and not parallel.is_sharded:
            self.folder = None
        self._ranks = parallel.ranks.new_group() if parallel.is_sharded else ALONE
        self._thread, self._publish_lock = device_thread(parallel.device, "checkpoints"), Lock()
        self._pending: Future[None] | None = None

    def save(self, step: int, capture: Callable[[], State]) -> None:
        """Take a copy of the state after a step and return; the copy is written meanwhile. Waits for the checkpoint before.

        Does nothing where the state of that step is saved already.
        """
        if self.folder is None or step == self.saved_step:
            return
        self.wait()
        self.saved_step = step
        self._pending = self._thread.submit(self._write, self.folder / f"step-{step:08d}", capture())

    @property
    def is_writing(self) -> bool:
        """Whether one is being written now."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Return when all is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif not issubclass(kind, Exception):  # at once: none may appear later, when the folder is another process's
            self._publish_lock.acquire()
        else:
            with suppress(SetupError, RuntimeError):  # of the checkpoint before: there is something else to report
                self.wait()

    def _write(self, final: Path, state: State) -> None:
        """Write the checkpoint `final`, by all ranks together. Raises SetupError."""
        ranks, naming_errors = self._ranks, _naming_write_errors(final.parent)
        staging = ranks.on_main(naming_errors(_make_staging), final)
        try:
            own_hashes = ranks.run_on_all(naming_errors(_write_tensors), staging, state, ranks)
            hashes = {name: value for found in ranks.gather(own_hashes) for name, value in found.items()}
            ranks.on_main(naming_errors(self._complete), staging, state, hashes)
            ranks.on_main(naming_errors(self._publish), staging, final)
        except Exception:
            if ranks.is_main:
                shutil.rmtree(staging, ignore_errors=True)  # a full disk has better uses
            raise

    def _complete(self, staging: Path, state: State, hashes: dict[str, str]) -> None:
        """Write the plan and the manifest beside all the tensors, and see them on disk."""
        missing = [name for name in hashes if not (staging / name).is_file()]
        if missing:
            raise OSError(f"{missing[0]} is missing; expected a folder that all machines of the run share")
        write_file(staging / "plan.yaml", document.write([self.plan.model_dump()]))
        manifest: dict[str, Any] = {
            "kind": KIND,
            "step": state.step,
            "plan": self.plan.hash(),
            "data": self.data_hash,
            "masks": {name: mask.fingerprint for name, mask in state.masks.items()},
            "files": {**dict(sorted(hashes.items())), "plan.yaml": file_hash(staging / "plan.yaml")},
        }
        manifest["hash"] = document.content_hash(manifest)
        write_file(staging / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        _flush(staging)

    def _publish(self, staging: Path, final: Path) -> None:
        """Make a checkpoint valid, by the rename of its folder, and drop the oldest where there are more than `run.keep`."""
        self.before_publish()
        if not self._publish_lock.acquire(blocking=False):
            raise SetupError(f"{final}: the checkpoint was cancelled")
        try:
            dropped = [_move_aside(final)] if final.exists() else []
            staging.rename(final)
        finally:
            self._publish_lock.release()
        _flush(final.parent)
        dropped += [_move_aside(old) for old in available(final.parent)[: -self.plan.run.keep]]
        for path in dropped:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _naming_write_errors(folder: Path) -> Iterator[None]:
    """Raise SetupError that names the folder where what is inside can't write."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        why = next((failure for failure, _ in failures), error)
        text = getattr(why, "strerror", None) or str(why)
        raise SetupError(f"{folder}: the checkpoint can't be written: {text}") from None


def _make_staging(final: Path) -> Path:
    """Make the folder that a checkpoint is written in until it is complete."""
    for left in final.parent.glob(".step-*"):  # of a process killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    staging = final.with_name(f".{final.name}.{os.getpid()}")
    staging.mkdir(parents=True)
    return staging


def _write_tensors(staging: Path, state: State, ranks: Ranks) -> dict[str, str]:
    """Write this rank's file of tensors, see it on disk and return its hash by its name."""
    tensors = keyed(state) | {f"mask/{name}": torch.from_numpy(mask.bits) for name, mask in state.masks.items()}
    if ranks.is_distributed:
        storage = HuggingFaceStorageWriter(str(staging), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=storage, process_group=ranks.group)
        return {path.name: file_hash(path) for path in staging.glob(f"shard-{ranks.rank + 1:05d}-*")}
    save_file(tensors, staging / UNSHARDED)
    _flush(staging / UNSHARDED)
    return {UNSHARDED: file_hash(staging / UNSHARDED)}


def _move_aside(path: Path) -> Path:
    """Move a checkpoint out of sight whole: a kill while its files are deleted leaves no part of one."""
    return path.rename(path.with_name(f".{path.name}.old"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
