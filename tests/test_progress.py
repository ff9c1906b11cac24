"""The bar: one count over all runs of a command, and the time left from those done and from how many run at a time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.cli import terminal
from supar_cli.experiments import search
from supar_cli.jobs import runs
from supar_cli.planning.plan import Plan
from supar_cli.training.reporter import NullReporter, Work

from .studies import FURTHER, write_spec

Event = tuple[float, int]  # when a run ends, and which


class Shown(NullReporter):
    """A reporter that remembers the progress."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, Work]] = []

    def progress(self, done: int, total: int, loss: float, work: Work | None = None) -> None:
        assert work is not None
        self.calls.append((done, total, work))


def schedule(seconds: list[float], jobs: int) -> list[Event]:
    """The ends of runs, each begun when one of the jobs is free."""
    free, ends = [0.0] * jobs, []
    for run, length in enumerate(seconds):
        end = heapq.heappop(free) + length
        heapq.heappush(free, end)
        ends.append((end, run))
    return sorted(ends)


def left_now(now: list[float], sizes: list[float], jobs: int, events: list[Event]) -> list[float]:
    """What the bar has as the time left after each run."""
    left = terminal.TimeLeft()
    found, ended = [], 0.0
    with mock.patch.object(terminal.time, "monotonic", lambda: now[0]):
        left.update(0, Work(0.0, sum(sizes), jobs))
        for done, (end, run) in enumerate(events, 1):
            now[0], ended = end, ended + sizes[run]
            left.update(done, Work(ended, sum(sizes), jobs))
            found.append(left._end_s - end)
    return found


def left_before(now: list[float], sizes: list[float], jobs: int, events: list[Event]) -> list[float]:
    """What it was: from the first run that ended on, and as if one ran at a time."""
    (first, _), total = events[0], len(sizes)
    return [(total - done) * (end - first) / max(done - 1, 1) for done, (end, _) in enumerate(events, 1)]


def errors(how: Callable[..., list[float]], seconds: list[float], jobs: int, sizes: list[float]) -> list[float]:
    """By how many of the longest runs the time left is wrong after each run but the last."""
    events = schedule(seconds, jobs)
    found = how([0.0], sizes, jobs, events)
    true = [events[-1][0] - end for end, _ in events]
    return [abs(one - other) / max(seconds) for one, other in zip(found, true, strict=True)][:-1]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(2, 60), st.floats(0.1, 1000), st.randoms(use_true_random=False))
def test_equal_runs_are_left_as_long_as_they_take(jobs: int, total: int, each: float, random: Any) -> None:
    seconds = [each * random.uniform(0.95, 1.05) for _ in range(total)]
    allowed = 1.0 + 0.15 * total / jobs  # the runs in flight, and what the runs differ by
    assert max(errors(left_now, seconds, jobs, [1.0] * total)) <= allowed


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.lists(st.sampled_from([1, 4, 16, 64]), min_size=8, max_size=40))
def test_runs_of_several_sizes_count_by_their_work(jobs: int, sizes: list[int]) -> None:
    work = [float(size) for size in sorted(sizes, reverse=True)]  # as the check has them: the largest first
    assert max(errors(left_now, work, jobs, work)) <= 1.0 + jobs
    if (
        set(sizes) == {1, 64} and work.count(64.0) == 1
    ):  # the control: by their number alone they are left for far too long
        assert max(errors(left_now, work, 1, [1.0] * len(work))) > 5.0


def test_what_it_said_before_is_far_off() -> None:
    seconds = [13.0] * 30
    assert max(errors(left_now, seconds, 2, [1.0] * 30)) <= 1.0
    assert max(errors(left_before, seconds, 2, [1.0] * 30)) > 10.0  # two runs that end together: nothing is left
    one_large = [64.0] + [1.0] * 30
    assert max(errors(left_now, one_large, 1, one_large)) < 0.1 < 5.0 < max(errors(left_now, one_large, 1, [1.0] * 31))


def test_lines_say_what_the_total_is_and_count_down(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    progress = terminal.Progress("tune-proxy")
    for seconds, done in ((0, 0), (20, 2), (40, 4), (60, 6)):
        now[0] = seconds
        progress.progress(done, 6, float("nan") if not done else 2.0, Work(done, 6, 2, "at most "))
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "tune-proxy: 2/6, loss 2.0000, 20 s each, at most 40s left"
    assert second == "tune-proxy: 4/6, loss 2.0000, 20 s each, at most 20s left"
    assert last == "tune-proxy: 6/6, loss 2.0000, 20 s each"
    progress.progress(4, 6, 2.0, Work(4, 6, 2))  # another process's trials may be requeued
    now[0] = 65
    assert str(progress._left) == "25s left"


@pytest.mark.parametrize("continues", [False, True])
def test_one_bar_over_trials_finalists_and_fit(
    continues: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    losses = iter(range(1, 100))
    monkeypatch.setattr(runs, "validation_loss", lambda plan, folder: 2.0 + next(losses) / 100)
    spec = write_spec(tmp_path, trials=3, steps=20)
    if continues:
        more = spec.model_copy(update={"search": spec.search.model_copy(update={"trials": 2, "finalists": 1})})
        search.tune(more, "study.journal", reporter=NullReporter())
    shown = Shown()
    search.tune(spec, "study.journal", reporter=shown)
    counts = [(done, total) for done, total, _ in shown.calls]
    total = 3 + FURTHER
    first = 2 if continues else 0
    assert counts[0] == (first, total) and counts[-1] == (total, total) and counts == sorted(counts)
    assert {work.bound for *_, work in shown.calls} == {""}  # nothing is pruned in this spec
    pruned = spec.model_copy(update={"search": spec.search.model_copy(update={"pruner": "median"})})
    assert {part.bound for part in search.parts(pruned)} == {"at most "}
    assert [len(part.plans) for part in search.parts(spec)] == [3, 2, 4]


def test_a_plans_work_is_larger_for_a_larger_model(plan_of: Callable[..., Plan]) -> None:
    from supar_cli.planning.estimate import run_seconds

    small, large = (run_seconds(plan_of(target={"width": width})) for width in (32, 512))
    assert large > 5 * small > 0
