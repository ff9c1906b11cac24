"""When masks change and how many weights live: every step of generated sections, against the oracle's list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.errors import InputError
from supar_cli.planning import document, updates
from supar_cli.planning.plan import Plan, with_steps
from supar_cli.planning.problems import parse
from supar_cli.planning.schedule import MaskSchedule
from tests import updates_oracle

RULES = ("independent", "coupled", "sqrt")


@dataclass
class Row:
    """What a schedule asks of a tensor's row."""

    size: int
    kept: int
    fan_in: int = 1


@st.composite
def cases(draw: Any) -> tuple[dict[str, Any], int, Row, str]:
    """A section of any method, a number of steps in which masks change, a tensor and the decay's rule."""
    method = draw(st.sampled_from(["set", "rigl", "gmp", "topk"]))
    steps = draw(st.one_of(st.integers(1, 8), st.integers(9, 130)))
    hundredths = st.integers(0, 100)
    begin, anneal, end = sorted(draw(st.tuples(hundredths, hundredths, hundredths)))
    begin = min(begin, 98)
    anneal = max(anneal, begin + 1)
    end = max(end, anneal)
    every = 1 if method == "topk" else draw(st.integers(1, 40))
    found: dict[str, Any] = {"method": method, "every_steps": every, "begin": begin / 100, "end": end / 100}
    found |= {"rates_follow": draw(st.sampled_from(["now", "now", "end"]))}
    found["exponent"] = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0, 2.0]))
    if method in ("gmp", "topk"):
        found |= {
            "start": draw(st.sampled_from([1.0, 0.9, 0.5, 1e-3])),
            "shape": draw(st.sampled_from(["linear", "cubic"])),
        }
        found |= {"anneal": anneal / 100}
    else:
        found |= {
            "drop": draw(st.sampled_from([1.0, 0.3, 0.05])),
            "grow": {"set": "random", "rigl": "gradient"}[method],
        }
        found |= {"drop_schedule": draw(st.sampled_from(["cosine", "linear", "constant"])), "moments": "mean"}
    found |= {"grow": "magnitude", "moments": "keep"} if method == "topk" else {}
    neurons, fan_in = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    row = Row(neurons * fan_in, draw(st.integers(1, neurons * fan_in)), fan_in)
    found["min_per_neuron"] = draw(st.sampled_from([0, 1, row.kept // neurons])) if row.kept >= neurons else 0
    return found, steps, row, draw(st.sampled_from(RULES))


def schedules(section: dict[str, Any], steps: int, rule: str) -> tuple[Any, updates_oracle.Schedule]:
    own: Any = MaskSchedule(updates.PlanUpdates(**section), steps, rule)
    return own, updates_oracle.Schedule(section, steps, rule)


def assert_agrees(own: Any, other: updates_oracle.Schedule, row: Row) -> None:
    """Both say the same of every step of a run in which masks change at all."""
    steps = range(own.steps + 1)
    assert [t for t in steps if own.is_update(t)] == other.updates
    assert [own.kept(row, t) for t in steps] == other.kept(row.size, row.kept)
    rates, decays = other.rates(row.size, row.kept), other.decays(row.size, row.kept)
    assert [own.rate_factor(row, t) for t in steps[:-1]] == pytest.approx(rates, rel=1e-12)
    assert [own.decay_factor(row, t) for t in steps[:-1]] == pytest.approx(decays, rel=1e-12)
    if other.section.get("drop") is not None:
        wanted = other.dropped(row.size, row.kept, row.size // row.fan_in)
        assert {t: own.dropped(row, t) for t in other.updates} == wanted


class TestAgainstTheOracle:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(cases())
    def test_every_step_of_any_section(self, case: tuple[dict[str, Any], int, Row, str]) -> None:
        section, steps, row, rule = case
        own, other = schedules(section, steps, rule)
        if other.updates:
            assert_agrees(own, other, row)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(cases())
    def test_counts_fall_from_the_start_to_exactly_the_rows(self, case: tuple[dict[str, Any], int, Row, str]) -> None:
        section, steps, row, rule = case
        own, other = schedules(section, steps, rule)
        counts = [own.kept(row, t) for t in range(steps + 1)]
        if not other.updates:
            return
        assert counts == sorted(counts, reverse=True) and counts[-1] == row.kept
        start = section.get("start")
        first = row.kept if start is None else max(row.kept, int(start * row.size + 0.5))
        assert set(counts[: other.begin + 1]) == {first if row.kept < row.size else row.kept}
        changes = {t for t, (before, after) in enumerate(pairwise(counts), 1) if before != after}
        assert changes <= set(other.updates)
        for t in range(steps + 1):
            assert own.is_update(t) == (own.last_update(t) == t > own.begin)
            assert 0 <= own.dropped(row, t) <= min(row.kept, row.size - row.kept)

    @pytest.mark.parametrize(
        ("fault", "wrong"),
        [
            ("a step early", lambda self, row, step, made: made(self, row, step + 1)),
            ("a step late", lambda self, row, step, made: made(self, row, max(0, step - 1))),
            ("rounded up", lambda self, row, step, made: min(row.size, made(self, row, step) + 1)),
        ],
    )
    def test_a_wrong_count_is_seen(
        self, monkeypatch: pytest.MonkeyPatch, fault: str, wrong: Callable[..., int]
    ) -> None:
        made = MaskSchedule.kept
        section = {**GMP, "every_steps": 3}
        assert_agrees(*schedules(section, 40, "independent"), Row(4096, 1024))
        monkeypatch.setattr(MaskSchedule, "kept", lambda self, row, step: wrong(self, row, step, made))
        with pytest.raises(AssertionError):
            assert_agrees(*schedules(section, 40, "independent"), Row(4096, 1024))

    def test_a_factor_of_another_step_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("rate_factor", "decay_factor"):
            with monkeypatch.context() as patch:
                made = getattr(MaskSchedule, name)
                patch.setattr(MaskSchedule, name, lambda self, row, step, made=made: made(self, row, step + 1))
                with pytest.raises(AssertionError):
                    assert_agrees(*schedules({**GMP, "every_steps": 3}, 40, "independent"), Row(4096, 1024))


GMP: dict[str, Any] = {"method": "gmp", "every_steps": 1, "start": 1.0, "shape": "cubic", "begin": 0.2, "anneal": 0.75}
GMP |= {"end": 0.75, "min_per_neuron": 0, "rates_follow": "now", "exponent": 1.0}
SET: dict[str, Any] = {"method": "set", "every_steps": 2, "begin": 0.0, "end": 0.75, "drop": 0.3, "grow": "random"}
SET |= {"drop_schedule": "cosine", "moments": "mean", "min_per_neuron": 0, "rates_follow": "now", "exponent": 1.0}


class TestByHand:
    def test_gmp(self) -> None:
        """20 steps: after steps 5 to 15, from 1000 to 100 weights with the cube of what is left."""
        own = MaskSchedule(updates.PlanUpdates(**GMP), 20, "independent")
        row: Any = Row(1000, 100)
        assert [t for t in range(21) if own.is_update(t)] == list(range(5, 16))
        cubes = [100 + int(900 * (left / 11) ** 3 + 1e-9) for left in range(10, -1, -1)]
        assert [own.kept(row, t) for t in range(21)] == [1000] * 5 + cubes + [100] * 5
        assert [own.rate_factor(row, t) for t in (0, 4, 15, 20)] == [0.1, 0.1, 1.0, 1.0]
        assert own.rate_factor(row, 5) == 100 / cubes[0] and own.decay_factor(row, 5) == pytest.approx(cubes[0] / 100)

    def test_set(self) -> None:
        """40 steps, until step 30: .3 of 1000 weights at first, half of that in the middle, none at the end."""
        own = MaskSchedule(updates.PlanUpdates(**SET), 40, "independent")
        row: Any = Row(4000, 1000)
        assert [t for t in range(41) if own.is_update(t)] == list(range(2, 31, 2))
        assert [own.dropped(row, t) for t in (10, 20, 30)] == [225, 75, 0]
        assert {own.kept(row, t) for t in range(41)} == {1000} and {own.rate_factor(row, t) for t in range(41)} == {1.0}

    def test_the_rates_of_the_end_are_those_of_the_papers_failing_runs(self) -> None:
        own = MaskSchedule(updates.PlanUpdates(**{**GMP, "rates_follow": "end"}), 20, "independent")
        row: Any = Row(1000, 100)
        assert {own.rate_factor(row, t) for t in range(21)} == {own.decay_factor(row, t) for t in range(21)} == {1.0}

    def test_the_decays_rules(self) -> None:
        row: Any = Row(1000, 250)
        for rule, factor in (("independent", 4.0), ("coupled", 1.0), ("sqrt", 2.0)):
            own = MaskSchedule(updates.PlanUpdates(**GMP), 20, rule)
            assert (own.rate_factor(row, 0), own.decay_factor(row, 0)) == (0.25, factor)


def test_shares_that_meet_in_one_step_change_masks_in_the_next(plan_of: Callable[..., Plan]) -> None:
    """Both at step 2 of 10: dense until then, and at the end's density after step 3."""
    own = MaskSchedule(updates.PlanUpdates(**{**GMP, "begin": 0.2, "anneal": 0.21}), 10, "independent")
    row: Any = Row(1000, 100)
    assert [own.kept(row, t) for t in range(6)] == [1000, 1000, 1000, 100, 100, 100]


@pytest.mark.parametrize("method", ["set", "gmp"])
def test_a_run_too_short_for_any_change_is_refused(plan_of: Callable[..., Plan], method: str) -> None:
    keys = {"method": method, "end": 0.03} if method == "set" else {"method": method, "end": 0.22, "anneal": 0.21}
    target = {"width": 64, "sparsity": {"density": 0.25, "updates": keys}}
    with pytest.raises(InputError, match=r"updates\.end: .*10 steps"):
        plan_of(train={"steps": 10}, target=target)
    plan = plan_of(train={"steps": 100}, target=target)
    short = with_steps(plan, 10).model_dump()
    with pytest.raises(InputError, match=r"sparsity\.updates\.end: .*10 steps"):
        parse(Plan, document.Document(short, "plan.yaml"))


def test_a_start_that_no_tensor_falls_from_is_refused(plan_of: Callable[..., Plan]) -> None:
    def plan(method: str, start: float) -> Plan:
        updates = {"method": method, "start": start}
        return plan_of(
            target={"width": 64, "sparsity": {"density": 0.25, "overrides": {"attn": 0.5}, "updates": updates}}
        )

    for method, start in (("gmp", 0.25), ("gmp", 0.125), ("topk", 0.125)):
        with pytest.raises(InputError, match=rf"target\.sparsity\.updates\.start: {start}"):
            plan(method, start)
    assert plan("gmp", 0.375).sparsity.updates and plan("topk", 0.25).sparsity.updates
