"""Masks: exact counts, one mask for one (seed, name) wherever it is drawn, uniform over positions, and the same for ever."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from supar_cli.planning import layout, patterns
from supar_cli.planning.plan import Plan
from supar_cli.sparse import masks, packed_bits
from supar_cli.sparse.masks import Mask, WantedMask
from supar_cli.training import prepare

from .conftest import environment

MakePlan = Callable[..., Plan]

BLOCKS = "caea685f9fc1b5e7"
EVEN_BLOCKS = "dc9f3ae90abee72b"
LIVE = {
    ((256, 64), 131, "exact"): "3bab1ec7b3c18e46",
    ((256, 64), 5000, "exact"): "45af9f894b13e15e",
    ((256, 64), 131, "bernoulli"): "fc069e47abfd3893",
    ((300, 100), 300, "fixed_fan_in"): "27ed6d0208ea0ab4",
    ((300, 100), 9000, "fixed_fan_in"): "5e59531cda2dbf03",
    ((600, 1100), 1300, "exact"): "c142de49d8694ee6",
    ((1024, 1024), 300000, "exact"): "d5ec0e5337eef217",
    ((2048, 8192), 131072, "fixed_fan_in"): "741922a91f1afd1c",
}
EXACT, FIXED_FAN_IN, BERNOULLI = "392c00f9093754e3", "0ab2c369c1593423", "392c00f9093754e3"

DRAWS = pytest.mark.parametrize("draw", ["positions", "live"])


def drawn(
    shape: tuple[int, int],
    kept: int,
    *,
    name: str = "w",
    seed: int = 0,
    pattern: str = "exact",
    draw: patterns.Draw = "positions",
) -> NDArray[Any]:
    wanted = WantedMask(shape, kept, (1,), pattern, draw=draw)
    mask = masks.draw(name, wanted, kept / (shape[0] * shape[1]), seed)
    assert mask == Mask.of(mask.alive())
    return mask.alive()


def fingerprint(alive: NDArray[np.bool_]) -> str:
    return Mask.of(alive).fingerprint


shapes = st.tuples(st.integers(1, 40), st.integers(2, 40))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(shapes, st.data())
def test_exact_keeps_exactly_as_many_as_planned(shape: tuple[int, int], data: Any) -> None:
    size = shape[0] * shape[1]
    kept = data.draw(st.integers(1, size - 1))
    mask = drawn(shape, kept)
    assert mask.shape == shape and mask.dtype == bool and int(mask.sum()) == kept


@settings(max_examples=200, deadline=None, derandomize=True)
@given(shapes, st.data())
def test_fixed_fan_in_keeps_as_many_in_every_row(shape: tuple[int, int], data: Any) -> None:
    per_row = data.draw(st.integers(1, shape[1] - 1))
    mask = drawn(shape, per_row * shape[0], pattern="fixed_fan_in")
    assert set(mask.sum(axis=1)) == {per_row}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shapes, st.decimals("0.001", "1", places=3))
def test_the_planned_count_is_the_density_rounded(shape: tuple[int, int], density: Any) -> None:
    tensor = layout.Tensor("blocks.0.mlp.up", "hidden", "mlp.up", shape, (1,), 0)
    size = shape[0] * shape[1]
    kept = patterns.live_count(tensor.name, tensor.size, tensor.fan_in, Fraction(density), "exact", None)
    assert abs(kept.count - float(density) * size) <= 0.5 or kept.count == 1
    assert kept.density == float(density)


class TestPacked:
    """A mask is one bit a weight; what it says is what numpy says of the whole array."""

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 99), st.data())
    def test_says_what_the_array_says(self, shape: list[int], density: float, seed: int, data: Any) -> None:
        alive = np.random.default_rng(seed).random(shape) < density
        mask = Mask.of(alive)
        assert (mask.shape, mask.size, mask.count) == (alive.shape, alive.size, int(alive.sum()))
        assert mask.bits.nbytes == (alive.size + 7) // 8
        first, last = (data.draw(st.none() | st.integers(-15, 15)) for _ in range(2))
        rows = slice(first, last, data.draw(st.sampled_from([None, 1, 2, 3])))
        assert np.array_equal(mask.alive(), alive) and np.array_equal(mask.alive(rows), alive[rows])
        assert mask.live().dtype == np.int64 and np.array_equal(mask.live(), np.flatnonzero(alive))

    def test_chunks_join(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alive = np.random.default_rng(0).random((37, 53)) < 0.3
        monkeypatch.setattr(packed_bits, "CHUNK_BYTES", 3)
        assert np.array_equal(Mask.of(alive).live(), np.flatnonzero(alive)) and Mask.of(alive).count == alive.sum()

    def test_equal_are_those_of_the_same_shape_and_weights(self) -> None:
        mask = Mask.of(np.eye(4, dtype=bool))
        assert mask == Mask.of(np.eye(4, dtype=bool)) and hash(mask) == hash(Mask.of(np.eye(4, dtype=bool)))
        assert mask != Mask((2, 8), mask.bits) and mask != Mask.of(~np.eye(4, dtype=bool)) and mask != 1

    def test_other_bits_are_refused(self) -> None:
        for shape, bits in (((3, 3), [0]), ((3, 3), [0, 0, 0]), ((3, 3), [0, 1])):
            with pytest.raises(ValueError, match="packed bits"):
                Mask(shape, np.array(bits, np.uint8))
        with pytest.raises(ValueError, match="packed bits"):
            Mask((2, 4), np.zeros(1, np.int8))  # type: ignore[arg-type]
        assert Mask((3, 3), np.array([0, 0x80], np.uint8)).live().tolist() == [8]


class TestIdentity:
    def test_the_mask_of_a_seed_and_a_name_never_changes(self) -> None:
        """A changed literal means that no run of an earlier version can be repeated: **Numbers** in the changelog."""
        assert fingerprint(drawn((256, 64), 131)) == EXACT
        assert fingerprint(drawn((256, 64), 256, pattern="fixed_fan_in")) == FIXED_FAN_IN
        assert fingerprint(drawn((256, 64), 131, pattern="bernoulli")) == BERNOULLI

    def test_nor_does_the_one_of_new_plans(self) -> None:
        """Below and above a 64th, where their draws differ, in rows that end within bytes, and of more than one chunk."""
        for (shape, kept, pattern), wanted in LIVE.items():
            assert fingerprint(drawn(shape, kept, pattern=pattern, draw="live")) == wanted, (shape, kept, pattern)

    def test_depends_on_seed_and_name_only(self, plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        plan, deeper = plan_of(), plan_of(target={"layers": 3})
        reordered = plan.model_copy(update={"tensors": plan.tensors[::-1]})
        own, other, backwards = prepare.draw_masks(plan), prepare.draw_masks(deeper), prepare.draw_masks(reordered)
        assert set(other) - set(own) and all(own[name] == other[name] for name in own)
        assert all(own[name] == backwards[name] for name in own)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        assert prepare.draw_masks(plan) == own
        reseeded = prepare.draw_masks(plan_of(target={"seed": 7}))
        assert not any(own[name] == reseeded[name] for name in own)

    def test_another_process_draws_the_same(self) -> None:
        code = "from tests.test_masks import drawn, fingerprint; print(fingerprint(drawn((256, 64), 131)))"
        env = environment(PYTHONHASHSEED="123", OMP_NUM_THREADS="1")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.strip() == EXACT

    def test_dense_tensors_have_none(self, plan_of: MakePlan) -> None:
        assert prepare.draw_masks(plan_of(target={"sparsity": {"density": 1.0}})) == {}

    def test_the_fingerprint_sees_one_weight(self) -> None:
        mask = drawn((16, 16), 20)
        moved = mask.copy()
        moved.flat[[int(np.argmax(mask)), int(np.argmin(mask))]] = False, True
        assert fingerprint(moved) != fingerprint(mask) and Mask.of(moved) != Mask.of(mask)


class TestChance:
    """Each test: n draws, a statistic of known standard error, 6 of them allowed: false alarms below 2e-9. Seeds are fixed."""

    ALLOWED = 6.0
    SHAPE, KEPT = (64, 64), 410  # density 0.1

    def overlap_z(self, one: NDArray[Any], other: NDArray[Any]) -> float:
        """How far the overlap of two masks is from that of independent ones, in standard errors (hypergeometric)."""
        size, a, b = one.size, int(one.sum()), int(other.sum())
        mean = a * b / size
        return (int((one & other).sum()) - mean) / sqrt(mean * (1 - a / size) * (1 - b / size) * size / (size - 1))

    @DRAWS
    def test_other_names_and_seeds_are_independent(self, draw: patterns.Draw) -> None:
        places = [(f"blocks.{i}.mlp.up", seed) for i in range(12) for seed in (0, 1, 2**62)]
        several = [drawn(self.SHAPE, self.KEPT, name=name, seed=seed, draw=draw) for name, seed in places]
        found = [abs(self.overlap_z(a, b)) for i, a in enumerate(several) for b in several[:i]]
        assert len(found) == 630 and max(found) < self.ALLOWED

    def test_independence_would_be_missed_by_neither_a_copy_nor_a_shift(self) -> None:
        mask = drawn(self.SHAPE, self.KEPT)
        half = np.where(np.arange(64)[:, None] < 32, mask, drawn(self.SHAPE, self.KEPT, name="other"))
        assert self.overlap_z(mask, mask) > 10 * self.ALLOWED and self.overlap_z(mask, half) > self.ALLOWED

    def per_position_z(self, several: list[NDArray[Any]]) -> NDArray[Any]:
        """How often each position lives, against the density, in standard errors (binomial over n masks)."""
        density = several[0].mean()
        return (np.mean(several, axis=0) - density) / sqrt(density * (1 - density) / len(several))

    @DRAWS
    @pytest.mark.parametrize("pattern", ["exact", "fixed_fan_in"])
    def test_every_position_lives_equally_often(self, pattern: str, draw: patterns.Draw) -> None:
        """n = 2000 masks of 16×16 at density 1/8: standard error 0.0074 a position, over 256 positions."""
        several = [drawn((16, 16), 32, seed=seed, pattern=pattern, draw=draw) for seed in range(2000)]
        z = self.per_position_z(several)
        assert np.abs(z).max() < self.ALLOWED
        assert 0.7 < float(np.mean(z**2)) < 1.3  # 256 squares: standard error 0.09; more even than chance is wrong too
        tilted = [mask if i % 20 else np.sort(mask, axis=1) for i, mask in enumerate(several)]
        assert np.abs(self.per_position_z(tilted)).max() > self.ALLOWED

    @DRAWS
    def test_bernoulli_counts_vary_as_they_should(self, draw: patterns.Draw) -> None:
        """n = 400 masks of 64×64 at 410/4096: counts have the deviation 19.2, known to 3.5 %; their mean to 0.96."""
        several = (drawn(self.SHAPE, self.KEPT, seed=seed, pattern="bernoulli", draw=draw) for seed in range(400))
        counts = [int(mask.sum()) for mask in several]
        deviation = sqrt(self.KEPT * (1 - self.KEPT / 4096))
        assert abs(np.mean(counts) - self.KEPT) < self.ALLOWED * deviation / sqrt(400)
        assert abs(np.std(counts) / deviation - 1) < self.ALLOWED / sqrt(800)
        assert np.std([int(drawn(self.SHAPE, self.KEPT, seed=seed).sum()) for seed in range(3)]) == 0


class TestBlocks:
    """Whole aligned blocks, as many as planned, drawn as single weights are."""

    def drawn(self, shape: tuple[int, int], blocks: int, block: int, **of: Any) -> NDArray[Any]:
        kept = blocks * block**2
        density = kept / (shape[0] * shape[1])
        wanted = WantedMask(shape, kept, (1,), "block", block)
        return masks.draw(of.get("name", "w"), wanted, density, of.get("seed", 0)).alive()

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([16, 32]), st.data())
    def test_exactly_as_many_each_whole(self, rows: int, columns: int, block: int, data: Any) -> None:
        blocks = data.draw(st.integers(0 if rows * columns == 1 else 1, max(rows * columns - 1, 0)))
        if not blocks:
            return
        mask = self.drawn((rows * block, columns * block), blocks, block)
        parts = mask.reshape(rows, block, columns, block).sum(axis=(1, 3))
        assert sorted(set(parts.flat) - {0}) == [block**2] and int((parts > 0).sum()) == blocks

    def test_another_name_or_seed_is_another_mask_and_the_same_is_the_same(self) -> None:
        first = self.drawn((320, 640), 40, 32)
        assert (first == self.drawn((320, 640), 40, 32)).all()
        assert (first != self.drawn((320, 640), 40, 32, name="v")).any()
        assert (first != self.drawn((320, 640), 40, 32, seed=1)).any()
        assert fingerprint(first) == BLOCKS
        wanted = WantedMask((320, 640), 40 * 32**2, (1,), "block", 32, even_rows=True)
        assert masks.draw("w", wanted, 0.2, 0).fingerprint == EVEN_BLOCKS

    def test_training_keeps_to_the_blocks(self, plan_of: MakePlan) -> None:
        from supar_cli.training.trainer import Trainer

        wanted = {"width": 64, "sparsity": {"density": 0.25, "pattern": "block", "block": 16}}
        losses = {}
        for engine in ("dense", "sparse", "block"):
            trainer = Trainer(plan_of(target=wanted, run={"engine": engine}))
            losses[engine] = [trainer.step()[0] for _ in range(6)]
            for name, mask in trainer.sparse_model.masks.items():
                alive = (trainer.sparse_model.weight(name) != 0).numpy()
                assert (alive == mask.alive()).all()
                parts = alive.reshape(alive.shape[0] // 16, 16, -1, 16).sum(axis=(1, 3))
                assert set(parts.flat) == {0, 256} and parts.sum() == alive.size // 4
        assert losses["block"] == pytest.approx(losses["dense"], abs=1e-5)
        assert losses["sparse"] == pytest.approx(losses["dense"], abs=1e-5)
