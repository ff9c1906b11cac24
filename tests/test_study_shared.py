"""One study, many processes: totals are exact, nothing is run twice, and the dead and the cut off lose only their own work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest

from supar_cli.errors import SetupError, UnusableResult
from supar_cli.experiments.samplers import SeededByTrialNumber
from supar_cli.jobs import queue
from supar_cli.jobs.queue import SharedStudy, is_counted
from supar_cli.planning import document
from supar_cli.planning.spec import Search

from . import studies
from .studies import Postgres
from .studies import postgres as postgres
from .studies import quick as quick
from .studies import url as url

WORKERS = 6
Made = Callable[[], SharedStudy]


@pytest.fixture
def journal(tmp_path: Path) -> Made:
    return lambda: SharedStudy(str(tmp_path / "study.journal"), "s")


def together(url: str, work: Callable[[SharedStudy], Any]) -> list[Any]:
    """What as many threads get, each with a connection of its own, from work begun at the same time."""
    SharedStudy(url, "s")
    begin = threading.Barrier(WORKERS)

    def one() -> Any:
        study = SharedStudy(url, "s", join=True)
        begin.wait(60)
        return work(study)

    with ThreadPoolExecutor(WORKERS) as pool:
        return [done.result() for done in [pool.submit(one) for _ in range(WORKERS)]]


def worked(study: SharedStudy, most: int) -> int:
    """Run trials of next to no work until the study has as many; how many this was."""
    mine = 0

    def objective(trial: optuna.Trial) -> float:
        time.sleep(0.01)
        return trial.suggest_float("x", 0, 1)

    while sum(map(is_counted, study.trials())) < most:
        trial = study.claim(most)
        if trial is not None:
            mine += study.run(trial, objective) is not None
        else:
            time.sleep(0.01)
    return mine


def test_a_total_is_exact_whoever_works_on_it(url: str) -> None:
    assert sum(together(url, lambda study: worked(study, 20))) == 20
    trials = SharedStudy(url, "s").trials()
    assert sum(map(is_counted, trials)) == 20 and {t.state.name for t in trials} <= {"COMPLETE", "FAIL"}


def all_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst case: everybody has seen that trials are missing before anybody begins one."""
    begin, ask = threading.Barrier(WORKERS), optuna.Study.ask

    def late(self: optuna.Study, *arguments: Any) -> optuna.Trial:
        begin.wait(60)
        return ask(self, *arguments)

    monkeypatch.setattr(optuna.Study, "ask", late)


def claimed(study: SharedStudy) -> int:
    trial = study.claim(2)
    return 0 if trial is None else study.run(trial, lambda _: 1.0) is not None


def test_trials_asked_for_at_the_same_moment_are_withdrawn_beyond_the_total(url: str, monkeypatch) -> None:
    all_ask_at_once(monkeypatch)
    assert sum(together(url, claimed)) == 2
    withdrawn = [t.user_attrs["withdrawn"] for t in SharedStudy(url, "s").trials() if not is_counted(t)]
    assert withdrawn == ["the study already has enough trials"] * (WORKERS - 2)


def test_without_the_rule_the_total_is_exceeded(url: str, monkeypatch) -> None:
    all_ask_at_once(monkeypatch)
    monkeypatch.setattr(SharedStudy, "_withdraw_reason", lambda *_: "")
    assert sum(together(url, claimed)) == WORKERS


@pytest.mark.parametrize("rule", [True, False])
def test_of_equal_queued_trials_one_is_run(url: str, rule: bool, monkeypatch) -> None:
    if not rule:
        monkeypatch.setattr(SharedStudy, "_withdraw_reason", lambda *_: "")
    study = SharedStudy(url, "s")
    for _ in range(3):
        study.queue({"x": 0.5})
    for _ in range(3):
        trial = study.claim(9)
        if trial is not None:
            study.run(trial, lambda t: t.suggest_float("x", 0, 1))
    states = [trial.state.name for trial in study.trials()]
    assert states == (["COMPLETE", "FAIL", "FAIL"] if rule else ["COMPLETE"] * 3)


def test_a_queued_run_is_taken_only_by_who_waits_for_it(journal: Made) -> None:
    study = journal()
    study.queue("a")
    assert study.claim({"b"}) is None
    assert [trial.state.name for trial in study.trials()] == ["WAITING"]
    trial = study.claim({"a", "b"})
    assert trial is not None and trial.user_attrs["run"] == "a"


