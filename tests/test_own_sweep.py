"""Sweeps of models of the user's own, made by a command; and how the runs of several seeds become one number."""

from __future__ import annotations

import numpy as np
import pytest

from supar_cli.experiments.statistics import interquartile_mean


class TestInterquartileMean:
    @pytest.mark.parametrize("count", range(1, 14))
    def test_is_the_mean_of_the_middle_half_of_each_value_repeated_four_times(self, count: int) -> None:
        """Four copies of each value are a number divisible by 4 with the same distribution: nothing counts in part there."""
        values = np.random.default_rng(count).standard_cauchy((3, count, 2))
        copies = np.sort(np.repeat(values, 4, axis=1), axis=1)
        assert np.allclose(interquartile_mean(values, axis=1), copies[:, count : 3 * count].mean(1), rtol=1e-12)

    def test_an_outlier_of_eight_moves_the_mean_alone(self) -> None:
        values = np.arange(8.0)
        hurt = np.append(values[:-1], 1e6)
        assert interquartile_mean(hurt) == interquartile_mean(values) == 3.5 and hurt.mean() > 1e5
