"""The precision of products on CUDA: what a run sets of torch for its passes alone, and where it can't be had."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supar_cli.errors import SetupError
from supar_cli.planning.plan import Plan
from supar_cli.sparse import autotune
from supar_cli.sparse.autotune import EngineChoice, LayerCase
from supar_cli.sparse.linear import Linear, multiplies_in_tf32
from supar_cli.training.distributed import Parallel, Ranks
from supar_cli.training.runtime import Runtime
from supar_cli.training.trainer import Trainer
from tests.test_engines import drawn

MakePlan = Callable[..., Plan]
MATMUL = torch.backends.cuda.matmul


def settings() -> tuple[str, bool]:
    return MATMUL.fp32_precision, MATMUL.allow_bf16_reduced_precision_reduction


@pytest.fixture(params=["none", "highest", "high", "tf32"])
def before(request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    """What a process may have set, by torch's older and newer ways."""
    if request.param in ("highest", "high"):
        torch.set_float32_matmul_precision(request.param)
    else:
        MATMUL.fp32_precision = request.param
    yield settings()
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = "none"


@pytest.mark.parametrize("kind", ["tf32", "float32", "bfloat16"])
def test_torch_multiplies_as_the_run_says_and_then_as_before(before: tuple[str, bool], kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    runtime = Runtime(torch.device("cuda", 0), dtype, False, 1, 1, None, kind == "tf32")
    wanted = ("tf32" if kind == "tf32" else "ieee", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch deprecates ways to set it
        with pytest.raises(KeyError), runtime.products():
            assert settings() == wanted and multiplies_in_tf32() == (kind == "tf32")
            with runtime.products():  # as autocast does in a pass
                pass
            assert settings() == wanted
            raise KeyError
    assert settings() == before
    with Runtime(torch.device("cpu"), torch.float32, False, 1, 1).products():
        assert settings() == before  # on a CPU nothing is set


def passes(trainer: Trainer, is_inside: Callable[[], bool]) -> tuple[set[bool], set[bool]]:
    """Whether all forward and all backward passes of a trainer are inside."""
    forward, backward = set[bool](), set[bool]()
    for module in trainer.sparse_model.model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda *_: forward.add(is_inside()))
            module.weight.register_hook(lambda _: backward.add(is_inside()))
    trainer.step(diagnose=True)
    trainer.evaluate()
    return forward, backward


def test_every_pass_of_a_run_is_made_in_its_precision(plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is the measurement that chooses an engine. The control is a backward pass that is not."""
    depth, measured = 0, set[bool]()

    @contextmanager
    def products(_: Runtime) -> Iterator[None]:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    def fastest(*_: Any) -> EngineChoice:
        measured.add(depth > 0)
        return EngineChoice("dense", {})

    monkeypatch.setattr(Runtime, "products", products)
    monkeypatch.setattr(autotune, "fastest", fastest)
    trainer = Trainer(plan_of(target={"width": 64, "sparsity": {"density": 0.25}}))
    assert passes(trainer, lambda: depth > 0) == ({True}, {True}) and measured == {True}
    monkeypatch.setattr(Runtime, "backward", lambda _, loss: torch.autograd.backward(loss))
    assert passes(trainer, lambda: depth > 0) == ({True}, {False})


def test_a_measurement_in_tf32_is_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    cuda, keys = torch.device("cuda", 0), list[str]()
    for is_tf32 in (False, True):
        with Runtime(cuda, torch.float32, False, 1, 1, None, is_tf32).products():
            keys.append(autotune._key(drawn((32, 32), 0.5), 32, LayerCase(cuda, torch.float32, 8)))
    assert ["TF32" in key for key in keys] == [False, True]


def test_tf32_needs_a_device_that_has_it(plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match=r"run\.precision: tf32 needs a CUDA device of .* 8\.0 or more, which cpu \("):
        Runtime.of(plan_of(run={"device": "cpu", "precision": "tf32"}))
    fakes = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None}
    fakes |= {"is_bf16_supported": True, "get_device_name": "Tesla T4"}
    plan = plan_of(run={"device": "cuda", "precision": "tf32", "compile": "off"})
    for capability, is_there in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        for name, value in {**fakes, "get_device_capability": capability}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        if is_there:
            found = Runtime.of(plan)
            assert (found.precision, found.precision_name) == (torch.float32, "tf32")
        else:
            with pytest.raises(SetupError, match="which Tesla T4 is not; expected auto, float32 or bfloat16"):
                Runtime.of(plan)


class Gained(nn.Module):
    """A block with a norm, a linear layer and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.gain = nn.LayerNorm(8), Linear(8, 8, True), nn.Parameter(torch.empty(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.linear(self.norm(x))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norms = nn.ModuleList(Gained() for _ in range(2)), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norms(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_all_of_a_users_model_is_in_shards(precision: torch.dtype) -> None:
    """Whatever its parts are called, and where a block has parameters beside its layers'."""
    model, x = Own(), torch.randn(3, 8)
    with torch.no_grad():
        for one in model.parameters():
            one.normal_()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        wanted = model(x)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            ranks = Ranks(is_distributed=True)
            model = Parallel("fsdp", model, torch.device("cpu"), False, ranks, precision).model
            found = model(x)
            found.square().mean().backward()
            parameters = list(model.parameters())
        finally:
            dist.destroy_process_group()
    assert len(parameters) == 12 and all(isinstance(one, DTensor) and one.grad is not None for one in parameters)
    assert all(one.dtype == torch.float32 for one in parameters)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.05)
