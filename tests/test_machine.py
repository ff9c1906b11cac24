"""The machine that a run meets: memory that grows with the square of the context, systems, folders and terminals that lack something."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from supar_cli.cli.app import LACKS
from supar_cli.errors import SetupError
from supar_cli.models.transformer import Transformer
from supar_cli.planning import estimate
from supar_cli.planning.plan import Plan
from supar_cli.reporting import runs
from supar_cli.training import runtime
from supar_cli.training.distributed import ALONE
from supar_cli.training.runtime import Runtime, require_host_memory
from tests.conftest import Called

MakePlan = Callable[..., Plan]
Supar = Callable[..., Called]

KINDS: dict[str, dict[str, Any]] = {
    "learned": {"family": "gpt2"},
    "rope": {"family": "llama"},
    "rope, grouped": {"family": "llama", "kv_heads": 2},
    "alibi": {"family": "llama", "positions": "alibi"},
    "alibi, grouped": {"family": "llama", "positions": "alibi", "kv_heads": 1},
    "alibi, gpt2": {"family": "gpt2", "positions": "alibi"},
}


def planned(plan_of: MakePlan, kind: str, context: int, layers: int = 2) -> Plan:
    model = {"width": 16, "heads": 4, "context": context, "layers": layers, **KINDS[kind]}
    return plan_of(model=model, target={"width": 16})


def squares_kept(plan: Plan, rows: int) -> int:
    """Bytes of the tensors (…, context, context) that a forward pass on the CPU keeps for its backward pass."""
    context, kept = plan.decoder.context, dict[int, int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (context, context):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = Transformer(plan.decoder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(torch.zeros(rows, context, dtype=torch.long)).square().mean()  # held, with all that it keeps
        return sum(kept.values()) if loss.requires_grad else 0


class TestSquareOfTheContext:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("rows", "layers"), [(1, 1), (1, 3), (3, 2)])
    def test_all_of_it_is_in_the_estimate(self, plan_of: MakePlan, kind: str, rows: int, layers: int) -> None:
        plan = planned(plan_of, kind, 192, layers)
        kept, counted = squares_kept(plan, rows), estimate.squared_bytes(plan, rows, 4)
        if "alibi" not in kind:
            assert kept == counted == 0
            return
        bias = 4 * 4 * 192**2  # 4 heads, float32
        # the kept ones and as much again, which the allocator does not return, for each block, and what one needs at once
        assert kept == rows * layers * bias and counted == bias + 2 * kept + 2 * rows * bias

    def test_the_estimate_before_would_not_have_passed(self, plan_of: MakePlan) -> None:
        """Without it, a run's memory grew as its context did; a control of the test above."""
        at = {context: planned(plan_of, "alibi", context) for context in (192, 384)}
        linear = {n: estimate.activation_bytes(one, 1, 4) - estimate.squared_bytes(one, 1, 4) for n, one in at.items()}
        assert linear[384] == 2 * linear[192] and squares_kept(at[192], 1) > linear[192]
        assert estimate.squared_bytes(at[384], 1, 4) == 4 * estimate.squared_bytes(at[192], 1, 4)

    def test_it_is_said_and_refused(self, plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        """8 heads, context 32,768: a bias of 32 GiB, where 0.10 GiB were said."""
        monkeypatch.setattr(runtime, "_host_bytes", lambda: 31 * 2**30)
        model = {"width": 16, "heads": 8, "context": 2**15, "layers": 1}
        for positions, device in (("alibi", "cpu"), ("alibi", "cuda"), ("rope", "cpu")):
            plan = plan_of(model={"family": "llama", "positions": positions, **model}, target={"width": 16})
            machine = Runtime(torch.device(device), torch.float32, False, micro_batch=1, rows=1)
            (line,) = [one for one in estimate.lines(plan) if one.startswith("activations")]
            if positions == "rope":
                require_host_memory(plan, machine, ALONE)
                assert "square" not in line
                continue
            assert "ALiBi: 32.00 GiB of bias" in line
            with pytest.raises(SetupError, match="expected a smaller model, context or"):
                require_host_memory(plan, machine, ALONE)


class TestSystem:
    @pytest.mark.parametrize("name", ["fcntl", "resource"])
    @pytest.mark.parametrize("command", [("data", "inspect", "text.txt"), ("train",), ("runs",), ("init", "--list")])
    def test_one_without_a_module_is_named(
        self, supar_here: Supar, monkeypatch: pytest.MonkeyPatch, name: str, command: tuple[str, ...]
    ) -> None:
        monkeypatch.setitem(sys.modules, name, None)  # as on Windows
        found = supar_here(*command)
        assert (found.status, found.out) == (3, "")
        assert (
            found.err
            == f"error: this Python has no module {name}; supar runs on Linux and macOS (on Windows: in WSL)\n"
        )

    def test_a_folder_that_was_removed_is_named(
        self, supar_here: Supar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        found = supar_here("runs")
        assert found.status == 3 and found.err.startswith("error: the working directory was removed; ")

    @pytest.mark.parametrize("number", [*LACKS, errno.EINVAL], ids=str)
    def test_a_lack_is_no_bug(self, supar_here: Supar, monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
        """Of temporary folders, of shared memory, of processes, …; an invalid argument is one."""

        def fail(*_: object) -> None:
            raise OSError("no folder to write to") if number is None else OSError(number, "what lacks")

        monkeypatch.setattr(runs, "folders", fail)
        if number == errno.EINVAL:
            with pytest.raises(OSError, match="what lacks"):
                supar_here("runs", ".")
            return
        found = supar_here("runs", ".")
        assert found.status == 3
        assert found.err == f"error: this system: {'no folder to write to' if number is None else 'what lacks'}\n"

    @pytest.mark.parametrize("name", [b"donn\xc3\xa9es.txt", b"\xe9.txt"], ids=str)
    def test_a_name_that_a_document_cannot_hold_is_named(
        self, supar_here: Supar, proxy_file: Path, tmp_path: Path, name: bytes
    ) -> None:
        """A locale without UTF-8, or a name in another encoding."""
        text = name.decode("ascii", "surrogateescape")
        (tmp_path / text).write_bytes(b"text of some length " * 500)
        found = supar_here("transfer", "--data", text, "--sparsity", "0.5", "-o", "-")
        assert (found.status, found.out) == (3, "") and "has bytes outside of this locale's encoding" in found.err

    def test_numba_needs_no_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernels: Any = pytest.importorskip("supar_cli.sparse.csr_kernels")
        compile_loop, options = kernels.cfunc, list[dict[str, Any]]()

        def without_folder(signature: Any, **given: Any) -> Any:
            options.append(given)
            if given.get("cache"):
                raise RuntimeError("cannot cache function: no locator available")
            return compile_loop(signature, **given)

        monkeypatch.setattr(kernels, "cfunc", without_folder)
        assert kernels._compiled(lambda call: None).address
        assert [given.get("cache", False) for given in options] == [True, False]


def test_a_curve_fits_any_terminal() -> None:
    """Before, one of fewer columns than its labels raised IndexError."""
    records = [{"step": step, "loss": 4.0 - step / 1e3} for step in range(1, 2000, 7)]
    for width in range(-3, 120):
        lines = runs.curve(records, "loss", width, 6)
        assert len(lines) == 7 and max(map(len, lines)) <= max(width, 24)
