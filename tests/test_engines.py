"""Engines of masked linears against dense float64 products, in training, and how one is chosen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import supar_cli
from supar_cli.errors import InputError
from supar_cli.models.transformer import FeedForward
from supar_cli.planning.plan import Plan
from supar_cli.sparse.csr import Sparse
from supar_cli.sparse.linear import Dense, Engine, Linear
from supar_cli.sparse.masks import IndexMap, Mask
from supar_cli.training import checkpoint, checkpoint_reader, run_directory
from supar_cli.training.reporter import NullReporter
from supar_cli.training.trainer import Trainer
from tests.conftest import environment

MakePlan = Callable[..., Plan]
KINDS: dict[str, Callable[[Mask], Engine]] = {
    "dense": lambda mask: Dense(mask, torch.float32),
    "sparse by numba": lambda mask: Sparse(mask, "numba"),
    "sparse by torch": lambda mask: Sparse(mask, "torch"),
}
SHAPES = {  # (out, in), tokens, density
    "tiles that are cut": ((130, 70), (2, 65), 0.05),
    "wide": ((3, 300), (64,), 0.1),
    "tall": ((300, 3), (1, 1), 0.3),
    "every weight": ((16, 8), (5,), 1.0),
    "no weight": ((9, 5), (7,), 0.0),
    "no token": ((9, 5), (0,), 0.5),
}


def drawn(shape: tuple[int, int], density: float, seed: int = 0) -> Mask:
    return Mask.of(np.random.default_rng(seed).random(shape) < density)


def numbers(
    engine: Engine,
    mask: Mask,
    tokens: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    gelu: str | None = None,
    expected: str | None = None,
) -> list[Any]:
    """Y, the gradients of X and of the values, and the same of dense float64 products.

    `gelu`: the form of GELU that X passes through first; `expected`: that of the float64 products, if another.
    """
    random = torch.Generator().manual_seed(1)
    out, width = mask.shape
    alive = torch.from_numpy(mask.alive())
    values = torch.randn(mask.count, generator=random)
    x = torch.randn(*tokens, width, generator=random).to(dtype)
    gradient = torch.randn(*tokens, out, generator=random).to(dtype)

    weight = torch.zeros(mask.shape, dtype=torch.float64)
    weight[alive] = values.double()
    weight.requires_grad_()
    reference_x = x.double().requires_grad_()
    form = expected or gelu
    reference = F.linear(reference_x if form is None else F.gelu(reference_x, approximate=form), weight)
    torch.autograd.backward(reference, gradient.double())
    assert weight.grad is not None and reference_x.grad is not None

    values, x = values.requires_grad_(), x.requires_grad_()
    engine.refresh(values.detach())
    y = engine(x, values) if gelu is None else engine(x, values, gelu)
    torch.autograd.backward(y, gradient)
    assert values.grad is not None and values.grad.dtype == torch.float32 and y.dtype == dtype
    return [
        (y.detach(), reference.detach()),
        (x.grad, reference_x.grad),
        (values.grad, weight.grad[alive]),
    ]


def largest_error(pairs: list[Any]) -> float:
    """Of the largest number of each, over all three."""
    errors = [
        float((a.double() - b).abs().max() / max(float(b.abs().max()), 1e-30)) if a.numel() else 0.0 for a, b in pairs
    ]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(errors)


def saved(trainer: Trainer, folder: Path) -> Path:
    """The checkpoint of a trainer's present state."""
    writer = checkpoint.Writer(folder, trainer.plan, trainer.task.hash, trainer.parallel)
    writer.save(trainer.done, trainer.capture)
    writer.wait()
    return checkpoint_reader.available(folder)[-1]


