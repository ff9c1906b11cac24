"""CUDA on machines without it: what a step of every kind of plan makes the host wait for, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import run_on_simulated_cuda

# how often the host may wait for the device
MARKS = {"step": 1, "watched": 4}


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    return {found["case"]: found for found in run_on_simulated_cuda("cuda_cases", "steps")}


def over(found: dict[str, Any]) -> Iterator[str]:
    """What a case waits for beyond the marks."""
    for what, most in MARKS.items():
        waits = found[what]["waits"]
        if sum(waits.values()) > most:
            yield f"{found['case']}, {what}: {waits}; expected at most {most}"


def test_all_that_a_trainer_holds_lies_on_the_device(steps: dict[str, dict[str, Any]]) -> None:
    assert {name: found["devices"] for name, found in steps.items()} == {name: ["cuda:0"] for name in steps}
    assert len(steps) >= 8 and {found["precision"] for found in steps.values()} == {"torch.bfloat16", "torch.float32"}


def test_steps_hardly_wait_for_the_device(steps: dict[str, dict[str, Any]]) -> None:
    assert not [line for found in steps.values() for line in over(found)]
    assert all(found["step"]["launches"] > 100 for found in steps.values())


def test_a_step_of_a_run_waits_only_for_what_the_one_before_gave(steps: dict[str, dict[str, Any]]) -> None:
    for found in steps.values():
        (place,) = found["ahead"]["waits"]
        assert place.startswith("event.synchronize at training/step.py") and found["ahead"]["waits"][place] == 1
        assert found["ahead"]["launches"] == found["step"]["launches"]  # a whole step was launched before


def test_one_scatter_refreshes_all_small_tensors(steps: dict[str, dict[str, Any]]) -> None:
    dense = [found for found in steps.values() if found["engines"] == ["dense"]]
    assert len(dense) >= 6
    for found in dense:  # a cat, a cast unless it is float32, and the scatter; each layer alone casts and scatters
        each = 1 + (found["precision"] != "torch.float32")
        assert found["refresh"]["launches"] == 1 + each and found["refresh each"]["launches"] >= 12 * each
