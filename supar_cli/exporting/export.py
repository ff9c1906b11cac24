"""A trained model written as a folder that others can load: of a stock class, or under the plan's own names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from supar_cli.data import tokenizer
from supar_cli.errors import InputError, SetupError, suggestion
from supar_cli.exporting import comparison, loaded_model
from supar_cli.exporting.loaded_model import Model
from supar_cli.exporting.preprocessor import write_preprocessor
from supar_cli.exporting.stock_models import Config, StockClass, StockTensor, stock_classes
from supar_cli.exporting.stored_model import CONFIG, NPZ, PLAN, RECORD, WEIGHTS, scaled
from supar_cli.exporting.tokenizer_files import write_tokenizer
from supar_cli.files import naming_write_errors, read_json
from supar_cli.models.transformer import named_tensors
from supar_cli.planning import layout
from supar_cli.planning.folding import standard_factors
from supar_cli.planning.plan import Plan, PlanModel, read_plan
from supar_cli.sparse.mask_files import save_tensors
from supar_cli.training import checkpoint_reader

KIND = "supar.export/v1"
OWN_NAMES = ("safetensors", "npz")  # any model, under the plan's names
NOT_INSTALLED = "transformers is not installed; `pip install transformers`, and export again with --force"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written. `difference`: the largest between the logits of transformers' class and of supar, over the largest logit.

    `rounding`: the same of values rounded to `dtype`. None where they were not compared; `compared` says why, or what was.
    """

    kind: str
    folder: str
    source: str
    step: int
    steps: int
    plan: str
    to: str
    architecture: str | None
    dtype: str
    files: list[str]
    difference: float | None
    rounding: float | None
    compared: str
    notes: list[str]


def export(
    path: str | Path, folder: str | Path, to: str = "auto", dtype: str = "float32", force: bool = False
) -> Exported:
    """Write the model of a run's newest checkpoint, or of one checkpoint, into a folder: all of it or nothing.

    `to`: gpt2, llama, granite, gpt-neox, mpt, vit, safetensors, npz, or auto, the class that holds the model. `dtype`: float32,
    bfloat16 or float16. `force` replaces an earlier export. Where transformers is installed, it loads the folder, and its
    logits are compared with supar's. Raises InputError, SetupError, and CheckViolated where they differ.
    """
    out = Path(folder)
    _require_free(out, force)
    _require_own_family(Path(path))
    checkpoint = checkpoint_reader.find(Path(path))
    plan, model = loaded_model.load(checkpoint, "cpu")
    to = _choose(to, dtype, plan.decoder)
    stock = stock_classes().get(to)
    with _made_beside(out) as made:
        reading, notes = _write_reading(plan, made)
        if stock is None:
            (made / PLAN).write_bytes((checkpoint / PLAN).read_bytes())
            lost = _Contents.of(model, None).write(made / (NPZ if to == "npz" else WEIGHTS), dtype)
            differences, compared = list[float](), "under the plan's own names there is no class to compare with"
        else:
            differences, compared, lost = _write_class(made, plan, model, stock, dtype, reading)
        if lost:
            notes.append(f"{lost:,} live weights are 0 in {dtype}, which has no smaller numbers")
        found = Exported(
            kind=KIND,
            folder=str(folder),
            source=str(checkpoint),
            step=checkpoint_reader.read_manifest(checkpoint)["step"],
            steps=plan.train.steps,
            plan=plan.hash(),
            to=to,
            architecture=None if stock is None else stock.architecture,
            dtype=dtype,
            files=sorted([*(one.name for one in made.iterdir()), RECORD]),
            difference=differences[0] if differences else None,
            rounding=differences[1] if len(differences) > 1 else None,
            compared=compared,
            notes=notes,
        )
        (made / RECORD).write_text(json.dumps(asdict(found), indent=1) + "\n", "utf-8")
    return found


def _choose(to: str, dtype: str, model: PlanModel) -> str:
    """The format to write: the first class that can hold the model where it is `auto`. Raises InputError with every reason."""
    classes, problems = stock_classes(), list[str]()
    if dtype not in DTYPES:
        problems.append(f"dtype: {dtype!r}; {suggestion(dtype, DTYPES)}")
    elif (to, dtype) == ("npz", "bfloat16"):
        problems.append("dtype: bfloat16, which numpy does not have; expected float32 or float16")
    if to not in ("auto", *classes, *OWN_NAMES):
        problems.append(f"to: {to!r}; {suggestion(to, ['auto', *classes, *OWN_NAMES])}")
    if problems:
        raise InputError(*problems)
    if to in OWN_NAMES:
        return to
    reasons = {name: one.reasons_against(model) for name, one in classes.items()}
    fitting = [name for name in classes if not reasons[name]]
    if to in fitting or (to == "auto" and fitting):
        return fitting[0] if to == "auto" else to
    expected = f"expected {', '.join([*fitting, 'safetensors or npz'])}"
    whys = [
        f"{classes[name].architecture} can't hold {', '.join(reasons[name])}"
        for name in classes
        if to == name or (to == "auto" and classes[name].data_kind == model.data_kind)
    ]
    raise InputError(*(f"to: {why}; {expected}" for why in whys))


