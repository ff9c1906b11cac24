"""Selection of masks by keys: the bits of a plain partition of all keys, along the fan-in, in memory for a few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from supar_cli.errors import InputError
from supar_cli.planning.plan import Plan
from supar_cli.sparse import masks
from supar_cli.sparse.masks import IndexMap, Mask, RandomKeys, WantedMask, draw, from_matrix, select, to_matrix
from supar_cli.streams import stream
from supar_cli.training import prepare

Array = NDArray[Any]


def smallest(keys: Array, count: int) -> Array:
    """The oracle: True at the `count` smallest keys of each row, by a whole sort of (key, position)."""
    alive = np.zeros(keys.shape, np.bool_)
    np.put_along_axis(alive, np.argsort(keys, axis=1, kind="stable")[:, :count], True, axis=1)
    return alive


def drawn_whole(
    name: str, shape: tuple[int, int], kept: int, density: float, seed: int, pattern: str, block: int = 1
) -> Array:
    """The oracle of `draw`: all keys at once, as the versions before this one drew them."""
    rows, columns = shape[0] // block, shape[1] // block
    keys = stream(seed, f"mask:{name}").random_raw(rows * columns).reshape(rows, columns)
    if pattern == "bernoulli":
        below = Fraction(density)
        return keys < np.uint64(below.numerator * 2**64 // below.denominator)
    if pattern == "fixed_fan_in":
        return smallest(keys, kept // rows)
    if pattern == "2:4":
        return smallest(keys.reshape(-1, 4), 2).reshape(shape)
    return smallest(keys.reshape(1, -1), kept // block**2).reshape(rows, columns).repeat(block, 0).repeat(block, 1)


def blocks_of(mask: Mask, block: int) -> Array:
    """True where a block lives, all blocks being whole."""
    alive = mask.alive()
    parts = alive.reshape(len(alive) // block, block, -1, block)
    assert np.array_equal(parts.all(axis=(1, 3)), parts.any(axis=(1, 3)))
    return parts.any(axis=(1, 3))


@pytest.fixture(params=[8, 64, masks.CHUNK_KEYS], ids=["chunks of 8", "chunks of 64", "one chunk"])
def chunked(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "CHUNK_KEYS", request.param)


@pytest.mark.usefixtures("chunked")
class TestDrawing:
    """The same bits as from all keys at once, whatever the chunks."""

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.integers(1, 40), st.integers(2, 40), st.integers(0, 3), st.data())
    def test_is_that_of_all_keys_at_once(self, rows: int, columns: int, seed: int, data: Any) -> None:
        pattern = data.draw(st.sampled_from(["exact", "fixed_fan_in", "bernoulli", "2:4", "block"]))
        block = 16 if pattern == "block" else 1
        shape = rows * block, columns * (4 if pattern == "2:4" else block)
        size = shape[0] * shape[1]
        if pattern == "2:4":
            kept = size // 2
        elif pattern == "fixed_fan_in":
            kept = rows * data.draw(st.integers(1, columns - 1))
        else:
            kept = block**2 * data.draw(st.integers(1, rows * columns - 1))
        wanted = WantedMask(shape, kept, (1,), pattern, block if pattern == "block" else None)
        mask = draw("w", wanted, kept / size, seed)
        assert np.array_equal(mask.alive(), drawn_whole("w", shape, kept, kept / size, seed, pattern, block))

    @pytest.mark.parametrize("kept", [1, 700, 128 * 96 // 2, 128 * 96 - 1])
    def test_counts_from_one_to_all_but_one(self, kept: int) -> None:
        mask = draw("w", WantedMask((128, 96), kept, (1,)), kept / (128 * 96), 0)
        assert mask.count == kept
        assert np.array_equal(mask.alive(), drawn_whole("w", (128, 96), kept, 0.5, 0, "exact"))


class Given(RandomKeys):
    """Keys that are not random at all; `passes` counts how often they were asked for."""

    def __init__(self, keys: Array) -> None:
        super().__init__(0, "", (1, len(keys)))
        self.keys, self.passes = keys.astype(np.uint64), 0

    def chunks(self, length: int) -> Iterator[NDArray[np.uint64]]:
        self.passes += 1
        for first in range(0, self.size, length):
            yield self.keys[first : first + length]


@pytest.mark.usefixtures("chunked")
class TestBounds:
    """The window of keys that is kept to choose from."""

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, 7), min_size=2, max_size=300), st.integers(0, 61), st.data())
    def test_ties_go_by_position_and_bounds_that_do_not_hold_are_widened(
        self, few: list[int], shift: int, data: Any
    ) -> None:
        keys = np.array(few, np.uint64) << np.uint64(shift)  # a handful of values, mostly far from evenly spread
        kept = data.draw(st.integers(0, len(few)))
        alive = select("exact", Given(keys), kept).alive()
        assert np.array_equal(alive, smallest(keys[None], kept))

    def test_random_keys_take_one_pass_and_crowded_ones_several(self) -> None:
        random = Given(stream(0, "x").random_raw(40_000))
        crowded = Given(random.keys >> np.uint64(8))
        lifted = Given(~crowded.keys)
        for keys, passes in ((random, 1), (crowded, 2), (lifted, 2)):
            mask = select("exact", keys, 10_000)
            assert np.array_equal(mask.alive(), smallest(keys.keys[None], 10_000)) and keys.passes >= passes
        assert random.passes == 1

    def test_the_largest_key_can_live(self) -> None:
        keys = np.full(20, 2**64 - 1, np.uint64)
        assert select("exact", Given(keys), 19).live().tolist() == list(range(19))
        assert select("exact", Given(keys), 20).count == 20


class TestAnyKeys:
    """Magnitudes and gradients choose as random keys do."""

    def test_equal_keys_lose_no_count(self) -> None:
        keys = np.array([[5.0, 3, 3, 3, 9], [1, 1, 1, 1, 1], [4, 2, 8, 6, 0]])
        assert select("fixed_fan_in", keys, 6).live().tolist() == [1, 2, 5, 6, 11, 14]
        assert select("exact", keys, 6).live().tolist() == [5, 6, 7, 8, 9, 14]

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.booleans(), st.data())
    def test_the_largest_magnitudes_stay(self, rows: int, groups: int, seed: int, tied: bool, data: Any) -> None:
        weights = np.random.default_rng(seed).standard_normal((rows, 4 * groups)).astype(np.float32)
        weights = np.round(weights) if tied else weights
        kept = data.draw(st.integers(0, rows * 4 * groups))
        assert np.array_equal(
            select("exact", -abs(weights), kept).alive().ravel(), smallest(-abs(weights).reshape(1, -1), kept)[0]
        )
        per_group = select("2:4", -abs(weights), 2 * rows * groups).alive().reshape(-1, 4)
        assert np.array_equal(per_group, smallest(-abs(weights).reshape(-1, 4), 2))
        per_row = select("fixed_fan_in", -abs(weights), rows * groups).alive()
        assert np.array_equal(per_row, smallest(-abs(weights), groups))

    def test_bernoulli_without_a_density_is_exact(self) -> None:
        keys = -np.arange(12.0).reshape(3, 4)
        assert select("bernoulli", keys, 5) == select("exact", keys, 5)

    def test_blocks_have_a_key_each(self) -> None:
        mask = select("block", np.array([[3.0, 1.0], [0.0, 2.0], [9.0, 9.0]]), 2 * 256, block=16)
        assert mask.shape == (48, 32) and mask.count == 512
        assert mask.alive()[:16, 16:].all() and mask.alive()[16:32, :16].all()

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([16, 32]), st.integers(0, 99), st.data())
    def test_even_rows_of_blocks_differ_by_at_most_one(
        self, rows: int, columns: int, block: int, seed: int, data: Any
    ) -> None:
        blocks = data.draw(st.integers(0, rows * columns))
        wanted = WantedMask((rows * block, columns * block), blocks * block**2, (1,), "block", block, even_rows=True)
        parts = blocks_of(draw("w", wanted, blocks / (rows * columns), seed), block)
        assert parts.sum() == blocks and set(parts.sum(axis=1).tolist()) <= {blocks // rows, -(-blocks // rows)}
        # of these the smallest keys, by the oracle: each row's first ones, then the rows whose next one is smallest
        keys = stream(seed, "mask:w").random_raw(rows * columns).reshape(rows, columns)
        each, left = divmod(blocks, rows)
        expected = smallest(keys, each)
        if left:
            following = np.sort(keys, axis=1)[:, each]
            for row in np.argsort(following)[:left]:
                expected[row, keys[row] == following[row]] = True
        assert np.array_equal(parts, expected)

    def test_the_draw_of_older_plans_does_not(self) -> None:
        """Rows of 16 blocks, 64 in 16 rows: at random they differ by several, and which rows have more is the seed's."""
        uneven, longer = 0, set[tuple[int, ...]]()
        for seed in range(20):
            for kept, even in ((64, False), (70, True)):
                wanted = WantedMask((256, 256), kept * 256, (1,), "block", 16, even)
                counts = blocks_of(draw("w", wanted, kept / 256, seed), 16).sum(axis=1)
                uneven += not even and counts.max() - counts.min() > 1
                longer |= {tuple(np.flatnonzero(counts == 5))} if even else set()
        assert uneven == 20 == len(longer) and set(range(16)) == {row for rows in longer for row in rows}

    def test_pruned_blocks_are_the_largest_of_each_row(self) -> None:
        keys = -np.array([[9.0, 8.0, 7.0], [1.0, 3.0, 2.0], [6.0, 5.0, 4.0]])
        parts = blocks_of(select("block", keys, 4 * 256, block=16, even_rows=True), 16)
        assert parts.tolist() == [[True, True, False], [False, True, False], [True, False, False]]
        tied = blocks_of(select("block", np.zeros((3, 3)), 4 * 256, block=16, even_rows=True), 16)
        assert tied.tolist() == [[True, True, False], [True, False, False], [True, False, False]]
        with pytest.raises(ValueError, match="10 live blocks; expected 0 to 9"):
            select("block", keys, 10 * 256, block=16, even_rows=True)

    def test_infinite_keys_die_first_and_numbers_that_are_none_are_refused(self) -> None:
        keys = np.array([[np.inf, 1.0, np.inf, -np.inf]])
        assert select("exact", keys, 3).live().tolist() == [0, 1, 3]
        with pytest.raises(ValueError, match="a key is not a number"):
            select("exact", np.array([[1.0, np.nan]]), 1)

    @pytest.mark.parametrize(
        ("pattern", "shape", "kept", "message"),
        [
            ("exact", (4, 8), 33, "33 live weights; expected 0 to 32"),
            ("exact", (4, 8), -1, "-1 live weights; expected 0 to 32"),
            ("fixed_fan_in", (4, 8), 9, "9 of 4×8 weights are not fixed_fan_in along the rows"),
            ("block", (32, 32), 300, "300 live weights; expected a multiple of 16×16"),
            ("block", (32, 40), 512, "16×16 blocks don't divide the shape 32×40"),
            ("2:4", (4, 8), 15, "15 of 4×8 weights are not 2:4 along the rows"),
            ("2:4", (4, 6), 12, "12 of 4×6 weights are not 2:4 along the rows"),
        ],
    )
    def test_a_count_that_is_not_the_patterns_is_refused(
        self, pattern: str, shape: tuple[int, int], kept: int, message: str
    ) -> None:
        with pytest.raises(InputError, match=f"^w: kept: {message}"):
            draw("w", WantedMask(shape, kept, (1,), pattern, 16 if pattern == "block" else None), 0.5, 0)


