"""Layouts that `supar.layout` reads: families against golden ones, the words of its problems, and what is planted in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import supar_cli
from supar_cli.errors import InputError
from supar_cli.own import operations, starts
from supar_cli.planning import document
from supar_cli.planning.layout_document import Layout
from supar_cli.planning.problems import parse
from tests.conftest import CHECKOUT
from tests.own_families import Family, of_torch, of_transformers

GOLDEN = CHECKOUT / "tests" / "golden" / "own" / "layouts.yaml"
BASE, WIDER = {"width": 16}, {"width": 32}


def read(family: Family, **options: Any) -> Layout:
    sizes = dict(zip(("base", "wider", "third"), ({"width": width} for width in family.widths), strict=True))
    return supar_cli.layout(family.make, **{**sizes, "example": family.example, "roles": family.said, **options})


def summary(layout: Layout) -> dict[str, str]:
    """Each site's role, fan-in, uses and start, and the notes."""
    found: dict[str, str] = {}
    for row in layout.tensors:
        marks = ["writes_residual"] * row.writes_residual + [f"multiply_at {row.multiply_at}"] * bool(row.multiply_at)
        marks += ["own"] * (row.init == "own") + ["said"] * row.said
        axes = f" {row.fan_in_axes}" if row.fan_in_axes else ""
        text = " ".join([row.role + axes, *row.uses, *marks])
        assert found.setdefault(row.site, text) == text, f"{row.site} holds tensors that differ"
    return found | {f"note {number}": note for number, note in enumerate(layout.notes)}