@pytest.mark.parametrize("kind", KINDS)
class TestProducts:
    @pytest.mark.parametrize("case", SHAPES)
    def test_are_those_of_the_dense_weight(self, kind: str, case: str) -> None:
        shape, tokens, density = SHAPES[case]
        mask = drawn(shape, density)
        assert largest_error(numbers(KINDS[kind](mask), mask, tokens)) <= 1e-5

    def test_rows_of_none_and_one(self, kind: str) -> None:
        alive = np.zeros((70, 40), np.bool_)
        alive[::3, 7] = True
        alive[69, :] = True
        mask = Mask.of(alive)
        assert largest_error(numbers(KINDS[kind](mask), mask, (33,))) <= 1e-5

    @settings(max_examples=20, deadline=None)
    @given(
        out=st.integers(1, 90),
        width=st.integers(1, 90),
        tokens=st.integers(1, 140),
        density=st.floats(0, 1),
        seed=st.integers(0, 99),
    )
    def test_of_any_shape(self, kind: str, out: int, width: int, tokens: int, density: float, seed: int) -> None:
        mask = drawn((out, width), density, seed)
        assert largest_error(numbers(KINDS[kind](mask), mask, (tokens,))) <= 2e-5

    def test_in_bfloat16(self, kind: str) -> None:
        """Inputs, outputs and their gradients keep 8 bits; sums are wider than that."""
        mask = drawn((64, 96), 0.2)
        engine = Dense(mask, torch.bfloat16) if kind == "dense" else KINDS[kind](mask)
        limit = 2**-7 if kind == "dense" else 2**-8  # the dense engine rounds the weight too
        assert largest_error(numbers(engine, mask, (50,), torch.bfloat16)) <= limit

    def test_only_what_is_asked_for_has_a_gradient(self, kind: str) -> None:
        mask = drawn((20, 30), 0.3)
        engine = KINDS[kind](mask)
        for by_x, by_values in ((True, False), (False, True)):
            x = torch.randn(6, 30, requires_grad=by_x)
            values = torch.randn(mask.count, requires_grad=by_values)
            engine.refresh(values.detach())
            engine(x, values).sum().backward()
            assert (x.grad is not None, values.grad is not None) == (by_x, by_values)

    def test_inputs_that_do_not_lie_in_rows(self, kind: str) -> None:
        mask = drawn((20, 30), 0.3)
        engine, values = KINDS[kind](mask), torch.randn(mask.count)
        engine.refresh(values)
        x = torch.randn(30, 8).t()
        assert torch.equal(engine(x, values), engine(x.contiguous(), values))

    def test_a_weight_at_another_place_is_seen(self, kind: str) -> None:
        mask = drawn((64, 64), 0.1)
        other = mask.alive()
        row = int(np.flatnonzero(other.any(1) & ~other.all(1))[0])
        one, zero = np.flatnonzero(other[row])[0], np.flatnonzero(~other[row])[0]
        other[row, [one, zero]] = other[row, [zero, one]]
        assert largest_error(numbers(KINDS[kind](Mask.of(other)), mask, (32,))) > 1e-2


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_gelu_is_the_same_inside_an_engine_and_where_a_product_is_looked_at(
    kind: str | None, activation: str, plan_of: MakePlan
) -> None:
    """Whatever looks at a product sees what is multiplied, whether its engine would apply GELU itself or not."""
    config = plan_of(model={"activation": activation, "bias": True}).decoder
    mlp, form = FeedForward(config), "tanh" if activation == "gelu_tanh" else "none"
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mask, down = drawn(mlp.down.shape, 0.4), mlp.down
    dense = down.weight.detach() if kind is None else torch.randn(mask.shape) * torch.from_numpy(mask.alive())
    if kind is not None:
        down.remask(mask, dense[torch.from_numpy(mask.alive())], KINDS[kind](mask))
    assert down.applies_gelu == (kind == "sparse by numba")
    x, seen = torch.randn(7, config.width), list[torch.Tensor]()
    inner = F.gelu(mlp.up(x), approximate=form)
    expected = F.linear(inner, dense, down.bias)
    assert torch.allclose(mlp(x), expected, atol=1e-5)
    hooks = {
        "forward": lambda layer, inputs, output: seen.append(inputs[0]),
        "forward_pre": lambda layer, inputs: seen.append(inputs[0]),
        "full_backward": lambda layer, by_x, by_y: seen.append(by_x[0]),
    }
    for when, look in hooks.items():
        handle = getattr(down, f"register_{when}_hook")(look)
        assert not down.applies_gelu
        mlp(x).sum().backward()
        handle.remove()
    down.watch = lambda x, gradient: seen.append(x)
    mlp(x).sum().backward()
    *inputs, by_x = [seen[i] for i in (0, 1, *range(3, len(seen)), 2)]
    assert len(inputs) == (2 if kind is None else 3) and all(torch.equal(one, inner) for one in inputs)
    assert torch.allclose(by_x, dense.sum(0).expand_as(inner), atol=1e-5)


