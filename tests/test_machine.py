"""The machine that a run meets: memory that grows with the square of the context, systems, folders and terminals that lack something."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from supar_cli.bench import layer
from supar_cli.cli.app import LACKS
from supar_cli.errors import SetupError
from supar_cli.jobs.runs import require_runnable
from supar_cli.models.transformer import Transformer
from supar_cli.planning import estimate
from supar_cli.planning.plan import Plan
from supar_cli.reporting import runs
from supar_cli.sparse import block
from supar_cli.sparse.autotune import LayerCase
from supar_cli.training import runtime
from supar_cli.training.distributed import ALONE, Ranks
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


@pytest.mark.parametrize(
    ("text", "is_lack"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB", True),
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("std::bad_alloc", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("NCCL error: unhandled system error. Error while creating shared memory segment /dev/shm/nccl-abc", False),
        ("expected memory format channels_last", False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors_that_speak_of_it(text: str, is_lack: bool) -> None:
    assert runtime.lacks_memory(RuntimeError(text)) == is_lack
    assert not runtime.lacks_memory(ValueError(text)) and runtime.lacks_memory(torch.OutOfMemoryError(text))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 989 / 7),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 312 * 3 / 7),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", 147),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA H20", None),
    ],
)
def test_a_devices_peak_is_known_by_the_words_of_its_name(name: str, tflops: float | None) -> None:
    assert runtime.peak_flops(name) == (None if tflops is None else pytest.approx(1e12 * tflops))


def test_the_share_of_the_peak_is_of_the_precisions_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    kinds = {"bfloat16": (torch.bfloat16, False), "tf32": (torch.float32, True), "float32": (torch.float32, False)}
    device = torch.device("cuda", 0)
    runs_on = {name: Runtime(device, kind, False, 1, 1, None, tf32) for name, (kind, tf32) in kinds.items()}
    shares = {name: one.peak_share(1e9, 78_000.0) for name, one in runs_on.items()}
    assert shares == {"bfloat16": pytest.approx(0.25), "tf32": pytest.approx(0.5), "float32": None}
    assert all(one.precision_name == name for name, one in runs_on.items())


@pytest.mark.parametrize("has_units", [True, False])
def test_bfloat16_on_a_cpu_without_units_is_said_and_left_out_of_the_bench(
    has_units: bool, plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_units)
    said = {
        precision: Runtime.of(plan_of(run={"device": "cpu", "precision": precision})).warnings
        for precision in ("float32", "bfloat16")
    }
    assert said["float32"] == [] and len(said["bfloat16"]) == (not has_units)
    heard = list[str]()
    require_runnable(plan_of(run={"device": "cpu", "precision": "bfloat16"}), warn=heard.append)
    assert heard == said["bfloat16"]
    mask = layer.draw_mask((32, 32), 0.25)
    for precision, is_there in ((torch.float32, has_units), (torch.bfloat16, True)):  # where it is asked for
        arms, _ = layer.make_all(mask, LayerCase(torch.device("cpu"), precision, 8))
        assert ("dense_bf16" in arms) == is_there


@pytest.mark.parametrize(
    ("spec", "compiler", "capability", "lack"),
    [
        (True, "/usr/bin/cc", (8, 0), None),
        (None, "/usr/bin/cc", (8, 0), "Triton is not installed"),
        (True, None, (8, 0), "no C compiler is found, which Triton calls"),
        (True, "/usr/bin/cc", (6, 1), "the compute capability 6.1 is below 7.0, Triton's least"),
    ],
)
def test_what_cannot_be_compiled_is_run_eagerly_and_said(
    spec: Any, compiler: Any, capability: Any, lack: Any, plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "find_spec", lambda _: spec)
    monkeypatch.setattr(block.shutil, "which", lambda _: compiler)
    fakes = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "is_bf16_supported": True,
    }
    for name, value in {**fakes, "get_device_capability": capability}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    found = Runtime.of(plan_of(run={"device": "cuda", "compile": "auto"}))
    assert (found.compiles, found.why_eager) == (lack is None, lack)
    with nullcontext() if lack is None else pytest.raises(SetupError, match=f"run.compile: on, but {lack}"):
        assert Runtime.of(plan_of(run={"device": "cuda", "compile": "on"})).compiles
    eager = Runtime.of(plan_of(run={"device": "cuda", "compile": "off"}))
    assert not eager.compiles and eager.why_eager is None


@pytest.mark.parametrize(("own", "is_shared"), [(["a", "b"], False), (["a", "a"], True)])
def test_two_ranks_on_one_device_are_told(own: list[str], is_shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a launcher shows all processes of a machine the same single device."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=own[0]))
    node = runtime.platform.node()
    monkeypatch.setattr(Ranks, "gather", lambda _, value: [value, f"{node}, {own[1]}"])
    ranks, device = Ranks(0, 2, 0, 2, is_distributed=True), torch.device("cuda", 0)
    with pytest.raises(SetupError, match="ranks 0 and 1 compute on the same") if is_shared else nullcontext():
        runtime.require_own_devices(device, ranks)


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)])
def test_a_process_that_sees_one_device_uses_it(visible: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert runtime.device_of("cuda", Ranks(3, 4, 3, 4, is_distributed=True)) == torch.device("cuda", index)


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
        kept, counted = squares_kept(plan, rows), estimate.squared_bytes(plan, rows)
        if "alibi" not in kind:
            assert kept == counted == 0
            return
        bias = 4 * 4 * 192**2  # 4 heads, float32
        # the kept ones and as much again, which the allocator does not return, for each block, and what one needs at once
        assert kept == rows * layers * bias and counted == bias + 2 * kept + 2 * rows * bias

    def test_the_estimate_before_would_not_have_passed(self, plan_of: MakePlan) -> None:
        """Without it, a run's memory grew as its context did; a control of the test above."""
        at = {context: planned(plan_of, "alibi", context) for context in (192, 384)}
        linear = {n: estimate.activation_bytes(one, 1, 4) - estimate.squared_bytes(one, 1) for n, one in at.items()}
        assert linear[384] == 2 * linear[192] and squares_kept(at[192], 1) > linear[192]
        assert estimate.squared_bytes(at[384], 1) == 4 * estimate.squared_bytes(at[192], 1)

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


def test_a_curve_fits_any_terminal() -> None:
    """Before, one of fewer columns than its labels raised IndexError."""
    records = [{"step": step, "loss": 4.0 - step / 1e3} for step in range(1, 2000, 7)]
    for width in range(-3, 120):
        lines = runs.curve(records, "loss", width, 6)
        assert len(lines) == 7 and max(map(len, lines)) <= max(width, 24)
