"""The tensors of a user's model at the proxy's and at the target's size: their ratios, starts, and folded multipliers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod, sqrt
from typing import Any

from supar_cli.errors import InputError
from supar_cli.planning import rules
from supar_cli.planning.folding import Numbers, TensorUse, fold, fold_each
from supar_cli.planning.layout import Tensor
from supar_cli.planning.layout_document import LAYERS, Layout, LayoutRow
from supar_cli.planning.spec import Hyperparameters, Target

_OF_FAMILIES = ("heads", "kv_heads", "ffn_width", "head_width", "context", "tokens", "tokens_per_parameter")


@dataclass(frozen=True)
class OwnTensors:
    """A layout at a size. `tensors` are the target's; ratios are to those at the layout's base."""

    layout: Layout
    size: dict[str, int]

    @classmethod
    def of(cls, layout: Layout, target: Target) -> OwnTensors:
        """The layout's tensors at a target's size. Raises InputError for a size that the layout doesn't have."""
        given = [name for name in _OF_FAMILIES if getattr(target, name) is not None]
        sizes = {name: getattr(target, name) for name in ("width", LAYERS) if getattr(target, name) is not None}
        if given:
            what = "a model of your own has only the sizes of its layout"
            raise InputError(*(f"target.{name}: {what}; expected {', '.join(layout.base)}" for name in given))
        return cls(layout, layout.complete(sizes | (target.size or {})))

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor at the size."""
        return self.layout.at(self.size)

    @property
    def base_tensors(self) -> list[Tensor]:
        """Every tensor of the proxy."""
        return self.layout.at(self.layout.base)

    @cached_property
    def rows(self) -> dict[str, LayoutRow]:
        """The layout's row of each tensor: its own, or for the tensors of further blocks that of the first block."""
        named = {row.name: row for row in self.layout.tensors}
        first = {row.site: row for row in reversed(self.layout.tensors)}
        return {tensor.name: named.get(tensor.name, first[tensor.site]) for tensor in self.tensors}

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """The tensor at the base of each tensor, by name."""
        return {name: row.tensor_of(row.base) for name, row in self.rows.items()}

    @property
    def m_L(self) -> float:
        """The ratio of the numbers of layers; 1 where the layout's sizes have none."""
        return self.size[LAYERS] / self.layout.base[LAYERS] if LAYERS in self.size else 1.0

    @property
    def layers(self) -> int:
        return self.size.get(LAYERS, 1)

    def m_d(self, tensor: Tensor) -> float:
        """The ratio of a tensor's own extent that scales: its fan-in in a product, else the product of what scales."""
        row, base = self.rows[tensor.name], self.base[tensor.name]
        if tensor.role in ("hidden", "unembedding"):
            return tensor.fan_in / base.fan_in
        return prod(tensor.shape[axis] / base.shape[axis] for axis in row.scales)

    @cached_property
    def m_out(self) -> float:
        """The smallest ratio in the multipliers of the products that leave the model; 1 without such a product."""
        heads = [tensor for tensor in self.tensors if "head" in self.rows[tensor.name].uses]
        return min(map(self.m_d, heads), default=1.0)

    def context(self, tensor: Tensor, m_rho: float) -> rules.TensorContext:
        """What the rules need to know of a tensor at its density ratio."""
        row, base = self.rows[tensor.name], self.base[tensor.name]
        after_head = "after_head" in row.uses
        return rules.TensorContext(
            tensor.role,
            1.0 if after_head else self.m_d(tensor),  # ε and SGD's rate are then undivided
            m_fan_out=tensor.fan_out / base.fan_out if tensor.role == "hidden" else None,
            m_out=1.0 if after_head else self.m_out,
            m_rho=m_rho,
            m_L=self.m_L,
            layers=self.layers,
            in_block=tensor.block is not None,
            writes_residual=tensor.writes_residual,
            after_head=after_head,
            first_sum="first_sum" in row.uses,
            head="head" in row.uses,
        )

    @cached_property
    def own_stds(self) -> dict[str, float]:
        """The size that a tensor's values have at the base, by name: their deviation, or root mean square where they are kept.

        Tensors of one site share their mean where it is by chance that they differ, within 6 standard errors.
        """
        found: dict[str, float] = {}
        by_site: dict[str, list[LayoutRow]] = {}
        for row in self.layout.tensors:
            if row.own is not None:
                keeps = row.init == "own" or row.role in rules.STARTS
                found[row.name] = sqrt(row.own.std**2 + (row.own.mean**2 if keeps else 0.0))
                by_site.setdefault(row.site, []).append(row)
        for members in by_site.values():
            sizes = [found[row.name] for row in members]
            mean = sqrt(sum(size**2 for size in sizes) / len(sizes))
            if all(abs(found[row.name] - mean) <= 6 * mean / sqrt(2 * prod(row.base)) for row in members):
                found |= dict.fromkeys([row.name for row in members], mean)
        return found

    def sigma(self, tensor: Tensor, hyper: Hyperparameters) -> float:
        """The deviation at the base of a tensor that does not start from a constant. Raises InputError where it is not known."""
        if tensor.role not in rules.STARTS and hyper.init_std is not None:
            return hyper.init_std
        row = self.rows[tensor.name]
        if row.own is None:
            raise InputError(
                f"{tensor.name}: the layout has no `own` values; expected them, or hyperparameters.init_std"
            )
        if row.name != tensor.name:  # of a further block, which the base does not have
            sizes = {self.own_stds[other.name] for other in self.layout.tensors if other.site == row.site}
            if len(sizes) > 1:
                what = f"its layers start with different deviations at the base, {', '.join(f'{s:.3g}' for s in sorted(sizes))}"
                raise InputError(f"{tensor.name}: {what}; expected the base's layers, or hyperparameters.init_std")
        return self.own_stds[row.name]

    def start(self, tensor: Tensor, rule: float, hyper: Hyperparameters) -> dict[str, Any]:
        """The keys of a row that say how a tensor starts, given the deviation that the rules give it."""
        row = self.rows[tensor.name]
        if row.own is not None and row.own.std == 0:
            return {"init_constant": row.own.mean}
        if tensor.role not in rules.STARTS:
            return {"init_std": rule, "init": row.init}
        if row.own is None:
            return {"init_constant": rules.STARTS[tensor.role]}
        return {"init_std": self.sigma(tensor, hyper), "init": "own"}

    def require_ratios_used(self, hyper: Hyperparameters) -> None:
        """Raise InputError for a ratio of rates that no tensor can have."""
        rows, problems = self.layout.tensors, list[str]()
        shared = {name for row in rows if row.tied_to for name in (row.name, row.tied_to)}
        heads = {row.name: row.role != "unembedding" or row.name in shared for row in rows if "head" in row.uses}
        tied = ", ".join(name for name, is_tied in heads.items() if is_tied)
        if hyper.embedding_lr_ratio != 1 and not any(r.role == "embedding" and "first_sum" in r.uses for r in rows):
            what = f"{hyper.embedding_lr_ratio:g}, but the layout has no embedding that is summed first"
            problems.append(f"hyperparameters.embedding_lr_ratio: {what}; expected 1")
        if hyper.head_lr_ratio != 1 and (tied or not heads):
            why = f"the head {tied} is tied and has the embeddings' rate" if tied else "the layout has no head"
            problems.append(f"hyperparameters.head_lr_ratio: {hyper.head_lr_ratio:g}, but {why}; expected 1")
        if problems:
            raise InputError(*problems)

    def folds(self, scheme: rules.Scheme, hyper: Hyperparameters) -> tuple[dict[str, float], dict[str, float]]:
        """The factor that is folded into each tensor, by name, and the factors on inputs of modules that can't be folded."""
        if scheme.name in rules.SP:
            return {}, {}
        residual = 1.0 / self.m_L if scheme.depth_rule == "completep" else 1.0
        if residual != 1:
            self._require_layers_of_their_own()
        return fold_each(self._uses(), hyper.alpha_input, hyper.alpha_output, residual)

    def _require_layers_of_their_own(self) -> None:
        """Raise InputError for what writes the residual stream and does not grow in number with the layers."""
        now, before = (Counter(t.site for t in one if t.block is not None) for one in (self.tensors, self.base_tensors))
        writers = [tensor for tensor in self.tensors if tensor.writes_residual]
        what = "writes the residual stream and is not each layer's own, such as a weight that layers share"
        expected = "expected parameterization.depth_rule none, as completep has no rule for it"
        others = [t.name for t in writers if not now[t.site] or now[t.site] != self.m_L * before[t.site]]
        if others:
            raise InputError(*(f"{name}: {what}; {expected}" for name in others))

    def _uses(self) -> Iterable[TensorUse]:
        for tensor in self.tensors:
            row = self.rows[tensor.name]
            is_head = "head" in row.uses
            yield TensorUse(
                name=tensor.name,
                role=tensor.role,
                in_first_sum="first_sum" in row.uses,
                writes_residual=row.writes_residual,
                tied=is_head and tensor.role != "unembedding",
                feeds_head="before_head" in row.uses,
                derived="derived" in row.uses,
                leaves_model=is_head,
                m_d=self.m_d(tensor),
                multiply_at=row.multiply_at,
            )


def folded(numbers: dict[str, Any], factor: float, optimizer: rules.Optimizer) -> dict[str, Any]:
    """The keys of a row with a factor of the forward pass folded into its numbers."""
    if factor == 1:
        return numbers
    start = numbers.get("init_std"), numbers.get("init_constant")
    known = Numbers(numbers["lr"], numbers["weight_decay"], numbers["eps"], *start)
    changed = {name: value for name, value in vars(fold(known, factor, optimizer)).items() if value is not None}
    return {**numbers, **changed, "fold": factor}
