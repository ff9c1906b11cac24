"""The block engine against a dense float64 reference: plain torch, and the Triton kernels in Triton's interpreter.

The interpreter must be chosen before the kernels are defined, so one subprocess (`python -m` this file) runs all of its
cases and prints the errors as JSON. CUDA tests run the compiled kernels and skip without a device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from supar_cli.sparse import block as engine
from supar_cli.sparse.block import Block
from supar_cli.sparse.block_structure import Structure
from supar_cli.sparse.masks import Mask
from tests.conftest import CHECKOUT

Kernels = Literal["auto", "triton", "torch"]
Change = Callable[[Block], None]
BF16, FP32 = torch.bfloat16, torch.float32
EXACT = 1e-4  # chosen: sums of some hundred float32 terms of size 1 are off by 1e-6, and the floor below is 1e-2
HALF_ULP = 2.0**-8 * 1.001  # bfloat16 keeps 8 bits and rounds once; the interpreter cuts off instead: a whole ulp
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is not installed")


@dataclass(frozen=True)
class Case:
    """Which blocks live (rows of 0 and 1), their edge, the shape of the inputs before their width, and their dtype."""

    alive: str
    block: int
    lead: tuple[int, ...]
    dtype: torch.dtype = FP32

    @property
    def mask(self) -> NDArray[np.bool_]:
        alive = np.array([[mark == "1" for mark in row] for row in self.alive.split()])
        return np.kron(alive, np.ones((self.block, self.block))) > 0


WIDE, EMPTY_LINES = "10110 01001 11010", "0100 0000 1101 0000"  # 3×5; 4×4 with two dead rows and one dead column
CASES = {
    "wide": Case(WIDE, 16, (37,)),
    "wide_32": Case(WIDE, 32, (37,)),
    "wide_64": Case("101 110", 64, (33,)),
    "tall_128": Case("1 0 1", 128, (5,)),
    "whole_tiles": Case(WIDE, 16, (64,)),
    "one_token": Case(WIDE, 16, (1,)),
    "one_vector": Case(WIDE, 16, ()),
    "three_axes": Case(WIDE, 32, (2, 3)),
    "no_token": Case(WIDE, 16, (0,)),
    "empty_lines": Case(EMPTY_LINES, 16, (19,)),
    "all_alive": Case("111 111", 16, (40,)),
    "one_alive": Case("000 010", 32, (40,)),
    "none_alive": Case("000 000", 16, (4,)),
    "one_by_one": Case("1", 16, (3,)),
    "split_sum": Case("01 10", 16, (2100,)),
    "four_at_once": Case("11111111 11101111", 16, (2100,)),
    "two_at_once_128": Case("11 11", 128, (5,)),
    "bf16": Case(WIDE, 16, (37,), BF16),
    "bf16_32": Case(WIDE, 32, (2, 35), BF16),
    "bf16_empty_lines": Case(EMPTY_LINES, 32, (5,), BF16),
    "bf16_split_sum": Case("01 10", 16, (2100,), BF16),
}


def error(made: Tensor, wanted: Tensor) -> float:
    """Largest |made - wanted| relative to |wanted| plus a hundredth of its maximum. Infinite where shapes differ."""
    if made.shape != wanted.shape or not made.numel():
        return 0.0 if made.shape == wanted.shape else float("inf")
    size = wanted.abs() + 1e-2 * wanted.abs().max() + 1e-30
    return float(((made.detach().double() - wanted).abs() / size).max())


def errors(case: Case, kernels: Kernels, device: str = "cpu", change: Change | None = None) -> dict[str, float]:
    """Errors of y, dx and dvalues against F.linear with the dense weight in float64, from operands of the same bits."""
    mask, draw = torch.from_numpy(case.mask), torch.Generator().manual_seed(0)
    d_out, d_in = mask.shape
    dense = torch.randn(d_out, d_in, generator=draw)
    x = torch.randn(*case.lead, d_in, generator=draw).to(case.dtype).requires_grad_()
    dy = torch.randn(*case.lead, d_out, generator=draw).to(case.dtype)
    x_wide = x.detach().double().requires_grad_()
    weight = (dense * mask).to(case.dtype).double().requires_grad_()
    y = F.linear(x_wide, weight)
    dx, dweight = torch.autograd.grad(y, (x_wide, weight), dy.double())

    layer = Block(Mask.of(case.mask), case.block, kernels)
    if change is not None:
        change(layer)
    values = dense[mask].to(device).requires_grad_()
    made = layer.to(device)(x.to(device), values)
    dx_made, dvalues_made = torch.autograd.grad(made, (x, values), dy.to(device))
    assert (made.dtype, dx_made.dtype, dvalues_made.dtype) == (case.dtype, case.dtype, FP32)
    pairs = {"y": (made, y.detach()), "dx": (dx_made, dx), "dvalues": (dvalues_made, dweight[mask])}
    return {name: error(one.cpu(), other) for name, (one, other) in pairs.items()}


def assert_close(found: dict[str, float], dtype: torch.dtype, rounding: float = HALF_ULP) -> None:
    rounded = EXACT if dtype == FP32 else rounding
    assert found["y"] <= rounded and found["dx"] <= rounded, found
    assert found["dvalues"] <= EXACT, found  # never rounded to the inputs' dtype


def fault(name: str) -> Change:
    """One buffer the other way round, rows swapped with columns, or the values of a weight stored by block columns."""

    def change(layer: Block) -> None:
        if name == "swap":
            layer.rows, layer.columns = layer.columns, layer.rows
            return
        if name == "groups":
            layer.groups[:, 1] = layer.groups[:, 1].flip(0)  # blocks of several rows in one group
            return
        numbers, by_column = layer.get_buffer(name), layer.get_buffer("transposed_numbers").long()
        values = name in ("order", "inverse")
        numbers[:] = numbers.view(-1, layer.block)[by_column].reshape(-1) if values else numbers.flip(0)

    return change


# what each fault must spoil; plain torch reads no pointers and needs no transposed structure
FAULTS = {"order": "y dx", "inverse": "dvalues", "rows": "dvalues", "columns": "y dvalues", "swap": "y dvalues"}
TRITON_FAULTS = FAULTS | {"pointers": "y", "transposed_pointers": "dx"}
TRITON_FAULTS |= {"transposed_rows": "dx", "transposed_numbers": "dx", "groups": "dvalues"}
FAULTY = Case("1101 0101 1000 0011", 16, (9,))


@pytest.mark.parametrize("name", CASES)
def test_torch_kernels_equal_a_dense_layer(name: str) -> None:
    assert_close(errors(CASES[name], "torch"), CASES[name].dtype)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_structure_is_noticed(name: str) -> None:
    found = errors(FAULTY, "torch", change=fault(name))
    assert all(found[part] > 0.1 for part in FAULTS[name].split()), found
    assert_close(errors(FAULTY, "torch"), FP32)


def test_the_result_is_the_same_in_any_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(engine._chunks(8, 16, torch.device("cpu"))) == 1
    for limit, chunks in ((1, 8), (3 * 37 * 16, 3)):
        monkeypatch.setattr(engine, "CPU_CHUNK_NUMBERS", limit)
        assert len(engine._chunks(8, 37 * 16, torch.device("cpu"))) == chunks
        assert_close(errors(CASES["wide"], "torch"), FP32)


@settings(max_examples=25, deadline=None)
@given(
    alive=st.integers(1, 4).flatmap(lambda n: st.lists(st.text("01", min_size=n, max_size=n), min_size=1, max_size=4)),
    block=st.sampled_from([16, 32]),
    lead=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    dtype=st.sampled_from([FP32, BF16]),
)
def test_any_structure_equals_a_dense_layer(alive: list[str], block: int, lead: list[int], dtype: torch.dtype) -> None:
    assert_close(errors(Case(" ".join(alive), block, tuple(lead), dtype), "torch"), dtype)


def test_float64_gradients_are_those_of_finite_differences() -> None:
    layer = Block(Mask.of(Case("01 11", 16, ()).mask), 16)
    values = torch.randn(layer.live, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    assert layer(x, values).dtype == torch.float64
    assert torch.autograd.gradcheck(layer, (x, values), fast_mode=False)


def test_values_are_those_of_the_mask_in_row_major_order() -> None:
    mask = CASES["wide"].mask
    layer, dense = Block(Mask.of(mask), 16), torch.zeros(mask.shape)
    values = torch.arange(1.0, layer.live + 1)
    dense[torch.from_numpy(mask)] = values
    assert torch.equal(layer(torch.eye(mask.shape[1]), values), dense.T)
    blocks = engine.blocks_of(values, layer.get_buffer("order"), 16, FP32)
    assert torch.equal(blocks[1], dense[:16, 32:48])
    assert torch.equal(engine.values_of(blocks, layer.get_buffer("inverse")), values)


def test_autocast_gives_its_dtype_and_float32_gradients() -> None:
    layer = Block(Mask.of(CASES["wide"].mask), 16)
    x, values = torch.randn(7, layer.d_in, requires_grad=True), torch.randn(layer.live, requires_grad=True)
    with torch.autocast("cpu", dtype=BF16):
        y = layer(x, values)
    assert y.dtype == BF16 and torch.equal(y, layer(x.to(BF16), values))
    assert [gradient.dtype for gradient in torch.autograd.grad(y.sum(), (x, values))] == [FP32, FP32]
    with torch.autocast("cpu", dtype=BF16):
        assert layer(x.double(), values.double()).dtype == torch.float64


def test_the_engine_has_no_parameters_and_saves_nothing() -> None:
    layer = Block(Mask.of(CASES["wide"].mask), 16)
    assert not list(layer.parameters()) and not layer.state_dict()
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.int32}
    layer.refresh(torch.zeros(layer.live))
    assert {buffer.device.type for buffer in layer.to("meta").buffers()} == {"meta"}


def test_other_masks_and_shapes_are_refused() -> None:
    shifted, message = np.roll(Case("10 00", 16, ()).mask, 1, axis=1), "block is 8|not made of|only partly live"
    masks = (np.ones((32, 32)), 8), (np.ones((32, 40)), 16), (np.tri(32), 16), (shifted, 16)
    for mask, block in masks:
        with pytest.raises(ValueError, match=message):
            Block(Mask.of(mask > 0), block)
    layer = Block(Mask.of(CASES["wide"].mask), 16)
    for width, live in ((96, layer.live), (80, layer.live - 1)):
        with pytest.raises(ValueError, match="expected"):
            layer(torch.zeros(3, width), torch.zeros(live))


def test_without_triton_only_its_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "supar_cli.sparse.block_kernels", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not Block(Mask.of(CASES["wide"].mask), 16).has_triton
    with pytest.raises(ModuleNotFoundError):
        Block(Mask.of(CASES["wide"].mask), 16, "triton")


def test_torch_kernels_compile_whole() -> None:
    layer = Block(Mask.of(CASES["wide"].mask), 16)
    x, values = torch.randn(9, layer.d_in, requires_grad=True), torch.randn(layer.live, requires_grad=True)

    def loss(x: Tensor, values: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return layer(x, values).float().square().sum()  # type: ignore[no-any-return]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    made, wanted = (torch.autograd.grad(call(x, values), (x, values)) for call in (compiled, loss))
    assert all(torch.equal(one, other) for one, other in zip(made, wanted, strict=True))


def interpreted() -> dict[str, Any]:
    """All that runs in the interpreter: errors by case, by fault, and at random structures."""
    from supar_cli.sparse import block_kernels

    rng, drawn = np.random.default_rng(0), []
    for columns in (1, 2, 3, 4, 2, 3):
        alive = " ".join("".join(rng.choice(["0", "1"], columns)) for _ in range(rng.integers(1, 4)))
        drawn.append(Case(alive, int(rng.choice([16, 32])), (int(rng.integers(1, 70)),)))
    layer = Block(Mask.of(CASES["wide"].mask), 16, "triton")
    with pytest.raises(ValueError, match="float64"):
        layer(torch.zeros(1, 80, dtype=torch.float64), torch.zeros(layer.live))
    assert block_kernels.INTERPRETED
    layer, x = Block(Mask.of(CASES["four_at_once"].mask), 16, "triton"), torch.randn(2100, 128)
    structure = [layer.get_buffer(name) for name in Structure._fields]
    twice = [block_kernels.block_linear_grad_values(x[:, :32], x, structure, 16) for _ in range(2)]
    return {
        "repeats": torch.equal(*twice),
        "splits": [block_kernels.splits_of(tokens, 2) for tokens in (1, 2048, 2100, 10**6)],
        "cases": {name: errors(case, "triton") for name, case in CASES.items()},
        "faults": {name: errors(FAULTY, "triton", change=fault(name)) for name in TRITON_FAULTS},
        "drawn": {f"{case}": errors(case, "triton") for case in drawn},
    }


@cache
def interpreter() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "tests.test_engine_block"]
    ended = subprocess.run(call, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300)
    if ended.returncode and "only 0-dimensional arrays can be converted" in ended.stderr:
        pytest.skip("this Triton's interpreter does not run with this numpy")  # 3.6 with numpy 2.4
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout)  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_triton_kernels_equal_a_dense_layer(name: str) -> None:
    assert_close(interpreter()["cases"][name], CASES[name].dtype, 2 * HALF_ULP)


@needs_triton
@pytest.mark.parametrize("name", TRITON_FAULTS)
def test_a_fault_of_the_structure_is_noticed_by_triton(name: str) -> None:
    found = interpreter()["faults"][name]
    assert all(found[part] > 0.1 for part in TRITON_FAULTS[name].split()), found


@needs_triton
def test_triton_kernels_at_random_structures_and_when_sums_are_split() -> None:
    assert len(interpreter()["drawn"]) >= 5 and interpreter()["repeats"]
    for found in interpreter()["drawn"].values():
        assert_close(found, FP32)
    assert interpreter()["splits"] == [1, 1, 2, 32]  # of the cases, only the split sums have more than 2048 tokens


def on_cuda(test: Callable[..., None]) -> Callable[..., None]:
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use")
    return pytest.mark.cuda(without(needs_triton(test)))


@on_cuda
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "float32"])
def test_both_kernels_equal_a_dense_layer_on_cuda(block: int, dtype: torch.dtype) -> None:
    for alive in (WIDE, EMPTY_LINES, "111 111"):
        for lead in ((1,), (3, 67), (5000,)):
            assert_close(errors(Case(alive, block, lead, dtype), "triton", "cuda"), dtype)
        assert_close(errors(Case(alive, block, (67,), dtype), "torch", "cuda"), dtype)


@on_cuda
def test_cuda_uses_triton_compiles_whole_and_repeats_to_the_bit() -> None:
    layer = Block(Mask.of(CASES["wide_64"].mask), 64).to("cuda")
    assert layer.has_triton
    x = torch.randn(4500, layer.d_in, device="cuda", requires_grad=True)
    values = torch.randn(layer.live, device="cuda", requires_grad=True)

    def gradients(call: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", dtype=BF16):
            y = call(x, values)
        return (y, *torch.autograd.grad(y.float().square().sum(), (x, values)))

    first, again = gradients(layer), gradients(layer)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for one, other in zip(gradients(torch.compile(layer, fullgraph=True)), first, strict=True):
        assert error(one, other.double()) < 4 * HALF_ULP  # roundings of y may differ, and dy is made of y


if __name__ == "__main__":
    print(json.dumps(interpreted()))
