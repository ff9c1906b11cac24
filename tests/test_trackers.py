"""Trackers, the real packages offline: what they hold after a run that was stopped and continued, and what goes wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training import run_directory, trackers
from supar_cli.training.trainer import Trainer
from tests.conftest import Called

MakePlan = Callable[..., Plan]
Supar = Callable[..., Called]
Points = dict[int, float]


def tensorboard_points(directory: Path, name: str) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard")).Reload()
    return {event.step: event.value for event in found.Scalars(name)}


def mlflow_points(directory: Path, name: str) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{directory.parent / 'mlflow.db'}")
    identity = json.loads((directory / trackers.IDS).read_text())["mlflow"]
    (experiment,) = client.search_experiments(filter_string="name = 'supar'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == identity and run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "12" and run.data.params["plan"].startswith("sha256:")
    return {point.step: point.value for point in client.get_metric_history(identity, name)}


def wandb_records(data: bytes, at: int = 7) -> Iterator[bytes]:
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; crc, length, kind)."""
    whole = b""
    while at < len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def wandb_points(directory: Path, name: str) -> Points:
    from wandb.proto import wandb_internal_pb2

    found: Points = {}
    identity = json.loads((directory / trackers.IDS).read_text())["wandb"]
    files = sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2 and {path.name for path in files} == {f"run-{identity}.wandb"}
    for path in files:
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if name in values:
                found[values["_step"]] = values[name]
    return found


READERS = {"tensorboard": tensorboard_points, "mlflow": mlflow_points, "wandb": wandb_points}


@pytest.mark.parametrize("name", READERS)
def test_it_holds_a_run_that_was_stopped_and_continued(
    plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip(name, reason=f"needs the extra {name}")
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = plan_of(run={"log_every": 2, "trackers": [name]}, train={"eval_every": 3})
    directory = tmp_path / "run"
    with run_directory.open_run(directory, plan, resume=True, force=False):
        trainer = Trainer(plan)
        with pytest.raises(Exception, match="stopped at step 6 of 12 by a test"):
            trainer.run(directory, stop=lambda: "a test" if trainer.done == 6 else None)
    with run_directory.open_run(directory, plan, resume=True, force=False):
        Trainer(plan).run(directory, resume=True)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for metric in ("loss", "validation_loss", "lr", "grad_norm"):
        kept = {r["step"]: r[metric] for r in records if metric in r and ("lr" in r or "validation_loss" in r)}
        assert len(kept) >= 4 and READERS[name](directory, metric) == pytest.approx(kept, rel=1e-6)


class TestWrong:
    @pytest.mark.parametrize("name", READERS)
    def test_one_that_is_not_installed_is_named_at_the_start(
        self, plan_of: MakePlan, supar_here: Supar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        (tmp_path / "plan.yaml").write_text(document.write([plan_of().model_dump()]), "utf-8")
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda word, *rest: None if word == name else found(word, *rest)
        )
        ended = supar_here("train", "-o", "run", "--tracker", name)
        assert ended.status == 3 and not (tmp_path / "run").exists()
        assert f"run.trackers: {name} is not installed; expected `pip install {name}" in ended.err

    def test_one_that_is_none(self, plan_of: MakePlan, supar_here: Supar, tmp_path: Path) -> None:
        (tmp_path / "plan.yaml").write_text(document.write([plan_of().model_dump()]), "utf-8")
        ended = supar_here("train", "-o", "run", "--tracker", "comet")
        assert (
            ended.status == 2
            and "run.trackers[0]: should be 'tensorboard', 'wandb' or 'mlflow', not 'comet'" in ended.err
        )

    @pytest.mark.parametrize("where", ["open", "log", "close"])
    def test_one_that_fails_does_not_stop_the_training(
        self, plan_of: MakePlan, supar_here: Supar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        class Failing:
            identity = None

            def __init__(self, *_: Any) -> None:
                self.do("open")

            def do(self, what: str) -> None:
                if what == where:
                    raise ConnectionError("no route to host")

            def log(self, *_: Any) -> None:
                self.do("log")

            def close(self, *_: Any) -> None:
                self.do("close")

        monkeypatch.setitem(trackers.KINDS, "tensorboard", Failing)
        (tmp_path / "plan.yaml").write_text(document.write([plan_of().model_dump()]), "utf-8")
        monkeypatch.setattr(trackers, "require", lambda plan: None)
        ended = supar_here("train", "-o", "run", "-q", "--tracker", "tensorboard")
        assert ended.status == 0 and (tmp_path / "run/result.json").exists()
        assert ended.err.count("warning: tensorboard: ConnectionError: no route to host; no longer logged there") == 1
