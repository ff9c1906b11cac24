"""Training with masks that change: every step's masks, values, moments and losses against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from supar_cli.planning import schedule
from supar_cli.planning.plan import Plan
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.sparse import updates
from supar_cli.sparse.linear import Dense
from supar_cli.sparse.masks import IndexMap, Mask
from supar_cli.streams import stream
from supar_cli.training import mask_updates
from supar_cli.training.prepare import EngineSelector
from supar_cli.training.trainer import Trainer
from tests import updates_oracle

MakePlan = Callable[..., Plan]
AGREE = 1e-5

# a large epsilon, so that Adam does not magnify the rounding of the smallest gradients, and a decay that shows
TUNED = {"lr": 0.01, "init_std": 0.08, "alpha_input": 1.5, "alpha_output": 2.0, "weight_decay": 1.0, "eps": 1e-4}


@pytest.fixture
def moving(plan_of: MakePlan) -> MakePlan:
    """`moving("gmp", end=0.9)`: a small plan of 30 steps whose masks change so; other sections by `sections`."""

    def make(method: str, sections: Any = None, sparsity: Any = None, **keys: Any) -> Plan:
        wanted: dict[str, Any] = {"density": 0.25, **(sparsity or {}), "updates": {"method": method, **keys}}
        changes: dict[str, Any] = {"model": {"layers": 1}, "hyperparameters": TUNED}
        changes["train"] = {"steps": 30, "batch_size": 4, "grad_clip": 0.0, "eval_every": 15}
        for name, section in (sections or {}).items():
            changes[name] = {**changes.get(name, {}), **section}
        return plan_of(**changes, target={"width": 32, "sparsity": wanted})

    return make


def dense_of(plan: Plan) -> Plan:
    """The plan with every weight alive: its model and its batches, and nothing of its masks."""
    rows = [row.model_copy(update={"kept": row.size, "density": 1.0}) for row in plan.tensors]
    sparsity = plan.sparsity.model_copy(update={"density": 1.0, "sparsity": 0.0, "updates": None, "overrides": {}})
    run = plan.run.model_copy(update={"engine": "dense", "micro_batch_size": None})
    return plan.model_copy(update={"tensors": rows, "sparsity": sparsity, "run": run})


class Beside:
    """A trainer and the oracle, step by step from the same start on the same batches."""

    def __init__(self, plan: Plan, trainer: Trainer | None = None) -> None:
        self.plan, self.trainer, self.plain = plan, trainer or Trainer(plan), Trainer(dense_of(plan))
        model = self.trainer.sparse_model
        values = {name: model.weight(name).detach().double().numpy() for name in self.plain.sparse_model.tensors}
        alive = {name: mask.alive() for name, mask in model.masks.items()}
        self.oracle = updates_oracle.Training(plan.model_dump(), values, alive, self.scores)

    def scores(self, name: str, step: int) -> updates_oracle.Array:
        """The random numbers that SET grows by, 24 bits each."""
        shape = self.oracle.tensors[name].value.shape
        bits = stream(self.plan.train.seed, f"grow:{name}:{step}").random_raw(int(np.prod(shape))) >> np.uint64(40)
        return (bits / 2**24).reshape(shape)

    def gradients(self) -> tuple[float, dict[str, updates_oracle.Array]]:
        """The loss at the oracle's weights and its dense gradients, by a plain dense model."""
        model, tensors = self.plain.model, self.plain.sparse_model.tensors
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(self.oracle.tensors[name].value))
        self.plain.sparse_model.sync_engines()
        model.zero_grad()
        loss = model(*self.plain.batch(self.oracle.done))
        loss.backward()
        return loss.item(), {name: tensor.grad.double().numpy() for name, tensor in tensors.items()}  # type: ignore[union-attr]

    def step(self) -> tuple[float, float]:
        """The losses of a step, the trainer's and the oracle's."""
        loss, gradients = self.gradients()
        train = self.plan.train
        shape = {"steps": train.steps, "warmup_steps": train.warmup_steps, "schedule": train.schedule}
        factor = schedule.factor(self.oracle.done, **shape, final_lr_fraction=train.final_lr_fraction)  # type: ignore[arg-type]
        own = self.trainer.step().loss
        self.oracle.step(gradients, factor)
        return own, loss

    def moment(self, name: str, key: str) -> updates_oracle.Array:
        """A moment of the trainer in its tensor's shape."""
        model = self.trainer.sparse_model
        found = self.trainer.optimizer.state[model.tensors[name]][key].detach().double().numpy()
        if name not in model.masks or found.shape == model.masks[name].shape:
            return found
        whole = np.zeros(model.masks[name].shape)
        whole[model.masks[name].alive()] = found
        return whole

    def assert_agree(self) -> None:
        """The same masks, and values and moments within rounding."""
        masks = self.trainer.capture().masks
        for name, one in self.oracle.tensors.items():
            value = self.trainer.sparse_model.weight(name).detach().double().numpy()
            if name in masks:
                assert np.array_equal(masks[name].alive(), one.alive), name
                assert not value[~one.alive].any()
            else:
                assert one.alive.all(), name
            assert np.allclose(value, one.value, rtol=1e-4, atol=2e-6), name
            moments = {"exp_avg": one.m, "exp_avg_sq": one.v}
            for key, wanted in ({"momentum_buffer": one.m} if self.plan.train.optimizer == "sgd" else moments).items():
                assert np.allclose(self.moment(name, key), wanted, rtol=2e-3, atol=1e-3 * np.abs(wanted).max()), (
                    name,
                    key,
                )


