"""Patterns of masks: counts and densities in exact arithmetic, what is refused, and N:M from a document to training."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.live_counts import asked_density
from supar_cli.planning.patterns import density_of, describe, group_of, has_equal_rows, live_count
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse, validate
from supar_cli.planning.spec import Sparsity, Target
from supar_cli.sparse.masks import WantedMask, draw, select
from supar_cli.training.trainer import Trainer

from .conftest import Called

MakePlan = Callable[..., Plan]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.fractions(Fraction(1, 50), 1), st.sampled_from([16, 32]))
def test_counts_and_densities_agree(rows: int, columns: int, density: Fraction, block: int) -> None:
    size = rows * columns
    exact = live_count("w", size, columns, density, "exact", None)
    assert abs(exact.count - density * size) <= Fraction(1, 2) and exact.density == float(density)
    assert live_count("w", size, columns, density, "bernoulli", None) == exact
    even = live_count("w", size, columns, density, "fixed_fan_in", None)
    assert even.count % rows == 0 and even.density == float(Fraction(even.count, size))
    assert abs(Fraction(even.count, rows) - density * columns) <= Fraction(1, 2)
    if density * size >= 1:
        blocks = live_count("w", size * block**2, columns * block, density, "block", block)
        assert blocks.count % block**2 == 0 and abs(blocks.count // block**2 - density * size) <= Fraction(1, 2)
        assert blocks.density == float(Fraction(blocks.count, size * block**2))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(2, 64), st.integers(1, 9), st.integers(1, 9), st.data())
def test_groups_keep_their_share_exactly(length: int, rows: int, groups: int, data: Any) -> None:
    live = data.draw(st.integers(1, length - 1))
    pattern, size = f"{live}:{length}", rows * groups * length
    found = live_count("w", size, groups * length, Fraction(live, length), pattern, None)
    assert (found.count, found.density) == (rows * groups * live, live / length)
    assert density_of(pattern) == Fraction(live, length) and group_of(pattern) == (live, length)
    # a document holds the nearest float
    nearest = live_count("w", size, groups * length, Fraction(repr(live / length)), pattern, None)
    assert nearest == found and live_count("w", size, groups * length, Fraction(1), pattern, None).count == size
    with pytest.raises(InputError, match=f"^w: density .* with the pattern {pattern}; expected {live}/{length}"):
        live_count("w", size, groups * length, Fraction(live, length + 1), pattern, None)
    with pytest.raises(
        InputError, match=f"^w: the fan-in {groups * length + 1} is not a multiple of {length}; expected whole groups"
    ):
        live_count("w", size + rows, groups * length + 1, Fraction(live, length), pattern, None)


def test_blocks_need_a_matrix_of_them() -> None:
    """Of a convolution's matrix (fan-out, fan-in), not of its extents."""
    assert live_count("w", 32 * 16 * 3 * 3, 16 * 9, Fraction(1, 2), "block", 16).count == 9 * 256
    with pytest.raises(InputError, match=r"w: 16×16 blocks don't divide the shape 32×135"):
        live_count("w", 32 * 135, 135, Fraction(1, 2), "block", 16)
    with pytest.raises(InputError, match=r"w: density 0\.01 keeps none of its 4 blocks"):
        live_count("w", 32 * 32, 32, Fraction(1, 100), "block", 16)


def test_words() -> None:
    assert (describe("2:4", None), describe("block", 32), describe("exact", None)) == ("2:4", "blocks of 32", "exact")
    assert [has_equal_rows(one) for one in ("fixed_fan_in", "1:16", "exact", "bernoulli", "block")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert group_of("exact") is None and density_of("block") is None


@pytest.mark.parametrize("text", ["2:4", '"2:4"'])
def test_a_document_may_quote_it_or_not_and_is_written_so_that_every_yaml_reads_it(text: str) -> None:
    section = parse(Sparsity, document.read(f"pattern: {text}\n", "s.yaml")[0])
    assert section.pattern == "2:4" and "pattern: '2:4'" in document.write([section.model_dump()])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:2", "pattern: 4:2; expected N:M with N < M <= 64"),
        ("4:4", "pattern: 4:4; expected N:M with N < M <= 64"),
        ("1:65", "pattern: 1:65; expected N:M with N < M <= 64"),
        ("0:4", "'block' or N:M such as '2:4' (quoted: YAML 1.1 reads 2:4 as 124), not '0:4'"),
        (str(yaml.safe_load("2:4")), "N:M such as '2:4' (quoted: YAML 1.1 reads 2:4 as 124), not 124"),
        ("exakt", "not 'exakt'"),
        ("2:4:8", "not '2:4:8'"),
    ],
)
def test_what_is_no_pattern_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as found:
        parse(Sparsity, document.read(f"pattern: {text}\n", "s.yaml")[0])
    assert message in str(found.value)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 63), st.integers(2, 64))
