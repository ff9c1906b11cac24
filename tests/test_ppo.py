"""The agent under reinforcement learning, `supar init ppo.py`: its environments, advantages and rates, and that it learns."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import supar_cli as supar
from supar_cli import files
from supar_cli.cli.help import PAGES
from supar_cli.cli.sweep import read_study
from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.experiments.curves import grid_plans
from supar_cli.experiments.statistics import interquartile_mean
from supar_cli.planning import document
from supar_cli.planning.layout_document import Layout
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse, validate
from supar_cli.planning.spec import Proxy
from supar_cli.planning.sweep import Sweep

from .conftest import CHECKOUT, Called
from .test_readme import blocks

gymnasium = pytest.importorskip("gymnasium")
HYPER = {"init_std": None, "alpha_input": 1.0, "alpha_output": 1.0, "weight_decay": 0.0, "eps": 1e-5}
TRAIN = {"batch_size": 1024, "warmup_fraction": 0.0, "final_lr_fraction": 0.0, "betas": [0.9, 0.999], "grad_clip": 0.5}


def script(text: str | None = None) -> ModuleType:
    """ppo.py as a module, from another text where one is given."""
    path = files.template("own/ppo.py")
    spec = importlib.util.spec_from_file_location("ppo", str(path))
    assert spec is not None
    module = sys.modules["ppo"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    exec(compile(text or path.read_text("utf-8"), "ppo.py", "exec"), module.__dict__)
    return module


@pytest.fixture
def ppo() -> Iterator[ModuleType]:
    yield script()
    del sys.modules["ppo"]


def layout_of(ppo: ModuleType, width: int) -> Layout:
    sizes = {name: {"width": times * width} for times, name in enumerate(("base", "wider", "third"), 1)}
    return supar.layout(ppo.make, **sizes, example=ppo.example)


def plan_of(
    ppo: ModuleType, folder: Path, width: int = 16, density: str = "1/4", lr: float = 2**-7, **train: Any
) -> Plan:
    """A plan of the agent, its layout as supar reads it."""
    layout = layout_of(ppo, width)
    (folder / "layout.yaml").write_text(document.write([layout.model_dump()]))
    data = {
        "kind": "supar.proxy/v1",
        "model": {"family": "own", "layout": str(folder / "layout.yaml")},
        "hyperparameters": {"lr": lr, **HYPER},
        "train": {**TRAIN, "steps": 2, **train},
    }
    return supar.transfer(validate(Proxy, data, "proxy"), width=width, density=density, allow_low_wpn=True)


class Balance(nn.Module):
    """Environments of even numbers are balanced and drift, so that some episodes are cut off; the others fall soon."""

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        push = observations @ torch.tensor([0.25, 0.6, 0.6, 2.0]) * 1e3
        push[1::2] = 0
        return torch.stack([-push, push], -1)


class TestEnvironments:
    def replay(self, ppo: ModuleType, steps: int) -> tuple[Any, ...]:
        """What was played, and by transition what gymnasium's plain environment makes of the same state and action."""
        episodes = ppo.Episodes(seed=3)
        with torch.no_grad():
            played = episodes.play(Balance(), steps, 0, torch.Generator().manual_seed(0))
        observations, actions = played[0].numpy() / ppo.SCALES, played[1].numpy()
        plain = gymnasium.make("CartPole-v1").unwrapped
        plain.reset(seed=0)
        found = []
        for state, action in zip(observations[:-1].reshape(-1, 4), actions.ravel(), strict=True):
            plain.state, plain.steps_beyond_terminated = state.astype(np.float64), None
            after, reward, terminated, _, _ = plain.step(action)
            found.append((*after, reward, terminated))
        return episodes, played, np.array(found).reshape(*actions.shape, 6)

    def test_are_gymnasiums_plain_ones_and_finished_episodes_are_counted_once(self, ppo: ModuleType) -> None:
        steps = 1100
        episodes, played, plain = self.replay(ppo, steps)
        observations, _, rewards, terminated, ended, begun = (one.numpy() for one in played)
        observations /= ppo.SCALES
        same = np.abs(observations[1:] - plain[..., :4]).max(-1) < 1e-5
        assert same[~begun].all() and (rewards == 1)[~begun].all() and (rewards == 0)[begun].all()
        assert (np.abs(observations[1:][begun]) <= 0.05).all() and not same[begun].all()  # the control: a new episode

        returns, cut = [], 0
        lengths = np.zeros(ppo.ENVIRONMENTS, int)
        for step in range(steps):
            for place in range(ppo.ENVIRONMENTS):
                if begun[step, place]:
                    assert lengths[place] == 0 and not ended[step, place]
                    continue
                lengths[place] += 1
                has_fallen, is_last = bool(plain[step, place, 5]), lengths[place] == 500
                assert terminated[step, place] == has_fallen and ended[step, place] == (has_fallen or is_last)
                if has_fallen or is_last:
                    returns.append(lengths[place])
                    cut += is_last and not has_fallen
                    lengths[place] = 0
        assert [total for _, total in episodes.finished] == returns and lengths.any()  # and none that still runs
        assert cut >= 2 and min(returns) < 100 and len(returns) > 50

    def test_play_goes_on_where_it_stopped(self, ppo: ModuleType) -> None:
        whole, halves = ppo.Episodes(seed=3), ppo.Episodes(seed=3)
        draw = [torch.Generator().manual_seed(0) for _ in range(2)]
        with torch.no_grad():
            expected = whole.play(Balance(), 60, 0, draw[0])
            parts = [halves.play(Balance(), 30, at, draw[1]) for at in range(2)]
        assert all(
            torch.equal(torch.cat(two), one)
            for two, one in zip(list(zip(*parts, strict=True))[1:], expected[1:], strict=True)
        )
        assert {at for at, _ in halves.finished} == {0, 1}
        assert [total for _, total in halves.finished] == [total for _, total in whole.finished]


