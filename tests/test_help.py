"""`supar help`, and the page of keys: every key of every document has a description, a unit and its true default."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from supar_cli.cli import help as manual
from supar_cli.cli.init import TYPES, json_schema
from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.schema import Section

from .test_cli import Supar

NUMBERS = ("integer", "number")


def keys_of(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key below a JSON Schema by its path, however deep, with its own schema."""
    for name, inner in schema.get("properties", {}).items():
        yield path + name, inner
        yield from keys_of(inner, f"{path}{name}.")
    for part in ("anyOf", "oneOf", "items", "additionalProperties"):
        given = schema.get(part)
        for inner in given if isinstance(given, list) else [given] if isinstance(given, dict) else []:
            yield from keys_of(inner, path)


def types_of(schema: dict[str, Any]) -> Iterator[str]:
    """The JSON types of a value, of the items of a list, and of each member of a union."""
    yield schema.get("type", "")
    for inner in (*schema.get("anyOf", ()), *filter(None, [schema.get("items")])):
        yield from types_of(inner)


def defaults(section: type[Section], path: str = "") -> Iterator[tuple[str, Any]]:
    """The default of every key of a document that is not a section; required keys are left out."""
    for name, hint in section.keys().items():
        inner = [one for one in (hint, *get_args(hint), *(a for b in get_args(hint) for a in get_args(b)))]
        sections = [one for one in inner if isinstance(one, type) and issubclass(one, Section)]
        for one in sections:
            yield from defaults(one, f"{path}{name}.")
        own = section.fields()[name]
        if not sections and own.schema(hint).get("type") == "default":
            yield path + name, own.value


def without_description(schemas: dict[str, dict[str, Any]]) -> set[str]:
    return {path for one in schemas.values() for path, inner in keys_of(one) if not inner.get("description")}


SCHEMAS = {kind: json_schema(section) for kind, section in TYPES.items()}


class TestKeys:
    def test_every_key_has_a_description_and_none_is_of_another(self) -> None:
        assert without_description(SCHEMAS) == set()
        known = {path for one in SCHEMAS.values() for path, _ in keys_of(one)}
        assert set(manual.key_descriptions()) <= known and len(known) > 150

    def test_a_key_without_one_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = {name: what for name, what in manual.key_descriptions().items() if name != "train.grad_clip"}
        monkeypatch.setattr("supar_cli.cli.init.key_descriptions", lambda: known)
        assert without_description({"spec": json_schema(TYPES["spec"])}) == {"train.grad_clip"}

    def test_every_number_has_a_unit(self) -> None:
        unit = {path for path, what in manual.key_descriptions().items() if re.search(r"Unit: .+\.$", what)}
        numbers = {
            path
            for one in SCHEMAS.values()
            for path, inner in keys_of(one)
            if set(types_of(inner)) & {*NUMBERS} and not path.endswith("sparsity")  # a section, or its share alone
        }
        numbers = {path if path in unit else manual.shared(path) for path in numbers}
        assert numbers - unit == set() and "train.steps" in numbers

    def test_stated_defaults_are_those_of_the_code(self) -> None:
        checked, wrong = 0, []
        for section in TYPES.values():
            for path, value in defaults(section):
                what = manual.key_descriptions().get(path) or manual.key_descriptions()[manual.shared(path)]
                stated = re.search(r"Default: `([^`]*)`", what)
                checked += 1
                if stated and value != document.read(stated[1], "stated")[0].data:
                    wrong.append(f"{path}: {value!r}, stated {stated[1]}")
                if not stated and value not in (None, {}, "", ()):
                    wrong.append(f"{path}: {value!r}, not stated")
        assert wrong == [] and checked > 100

    def test_every_entry_says_whether_it_is_required(self) -> None:
        silent = [
            path
            for path, what in manual.key_descriptions().items()
            if "Required" not in what and "Default:" not in what
        ]
        assert silent == []
        for kind, schema in SCHEMAS.items():
            for name in schema["required"]:
                assert "Required" in manual.key_descriptions()[name] or name in (
                    "data",
                    "parameterization",
                    "sparsity",
                ), kind


class TestLookup:
    def test_every_key_is_found_and_one_with_a_letter_less_is_named(self) -> None:
        for path, what in manual.key_descriptions().items():
            found = " ".join(manual._lookup(path).split())
            assert what.partition(" Unit: ")[0] in found, path
        for path in ("train.warmup_steps", "sparsity.distribution", "hyperparameters.alpha_input"):
            with pytest.raises(InputError, match=rf"did you mean {re.escape(path)}\?"):
                manual._lookup(path[:-1])

    @pytest.mark.parametrize(
        ("word", "parts"),
        [
            ("keys", ["# Keys", "## train", "`tensors.kept`"]),
            ("search", ["## search", "`search.lr_fit_octaves`"]),
            ("lr", ["`hyperparameters.lr`", "`search.lr`", "`tensors.lr`"]),
            ("target.sparsity.pattern", ["- `sparsity.pattern`"]),
            ("transfer", ["Usage: supar transfer", "--sparsity"]),
            ("train", ["Usage: supar train", "## train", "`train.steps`"]),
        ],
    )
    def test_what_a_word_gives(self, word: str, parts: list[str]) -> None:
        found = manual._lookup(word)
        assert [part for part in parts if part not in found] == []

    def test_the_command_prints_and_refuses(self, supar_here: Supar) -> None:
        contents = supar_here("help")
        assert contents.status == 0
        assert set(re.findall(r"^  (\S+)  +\S", contents.out, re.MULTILINE)) == set(manual.topics())
        refused = supar_here("help", "wramup")
        assert refused.status == 2 and refused.out == "" and "no such topic, key or command" in refused.err


def test_on_a_terminal_it_is_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    paged: list[str] = []
    monkeypatch.setattr("pydoc.pager", paged.append)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    manual.help(topic="glossary")
    assert paged == [manual.page("glossary")]


def test_editors_get_the_texts() -> None:
    """Descriptions of nested sections and of both places of a section that stands twice."""
    target = json.loads(json.dumps(SCHEMAS["proxy"]))["properties"]["target"]["properties"]["sparsity"]["anyOf"][0][
        "properties"
    ]
    own = SCHEMAS["proxy"]["properties"]["sparsity"]["anyOf"][0]["properties"]
    assert target["pattern"]["description"] == own["pattern"]["description"] != own["density"]["description"]