def run_beside(plan: Plan, steps: int = 30) -> Beside:
    both = Beside(plan)
    for _ in range(steps):
        own, wanted = both.step()
        assert own == pytest.approx(wanted, abs=AGREE), both.oracle.done
        both.assert_agree()
    return both


EVERY_KIND: dict[str, tuple[str, dict[str, Any]]] = {
    "set": ("set", {}),
    "set, zero": ("set", {"moments": "zero", "drop_schedule": "linear", "every_steps": 3}),
    "set, keep": ("set", {"moments": "keep", "every_steps": 2}),
    "rigl": ("rigl", {"every_steps": 2}),
    "rigl, zero": ("rigl", {"moments": "zero", "begin": 0.2, "end": 0.9, "drop_schedule": "constant"}),
    "rigl, keep": ("rigl", {"moments": "keep", "every_steps": 4, "drop": 0.5}),
    "rigl, floor": ("rigl", {"min_per_neuron": 4, "every_steps": 2, "drop": 0.6}),
    "set, floor": ("set", {"min_per_neuron": 4, "every_steps": 3, "moments": "keep"}),
    "gmp": ("gmp", {}),
    "gmp, from a half": ("gmp", {"start": 0.5, "shape": "linear", "every_steps": 4, "min_per_neuron": 5}),
    "topk": ("topk", {}),
    "topk, until .6": ("topk", {"end": 0.6, "begin": 0.1, "shape": "cubic"}),
    "topk, no floor": ("topk", {"min_per_neuron": 0, "start": 0.75}),
}


class TestAgainstTheOracle:
    @pytest.mark.parametrize("kind", EVERY_KIND)
    def test_every_step(self, moving: MakePlan, kind: str) -> None:
        method, keys = EVERY_KIND[kind]
        both = run_beside(moving(method, **keys))
        masked = self.moved(both)
        assert masked == 6  # all hidden weights: the comparison was not of masks that stay

    @staticmethod
    def moved(both: Beside) -> int:
        first = Trainer(both.plan).sparse_model.masks
        return sum(
            not np.array_equal(one.alive, first[name].alive() if name in first else np.ones_like(one.alive))
            for name, one in both.oracle.tensors.items()
        )

    @pytest.mark.parametrize("rule", ["coupled", "sqrt"])
    def test_the_decays_rules(self, moving: MakePlan, rule: str) -> None:
        run_beside(moving("gmp", sections={"parameterization": {"weight_decay_rule": rule}}), 20)

    @pytest.mark.parametrize("method", ["set", "rigl", "gmp", "topk"])
    def test_the_sparse_engine_and_accumulated_gradients(self, moving: MakePlan, method: str) -> None:
        keys = {"end": 0.6} if method == "topk" else {"every_steps": 3}
        run = {"engine": "sparse", "micro_batch_size": 2}
        run_beside(moving(method, sections={"run": run, "model": {"layers": 2}}, **keys), 24)

    @pytest.mark.parametrize("method", ["rigl", "gmp", "topk"])
    def test_momentum_and_clipped_gradients(self, moving: MakePlan, method: str) -> None:
        tuned = {**TUNED, "lr": 0.05, "weight_decay": 0.1}
        train = {"optimizer": "sgd", "grad_clip": 0.5}
        both = run_beside(moving(method, sections={"train": train, "hyperparameters": tuned}, every_steps=1), 20)
        assert both.oracle.clipped >= 5
        both = run_beside(moving(method, sections={"train": {"grad_clip": 0.5}}), 12)
        assert both.oracle.clipped >= 5

    def test_other_densities_and_the_rates_of_the_end(self, moving: MakePlan) -> None:
        sparsity = {"overrides": {"attn.q": 1.0, "mlp.up": "1/16", "mlp.down": 0.5}}
        run_beside(moving("gmp", sparsity=sparsity, rates_follow="end"))
        run_beside(moving("rigl", sparsity=sparsity, exponent=0.5))


