"""Steps as one CUDA graph, on the shadow device: losses equal the CPU's, and what a graph gets wrong is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from supar_cli.errors import InputError, SetupError
from supar_cli.experiments import search
from supar_cli.experiments.check_plans import sweeps_of
from supar_cli.experiments.curves import grid_plans
from supar_cli.planning.plan import Plan
from supar_cli.training.distributed import ALONE, Ranks
from supar_cli.training.runtime import Runtime
from supar_cli.training.step_graph import WARM_UP_STEPS
from supar_cli.training.trainer import Trainer
from tests import studies
from tests.conftest import run_on_simulated_cuda
from tests.test_sweep import sweep_of

MakePlan = Callable[..., Plan]
# of a loss of 5: rounding, and that of rates to float32. bfloat16 is cast at other places by the autocast of CUDA
NEAR = {"bfloat16": 0.01}
ROUNDING = 1e-5
BESIDE = 10  # operations of a step beside its graph, which do not grow with the model: batch, rates, results


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Any]]:
    return {found["case"]: found for found in run_on_simulated_cuda("graph_cases")}


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("case", ["adamw", "clipped", "micro-batches, dense", "block", "bfloat16"])
def test_losses_are_the_cpus_and_a_resumed_run_the_whole_one(case: str, cases: dict[str, dict[str, Any]]) -> None:
    """Under warm-up and cosine, with evaluations and watched steps between: the last ones are of the last weights."""
    found = cases[case]
    assert apart(found["cpu"], found["whole"]) < NEAR.get(case, ROUNDING)
    if "resumed" in found:
        assert found["resumed_at"] == 4 and found["resumed"] == found["whole"]
    if case == "clipped":  # some of the replays, and not others
        assert set(found["clipped"][WARM_UP_STEPS + 1 :]) == {True, False}


def test_a_step_is_a_launch_whatever_the_model(cases: dict[str, dict[str, Any]]) -> None:
    runs = [found for found in cases.values() if "launches" in found]
    assert len(runs) == 5 and max(found["launches"]["on"] for found in runs) <= BESIDE
    assert all(found["launches"]["off"] > 5 * BESIDE for found in runs)
    assert all(sum(found["waits"].values()) == 1 for found in runs)  # for what the step gave


def test_the_device_stops_steps_after_one_that_is_not_finite(cases: dict[str, dict[str, Any]]) -> None:
    found = cases["not finite"]
    assert found["same"], "the step, or the one launched after it, has changed a weight or moment"
    assert found["why"] == "step 6: the loss is nan; the first tensor that is not finite is the weight final_norm"
    assert found["done"] == 6 and found["next"] == pytest.approx(cases["adamw"]["cpu"][5], abs=ROUNDING)


def test_a_checkpoint_is_trained_with_a_new_graph(cases: dict[str, dict[str, Any]]) -> None:
    """A graph reads and writes the moments of before: with the old one kept, steps are others."""
    wanted = cases["adamw"]["cpu"][4:9]
    assert apart(cases["stale"]["new"], wanted) < ROUNDING < 1e-3 < apart(cases["stale"]["kept"], wanted)


@pytest.mark.parametrize("fault", ["rates of the host", "batch not copied", "gradients left"])
def test_what_a_graph_takes_for_constant_is_seen(fault: str, cases: dict[str, dict[str, Any]]) -> None:
    wrong = cases[f"fault: {fault}"]["losses"]
    right, recorded = (
        cases["clipped"]["whole"][: len(wrong)],
        WARM_UP_STEPS + 1,
    )  # the first replay is of what was recorded
    assert right[:recorded] == wrong[:recorded] and apart(right, wrong) > 1e-3


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("not capturable", "but param_groups' capturable is False"),
        ("clip on the host", "not permitted when stream is capturing"),
        ("a value read", "not permitted when stream is capturing"),
        (
            "a batch of another shape",
            "run.cuda_graph: on, but a batch is (2, 16), the recorded one (4, 16); expected off",
        ),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(fault: str, why: str, cases: dict[str, dict[str, Any]]) -> None:
    assert why in cases[f"fault: {fault}"]["error"]


class TestRefusals:
    def test_of_this_machine(self, plan_of: MakePlan) -> None:
        with pytest.raises(SetupError, match=r"^run\.cuda_graph: on, but the device is cpu; expected off, or a CUDA"):
            Trainer(plan_of(run={"cuda_graph": "on"}))

    @pytest.mark.parametrize(
        ("ranks", "updates", "why"),
        [
            (Ranks(0, 2, 0, 2, is_distributed=True), None, "several processes exchange gradients"),
            (ALONE, {"method": "set"}, "masks move while it trains"),
            (ALONE, None, None),
        ],
    )
    def test_of_the_run(
        self, ranks: Ranks, updates: Any, why: str | None, plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = {"is_available": True, "device_count": 2, "set_device": None, "is_bf16_supported": True}
        for name, value in found.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        sparsity = {"density": 0.25, **({"updates": updates} if updates else {})}
        plan = plan_of(run={"device": "cuda", "compile": "off", "cuda_graph": "on"}, target={"sparsity": sparsity})
        if why is None:
            assert Runtime.of(plan, ranks).has_graph
            return
        with pytest.raises(InputError, match=rf"^run\.cuda_graph: on, but {why}.*; expected off$"):
            Runtime.of(plan, ranks)

    def test_a_check_watches_each_layer_and_takes_no_graph(self, plan_of: MakePlan) -> None:
        plan = plan_of(run={"cuda_graph": "on"})
        (sweep, *_) = sweeps_of(plan, seeds=1, steps=2)
        assert {one.run.cuda_graph for one in sweep.base} == {"off"}


def test_it_reaches_the_trials_of_searches_and_sweeps(tmp_path: Path) -> None:
    spec = studies.write_spec(tmp_path, 2, 4)
    spec = spec.model_copy(update={"run": spec.run.model_copy(update={"cuda_graph": "on"})})
    trials = [plan for part in search.parts(spec) for plan in part.plans]
    runs = grid_plans(sweep_of(run={"cuda_graph": "on"}))
    assert {plan.run.cuda_graph for plan in (*trials, *runs)} == {"on"}


def test_it_is_how_a_plan_is_run_and_no_other_experiment(plan_of: MakePlan) -> None:
    plan, graphed = plan_of(), plan_of(run={"cuda_graph": "on"})
    assert plan.hash() == graphed.hash() and "cuda_graph" not in plan.model_dump()["run"]