def test_a_run_that_two_processes_have_queued_is_made_once_and_no_trial_of_it_is_left(journal: Made) -> None:
    study = journal()
    for _ in range(2):
        study.queue("a")
    assert study.claim({"a"}) is not None and study.claim({"a"}) is None
    assert [trial.state.name for trial in study.trials()] == ["RUNNING", "FAIL"]


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe", "gp"])
def test_no_two_trials_that_run_at_the_same_time_draw_the_same(sampler: str, url: str) -> None:
    if sampler in ("qmc", "gp"):
        pytest.importorskip("scipy", reason=f"the {sampler} sampler needs scipy")

    def draw(study: SharedStudy) -> tuple[int, float]:
        study.study.sampler = SeededByTrialNumber(Search(sampler=sampler, seed=3))
        trial = study.claim(WORKERS)
        assert trial is not None
        return trial.number, trial.suggest_float("x", 1e-3, 1.0, log=True)

    drawn = dict(together(url, draw))
    assert sorted(drawn) == list(range(WORKERS)) and len(set(drawn.values())) == WORKERS


def test_a_proposal_is_the_numbers_own(tmp_path: Path) -> None:
    def drawn(name: str, seed: int) -> list[float]:
        study = SharedStudy(str(tmp_path / name), "s")
        study.study.sampler = SeededByTrialNumber(Search(seed=seed))
        return [study.study.ask().suggest_float("x", 0, 1) for _ in range(3)]

    assert drawn("a", 3) == drawn("b", 3) != drawn("c", 4)


def left_by(study: SharedStudy, process: int, where: str) -> optuna.Trial:
    trial = study.study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("process", ["host", process, where])
    return trial


def test_the_trial_of_a_dead_process_is_given_back_once_and_its_proposal_run_again(url: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    study = SharedStudy(url, "s")
    dead = left_by(study, gone.pid, queue.machine())
    alive = left_by(study, os.getpid(), queue.machine())
    given_back = [number for one in together(url, SharedStudy.requeue_abandoned) for number in (t.number for t in one)]
    assert given_back == [dead.number]
    again = study.claim(9)
    assert again is not None and again.suggest_float("x", 0, 1) == dead.params["x"]
    assert [t.state.name for t in study.trials()] == ["FAIL", "RUNNING", "RUNNING"] and alive.number == 1


def test_a_killed_process_that_nobody_waited_for_is_dead() -> None:
    gone = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert queue._is_alive(gone.pid)
    gone.kill()
    studies.wait_for(lambda: not queue._is_alive(gone.pid))
    gone.wait()


def looks(study: SharedStudy, seconds: float) -> list[int]:
    limit, found = time.monotonic() + seconds, []
    while time.monotonic() < limit:
        found += [trial.number for trial in study.requeue_abandoned()]
        time.sleep(0.05)
    return found


def test_a_trial_of_another_machine_is_given_back_when_it_falls_silent(journal: Made, quick: None) -> None:
    study = journal()
    silent = left_by(study, os.getpid(), "another machine")
    beating = left_by(study, os.getpid(), "another machine")
    unmarked = study.study.ask()  # of a process that died at once
    with queue._heartbeat(beating):
        assert looks(study, 0.4) == [], "nothing is given back within the grace"
        assert looks(study, 1.5) == [silent.number, unmarked.number]
    assert looks(study, 1.5) == [beating.number]
    assert [t.state.name for t in study.trials()] == ["FAIL"] * 3 + ["WAITING"] * 2, "the unmarked had no proposal"


def test_an_outage_is_not_held_against_a_trial(journal: Made, quick: None) -> None:
    study = journal()
    left_by(study, os.getpid(), "another machine")
    assert looks(study, 0.3) == []
    time.sleep(1)  # nobody can look, nor beat
    assert study.requeue_abandoned() == []


def test_a_proposal_that_kills_every_process_is_not_queued_for_ever(journal: Made) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    study = journal()
    study.queue({"x": 0.5})
    for _ in range(queue.MAX_REQUEUES + 1):
        left_by(study, gone.pid, queue.machine())
        study.requeue_abandoned()
    assert len(study.trials()) == queue.MAX_REQUEUES + 1 and not [
        t for t in study.trials() if t.state.name == "WAITING"
    ]


def test_work_on_a_trial_that_was_given_back_is_not_used(journal: Made) -> None:
    study, other = journal(), journal()

    def slow(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        assert other._requeue(other.trials()[trial.number])
        return 1.0

    trial = study.claim(1)
    assert trial is not None and study.run(trial, slow) is None
    again = other.claim(1)
    assert again is not None and other.run(again, lambda t: t.suggest_float("x", 0, 1)) is not None
    assert sum(map(is_counted, study.trials())) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SetupError("no data here"), MemoryError()])
