"""The share of clipped steps: counted in runs, kept with a proxy, and said where the two differ much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supar_cli.errors import InputError, Preempted
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.training import train as training
from supar_cli.training.distributed import ALONE
from supar_cli.training.train import CLIPPED_GAP, make_trainer
from supar_cli.training.trainer import Trainer
from tests.test_plan import plan

MakePlan = Callable[..., Plan]
TARGET = {"sparsity": {"density": 0.5}}


class Heard:
    """A reporter that keeps warnings."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def progress(self, step: int, steps: int, loss: float) -> None: ...

    def log(self, message: str) -> None: ...

    def warn(self, message: str) -> None:
        self.warned.append(message)


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]


def share_of(directory: Path) -> Any:
    return json.loads((directory / "result.json").read_text("utf-8"))["clipped_share"]


@pytest.fixture
def made(plan_of: MakePlan) -> Plan:
    """A plan that clips some of its steps: at the median of the norms that it has without clipping."""
    free = plan_of(train={"steps": 12, "grad_clip": 0.0}, run={"log_every": 1, "checkpoint_every": 4})
    trainer = Trainer(free)
    norms = sorted(trainer.step().grad_norm for _ in range(12))
    return free.model_copy(update={"train": free.train.model_copy(update={"grad_clip": norms[6]})})


class TestRuns:
    def test_the_share_is_that_of_norms_above_the_limit(self, made: Plan, tmp_path: Path) -> None:
        history = Trainer(made).run(tmp_path)
        norms = [record["grad_norm"] for record in records(tmp_path)]
        assert [record["clipped"] for record in records(tmp_path)] == [norm > made.train.grad_clip for norm in norms]
        assert 0 < share_of(tmp_path) == history.clipped_share == sum(history.clipped) / 12 < 1

    @pytest.mark.parametrize(("limit", "share"), [(0.0, 0.0), (1e-9, 1.0), (1e9, 0.0)])
    def test_all_or_none(self, made: Plan, limit: float, share: float) -> None:
        train = made.train.model_copy(update={"grad_clip": limit})
        assert Trainer(made.model_copy(update={"train": train})).run().clipped_share == share

    def test_a_continued_run_counts_the_steps_before(self, made: Plan, tmp_path: Path) -> None:
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        for folder in (whole, parts):
            folder.mkdir()
        Trainer(made).run(whole)
        stopped = Trainer(made)
        with pytest.raises(Preempted):
            stopped.run(parts, stop=lambda: "its time" if stopped.done == 7 else None)
        Trainer(made).run(parts, resume=True)
        assert share_of(parts) == share_of(whole)

    def test_steps_of_which_nothing_is_known_do_not_count(self, made: Plan, tmp_path: Path) -> None:
        """Records of earlier versions don't tell: counted as not clipped they would halve the share."""
        trainer = Trainer(made)
        with pytest.raises(Preempted):
            trainer.run(tmp_path, stop=lambda: "its time" if trainer.done == 6 else None)
        before = [{key: value for key, value in one.items() if key != "clipped"} for one in records(tmp_path)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in before))
        Trainer(made).run(tmp_path, resume=True)
        assert share_of(tmp_path) == sum(one["clipped"] for one in records(tmp_path)[6:]) / 6


class TestProxies:
    def test_a_plan_knows_its_proxys_share_which_no_hash_includes(self) -> None:
        own = plan(evidence={"clipped_share": 0.25}, target=TARGET)
        assert own.parameterization.base.clipped_share == 0.25
        text = document.write([own.model_dump()])
        assert "clipped_share: 0.25" in text and parse(Plan, document.read(text, "plan.yaml")[0]) == own
        base = own.parameterization.base.model_copy(update={"clipped_share": 0.5})
        rules = own.parameterization.model_copy(update={"base": base})
        assert own.model_copy(update={"parameterization": rules}).hash() == own.hash()

    def test_proxies_without_it_go_on(self) -> None:
        for evidence in ({}, {"trials": 350}, {"clipped_share": None}):
            made = plan(evidence=evidence, target=TARGET)
            assert made.parameterization.base.clipped_share is None and "clipped_share" not in document.write(
                [made.model_dump()]
            )

    @pytest.mark.parametrize("wrong", [-0.1, 1.5, "0.2", [0.2], True])
    def test_what_is_no_share_is_refused(self, wrong: Any) -> None:
        with pytest.raises(InputError, match=r"evidence\.clipped_share: should be "):
            plan(evidence={"clipped_share": wrong}, target=TARGET)


class TestWarning:
    def warned(self, made: Plan, directory: Path, proxy_share: float | None) -> list[str]:
        base = made.parameterization.base.model_copy(update={"clipped_share": proxy_share})
        rules = made.parameterization.model_copy(update={"base": base})
        heard = Heard()
        training.run(make_trainer(made.model_copy(update={"parameterization": rules}), heard, ALONE), directory)
        return [message for message in heard.warned if "clipped" in message]

    def test_a_share_far_from_the_proxys_is_said_once_with_a_remedy(self, made: Plan, tmp_path: Path) -> None:
        share = self.warned(made, tmp_path / "run", None) or share_of(tmp_path / "run")  # unknown: silent
        for far in (share - CLIPPED_GAP - 0.01, share + CLIPPED_GAP + 0.01):
            (message,) = self.warned(made, tmp_path / "run", far)  # the run is complete: its result is judged again
            assert f"{100 * share:.0f} % of the steps were clipped, but {100 * far:.0f} % of the proxy's" in message
            assert "; set train.grad_clip" in message
        for near in (share, share - CLIPPED_GAP + 0.01, share + CLIPPED_GAP - 0.01):
            assert self.warned(made, tmp_path / "run", near) == []

    def test_a_result_of_an_earlier_version_has_none(self, made: Plan, tmp_path: Path) -> None:
        self.warned(made, tmp_path / "run", None)
        result = json.loads((tmp_path / "run" / "result.json").read_text("utf-8"))
        del result["clipped_share"]
        (tmp_path / "run" / "result.json").write_text(json.dumps(result))
        assert self.warned(made, tmp_path / "run", 1.0) == []
