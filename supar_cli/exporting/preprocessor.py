"""What other programs need beside a model to read images as it was trained to: how pixels are scaled, the names of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from supar_cli.data import images
from supar_cli.errors import SuparError
from supar_cli.files import naming_write_errors, write_file
from supar_cli.planning.plan import Plan, PlanViT

PREPROCESSOR = "preprocessor_config.json"
BILINEAR = 2  # Pillow's number of it


def write_preprocessor(plan: Plan, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Write preprocessor_config.json for the data that a plan's model was trained on.

    Returns the names of the classes as a config has them, and what was written, or why nothing was: the training images say
    how pixels are scaled, so they have to be here. Raises SetupError where the file can't be written.
    """
    model = plan.decoder
    assert isinstance(model, PlanViT)
    try:
        found = images.load(plan.own_data)
    except SuparError as error:
        return _labels(map(str, range(model.classes))), [f"no {PREPROCESSOR} is written: {error}"]
    height, width = model.image
    mean_C, std_C = found.scale
    config = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": model.channels == 3,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean_C.tolist(),
        "image_std": np.where(std_C > 0, std_C, 1).tolist(),  # of a channel that is constant
    }
    with naming_write_errors(folder):
        write_file(folder / PREPROCESSOR, json.dumps(config, indent=1) + "\n")
    return _labels(found.classes), [
        f"{PREPROCESSOR}: pixels are scaled by the mean and deviation of the training images"
    ]


def _labels(names: Any) -> dict[str, Any]:
    by_number = dict(enumerate(names))
    return {"id2label": by_number, "label2id": {name: number for number, name in by_number.items()}}