def test_every_reader_of_yaml_reads_what_was_written(live: int, length: int) -> None:
    if live < length:
        text = document.write([Sparsity(pattern=f"{live}:{length}").model_dump()])
        assert yaml.safe_load(text)["pattern"] == document.read(text, "")[0].data["pattern"] == f"{live}:{length}"
    # a writer without quotes, read by 1.1: a number, which is refused
    assert isinstance(yaml.safe_load(f"{live}:{length:02}"), int) == (length < 60)


def live_per_group(alive: Any, axes: tuple[int, ...], length: int) -> set[int]:
    """Live weights in each `length` inputs of an output, in the order of the axes, with no word of matrices."""
    last = np.moveaxis(alive, axes, range(-len(axes), 0))
    return set(last.reshape(-1, length).sum(axis=1).tolist())


# the fan-in is what the data says, the other axes are the fan-out
STORED: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "linear": (("out", "in"), (1,)),
    "Conv1D": (("in", "out"), (0,)),
    "convolution": (("out", "in", "k", "k"), (1, 2, 3)),
    "convolution, channels last": (("k", "k", "in", "out"), (2, 0, 1)),
    "experts": (("out", "other", "in"), (2,)),
}


@pytest.mark.parametrize("stored", STORED)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 64), st.integers(0, 99), st.data())
def test_exactly_n_of_every_m_live_along_the_fan_in(stored: str, length: int, seed: int, data: Any) -> None:
    names, axes = STORED[stored]
    live = data.draw(st.integers(1, length - 1))
    extents = {"in": length * data.draw(st.integers(1, 3)), "k": 2, "out": 2 * length, "other": 3}
    shape = tuple(extents[name] for name in names)
    kept, others = int(np.prod(shape)) // length * live, tuple(set(range(len(shape))) - set(axes))
    mask = draw("w", WantedMask(shape, kept, axes, f"{live}:{length}"), live / length, seed)
    assert mask.count == kept and live_per_group(mask.alive(), axes, length) == {live}
    if length >= 8:  # planted: fan-out taken for fan-in
        wrong = draw("w", WantedMask(shape, kept, others, f"{live}:{length}"), live / length, seed)
        assert live_per_group(wrong.alive(), axes, length) != {live}


