"""Writing checkpoints: a run's state as safetensors, with its plan, in a folder that is complete or not there.

The folder `step-N` holds weights, packed masks and optimizer state in `state.safetensors` or, for a sharded model, in one
`shard-…` file for each rank; `plan.yaml`; and `manifest.json`, which has the hash of every file and its own. A masked weight
and its moments are stored as their live values in row-major order, so a checkpoint depends neither on the engine nor on the
number of processes. The writer fills a folder with another name, flushes it to disk and renames it. No file is a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import api, hf_storage, state_dict_saver

from supar_cli.errors import SetupError
from supar_cli.files import file_hash, write_file
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.sparse.mask_files import save_tensors
from supar_cli.training.checkpoint_reader import KIND, available, keyed
from supar_cli.training.distributed import ALONE, Parallel, Ranks
from supar_cli.training.runtime import device_thread
from supar_cli.training.state import State

UNSHARDED = "state.safetensors"


class Writer(AbstractContextManager["Writer"]):
    """Writes a run's checkpoints one at a time while training goes on, and keeps the newest `run.keep`.

    Without a folder it writes nothing. Each rank writes its shard of a sharded model; otherwise the main rank writes all.
    The writer calls `before_publish` when a checkpoint has all its files but not yet its name. A failure to write raises
    SetupError at the next call.
    """

    def __init__(
        self,
        folder: Path | None,
        plan: Plan,
        data_hash: str,
        parallel: Parallel,  # not stored: it would keep the model in memory
        before_publish: Callable[[], None] = lambda: None,
        saved_step: int | None = None,
    ) -> None:
        self.folder = folder if parallel.ranks.is_main or parallel.is_sharded else None
        self._plan, self._data_hash, self._before_publish, self.saved_step = plan, data_hash, before_publish, saved_step
        self._ranks = parallel.ranks.new_group() if parallel.is_sharded else ALONE
        self._thread, self._publish_lock = device_thread(parallel.device, "checkpoints"), Lock()
        self._pending: Future[None] | None = None

    def save(self, step: int, capture: Callable[[], State]) -> None:
        """Copy the state after a step, start to write the copy and return. Waits for the previous checkpoint.

        Does nothing if that step is already saved.
        """
        if self.folder is None or step == self.saved_step:
            return
        self.wait()
        self.saved_step = step
        self._pending = self._thread.submit(self._write, self.folder / f"step-{step:08d}", capture())

    def wait(self) -> None:
        """Return when the last checkpoint is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif not issubclass(kind, Exception):  # such as Ctrl-C: don't wait, and let no checkpoint appear later
            self._publish_lock.acquire()
        else:
            with suppress(SetupError, RuntimeError):  # the error that ended the run is the one to report
                self.wait()

    def _write(self, final: Path, state: State) -> None:
        """Write the checkpoint `final`. All ranks that write call it. Raises SetupError."""
        ranks, naming_errors = self._ranks, _naming_write_errors(final.parent)
        staging = ranks.on_main(naming_errors(_make_staging), final)
        try:
            own_hashes = ranks.run_on_all(naming_errors(_write_tensors), staging, state, ranks)
            hashes = {name: value for found in ranks.gather(own_hashes) for name, value in found.items()}
            ranks.on_main(naming_errors(self._complete), staging, state, hashes)
            ranks.on_main(naming_errors(self._publish), staging, final)
        except Exception:
            if ranks.is_main:
                shutil.rmtree(staging, ignore_errors=True)  # the disk may be full
            raise

    def _complete(self, staging: Path, state: State, hashes: dict[str, str]) -> None:
        """Write the plan and the manifest and flush the folder to disk."""
        missing = [name for name in hashes if not (staging / name).is_file()]
        if missing:
            raise OSError(f"{missing[0]} is missing; expected a folder that all machines of the run share")
        write_file(staging / "plan.yaml", document.write([self._plan.model_dump()]))
        manifest: dict[str, Any] = {
            "kind": KIND,
            "step": state.step,
            "plan": self._plan.hash(),
            "data": self._data_hash,
            "masks": {name: mask.fingerprint for name, mask in state.masks.items()},
            "files": {**dict(sorted(hashes.items())), "plan.yaml": file_hash(staging / "plan.yaml")},
        }
        manifest["hash"] = document.content_hash(manifest)
        write_file(staging / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        _flush(staging)

    def _publish(self, staging: Path, final: Path) -> None:
        """Give a checkpoint its name and remove the oldest ones beyond `run.keep`."""
        self._before_publish()
        if not self._publish_lock.acquire(blocking=False):
            raise SetupError(f"{final}: the checkpoint was cancelled")
        try:
            dropped = [_move_aside(final)] if final.exists() else []
            staging.rename(final)
        finally:
            self._publish_lock.release()
        _flush(final.parent)
        dropped += [_move_aside(old) for old in available(final.parent)[: -self._plan.run.keep]]
        for path in dropped:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _naming_write_errors(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a SetupError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError, api.CheckpointException) as error:
        failures = error.failures.values() if isinstance(error, api.CheckpointException) else ()
        why = next((failure for failure, _ in failures), error)
        text = getattr(why, "strerror", None) or str(why)
        raise SetupError(f"{folder}: the checkpoint can't be written: {text}") from None


def _make_staging(final: Path) -> Path:
    """Make the folder in which a checkpoint is written until it is complete."""
    for left in final.parent.glob(".step-*"):  # left by a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    staging = final.with_name(f".{final.name}.{os.getpid()}")
    staging.mkdir(parents=True)
    return staging


def _write_tensors(staging: Path, state: State, ranks: Ranks) -> dict[str, str]:
    """Write this rank's file of tensors and flush it to disk; return its hash by its name."""
    tensors = keyed(state) | {f"mask/{name}": torch.from_numpy(mask.bits) for name, mask in state.masks.items()}
    if ranks.is_distributed:
        storage = hf_storage.HuggingFaceStorageWriter(str(staging), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=storage, process_group=ranks.group)
        return {path.name: file_hash(path) for path in staging.glob(f"shard-{ranks.rank + 1:05d}-*")}
    save_tensors(tensors, staging / UNSHARDED)
    _flush(staging / UNSHARDED)
    return {UNSHARDED: file_hash(staging / UNSHARDED)}


def _move_aside(path: Path) -> Path:
    """Rename a checkpoint before its files are deleted, so that a kill leaves no part of it under its name."""
    return path.rename(path.with_name(f".{path.name}.old"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
