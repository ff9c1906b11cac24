"""Documents grow: a key that is added later must have a value that means the old behaviour, and then nothing old breaks.

`KEYS` are the keys of released documents. `python -m tests.test_growth` writes them anew; only a release does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

import supar_cli
import supar_cli.errors
from supar_cli.experiments.search import study_name
from supar_cli.planning import document
from supar_cli.planning.kinds import AnyDocument, parse_any
from supar_cli.planning.plan import Plan, PlanModel, read_plan
from supar_cli.planning.problems import required_keys
from supar_cli.planning.schema import Field, Section
from supar_cli.planning.spec import Data, Hyperparameters, Model, Options, Proxy, Sparsity, Spec, Train
from supar_cli.planning.sweep import Sweep

RELEASED = Path(__file__).parent / "released"
OLD = RELEASED / "v0.1.0"
KEYS = RELEASED / "keys.json"
EXPECTED = json.loads((OLD / "expected.json").read_text("utf-8"))
PLANS = sorted(path.stem for path in (OLD / "plans").glob("*.yaml"))


def subsections(section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """The sections that are keys of a section, by key; those of a union each, by what tells them apart."""
    for name, hint in section.keys().items():
        parts = [hint, *get_args(hint), *(inner for part in get_args(hint) for inner in get_args(part))]
        for one in parts:
            if isinstance(one, type) and issubclass(one, Section):
                yield f"{name}:{one.__name__}", one


def needed_keys(section: type[Section], path: str) -> dict[str, list[str]]:
    """By section, the keys that a document which supar wrote must have."""
    found = {path: sorted(required_keys(section))}
    for name, inner in subsections(section):
        found |= needed_keys(inner, f"{path}.{name}")
    return found


def needed() -> dict[str, list[str]]:
    kinds = {get_args(one.keys()["kind"])[0]: one for one in get_args(AnyDocument)}
    return {path: keys for kind, one in kinds.items() for path, keys in needed_keys(one, kind).items()}


def not_neutral(found: dict[str, list[str]]) -> list[str]:
    """Keys that released documents don't have and that are not neutral."""
    released = json.loads(KEYS.read_text("utf-8"))
    return [f"{path}.{key}" for path in found if path in released for key in found[path] if key not in released[path]]


def test_every_key_that_was_added_is_neutral() -> None:
    assert not_neutral(needed()) == []


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`grown(Section, key, type, **field)` adds a key to a section and to those made of it, until the test ends."""

    def forget() -> None:
        for cached in (Section.keys, Section.schema, Section.validator, Section.fields):
            cached.cache_clear()  # type: ignore[attr-defined]

    def add(section: type[Section], key: str, hint: str, **field: Any) -> None:
        monkeypatch.setattr(section, "__annotations__", {**section.__annotations__, key: hint})
        monkeypatch.setattr(section, key, Field(**field), raising=False)
        forget()

    yield add
    monkeypatch.undo()
    forget()


@pytest.fixture
def documents_have_grown(grown: Any) -> None:
    """A neutral key in sections of every kind of document, in lists of them, and a section of its own."""
    for section in (Train, Model, PlanModel, Options, Hyperparameters, Sparsity, Data, Proxy, Spec, Sweep, Plan):
        grown(section, "added_key", "int", default=7, neutral=True)
    row: Any = Plan.keys()["tensors"]
    grown(get_args(row)[0], "added_key", "str | None", default=None, neutral=True, omit=True)
    grown(Plan, "added_section", "Data", default_factory=Data, neutral=True)


def test_a_key_without_a_neutral_value_is_found(grown: Any) -> None:
    """The control: neither a default nor being needed makes a key one that old documents can do without."""
    grown(Train, "added_key", "int", default=7)
    grown(Model, "other_key", "int")
    assert {path.rpartition(".")[2] for path in not_neutral(needed())} == {"added_key", "other_key"}
    with pytest.raises(supar_cli.errors.InputError, match=r"added_key|other_key"):
        read_plan(OLD / "plans" / "gpt2.yaml")


@pytest.mark.usefixtures("documents_have_grown")
class TestGrown:
    def test_the_key_is_there(self) -> None:
        plan = read_plan(OLD / "plans" / "gpt2.yaml")
        assert plan.train.model_dump()["added_key"] == plan.model_dump()["added_section"]["added_key"] == 7
        assert "added_key" not in plan.tensors[0].model_dump()
        assert "added_key: 7" in document.write([plan.model_dump()])

    @pytest.mark.parametrize("name", PLANS)
    def test_plans_keep_their_hash_and_what_they_are_made_from_makes_them_again(self, name: str) -> None:
        plan = read_plan(OLD / "plans" / f"{name}.yaml")
        assert plan.hash() == EXPECTED["plans"][name]["hash"]
        (again,) = document.read(document.write([plan.model_dump()]), "again")
        assert parse_any(again) == plan

    def test_another_value_is_another_experiment(self) -> None:
        plan = read_plan(OLD / "plans" / "gpt2.yaml")
        train = plan.train.model_copy(update={"added_key": 8})
        assert plan.model_copy(update={"train": train}).hash() != plan.hash()

    def test_proxies_studies_and_sweeps_keep_their_names(self) -> None:
        for name, known in EXPECTED["proxies"].items():
            proxy = supar_cli.load(OLD / name)
            assert isinstance(proxy, Proxy) and proxy.hash() == known
        spec = supar_cli.load(OLD / "spec.yaml")
        assert isinstance(spec, Spec)
        data = spec.data.model_copy(update={"hash": read_plan(OLD / "plans" / "gpt2.yaml").data.hash})
        assert study_name(spec.model_copy(update={"data": data})) == EXPECTED["search"]["journal"]["study"]
        sweep = supar_cli.load(OLD / "sweep.yaml")
        assert isinstance(sweep, Sweep)
        asked = json.loads((OLD / "studies" / "sweep" / "question.json").read_text("utf-8"))
        own = sweep.identity(exclude={"run", "meta"})
        own["data"]["hash"] = asked["data"]["hash"]
        assert own == asked

    def test_runs_go_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("runs", "text.txt"):
            copy = shutil.copytree if (OLD / name).is_dir() else shutil.copy
            copy(OLD / name, tmp_path / name)
        monkeypatch.chdir(tmp_path)
        result = supar_cli.train(read_plan(Path("runs/stopped/plan.yaml")), "runs/stopped")
        expected = json.loads((OLD / "expected" / "stopped" / "result.json").read_text("utf-8"))
        assert result["resumed_at"] > 0 and result["masks"] == expected["masks"]
        assert result["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-5)
        assert len(supar_cli.weights("runs/finished")) > 10


def test_a_plan_of_today_that_lacks_a_key_is_refused_still() -> None:
    """A cut document: the keys that it was written with are needed."""
    data = read_plan(OLD / "plans" / "gpt2.yaml").model_dump()
    del data["train"]["grad_clip"]
    with pytest.raises(supar_cli.errors.InputError, match="train: the key 'grad_clip' is missing"):
        parse_any(document.Document(data, "plan.yaml"))


if __name__ == "__main__":
    KEYS.write_text(json.dumps(needed(), indent=1) + "\n", "utf-8")
