"""Checkpoints: safetensors with the plan beside them, written all or nothing, verified on load.

A checkpoint is a folder `step-N` holding weights, packed masks and optimizer state in `state.safetensors`, or in one
`shard-…` file of each process where the model is sharded; `plan.yaml`; and `manifest.json`, which has the hash of every
file and its own. A masked weight is its live values in row-major order, and so is its optimizer state: neither the engine
nor the number of processes that trained it is in the file. It is written under another name, flushed to disk and renamed,
so a folder of that name is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from supar_cli.errors import InputError, SetupError
from supar_cli.files import file_hash
from supar_cli.planning import document
from supar_cli.planning.plan import Plan, PlanTensor
from supar_cli.sparse.masks import Mask
from supar_cli.training import optimizer
from supar_cli.training.distributed import Ranks
from supar_cli.training.prepare import to_dense
from supar_cli.training.runtime import device_thread
from supar_cli.training.stored import KIND, State, Stored, read_manifest, verify

if TYPE_CHECKING:
    from supar_cli.training.trainer import Trainer

WHOLE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A trainer's state after `step` steps, in memory of its own: training goes on in the originals."""

    plan: Plan
    step: int
    data_hash: str
    masks: dict[str, Mask]
    tensors: State

    @classmethod
    def of(cls, trainer: Trainer) -> Snapshot:
        tensors = {}
        for name, tensor in trainer.sparse_model.tensors.items():
            tensors[f"weight/{name}"] = _copy(tensor)
            for key, value in trainer.optimizer.state[tensor].items():
                if value is not None:
                    tensors[f"optimizer/{name}/{key}"] = _copy(torch.as_tensor(value))
        return cls(trainer.plan, trainer.done, trainer.task.hash, trainer.sparse_model.masks, tensors)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


class Writer:
    """Writes a run's checkpoints beside its training, one at a time, all but the newest `run.keep` dropped.

    Where the model is sharded every process has one. `before` is called when a checkpoint has all its tensors and is not
    yet whole. Raises SetupError of a checkpoint that failed at the next call.
    """

    def __init__(
        self, folder: Path | None, trainer: Trainer, before: Callable[[], None] = lambda: None, saved: int | None = None
    ) -> None:
        self.folder, self._trainer, self._before, self._saved = folder, trainer, before, saved
        self._ranks = trainer.ranks.new_group() if trainer.parallel.is_sharded else Ranks()
        self._pool = device_thread(trainer.runtime.device, "checkpoints")
        self._pending: Future[Path] | None = None
        self._publish_lock = Lock()

    def save(self) -> None:
        """Copy the state and return; the copy is written meanwhile. Waits for the checkpoint before."""
        if self.folder is None or self._trainer.done == self._saved:
            return
        self.wait()
        self._saved = self._trainer.done
        snapshot = Snapshot.of(self._trainer)
        self._pending = self._pool.submit(_write, self.folder, snapshot, self._ranks, self._before, self._publish_lock)

    @property
    def is_writing(self) -> bool:
        """Whether one is being written now."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Return when all is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None and self.folder is not None:
            with _writing(self.folder):
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


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises SetupError where what is inside can't write."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        why: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            why = next(iter(error.failures.values()))[0]
        text = getattr(why, "strerror", None) or str(why)
        raise SetupError(f"{folder}: the checkpoint can't be written: {text}") from None


def _write(folder: Path, snapshot: Snapshot, ranks: Ranks, before: Callable[[], None], naming: Lock) -> Path:
    """Write `folder/step-N`, by all of a ranks together; gives its path. Raises SetupError."""
    final = folder / f"step-{snapshot.step:08d}"
    aside = folder / f".{final.name}.{os.getpid()}"
    try:
        aside = ranks.on_main(_begin, folder, aside)
        ranks.run_on_all(_fill, aside, snapshot, ranks)
        files = ranks.run_on_all(_hashed, aside, ranks)
        hashes = {name: value for found in ranks.gather(files) for name, value in found.items()}
        return ranks.on_main(_finish, aside, final, snapshot, hashes, before, naming)
    except Exception:
        if ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)  # a full disk has better uses
        raise


def _begin(folder: Path, aside: Path) -> Path:
    with _writing(folder):
        for left in folder.glob(".step-*"):  # of a process killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
    return aside


def _fill(aside: Path, snapshot: Snapshot, ranks: Ranks) -> None:
    """Write this process's file of tensors and see it on disk; what fails in one process of a ranks fails in all."""
    packed = {f"mask/{name}": torch.from_numpy(mask.bits) for name, mask in snapshot.masks.items()}
    state = snapshot.tensors | packed
    with _writing(aside.parent):
        if not ranks.is_distributed:
            save_file(state, aside / WHOLE)
            _flush(aside / WHOLE)
            return
        storage = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        state_dict_saver.save(state, storage_writer=storage, process_group=ranks.group)


def _hashed(aside: Path, ranks: Ranks) -> dict[str, str]:
    """The hashes, by name, of the files that this process wrote."""
    pattern = f"shard-{ranks.rank + 1:05d}-*" if ranks.is_distributed else WHOLE
    with _writing(aside.parent):
        return {path.name: file_hash(path) for path in aside.glob(pattern)}


