"""Layers refreshed by one scatter have the weights that each layer's own refresh makes, also when masks move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from supar_cli.planning.plan import Plan
from supar_cli.sparse.csr import Sparse
from supar_cli.sparse.linear import MOST_GROUPED, Dense, DenseGroup, Engine, Linear
from supar_cli.sparse.masks import Mask
from supar_cli.training.trainer import Trainer
from tests.test_engines import drawn

MakePlan = Callable[..., Plan]


class TestDenseGroup:
    SIZES = ((5, 7), (16, 8), (1, 3), (130, 70))

    def layers(self, precision: torch.dtype, engines: dict[int, Engine] | None = None) -> list[Linear]:
        """Layers of all sizes whose values are those that their masks start with, and other engines for some."""
        found = []
        for number, shape in enumerate(self.SIZES):
            layer, mask = Linear(shape[1], shape[0], bias=False), drawn(shape, 0.3, number)
            engine = (engines or {}).get(number, Dense(mask, precision))
            layer.remask(mask, torch.randn(mask.count, generator=torch.Generator().manual_seed(number)), engine)
            found.append(layer)
        return found

    def weights(self, layers: list[Linear]) -> list[torch.Tensor]:
        return [
            layer.engine.weight
            for layer in layers
            if isinstance(layer.engine, Dense) and layer.engine.weight is not None
        ]

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_all_weights_are_what_each_engine_makes_them(self, precision: torch.dtype) -> None:
        """After changed values, and after masks that moved, which a group that keeps its index gets wrong."""
        grouped, single = self.layers(precision), self.layers(precision)
        group = DenseGroup.of(grouped)
        assert group is not None and len(group.layers) == len(self.SIZES)

        def agree() -> bool:
            group.refresh()
            for layer in single:
                layer.refresh()
            return all(map(torch.equal, self.weights(grouped), self.weights(single)))

        assert agree() and all(
            weight.data_ptr() % 256 == group._weights.data_ptr() % 256 for weight in self.weights(grouped)
        )
        for layer in (*grouped, *single):
            layer.weight.detach().mul_(2.0)
        assert agree()
        for turn in range(2):
            for layer in (*grouped, *single):
                assert layer.mask is not None and layer.engine is not None
                layer.engine.move(Mask.of(np.roll(layer.mask.alive(), 1)))
            group._masks = [layer.mask for layer in grouped if layer.mask] if turn else group._masks
            assert agree() is not bool(turn)

    def test_only_small_ones_under_the_dense_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own: dict[int, Engine] = {0: Dense(drawn((5, 7), 0.3), torch.float32, keeps_weight=False)}
        own[1] = Sparse(drawn((16, 8), 0.3, 1), "torch")
        layers = self.layers(torch.float32, own)
        group = DenseGroup.of(layers)
        assert group is not None and list(group.layers) == layers[2:] and DenseGroup.of(layers[:3]) is None
        assert MOST_GROUPED >= 130 * 70
        monkeypatch.setattr("supar_cli.sparse.linear.MOST_GROUPED", 40)
        assert DenseGroup.of(self.layers(torch.float32)) is not None
        assert [layer.shape for layer in DenseGroup.of(self.layers(torch.float32)).layers] == [(5, 7), (16, 8), (1, 3)]  # type: ignore[union-attr]

    @pytest.mark.parametrize("updates", [None, {"method": "set", "every_steps": 3}])
    def test_a_run_with_it_is_the_same(self, plan_of: MakePlan, updates: Any) -> None:
        plan = plan_of(target={"sparsity": {"density": 0.25, "updates": updates}}, run={"engine": "dense"})
        single, grouped = Trainer(plan), Trainer(plan)
        grouped.sparse_model.group_engines()
        assert grouped.sparse_model.group is not None and len(grouped.sparse_model.group.layers) == 12
        assert grouped.run().losses == single.run().losses
