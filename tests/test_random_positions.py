"""Masks whose live weights are drawn: the order that is written down, every set equally likely, and a time that follows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from math import comb, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from supar_cli.sparse import masks, packed_bits, random_positions
from supar_cli.sparse.masks import Mask, WantedMask
from supar_cli.streams import stream

Array = NDArray[Any]
ALLOWED = 6.0  # standard errors: false alarms below 2e-9 each; all seeds are fixed


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of drawing, and parts of both, in matrices of a few weights."""
    monkeypatch.setattr(random_positions, "DRAWN_SHARE", 4)
    monkeypatch.setattr(random_positions, "WHOLE_KEYS", 16)


def drawn(shape: tuple[int, int], kept: int, *, seed: int = 0, pattern: str = "exact", name: str = "w") -> Array:
    mask = masks.draw(name, WantedMask(shape, kept, (1,), pattern, draw="live"), kept / (shape[0] * shape[1]), seed)
    assert mask == Mask.of(mask.alive())
    return mask.alive()


def order_of(row: int, rows: int, columns: int, share: int = 4, whole: int = 16) -> list[int]:
    """The oracle: all columns of a row of the stream (0, "mask:w") in their order, one number after another."""
    draws, order = stream(0, "mask:w", 1).random_raw(rows * 64 * columns)[row::rows], list[int]()
    for word in draws & np.uint64(2 ** (columns - 1).bit_length() - 1):
        if len(order) < columns // share and word < columns and word not in order:
            order.append(int(word))
    source, length, keys = stream(0, "mask:w", 2), -(-columns // 64) * 64, dict[int, tuple[int, ...]]()
    bits = []
    for _ in range((rows * columns // whole).bit_length()):
        words = source.random_raw(rows * length // 64).astype("<u8").reshape(rows, -1)[row]
        bits.append(1 - np.unpackbits(words.view(np.uint8)))
    left, whole_keys = Counter[tuple[int, ...]](), source.random_raw(rows * columns)
    for column in sorted(set(range(columns)) - set(order)):
        first = tuple(int(bit[column]) for bit in bits)
        keys[column] = (*first, int(whole_keys[rows * left[first] + row]), column)
        left[first] += 1
    return order + sorted(keys, key=keys.__getitem__)


class TestOrder:
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(st.integers(1, 12), st.integers(1, 150), st.sampled_from([7, 64, 2**18]), st.data())
    def test_is_the_oracles_and_chunks_change_nothing(self, rows: int, columns: int, chunk: int, data: Any) -> None:
        """So the fewer live within the more."""
        each = data.draw(st.integers(0, columns))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random_positions, "CHUNK_DRAWS", chunk)
            alive = drawn((rows, columns), rows * each, pattern="fixed_fan_in")
            for row in range(rows):
                assert set(np.flatnonzero(alive[row])) == set(order_of(row, rows, columns)[:each])
            exact = drawn((1, columns), each)
        assert set(np.flatnonzero(exact)) == set(order_of(0, 1, columns)[:each])

    @pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (40, 33), (128, 96)])
    def test_counts_from_none_to_all_each_within_the_next(self, shape: tuple[int, int]) -> None:
        size, before = shape[0] * shape[1], np.zeros(shape, np.bool_)
        for kept in (0, 1, 2, size // 9, size // 4, size // 4 + 1, size // 2, size - 1, size):
            alive = drawn(shape, kept)
            assert int(alive.sum()) == kept and not (before & ~alive).any()
            before = alive

    @pytest.mark.parametrize("rows", [5, 8])
    def test_rows_of_one_byte_are_whole_masks(self, rows: int) -> None:
        """A view of every eighth byte can be neither hashed nor counted."""
        alive = drawn((rows, 8), 3 * rows, pattern="fixed_fan_in")
        bits = random_positions.random_positions(0, "mask:w", rows, 8, 3)
        assert Mask((rows, 8), bits).fingerprint == Mask.of(alive).fingerprint

    def test_bernoulli_masks_lie_within_those_of_higher_density(self) -> None:
        for seed in range(20):
            several = [drawn((40, 33), kept, seed=seed, pattern="bernoulli") for kept in (5, 131, 132, 660, 1300)]
            assert all(not (low & ~high).any() for low, high in pairwise(several))


class Planted:
    """A stream with a fault, in the place of Philox."""

    def __init__(self, fault: str, seed: int, name: str, position: int = 0) -> None:
        self.fault, self.source = fault, stream(seed, name, position)
        self.state = int(self.source.random_raw())

    def random_raw(self, count: int) -> Array:
        words = self.source.random_raw(count)
        if self.fault == "linear congruence":  # its low bits have short periods
            for i in range(count):
                self.state = (6364136223846793005 * self.state + 1442695040888963407) % 2**64
                words[i] = self.state
        elif self.fault == "bits that lean":  # 3 of 4 are 0
            words &= ~words.byteswap()
        elif self.fault == "a word for two":
            words[1::2] = words[: 2 * (count // 2) : 2]
        return words


FAULTS = {"exact": ("linear congruence", "bits that lean"), "fixed_fan_in": ("a word for two", "bits that lean")}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda fault: monkeypatch.setattr(random_positions, "stream", lambda *of: Planted(fault, *of))


def chi_square_z(counts: Array, mean: float, variance: float) -> float:
    """Squares of counts that are asked for a sum, against chi² with one degree of freedom fewer, in standard errors."""
    freedom = counts.size - 1
    return float(((counts - mean) ** 2).sum() / variance * freedom / counts.size - freedom) / sqrt(2 * freedom)


class TestChance:
    @staticmethod
    def sets_z(pattern: str, rows: int, columns: int, each: int, sets: int, samples: int) -> float:
        """How evenly the possible masks of a tiny matrix are drawn."""
        found = Counter(drawn((rows, columns), each, seed=seed, pattern=pattern).tobytes() for seed in range(samples))
        assert len(found) <= sets
        counts = np.array([*found.values(), *[0] * (sets - len(found))])
        return chi_square_z(counts, samples / sets, samples / sets * (1 - 1 / sets))

    @pytest.mark.parametrize("shape", ["exact 2 4 4", "exact 1 8 1", "fixed_fan_in 2 5 4", "fixed_fan_in 3 4 3"])
    def test_every_mask_is_equally_likely(self, shape: str, plant: Callable[[str], None]) -> None:
        """n = 10 a mask of up to 210, in positions that are drawn, that are chosen, and of both."""
        pattern, *sizes = shape.split()
        rows, columns, each = map(int, sizes)
        sets = comb(rows * columns, each) if pattern == "exact" else comb(columns, each // rows) ** rows
        assert abs(self.sets_z(pattern, rows, columns, each, sets, 10 * sets)) < ALLOWED
        plant("bits that lean")
        assert self.sets_z(pattern, rows, columns, each, sets, 10 * sets) > ALLOWED

    @staticmethod
    def structure_z(shape: tuple[int, int], kept: int, pattern: str = "exact", samples: int = 12) -> dict[str, float]:
        """Counts of rows, columns, rests of positions by powers of two, and pairs of neighbours, all against chance."""
        size, density = shape[0] * shape[1], kept / (shape[0] * shape[1])
        several = np.array([drawn(shape, kept, seed=seed, pattern=pattern) for seed in range(samples)])
        correction = (1 - density) * size / (size - 1)  # variance of a hypergeometric count, over its mean
        found = {}
        for what, counts in {
            "columns": several.sum(axis=1),
            "rows": several.sum(axis=2),
            **{f"mod {2**power}": several.reshape(samples, -1, 2**power).sum(axis=1) for power in (1, 3, 5, 7)},
        }.items():
            if what == "rows" and pattern != "exact":
                continue
            mean = kept / counts.shape[1]
            z = [chi_square_z(one, mean, mean * correction * (1 - 1 / counts.shape[1])) for one in counts]
            found[what] = abs(sum(z)) / sqrt(samples)
        for what, one, other in (
            ("beside", several[:, :, 1:], several[:, :, :-1]),
            ("below", several[:, 1:], several[:, :-1]),
            ("in another mask", several[1:], several[:-1]),
        ):
            in_row = (kept / shape[0] - 1) / (shape[1] - 1)  # of the next weight, beside one that lives
            next_to_one = in_row if what == "beside" and pattern != "exact" else density
            mean = one.size * density * next_to_one
            found[what] = abs(float((one & other).sum()) - mean) / sqrt(mean * (1 + 2 * density))
        return found

    CASES = ((384, 640), 384 * 640 // 128), ((384, 640), 384 * 640 // 3), ((256, 256), 4096), ((1152, 128), 20_000)

    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("pattern", ["exact", "fixed_fan_in"])
    def test_masks_have_no_structure(self, case: Any, pattern: str) -> None:
        """n = 12 masks each; the statistics are sums over them in standard errors."""
        (rows, columns), kept = case
        kept = kept if pattern == "exact" else kept // rows * rows
        found = self.structure_z((rows, columns), kept, pattern)
        assert max(found.values()) < ALLOWED, found

    @pytest.mark.parametrize(
        ("pattern", "fault"), [(pattern, fault) for pattern in FAULTS for fault in FAULTS[pattern]]
    )
    def test_faults_of_the_stream_are_seen(self, pattern: str, fault: str, plant: Callable[[str], None]) -> None:
        plant(fault)
        found = self.structure_z((256, 256), 4096, pattern, samples=3)
        assert max(found.values()) > ALLOWED, found

    def test_random_counts_are_binomial(self, plant: Callable[[str], None]) -> None:
        """n = 4000 counts of 7 at .3; control: bits that lean."""

        def z() -> float:
            found = Counter(random_positions.random_count(seed, "w", 7, Fraction(0.3)) for seed in range(4000))
            chances = [comb(7, live) * 0.3**live * 0.7 ** (7 - live) for live in range(8)]
            squares = [(found[live] - 4000 * chance) ** 2 / (4000 * chance) for live, chance in enumerate(chances)]
            return (sum(squares) - 7) / sqrt(14)

        assert abs(z()) < ALLOWED
        plant("bits that lean")
        assert z() > ALLOWED


class Counted:
    """Philox, and how many numbers were drawn of it in all."""

    drawn = 0

    def __init__(self, *of: Any) -> None:
        self.source = stream(*of)

    def random_raw(self, count: int) -> Array:
        Counted.drawn += count
        return self.source.random_raw(count)


@pytest.fixture
def count_drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], int]]:
    """Numbers drawn for a mask of a width at 16 live weights a neuron."""
    monkeypatch.undo()  # the real constants
    for module in (random_positions, masks):
        monkeypatch.setattr(module, "stream", Counted)

    def count(width: int, draw: str, pattern: str = "exact") -> int:
        Counted.drawn, wanted = 0, WantedMask((64, width), 1024, (1,), pattern, draw=draw)  # type: ignore[arg-type]
        assert masks.draw("w", wanted, 16 / width, 0).count == 1024
        return Counted.drawn

    return count


@pytest.mark.parametrize("pattern", ["exact", "fixed_fan_in"])
def test_what_is_drawn_follows_the_live_weights(count_drawn: Callable[..., int], pattern: str) -> None:
    """Where width is no power of two, up to two draws a weight; the control: a key a position."""
    for width in (1024, 2048, 8192, 32768, 49152):
        assert count_drawn(width, "live", pattern) < 1024 * (1.4 if width != 49152 else 1.8)
        assert count_drawn(width, "positions", pattern) == 64 * width


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 700), st.floats(0, 1), st.integers(0, 99), st.sampled_from([3, 8, 2**18]))
def test_packed_bits_are_found_and_counted(size: int, density: float, seed: int, chunk: int) -> None:
    random = np.random.default_rng(seed)
    alive, more = random.random(size) < density, random.integers(0, max(size, 1), min(size, 20))
    bits = np.packbits(alive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_bits, "CHUNK_BYTES", chunk)
        assert packed_bits.count_ones(bits) == int(alive.sum())
        assert np.array_equal(packed_bits.positions_of_ones(bits, int(alive.sum())), np.flatnonzero(alive))
    assert np.array_equal(packed_bits.are_ones(bits, more), alive[more])
    packed_bits.set_ones(bits, more)
    alive[more] = True
    assert np.array_equal(bits, np.packbits(alive))
