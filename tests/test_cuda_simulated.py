"""CUDA on machines without it: devices and waits of every kind of step, and whole runs whose numbers are the CPU's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import run_on_simulated_cuda

Found = dict[str, dict[str, Any]]

# how often the host may wait for the device; an evaluation is of two batches, or of four
MARKS = {"step": 1, "watched": 3, "evaluation": 1, "capture": 1}
FAULTS = {
    "a buffer on the host": "expected all tensors on one device",
    "an unused buffer on the host": "on cpu, cuda:0",
    "a loss that is read": "_local_scalar_dense",
    "a mask as an index": "index_put_",
    "a tensor made on the host": "at least two devices",
    "copies that block": "blocking copy to the device",
    "batches in pageable memory": "free copy to the device, pageable",
}


@pytest.fixture(scope="module")
def simulated() -> Found:
    return {found["case"]: found for found in run_on_simulated_cuda("cuda_cases", "simulated")}


@pytest.fixture(scope="module")
def shadow() -> Found:
    return {found["case"]: found for found in run_on_simulated_cuda("cuda_cases", "shadow")}


def wrong(found: dict[str, Any]) -> list[str]:
    """What is not as it should be in a case: tensors on the host, waits by file and line."""
    if "error" in found:
        return [found["error"]]
    said = [] if found["devices"] == ["cuda:0"] else [f"tensors lie on {', '.join(found['devices'])}"]
    for what, most in MARKS.items():
        waits = found[what]["waits"]
        if sum(waits.values()) > most:
            said.append(f"{what}: the host waits for {waits}; expected at most {most}")
    return said


def test_every_kind_of_step_lies_on_the_device_and_hardly_waits_for_it(simulated: Found) -> None:
    steps = {name: found for name, found in simulated.items() if name not in FAULTS}
    assert {name: wrong(found) for name, found in steps.items()} == {name: [] for name in steps}
    assert {found["precision"] for found in steps.values()} == {"torch.bfloat16", "torch.float32"}
    assert {found["engines"][0] for found in steps.values()} == {"block", "dense"}
    assert len(steps) == 8 and all(found["step"]["launches"] > 50 for found in steps.values())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told(fault: str, simulated: Found) -> None:
    said = wrong(simulated[fault])
    assert said and FAULTS[fault] in said[0]


RUNS = ("dense", "clipped", "bfloat16", "block", "rigl", "momentum, micro-batches")


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_the_cpus_bit_for_bit_also_where_it_was_cut(kind: str, shadow: Found) -> None:
    cpu, cuda, resumed = (shadow[kind][name] for name in ("cpu", "cuda", "resumed"))
    assert (cuda["devices"], cpu["devices"], resumed["resumed_at"]) == (["cuda:0"], ["cpu"], 4)
    for name in ("losses", "evaluations", "state"):  # the state is the last checkpoint's hash: values, moments, masks
        assert cuda[name] == resumed[name]
        assert cpu[name] == cuda[name] or kind == "clipped"
    # where it clips, a device divides gradients by a number, which a CPU multiplies by its inverse
    assert cpu["losses"] == pytest.approx(cuda["losses"], abs=1e-5) and len(set(cpu["losses"])) == 8


def test_runs_of_other_kinds_are_other_runs(shadow: Found) -> None:
    assert len({shadow[kind]["cuda"]["state"] for kind in RUNS}) == len(RUNS)


def test_a_runs_text_and_scores_are_the_cpus(shadow: Found) -> None:
    assert shadow["used"]["cpu"] == shadow["used"]["cuda"]


def test_only_changes_of_masks_wait(shadow: Found) -> None:
    waits = [sum(found.values()) for found in shadow["moving"]["steps"]]
    assert [count <= MARKS["step"] for count in waits] == [True, True, False] * 2


def test_memory_on_the_host_is_neither_read_nor_written_before_its_copy_is_done(shadow: Found) -> None:
    """A checkpoint that does not wait holds no counter of steps; the simulation sees what a real device would only risk."""
    assert "its tensors are not those of step 4" in shadow["early"]["unwaited"]
    assert "changed before its copy" in shadow["early"]["changed"]


def test_a_step_of_a_run_waits_only_for_what_the_one_before_gave(simulated: Found) -> None:
    for found in (found for name, found in simulated.items() if name not in FAULTS):
        (place,) = found["ahead"]["waits"]
        assert place.startswith("event.synchronize at training/step.py") and found["ahead"]["waits"][place] == 1
        assert found["ahead"]["launches"] == found["step"]["launches"]  # a whole step was launched before


def test_one_scatter_refreshes_all_small_tensors(simulated: Found) -> None:
    dense = [f for name, f in simulated.items() if name not in FAULTS and f["engines"] == ["dense"]]
    assert len(dense) == 7
    for found in dense:  # a cat, a cast unless it is float32, and the scatter; each layer alone casts and scatters
        each = 1 + (found["precision"] != "torch.float32")
        assert found["refresh"]["launches"] == 1 + each and found["refresh each"]["launches"] >= 6 * each
