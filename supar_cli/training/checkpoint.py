"""Checkpoints: safetensors with the plan beside it, written all or nothing, verified on load.

A checkpoint is a folder `step-N` holding `state.safetensors` (weights, packed masks, optimizer state), `plan.yaml` and
`manifest.json`. A masked weight is its live values in row-major order, and so is its optimizer state: the engine that
trained it is not in the file. It is written under another name, flushed to disk and renamed, so a folder of that name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from supar_cli.errors import InputError, SetupError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training import masks
from supar_cli.training.initial import Mask, Prepared, unmasked

KIND = "supar.checkpoint/v2"  # v1 held masked weights with their zeros


def save(
    folder: Path, plan: Plan, prepared: Prepared, optimizer: torch.optim.Optimizer, step: int, data_hash: str
) -> Path:
    """Write `folder/step-N` after `step` steps are done and drop all but the newest `run.keep`. Raises OSError."""
    return _write(folder, plan, prepared.masks, _snapshot(prepared, optimizer), step, data_hash)


class Writer:
    """Writes a run's checkpoints beside its training, one at a time. Raises OSError of one at the next call."""

    def __init__(self, folder: Path, plan: Plan, data_hash: str) -> None:
        self.folder, self._plan, self._data_hash = folder, plan, data_hash
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[Path] | None = None

    def save(self, prepared: Prepared, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Copy the state and return; the copy is written meanwhile. Waits for the checkpoint before."""
        self.wait()
        state = _snapshot(prepared, optimizer)
        self._pending = self._pool.submit(_write, self.folder, self._plan, prepared.masks, state, step, self._data_hash)

    def wait(self) -> None:
        """Return when all is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _snapshot(prepared: Prepared, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of weights and optimizer state, on the CPU: training goes on in the originals."""
    state = {f"weight/{name}": _copy(tensor) for name, tensor in prepared.tensors.items()}
    for name, tensor in prepared.tensors.items():
        for key, value in optimizer.state[tensor].items():
            if value is not None:
                state[f"optimizer/{name}/{key}"] = _copy(torch.as_tensor(value))
    return state


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(
    folder: Path,
    plan: Plan,
    drawn: dict[str, Mask],
    state: dict[str, torch.Tensor],
    step: int,
    data_hash: str,
) -> Path:
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}.{os.getpid()}"
    for left in folder.glob(".step-*"):  # of a process killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _fill(aside, plan, drawn, state, step, data_hash)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk has better uses
        raise error if isinstance(error, OSError) else OSError(str(error)) from None
    if final.exists():  # moved away whole: a kill now leaves the one before it, never a part of this
        final.rename(folder / f".{final.name}.old")
    aside.rename(final)
    shutil.rmtree(folder / f".{final.name}.old", ignore_errors=True)
    _flush(folder)
    for old in available(folder)[: -plan.run.keep]:
        shutil.rmtree(old)
    return final


def _fill(
    aside: Path, plan: Plan, drawn: dict[str, Mask], state: dict[str, torch.Tensor], step: int, data_hash: str
) -> None:
    """Write a checkpoint's files and see them on disk."""
    state |= {f"mask/{name}": torch.from_numpy(np.packbits(mask)) for name, mask in drawn.items()}
    save_file(state, aside / "state.safetensors")
    manifest = {
        "kind": KIND,
        "step": step,
        "plan": plan.hash(),
        "data": data_hash,
        "masks": {name: masks.fingerprint(mask) for name, mask in drawn.items()},
        "state": _file_hash(aside / "state.safetensors"),
    }
    (aside / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    for path in aside.iterdir():
        _flush(path)


def available(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "manifest.json").is_file())


def load(path: Path, plan: Plan, prepared: Prepared, optimizer: torch.optim.Optimizer, data_hash: str) -> int:
    """Restore weights and optimizer state in place and return the number of steps done.

    Raises InputError when the checkpoint is of another plan, other data or other masks, SetupError when it is corrupt.
    """
    manifest = _manifest(path)
    if manifest["plan"] != plan.hash():
        raise InputError(f"{path}: is of another plan ({manifest['plan'][:19]}…, this one is {plan.hash()[:19]}…)")
    if manifest["data"] != data_hash:
        raise InputError(f"{path}: was trained on other data ({manifest['data'][:19]}…, this is {data_hash[:19]}…)")
    state = _state(path, manifest)
    _check_masks(path, manifest, state, prepared)
    with torch.no_grad():
        for name, tensor in prepared.tensors.items():
            tensor.copy_(_entry(path, state, f"weight/{name}", tuple(tensor.shape)))
    prepared.refresh()
    for name, tensor in prepared.tensors.items():
        prefix = f"optimizer/{name}/"
        stored = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        optimizer.state[tensor] = {
            key: value.to(torch.float32) if key == "step" else value.to(tensor.device) for key, value in stored.items()
        }
        if "step" in stored and tensor.device.type == "cuda":  # fused Adam keeps its counter on the device
            optimizer.state[tensor]["step"] = stored["step"].to(tensor.device)
    return int(manifest["step"])


def weights(path: Path, plan: Plan) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by plan name, in the plan's shapes, zero where dead. Raises InputError or SetupError."""
    state = _state(path, _manifest(path))
    found = {}
    for row in plan.tensors:
        packed = state.get(f"mask/{row.name}")
        mask = None
        if packed is not None:
            mask = np.unpackbits(packed.numpy(), count=row.size).astype(bool).reshape(row.shape)
        shape = tuple(row.shape) if mask is None else (int(mask.sum()),)
        found[row.name] = unmasked(_entry(path, state, f"weight/{row.name}", shape), mask)
    return found


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
        if manifest["kind"] == "supar.checkpoint/v1":
            raise SetupError(f"{path}: a checkpoint of an older version ({manifest['kind']}); expected {KIND}")
        if manifest["kind"] != KIND:
            raise ValueError(manifest["kind"])
        for key, kind in (("step", int), ("plan", str), ("data", str), ("masks", dict), ("state", str)):
            if not isinstance(manifest[key], kind):
                raise ValueError(key)
    except (OSError, ValueError, KeyError, TypeError):
        raise SetupError(
            f"{path / 'manifest.json'}: a corrupt checkpoint manifest; delete the folder to use the one before"
        ) from None
    return dict(manifest)


def _state(path: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    file = path / "state.safetensors"
    try:
        if _file_hash(file) != manifest["state"]:
            raise SafetensorError("its content is not what was written")
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise SetupError(f"{file}: a corrupt checkpoint: {error}; delete its folder to use the one before") from None


def _check_masks(path: Path, manifest: dict[str, Any], state: dict[str, torch.Tensor], prepared: Prepared) -> None:
    for name, mask in prepared.masks.items():
        stored = state.get(f"mask/{name}")
        same = stored is not None and np.array_equal(stored.numpy(), np.packbits(mask))
        if not same or manifest["masks"].get(name) != masks.fingerprint(mask):
            raise InputError(f"{path}: the mask of {name} is not the one this plan draws")
    extra = set(manifest["masks"]) - set(prepared.masks)
    if extra:
        raise InputError(f"{path}: has a mask for {sorted(extra)[0]}, which is dense in this plan")


def _entry(path: Path, state: dict[str, torch.Tensor], key: str, shape: tuple[int, ...]) -> torch.Tensor:
    value = state.get(key)
    if value is None or tuple(value.shape) != shape:
        raise InputError(f"{path}: {key} is missing or has another shape than {shape}")
    return value


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