class TestGroupsInAPlan:
    def test_the_pattern_says_the_density(self, plan_of: MakePlan) -> None:
        plan = plan_of(target={"width": 64, "sparsity": {"pattern": "1:4", "density": None}})
        assert (plan.sparsity.density, plan.sparsity.sparsity, plan.sparsity.pattern_text) == (0.25, 0.75, "1:4")
        hidden = [row for row in plan.tensors if row.role == "hidden"]
        assert all(row.kept * 4 == row.size and row.density == 0.25 for row in hidden)
        same = plan_of(target={"width": 64, "sparsity": {"pattern": "1:4", "density": 0.25}})
        assert same.hash() == plan.hash()
        exact = plan_of(target={"width": 64, "sparsity": {"density": 0.25}})
        assert [row.lr for row in exact.tensors] == [row.lr for row in plan.tensors]  # no rule of its own
        assert exact.hash() != plan.hash()

    @pytest.mark.parametrize("pattern", ["1:3", "2:3", "1:7"])
    def test_shares_that_no_float_holds(self, plan_of: MakePlan, pattern: str) -> None:
        width = 2 * 3 * 7 * 16
        share = density_of(pattern)
        assert share is not None
        model = {"width": 42 * 16, "heads": 2}
        for density in (None, float(share), f"{share}"):
            plan = plan_of(model=model, target={"width": width, "sparsity": {"pattern": pattern, "density": density}})
            assert {row.kept * share.denominator for row in plan.tensors if row.role == "hidden"} == {
                row.size * share.numerator for row in plan.tensors if row.role == "hidden"
            }

    def test_another_density_is_refused_and_dense_is_not(self, plan_of: MakePlan) -> None:
        with pytest.raises(InputError, match=r"density: 0\.3 with the pattern 2:4; expected 1/2, or 1"):
            plan_of(target={"sparsity": {"pattern": "2:4", "density": 0.3}})
        with pytest.raises(InputError, match=r"sparsity: 0\.3 with the pattern 1:4; expected 3/4, or 0"):
            plan_of(target={"sparsity": {"pattern": "1:4", "density": None, "sparsity": 0.3}})
        with pytest.raises(InputError, match=r"blocks\.0\.attn\.q: density 0\.25 with the pattern 2:4; expected 2/4"):
            plan_of(target={"sparsity": {"pattern": "2:4", "density": 0.5, "overrides": {"attn.q": 0.25}}})
        dense = plan_of(target={"sparsity": {"pattern": "2:4", "density": 0.5, "overrides": {"attn": 1.0}}})
        assert {row.density for row in dense.tensors if row.site.startswith("attn")} == {1.0}
        assert all(
            row.kept == row.size for row in plan_of(target={"sparsity": {"pattern": "2:4", "density": 1.0}}).tensors
        )

    @pytest.mark.parametrize("own", [{"sparsity": 0.992}, {"density": 0.008}, {"pattern": "block", "block": 16}])
    def test_it_takes_the_place_of_the_documents_density(self, plan_of: MakePlan, own: dict[str, Any]) -> None:
        asked = validate(Target, {"sparsity": own}, "target")
        for changes in ({"pattern": "1:4"}, {"pattern": "1:4", "density": "1/4"}):
            found = asked.override(**changes).sparsity
            assert (found.pattern, found.block, asked_density(found)) == ("1:4", None, Fraction(1, 4))
        with pytest.raises(InputError, match=r"density: 0\.3 with the pattern 1:4; expected 1/4, or 1"):
            asked_density(asked.override(pattern="1:4", density=0.3).sparsity)
        if own.get("pattern") is None:  # no other pattern does
            assert asked.override(pattern="fixed_fan_in").sparsity.model_dump() == {
                **asked.sparsity.model_dump(),
                "pattern": "fixed_fan_in",
            }

    @pytest.mark.parametrize(
        ("given", "status", "said"),
        [
            (["--pattern", "1:4"], 0, "supar: sparsity 0.75, density 0.25;"),  # the proxy's target has 0.5
            (["--pattern", "1:4", "--sparsity", "0.75"], 0, "density 0.25;"),
            (
                ["--pattern", "1:4", "--sparsity", "0.5"],
                2,
                "--sparsity 0.5: 0.5 with the pattern 1:4; expected 3/4, or 0",
            ),
            (["-s", "target.sparsity.pattern=2:4"], 0, "sparsity 0.5, density 0.5;"),
            (["--pattern", "3:40"], 2, "blocks.0.attn.q: the fan-in 64 is not a multiple of 40; expected whole groups"),
            (
                ["--pattern", "2"],
                2,
                "--pattern 2: should be 'exact', 'fixed_fan_in', 'bernoulli', 'block' or N:M such as",
            ),
            (["--pattern", "a:b"], 2, "N:M such as '2:4' (quoted: YAML 1.1 reads 2:4 as 124), not 'a:b'"),
        ],
    )
    def test_on_the_command_line(
        self, supar_here: Callable[..., Called], proxy_file: Path, given: list[str], status: int, said: str
    ) -> None:
        called = supar_here("transfer", *given, "-o", "plan.yaml")
        assert called.status == status and said in called.err, called.err
        if not status:
            written = yaml.safe_load(Path("plan.yaml").read_text("utf-8"))["sparsity"]["pattern"]
            assert written == given[1].rpartition("=")[2]

    def test_training_keeps_every_group(self, plan_of: MakePlan) -> None:
        trainer = Trainer(plan_of(target={"width": 64, "sparsity": {"pattern": "2:8", "density": 0.25}}))
        first = trainer.step()[0]
        losses = [trainer.step()[0] for _ in range(5)]
        assert losses[-1] < first and len(trainer.sparse_model.masks) == 12
        for name in trainer.sparse_model.masks:
            alive = (trainer.sparse_model.weight(name) != 0).numpy()
            assert (alive.reshape(-1, 8).sum(axis=1) == 2).all()


def test_a_pattern_without_a_case_is_refused_and_not_taken_for_exact() -> None:
    with pytest.raises(AssertionError, match="no case for the pattern diagonal"):
        live_count("w", 64, 8, Fraction(1, 2), "diagonal", None)
    with pytest.raises(AssertionError, match="no case for the pattern diagonal"):
        select("diagonal", np.arange(64.0).reshape(8, 8), 32)
