"""What does not transfer is said, once each, with a remedy that helps: by `supar transfer`, and in Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import supar_cli
from supar_cli.data.corpus import identify
from supar_cli.planning import advice
from supar_cli.planning.plan import Plan
from tests.conftest import PROXY, Called, real_text
from tests.test_plan import GPT2, LLAMA, TRAIN, TUNED, plan, proxy

Supar = Callable[..., Called]

# how each message begins
DEPTH, CONTEXT, BATCH, STEPS = "layers: ", "context: ", "a batch has ", "steps: "
BASE = {"layers": GPT2["layers"], "context": GPT2["context"], **TRAIN}

targets = st.fixed_dictionaries(
    {
        "layers": st.sampled_from([2, 3, 16]),
        "context": st.sampled_from([64, 32, 96, 128]),
        "batch_size": st.sampled_from([16, 8, 32, 5]),
        "steps": st.sampled_from([400, 399, 4000]),
    }
)
others = st.fixed_dictionaries(
    {
        "width": st.sampled_from([128, 256]),
        "density": st.sampled_from([1.0, 0.5]),
        "rule": st.sampled_from(["none", "completep"]),
    }
)


def expected(target: dict[str, Any], depth_rule: str) -> list[str]:
    """The messages' beginnings, from SPEC §12: depth without a depth rule, context, tokens a step, length."""
    tokens = target["context"] * target["batch_size"], BASE["context"] * BASE["batch_size"]
    changed = {
        DEPTH: target["layers"] != BASE["layers"] and depth_rule == "none",
        CONTEXT: target["context"] != BASE["context"],
        BATCH: tokens[0] != tokens[1],
        STEPS: target["steps"] != BASE["steps"],
    }
    return [word for word, is_said in changed.items() if is_said]


def planned(target: dict[str, Any], other: dict[str, Any]) -> Plan:
    sparsity = {"density": other["density"]}
    model = {"parameterization": {"depth_rule": other["rule"]}, "hyperparameters": {**TUNED, "weight_decay": 0.0}}
    return plan(target={**target, "width": other["width"], "sparsity": sparsity}, **model)


def said(messages: list[str]) -> list[str]:
    return [word for message in messages for word in (DEPTH, CONTEXT, BATCH, STEPS) if message.startswith(word)]


class TestCombinations:
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(targets, others)
    def test_each_change_is_said_once_and_nothing_else(self, target: dict[str, Any], other: dict[str, Any]) -> None:
        messages = advice.warnings(planned(target, other))
        assert said(messages) == expected(target, other["rule"])
        assert len(messages) == len(said(messages)) and all("; " in message for message in messages)

    def test_a_batch_counted_in_sequences_is_found(self) -> None:
        """The control: the rule of before compared sequences, and said nothing of depth, context and length."""
        own = {"width": 128, "density": 0.5, "rule": "none"}
        for context, batch_size in ((128, 16), (128, 8)):
            made = planned({**BASE, "context": context, "batch_size": batch_size}, own)
            before = [BATCH] if made.train.batch_size != made.parameterization.base.batch_size else []
            assert before != [word for word in said(advice.warnings(made)) if word == BATCH]

    def test_the_same_proxy_again_is_silent(self) -> None:
        assert advice.warnings(plan(target={"sparsity": {"density": 0.5}})) == []

    @pytest.mark.parametrize("model", [GPT2, LLAMA])
    def test_the_remedies_help(self, model: dict[str, Any]) -> None:
        (message,) = advice.warnings(
            plan(model=model, target={"context": 64, "batch_size": 64, "sparsity": {"density": 0.5}})
        )
        rows = int(message.partition("`--batch-size ")[2].partition("`")[0])
        assert advice.warnings(plan(model=model, target={"batch_size": rows, "sparsity": {"density": 0.5}})) == []
        deep = {"layers": 16, "sparsity": {"density": 0.5}}
        (message,) = advice.warnings(plan(model=model, target=deep))
        key, _, value = message.partition("`-s parameterization.")[2].partition("`")[0].partition("=")
        made = proxy(model=model, parameterization={key: value})
        assert advice.warnings(plan(model=model, parameterization={key: value}, target=deep)) == []
        assert (
            made.model == proxy(model=model).model
        )  # the proxy is what it was: at its own depth the rule changes nothing

    def test_of_length_the_decays_timescale_is_named(self) -> None:
        # 1/(η·λ) = 640 steps
        for steps, words in ((600, ", or only roughly within"), (700, " beyond")):
            (message,) = advice.warnings(plan(target={"steps": steps, "sparsity": {"density": 0.5}}))
            assert f"not over length{words} weight decay's timescale of 640 steps" in message


class TestSaid:
    """`supar transfer` and Python say the same."""

    CHANGES = ("--layers", "4", "--context", "8", "--batch-size", "4", "--steps", "24")

    @pytest.fixture(autouse=True)
    def files(self, tmp_path: Path) -> None:
        (tmp_path / "proxy.yaml").write_text(PROXY)
        (tmp_path / "text.txt").write_bytes(real_text(24_000))

    @staticmethod
    def warned(called: Called) -> list[str]:
        assert called.status == 0, called.err
        text = " ".join(called.err.split())
        return [part.strip() for part in text.split("warning: ")[1:]]

    def test_on_the_command_line_once_for_all_plans(self, supar_here: Supar) -> None:
        found = self.warned(supar_here("transfer", "--sparsity", "0,0.1,0.2", *self.CHANGES, "-q"))
        assert said(found) == [DEPTH, CONTEXT, BATCH, STEPS]
        assert said(self.warned(supar_here("transfer", "--sparsity", "0.5", "-q", "-f"))) == []

    def test_in_python(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        tuned: Any = supar_cli.load("proxy.yaml")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            supar_cli.transfer(tuned, sparsity=0.5, layers=4, context=8, batch_size=4, steps=24)
        assert said([str(one.message) for one in found]) == [DEPTH, CONTEXT, BATCH, STEPS]
        assert {one.filename for one in found} == {__file__}  # of the caller's line
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            supar_cli.transfer(tuned, sparsity=0.5)

    def test_the_papers_proxy_is_not_as_deep_as_its_target(self, supar_here: Supar) -> None:
        found = self.warned(supar_here("transfer", "--from-paper", "--dry-run", "-q"))
        assert sum(message.startswith("layers: 10, but 24 in the proxy") for message in found) == 1

    def test_other_data_than_the_proxys(self, supar_here: Supar, tmp_path: Path) -> None:
        """Where the proxy names its data's hash; the same data elsewhere are the same data."""
        (tmp_path / "moved").mkdir()
        (tmp_path / "moved" / "text.txt").write_bytes(real_text(24_000))
        (tmp_path / "other.txt").write_bytes(real_text(23_000))
        begins = "data: not the proxy's, or read in another way"

        def of_data(source: str) -> list[bool]:
            found = self.warned(supar_here("transfer", "--sparsity", "0.5", "--data", source, "-q", "-f"))
            return [message.startswith(begins) for message in found]

        assert of_data("other.txt") == []  # not recorded
        recorded = identify(supar_cli.load(str(tmp_path / "proxy.yaml")).data).hash
        (tmp_path / "proxy.yaml").write_text(PROXY.replace("source: text.txt", f"source: text.txt\n  hash: {recorded}"))
        assert of_data("other.txt") == [True]
        assert of_data("moved/text.txt") == of_data("text.txt") == []