def per_neuron(alive: Array, fan_in_axes: Sequence[int]) -> set[int]:
    """Live weights feeding an output: a count along the axes, with no word of matrices."""
    return set(np.count_nonzero(alive, axis=tuple(fan_in_axes)).ravel().tolist())


AXES = {  # shape as stored, fan-in axes
    "linear": ((24, 32), (1,)),
    "Conv1D": ((32, 24), (0,)),
    "convolution": ((6, 8, 3, 4), (1, 2, 3)),
    "convolution, channels last": ((3, 4, 8, 6), (2, 0, 1)),
    "experts": ((4, 6, 32), (2,)),
}


class TestAxes:
    """Patterns go along the fan-in, wherever it lies."""

    @pytest.mark.parametrize("case", AXES)
    @pytest.mark.parametrize("pattern", ["fixed_fan_in", "2:4"])
    def test_every_neuron_has_as_many(self, case: str, pattern: str) -> None:
        shape, axes = AXES[case]
        fan_in, size = int(np.prod([shape[axis] for axis in axes])), int(np.prod(shape))
        mask = draw("w", WantedMask(shape, size // 2, axes, pattern), 0.5, 0)
        assert mask.shape == shape and mask.count == size // 2
        assert per_neuron(mask.alive(), axes) == {fan_in // 2}

    @pytest.mark.parametrize("case", AXES)
    def test_a_wrong_axis_is_seen(self, case: str) -> None:
        """Planted: fan-out taken for fan-in, as if every weight were stored the other way round."""
        shape, axes = AXES[case]
        wrong_axes = tuple(axis for axis in range(len(shape)) if axis not in axes)
        wrong = draw("w", WantedMask(shape, int(np.prod(shape)) // 2, wrong_axes, "fixed_fan_in"), 0.5, 0)
        assert len(per_neuron(wrong.alive(), axes)) > 1

    def test_prepare_follows_the_rows_axes(self, plan_of: Callable[..., Plan]) -> None:
        plan = plan_of(target={"sparsity": {"density": 0.25, "pattern": "fixed_fan_in"}})
        rows = [row.model_copy(update={"fan_in_axes": [0]}) if row.site == "mlp.up" else row for row in plan.tensors]
        found = prepare.draw_masks(plan.model_copy(update={"tensors": rows}))
        for name, mask in found.items():
            axes, other = ((0,), (1,)) if name.endswith("mlp.up") else ((1,), (0,))
            assert len(per_neuron(mask.alive(), axes)) == 1 < len(per_neuron(mask.alive(), other)), name

    def test_storage_changes_nothing_in_the_matrix(self) -> None:
        """A linear weight and its Conv1D, a convolution and its channels-last twin: one matrix, one mask."""
        for (one, axes), (other, other_axes), order in (
            (AXES["linear"], AXES["Conv1D"], (1, 0)),
            (AXES["convolution"], AXES["convolution, channels last"], (2, 3, 1, 0)),
        ):
            size = int(np.prod(one))
            for pattern, kept in (("exact", 77), ("fixed_fan_in", size // 8), ("2:4", size // 2), ("bernoulli", 77)):
                first = draw("w", WantedMask(one, kept, axes, pattern), kept / size, 3)
                second = draw("w", WantedMask(other, kept, other_axes, pattern), kept / size, 3)
                assert np.array_equal(to_matrix(first.alive(), axes), to_matrix(second.alive(), other_axes))
                assert np.array_equal(first.alive().transpose(order), second.alive())

    @pytest.mark.usefixtures("chunked")
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99), st.data())
    def test_a_matrix_goes_back_to_where_it_came_from(self, shape: list[int], seed: int, data: Any) -> None:
        axes = data.draw(st.permutations(range(len(shape))))[: data.draw(st.integers(1, len(shape)))]
        alive = np.random.default_rng(seed).random(shape) < 0.4
        assert np.array_equal(from_matrix(Mask.of(to_matrix(alive, axes)), shape, axes).alive(), alive)


class TestCarrying:
    """Values under another mask: survivors keep theirs, whatever else moves."""

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
    def test_is_that_of_whole_arrays(self, rows: int, columns: int, first: float, second: float, seed: int) -> None:
        random = np.random.default_rng(seed)
        old, new = (random.random((rows, columns)) < density for density in (first, second))
        whole = random.standard_normal((rows, columns)).astype(np.float32)
        wanted = np.where(old, whole, np.float32(7.5))[new]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(masks, "CHUNK_BYTES", 5)
            index = IndexMap.between(Mask.of(old), Mask.of(new))
        moved = index.carry(torch.from_numpy(whole[old]), 7.5)
        assert moved.dtype == torch.float32 and np.array_equal(moved.numpy(), wanted)
        assert index.count == new.sum() and len(index.old) == len(index.new) == (old & new).sum()

    def test_what_grows_is_zero_unless_said(self) -> None:
        old, new = Mask.of(np.array([[True, False, True]])), Mask.of(np.array([[False, True, True]]))
        index = IndexMap.between(old, new)
        assert index.carry(torch.tensor([1.0, 2.0])).tolist() == [0.0, 2.0]
        assert index.carry(torch.tensor([1, 2]), 5).tolist() == [5, 2]

    def test_another_shape_is_refused(self) -> None:
        with pytest.raises(ValueError, match="can't become one of shape"):
            IndexMap.between(Mask.of(np.ones((2, 3), bool)), Mask.of(np.ones((3, 2), bool)))