@dataclass(frozen=True)
class _Contents:
    """The tensors to write, the values by the plan's names that they are made of, and the factor of each."""

    tensors: list[StockTensor]
    values: Mapping[str, Tensor]
    factors: Mapping[str, float]

    @classmethod
    def of(cls, model: Model, stock: StockClass | None) -> _Contents:
        """Those of a class, or a model's own, which keep their multipliers."""
        own = model.config
        tensors = [StockTensor(row.name, (row,)) for row in layout.tensors(own)]
        kept = standard_factors(own)
        if stock is not None:
            tensors, kept = list(stock.tensors(own)), standard_factors(stock.held(own))
        factors = {name: factor / kept[name] for name, factor in standard_factors(own).items()}
        return cls(tensors, named_tensors(model), factors)

    def write(self, path: Path, dtype: str) -> int:
        """Write a file of them, and return how many live weights are 0 in its precision.

        Raises InputError, naming every tensor, for values that are not finite in it.
        """
        found, lost, problems = dict[str, Tensor](), 0, list[str]()
        for one in self.tensors:
            parts = []
            for row in one.parts:
                if row.name not in self.values:  # a bias that the class always has
                    parts.append(torch.zeros(row.shape, dtype=DTYPES[dtype]))
                    continue
                value = self.values[row.name].detach()
                parts.append(scaled(value, self.factors[row.name]).to(DTYPES[dtype]))
                lost += int(((value != 0) & (parts[-1] == 0)).sum())
                if not bool(parts[-1].isfinite().all()):
                    problems.append(f"{row.name}: holds values that are not finite in {dtype}")
            found[one.name] = one.join(parts)
        if problems:
            raise InputError(*problems)
        if path.name == NPZ:
            arrays: dict[str, Any] = {name: value.numpy() for name, value in found.items()}
            np.savez(path, **arrays)
        else:
            save_tensors(found, path, {"format": "pt"})
        return lost


def _write_class(
    folder: Path, plan: Plan, model: Model, stock: StockClass, dtype: str, reading: Config
) -> tuple[list[float], str, int]:
    """Write config and weights, in float32 first where their logits can be compared.

    Returns their differences in float32 and rounded, what was compared, and how many live weights are 0 now.
    """
    contents, lost, differences = _Contents.of(model, stock), 0, list[float]()
    missing = NOT_INSTALLED if find_spec("transformers") is None else ""
    for precision in dict.fromkeys([dtype] if missing else ["float32", dtype]):
        config = stock.config(stock.held(plan.decoder)) | reading | {"torch_dtype": precision}
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        lost = contents.write(folder / WEIGHTS, precision)
        try:
            differences += [] if missing else [comparison.difference(folder, model, stock.architecture)]
        except ImportError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # what transformers' own messages leave out
                cause = cause.__cause__
            missing = f"transformers can't be used here: {str(cause).splitlines()[0]}"
    if missing:
        return [], f"the logits were not compared: {missing}", lost
    comparison.require_equal(differences[0], model, stock.architecture)
    compared = f"transformers' {stock.architecture} and supar differ by {differences[0]:.1e} of the largest logit"
    rounded = f"; rounded to {dtype}, by {differences[1]:.1e}" if len(differences) > 1 else ""
    return differences, compared + rounded, lost


def _write_reading(plan: Plan, folder: Path) -> tuple[Config, list[str]]:
    """Write the files that text or images are read with. Returns what a config says of them, and notes."""
    if plan.decoder.data_kind == "images":
        return write_preprocessor(plan, folder)
    notes, path = write_tokenizer(plan, folder), folder / "tokenizer_config.json"
    has_end = path.is_file() and "eos_token" in read_json(path)
    end = tokenizer.load(plan.text).separator if has_end else None
    return {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}, notes


def _require_own_family(path: Path) -> None:
    """Raise InputError for a folder of a model that supar did not make."""
    if (path / PLAN).is_file() and not (path / "manifest.json").is_file() and read_plan(path / PLAN).data is None:
        remedy = "its own class saves it (save_pretrained), as its weights hold its zeros and its multipliers"
        raise InputError(f"{path}: belongs to a model of your own; {remedy}")


def _require_free(out: Path, force: bool) -> None:
    """Raise InputError unless nothing is at the folder, or `force` and an export of supar with no other files."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; expected a folder")
    there = {one.name for one in out.iterdir()} if out.is_dir() else set()
    if there and not force:
        raise InputError(f"{out}: exists; expected another folder, or --force to replace an earlier export")
    record = read_json(out / RECORD) if RECORD in there else None
    own = record["files"] if isinstance(record, dict) and record.get("kind") == KIND else []
    if others := sorted(there - set(own)):
        raise InputError(f"{out}: {others[0]} is of no export of supar, so it is not replaced; expected another folder")


@contextmanager
def _made_beside(out: Path) -> Iterator[Path]:
    """A new folder beside another, put in its place at the end; after an error nothing is left. Raises SetupError."""
    try:
        with naming_write_errors(out):
            place = out.resolve()
            place.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as beside:
                made, before = Path(beside, "made"), Path(beside, "before")
                made.mkdir()
                yield made
                if place.exists():
                    place.rename(before)
                try:
                    made.rename(place)
                except BaseException:
                    if before.exists():
                        before.rename(place)
                    raise
    except SafetensorError as error:
        raise SetupError(f"{out}: can't be written: {error}") from None
