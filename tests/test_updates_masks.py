"""What is kept and what grows: any tensor against the oracle, ties and floors too; exact counts at every step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.planning.plan import Plan
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.sparse import updates
from supar_cli.training.mask_updates import MaskUpdates
from supar_cli.training.trainer import Trainer
from tests import updates_oracle
from tests.test_updates_train import TUNED
from tests.updates_oracle import largest, per_neuron

MakePlan = Callable[..., Plan]
FAN_IN = [
    ((12, 20), (1,)),
    ((12, 20), (0,)),
    ((6, 4, 3, 3), (1, 2, 3)),
    ((4, 6, 5), (0, 2)),
    ((30,), (0,)),
    ((5, 7), (0, 1)),
]


@st.composite
def tensors(draw: Any) -> tuple[np.ndarray, np.ndarray, tuple[int, ...], int, int]:
    """A weight of a few values, so that many tie, its live ones, the axes of its fan-in, a count and a floor."""
    shape, axes = draw(st.sampled_from(FAN_IN))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = random.integers(-9, 9, shape) / 8 if draw(st.booleans()) else random.normal(size=shape)
    alive = random.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
    alive.reshape(-1)[0] = True
    neurons = int(updates_oracle.neurons(shape, axes).max()) + 1
    least = draw(st.integers(0, alive.size // neurons))
    kept = draw(st.integers(0, int(alive.sum())))
    return values.astype(np.float32), alive, axes, kept, least


def on_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


class TestKept:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(tensors())
    def test_as_the_oracle(self, case: Any) -> None:
        values, alive, axes, kept, least = case
        needed = int(np.minimum(per_neuron(alive, axes), least).sum())
        call = (on_torch(values), kept, axes, least, on_torch(alive))
        if needed > kept:
            with pytest.raises(ValueError, match=rf"{kept} live weights; {least} for each neuron need {needed}"):
                updates.keep_largest(*call)
            return
        found = updates.keep_largest(*call).numpy()
        assert np.array_equal(found, largest(np.abs(values), alive, kept, axes, least))
        assert found.sum() == kept and not (found & ~alive).any()
        assert (per_neuron(found, axes) >= np.minimum(per_neuron(alive, axes), least)).all()

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(tensors())
    def test_what_grows_as_the_oracle(self, case: Any) -> None:
        values, alive, axes, kept, least = case
        live, extent = per_neuron(alive, axes), alive.size // len(per_neuron(alive, axes))
        lacking = np.maximum(np.minimum(least, extent) - live, 0)
        count = min(int((~alive).sum()), max(kept, int(lacking.sum())))
        positions = updates.grow_largest(on_torch(values), on_torch(alive), count, axes, least).numpy()
        found = np.zeros(alive.size, bool)
        found[positions] = True
        found = found.reshape(alive.shape)
        assert np.array_equal(found, largest(np.abs(values), ~alive, count, axes, lacking))
        assert found.sum() == count and not (found & alive).any()
        assert (per_neuron(alive | found, axes) >= min(least, extent)).all()

    def test_neurons_along_another_axis_are_seen(self) -> None:
        values, every = np.arange(240, dtype=np.float32).reshape(12, 20), np.ones((12, 20), bool)
        found = [updates.keep_largest(on_torch(values), 60, axes, 3).numpy() for axes in ((1,), (0,))]
        for axis, one in enumerate(found):
            assert np.array_equal(one, largest(values, every, 60, (1 - axis,), 3))
            assert per_neuron(one, (1 - axis,)).min() >= 3 and not np.array_equal(one, found[1 - axis])

    def test_numbers_that_are_none_and_counts_that_do_not_fit(self) -> None:
        weight = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
        with pytest.raises(ValueError, match="a weight is not a number"):
            updates.keep_largest(weight, 2, [1])
        with pytest.raises(ValueError, match="3 live weights; only 2 live"):
            updates.keep_largest(torch.ones(2, 2), 3, [1], alive=torch.eye(2, dtype=torch.bool))


class TestRandomGrowth:
    def test_a_function_of_seed_name_and_step(self) -> None:
        base = updates.random_scores((40, 50), 3, "blocks.0.mlp.up", 10)
        assert torch.equal(base, updates.random_scores((40, 50), 3, "blocks.0.mlp.up", 10))
        assert float(base.min()) >= 0 and float(base.max()) < 1
        for other in ((4, "blocks.0.mlp.up", 10), (3, "blocks.1.mlp.up", 10), (3, "blocks.0.mlp.up", 11)):
            correlation = np.corrcoef(base.flatten(), updates.random_scores((40, 50), *other).flatten())[0, 1]
            assert abs(correlation) < 0.12  # 5 standard deviations of 1/√2000

    def test_each_dead_weight_grows_as_often(self) -> None:
        """200 draws of 20 of 100 dead weights: 40 each; a count beyond 5.5 deviations comes by chance in 1 of 200,000."""
        alive = torch.zeros(10, 20, dtype=torch.bool)
        alive[:, :10] = True
        counts = np.zeros(200)
        for step in range(200):
            counts[updates.grow_largest(updates.random_scores((10, 20), 0, "x", step), alive, 20, [1]).numpy()] += 1
        dead = counts.reshape(10, 20)[:, 10:]
        assert dead.sum() == 4000 and counts.sum() == 4000
        assert np.abs(dead - 40).max() < 5.5 * np.sqrt(200 * 0.2 * 0.8)


def assert_exact(trainer: Trainer, schedule: MaskSchedule, floors: bool) -> int:
    """Every moving tensor has exactly as many live weights as the schedule says, floors hold, and dead state is 0."""
    state, section, moved = trainer.capture(), schedule.updates, 0
    for row in trainer.plan.tensors:
        if row.kept == row.size:
            assert row.name not in state.masks
            continue
        kept = schedule.kept(row, trainer.done)
        mask = state.masks.get(row.name)
        if mask is None:
            assert kept == row.size
            continue
        assert mask.count == kept
        if floors:
            assert per_neuron(mask.alive(), row.fan_in_axes).min() >= section.min_per_neuron
        tensor = state.values[row.name]
        if tuple(tensor.shape) == mask.shape != (mask.count,):
            assert section.moments == "keep" and schedule.stores_dense(trainer.done)
            assert not tensor[torch.from_numpy(~mask.alive())].any()
            dead = [m[torch.from_numpy(~mask.alive())] for m in state.moments[row.name].values() if m.ndim]
            moved += any(bool(one.any()) for one in dead)  # the control: the state of dead weights is not 0 by chance
        else:  # nothing of dead weights is held at all
            kept_moments = [m for m in state.moments[row.name].values() if m.ndim]
            assert all(tuple(one.shape) == (mask.count,) for one in (tensor, *kept_moments))
        weight = trainer.sparse_model.weight(row.name)
        assert not weight[torch.from_numpy(~mask.alive())].any()
    return moved


GENERATED = [
    ("set", {"min_per_neuron": 3, "drop": 0.5, "drop_schedule": "constant", "every_steps": 2, "begin": 0.1}, "1/4"),
    ("set", {"drop": 1.0, "drop_schedule": "constant", "end": 1.0}, "1/3"),
    ("set", {"moments": "keep", "end": 0.5, "every_steps": 3}, "7/8"),
    ("rigl", {"min_per_neuron": 2, "drop": 0.4, "end": 0.4, "every_steps": 1}, "1/4"),
    ("rigl", {"moments": "keep", "drop": 0.9, "drop_schedule": "linear", "end": 1.0}, "0.9"),
    ("gmp", {"begin": 0.3, "anneal": 0.4, "every_steps": 5}, "1/16"),
    ("gmp", {"start": 0.5, "shape": "linear", "begin": 0.0, "end": 1.0, "anneal": 1.0}, "3/16"),
    ("gmp", {"min_per_neuron": 8, "every_steps": 2}, "1/4"),
    ("topk", {"min_per_neuron": 8}, "1/4"),
    ("topk", {"start": 0.3, "end": 0.7, "begin": 0.2, "min_per_neuron": 1}, "1/8"),
]


class TestCounts:
    @pytest.mark.parametrize("engine", ["dense", "sparse"])
    @pytest.mark.parametrize(("method", "keys", "density"), GENERATED)
    def test_at_every_step(self, plan_of: MakePlan, method: str, keys: Any, density: str, engine: str) -> None:
        sparsity = {"density": density, "overrides": {"attn.v": 1.0}, "updates": {"method": method, **keys}}
        train = {"steps": 12, "batch_size": 2}
        plan = plan_of(
            model={"layers": 1},
            hyperparameters=TUNED,
            train=train,
            run={"engine": engine},
            target={"width": 32, "sparsity": sparsity},
        )
        schedule, trainer = MaskSchedule.of(plan), Trainer(plan)
        assert schedule is not None
        moved, masks = 0, []
        for step in range(13):
            if step:
                trainer.step()
            floors = schedule.last_update(step) > schedule.begin or schedule.updates.start == 1
            moved += assert_exact(trainer, schedule, floors)
            masks.append(trainer.capture().masks)
        assert moved or schedule.updates.moments != "keep"
        assert masks[-1] != masks[0]

    def test_a_weight_kept_too_many_is_seen(self, plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        sparsity = {"density": 0.25, "updates": "topk"}
        plan = plan_of(model={"layers": 1}, train={"steps": 12}, target={"width": 32, "sparsity": sparsity})
        schedule, trainer, change = MaskSchedule.of(plan), Trainer(plan), MaskUpdates._change
        assert schedule is not None

        def wrong(self: MaskUpdates, model: Any, row: Any, *rest: Any) -> Any:
            found = change(self, model, row, *rest)
            self._alive[row.name].view(-1)[(~self._alive[row.name]).flatten().nonzero()[0]] = True
            return found

        monkeypatch.setattr(MaskUpdates, "_change", wrong)
        trainer.step()
        with pytest.raises(AssertionError):
            assert_exact(trainer, schedule, floors=False)
