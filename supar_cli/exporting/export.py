"""A trained model written as a folder that others can load: of a stock class, or under the plan's own names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
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
from supar_cli.exporting.stored_model import CONFIG, NPZ, PLAN, RECORD, WEIGHTS
from supar_cli.exporting.tokenizer_files import write_tokenizer
from supar_cli.files import naming_write_errors, read_json
from supar_cli.models.transformer import Transformer, named_tensors
from supar_cli.planning import layout
from supar_cli.planning.folding import standard_factors
from supar_cli.planning.plan import OwnModel, Plan, PlanModel, read_plan
from supar_cli.streams import stream
from supar_cli.training import checkpoint_reader

KIND = "supar.export/v1"
OWN_NAMES = ("safetensors", "npz")  # any model, under the plan's names
NOT_INSTALLED = "transformers is not installed; `pip install transformers`, and export again with --force"
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
    checkpoint, out = checkpoint_reader.find(Path(path)), Path(folder)
    plan = read_plan(checkpoint / PLAN)
    if isinstance(plan.model, OwnModel):
        remedy = f"supar_cli.weights({str(path)!r}) loaded into its own class, which saves it"
        raise InputError(f"{path}: holds a model of your own; expected {remedy}")
    to = _choose(to, dtype, plan.decoder)
    _require_free(out, force)
    plan, model = loaded_model.load(checkpoint, "cpu")
    stock = stock_classes().get(to)
    with _naming_errors(out), _beside(out.resolve()) as (made, publish):
        notes = write_tokenizer(plan, made)
        if stock is None:
            (made / PLAN).write_bytes((checkpoint / PLAN).read_bytes())
            lost = _Contents.of(model, None).write(made / (NPZ if to == "npz" else WEIGHTS), dtype)
            differences, compared = list[float](), "under the plan's own names there is no class to compare with"
        else:
            differences, compared, lost = _write_class(made, plan, model, stock, dtype)
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
        publish()
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
        if to in ("auto", name)
    ]
    raise InputError(*(f"to: {why}; {expected}" for why in whys))


@dataclass(frozen=True)
class _Contents:
    """The tensors to write, the values by the plan's names that they are made of, and the factor of each."""

    tensors: list[StockTensor]
    values: Mapping[str, Tensor]
    factors: Mapping[str, float]

    @classmethod
    def of(cls, model: Transformer, stock: StockClass | None) -> _Contents:
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
                parts.append((value.double() * self.factors[row.name]).float().to(DTYPES[dtype]))
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
            save_file(found, path, metadata={"format": "pt"})
        return lost


def _write_class(
    folder: Path, plan: Plan, model: Transformer, stock: StockClass, dtype: str
) -> tuple[list[float], str, int]:
    """Write config and weights, first in float32 where they can be compared.

    Returns the differences of the logits in float32 and rounded, what was compared, and how many live weights are 0 now.
    """
    contents, lost = _Contents.of(model, stock), 0
    end = {"bos_token_id": None, "eos_token_id": _end_token(plan, folder), "pad_token_id": None}
    differences, missing = list[float](), NOT_INSTALLED if find_spec("transformers") is None else None
    for precision in dict.fromkeys([dtype] if missing else ["float32", dtype]):
        config = stock.config(stock.held(plan.decoder)) | end | {"torch_dtype": precision}
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        lost = contents.write(folder / WEIGHTS, precision)
        if missing is None:
            try:
                differences.append(_difference(folder, model))
            except ImportError as error:
                missing = f"transformers: {str(error).splitlines()[0]}"
    if not differences:
        return differences, f"the logits were not compared: {missing}", lost
    if not differences[0] <= MOST_DIFFERENCE:  # NaN, too
        what = f"its logits differ from supar's by {differences[0]:.2g} of the largest"
        raise CheckViolated(f"{stock.architecture}: {what}; expected {MOST_DIFFERENCE:g} at most; nothing was written")
    compared = f"transformers' {stock.architecture} and supar differ by {differences[0]:.1e} of the largest logit"
    rounded = f"; rounded to {dtype}, by {differences[1]:.1e}" if len(differences) > 1 else ""
    return differences, compared + rounded, lost


def _end_token(plan: Plan, folder: Path) -> int | None:
    """The id of the token that ends a text, where the tokenizer in the folder has one."""
    path = folder / "tokenizer_config.json"
    return tokenizer.load(plan.text).separator if path.is_file() and "eos_token" in read_json(path) else None


def _difference(folder: Path, model: Transformer) -> float:
    """How far the logits of the folder, as transformers loads it, are from a model's, over the largest.

    Raises ImportError where transformers can't be imported, CheckViolated where it doesn't load the folder whole.
    """
    transformers: Any = import_module("transformers")
    logging, loader = transformers.logging, transformers.AutoModelForCausalLM
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded, report = loader.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # of whatever kind: a class that does not load the folder
        raise CheckViolated(f"transformers does not load the export, and nothing was written: {error}") from None
    finally:
        logging.set_verbosity(level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    if wrong := {key: sorted(map(str, names)) for key, names in report.items() if names}:
        raise CheckViolated(f"transformers does not load the export whole, and nothing was written: {wrong}")
    length = min(COMPARED_TOKENS, model.config.context)
    generator = np.random.Generator(stream(0, "compared tokens"))
    drawn = generator.integers(model.config.vocab, size=(-(-COMPARED_TOKENS // length), length))
    with torch.no_grad():
        ours = model(torch.from_numpy(drawn))
        theirs = loaded.float().eval()(input_ids=torch.from_numpy(drawn)).logits
    return float((theirs - ours).abs().max() / ours.abs().max())


def _require_free(out: Path, force: bool) -> None:
    """Raise InputError unless nothing is at the folder, or `force` and an export of supar with no other files."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; expected a folder")
    there = {one.name for one in out.iterdir()} if out.is_dir() else set()
    if there and not force:
        raise InputError(f"{out}: exists; expected another folder, or --force to replace an earlier export")
    record = read_json(out / RECORD) if RECORD in there else {}
    if others := sorted(there - set(record.get("files", []))):
        raise InputError(f"{out}: {others[0]} is of no export of supar, so it is not replaced; expected another folder")


@contextmanager
def _naming_errors(out: Path) -> Iterator[None]:
    """Raise SetupError that names the folder where a file in it can't be written."""
    try:
        with naming_write_errors(out):
            yield
    except SafetensorError as error:
        raise SetupError(f"{out}: can't be written: {error}") from None


@contextmanager
def _beside(out: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A new folder beside another, and how to put it in its place; gone at the end unless it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        made, before = Path(beside, "made"), Path(beside, "before")
        made.mkdir()

        def publish() -> None:
            if out.exists():
                out.rename(before)
            try:
                made.rename(out)
            except BaseException:
                if before.exists():
                    before.rename(out)
                raise

        yield made, publish
