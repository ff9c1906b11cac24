"""State: what a run is between two steps, moved to other masks, and a run that goes on from it as a resumed one does."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from supar_cli.errors import InputError
from supar_cli.planning.plan import Plan
from supar_cli.sparse.masks import IndexMap, Mask
from supar_cli.training import checkpoint_reader
from supar_cli.training.state import State
from supar_cli.training.trainer import Trainer
from tests.parallel_cases import Moving, other_masks, saved
from tests.test_train_resume import Cut

MakePlan = Callable[..., Plan]


def drawn(shape: tuple[int, ...], density: float, seed: int) -> Mask:
    return Mask.of(np.random.default_rng(seed).random(shape) < density)


def dense(values: Tensor, mask: Mask) -> np.ndarray:
    found = np.zeros(mask.shape, np.float32)
    found[mask.alive()] = values.numpy()
    return found


SHAPE = (12, 20)
CASES = {
    "as many elsewhere": Mask.of(np.roll(drawn(SHAPE, 0.3, 0).alive(), 1, axis=1)),
    "more": drawn(SHAPE, 0.8, 1),
    "fewer": drawn(SHAPE, 0.1, 2),
    "a superset": Mask.of(drawn(SHAPE, 0.3, 0).alive() | drawn(SHAPE, 0.3, 3).alive()),
    "a subset": Mask.of(drawn(SHAPE, 0.3, 0).alive() & drawn(SHAPE, 0.5, 4).alive()),
    "all": Mask.of(np.ones(SHAPE, bool)),
    "the same": drawn(SHAPE, 0.3, 0),
}


def state() -> State:
    """A state of a masked tensor, one that is dense, and a masked one that is stored whole."""
    random, mask = torch.Generator().manual_seed(0), drawn(SHAPE, 0.3, 0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    live, step = (mask.count,), torch.tensor(7.0)
    values = {"a": normal(*live), "b": normal(*SHAPE), "c": normal(*SHAPE), "norm": normal(5)}
    moments = {name: {"step": step, "m": normal(*v.shape), "v": normal(*v.shape)} for name, v in values.items()}
    return State(7, {"a": mask, "c": mask}, values, moments)


def assert_carried(before: State, after: State, name: str) -> None:
    """A tensor's values and moments are those of the weights that live before and after, and 0 where others grew."""
    is_whole = tuple(before.values[name].shape) == SHAPE
    old = Mask.of(np.ones(SHAPE, bool)) if is_whole else before.masks[name]
    new = after.masks[name]
    both = old.alive() & new.alive()
    pairs = [(before.values[name], after.values[name])]
    pairs += [(before.moments[name][key], after.moments[name][key]) for key in ("m", "v")]
    for one, other in pairs:
        assert other.shape == (new.count,) and other.dtype == one.dtype
        whole = one.numpy() if is_whole else dense(one, old)
        assert np.array_equal(dense(other, new), np.where(both, whole, 0.0))


class TestRemasked:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("name", ["a", "b", "c"])
    def test_survivors_keep_value_and_moments(self, case: str, name: str) -> None:
        before = state()
        after = before.remasked({name: CASES[case]})
        assert_carried(before, after, name)
        assert after.step == 7 and after.moments[name]["step"] is before.moments[name]["step"]
        others = set(before.values) - {name}
        assert all(after.values[other] is before.values[other] for other in others)
        assert all(after.moments[other] is before.moments[other] for other in others)
        assert after.masks == {**before.masks, name: CASES[case]} and set(before.masks) == {"a", "c"}

    def test_a_permuted_index_map_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        between = IndexMap.between

        def permuted(old: Mask, new: Mask) -> IndexMap:
            found = between(old, new)
            return replace(found, old=np.roll(found.old, 1))

        monkeypatch.setattr(IndexMap, "between", permuted)
        before = state()
        for name in ("a", "b", "c"):
            with pytest.raises(AssertionError):
                assert_carried(before, before.remasked({name: CASES["a superset"]}), name)

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"a mask of shape \(12, 20\) can't become one of shape \(20, 12\)"):
            state().remasked({"a": Mask.of(np.ones((20, 12), bool))})
        wrong = replace(state(), values={**state().values, "a": torch.zeros(3)})
        with pytest.raises(ValueError, match=r"\(3,\) is neither \(\d+,\), the live weights, nor the whole \(12, 20\)"):
            wrong.remasked({"a": CASES["more"]})


@pytest.fixture
def plan(plan_of: MakePlan) -> Plan:
    return plan_of(train={"steps": 12, "eval_every": 6}, target={"width": 64, "sparsity": {"density": 0.25}})


def grown(masks: dict[str, Mask]) -> dict[str, Mask]:
    """Masks that hold these and more."""
    return {
        name: Mask.of(mask.alive() | (np.random.default_rng(at).random(mask.shape) < 0.2))
        for at, (name, mask) in enumerate(masks.items())
    }


def losses(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step().loss for _ in range(steps)]