def losses(plan: Plan) -> list[float]:
    trainer = Trainer(plan)
    return [trainer.step()[0] for _ in range(plan.train.steps)]


class TestTraining:
    """20 steps of a sparse SμPar plan under each engine."""

    def plan(self, plan_of: MakePlan, engine: Any, **run: Any) -> Plan:
        return plan_of(
            train={"steps": 20}, run={"engine": engine, **run}, target={"width": 64, "sparsity": {"density": 0.1}}
        )

    def test_losses_and_gradients_are_the_same(self, plan_of: MakePlan) -> None:
        found, gradients = {}, {}
        for engine in ("dense", "sparse"):
            plan = self.plan(plan_of, engine)
            found[engine] = losses(plan)
            trainer = Trainer(plan)
            trainer.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[assignment, misc]
            trainer.step()
            gradients[engine] = {name: tensor.grad for name, tensor in trainer.sparse_model.tensors.items()}
            assert {choice.name for choice in trainer.engines.choices.values()} == {engine}
        assert max(abs(a - b) for a, b in zip(found["dense"], found["sparse"], strict=True)) <= 1e-5
        for name, gradient in gradients["dense"].items():
            assert gradient is not None
            difference = (gradient - gradients["sparse"][name]).abs().max()
            assert difference <= 1e-5 * gradient.abs().max(), name
        # the control: another seed's losses differ by far more
        assert abs(found["dense"][-1] - losses(self.plan(plan_of, "dense").model_copy(update={}))[-1]) <= 1e-6
        other = plan_of(train={"steps": 20, "seed": 1}, target={"width": 64, "sparsity": {"density": 0.1}})
        assert abs(found["dense"][-1] - losses(other)[-1]) > 1e-3

    def test_saved_under_one_and_resumed_under_another(self, plan_of: MakePlan, tmp_path: Path) -> None:
        whole = losses(self.plan(plan_of, "dense"))
        plan = self.plan(plan_of, "dense", checkpoint_every=7)
        run_directory.begin_run(tmp_path / "run", plan, resume=False, force=False)

        class Stop(Exception):
            pass

        class Interrupting(NullReporter):
            def progress(self, done: int, total: int, loss: float, work: object = None) -> None:
                if done == 9:
                    raise Stop

        with pytest.raises(Stop):
            Trainer(plan, reporter=Interrupting()).run(tmp_path / "run")
        again = self.plan(plan_of, "sparse")
        assert again.hash() == plan.hash()
        history = Trainer(again).run(tmp_path / "run", resume=True)
        assert history.resumed_at == 7 and history.losses == pytest.approx(whole, abs=1e-5)
        assert set(json.loads((tmp_path / "run/result.json").read_text())["environment"]["engines"].values()) == {
            "sparse"
        }

    def test_a_checkpoint_holds_live_values_and_masks_only(self, plan_of: MakePlan, tmp_path: Path) -> None:
        plan = self.plan(plan_of, "sparse")
        trainer = Trainer(plan)
        trainer.step()
        path = saved(trainer, tmp_path)
        masked = sum(row.kept for row in plan.tensors if row.kept < row.size)
        dense = sum(row.size for row in plan.tensors if row.kept == row.size)
        bits = sum(row.size for row in plan.tensors if row.kept < row.size) / 8
        expected = 12 * (masked + dense) + bits
        assert expected < (path / "state.safetensors").stat().st_size < expected + 20_000

    def test_weights_are_read_back_in_their_shapes(self, plan_of: MakePlan, tmp_path: Path) -> None:
        plan = self.plan(plan_of, "sparse")
        trainer = Trainer(plan)
        trainer.step()
        saved(trainer, tmp_path / "checkpoints")
        found = supar_cli.weights(tmp_path)
        assert list(found) == [row.name for row in plan.tensors]
        for row in plan.tensors:
            assert torch.equal(found[row.name], trainer.sparse_model.weight(row.name))
            assert np.count_nonzero(found[row.name]) <= row.kept and tuple(found[row.name].shape) == tuple(row.shape)
        with pytest.raises(InputError, match="no checkpoint"):
            supar_cli.weights(tmp_path / "checkpoints")

    def test_accumulation_compiling_and_bfloat16(self, plan_of: MakePlan) -> None:
        whole = losses(self.plan(plan_of, "sparse"))
        assert losses(self.plan(plan_of, "sparse", micro_batch_size=2)) == pytest.approx(whole, rel=1e-4)
        for engine in ("dense", "sparse"):
            rounded = losses(self.plan(plan_of, engine, precision="bfloat16"))
            assert rounded == pytest.approx(whole, rel=0.02) and rounded != pytest.approx(whole, rel=1e-5)