def roll(array: Any) -> Any:
    return np.roll(array, 1)


class TestFaults:
    """Each is planted in the trainer alone, and makes it disagree with the oracle."""

    @staticmethod
    def assert_seen(plan: Plan, steps: int = 12) -> None:
        with pytest.raises(AssertionError):
            run_beside(plan, steps)

    @pytest.mark.parametrize("method", ["set", "gmp"])
    @pytest.mark.parametrize("side", ["old", "new"])
    def test_a_permuted_index_map(
        self, moving: MakePlan, monkeypatch: pytest.MonkeyPatch, method: str, side: str
    ) -> None:
        between = IndexMap.between

        def permuted(old: Mask, new: Mask) -> IndexMap:
            found = between(old, new)
            return replace(found, **{side: roll(getattr(found, side))})

        monkeypatch.setattr(IndexMap, "between", permuted)
        self.assert_seen(moving(method))

    def test_growth_at_random_under_rigls_name(self, moving: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        grow = mask_updates.grow_largest
        monkeypatch.setattr(mask_updates, "grow_largest", lambda scores, *a: grow(torch.rand_like(scores), *a))
        self.assert_seen(moving("rigl"))

    def test_growth_by_the_gradient_of_live_weights_only(
        self, moving: MakePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        grow = mask_updates.grow_largest
        monkeypatch.setattr(mask_updates, "grow_largest", lambda scores, alive, *a: grow(scores * alive, alive, *a))
        self.assert_seen(moving("rigl"))

    @pytest.mark.parametrize("engine", ["dense", "sparse"])
    @pytest.mark.parametrize("method", ["set", "gmp"])
    def test_an_engine_that_kept_the_old_mask(
        self, moving: MakePlan, monkeypatch: pytest.MonkeyPatch, engine: str, method: str
    ) -> None:
        """It says that it has the new one."""
        run = {"run": {"engine": engine}}
        first = dict(Trainer(moving(method, sections=run)).sparse_model.masks)  # none of GMP's, which starts dense
        make = EngineSelector.make

        def stale(self: EngineSelector, name: str, mask: Mask) -> Any:
            found = make(self, name, first[name] if name in first else Mask.of(roll(mask.alive())))
            found.mask = mask
            return found

        monkeypatch.setattr(EngineSelector, "make", stale)
        monkeypatch.setattr(Dense, "move", lambda self, mask: setattr(self, "mask", mask) or True)
        self.assert_seen(moving(method, sections=run))

    def test_neurons_along_the_wrong_axis(self, moving: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        axes = updates.matrix_axes
        monkeypatch.setattr(updates, "matrix_axes", lambda shape, fan_in_axes: axes(shape, [1 - fan_in_axes[0]]))
        for method, keys in (("gmp", {"min_per_neuron": 6}), ("topk", {}), ("rigl", {"min_per_neuron": 4})):
            self.assert_seen(moving(method, **keys), 30)

    @pytest.mark.parametrize("factor", ["rate_factor", "decay_factor"])
    @pytest.mark.parametrize("by", [-1, 1])
    def test_a_factor_of_another_step(
        self, moving: MakePlan, monkeypatch: pytest.MonkeyPatch, factor: str, by: int
    ) -> None:
        made = getattr(MaskSchedule, factor)
        monkeypatch.setattr(MaskSchedule, factor, lambda self, row, step: made(self, row, max(0, step + by)))
        self.assert_seen(moving("gmp"), 12)
        self.assert_seen(moving("topk"), 4)

    def test_an_update_of_another_step(self, moving: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        made = MaskSchedule.is_update
        monkeypatch.setattr(MaskSchedule, "is_update", lambda self, step: made(self, step - 1))
        for method in ("set", "rigl", "gmp", "topk"):
            self.assert_seen(moving(method), 12)

    @pytest.mark.parametrize("moments", ["mean", "zero"])
    def test_moments_of_another_rule(self, moving: MakePlan, monkeypatch: pytest.MonkeyPatch, moments: str) -> None:
        other = {"mean": "zero", "zero": "mean"}[moments]
        monkeypatch.setattr(mask_updates.MaskUpdates, "grown", property(lambda self: other))
        self.assert_seen(moving("rigl", moments=moments))