class TestTrainer:
    def test_grown_weights_start_at_zero_and_change_no_loss(self, plan: Plan) -> None:
        trainer = Trainer(plan)
        losses(trainer, 4)
        before = trainer.evaluate()["validation_loss"]
        trainer.remask(grown(trainer.sparse_model.masks))
        assert trainer.evaluate()["validation_loss"] == pytest.approx(before, abs=1e-6)
        losses(trainer, 2)
        for name, mask in trainer.sparse_model.masks.items():
            tensor = trainer.sparse_model.tensors[name]
            assert trainer.sparse_model.linear(name).mask == mask and tensor.shape == (mask.count,)
            state = trainer.optimizer.state[tensor]
            assert state["exp_avg"].shape == (mask.count,) and float(state["step"]) == 6
            assert bool((tensor != 0).all())  # those that have grown are trained too

    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    def test_more_weights_and_back_are_the_same_run(self, plan_of: MakePlan, optimizer: str) -> None:
        plan = plan_of(train={"steps": 12, "optimizer": optimizer})
        whole, there_and_back = Trainer(plan), Trainer(plan)
        assert losses(whole, 5) == losses(there_and_back, 5)
        masks = dict(there_and_back.sparse_model.masks)
        there_and_back.remask(grown(masks))
        there_and_back.remask(masks)
        assert losses(whole, 5) == losses(there_and_back, 5)

    def test_and_a_permuted_index_map_makes_it_another(self, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        whole, there_and_back = Trainer(plan), Trainer(plan)
        assert losses(whole, 5) == losses(there_and_back, 5)
        between, masks = IndexMap.between, dict(there_and_back.sparse_model.masks)
        monkeypatch.setattr(
            IndexMap, "between", lambda old, new: replace(found := between(old, new), new=np.roll(found.new, 1))
        )
        there_and_back.remask(grown(masks))
        monkeypatch.setattr(IndexMap, "between", between)
        there_and_back.remask(masks)
        assert losses(whole, 5)[0] != pytest.approx(losses(there_and_back, 5)[0], abs=1e-3)

    @pytest.mark.parametrize("engine", ["dense", "sparse"])
    def test_a_run_restored_from_the_remasked_state_is_the_same(
        self, plan_of: MakePlan, tmp_path: Path, engine: str
    ) -> None:
        plan = plan_of(train={"steps": 12}, run={"engine": engine})
        trainer = Moving(plan)
        losses(trainer, 4)
        trainer.remask(other_masks(plan))
        path = saved(trainer, tmp_path)
        restored = Moving(plan)
        restored.restore(path)
        assert restored.done == 4 and restored.sparse_model.masks == trainer.sparse_model.masks
        assert losses(trainer, 6) == losses(restored, 6)
        found = checkpoint_reader.weights(path)
        assert all(int((found[name] != 0).sum()) <= mask.count for name, mask in restored.sparse_model.masks.items())

    def test_a_compiled_graph_is_of_the_new_masks(self, plan_of: MakePlan) -> None:
        found = []
        for compiled in ("off", "on"):
            trainer = Trainer(plan_of(model={"layers": 1}, run={"compile": compiled}))
            first = losses(trainer, 2)
            trainer.remask(other_masks(trainer.plan))
            found.append(first + losses(trainer, 3))
        assert found[0] == pytest.approx(found[1], abs=1e-5)

    def test_a_plan_whose_masks_stay_refuses_others(self, plan: Plan, tmp_path: Path) -> None:
        trainer = Trainer(plan)
        losses(trainer, 2)
        trainer.remask({"blocks.0.mlp.up": other_masks(plan)["blocks.0.mlp.up"]})
        path = saved(trainer, tmp_path)
        with pytest.raises(InputError, match=r"the mask of blocks\.0\.mlp\.up is not the one this plan draws"):
            Trainer(plan).restore(path)

    def test_a_run_whose_masks_move_is_resumed_with_the_masks_it_has(self, plan: Plan, tmp_path: Path) -> None:
        class Once(Moving):
            """Moves its masks once, after step 3."""

            def step(self, diagnose: bool = False) -> Any:
                found = super().step(diagnose)
                if self.done == 3:
                    self.remask(other_masks(self.plan))
                return found

        def stop(step: int, loss: float) -> None:
            if step == 6:
                raise Cut

        plan = plan.model_copy(update={"run": plan.run.model_copy(update={"checkpoint_every": 6})})
        for name in ("whole", "cut"):
            (tmp_path / name).mkdir()
        whole = Once(plan).run(tmp_path / "whole")
        with pytest.raises(Cut):
            Once(plan).run(tmp_path / "cut", on_evaluation=stop)
        resumed = Once(plan).run(tmp_path / "cut", resume=True)
        assert resumed.resumed_at == 6 and resumed.losses == whole.losses
        assert resumed.evaluations == whole.evaluations


unpickled: list[str] = []
is_watched = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if is_watched and event == "pickle.find_class":
        unpickled.append(f"{arguments[0]}.{arguments[1]}")


sys.addaudithook(watch)


@pytest.fixture
def watching() -> Any:
    """A list of what is unpickled while the test runs."""
    global is_watched
    unpickled.clear()
    is_watched = True
    yield unpickled
    is_watched = False


class TestNothingIsUnpickled:
    def test_on_load(self, plan: Plan, tmp_path: Path, watching: list[str]) -> None:
        trainer = Trainer(plan)
        trainer.step()
        path = saved(trainer, tmp_path)
        Trainer(plan).restore(path)
        checkpoint_reader.weights(path)
        assert watching == []

    def test_the_watch_sees_it(self, watching: list[str]) -> None:
        pickle.loads(pickle.dumps(Path("x")))
        assert len(watching) >= 1
