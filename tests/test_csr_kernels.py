"""The sparse engine's compiled loops: bits, ragged tiles, threads, numbers that are not finite, planted faults, machine code."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from llvmlite import ir
from torch import Tensor

from supar_cli.sparse import csr_kernels, csr_run
from supar_cli.sparse.csr import Sparse
from supar_cli.sparse.masks import Mask
from tests.test_engines import drawn, largest_error, numbers

KERNELS = "product", "gradients", "total"


@pytest.fixture(params=csr_kernels.TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(csr_run, "tile_of", lambda width: request.param)
    return int(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def passes(engine: Sparse, x: Tensor, values: Tensor, gradient: Tensor) -> list[Tensor]:
    """Y, dX and the gradients of the values."""
    x, values = x.clone().requires_grad_(), values.clone().requires_grad_()
    y = engine(x, values)
    torch.autograd.backward(y, gradient)
    assert x.grad is not None and values.grad is not None
    return [y.detach(), x.grad, values.grad]


def layer(shape: tuple[int, int], tokens: int, density: float = 0.2) -> tuple[Sparse, Tensor, Tensor, Tensor]:
    mask, random = drawn(shape, density), torch.Generator().manual_seed(2)
    sizes = (tokens, shape[1]), (mask.count,), (tokens, shape[0])
    x, values, gradient = (torch.randn(*size, generator=random) for size in sizes)
    return Sparse(mask, "numba"), x, values, gradient


class TestNumbers:
    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize("tokens", [1, 7, 8, 31, 33, 64, 100, 530])
    def test_of_tiles_that_are_cut(
        self, tile: int, tokens: int, streamed: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(csr_run, "STREAMED_BYTES", 0 if streamed else 2**60)
        for shape in ((72, 136), (65, 130), (3, 16), (16, 1)):
            mask = drawn(shape, 0.3)
            assert largest_error(numbers(Sparse(mask, "numba"), mask, (tokens,))) <= 2e-5, shape

    def test_the_order_of_a_sum_is_that_of_the_columns(self, tile: int) -> None:
        """Y and dX bit for bit: one multiply-add after another, rounded once where the processor can."""
        engine, x, values, gradient = layer((40, 50), 37)
        y, by_x, _ = passes(engine, x, values, gradient)
        weight = np.zeros(engine.shape, np.float32)
        weight[engine.mask.alive()] = values
        for found, left, rows in ((y, x, weight), (by_x, gradient, weight.T)):
            exact, wide = np.zeros(found.shape, np.float32), np.longdouble
            twice = exact.copy()
            for k in range(rows.shape[1]):
                a, b = left.numpy()[:, k : k + 1], rows[None, :, k]
                exact = (a.astype(wide) * b + exact).astype(np.float32)
                twice = a * b + twice
            assert np.array_equal(found, exact) or np.array_equal(found, twice)
            assert not np.array_equal(exact, twice)  # the control: another rounding is seen

    def test_do_not_depend_on_threads(
        self, tile: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = layer((96, 200), 16 * tile + 5)
        found = {}
        for pool in ("OpenMP", "Python"):
            if pool == "Python":
                monkeypatch.setattr(csr_run, "openmp", lambda: None)
            for count in (1, 2, 3, 40):
                threads(count)
                found[pool, count] = passes(*made)
        one = found["OpenMP", 1]
        assert all(torch.equal(a, b) for each in found.values() for a, b in zip(each, one, strict=True))
        monkeypatch.setattr(csr_run, "CHUNKS", 5)
        other = passes(*made)
        assert torch.equal(other[0], one[0]) and not torch.equal(other[2], one[2])  # the control: another order is seen
        assert torch.allclose(other[2], one[2], rtol=1e-4, atol=1e-4)

    def test_a_weights_gradient_does_not_depend_on_its_neighbours(self, tile: int) -> None:
        """Nor on its place among eight: masks that move leave the bits of weights that stay."""
        engine, x, values, gradient = layer((60, 40), 50, 0.6)
        alive = engine.mask.alive()
        fewer = alive & (np.random.default_rng(3).random(alive.shape) < 0.5)
        kept = torch.from_numpy(fewer[alive])
        whole = passes(engine, x, values, gradient)[2]
        part = passes(Sparse(Mask.of(fewer), "numba"), x, values[kept], gradient)[2]
        assert torch.equal(part, whole[kept]) and 0 < len(part) < len(whole)

    @pytest.mark.parametrize("planted", [float("nan"), float("inf"), -float("inf")])
    def test_numbers_that_are_not_finite_pass_through(self, tile: int, planted: float) -> None:
        """To what a live weight carries them to, and to no other token."""
        engine, x, values, gradient = layer((30, 20), 45)
        x[3, 5] = x[44, 0] = gradient[7, 2] = gradient[44, 29] = values[9] = planted
        rows, columns = (torch.from_numpy(part) for part in np.nonzero(engine.mask.alive()))
        x, values, gradient = x.double(), values.double(), gradient.double()
        expected = [
            torch.zeros(45, 30).double().index_add_(1, rows, x[:, columns] * values),
            torch.zeros(45, 20).double().index_add_(1, columns, gradient[:, rows] * values),
            (gradient[:, rows] * x[:, columns]).sum(0),
        ]
        for found, other in zip(passes(engine, x.float(), values.float(), gradient.float()), expected, strict=True):
            assert 0 < other.isfinite().sum() < other.numel()
            assert torch.allclose(found.double(), other, rtol=1e-4, atol=1e-4, equal_nan=True)

    def test_memory_of_sums_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = layer((64, 64), 640)
        many = passes(*made)[2]
        monkeypatch.setattr(csr_run, "MOST_SUMS", 1)
        assert torch.allclose(passes(*made)[2], many, rtol=1e-4, atol=1e-4)


FAULTS = {  # kernel, text, what is planted
    "a tile's tail is left out": ("product", "for t in range(count):", "for t in range(rows):"),
    "an empty row is not written": ("product", "                _sum_row(", "                if stop > one: _sum_row("),
    "a transposed tile": ("product", "for k in (0, 2, 1, 3, 4, 6, 5, 7)", "for k in range(8)"),
    "weights beside eight have no gradient": ("gradients", "(LANES, 1) if others", "(LANES,) if others"),
    "every tile's gradient is the first's": ("gradients", "_turn(a.gradient + 4 * first * out,", "_turn(a.gradient,"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, text, planted = FAULTS[fault]
    source = inspect.getsource(csr_kernels)
    assert source.count(text) == 1
    for other in KERNELS:  # the rest is not compiled again
        if other != kernel:
            source = re.sub(rf"@_compiled.*\n(?=def {other}\()", "", source)
    module = ModuleType("faulty")
    module.__spec__ = importlib.util.spec_from_loader("faulty", None)
    exec(compile(source.replace(text, planted), "faulty", "exec"), module.__dict__)
    alive = drawn((70, 40), 0.3).alive()
    alive[69] = False  # in the second panel: the first has left row 5's sums at its place
    mask = Mask.of(alive)
    assert largest_error(numbers(Sparse(mask, "numba"), mask, (77,))) <= 1e-5
    monkeypatch.setattr(csr_kernels, kernel, getattr(module, kernel))
    torch.use_deterministic_algorithms(
        True
    )  # fills new memory with NaN: what is not written may be the right result of before
    try:
        assert not largest_error(numbers(Sparse(mask, "numba"), mask, (77,))) <= 1e-2
    finally:
        torch.use_deterministic_algorithms(False)


MACHINES = {  # triple, processor, features; instructions of a multiply-add of vectors, and of the largest registers
    "AVX2": ("x86_64-unknown-linux-gnu", "haswell", "", r"vfmadd\w+ps\s.*%ymm", r"%ymm"),
    "AVX-512": ("x86_64-unknown-linux-gnu", "znver4", "", r"vfmadd\w+ps\s.*%ymm", r"%ymm(1[6-9]|2\d|3[01])"),
    "NEON": ("aarch64-unknown-linux-gnu", "neoverse-n1", "", r"fmla\s+v\d+\.4s", r"v3[01]\.4s|q3[01]"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_vectors_become_those_of_each_machine(machine: str) -> None:
    """Without a spill of the sums: a row of 32 tokens keeps its sums in registers."""
    triple, processor, features, multiply_add, registers = MACHINES[machine]
    module = ir.Module()
    module.triple = triple
    for name, emit, arguments in (("row", csr_kernels._emit_row, 7), ("both", csr_kernels._emit_row, 9)):
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * arguments), name)
        builder = ir.IRBuilder(function.append_basic_block())
        emit(builder, *function.args)
        builder.ret_void()
    code = assembly(str(module), triple, processor, features)
    assert re.search(multiply_add, code) and re.search(registers, code)
    assert not re.search(r"call|\bbl\b", code)


def assembly(text: str, triple: str, processor: str, features: str) -> str:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target: Any = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features, opt=3)
    return str(target.emit_assembly(llvm.parse_assembly(text)))
