"""Trained models on disk, read tensor by tensor under the plan's names: runs, checkpoints, folders of stock classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from supar_cli.errors import InputError, SetupError
from supar_cli.exporting.stock_models import HEAD_BIAS, StockClass, StockTensor, find_class
from supar_cli.files import read_json
from supar_cli.planning import layout
from supar_cli.planning.folding import standard_factors
from supar_cli.planning.plan import PlanModel, read_plan
from supar_cli.sparse.masks import Mask
from supar_cli.training import checkpoint_reader
from supar_cli.training.prepare import to_dense

WEIGHTS, INDEX, CONFIG, PLAN = "model.safetensors", "model.safetensors.index.json", "config.json", "plan.yaml"
NPZ, RECORD = "model.npz", "supar.json"  # of exports of supar
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class StoredModel:
    """A model on disk. `decoder` is its shape with the multipliers of its forward pass.

    `read(name)` returns a tensor by the plan's name and in its shape, float32, dead weights zero. `masks` are a run's, in which
    a live weight may be 0; others have none but their zeros. `notes` say what its config has that supar doesn't.
    """

    path: Path
    decoder: PlanModel
    read: Callable[[str], Tensor]
    masks: Mapping[str, Mask] | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def factors(self) -> Mapping[str, float]:
        """What the forward pass makes of each tensor, by name.

        With every tensor times its factor, a model without multipliers, whose attention divides by the root of the head
        width, has the same logits.
        """
        return standard_factors(self.decoder)


def open_model(path: Path) -> StoredModel:
    """The model of a run, a checkpoint, a folder of a stock class or an export of supar's. Raises InputError or SetupError."""
    if not path.is_dir():
        raise InputError(f"{path}: {'is a file' if path.exists() else 'no such folder'}; expected one with a model")
    if (path / CONFIG).is_file():
        return open_folder(path)
    if (path / PLAN).is_file() and ((path / WEIGHTS).is_file() or (path / NPZ).is_file()):
        return _open_export(path)
    if (path / WEIGHTS).is_file() or (path / INDEX).is_file():
        raise InputError(f"{path}: has weights and no {CONFIG}; expected both, as `save_pretrained` writes them")
    return open_run(path)


def open_run(path: Path) -> StoredModel:
    """The model of a run's newest checkpoint, or of one checkpoint. Raises InputError or SetupError."""
    checkpoint = checkpoint_reader.find(path)
    plan, state = checkpoint_reader.read_values(checkpoint)
    return StoredModel(
        path=checkpoint,
        decoder=plan.decoder,
        read=lambda name: to_dense(state.values[name], state.masks.get(name)),
        masks=state.masks,
    )


def scaled(values: Tensor, factor: float) -> Tensor:
    """Values times a factor, rounded to float32 once; those of a factor of 1 are the same bits."""
    return values if factor == 1 else (values.double() * factor).float()


def _open_export(path: Path) -> StoredModel:
    """A model that supar exported under the plan's own names."""
    decoder = read_plan(path / PLAN).decoder
    rows = {row.name: row for row in layout.tensors(decoder)}
    if not (path / WEIGHTS).is_file():
        arrays = _arrays(path / NPZ, {name: row.shape for name, row in rows.items()})
        return StoredModel(path, decoder, lambda name: arrays[name].float())
    files = _files(path)
    _require_tensors(path, files, {name: StockTensor(name, (row,)) for name, row in rows.items()}, set())
    return StoredModel(path, decoder, lambda name: files[name].get_tensor(name).float())


