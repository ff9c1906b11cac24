"""Rank 3 of 8 on simulated CUDA devices: what it holds, what it exchanges and from where, what it waits for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import run_on_simulated_cuda

Found = dict[str, dict[str, Any]]

KINDS = ("ddp dense", "fsdp dense", "fsdp float32", "fsdp block")
MARKS = {"step": 1, "watched": 4, "evaluation": 10}  # how often the host may wait for the device
GATHERED, AVERAGED = "_allgather_base_ cuda:3", "_reduce_scatter_base_ cuda:3"


@pytest.fixture(scope="module")
def ranks() -> Found:
    return {found["case"]: found for found in run_on_simulated_cuda("cuda_ranks")}


def wrongs(found: dict[str, Any]) -> Iterator[str]:
    """What is wrong in a case of FSDP in bfloat16, or in what any case exchanges and waits for."""
    case = found["case"]
    for what in MARKS.keys() & found:
        waits, exchanged = found[what]["waits"], found[what]["exchanged"]
        if sum(waits.values()) > MARKS[what]:
            yield f"{case}, {what}: {waits}"
        if not exchanged or not all(" cuda:3 torch." in name for name in exchanged):
            yield f"{case}, {what}: exchanges {exchanged}"
    if case.startswith("ddp") or case == "fsdp float32":
        return
    numbers, exchanged = found["numbers"], found["step"]["exchanged"]
    padded = {name: 8 * -(-kept // 8) for name, (kept, _, _) in numbers.items()}
    masked = sum(padded[name] for name, (_, is_masked, _) in numbers.items() if is_masked)
    if exchanged.get(f"{GATHERED} torch.bfloat16") != 2 * 2 * masked:  # for both passes, of 2 bytes
        yield f"{case}: blocks are not gathered in bfloat16: {exchanged}"
    if exchanged.get(f"{AVERAGED} torch.float32") != 4 * sum(padded.values()):
        yield f"{case}: gradients are not averaged in float32: {exchanged}"


@pytest.mark.parametrize("case", KINDS)
def test_all_lies_on_its_own_device_and_hardly_waits(ranks: Found, case: str) -> None:
    found = ranks[case]
    assert found["places"] == ["cuda:3 torch.float32"] and found["buffers"] == ["cuda:3"]
    assert list(wrongs(found)) == []


def test_it_holds_an_eighth_in_shards_and_all_of_the_live_weights_otherwise(ranks: Found) -> None:
    for case in KINDS:
        parts = 1 if case.startswith("ddp") else 8
        for name, (kept, _, held) in ranks[case]["numbers"].items():
            assert held == -(-kept // parts), (case, name)
    assert any(kept % 8 for kept, _, _ in ranks["fsdp dense"]["numbers"].values())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("gathers in float32", "blocks are not gathered in bfloat16"),
        ("averages in bfloat16", "gradients are not averaged in float32"),
        ("sums on the host", "cpu torch.float32"),
    ],
)
def test_a_planted_fault_is_seen(ranks: Found, fault: str, said: str) -> None:
    assert any(said in wrong for wrong in wrongs(ranks[fault]))
