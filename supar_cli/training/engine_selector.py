"""Choosing an engine for each masked tensor of a plan: the one in its run section, or the fastest on this machine."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping

from supar_cli.planning.plan import Plan
from supar_cli.sparse import autotune
from supar_cli.sparse.autotune import EngineChoice, LayerCase
from supar_cli.sparse.linear import Engine
from supar_cli.sparse.masks import Mask
from supar_cli.training.distributed import Ranks
from supar_cli.training.runtime import Runtime


class EngineSelector:
    """The engines of a plan's masked tensors: `choose` all of them, then `make` each while the model is built.

    Only rank 0 measures, and all ranks take its choice. `units` is the number of tokens, or other units, in a micro-batch.
    """

    def __init__(self, plan: Plan, runtime: Runtime, ranks: Ranks, units: int, sharded: bool) -> None:
        self.plan, self.choices, self._ranks = plan, dict[str, EngineChoice](), ranks
        self.case = LayerCase(runtime.device, runtime.precision, units, plan.sparsity.block, sharded)
        self._rows = {row.name: row for row in plan.tensors}
        self._fastest: dict[tuple[object, ...], EngineChoice] = {}  # layers of one shape and size share a measurement

    def choose(self, masks: Mapping[str, Mask]) -> None:
        """Choose an engine for every mask (out, in). Every rank calls it with the same masks."""
        for name, mask in masks.items():
            named, alike = self.plan.engine(self._rows[name]), (mask.shape, mask.count)
            if named != "auto":
                self.choices[name] = EngineChoice(named, {})
                continue
            if alike not in self._fastest:
                self._fastest[alike] = self._ranks.on_main(autotune.fastest, mask, self.case)
            self.choices[name] = self._fastest[alike]

    def make(self, name: str, mask: Mask) -> Engine:
        """Make the chosen engine of a tensor."""
        return autotune.make(self.choices[name].name, mask, self.case)

    def lines(self) -> list[str]:
        """The measurements, one line for each shape, and a hint at what would be faster."""
        measured = [(self._rows[name], choice.text()) for name, choice in self.choices.items() if choice.seconds]
        texts = [f"{'×'.join(map(str, row.shape))} at density {row.density:.3g}: {text}" for row, text in measured]
        lines = [f"engine of {count} tensors {text}" for text, count in Counter(texts).items()]
        if lines and self.case.device.type == "cpu" and not importlib.util.find_spec("numba"):
            lines.append("numba is not installed: `pip install numba` makes the sparse engine faster")
        return lines
