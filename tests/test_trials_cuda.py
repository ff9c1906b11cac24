"""Trials on CUDA devices: the process that hands them out takes no device's memory, and learns the devices' names from records."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from supar_cli.errors import InputError
from supar_cli.experiments import coordinate_check, search, sweep
from supar_cli.jobs import runs
from supar_cli.jobs.workers import Local, Workers
from supar_cli.planning.plan import Plan
from supar_cli.training.runtime import Runtime, device_of
from tests import studies
from tests.conftest import proxy_fields
from tests.test_sweep import sweep_of
from tests.test_tune import Heard

MakePlan = Callable[..., Plan]
NAME = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CUDA devices, which torch counts; that this process begins to use one fails."""

    def begin(*_: object) -> None:
        raise AssertionError("this process uses CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("_lazy_init", "set_device"):  # the second one, too, begins in torch's C++
        monkeypatch.setattr(torch.cuda, name, begin)


class Elsewhere(Local):
    """Makes calls as another process would that has used a device; its runs are the CPU's."""

    def results(self, function: Any, calls: list[Any]) -> Any:
        found = {"is_available": lambda: False, "is_initialized": lambda: True, "get_device_name": lambda: NAME}
        for index, call in enumerate(calls):
            with mock.patch.multiple(torch.cuda, **found):
                record = function(*call)
            yield index, record


@pytest.mark.usefixtures("two_devices")
class TestParent:
    def test_a_search_with_workers_takes_no_device(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The workers are processes of their own, which find no device and train on the CPU."""
        spec = studies.write_spec(tmp_path, 2, 4, further=False)
        spec = spec.model_copy(update={"run": spec.run.model_copy(update={"device": "auto"})})
        monkeypatch.chdir(tmp_path)
        proxy = search.tune(spec, tmp_path / "proxy.journal", jobs=2, reporter=Heard())
        assert proxy.evidence["trials"]["complete"] == 2

    def test_a_sweep_and_a_check_name_the_devices_of_their_runs(
        self, text_file: Path, plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (sweep, coordinate_check):
            monkeypatch.setattr(module, "make_workers", lambda **_: Elsewhere(2))
        monkeypatch.setattr(runs, "validation_loss", lambda plan, folder: 2.0 + plan.hyperparameters.lr)
        fields = proxy_fields(str(text_file), run={"device": "auto"})
        shared = {"data": fields["data"], "run": fields["run"]}
        arms = {"random": {}, "pruned": {"prune": "energy"}}  # a run to prune is trained too
        study = sweep_of(seeds=1, parameterizations=[], arms=arms, **shared)
        found = [sweep.sweep(study, tmp_path / "sweep")]
        plan = plan_of(run={"device": "auto"}, target={"width": 32})
        found.append(coordinate_check.check(plan, steps=2, seeds=1, max_seeds=1, out=tmp_path / "check"))
        assert [one["environment"]["cuda"] for one in found] == [NAME, NAME]

    def test_what_asked_before_would_not_have_passed(self, plan_of: MakePlan) -> None:
        """The controls of the tests above: a run's own checks, and the name of this process's device."""
        plan = plan_of(run={"device": "auto"})
        runs.require_runnable(plan)
        for ask in (lambda: Runtime.of(plan), torch.cuda.get_device_name, torch.cuda.current_device):
            with pytest.raises(AssertionError, match="this process uses CUDA"):
                ask()

    def test_what_needs_no_device_to_be_seen_is_still_refused(self, plan_of: MakePlan) -> None:
        assert device_of("auto") == torch.device("cuda", 0)
        with pytest.raises(InputError, match=r"run\.micro_batch_size: 3 does not divide the batch size 4"):
            runs.require_runnable(plan_of(run={"device": "cuda", "micro_batch_size": 3}))


def test_one_call_runs_in_a_worker_where_there_are_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process it would keep a device's memory from the workers to come; without devices it runs here."""
    monkeypatch.setattr(Workers, "results", lambda *_: iter([(0, "elsewhere")]))
    for devices, where in ((["0", "1"], "elsewhere"), ([], os.getpid())):
        with Local(2, devices) as workers:
            assert list(workers.results(os.getpid, [()])) == [(0, where)]