def advantages_by_sums(rewards: Any, values: Any, terminated: Any, ended: Any) -> np.ndarray:
    """By its definition, in float64: the errors to the episode's end, each a factor further; a place's own loop."""
    found = np.zeros(rewards.shape)
    for at, place in np.ndindex(found.shape):
        for step in range(at, len(rewards)):
            after = 0.0 if terminated[step, place] else values[step + 1, place]
            found[at, place] += (0.99 * 0.95) ** (step - at) * (
                rewards[step, place] + 0.99 * after - values[step, place]
            )
            if ended[step, place]:
                break
    return found


class TestAdvantages:
    def test_are_sums_to_the_end_and_a_cut_episode_is_worth_what_follows(self, ppo: ModuleType) -> None:
        draws = torch.Generator().manual_seed(0)
        ended = torch.rand(40, 8, generator=draws) < 0.15
        terminated = ended & (torch.rand(40, 8, generator=draws) < 0.5)
        rewards, values = torch.rand(40, 8, generator=draws), 10 * torch.randn(41, 8, generator=draws)
        expected = advantages_by_sums(rewards.numpy(), values.numpy(), terminated.numpy(), ended.numpy())
        faults = {
            "right": (terminated, ended),
            "cut as fallen": (ended, ended),
            "fallen as cut": (~ended & ended, ended),
        }
        faults["ends not seen"] = (terminated, terminated & ~terminated)
        errors = {
            name: np.abs(ppo.estimate_advantages(rewards, values, *ends).numpy() - expected).max()
            for name, ends in faults.items()
        }
        assert errors.pop("right") < 1e-4 and min(errors.values()) > 1, errors

    def test_a_step_that_only_begins_an_episode_is_not_learnt_from(self, ppo: ModuleType) -> None:
        agent, episodes = ppo.make(16), ppo.Episodes(seed=0)
        draws = torch.Generator().manual_seed(0)
        transitions = ppo.collect(agent, episodes, 100, 0, draws)
        ends = len(episodes.finished) - int(episodes.has_ended.sum())
        assert {len(one) for one in transitions} == {8 * 100 - ends} and ends > 20


