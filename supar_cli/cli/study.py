"""What `sweep` and `compare` share: the study that a document and flags ask for, and what is to be run, in words."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, apply, names
from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.planning.advice import warnings
from supar_cli.planning.document import Document
from supar_cli.planning.problems import parse
from supar_cli.planning.sweep import LEVELS, TUNED, Sweep, checked

KIND = "supar.sweep/v1"
OPTIONS = "seeds jobs executor executor_set width layers context batch_size steps data seed device set out force json quiet verbose"
MEANINGS: dict[str, dict[str, Any]] = {
    "parameterization": {"metavar": "NAME[,…]", "read": names, "path": "parameterizations"},
    "width": {"help": "Width of the runs. [default: the proxy's]"},
    "steps": {"help": "Training steps of a run."},
    "seed": {"help": "The first seed."},
    "force": {"help": "Start a folder's measurements anew."},
}
NOT_IN_A_SWEEP = ("search", "evidence", "parents", "meta")
KEPT_OF_TARGET = ("pattern", "block", "distribution")


def read(source: str | None, defaults: dict[str, Any], full: bool = False) -> Document:
    """The document of a study. A spec or a proxy becomes one with the keys of `defaults`.

    Of a stream of two, the second is the one at full size. Raises InputError when there is no such document.
    """
    path, name = documents.find(source, "proxy.yaml", "supar.yaml")
    found = documents.read_all(path, "`supar tune-proxy` writes a proxy")
    if full and len(found) != 2:
        raise InputError(f"{name}: holds {len(found)} document; expected a second one for --full")
    if len(found) > 2:
        raise InputError(f"{name}: holds {len(found)} documents; expected one, or a small and a full one")
    one = found[1 if full else 0]
    one.name = name
    kind = documents.kind_of(one)
    if kind == KIND or not isinstance(one.data, dict):
        return one
    if kind not in ("supar.spec/v1", "supar.proxy/v1"):
        raise InputError(one.problem(("kind",), f"is {kind!r}", f"expected supar.spec/v1, supar.proxy/v1 or {KIND}"))
    target = one.data.get("target")
    own = target.get("sparsity") if isinstance(target, dict) else None
    one.data = {key: value for key, value in one.data.items() if key not in NOT_IN_A_SWEEP}
    one.data |= {"kind": KIND, "name": _folder_name(path), **copy.deepcopy(defaults)}
    # the proxy's shape is the one to run: its target's may not fit here
    kept = {key: own[key] for key in KEPT_OF_TARGET if key in own} if isinstance(own, dict) else {}
    one.data["target"] = {"sparsity": kept}
    return one


def _folder_name(path: str) -> str:
    """A file's name without its ending and without what a folder's name should not have."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(path).stem).strip("-") or "sweep"


def plan_study(read: Document, axes: Iterable[str], flags: Flags, log: terminal.Log) -> Sweep:
    """The study of a document, axes and flags, whose runs can all be planned. Raises InputError."""
    set_axes(read, axes)
    apply(read, flags)
    study = parse(Sweep, read)
    with documents.with_locations(read):
        study = corpus.with_hash(study)
        plans = checked(study)
    for message in dict.fromkeys(message for plan in plans for message in warnings(plan)[:1]):
        log.warn(message)
    return study


def set_axes(read: Document, axes: Iterable[str]) -> None:
    """Put `NAME=VALUES` in the place of the document's axis of the same kind. Raises InputError for an unknown name."""
    replaced: set[tuple[str, ...]] = set()
    for text in axes:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        kind = next((kind for kind in (TUNED, LEVELS) if name in kind), None)
        if not equals or kind is None:
            raise InputError(f"--over {text}: expected NAME=VALUES, NAME one of {', '.join((*TUNED, *LEVELS))}")
        over = read.data.get("over") if isinstance(read.data, dict) else None
        if isinstance(over, dict) and kind not in replaced:
            for other in kind:
                over.pop(other, None)
        replaced.add(kind)
        documents.set_path(read, ("over", name), values.strip())


def describe(study: Sweep, log: terminal.Log) -> None:
    """Say what will be run, in a few lines."""
    levels, model, train, target = study.levels, study.model, study.train, study.target
    arms = ", ".join(study.parameterizations)
    log.log(f"{study.title or study.name}: {arms}; {study.seeds} seed{'s' if study.seeds > 1 else ''} a point")
    log.log(
        f"width {levels[0].width} (proxy {model.width}), {levels[0].layers} layers, context {target.context or model.context}, "
        f"batch {target.batch_size or train.batch_size}, {target.steps or train.steps} steps, data {study.data.source}"
    )
    if study.iso != "none":
        keeps, power = {"parameters": ("live hidden parameters", 2), "wpn": ("weights per neuron", 1)}[study.iso]
        first = levels[0]
        log.log(f"widths that keep the {keeps} of density {first.density:g}, to whole heads of {model.head_width}:")
        for level in levels:
            share = level.width**power * level.density / (first.width**power * first.density)
            live = f"{level.width * level.density:g} weights per neuron"
            log.log(f"  density {level.density:g}: width {level.width}, {live}, {100 * share:.1f} % of it")
