"""A run's model scored on labelled images: its loss and accuracy, of all and of each class, with standard errors."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from supar_cli.data import image_files, image_readers, images
from supar_cli.data.image_arrays import Labelled
from supar_cli.data.images import Images, Split
from supar_cli.errors import InputError, UnusableResult
from supar_cli.files import Record
from supar_cli.models.vit import VisionTransformer
from supar_cli.planning.plan import Data, Plan
from supar_cli.training.reporter import Reporter
from supar_cli.training.runtime import Runtime

POSITIONS_AT_ONCE = 2**14  # chosen: what keeps a device busy, and little memory


def score(
    checkpoint: Path,
    plan: Plan,
    model: VisionTransformer,
    runtime: Runtime,
    data: str | Path | None,
    reading: dict[str, Any],
    reporter: Reporter,
) -> Record:
    """The part of a record that says what was scored, and the figures.

    All images that the run holds out are, or those of `data`: its validation split, else its test split, else all. Their
    pixels are scaled as the training images', which have to be here. Raises InputError, SetupError, and UnusableResult where
    a loss is not finite.
    """
    own, warnings = images.load(plan.own_data, reporter.log), list(runtime.warnings)
    section, part, found, read_hash = plan.own_data, "what the run holds out", own, own.hash
    if data is None:
        if reading:
            raise InputError(*(f"{key}: says how --data is read; expected --data too" for key in reading))
    else:
        section = Data(**{"kind": "images", "source": str(data), "size": plan.own_data.size, **reading})
        files = image_files.find(section, to_score=True)
        (given,), names = image_readers.read(files, section, reporter.log)
        part = "all of it" if files.scored == "train" else f"its {files.scored} split"
        found = replace(own, held_out=_labelled_as(own, given, names, section.source))
        read_hash = image_files.identify(section, files).hash or ""
        if read_hash == own.hash:
            warnings.append(f"data.source: {section.source}: the model was trained on a part of it")
    nats_N, is_right_N = _score(checkpoint, model, runtime, found, reporter)
    read = {"source": section.source, "part": part, "hash": read_hash}
    return {"data": [read], **_figures(found, nats_N, is_right_N), "warnings": warnings}


def _labelled_as(own: Images, given: Labelled, names: list[str], source: str) -> Split:
    """The images of other data; their classes have the numbers of those of the same names of a run's own.

    `names` are those of the other data's classes, if it has names. Raises InputError for no images, for images of another
    shape, and for a class that the run's data don't have.
    """
    shape = given.pixels.shape[1:]
    if not len(given.labels) or shape != own.shape:
        what = f"its images are {list(shape)} (channels, height, width)" if len(given.labels) else "holds no image"
        raise InputError(f"data.source: {source}: {what}; expected {list(own.shape)}, as the run's")
    present = np.unique(given.labels)
    called = [names[label] if 0 <= label < len(names) else str(label) for label in present.tolist()]
    if unknown := [name for name in called if name not in own.classes]:
        what = f"the class {unknown[0]} is none of the run's"
        raise InputError(f"data.source: {source}: {what}; expected {', '.join(own.classes)}")
    numbers = np.array([own.classes.index(name) for name in called])
    return Split(given.pixels, numbers[np.searchsorted(present, given.labels)], np.arange(len(given.labels)))


@torch.inference_mode()
def _score(
    checkpoint: Path, model: VisionTransformer, runtime: Runtime, found: Images, reporter: Reporter
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Each held-out image's nats (N,) and whether its class is the likeliest (N,)."""
    total = len(found.held_out)
    rows = max(1, min(total, POSITIONS_AT_ONCE // model.config.context))
    nats, is_right, sum_nats = list[NDArray[np.float64]](), list[NDArray[np.bool_]](), 0.0
    for index in range(-(-total // rows)):
        pictures_BCHW, labels_B = runtime.to_device(found.evaluation(index, rows, total))
        with runtime.autocast():
            logits_BV = model(pictures_BCHW)
        here = slice(min(rows, total - index * rows))  # others fill the last batch up
        nats_B = F.cross_entropy(logits_BV.float(), labels_B, reduction="none")[here].double().cpu().numpy()
        if not np.isfinite(nats_B).all():
            raise UnusableResult(f"{checkpoint}: its loss is not finite; expected a run that did not diverge")
        nats.append(nats_B)
        is_right.append((logits_BV.argmax(1) == labels_B)[here].cpu().numpy())
        sum_nats += float(nats_B.sum())
        done = min(total, (index + 1) * rows)
        reporter.progress(done, total, sum_nats / done)
    return np.concatenate(nats), np.concatenate(is_right)


def _figures(found: Images, nats_N: NDArray[np.float64], is_right_N: NDArray[np.bool_]) -> Record:
    """Means over images, each with its standard error, and the accuracy of each class that has images."""
    count, share, by_class = len(nats_N), float(is_right_N.mean()), {}
    for number, name in enumerate(found.classes):
        own_N = is_right_N[found.held_out.labels == number]
        if len(own_N):
            by_class[name] = {"images": len(own_N), "accuracy": float(own_N.mean())}
    return {
        "images": count,
        "loss": float(nats_N.mean()),
        "loss_se": float(nats_N.std(ddof=1) / sqrt(count)) if count > 1 else None,
        "accuracy": share,
        "accuracy_se": sqrt(share * (1 - share) / count),
        "classes": by_class,
    }
