"""supar: tune a small dense proxy, transfer with SμPar to a wide sparse target, train it.

The Python API is documents in, documents out: `load`, `transfer`, `explain`, `tune`, `train`, `check`, `sweep`, `compare`,
`demo`, `report`; `prune` plans a run anew with fewer weights; `layout` reads a model of yours. Of a run, `weights` and `masks`
return the tensors, `model` the module that they make, `evaluate` its scores on text or images, and `generate` text of its own.
A function's module is imported on first use; only functions that run something import torch.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supar_cli.version import __version__ as __version__

if TYPE_CHECKING:
    from supar_cli.experiments.calibration import calibrate as calibrate
    from supar_cli.experiments.coordinate_check import check as check
    from supar_cli.experiments.search import tune as tune
    from supar_cli.experiments.sweep import compare as compare
    from supar_cli.experiments.sweep import demo as demo
    from supar_cli.experiments.sweep import sweep as sweep
    from supar_cli.exporting.evaluate import evaluate as evaluate
    from supar_cli.exporting.export import export as export
    from supar_cli.exporting.generate import generate as generate
    from supar_cli.exporting.loaded_model import masks as masks
    from supar_cli.exporting.loaded_model import model as model
    from supar_cli.jobs.pruning import prune as prune
    from supar_cli.own.prepared import Prepared as Prepared
    from supar_cli.own.prepared import prepare as prepare
    from supar_cli.own.report import report_loss as report_loss
    from supar_cli.own.trace import layout as layout
    from supar_cli.own.trainer_callback import Callback as Callback
    from supar_cli.own.trainer_callback import TrainerMixin as TrainerMixin
    from supar_cli.planning.explain import explain as explain
    from supar_cli.planning.kinds import load as load
    from supar_cli.planning.plan import Plan
    from supar_cli.planning.rules import ParameterizationName
    from supar_cli.planning.spec import Proxy
    from supar_cli.reporting.read import report as report
    from supar_cli.training.checkpoint_reader import weights_of_run
    from supar_cli.training.train import train as train

    weights = weights_of_run

_FUNCTIONS = {
    "load": "planning.kinds.load",
    "layout": "own.trace.layout",
    "explain": "planning.explain.explain",
    "tune": "experiments.search.tune",
    "train": "training.train.train",
    "prepare": "own.prepared.prepare",
    "Prepared": "own.prepared.Prepared",
    "check": "experiments.coordinate_check.check",
    "sweep": "experiments.sweep.sweep",
    "calibrate": "experiments.calibration.calibrate",
    "compare": "experiments.sweep.compare",
    "demo": "experiments.sweep.demo",
    "Callback": "own.trainer_callback.Callback",
    "TrainerMixin": "own.trainer_callback.TrainerMixin",
    "prune": "jobs.pruning.prune",
    "export": "exporting.export.export",
    "report": "reporting.read.report",
    "report_loss": "own.report.report_loss",
    "evaluate": "exporting.evaluate.evaluate",
    "generate": "exporting.generate.generate",
    "masks": "exporting.loaded_model.masks",
    "model": "exporting.loaded_model.model",
    "weights": "training.checkpoint_reader.weights_of_run",
}
__all__ = ["__version__", "transfer", *_FUNCTIONS]


def transfer(
    proxy: Proxy,
    *,
    parameterization: ParameterizationName = "supar",
    allow_low_wpn: bool = False,
    masks: str | Path | None = None,
    masks_out: str | Path = "masks.safetensors",
    values: str | Path | None = None,
    values_out: str | Path = "values.safetensors",
    **target: Any,
) -> Plan:
    """Make the plan of a target; keywords as the flags of `supar transfer`: sparsity or density (0.008 or "1/128"),
    width, layers, steps, pattern, … Warns of what does not transfer (TransferWarning). Raises InputError.

    `masks`: a safetensors file of masks, or a run, a model or a file of weights, whose zeros are the dead ones; the plan's
    densities are theirs. `values`: a run, a checkpoint, an export or a stock Hugging Face folder of the target's shape, to
    start from. Both are written to `masks_out` and `values_out`, which the plan names.
    """
    from supar_cli.data import corpus
    from supar_cli.errors import InputError, TransferWarning
    from supar_cli.planning import advice
    from supar_cli.planning.spec import Proxy, Sparsity
    from supar_cli.planning.transfer import transfer

    if not isinstance(proxy, Proxy):
        raise InputError(f"{type(proxy).__name__}: expected a Proxy")
    if masks is not None and (said := [name for name in target if name in Sparsity.keys() and name != "updates"]):  # noqa: SIM118
        raise InputError(
            *(f"{name}: cannot be combined with masks, which have densities of their own" for name in said)
        )
    given, start, messages = None, None, list[str]()
    try:
        wanted = proxy.target.override(**target)
        if values is not None or masks is not None:
            from supar_cli.exporting import plan_start
        if values is not None:
            start = plan_start.open_for_target(Path(values), proxy, wanted)
        known = corpus.with_hash(proxy)
        if masks is not None:
            opened = start if values is not None and Path(masks) == Path(values) else None
            given = plan_start.take_masks(Path(masks), Path(masks_out), known, wanted, opened)
        plan = transfer(known, wanted, parameterization, allow_low_wpn=allow_low_wpn, masks=given)
        if start is not None:
            plan, messages = plan_start.start_from(plan, start, Path(values_out))
    except InputError as error:
        raise InputError(*(_at_keyword(problem, target) for problem in error.problems)) from None
    for message in [*messages, *advice.warnings(plan, evidence=known.evidence)]:
        warnings.warn(message, TransferWarning, stacklevel=2)
    return plan


def _at_keyword(problem: Any, keywords: dict[str, Any]) -> Any:
    """A problem with the target at the keyword that gave it."""
    place, _, what = str(problem).partition(": ")
    place = place.removeprefix("target.").removeprefix("sparsity.")
    return f"{place}: {what}" if place.partition(".")[0] in keywords else problem


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'supar_cli' has no attribute {name!r}")
    module, _, function = _FUNCTIONS[name].rpartition(".")
    return getattr(import_module(f"supar_cli.{module}"), function)
