"""The Python API: exact literals, what a change drops, the command line's words for what is wrong, and a whole path."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import supar_cli
from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.density import literal, share
from supar_cli.planning.kinds import parse_any
from supar_cli.planning.plan import Plan
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.spec import Proxy, Spec, Target, override
from supar_cli.planning.sweep import Sweep

from .conftest import proxy_fields
from .test_cli import Supar


def proxy_of(source: Path, **changes: dict[str, Any]) -> Proxy:
    made = parse_any(document.Document(proxy_fields(str(source), **changes), "proxy.yaml"))
    assert isinstance(made, Proxy)
    return made


class TestLiterals:
    @pytest.mark.parametrize(
        ("text", "exact"), [("1/3", Fraction(1, 3)), ("1/128", Fraction(1, 128)), ("0.008", Fraction(8, 1000))]
    )
    def test_a_number_is_what_was_written(self, text: str, exact: Fraction) -> None:
        assert literal(text) == exact == literal(share(text))

    @settings(max_examples=100, deadline=None)
    @given(st.integers(1, 999), st.integers(1, 999))
    def test_a_fraction_stays_one(self, above: int, below: int) -> None:
        text = f"{above}/{below}"
        assert share(text) == text and literal(text) == Fraction(above, below)

    @pytest.mark.parametrize("text", ["half", "1/0", "1/2/3", "nan", "inf", "1e999999999", "", "1/inf"])
    def test_what_is_no_number_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"is not|divides by zero"):
            literal(text)

    def test_from_python_flag_and_document_it_is_the_same(
        self, supar_here: Supar, tmp_path: Path, text_file: Path
    ) -> None:
        """A width of 96 has 9216 weights a square tensor: a third of them is a whole number, which no float's share is."""
        fields = proxy_fields(str(text_file), target={"width": 96, "sparsity": {"density": "1/3"}})
        (tmp_path / "proxy.yaml").write_text(document.write([fields]))
        of_document = supar_here("transfer", "-o", "-", "-q")
        of_flag = supar_here("transfer", "--density", "1/3", "-o", "-", "-q")
        assert of_document.status == 0 and of_document.out == of_flag.out
        made = supar_cli.transfer(proxy_of(text_file), width=96, density="1/3")
        assert document.write([made.model_dump()])[200:] == of_flag.out[200:]
        assert next(row.kept for row in made.tensors if row.name == "blocks.0.attn.q") == 3072
        exact = supar_cli.transfer(proxy_of(text_file), width=96, sparsity="2/3")
        assert exact.sparsity == made.sparsity and exact.tensors == made.tensors

    def test_a_rounded_sixth_keeps_another_number(self, text_file: Path) -> None:
        """The control: 27² · 1/6 is 121.5, which rounds up; a float's sixth lies below."""
        kept = []
        for density in ("1/6", 1 / 6):
            made = supar_cli.transfer(proxy_of(text_file), width=27, heads=1, density=density)
            kept.append(next(row.kept for row in made.tensors if row.name == "blocks.0.attn.q"))
        assert kept == [122, 121]


class TestOverride:
    @pytest.mark.parametrize(
        ("before", "changes", "after"),
        [
            ({"heads": 4, "ffn_width": 9}, {"width": 8}, {"width": 8, "heads": None, "ffn_width": None}),
            ({"heads": 4}, {"width": 8, "heads": 2}, {"width": 8, "heads": 2}),
            ({"heads": 4}, {"width": None, "layers": 3}, {"heads": 4, "layers": 3}),
            ({"tokens": 9}, {"steps": 2}, {"tokens": None, "steps": 2}),
            ({"sparsity": 0.5}, {"density": "1/4"}, {"sparsity": None, "density": "1/4"}),
            ({"pattern": "block", "block": 16}, {"pattern": "exact"}, {"pattern": "exact", "block": None}),
            ({"pattern": "block", "block": 16}, {"pattern": "block"}, {"pattern": "block", "block": 16}),
            ({"source": "a", "hash": "b"}, {"source": "c"}, {"source": "c", "hash": None}),
        ],
    )
    def test_one_rule_says_what_a_change_drops(
        self, before: dict[str, Any], changes: dict[str, Any], after: dict[str, Any]
    ) -> None:
        assert override(before, changes) == after

    def test_of_a_target_and_its_sparsity(self) -> None:
        target = Target.model_validate({"width": 64, "heads": 4, "steps": 9, "sparsity": {"sparsity": 0.5}})
        changed = target.override(width=128, tokens=1000, density="1/8")
        assert (changed.width, changed.heads, changed.steps, changed.tokens) == (128, None, None, 1000)
        assert (changed.sparsity.density, changed.sparsity.sparsity) == ("1/8", None)
        assert target.override() == target