def _arrays(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The arrays of a file by name. Raises InputError unless they are those of `shapes`, SetupError for a broken file."""
    try:
        with np.load(path) as file:
            found = {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # numpy raises anything for a broken file
        raise SetupError(f"{path}: is not an intact file of arrays: {error}") from None
    if {name: tuple(value.shape) for name, value in found.items()} != shapes:
        raise InputError(f"{path}: its arrays are not the tensors of {PLAN}; expected the files of one export")
    return found


def open_folder(path: Path) -> StoredModel:
    """The model of a folder as `save_pretrained` writes it, with biases if one of them is not 0.

    Raises InputError with all that supar's families can't express, for tensors that are missing, unknown or of another
    shape, and for pickled weights; SetupError where a file can't be read.
    """
    config = read_json(path / CONFIG, is_finite=True)
    if not isinstance(config, dict):
        raise SetupError(f"{path / CONFIG}: is corrupt; expected a JSON object")
    try:
        stock = find_class(config)
        decoder, biased, notes = stock.model_of(config)
    except InputError as error:
        raise InputError(*(f"{path / CONFIG}: {problem}" for problem in error.problems)) from None
    files = _files(path)
    stored, others = _named(stock, decoder, biased, set(files))
    _require_tensors(path, files, stored, others)
    places = {part.name: (name, one) for name, one in stored.items() for part in one.parts}
    for name in others.intersection(files, (f"{head}.weight" for head in stock.heads)):
        embedding = places["embedding"][0]
        if not torch.equal(files[name].get_tensor(name), files[embedding].get_tensor(embedding)):
            what = f"differs from the embedding, although {CONFIG} ties them; expected tie_word_embeddings: false"
            raise InputError(f"{path}: {name}: {what}")
    rows = {row.name: row for row in layout.tensors(decoder)}

    def read(name: str) -> Tensor:
        if name not in places:  # a bias that the class doesn't have
            return torch.zeros(rows[name].shape)
        key, one = places[name]
        return one.split(files[key].get_tensor(key))[name].float().contiguous()

    if HEAD_BIAS in places and bool(read(HEAD_BIAS).any()):
        what = "is not 0; supar's families have a head without a bias, expected zeros"
        raise InputError(f"{path}: {places[HEAD_BIAS][0]}: {what}")
    has_bias = any(bool(read(name).any()) for name, row in rows.items() if row.role == "bias")
    decoder = decoder.model_copy(update={"bias": has_bias})
    return StoredModel(path, decoder, read, notes=tuple(notes))


def _named(
    stock: StockClass, decoder: PlanModel, biased: Sequence[str], files: set[str]
) -> tuple[dict[str, StockTensor], set[str]]:
    """The tensors of a folder by the names that they have there, and the names of others that it may have."""
    found = {part.name: one for one in stock.tensors(decoder, biased) for part in one.parts}
    names, others = {one.name: one.name for one in found.values()}, stock.buffer_names(decoder)
    if found["final_norm"].name not in files:  # saved without the class's prefix, as a model without a head is
        names = {name: name.removeprefix(stock.prefix) for name in names}
        others = {name.removeprefix(stock.prefix) for name in others}
    if heads := [f"{head}.weight" for head in stock.heads if f"{head}.weight" in files]:
        if not decoder.tied:
            names[found["unembedding"].name] = heads[0]
        elif names[embedding := found["embedding"].name] not in files:
            names[embedding] = heads[0]
        else:
            others.add(heads[0])
    return {names[one.name]: one for one in found.values()}, others


def _files(path: Path) -> dict[str, Any]:
    """The open safetensors file of each tensor of a folder. Raises InputError where there is none, SetupError for a broken one."""
    if (path / WEIGHTS).is_file():
        names = {WEIGHTS}
    elif (path / INDEX).is_file():
        index = read_json(path / INDEX)
        try:
            names = {str(name) for name in index["weight_map"].values()}
        except (KeyError, TypeError, AttributeError):
            raise SetupError(f"{path / INDEX}: is corrupt; expected a weight_map") from None
    else:
        pickled = sorted(one.name for one in path.glob("*.bin"))
        what = f"{pickled[0]} is pickled, and could run any code" if pickled else f"has no {WEIGHTS}"
        raise InputError(f"{path}: {what}; expected {WEIGHTS} or {INDEX}, as `save_pretrained` writes them")
    found: dict[str, Any] = {}
    for name in sorted(names):
        try:
            file: Any = safe_open(path / Path(name).name, framework="pt")
            found |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            raise SetupError(f"{path / name}: is not an intact safetensors file: {error}") from None
    return found


def _require_tensors(path: Path, files: dict[str, Any], wanted: Mapping[str, StockTensor], others: set[str]) -> None:
    """Raise InputError with every tensor that is missing, unknown, or of another shape or type."""
    problems = [f"{path}: has no tensor {name}" for name in wanted if name not in files]
    unknown = sorted(files.keys() - wanted.keys() - others)
    problems += [f"{path}: {name}: is no tensor of this model; expected only its own" for name in unknown]
    for name in sorted(wanted.keys() & files.keys()):
        stored = files[name].get_slice(name)
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        if shape != wanted[name].shape:
            problems.append(f"{path}: {name}: has the shape {list(shape)}; expected {list(wanted[name].shape)}")
        elif dtype not in FLOATS:
            problems.append(f"{path}: {name}: holds {dtype}; expected floating-point numbers")
    if problems:
        raise InputError(*problems)