def test_what_interrupts_a_trial_gives_it_back(error: BaseException, journal: Made) -> None:
    def interrupted(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        raise error

    study = journal()
    trial = study.claim(1)
    assert trial is not None
    with pytest.raises(type(error)):
        study.run(trial, interrupted)
    first, second = study.trials()
    assert (first.state.name, second.state.name) == ("FAIL", "WAITING") and not is_counted(first)
    assert second.system_attrs["fixed_params"] == first.params


def test_a_diverged_trial_counts_and_is_not_done_again(journal: Made) -> None:
    def diverging(trial: optuna.Trial) -> float:
        raise UnusableResult("loss nan")

    study = journal()
    trial = study.claim(1)
    assert trial is not None and study.run(trial, diverging) is not None
    assert study.claim(1) is None and [t.state.name for t in study.trials()] == ["FAIL"]


class TestProcesses:
    """`supar tune-proxy` as processes, begun at the same time."""

    def test_four_on_postgresql(self, postgres: Postgres, tmp_path: Path) -> None:
        spec, url = studies.write_spec(tmp_path, 6, studies.FAST), postgres.database(tmp_path.name)
        flags = ("tune-proxy", "--study", url)
        several = [studies.start(tmp_path, *flags, "-o", "-") for _ in range(3)]
        several.append(studies.start(tmp_path, *flags, "-o", "-", "--jobs", "2"))
        proxies = studies.ended(several)
        studies.check_exact(spec, url, proxies)
        (text,) = {document.write([proxy.model_dump()]) for proxy in proxies}
        assert "secret" not in text

    def test_three_on_a_journal_file(self, tmp_path: Path) -> None:
        spec, path = studies.write_spec(tmp_path, 5, studies.FAST), str(tmp_path / "s.journal")
        flags = ("tune-proxy", "--study", "s.journal")
        proxies = studies.ended([studies.start(tmp_path, *flags, "-o", "-") for _ in range(3)])
        studies.check_exact(spec, path, proxies)

    def test_one_killed_in_a_trial_while_another_works(self, tmp_path: Path) -> None:
        spec, path = studies.write_spec(tmp_path, 4, studies.SLOW), str(tmp_path / "s.journal")
        flags = ("tune-proxy", "--study", "s.journal")
        killed = studies.start(tmp_path, *flags, "-o", "-", "--jobs", "2")
        trial = studies.wait_for(lambda: (tmp_path / "s.journal").exists() and studies.midway(spec, path))
        other = studies.start(tmp_path, *flags, "-o", "-")
        killed.kill()
        killed.communicate(timeout=60)
        worker = trial.user_attrs["process"][1]
        studies.wait_for(lambda: not queue._is_alive(worker), 20)
        proxies = studies.ended([other])
        studies.check_exact(spec, path, proxies)
        trials = studies.trials_of(spec, path)
        assert trials[trial.number].state.name == "FAIL"
        assert [t.params for t in trials if is_counted(t)].count(trial.params) == 1, "its proposal was run after all"

    def test_a_database_restarted_in_the_middle(self, postgres: Postgres, tmp_path: Path) -> None:
        spec, url = studies.write_spec(tmp_path, 12, studies.SLOW), postgres.database(tmp_path.name)
        flags = ("tune-proxy", "--study", url)
        several = [studies.start(tmp_path, *flags, "-o", "-", "--jobs", str(n + 1)) for n in range(2)]

        def both_work() -> bool:
            own = {t.user_attrs["process"][1] == several[0].pid for t in studies.trials_of(spec, url) if t.last_step}
            return own == {True, False}

        studies.wait_for(both_work)
        postgres.restart()
        done = sum(map(is_counted, studies.trials_of(spec, url)))
        studies.wait_for(lambda: sum(map(is_counted, studies.trials_of(spec, url))) > done)
        postgres.restart()
        studies.check_exact(spec, url, studies.ended(several))

    def test_a_database_that_is_not_there_is_said_at_once(self, tmp_path: Path) -> None:
        studies.write_spec(tmp_path, 5, studies.FAST)
        began = time.monotonic()
        refused = studies.start(tmp_path, "tune-proxy", "--study", "postgresql://me:secret@127.0.0.1:1/none")
        out, err = refused.communicate(timeout=60)
        assert refused.returncode == 3 and out == "" and "secret" not in err and "Traceback" not in err
        assert "error: --study postgresql://127.0.0.1:1/none: can't be opened: " in err
        assert time.monotonic() - began < 30 and not (tmp_path / "proxy.yaml").exists()