FAMILIES = {**of_torch(), **of_transformers()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_its_golden_layout(name: str) -> None:
    golden = yaml.safe_load(GOLDEN.read_text("utf-8"))
    layout = read(FAMILIES[name])
    assert summary(layout) == golden[name]
    (again,) = document.read(document.write([layout.model_dump()]), "again")
    assert parse(Layout, again) == layout
    names = {name for name, _ in FAMILIES[name].make(FAMILIES[name].widths[0]).named_parameters()}
    assert {row.name for row in layout.tensors} == names


def test_every_golden_layout_is_of_a_family() -> None:
    assert set(yaml.safe_load(GOLDEN.read_text("utf-8"))) == set(FAMILIES)


ASKED = {name: set(family.said) for name, family in FAMILIES.items() if family.said}


@pytest.mark.parametrize("name", ASKED)
def test_what_can_not_be_decided_is_asked_once_a_site(name: str) -> None:
    with pytest.raises(InputError) as error:
        read(FAMILIES[name], roles=None)
    assert len(error.value.problems) == len(ASKED[name])
    for site, problem in zip(sorted(ASKED[name]), sorted(map(str, error.value.problems)), strict=True):
        assert problem.startswith(f"{site} (2 tensors)") and f"say roles={{{site!r}: 'hidden'}}" in problem


# an operation that is taken for another changes golden layouts: the goldens can fail
FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "products are not known": (lambda patch: patch.setattr(operations, "PRODUCTS", frozenset()), "GPT-2"),
    "convolutions are not known": (lambda patch: patch.setattr(operations, "CONVOLUTIONS", frozenset()), "ResNet"),
    "gains and shifts of norms change places": (
        lambda patch: patch.setattr(operations, "NORMS", {name: (3, 2) for name in operations.NORMS}),
        "BERT",
    ),
    "sums are not known": (lambda patch: patch.setattr(operations, "ADDED", frozenset()), "einsum by hand"),
    "factors are not known": (lambda patch: patch.setattr(operations, "MULTIPLIED", frozenset()), "Llama"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_changes_a_golden_layout(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, name = FAULTS[fault]
    golden = yaml.safe_load(GOLDEN.read_text("utf-8"))[name]
    assert summary(read(FAMILIES[name])) == golden
    plant(monkeypatch)
    monkeypatch.setattr("supar_cli.own.flow.BY_TABLE", _tables())
    try:
        found = summary(read(FAMILIES[name]))
    except InputError:
        return
    assert found != golden


def _tables() -> Any:
    from supar_cli.own import contraction, elementwise, movement

    return [
        (operations.PRODUCTS, contraction.product),
        (operations.CONVOLUTIONS, contraction.convolution),
        (frozenset(operations.NORMS), movement.normalise),
        (operations.LOOKED_UP | operations.MOVED, movement.move),
        (operations.SUMS, movement.reduce),
        (operations.ACCUMULATED, elementwise.accumulate),
    ]


class Net(nn.Module):
    """A table, a hidden weight and a head, with a body that a test gives."""

    def __init__(self, width: int, body: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(11, width), nn.Linear(width, width), nn.Linear(width, 7)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.table(x)))


def net(
    body: Callable[..., Tensor] = lambda m, h: m.hidden(h), parts: Callable[[int], dict[str, Any]] = lambda w: {}
) -> Any:
    return lambda width: Net(width, body, **parts(width))


def ids(model: nn.Module) -> tuple[Tensor, ...]:
    return (torch.randint(0, 11, (2, 5)),)


def layout(make: Any, **options: Any) -> Layout:
    return supar_cli.layout(make, **{"base": BASE, "wider": WIDER, "example": ids, **options})


def problems(make: Any, **options: Any) -> list[str]:
    with pytest.raises(InputError) as error:
        layout(make, **options)
    return [str(problem) for problem in error.value.problems]


class TestProblems:
    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({"wider": BASE}, "wider: {'width': 16} equals base, so nothing scales"),
            ({"wider": {"widht": 32}}, "wider: {'widht': 32}; expected the names of base: width"),
            ({"wider": {"width": 32.0}}, "expected whole numbers"),
            ({"third": WIDER}, "third: {'width': 32}; expected a size that is neither base nor wider"),
            ({"example": None}, "example: expected either example(model), which returns arguments, or run(model)"),
            ({"roles": {"hidden.weight": "hiden"}}, "roles['hidden.weight']: 'hiden'; did you mean 'hidden'?"),
            ({"roles": {"hiden.weight": "hidden"}}, "did you mean 'hidden.weight'?"),
            ({"ignore": ["hiden"]}, "ignore: 'hiden' names no parameter"),
        ],
    )
    def test_arguments_that_are_wrong_are_named(self, options: dict[str, Any], what: str) -> None:
        assert any(what in problem for problem in problems(net(), **options))

    def test_a_model_that_does_not_grow_is_refused(self) -> None:
        assert "nothing scales" in problems(lambda width: Net(16, lambda m, h: m.hidden(h)))[0]

    def test_hidden_needs_a_fan_in(self) -> None:
        (problem,) = problems(net(), roles={"hidden.bias": "hidden"})
        assert "roles['hidden.bias']: hidden of hidden.bias, which has no fan-in" in problem

    def test_all_problems_come_at_once(self) -> None:
        parts = lambda width: {"other": nn.Linear(width, width), "key": nn.Linear(width, 3, bias=False)}  # noqa: E731
        body = lambda m, h: m.hidden(h) * m.key(h).sum(-1, keepdim=True)  # noqa: E731
        found = problems(net(body, parts), ignore=["nothing"])
        assert {one.partition(",")[0].partition(":")[0] for one in found} == {
            "key.weight",
            "other.weight",
            "other.bias",
            "ignore",
        }

    @pytest.mark.parametrize(
        ("body", "what"),
        [
            (lambda m, h: m.hidden(h) + h @ m.hidden.weight, "both ways round"),
            (lambda m, h: torch.linalg.solve(m.hidden.weight, m.hidden(h).mT).mT, "linalg_solve"),
        ],
    )
    def test_what_has_no_single_answer_is_refused(self, body: Any, what: str) -> None:
        found = [problem for problem in problems(net(body)) if problem.startswith("hidden.weight")]
        assert len(found) == 1 and what in found[0]

    @pytest.mark.parametrize(
        ("part", "what"),
        [
            (lambda width: nn.LazyLinear(width), "has no shape before the first pass"),
            (lambda width: nn.Linear(width, width, dtype=torch.complex64), "holds torch.complex64"),
        ],
    )
    def test_parameters_that_can_not_be_read_are_refused(self, part: Any, what: str) -> None:
        found = problems(net(parts=lambda width: {"part": part(width)}))
        assert any(problem.startswith("part.weight: ") and what in problem for problem in found)

    def test_roles_are_said_by_name_site_or_class(self) -> None:
        make = net(lambda m, h: m.hidden(m.key(h) @ h.new_ones(3, h.shape[-1])), lambda w: {"key": nn.Linear(w, 3)})
        for key in ("key.weight", "Net.key.weight", "Linear.weight"):
            roles = {key: "unembedding"} | ({"hidden.weight": "hidden"} if key == "Linear.weight" else {})
            (row,) = [row for row in layout(make, roles=roles).tensors if row.name == "key.weight"]
            assert (row.role, row.said, row.uses) == ("unembedding", True, [])


