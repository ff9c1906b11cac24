"""`supar demo`: the preset of a sweep that tunes its own proxy, on losses with known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from supar_cli.errors import InputError, UnusableResult
from supar_cli.experiments import search
from supar_cli.experiments import sweep as experiment
from supar_cli.jobs import runs
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Proxy, Spec

from .test_progress import Shown
from .test_sweep_study import DENSITIES, RUN, Supar, result_of
from .test_sweep_study import trained as trained


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search returns a spec's own values."""

    def search_nothing(spec: Spec, *_: Any, **__: Any) -> Proxy:
        sections = {name: getattr(spec, name) for name in ("model", "hyperparameters", "data", "train", "run")}
        return Proxy(kind="supar.proxy/v1", **sections)

    monkeypatch.setattr(search, "search", search_nothing)


def test_the_demo_sweeps_with_the_same_engine(
    supar_here: Supar, text_file: Path, trained: list[Plan], tmp_path: Path
) -> None:
    called = supar_here("demo", "--data", "text.txt", *RUN)
    result = result_of(called)
    rows = {(row["parameterization"], row["density"]): row for row in result["regrets"]}
    assert [rows["sp", density]["optimum_octaves"] for density in DENSITIES] == [0, 1, 3]  # at -0.3, 1.3, 2.9
    assert [rows["supar", density]["regret"] for density in DENSITIES] == [0, 0, 0]
    # the dense optimum lies at -0.3 octaves of the proxy's 2^-6, the sparsest's at 2.9
    assert rows["sp", 0.0625]["regret"] == pytest.approx(0.04 * (2.9**2 - 0.1**2))
    losses = {c["parameterization"]: c["losses"] for c in result["curves"] if c["density"] == 0.0625}
    assert list(losses["sp"]) == ["-2", "-1", "0", "1", "2", "3", "4"] and list(losses["supar"])[-1] == "2"
    files = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert files == ["lr_transfer.png", "proxy.yaml", "records.jsonl", "results.json"]
    assert "SP at density 1/16: best rate ÷ dense 2^" in called.err
    assert json.loads((tmp_path / "demo" / "results.json").read_text("utf-8")) == result
    count = len(trained)
    again = experiment.demo("text.txt", jobs=1, device="cpu", out=tmp_path / "demo")
    assert again["regrets"] == result["regrets"] and len(trained) == count  # the same runs, none made again


def test_one_bar_over_trials_and_runs(text_file: Path, trained: list[Plan], tmp_path: Path) -> None:
    """The search's trials and the sweep's runs are one count, whose total only grows as the axis is extended."""
    shown = Shown()
    experiment.demo(str(text_file), jobs=1, device="cpu", out=tmp_path / "demo", reporter=shown)
    counts = [(done, total) for done, total, _ in shown.calls]
    assert counts[0] == (6, 36) and counts[-1] == (6 + len(trained), 6 + len(trained))  # the search is a stand-in here
    assert counts == sorted(counts) and len(trained) > 30
    assert {work.bound for _, _, work in shown.calls} == {"at least "}


def test_without_an_optimum_it_ends_with_4(
    supar_here: Supar, text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loss(plan: Plan, folder: Path) -> float:
        raise UnusableResult("step 3: the loss is nan")

    monkeypatch.setattr(runs, "validation_loss", loss)
    called = supar_here("demo", "--data", "text.txt", *RUN)
    assert (called.status, called.out) == (4, "") and "sp at density 1: training diverged at every rate" in called.err
    assert not (tmp_path / "demo" / "results.json").exists()


def test_its_refusals_leave_nothing(text_file: Path, unchanged: Any, tmp_path: Path) -> None:
    unchanged()
    for asked in ({"data": "none.txt"}, {"data": str(text_file), "steps": 0}):
        with pytest.raises(InputError):
            experiment.demo(**asked, out=tmp_path / "demo")
