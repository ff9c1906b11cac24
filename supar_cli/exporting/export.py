"""A trained model written as a folder that others can load: of a stock class, or under the plan's own names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from supar_cli.data import tokenizer
from supar_cli.errors import CheckViolated, InputError, SetupError, suggestion
from supar_cli.exporting import loaded_model
from supar_cli.exporting.stock_models import StockClass, StockTensor, stock_classes
from supar_cli.exporting.stored_model import CONFIG, PLAN, WEIGHTS
from supar_cli.exporting.tokenizer_files import write_tokenizer
from supar_cli.files import naming_write_errors, read_json
from supar_cli.models.transformer import Transformer, named_tensors
from supar_cli.planning import document, layout
from supar_cli.planning.folding import standard_factors
from supar_cli.planning.plan import OwnModel, Plan, PlanModel, read_plan
from supar_cli.streams import stream
from supar_cli.training import checkpoint_reader

KIND, RECORD, NPZ = "supar.export/v1", "supar.json", "model.npz"
OWN_NAMES = ("safetensors", "npz")  # any model, under the plan's names
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPARED_TOKENS = 256
MOST_DIFFERENCE = 1e-5  # of the largest logit; measured: 1e-6 at most over tests/test_export.py, float32's own rounding


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

    `to`: gpt2, llama, granite, gpt-neox, mpt, safetensors, npz, or auto, the class that holds the model. `dtype`: float32,
    bfloat16 or float16. `force` replaces an earlier export. Where transformers is installed, it loads the folder, and its
    logits are compared with supar's. Raises InputError, SetupError, and CheckViolated where they differ.
    """
    checkpoint, out = checkpoint_reader.find(Path(path)), Path(folder).resolve()
    plan = read_plan(checkpoint / PLAN)
    if isinstance(plan.model, OwnModel):
        remedy = f"supar_cli.weights({str(path)!r}) loaded into its own class, which saves it"
        raise InputError(f"{path}: holds a model of your own; expected {remedy}")
    to = _choose(to, dtype, plan.decoder)
    _require_free(out, force)
    plan, model = loaded_model.load(checkpoint, "cpu")
    stock = stock_classes().get(to)
    step, differences = checkpoint_reader.read_manifest(checkpoint)["step"], list[float]()
    with _naming_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
            made = Path(beside, out.name)
            made.mkdir()
            said = write_tokenizer(plan, made)
            compared, load = _loader() if stock else ("under the plan's names there is nothing to compare", None)
            for precision in dict.fromkeys(["float32", dtype] if load else [dtype]):
                notes = _write(made, plan, model, stock, to, precision)
                if load:
                    differences.append(_difference(load, made, model))
                    
            if stock is None:
                (made / PLAN).write_bytes((checkpoint / PLAN).read_bytes())