class TestWords:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"widht": 64}, r"^widht: unknown key 'widht'; did you mean 'width'\?$"),
            (
                {"density": "half"},
                r"^density: 'half' is not a number; expected a number such as 0.992, 99.2% or 1/128",
            ),
            ({"density": 2.0}, r"^density: 2\.0; expected 0 < density <= 1; did you mean 0\.02\?$"),
            (
                {"density": 0.5, "sparsity": 0.5},
                r"^density: sparsity is given too; expected only one",
            ),
            ({"width": "wide"}, r"^width: should be a valid integer, not 'wide'$"),
            ({"width": 100}, r"^width: 100 is not a multiple of the proxy's head width"),
        ],
    )
    def test_are_the_command_lines(self, text_file: Path, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=words) as caught:
            supar_cli.transfer(proxy_of(text_file), **changes)
        assert "pydantic" not in str(caught.value)

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (
                lambda p: supar_cli.transfer(p, density=0.5, parameterization="foo"),
                "^parameterization: 'foo'; expected one of",
            ),
            (lambda p: supar_cli.check(p, parameterization="foo"), "^parameterization: 'foo'; expected one of"),
            (lambda p: supar_cli.check(p, density=["1/0"]), "^density: '1/0' divides by zero"),
            (lambda p: supar_cli.check(p, density=["x", 1]), "^density: 'x' is not a number"),
            (lambda p: supar_cli.check(p, density=[2]), "^density: 2; expected 0 < density <= 1"),
            (lambda p: supar_cli.check(p, width=[0]), "^width: 0; expected a whole number above 0"),
            (lambda p: supar_cli.check(p, steps=0), "^steps: 0; expected a whole number above 0"),
            (lambda p: supar_cli.check(supar_cli.transfer(p), width=[3]), "^a plan is checked as written"),
            (lambda p: supar_cli.explain(p), "^Proxy: expected a Plan$"),
            (lambda p: supar_cli.train(p, "x"), "^Proxy: expected a Plan$"),
            (lambda p: supar_cli.tune(p), "^Proxy: expected a Spec$"),
            (lambda p: supar_cli.sweep(p), "^Proxy: expected a Sweep$"),
        ],
    )
    def test_no_function_lets_pydantics_through(self, text_file: Path, call: Any, words: str) -> None:
        with pytest.raises(InputError, match=words):
            call(proxy_of(text_file))

    @pytest.mark.parametrize("density", [[1], True, None, {"a": 1}])
    def test_a_share_of_another_type_is_told_what_it_may_be(self, text_file: Path, density: Any) -> None:
        fields = proxy_fields(str(text_file), target={"sparsity": {"density": 0.5, "overrides": {"mlp": density}}})
        with pytest.raises(InputError, match=r"overrides\.mlp.*: should be a number or a fraction such as 1/128"):
            parse_any(document.Document(fields, "proxy.yaml"))

    @pytest.mark.parametrize("kind", [["x"], {}, None, 3])
    def test_a_kind_that_is_no_text_is_refused_by_every_command(
        self, supar_here: Supar, tmp_path: Path, kind: Any
    ) -> None:
        (tmp_path / "k.yaml").write_text(document.write([{"kind": kind}]), "utf-8")
        for command in ("explain", "train", "transfer", "report", "check", "sweep", "tune-proxy"):
            called = supar_here(command, "k.yaml")
            assert called.status == 2 and "kind" in called.err, (command, called.err)

    def test_a_kind_that_is_none_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text("kind: supar.plan/v0\n")
        with pytest.raises(
            InputError, match=r"x\.yaml:1: kind: is 'supar\.plan/v0' \(.*\); expected one of .*supar\.plan/v2"
        ):
            supar_cli.load(tmp_path / "x.yaml")


TYPES = {"Proxy": Proxy, "Plan": Plan, "ParameterizationName": ParameterizationName, "Tensor": Any}


@pytest.mark.parametrize("name", sorted(set(supar_cli.__all__) - {"__version__"}))
def test_every_public_function_is_typed_and_says_what_it_raises(name: str) -> None:
    function = getattr(supar_cli, name)
    own = vars(sys.modules[function.__module__])
    called = function.__init__ if isinstance(function, type) else function
    assert "return" in get_type_hints(called, {**TYPES, **own})
    assert "Raises" in function.__doc__


def test_a_whole_path(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small: dict[str, Any] = {"width": 16, "layers": 1}
    train = {"steps": 2, "eval_every": 2, "eval_batches": 1}
    fields = proxy_fields(str(text_file), model=small, train=train, target={"width": 32})
    spec = {**fields, "kind": "supar.spec/v1", "search": {"trials": 1, "finalists": 1, "seeds": 1, "lr": [0.005, 0.02]}}
    spec["search"]["lr_fit_octaves"] = []
    wanted = parse_any(document.Document(spec, "spec.yaml"))
    assert isinstance(wanted, Spec)
    proxy = supar_cli.tune(wanted)
    assert proxy.evidence["trials"]["complete"] == 1 and Path("proxy.journal").exists()

    plan = supar_cli.transfer(proxy, sparsity=0.75, width=32)
    assert supar_cli.train(plan, "run")["steps"] == 2
    assert supar_cli.explain(plan, "mlp.up").rows[0].tensor.name == "blocks.0.mlp.up"
    with pytest.raises(InputError, match="did you mean"):
        supar_cli.explain(plan, "mlp.upp")

    checked = supar_cli.check(proxy, width=[16, 32], density=[1, "1/4"], seeds=1, max_seeds=1, steps=1, jobs=1)
    assert checked["kind"] == "supar.check-result/v1" and {v["control"] for v in checked["verdicts"]} == {True, False}
    study = {**proxy_fields(str(text_file), model=small, train=train), "kind": "supar.sweep/v1", "seeds": 1, "widen": 0}
    study |= {"over": {"lr": "x:0..0/1", "density": [1, "1/4"]}, "parameterizations": ["supar"], "name": "one"}
    asked = parse_any(document.Document(study, "sweep.yaml"))
    assert isinstance(asked, Sweep)
    assert len(supar_cli.sweep(asked, jobs=1)["arms"]) == 1
    assert [level["density"] for level in supar_cli.compare(asked, jobs=1)["levels"]] == [1.0, 0.25]
    page = supar_cli.report(["run", "check", "sweeps/one", "compare/one"], "page.html")
    assert Path("page.html").read_text("utf-8") == page and os.path.getsize("page.html") > 10_000