class TestPasses:
    def plain(self) -> dict[str, tuple[str, list[int], list[str]]]:
        return self.rows(layout(net()))

    def rows(self, found: Layout) -> dict[str, tuple[str, list[int], list[str]]]:
        return {row.name: (row.role, row.fan_in_axes, list(row.uses)) for row in found.tensors}

    def test_however_the_model_runs_its_rows_are_the_same(self) -> None:
        from torch.utils.checkpoint import checkpoint

        def autocast(m: Any, h: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return m.hidden(h).float()

        bodies: list[Callable[..., Tensor]] = [
            lambda m, h: checkpoint(m.hidden, h, use_reentrant=False),
            autocast,
            lambda m, h: torch.func.functional_call(m.hidden, dict(m.hidden.named_parameters()), (h,)),
            lambda m, h: torch.vmap(m.hidden)(h),
        ]
        assert all(self.rows(layout(net(body))) == self.plain() for body in bodies)
        assert self.rows(layout(lambda width: net()(width).requires_grad_(False))) == self.plain()

    def test_a_compiled_model_is_read_without_compiling(self) -> None:
        found = self.rows(layout(lambda width: torch.compile(net()(width))))
        assert {name.removeprefix("_orig_mod."): row for name, row in found.items()} == self.plain()

    def test_a_pass_of_the_users_own_may_train(self) -> None:
        def run(model: nn.Module) -> Tensor:
            optimizer = torch.optim.AdamW(model.parameters())
            logits = model(*ids(model))
            logits.square().mean().backward()
            optimizer.step()
            return logits

        assert self.rows(layout(net(), example=None, run=run)) == self.plain()

    def test_a_pass_that_returns_nothing_says_so(self) -> None:
        found = layout(net(), example=None, run=lambda model: [model(*ids(model)), None][1])
        assert self.rows(found) == self.plain() and any("run returned nothing" in note for note in found.notes)

    def test_layers_that_are_skipped_at_random_are_read(self) -> None:
        found = layout(net(lambda m, h: m.hidden(h) if torch.rand(()) < 0.5 else h))
        assert self.rows(found) == self.plain()

    def test_examples_may_be_values(self) -> None:
        (example,) = ids(nn.Identity())
        for given in (example, (example,), {"x": example}, lambda: example, lambda at=0: (example,)[at]):
            assert self.rows(layout(net(), example=given)) == self.plain()

    def test_random_numbers_of_the_session_are_left_alone(self) -> None:
        torch.manual_seed(1)
        first = torch.rand(1)
        torch.manual_seed(1)
        layout(net())
        assert torch.equal(torch.rand(1), first)


class TestNotes:
    def test_a_number_that_moves_with_the_width_is_said(self) -> None:
        (note,) = layout(net(lambda m, h: m.hidden(h) * h.shape[-1] ** 0.5)).notes
        assert note == "the model itself: mul with 4 at base, 5.65685 at wider"
        assert layout(net(lambda m, h: m.hidden(h) * 4.0)).notes == []

    @pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm", None])
    def test_a_weight_that_has_only_a_direction_is_said(self, norm: str | None) -> None:
        def parts(width: int) -> dict[str, Any]:
            linear = nn.Linear(width, width)
            return {"more": getattr(nn.utils.parametrizations, norm)(linear) if norm else linear}

        notes = layout(net(lambda m, h: m.hidden(m.more(h).tanh()), parts)).notes
        assert any("only its direction counts" in note for note in notes) == bool(norm)

    @pytest.mark.parametrize(("heads", "said"), [(lambda width: 4, True), (lambda width: width // 4, False)])
    def test_a_moving_head_width_is_said(self, heads: Any, said: bool) -> None:
        def body(m: Any, h: Tensor) -> Tensor:
            split = m.hidden(h).unflatten(-1, (heads(h.shape[-1]), -1)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(split, split, split).transpose(1, 2).flatten(2)

        assert any("bmm of activations with 4 at base, 8 at wider" in note for note in layout(net(body)).notes) == said

    def test_other_operations_at_the_wider_size_are_said(self) -> None:
        body = lambda m, h: m.hidden(h).relu() if h.shape[-1] > 16 else m.hidden(h)  # noqa: E731
        assert any("do not run the same operations" in note for note in layout(net(body)).notes)


class TestStarts:
    @pytest.mark.parametrize("shape", [(64, 32), (32, 64), (256, 256), (16, 8, 3, 3), (8, 512)])
    def test_independent_values_are_no_structure(self, shape: tuple[int, ...]) -> None:
        """400 draws of each kind. An axis of few slices is the worst: false alarms under 1 in 1,000 are allowed none."""
        for seed in range(400):
            generator = torch.Generator().manual_seed(seed)
            for values in (torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) - 0.5):
                assert not starts.keeps_own(values, "hidden", False)

    def test_structure_is_kept(self) -> None:
        torch.manual_seed(0)
        fused = torch.cat([torch.randn(64, 64), 2 * torch.randn(64, 64)])
        for values in (nn.init.orthogonal_(torch.empty(64, 64)), fused, torch.eye(32), torch.randn(64, 64) + 1):
            assert starts.keeps_own(values, "hidden", False)
        assert all(starts.keeps_own(torch.eye(size), "embedding", False) for size in (3, 4, 7, 8, 32))
        assert starts.keeps_own(torch.arange(1.0, 17).log().expand(32, 16), "norm", False)
        assert not starts.keeps_own(torch.ones(32), "norm", False) and starts.keeps_own(torch.rand(32), "bias", False)

    def test_a_row_of_padding_is_no_structure(self) -> None:
        table = nn.Embedding(8, 512, padding_idx=3).weight
        assert not starts.keeps_own(table, "embedding", True) and starts.keeps_own(table, "hidden", False)


class TestSites:
    def test_layers_of_one_kind_share_theirs(self) -> None:
        parts = lambda w: {"layers": nn.ModuleList(nn.Linear(w, w) for _ in range(3))}  # noqa: E731
        rows = layout(net(lambda m, h: m.hidden(m.layers[2](m.layers[1](m.layers[0](h)))), parts)).tensors
        assert [(row.site, row.block) for row in rows if row.name.startswith("layers.1")] == [
            ("layers.*.weight", 1),
            ("layers.*.bias", 1),
        ]

    def test_a_site_holds_no_tensors_that_differ(self) -> None:
        stack = lambda w: nn.Sequential(nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 2 * w), nn.Linear(2 * w, w))  # noqa: E731
        rows = layout(net(lambda m, h: m.hidden(m.layers(h)), lambda w: {"layers": stack(w)})).tensors
        assert [row.block for row in rows] == [None] * len(rows) and all(row.site == row.name for row in rows)


def test_sizes_that_are_not_affine_need_a_target() -> None:
    make = net(
        lambda m, h: m.hidden(m.back(m.out(h))),
        lambda w: {"out": nn.Linear(w, w * w // 4), "back": nn.Linear(w * w // 4, w)},
    )
    assert any("third is" in problem for problem in problems(make, third={"width": 48}))
    found = layout(make, target={"width": 48})
    assert {tensor.name: tensor.shape for tensor in found.at({"width": 48})}["out.weight"] == (576, 48)


if __name__ == "__main__":
    GOLDEN.write_text(
        yaml.safe_dump({name: summary(read(family)) for name, family in FAMILIES.items()}, sort_keys=False, width=120),
        "utf-8",
    )
