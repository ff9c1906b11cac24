"""A measurement whose controls pass shows nothing: status 5 and the words, alike in every command, its result and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.experiments import search
from supar_cli.jobs import runs
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.reporting.read import report
from supar_cli.reporting.result import Verdict, with_power

from .test_sweep_study import RUN, SLOPES, Supar, document_file, result_of, synthetic

__all__ = ["document_file"]

MARKS = ("drift", "shift", "regret")
marks = st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=3)
WORDS = "should miss, but passes"


def verdicts_of(subject: list[bool | None], controls: dict[str, list[bool | None]]) -> list[Verdict]:
    rows = [("SμPar", False, subject), *((name, True, found) for name, found in controls.items())]
    return [
        Verdict(what=f"{name}: {mark}", passed=passed, control=is_control)
        for name, is_control, found in rows
        for mark, passed in zip(MARKS, found, strict=False)
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(marks, st.dictionaries(st.sampled_from(["SP", "μP", "SμPar's init only"]), marks))
def test_a_control_that_passes_every_mark_takes_the_power(
    subject: list[bool | None], controls: dict[str, list[bool | None]]
) -> None:
    verdicts = verdicts_of(subject, controls)
    (*kept, last) = with_power(verdicts) if controls else [*verdicts, None]
    assert kept == verdicts
    if last is None:
        assert with_power(verdicts) == verdicts
        return
    passing = [name for name, found in controls.items() if set(found) == {True}]
    assert (last.passed is False) == bool(passing) and all(name in last.text for name in passing)
    assert (last.passed is True) == all(False in found for found in controls.values())


def flat(plan: Plan) -> float:
    """Losses of a sweep that is too short: the optimum of every parameterization stays where it is."""
    return synthetic(plan, dict.fromkeys(SLOPES, 0.0))


def tune_nothing(spec: Spec, *_: Any, **__: Any) -> Proxy:
    sections = {name: getattr(spec, name) for name in ("model", "hyperparameters", "data", "train", "run")}
    return Proxy(kind="supar.proxy/v1", **sections)


@pytest.mark.parametrize("losses", [flat, synthetic])
@pytest.mark.parametrize("command", ["sweep", "compare", "demo"])
def test_every_command_says_so(
    command: str,
    losses: Any,
    supar_here: Supar,
    document_file: Path,
    proxy_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(runs, "validation_loss", lambda plan, folder: losses(plan))
    monkeypatch.setattr(search, "search", tune_nothing)
    arguments = {"sweep": ["study.yaml"], "compare": ["--seeds", "1"], "demo": ["--data", "text.txt"]}[command]
    called = supar_here(command, *arguments, *RUN, "-o", "out")
    has_power = losses is synthetic  # the negative control: there the optimum of SP moves
    found = result_of(called, 0 if has_power else 5)
    (power,) = [one for one in found["verdicts"] if one["what"] == "power"]
    assert power["passed"] is has_power and (WORDS in power["text"]) is not has_power
    (written,) = tmp_path.glob("out/result*.json")
    assert json.loads(written.read_text("utf-8"))["verdicts"] == found["verdicts"]
    assert (WORDS in " ".join(called.err.split())) is not has_power and (WORDS in report(["out"])) is not has_power
    # what decided before, the marks of what is measured, passes in both cases
    assert not [one for one in found["verdicts"] if one["passed"] is False and not one["control"] and one != power]


@pytest.mark.parametrize("moves", [True, False])
def test_a_demo_judges_what_it_shows(
    moves: bool, supar_here: Supar, proxy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SμPar's optimum moves as SP's does: re-using the dense value loses, and that is no success."""
    slopes = {**SLOPES, "supar": SLOPES["sp"]} if moves else SLOPES
    monkeypatch.setattr(runs, "validation_loss", lambda plan, folder: synthetic(plan, slopes))
    monkeypatch.setattr(search, "search", tune_nothing)
    found = result_of(supar_here("demo", "--data", "text.txt", *RUN, "-o", "out"), 5 if moves else 0)
    (subject,) = [one for one in found["verdicts"] if one["what"] == "SμPar: regret"]
    assert subject["passed"] is not moves and not subject["control"]