def test_the_kernels_leave_torchs_threads_alone() -> None:
    """In a process of its own, where they start their threads: numba's OpenMP layer would make these 1 its 2 or more."""
    code = (
        "import numpy as np, torch\n"
        "from supar_cli.sparse.csr import Sparse\n"
        "from supar_cli.sparse.masks import Mask\n"
        "torch.set_num_threads(1)\n"
        "Sparse(Mask.of(np.eye(8, dtype=bool)), 'numba')(torch.randn(4, 8), torch.randn(8))\n"
        "print(torch.get_num_threads())"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, env=environment(), check=True).stdout.strip() == "1"


@pytest.mark.parametrize("kind", KINDS)
class TestRemasking:
    """A linear under one mask and then another computes with the second, whatever ran before."""

    def test_is_that_of_the_new_mask(self, kind: str) -> None:
        linear, x = Linear(40, 24, bias=True), torch.randn(7, 40)
        torch.nn.init.normal_(linear.bias)
        assert linear.mask is None
        values = torch.empty(0)
        for seed in (0, 1):
            mask = drawn((24, 40), 0.3 + 0.1 * seed, seed)
            values = IndexMap.between(linear.mask, mask).carry(values, 0.5) if linear.mask else torch.randn(mask.count)
            linear.remask(mask, values, KINDS[kind](mask))
            weight = torch.zeros(24, 40)
            weight[torch.from_numpy(mask.alive())] = values
            assert linear.mask is mask and linear.weight.shape == (mask.count,) and linear.weight.requires_grad
            assert torch.allclose(linear(x), F.linear(x, weight, linear.bias), atol=1e-5)

    def test_an_engine_that_kept_the_old_mask_is_seen(self, kind: str) -> None:
        """Planted: as many live weights elsewhere. It is refused, and says other numbers where it lies about its mask."""
        old = drawn((24, 40), 0.3)
        new = Mask.of(np.roll(old.alive(), 1, axis=1))
        linear, stale = Linear(40, 24, bias=False), KINDS[kind](old)
        assert old.count == new.count
        with pytest.raises(ValueError, match=f"engine: made for mask {old.fingerprint}; expected {new.fingerprint}"):
            linear.remask(new, torch.randn(new.count), stale)
        assert linear.mask is None
        stale.mask = new
        assert largest_error(numbers(stale, new, (32,))) > 1e-2
        assert largest_error(numbers(KINDS[kind](new), new, (32,))) <= 1e-5

    def test_what_does_not_fit_is_refused(self, kind: str) -> None:
        mask, linear = drawn((24, 40), 0.3), Linear(40, 24, bias=False)
        with pytest.raises(ValueError, match=r"values: shape \(3,\); expected"):
            linear.remask(mask, torch.randn(3), KINDS[kind](mask))
        turned = Mask.of(mask.alive().T)
        with pytest.raises(ValueError, match=r"mask: shape \(40, 24\); expected the weight's shape \(24, 40\)"):
            linear.remask(turned, torch.randn(turned.count), KINDS[kind](turned))
