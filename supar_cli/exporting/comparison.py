"""The logits of an exported folder, as transformers computes them, compared with those of supar's own model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from supar_cli.errors import CheckViolated
from supar_cli.exporting.loaded_model import Model
from supar_cli.planning.plan import PlanModel, PlanViT
from supar_cli.streams import stream

TOKENS, IMAGES = 256, 16
LOADERS = {"tokens": "AutoModelForCausalLM", "images": "AutoModelForImageClassification"}
MOST = 1e-5  # of the largest logit; measured: 3e-6 at most over models of width 64 and 512 whose attention is not sharp
# measured: transformers' float32 tables of rope differ from exact ones by up to 5 times what the rest of a model rounds
ROUNDINGS = 10


def difference(folder: Path, model: Model, architecture: str) -> float:
    """How far the logits of a folder are from a model's: the largest difference over the largest logit.

    Raises ImportError where transformers or its class can't be imported, CheckViolated where it does not load the folder, or
    not whole.
    """
    try:
        transformers = import_module("transformers")
        loader = getattr(transformers, LOADERS[model.config.data_kind])
        getattr(transformers, architecture)
    except Exception as error:  # one that does not fit the packages beside it raises anything
        raise ImportError(str(error) or type(error).__name__) from error
    try:
        loaded, report = loader.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # of any kind: the class does not load the folder
        raise CheckViolated(f"transformers does not load the export: {error}; nothing was written") from None
    if wrong := {key: sorted(map(str, names)) for key, names in report.items() if names}:
        raise CheckViolated(f"transformers does not load the export whole: {wrong}; nothing was written")
    # an image classifier's config need not say it
    if (
        getattr(loaded.config, "tie_word_embeddings", False) != model.config.tied
    ):  # where both are in the file, transformers ties neither
        raise CheckViolated(f"the export's config has tie_word_embeddings {not model.config.tied}; nothing was written")
    inputs = _inputs(model.config)
    with torch.no_grad():
        return _relative(loaded.float().eval()(inputs).logits, model(inputs))


def require_equal(found: float, model: Model, what: str) -> None:
    """Raise CheckViolated for a difference above `MOST`, or above what rounding explains where a model magnifies it."""
    if found <= MOST:
        return
    inputs = _inputs(model.config)
    with torch.no_grad():
        rounded, whole = model(inputs), inputs.double() if inputs.is_floating_point() else inputs
        allowed = max(MOST, ROUNDINGS * _relative(rounded, model.double()(whole)))
    model.float()
    if not found <= allowed:  # NaN, too
        raise CheckViolated(
            f"{what}: its logits differ from supar's by {found:.2g} of the largest; expected at most {allowed:.2g}; "
            "nothing was written"
        )


def _inputs(model: PlanModel) -> Tensor:
    """Random tokens (B, T), or normalised images (B, C, H, W)."""
    if isinstance(model, PlanViT):
        values = np.random.Generator(stream(0, "compared images")).standard_normal(
            (IMAGES, model.channels, *model.image)
        )
        return torch.from_numpy(values.astype(np.float32))
    length = min(TOKENS, model.context)
    generator = np.random.Generator(stream(0, "compared tokens"))
    return torch.from_numpy(generator.integers(model.vocab, size=(-(-TOKENS // length), length)))


def _relative(found: Tensor, wanted: Tensor) -> float:
    difference, largest = (float(value.abs().max()) for value in (found - wanted, wanted))
    return difference / largest if difference else 0.0  # a head of zeros has no largest logit