def _finish(
    aside: Path, final: Path, snapshot: Snapshot, hashes: dict[str, str], before: Callable[[], None], naming: Lock
) -> Path:
    """Make a folder that holds all tensors the checkpoint of its step, and drop those that are too many."""
    with _writing(final.parent):
        missing = [name for name in hashes if not (aside / name).is_file()]
        if missing:
            raise OSError(f"{missing[0]} is not there; expected a folder that all machines of the run share")
        (aside / "plan.yaml").write_text(document.write([snapshot.plan.model_dump()]), "utf-8")
        manifest = {
            "kind": KIND,
            "step": snapshot.step,
            "plan": snapshot.plan.hash(),
            "data": snapshot.data_hash,
            "masks": {name: mask.fingerprint for name, mask in snapshot.masks.items()},
            "files": {**dict(sorted(hashes.items())), "plan.yaml": file_hash(aside / "plan.yaml")},
        }
        manifest["hash"] = document.content_hash(manifest)
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        for name in ("plan.yaml", "manifest.json"):
            _flush(aside / name)
        _flush(aside)
        before()
        if not naming.acquire(blocking=False):
            raise SetupError(f"{final}: the checkpoint was given up")
        try:
            dropped = [_away(final)] if final.exists() else []
            aside.rename(final)
        finally:
            naming.release()
        _flush(final.parent)
        dropped += [_away(old) for old in available(final.parent)[: -snapshot.plan.run.keep]]
        for path in dropped:
            shutil.rmtree(path, ignore_errors=True)
    return final


def _away(path: Path) -> Path:
    """Move a checkpoint out of sight whole: a kill while its files are deleted leaves no part of one."""
    return path.rename(path.with_name(f".{path.name}.old"))


def available(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "manifest.json").is_file())


def load(path: Path, trainer: Trainer) -> int:
    """Restore a trainer's weights and optimizer state in place and return the number of steps done.

    However many processes wrote it, each of a ranks reads what lies in it. Raises InputError when the checkpoint is of
    another plan, other data or other masks, SetupError when it is corrupt.
    """
    plan, prepared, ranks = trainer.plan, trainer.sparse_model, trainer.ranks
    manifest = read_manifest(path)
    for what, of, wanted in (
        ("plan", "is of another plan", plan.hash()),
        ("data", "was trained on other data", trainer.task.hash),
    ):
        if manifest[what] != wanted:
            raise InputError(f"{path}: {of} ({manifest[what][:19]}…, this one is {wanted[:19]}…)")
    verify(path, manifest, ranks)
    stored = Stored(path, manifest)
    _check_masks(path, manifest, stored, prepared.masks)
    targets = {f"weight/{name}": tensor.detach() for name, tensor in prepared.tensors.items()}
    states: dict[str, State] = {name: {} for name in prepared.tensors}
    for name, tensor in prepared.tensors.items():
        for what in optimizer.state_names(plan):
            # a counter is on the device where fused Adam keeps it
            value = torch.zeros((), device=tensor.device) if what == "step" else torch.zeros_like(tensor.detach())
            states[name][what] = targets[f"optimizer/{name}/{what}"] = value
    stored.read(targets)
    prepared.sync_engines()
    for name, tensor in prepared.tensors.items():
        trainer.optimizer.state[tensor] = states[name]
    step = int(manifest["step"])
    counters = [float(state["step"]) for state in states.values() if "step" in state]
    if not 0 < step <= plan.train.steps or any(counter != step for counter in counters):
        raise SetupError(f"{path}: a corrupt checkpoint: its tensors are not those of step {step}")
    return step


def weights(path: Path, plan: Plan) -> State:
    """A checkpoint's tensors by plan name, in the plan's shapes, zero where dead. Raises InputError or SetupError."""
    manifest = read_manifest(path)
    verify(path, manifest, Ranks())
    stored, found = Stored(path, manifest), {}
    for row in plan.tensors:
        mask = None
        if f"mask/{row.name}" in stored.shapes:
            packed = {f"mask/{row.name}": torch.zeros((row.size + 7) // 8, dtype=torch.uint8)}
            stored.read(packed)
            mask = _mask_of(path, row, packed[f"mask/{row.name}"])
        values = torch.zeros(tuple(row.shape) if mask is None else (mask.count,))
        stored.read({f"weight/{row.name}": values})
        found[row.name] = to_dense(values, mask)
    return found


def _mask_of(path: Path, row: PlanTensor, bits: torch.Tensor) -> Mask:
    try:
        return Mask(tuple(row.shape), bits.numpy())
    except ValueError as error:
        raise SetupError(f"{path}: a corrupt checkpoint: {row.name}: {error}") from None


def _check_masks(path: Path, manifest: dict[str, Any], stored: Stored, drawn: dict[str, Mask]) -> None:
    packed = {name: torch.from_numpy(mask.bits) for name, mask in drawn.items()}
    there = {name: bits for name, bits in packed.items() if stored.shapes.get(f"mask/{name}") == tuple(bits.shape)}
    found = {f"mask/{name}": torch.zeros_like(bits) for name, bits in there.items()}
    stored.read(found)
    for name, mask in drawn.items():
        same = name in there and torch.equal(found[f"mask/{name}"], packed[name])
        if not same or manifest["masks"].get(name) != mask.fingerprint:
            raise InputError(f"{path}: the mask of {name} is not the one this plan draws")
    extra = set(manifest["masks"]) - set(drawn)
    if extra:
        raise InputError(f"{path}: has a mask for {sorted(extra)[0]}, which is dense in this plan")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
