"""Strict YAML: what is read, what is refused with which line, and that what is written reads back the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy


def read(text: str) -> Any:
    found = document.read(text, "f.yaml")
    assert len(found) == 1
    return found[0].data


def refused(text: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        document.read(text, "f.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # YAML 1.1 as PyYAML reads it: text
        ("1.5E+3", 1500.0),
        ("+.5", 0.5),
        ("5.", 5.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("0o17", 15),
        ("0x1F", 31),
        ("010", 10),  # YAML 1.1: 8
        ("-07", -7),
        ("09", 9),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("Null", None),
        ("", None),
        ("off", "off"),  # YAML 1.1: False
        ("yes", "yes"),
        ("No", "No"),
        ("tRUE", "tRUE"),
        ("1_000", "1_000"),  # YAML 1.1: 1000
        ("0b11", "0b11"),  # YAML 1.1: 3
        ("1:30", "1:30"),  # YAML 1.1: 90
        ("2026-01-31", "2026-01-31"),  # YAML 1.1: a date
        ("1.2.3", "1.2.3"),
        ("1e", "1e"),
        ("<<", "<<"),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
    ],
)
def test_scalars_are_yaml_1_2_core(text: str, value: Any) -> None:
    found = read(f"key: {text}")["key"]
    assert (type(found), found) == (type(value), value)


def test_nan_is_read() -> None:
    assert math.isnan(read("key: .NaN")["key"])


def test_a_duplicate_key_is_named_with_both_lines() -> None:
    assert refused("a: 1\nb:\n  lr: 1\n  std: 2\n  lr: 3\n") == [
        "f.yaml:5: b.lr: the key 'lr' appears twice; first on line 3"
    ]


def test_every_duplicate_of_a_document_is_reported() -> None:
    problems = refused("a: 1\na: 2\nrows:\n- {x: 1, x: 2}\n- {y: 1}\n- {y: 1, y: 2}\n")
    assert [line.partition(": ")[0] for line in problems] == ["f.yaml:2", "f.yaml:4", "f.yaml:6"]
    assert "rows[2].y" in problems[2]


def test_equal_keys_of_different_mappings_are_no_duplicates() -> None:
    assert read("a: {x: 1}\nb: {x: 2}\n") == {"a": {"x": 1}, "b": {"x": 2}}


def test_an_alias_is_refused_where_it_stands() -> None:
    (problem,) = refused("a: &same [1, 2]\nb: 0\nc: *same\n")
    assert problem.startswith("f.yaml:") and "alias" in problem and ": c: " in problem


def test_an_alias_bomb_ends_at_once() -> None:
    levels = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    assert len(refused("\n".join(levels))) == 118  # each of 59 · 2 aliases once; expanded they were 2^60 values


@pytest.mark.parametrize("text", ["[a, b]: 1\nok: 2\n", "? {a: 1}\n: 2\n"])
def test_a_key_that_is_not_text_is_refused(text: str) -> None:
    (problem,) = refused(text)
    assert problem == "f.yaml:1: a key must be text"


@pytest.mark.parametrize("text", ["a: !!binary aGk=\n", "a: !!int x\n", "a: !!timestamp 2026-01-01\n"])
def test_a_tag_that_supar_does_not_read_is_refused(text: str) -> None:
    (problem,) = refused(text)
    assert problem.startswith("f.yaml:1: a: ")


def test_several_documents_each_know_their_lines() -> None:
    found = document.read("a: 1\n---\nb:\n  c: 2\n---\nd: 3\n", "f.yaml")
    assert [one.data for one in found] == [{"a": 1}, {"b": {"c": 2}}, {"d": 3}]
    assert found[1].line(("b", "c")) == 4
    assert found[1].line(("b", "c", "unknown", 3)) == 4
    assert found[2].line(("x",)) == 6


def test_paths_are_dotted() -> None:
    assert document.dotted(("tensors", 3, "lr")) == "tensors[3].lr"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3),
        ("a: 1\nb: {x: 1,", 3),
        ("a: 'never closed\n", None),
        ("a: 1\n\tb: 2\n", 2),
        ("a: b: c\n", 1),
    ],
)
def test_text_that_is_no_yaml_is_named_with_its_line(text: str, line: int | None) -> None:
    (problem,) = refused(text)
    assert "not valid YAML" in problem
    assert problem.startswith("f.yaml:" if line is None else f"f.yaml:{line}: ")


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x7f"])
def test_characters_that_yaml_forbids_are_refused_with_their_line(character: str) -> None:
    (problem,) = refused(f"é: é\nb: x{character}y\nc: 1\n")
    assert problem == "f.yaml:2: not valid YAML: control characters are not allowed"


def test_half_a_surrogate_pair_is_refused() -> None:
    assert "not valid YAML" in refused("a: \ud800\n")[0]


@pytest.mark.parametrize("depth", [101, 1_000, 200_000])
def test_deep_nesting_is_refused_before_it_can_crash(depth: int) -> None:
    assert refused("ok: 1\ndeep: " + "[" * depth) == ["f.yaml:2: nested too deeply"]
    assert refused("{a: " * depth)[0].endswith("nested too deeply")


def test_nesting_of_real_documents_is_far_from_the_limit() -> None:
    text = "[" * 60 + "]" * 60
    assert document.write([read(text)]).strip() == text


class TestFile:
    def test_not_utf8_names_the_line(self, tmp_path: Path) -> None:
        path = tmp_path / "f.yaml"
        path.write_bytes(b"a: 1\nb: 2\nc: \xff\xfe\n")
        with pytest.raises(InputError, match=r"f\.yaml:3: not UTF-8 text"):
            document.read_file(str(path))

    def test_missing_folder_or_empty(self, tmp_path: Path) -> None:
        (tmp_path / "empty.yaml").write_text("# nothing but a comment\n")
        for name, what in (("none.yaml", "No such file"), (".", "directory"), ("empty.yaml", "document is empty")):
            with pytest.raises(InputError, match=what):
                document.read_file(str(tmp_path / name))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@example([{"": [{"\n": None, " ": "\x85", "\r": "a\nb"}]}])
@given(st.lists(st.dictionaries(st.text(), plain, max_size=4), min_size=1, max_size=3))
def test_what_is_written_reads_back_the_same_in_both_yaml_versions(documents: list[Any]) -> None:
    text = document.write(documents)
    # repr tells 1 from 1.0 from True, and keeps the order of keys
    assert repr([one.data for one in document.read(text, "f")]) == repr(documents)
    assert repr(list(yaml.safe_load_all(text))) == repr(documents)


@pytest.mark.parametrize(
    "word", ["off", "yes", "1e-3", "0o17", "010", "1_000", "1:30", "~", "", "2026-01-31", "=", "<<"]
)
def test_text_that_looks_like_something_else_is_quoted(word: str) -> None:
    text = document.write([{"key": word, word: "value"}])
    assert read(text) == yaml.safe_load(text) == {"key": word, word: "value"}


@pytest.mark.parametrize("word", ["off", "a b: c", "1e-3", "~"])
def test_a_key_of_many_plain_rows_is_quoted_too(word: str) -> None:
    text = document.write([{word: [{"name": "a"}] * 9}])
    assert read(text) == yaml.safe_load(text) == {word: [{"name": "a"}] * 9}


@pytest.mark.parametrize(
    ("value", "written"), [(1e-8, "1.0e-08"), (1e22, "1.0e+22"), (1.5e-7, "1.5e-07"), (0.1, "0.1"), (math.inf, ".inf")]
)
def test_floats_are_written_so_that_both_versions_read_a_number(value: float, written: str) -> None:
    text = document.write([{"key": value}])
    assert text == f"key: {written}\n"
    assert yaml.safe_load(text)["key"] == read(text)["key"] == value


def test_a_list_of_mappings_takes_one_line_per_item_however_long() -> None:
    rows = [{"name": "n" * 300, "shape": [1, 2], "because": {"m_d": 1.0}}, {"name": "b"}]
    text = document.write([{"rows": rows, "after": []}])
    assert text.splitlines() == [
        "rows:",
        f"- {{name: {'n' * 300}, shape: [1, 2], because: {{m_d: 1.0}}}}",
        "- {name: b}",
        "after: []",
    ]


class TestHash:
    def test_a_literal(self) -> None:
        # SHA-256 of the nine bytes {"a":[1]}, by coreutils
        assert (
            document.content_hash({"a": [1]})
            == "sha256:ff5464c34287e9ec505b9f76573a4cb0bd408c96c6537b458fdd993fc7c615ce"
        )

    @given(st.dictionaries(st.text(), plain, min_size=2, max_size=5))
    @settings(max_examples=50, deadline=None)
    def test_the_order_of_keys_plays_no_part(self, data: dict[str, Any]) -> None:
        try:
            one = document.content_hash(data)
        except ValueError:  # infinities have no canonical JSON
            return
        assert document.content_hash(dict(reversed(data.items()))) == one

    def test_values_types_and_the_order_of_lists_do(self) -> None:
        variants: list[Any] = [{"a": [1, 2]}, {"a": [2, 1]}, {"a": [1, 2.5]}, {"a": ["1", 2]}, {"b": [1, 2]}]
        assert len({document.content_hash(one) for one in variants}) == len(variants)

    def test_a_number_that_is_not_finite_has_none(self) -> None:
        with pytest.raises(ValueError, match="JSON"):
            document.content_hash({"a": math.inf})


GOOD = """kind: supar.proxy/v1
model: {family: gpt2, width: 64, layers: 2, heads: 2, context: 16, vocab: 256}
hyperparameters:
  lr: 0.01
  init_std: 0.08
  alpha_input: 1
  alpha_output: 1
  weight_decay: 0
