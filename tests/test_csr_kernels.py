"""The sparse engine's compiled loops: bits, ragged tiles, threads, numbers that are not finite, GELU, planted faults, machine code."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from supar_cli.files import cache_folder
from supar_cli.sparse import csr_kernels, csr_machine, csr_run
from supar_cli.sparse.csr import Sparse
from supar_cli.sparse.masks import Mask
from tests.conftest import environment
from tests.test_engines import drawn, largest_error, numbers

FORMS = "none", "tanh"
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


def passes(engine: Sparse | Partial, x: Tensor, values: Tensor, gradient: Tensor) -> list[Tensor]:
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


@pytest.mark.parametrize("form", FORMS)
class TestGelu:
    def test_inside_the_products(self, tile: int, form: str, threads: Callable[[int], None]) -> None:
        """In tiles that are cut, in groups of columns too."""
        other = next(one for one in FORMS if one != form)
        for shape, tokens, count in (((72, 136), 100, 1), ((130, 200), 3, 3), ((16, 1), 33, 2)):
            threads(count)
            mask = drawn(shape, 0.3)
            engine = Sparse(mask, "numba")
            assert largest_error(numbers(engine, mask, (tokens,), gelu=form)) <= 2e-5, shape
            # the control: the other form is seen
            assert largest_error(numbers(engine, mask, (tokens,), gelu=form, expected=other)) > 1e-4, shape

    def test_is_near_to_the_exact_one(self, form: str) -> None:
        """In units in the last place of the larger of |y| and |x| / 2, and of the larger of the slope and 1/2."""
        x = torch.cat((torch.linspace(-12, 12, 2**16), torch.tensor([0.0, -0.0, 1e-30, -1e6, 1e6, -1e38, 1e38])))
        engine = Sparse(Mask.of(np.ones((1, 1), np.bool_)), "numba")
        found = passes(Partial(engine, form), x[:, None], torch.ones(1), torch.ones(len(x), 1))[:2]
        exact, torchs = (gelu_and_slope(x.to(kind), form) for kind in (torch.float64, torch.float32))
        for number, least in ((0, x.abs() / 2), (1, torch.full_like(x, 0.5))):
            unit = torch.from_numpy(np.spacing(torch.maximum(exact[number].float().abs(), least).numpy()))
            errors = [(each.flatten() - exact[number]).abs() / unit for each in (found[number], torchs[number])]
            ours, theirs = (float(each.max()) for each in errors)
            assert ours <= 3 and (form == "tanh" or ours < theirs) and (errors[0][-4:] <= 3).all()

    def test_numbers_that_are_not_finite_stay_so(self, form: str) -> None:
        engine, x, values, gradient = layer((8, 8), 20, 1.0)
        for place, planted in enumerate((float("nan"), float("inf"), -float("inf"))):
            x[place, place] = planted
        y, by_x, by_values = passes(Partial(engine, form), x, values, gradient)
        assert not y[:3].isfinite().any() and y[3:].isfinite().all() and by_x[3:].isfinite().all()
        assert not by_values.view(8, 8)[:, :3].isfinite().any() and by_values.view(8, 8)[:, 3:].isfinite().all()


class Partial:
    """An engine whose X passes through a form of GELU first."""

    def __init__(self, engine: Sparse, form: str) -> None:
        self.engine, self.form = engine, form

    def __call__(self, x: Tensor, values: Tensor) -> Tensor:
        return self.engine(x, values, self.form)  # type: ignore[no-any-return]


def gelu_and_slope(x: Tensor, form: str) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = F.gelu(x, approximate=form)
    y.sum().backward()
    return [y.detach(), x.grad]  # type: ignore[list-item]


FAULTS = {  # kernel, text, what is planted
    "a tile's tail is left out": ("product", "for t in range(count):", "for t in range(rows):"),
    "an empty row is not written": ("product", "                _sum_row(", "                if stop > one: _sum_row("),
    "a transposed tile": ("product", "for k in (0, 2, 1, 3, 4, 6, 5, 7)", "for k in range(8)"),
    "weights beside eight have no gradient": ("gradients", "(LANES, 1) if others", "(LANES,) if others"),
    "every tile's gradient is the first's": ("gradients", "_turn(a.gradient + 4 * first * out,", "_turn(a.gradient,"),
    "the first columns alone pass through GELU": (
        "product",
        "activate(a.gelu, turned + 4 * start * tile,",
        "activate(a.gelu, turned,",
    ),
    "a gradient without GELU's slope": ("gradients", "scale(panel, slopes, columns * tile)", "pass"),
    "values' gradients from X itself": ("gradients", "activate(a.gelu, inputs,", "activate(a.gelu, panel,"),
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
    alive = drawn((70, 90), 0.3).alive()
    alive[69] = False  # in the second panel: the first has left row 5's sums at its place
    mask = Mask.of(alive)
    form = "none" if "activate" in text or "scale" in text else None
    assert largest_error(numbers(Sparse(mask, "numba"), mask, (77,), gelu=form)) <= 1e-5
    sound, faulty = csr_run.address_of, getattr(module, kernel)
    monkeypatch.setattr(csr_run, "address_of", lambda name: faulty.address if name == kernel else sound(name))
    torch.use_deterministic_algorithms(
        True
    )  # fills new memory with NaN: what is not written may be the right result of before
    try:
        assert not largest_error(numbers(Sparse(mask, "numba"), mask, (77,), gelu=form)) <= 1e-2
    finally:
        torch.use_deterministic_algorithms(False)


class TestMachineCode:
    """Kept in a file, and compiled where that is not what was written, or can't be."""

    @pytest.fixture
    def compiled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """An empty folder for the file, and its name each time that kernels are compiled."""
        name = f"kernels-{csr_machine.key().hex()[:16]}.o"
        csr_machine.machine()
        code = next(path for path in (folder / name for folder in csr_machine.folders()) if path.is_file()).read_bytes()
        made = list[str]()
        monkeypatch.setattr(csr_machine, "machine_code", lambda kernels: made.append(name) or code[32:])
        monkeypatch.setattr(csr_machine, "folders", lambda: (tmp_path / "file" / "no", tmp_path / "supar"))
        (tmp_path / "file").touch()
        monkeypatch.setattr(csr_machine, "machine", csr_machine.machine.__wrapped__)
        return made

    def test_is_read_by_later_processes(self, compiled: list[str], tmp_path: Path) -> None:
        for _ in range(3):
            assert csr_machine.machine().get_function_address("product")
        assert len(compiled) == 1 and [path.name for path in (tmp_path / "supar").iterdir()] == compiled[:1]

    @pytest.mark.parametrize("fault", ["cut", "a bit", "another's", "empty", "a folder"])
    def test_that_is_not_what_was_written(self, compiled: list[str], tmp_path: Path, fault: str) -> None:
        csr_machine.machine()
        place = tmp_path / "supar" / compiled[0]
        written = place.read_bytes()
        changed = bytearray(written)
        changed[len(changed) // 2] ^= 1
        digest = hashlib.sha256(bytes(32) + written[32:]).digest()  # as of other sources, versions or processors
        content = {"cut": written[:-9], "a bit": bytes(changed), "another's": digest + written[32:], "empty": b""}
        place.unlink()
        if fault == "a folder":
            place.mkdir()
        else:
            place.write_bytes(content[fault])
        assert csr_machine.machine().get_function_address("total") and len(compiled) == 2
        assert fault == "a folder" or place.read_bytes() == written

    def test_needs_no_folder(self, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(csr_machine, "folders", lambda: (tmp_path / "file" / "no",) * 2)
        assert csr_machine.machine().get_function_address("gradients") and len(compiled) == 1

    def test_needs_no_home(self, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """As in a container whose user the system doesn't know."""
        for name in ("HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
        monkeypatch.setattr(csr_machine, "folders", lambda: (cache_folder(), cache_folder()))
        assert csr_machine.machine().get_function_address("gradients") and len(compiled) == 1

    def test_follows_from_no_setting_of_the_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
        numba.config.reload_config()
        with csr_machine._numba_as_it_comes():
            assert not numba.config.BOUNDSCHECK
        assert numba.config.BOUNDSCHECK and os.environ["NUMBA_BOUNDSCHECK"] == "1"
        monkeypatch.undo()
        numba.config.reload_config()

    def test_that_is_kept_needs_no_numba(self) -> None:
        csr_machine.machine()
        found = python(
            "import sys; from supar_cli.sparse import csr_machine; csr_machine.machine(); print('numba' in sys.modules)"
        )
        assert found == "False"

    def test_asks_for_nothing_of_numba(self) -> None:
        """A step of 0 raises an error, by functions that are in no process without numba."""

        @csr_kernels._compiled  # type: ignore[untyped-decorator]
        def raising(call: Any) -> None:
            for _ in range(0, 10, csr_kernels.carray(call, 1)[0].tile):
                pass

        with pytest.raises(RuntimeError, match=r"kernels call .*numba_gil_ensure"):
            csr_machine.machine_code({"raising": raising})


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


def python(code: str) -> str:
    """What a process of its own prints."""
    return subprocess.check_output([sys.executable, "-c", code], env=environment(), text=True).strip()


def assembly(text: str, triple: str, processor: str, features: str) -> str:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target: Any = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features, opt=3)
    return str(target.emit_assembly(llvm.parse_assembly(text)))