RATE = "prepared.set_rate(rate_factor(plan, iteration) * plan.hyperparameters.lr)"
FIRST_GROUP = RATE.replace("prepared.set_rate(", 'optimizer.param_groups[0]["lr"] = (')


class TestRates:
    @pytest.mark.parametrize("has_first_group_only", [True, False])
    def test_annealing_the_first_group_alone_is_told_at_its_first_step(
        self, tmp_path: Path, has_first_group_only: bool
    ) -> None:
        text = files.template("own/ppo.py").read_text("utf-8")
        assert text.count(RATE) == 1
        ppo = script(text.replace(RATE, FIRST_GROUP) if has_first_group_only else text)
        plan = plan_of(ppo, tmp_path, batch_size=64)
        if has_first_group_only:
            with pytest.raises(InputError, match=r"only the first group was changed; write prepared\.set_rate\(lr\)"):
                ppo.train(plan)
        else:
            ppo.train(plan)


class TestRuns:
    def test_reports_finished_episodes_of_the_end_alone(
        self, ppo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = plan_of(ppo, tmp_path, steps=60)
        (tmp_path / "plan.yaml").write_text(document.write([plan.model_dump()]))
        monkeypatch.setenv("SUPAR_RESULT", str(tmp_path / "result.jsonl"))
        monkeypatch.setattr(ppo, "train", lambda _: [(0, 500.0), (53, 400.0), (54, 30.0), (59, 10.0)])
        ppo.main(tmp_path / "plan.yaml")
        assert json.loads((tmp_path / "result.jsonl").read_text()) == {"loss": -20.0, "step": 60}

    def test_without_a_finished_episode_nothing_is_reported(
        self, ppo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = plan_of(ppo, tmp_path, steps=1, batch_size=32)  # four steps of each environment: no pole falls
        (tmp_path / "plan.yaml").write_text(document.write([plan.model_dump()]))
        monkeypatch.setenv("SUPAR_RESULT", str(tmp_path / "result.jsonl"))
        with pytest.raises(SystemExit, match=r"no episode finished .* expected a larger train\.steps"):
            ppo.main(tmp_path / "plan.yaml")
        assert not (tmp_path / "result.jsonl").exists()

    def test_one_that_diverges_reports_nan_and_half_a_batch_is_refused(
        self, ppo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "plan.yaml").write_text(document.write([plan_of(ppo, tmp_path, lr=2.0**20).model_dump()]))
        monkeypatch.setenv("SUPAR_RESULT", str(tmp_path / "result.jsonl"))
        ppo.main(tmp_path / "plan.yaml")
        assert json.loads((tmp_path / "result.jsonl").read_text())["loss"] is None
        with pytest.raises(SystemExit, match=r"train\.batch_size: 1001; expected a multiple of 8"):
            ppo.train(plan_of(ppo, tmp_path, batch_size=1001))

    def test_a_sparse_agent_learns_and_one_without_a_rate_does_not(self, ppo: ModuleType, tmp_path: Path) -> None:
        """An agent that does not learn has 22 on average, and never 60 over an iteration's 40 episodes."""
        means = {}
        for lr in (2**-7, 2**-40):
            plan = plan_of(ppo, tmp_path, width=32, lr=lr, steps=8)
            means[lr] = np.mean([total for iteration, total in ppo.train(plan) if iteration >= 6])
        assert means[2**-7] > 80 and means[2**-40] < 40, means


def test_the_layout_has_two_heads_and_sparse_weights_between(ppo: ModuleType) -> None:
    found = {row.name: row for row in layout_of(ppo, 16).tensors}
    roles = {name: row.role for name, row in found.items() if name.endswith("weight")}
    of_one = dict(zip((0, 2, 4, 6), ("embedding", "hidden", "hidden", "unembedding"), strict=True))
    assert roles == {f"{part}.{at}.weight": role for part in ("actor", "critic") for at, role in of_one.items()}
    assert {row.role for name, row in found.items() if name not in roles} == {"bias"}
    actor, critic = (found[f"{part}.6.weight"].own.std for part in ("actor", "critic"))
    assert 50 < critic / actor < 200  # the actor's starts at a hundredth


def test_the_page_leads_from_a_dense_agent_to_a_sparse_one(
    supar_here: Callable[..., Called], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands as written, the search but for one trial of two iterations."""
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))  # of the trial's process
    few = {"search.finalists": 1, "search.seeds": 1, "search.lr_fit_octaves": [], "train.steps": 2}
    few["run.command"] = f"{sys.executable} ppo.py {{plan}}"
    shorter = ["--trials", "1", *(word for key, value in few.items() for word in ("-s", f"{key}={value}"))]
    shown = dict(reversed(blocks(PAGES / "rl.md")))  # the first block of each language
    (tmp_path / "agent.yaml").write_text(shown["yaml"])
    for line in shown["console"].replace("\\\n", " ").splitlines()[1:]:
        program, *words = shlex.split(line)
        if program == "supar":
            called = supar_here(*words, *(shorter if words[0] == "tune-proxy" else []))
            assert called.status == 0, called.err
        else:
            script((tmp_path / words[0]).read_text()).main(words[1])
    plan = supar.load("plan.yaml")
    assert {row.density for row in plan.tensors if row.role == "hidden"} == {1 / 8} and plan.train.grad_clip == 0.5
    (finalist,) = supar.load("proxy.yaml").evidence["finalists"]
    assert finalist["mean"] < -8  # the return of a pole that falls at once is 8
    monkeypatch.delitem(sys.modules, "ppo")


COLUMNS = (("SμPar", 1.0), ("SμPar", 1 / 8), ("SP", 1 / 8), ("SP, sparse-aware init", 1 / 8))  # the first is dense


class TestRecords:
    """The page's figures are those of the committed records: interquartile means, and standard errors by 2000 resamples."""

    records = files.read_jsonl(CHECKOUT / "tests/evidence/ppo_records.jsonl", "run")

    def row(self, octave: float, seeds: range) -> str:
        """The row of the page's table for a rate and seeds."""
        cells = []
        for column in COLUMNS:
            of = [one for one in self.records if (one["arm"], one["density"]) == column and one["seed"] in seeds]
            returns = np.array([-one["loss"] for one in of if abs(np.log2(one["lr"]) - octave) < 0.01])
            draws = np.random.default_rng(0).integers(len(seeds), size=(2000, len(seeds)))
            error = interquartile_mean(returns[draws], axis=1).std() if len(returns) else 0
            cells.append(f"{interquartile_mean(returns):.0f} ± {error:.0f}" if len(returns) else "–")
        return f"| 2^{octave} | {seeds[0]}–{seeds[-1]} | {' | '.join(cells)} |"

    def test_the_page_says_what_was_measured(self) -> None:
        page = (PAGES / "rl.md").read_text("utf-8")
        shown = [self.row(octave, range(11, 21)) for octave in range(-8, -4)]
        shown += [self.row(-6, range(21, 51)), self.row(-6.35, range(61, 81))]
        assert [row for row in shown if row not in page] == []
        assert self.row(-6, range(21, 50)) not in page  # the control: a seed less

    def test_the_preset_goes_on_from_them(self) -> None:
        study = parse(Sweep, read_study(None, {}, preset="ppo")).beside(str(files.template("own/study.yaml")))
        known = {one["run"] for one in self.records}
        for seed, is_known in ((study.train.seed, True), (study.train.seed - 1, False)):
            first = {"train": study.train.model_copy(update={"seed": seed}), "seeds": 1}
            plans = grid_plans(corpus.with_hash(study.model_copy(update=first), lambda _: None))
            assert {plan.hash() in known for plan in plans} == {is_known} and len(plans) == 3 * 2 * 4
