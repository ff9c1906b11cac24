"""The schedule wsd: warm-up, a plateau, and a decay of a share and a shape that documents name."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.errors import InputError
from supar_cli.experiments.check_plans import sweeps_of
from supar_cli.planning import document, schedule
from supar_cli.planning.plan import Plan, with_steps
from supar_cli.planning.problems import parse
from supar_cli.training.optimizer import rate_factor
from tests.test_plan import TRAIN, plan, proxy

TARGET = {"sparsity": {"density": 0.5}}
SHAPES = ["sqrt", "linear", "cosine", "exponential"]


def made(**train: Any) -> Plan:
    return plan(train={**TRAIN, "schedule": "wsd", **train}, target=TARGET)


class TestFactors:
    """14 steps, 4 of them warm-up, the last 5 a decay to a tenth."""

    @staticmethod
    def factors(shape: str, *steps: int) -> list[float]:
        own = {"steps": 14, "warmup_steps": 4, "schedule": "wsd", "final_lr_fraction": 0.1, "decay_steps": 5}
        return [schedule.factor(step, **own, decay_shape=shape) for step in steps]  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("shape", "wanted"),
        [
            # at 0, .2, .6, .8 of the decay
            ("linear", [1.0, 0.82, 0.46, 0.28]),
            ("sqrt", [1.0, 1 - 0.9 * sqrt(0.2), 1 - 0.9 * sqrt(0.6), 1 - 0.9 * sqrt(0.8)]),
            ("cosine", [1.0, 0.9140576475, 0.4109423525, 0.1859423525]),
            ("exponential", [1.0, 0.1**0.2, 0.1**0.6, 0.1**0.8]),
        ],
    )
    def test_by_hand(self, shape: str, wanted: list[float]) -> None:
        assert self.factors(shape, 0, 1, 2, 3) == [0.25, 0.5, 0.75, 1.0]
        assert self.factors(shape, *range(4, 9)) == [1.0] * 5
        assert self.factors(shape, 9, 10, 12, 13) == pytest.approx(wanted, rel=1e-9)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.sampled_from(SHAPES), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
    def test_it_rises_stays_and_falls(self, shape: str, steps: int, warm: float, decay: float, final: float) -> None:
        warmup_steps = int(steps * warm)
        decay_steps = int((steps - warmup_steps) * decay)
        own: dict[str, Any] = {"steps": steps, "warmup_steps": warmup_steps, "decay_steps": decay_steps}
        own |= {"schedule": "wsd", "decay_shape": shape, "final_lr_fraction": final}
        found = [schedule.factor(step, **own) for step in range(steps)]
        begin = steps - decay_steps
        assert found[warmup_steps : begin + 1] == [1.0] * len(found[warmup_steps : begin + 1])
        assert found[:warmup_steps] == sorted(found[:warmup_steps])
        assert (
            found[begin:] == sorted(found[begin:], reverse=True)
            and min(found[warmup_steps:], default=1.0) >= final - 1e-12
        )

    def test_the_whole_run_after_warm_up_as_a_decay_is_the_schedule_of_that_shape(self) -> None:
        own: dict[str, Any] = {"steps": 30, "warmup_steps": 5, "final_lr_fraction": 0.2}
        for shape in ("linear", "cosine"):
            for step in range(30):
                whole = schedule.factor(step, schedule="wsd", decay_steps=25, decay_shape=shape, **own)
                assert whole == schedule.factor(step, schedule=shape, **own)


class TestDocuments:
    def test_the_published_defaults_are_written_out(self) -> None:
        train = made().train
        assert (train.decay_fraction, train.decay_shape, train.decay_steps, train.steps) == (0.2, "sqrt", 80, 400)
        text = document.write([made().model_dump()])
        assert "decay_fraction: 0.2" in text and "decay_shape: sqrt" in text and "decay_steps: 80" in text
        (read,) = document.read(text, "plan.yaml")
        assert parse(Plan, read) == made() and parse(Plan, read).hash() == made().hash()

    def test_other_schedules_have_no_such_keys_and_keep_their_hash(self) -> None:
        for kind in ("linear", "cosine", "constant"):
            found = plan(train={**TRAIN, "schedule": kind}, target=TARGET)
            assert not {"decay_fraction", "decay_shape", "decay_steps"} & set(found.train.model_dump())
        assert len({made().hash(), made(decay_fraction=0.1).hash(), made(decay_shape="linear").hash()}) == 3

    def test_another_length_keeps_the_shares(self) -> None:
        for steps in (1, 2, 3, 7, 100, 401):
            train = with_steps(made(warmup_fraction=0.5, decay_fraction=0.5), steps).train
            assert train.warmup_steps + train.decay_steps <= steps  # type: ignore[operator]
            type(train)(**train.model_dump())
        assert with_steps(made(), 100).train.decay_steps == 20

    def test_the_optimizers_factor_is_the_plans(self) -> None:
        found = made(decay_shape="linear", final_lr_fraction=0.0)
        assert [rate_factor(found, step) for step in (39, 319, 320, 360)] == [1.0, 1.0, 1.0, 0.5]

    def test_a_check_of_it_runs_at_a_constant_rate(self) -> None:
        """A key of wsd that is left behind would be refused."""
        target = {"width": 256, "sparsity": {"density": 0.5}}
        for subject in (
            proxy(train={**TRAIN, "schedule": "wsd"}),
            plan(train={**TRAIN, "schedule": "wsd"}, target=target),
        ):
            plans = [one for sweep in sweeps_of(subject, seeds=1) for of_seed in sweep.plans for one in of_seed]
            assert {rate_factor(one, step) for one in plans for step in range(10)} == {1.0}
            for one in plans:
                parse(Plan, document.Document(one.model_dump(), "plan.yaml"))

    @pytest.mark.parametrize(
        ("train", "what"),
        [
            (
                {"schedule": "linear", "decay_fraction": 0.1},
                r"train\.decay_fraction: 0\.1 with the schedule linear; expected it with",
            ),
            (
                {"schedule": "wsd", "decay_shape": None},
                r"train\.decay_shape: None with the schedule wsd; expected a value",
            ),
            (
                {"schedule": "wsd", "decay_fraction": 0.95},
                r"train\.decay_fraction: 0\.95 and the warm-up are more than",
            ),
            (
                {"schedule": "wsd", "decay_shape": "exponential", "final_lr_fraction": 0.0},
                r"train\.final_lr_fraction: 0",
            ),
            ({"schedule": "wsd", "decay_shape": "root"}, r"train\.decay_shape: "),
        ],
    )
    def test_what_does_not_go_together(self, train: dict[str, Any], what: str) -> None:
        with pytest.raises(InputError, match=what):
            proxy(train={**TRAIN, **train})
