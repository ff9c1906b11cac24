"""Copies of a run's metrics in TensorBoard, Weights & Biases or MLflow. metrics.jsonl is always written too.

Nothing leaves the machine unless the tracker's own settings say so (WANDB_MODE=online, MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from supar_cli.errors import SetupError
from supar_cli.files import naming_write_errors, read_json, write_file
from supar_cli.planning.plan import Plan

UNTRACKED = ("step", "lr_factor", "peak_share", "clipped")  # numbers in a step's record that trackers don't get
IDS = "trackers.json"  # the run's names at its trackers, by which a continued run is found again


class Tracker(NamedTuple):
    """An open tracker: `log(name, value, step)`, `close(finished)`, and the run's name there, None if it needs none."""

    log: Callable[[str, float, int], object]
    close: Callable[[bool], object]
    identity: str | None = None


def open_tensorboard(plan: Plan, directory: Path, done: int, identity: str | None) -> Tracker:
    """Write event files in the run's `tensorboard/`."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1 if done else None)  # type: ignore[no-untyped-call]
    if not done:
        writer.add_text("plan", "    " + json.dumps(settings(plan), indent=1).replace("\n", "\n    "))

    return Tracker(writer.add_scalar, lambda finished: writer.close())


def open_wandb(plan: Plan, directory: Path, done: int, identity: str | None) -> Tracker:
    """Write offline in the run's `wandb/`, for `wandb sync`, unless WANDB_MODE says otherwise."""
    import wandb

    run: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "supar"),
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        dir=str(directory),
        name=directory.name,
        config=settings(plan),
        id=identity,
        resume="allow",
        settings=wandb.Settings(silent=True, console="off"),
    )

    return Tracker(
        lambda name, value, step: run.log({name: value}, step=step),  # wandb joins those of one step
        lambda finished: run.finish(exit_code=0 if finished else 1),
        run.id,
    )


def open_mlflow(plan: Plan, directory: Path, done: int, identity: str | None) -> Tracker:
    """Write to `mlflow.db` next to the run's directory, unless MLFLOW_TRACKING_URI says otherwise."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("alembic", "mlflow"):  # they log how they make their tables
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    local = f"sqlite:///{directory.resolve().parent / 'mlflow.db'}"
    client: Any = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)
    if identity is not None:
        try:
            client.update_run(identity, status="RUNNING")
        except MlflowException:  # the stored id belongs to another database
            identity = None
    if identity is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "supar")
        experiment = client.get_experiment_by_name(name)
        at = experiment.experiment_id if experiment else client.create_experiment(name)
        identity = str(client.create_run(at, run_name=directory.name).info.run_id)
        for key, value in settings(plan).items():
            client.log_param(identity, key, value)

    return Tracker(
        lambda name, value, step: client.log_metric(identity, name, value, step=step),
        lambda finished: client.set_terminated(identity, status="FINISHED" if finished else "KILLED"),
        identity,
    )


KINDS = {"tensorboard": open_tensorboard, "wandb": open_wandb, "mlflow": open_mlflow}
PACKAGES = {"mlflow": "mlflow-skinny sqlalchemy alembic"}  # to install, where they differ from the tracker's name


def require(plan: Plan) -> None:
    """Raise SetupError if a tracker of the plan is not installed."""
    for name in plan.run.trackers:
        if importlib.util.find_spec(name) is None:
            install = f"pip install {PACKAGES.get(name, name)}"
            raise SetupError(f"run.trackers: {name} is not installed; expected `{install}`")


def settings(plan: Plan) -> dict[str, Any]:
    """The settings that a tracker shows: the plan's hash and its scalars, without those of tensors."""
    sections = plan.model_dump(include={"model", "parameterization", "hyperparameters", "sparsity", "train"})
    numbers = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    scalars = {key: value for key, value in numbers.items() if isinstance(value, str | int | float)}
    return {"plan": plan.hash(), **scalars}


class Trackers(AbstractContextManager["Trackers"]):
    """The trackers of a run, as a context. If one fails, it is dropped with a warning and training goes on."""

    def __init__(self, plan: Plan, directory: Path | None, done: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        if directory is None or not plan.run.trackers:
            return
        path = directory / IDS
        ids = self._ids(path) if path.exists() else {}
        for name in plan.run.trackers:
            with self._guarded(name):
                self._open[name] = KINDS[name](plan, directory, done, ids.get(name))
        found = {name: tracker.identity for name, tracker in self._open.items() if tracker.identity}
        if found:
            with naming_write_errors(directory):
                write_file(path, json.dumps(found) + "\n")

    def _ids(self, path: Path) -> dict[str, str]:
        """The run's names at its trackers, if the file can be read."""
        with suppress(SetupError):
            found = read_json(path)
            if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
                return found
        self._warn(f"{path}: is corrupt; trackers start a new run from here")
        return {}

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker's package may raise anything
            self._open.pop(name, None)
            self._warn(f"{name}: {type(error).__name__}: {error}; no longer logged there, metrics.jsonl still is")

    def log(self, record: dict[str, Any]) -> None:
        """Log a step's record if it has more than a loss, as every `run.log_every` steps and at evaluations."""
        if "lr" in record or "validation_loss" in record:
            values = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k not in UNTRACKED}
            for name, tracker in list(self._open.items()):
                with self._guarded(name):
                    for key, value in values.items():
                        tracker.log(key, value, record["step"])

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.close(kind is None)
