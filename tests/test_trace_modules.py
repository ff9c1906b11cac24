"""`supar.layout` on small modules whose answers are known: right, asked truthfully or refused; never wrong in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import supar_cli
from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.layout_document import Layout, LayoutRow
from supar_cli.planning.problems import parse
from tests import (
    own_modules_habits,
    own_modules_heads,
    own_modules_lookups,
    own_modules_nets,
    own_modules_pairs,
    own_modules_products,
    own_modules_scripts,
    own_modules_sums,
)
from tests.own_modules import BASE, VOCAB, WIDER, Answer, Case, Net, features, ids, judge, read
from tests.own_modules_drawn import draw

FILES = (own_modules_products, own_modules_lookups, own_modules_pairs)
FILES += (own_modules_sums, own_modules_heads, own_modules_nets, own_modules_scripts, own_modules_habits)
CASES = [case for file in FILES for case in file.cases()]


def layout(*args: Any, **options: Any) -> Layout:
    return supar_cli.layout(*args, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_module_is_read_right(case: Case) -> None:
    assert [str(finding) for finding in judge(case, layout)] == []


def test_every_name_is_used_once() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 400


@pytest.mark.parametrize("seed", range(40))
def test_a_drawn_net_is_read_right(seed: int) -> None:
    assert [str(finding) for finding in judge(draw(seed), layout)] == []


# The judge can fail: answers are changed on their way to it, and each kind of change is found on modules of its kind.

Change = Callable[[LayoutRow], dict[str, Any]]
CHANGES: dict[str, tuple[Change, str]] = {
    "a hidden weight is taken for a table": (
        lambda row: {"role": "embedding", "fan_in_axes": []} if row.role == "hidden" else {},
        "experts: bmm with picked weights",
    ),
    "the other axis is the fan-in": (
        lambda row: {"fan_in_axes": [1 - row.fan_in_axes[0]]} if row.role == "hidden" and len(row.base) == 2 else {},
        "hidden: elementwise, then summed",
    ),
    "one of two merged axes is the fan-in": (
        lambda row: {"fan_in_axes": row.fan_in_axes[:1]} if row.role == "hidden" else {},
        "merged heads: wider heads, multiplied and summed",
    ),
    "a readout is taken for a gain": (
        lambda row: {"role": "norm", "fan_in_axes": [], "uses": []} if row.role == "unembedding" else {},
        "scalar head: multiplied, then summed",
    ),
    "a summand of the first sum is forgotten": (
        lambda row: {"uses": []} if row.role == "bias" else {},
        "patches, class token, positions",
    ),
    "every table is in the first sum": (
        lambda row: {"uses": ["first_sum"]} if row.role == "embedding" and not row.uses else {},
        "relative positions added to scores",
    ),
    "every norm is the one before the head": (
        lambda row: {"uses": ["before_head"]} if row.role == "norm" else {},
        "a norm read by a tied head and a second head",
    ),
    "a derived gain is taken for a plain one": (
        lambda row: {"uses": [use for use in row.uses if use != "derived"]},
        "a norm of 1 + g",
    ),
    "an inner readout is taken for a head": (
        lambda row: {"uses": ["head"]} if row.role == "unembedding" else {},
        "pooling score: matmul",
    ),
    "the bias of the head is an inner one": (
        lambda row: {"uses": [use for use in row.uses if use != "after_head"]},
        "several heads",
    ),
    "a branch is not seen": (lambda row: {"writes_residual": False}, "a branch"),
    "everything writes the stream": (lambda row: {"writes_residual": True}, "two products summed are no branch"),
}


def changed(change: Change) -> Callable[..., Answer]:
    def wrong(*args: Any, **options: Any) -> Layout:
        found = layout(*args, **options)
        return found.model_copy(update={"tensors": [row.model_copy(update=change(row)) for row in found.tensors]})

    return wrong


@pytest.mark.parametrize("planted", CHANGES)
def test_a_wrong_answer_is_found(planted: str) -> None:
    change, name = CHANGES[planted]
    case = next(case for case in CASES if case.name == name)
    assert judge(case, layout) == []
    assert "silent" in {finding.kind for finding in judge(case, changed(change))}


def answering(*args: Any, **options: Any) -> Layout:
    """A layout that asks nothing: it takes every readout inside of a model for a hidden weight, unsaid."""
    case = next(case for case in CASES if case.make is args[0])
    found = layout(*args, **{**options, "roles": dict(case.answers)})
    return found.model_copy(update={"tensors": [row.model_copy(update={"said": False}) for row in found.tensors]})


def asking(*args: Any, **options: Any) -> Layout:
    """A layout that asks about every gain."""
    found = layout(*args, **options)
    gains = [row.name for row in found.tensors if row.role == "norm" and not row.said]
    if gains:
        raise InputError(*(f"{name}: is it a gain?; expected roles={{'{name}': 'norm'}}" for name in gains))
    return found


@pytest.mark.parametrize(
    ("wrong", "name", "kind"),
    [
        (answering, "a router", "missing"),
        (answering, "two fixed kv heads", "missing"),
        (asking, "gain: 1 - m", "question"),
    ],
)
def test_a_question_that_is_missing_or_needless_is_found(wrong: Any, name: str, kind: str) -> None:
    case = next(case for case in CASES if case.name == name)
    assert judge(case, layout) == []
    assert kind in {finding.kind for finding in judge(case, wrong)}


# What a person says.


def pooled(width: int) -> nn.Module:
    """Two blocks, each with a gain and a score that is asked about."""

    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        h = model.table(x)
        for block in model.blocks:
            h = block(h)
        return model.head(h)

    def block(model: Any, h: torch.Tensor) -> torch.Tensor:
        return h + (h * model.gain) * model.score(h).softmax(1)

    blocks = nn.ModuleList(Net(block, gain=(width,), score=nn.Linear(width, 1, bias=False)) for _ in range(2))
    return Net(run, table=nn.Embedding(VOCAB, width), blocks=blocks, head=nn.Linear(width, VOCAB, bias=False))


POOLED = Case("pooled", pooled, ids, {})


def test_one_question_for_a_site_and_its_line_is_an_answer() -> None:
    error = read(POOLED, layout)
    assert isinstance(error, InputError) and len(error.problems) == 1
    (line,) = (part for part in str(error).split("roles=")[1:])
    site = line.split("{", 1)[1].split(":")[0].strip("'\"")
    found = read(POOLED, layout, roles={site: "unembedding"})
    assert isinstance(found, Layout)
    rows = {row.name: row for row in found.tensors}
    for index in (0, 1):
        row = rows[f"blocks.{index}.score.weight"]
        assert (row.role, row.fan_in_axes, row.uses, row.said) == ("unembedding", [1], [], True)
        assert not rows[f"blocks.{index}.gain"].said and rows[f"blocks.{index}.gain"].block == index
    assert rows["blocks.0.gain"].site == rows["blocks.1.gain"].site
    assert parse(Layout, document.read(document.write([found.model_dump()]), "again")[0]) == found


@pytest.mark.parametrize(
    ("roles", "named"),
    [
        ({"blocks.0.gain": "hidden"}, "blocks.0.gain"),  # has no fan-in
        ({"table.weight": "hidden"}, "table.weight"),
        ({"blocks.0.gian": "norm"}, "blocks.0.gian"),
        ({"blocks.0.gain": "gain"}, "gain"),
    ],
)
def test_a_role_that_cannot_be_is_refused(roles: dict[str, str], named: str) -> None:
    scores = {f"blocks.{index}.score.weight": "unembedding" for index in (0, 1)}
    error = read(POOLED, layout, roles={**scores, **roles})
    assert isinstance(error, InputError) and named in str(error)


@pytest.mark.parametrize("size", [BASE, {"width": 16.0}, {"widht": 32}])
def test_a_size_that_is_none_is_refused(size: dict[str, Any]) -> None:
    error = read(POOLED, layout, wider=size, third=None)
    assert isinstance(error, InputError)


def test_a_width_that_the_model_forgets_is_refused() -> None:
    forgetful = Case("forgetful", lambda width: pooled(16), ids, {})
    error = read(forgetful, layout, third=None)
    assert isinstance(error, InputError) and "scale" in str(error)


def test_all_problems_are_told_at_once() -> None:
    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        h = model.table(x)
        return model.head((h @ model.both).tanh() @ model.both.t() * model.score(h).softmax(1))

    def make(width: int) -> nn.Module:
        parts = {"both": (width, width), "unused": (width,), "score": nn.Linear(width, 1, bias=False)}
        return Net(run, table=nn.Embedding(VOCAB, width), **parts, head=nn.Linear(width, VOCAB))

    error = read(Case("three", make, ids, {}), layout)
    assert isinstance(error, InputError)
    assert all(any(name in str(problem) for problem in error.problems) for name in ("both", "unused", "score"))


# What a layout says beside roles.


def numbers(factor: Callable[[int], float]) -> Case:
    def make(width: int) -> nn.Module:
        stem, head = nn.Linear(7, width), nn.Linear(width, VOCAB)
        return Net(lambda model, x: model.head(model.stem(x) * factor(width)), stem=stem, head=head)

    return Case("numbers", make, features, {})


def test_a_number_that_moves_with_the_width_is_told_with_both_values() -> None:
    moving, still = read(numbers(lambda width: width**0.5), layout), read(numbers(lambda width: 4.0), layout)
    assert isinstance(moving, Layout) and isinstance(still, Layout)
    assert any("4" in note and "5.65" in note for note in moving.notes) and still.notes == []


STARTS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "normal": (lambda w: nn.init.normal_(w, std=0.02), "normal"),
    "uniform": (lambda w: nn.init.uniform_(w, -0.1, 0.1), "normal"),
    "zero": (nn.init.zeros_, "normal"),
    "orthogonal": (nn.init.orthogonal_, "own"),
    "identity": (nn.init.eye_, "own"),
    "unequal parts": (lambda w: [nn.init.normal_(part, std=10.0**-i) for i, part in enumerate(w.chunk(4))], "own"),
}  # fmt: skip


@pytest.mark.parametrize("start", STARTS)
def test_how_a_weight_starts(start: str) -> None:
    def make(width: int) -> nn.Module:
        weight = nn.Parameter(torch.empty(2 * width, 2 * width))
        with torch.no_grad():
            STARTS[start][0](weight)
        parts = {"stem": nn.Linear(7, 2 * width), "weight": weight, "head": nn.Linear(2 * width, VOCAB)}
        return Net(lambda model, x: model.head(model.stem(x) @ model.weight), **parts)

    found = read(Case("starts", make, features, {}), layout)
    assert isinstance(found, Layout)
    row = next(row for row in found.tensors if row.name == "weight")
    torch.manual_seed(0)
    weight = dict(make(**BASE).named_parameters())["weight"]
    assert row.init == STARTS[start][1]
    assert row.own is not None and row.own.std == pytest.approx(float(weight.detach().std()), rel=0.1, abs=1e-9)


def structured() -> Iterator[tuple[str, torch.Tensor, str]]:
    yield "ones", torch.ones(16), "normal"
    yield "zeros", torch.zeros(16), "normal"
    yield "log(1 … N)", torch.arange(1.0, 17.0).log(), "own"
    yield "forget gates", torch.cat([torch.zeros(8), torch.ones(8)]), "own"


@pytest.mark.parametrize(("name", "values", "init"), list(structured()))
def test_how_a_gain_starts(name: str, values: torch.Tensor, init: str) -> None:
    def make(width: int) -> nn.Module:
        gain = nn.Parameter(values.repeat(width // 16))
        parts = {"stem": nn.Linear(7, width), "gain": gain, "head": nn.Linear(width, VOCAB)}
        return Net(lambda model, x: model.head(model.stem(x).tanh() * model.gain), **parts)

    found = read(Case(name, make, features, {}), layout)
    assert isinstance(found, Layout)
    row = next(row for row in found.tensors if row.name == "gain")
    assert (row.role, row.init) == ("norm", init)
    assert row.own is not None and row.own.mean == pytest.approx(float(values.mean()))


def test_the_model_and_the_random_numbers_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    made = []

    def make(width: int) -> nn.Module:
        made.append(pooled(width))
        return made[-1]

    torch.manual_seed(7)
    layout(make, base=BASE, wider=WIDER, example=ids, roles={"blocks.*.score.weight": "unembedding"})
    assert torch.equal(torch.rand(3), expected)