train:
  steps: 10
  batch_size: 4
"""


def problems_of(text: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse(Proxy, document.read(text, "f.yaml")[0])
    return str(caught.value).splitlines()


class TestProblems:
    def test_the_document_they_are_planted_in_is_good(self) -> None:
        assert parse(Proxy, document.read(GOOD, "f.yaml")[0]).hyperparameters.alpha_input == 1.0

    def test_all_are_reported_at_once_with_their_lines(self) -> None:
        bad = GOOD.replace("lr: 0.01", "lr: fast").replace("steps: 10", "step: 10").replace("vocab: 256", "vocab: 0")
        found = problems_of(bad.replace("init_std: 0.08", "init_std: -0.08") + "colour: red\n")
        assert set(found) == {
            "f.yaml:2: model.vocab: should be greater than 1, not 0",
            "f.yaml:4: hyperparameters.lr: should be a number, not 'fast'",
            "f.yaml:5: hyperparameters.init_std: should be greater than 0, not -0.08",
            "f.yaml:9: train: the key 'steps' is missing",
            "f.yaml:10: train.step: unknown key 'step'; did you mean 'steps'?",
            "f.yaml:12: colour: unknown key 'colour'; expected one of kind, parents, model, hyperparameters, parameterization, "
            "sparsity, data, train, target, run, evidence, meta",
        }

    @pytest.mark.parametrize(
        ("key", "close"), [("heds: 2, heads", "heads"), ("layer: 2, layers", "layers"), ("Width: 1, width", "width")]
    )
    def test_close_misses_are_named(self, key: str, close: str) -> None:
        (problem,) = problems_of(GOOD.replace(f"{close}:", f"{key}:"))
        assert problem.endswith(f"did you mean {close!r}?")

    def test_a_yes_is_no_true_and_a_text_no_number(self) -> None:
        found = problems_of(GOOD.replace("vocab: 256", "vocab: '256', bias: yes"))
        assert len(found) == 2 and all(line.startswith("f.yaml:2: model.") for line in found)

    def test_heads_must_divide_the_width(self) -> None:
        assert problems_of(GOOD.replace("heads: 2", "heads: 3")) == [
            "f.yaml:2: model.heads: 3 heads don't divide the width 64; expected a divisor of it, or head_width"
        ]

    def test_another_kind_is_named(self) -> None:
        assert problems_of(GOOD.replace("supar.proxy/v1", "supar.plan/v1")) == [
            "f.yaml:1: kind: is 'supar.plan/v1' (`supar train` trains it); expected supar.proxy/v1"
        ]

    @pytest.mark.parametrize("text", ["- 1\n- 2\n", "just text\n", "3\n"])
    def test_no_mapping(self, text: str) -> None:
        (problem,) = problems_of(text)
        assert problem == "f.yaml:1: not a mapping; expected lines of `key: value`"

    @pytest.mark.parametrize("bytes_kept", range(20, len(GOOD) - 2, 23))
    def test_a_truncated_document_is_refused(self, bytes_kept: int) -> None:
        assert all(line.startswith("f.yaml:") for line in problems_of(GOOD[:bytes_kept]))


words = st.one_of(st.from_regex(r"\A[a-z_][a-z0-9_.]{0,9}\Z"), st.sampled_from(["off", "null", "a b", "1", "é", ""]))
cells = st.one_of(words, st.integers(-9, 9), st.booleans(), st.none(), st.floats(allow_nan=False))
rows = st.dictionaries(words, st.one_of(cells, st.lists(cells, max_size=3), st.dictionaries(words, cells, max_size=2)))


@settings(max_examples=150, deadline=None)
@given(st.lists(rows, min_size=1, max_size=9), st.booleans())
def test_lists_of_mappings_are_written_as_pyyaml_writes_them(many: list[Any], several: bool) -> None:
    """The longer way is PyYAML's: of what needs quotes nothing may be written without."""
    one = {"kind": "x", "tensors": many, "after": {"a": [1]}}
    documents = [one, one] if several else [one]
    text = document.write(documents)
    assert text == yaml.dump_all(
        documents,
        Dumper=document._Dumper,
        default_flow_style=False,
        sort_keys=False,
        allow_unicode=True,
        width=1_000_000,
        explicit_start=several,
    )
    assert repr([found.data for found in document.read(text, "f")]) == repr(documents)


def test_keys_may_be_numbers() -> None:
    data = {"curves": [{"density": 1.0, "losses": {-1: 2.5, 0: None}}] * 9}
    assert yaml.safe_load(document.write([data])) == data
