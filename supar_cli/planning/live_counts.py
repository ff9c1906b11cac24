"""How many weights of every hidden tensor live: a uniform density, ERK, overrides, or masks from a file; and how that changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from supar_cli.errors import InputError
from supar_cli.planning import density, layout, patterns
from supar_cli.planning.plan_sections import MaskSource, PlanSparsity, PlanTensor
from supar_cli.planning.spec import Sparsity
from supar_cli.planning.updates import PlanUpdates, Updates, resolve


@dataclass(frozen=True)
class GivenMasks:
    """Masks from a file: its place and hash, and the number of live weights of each tensor, by name."""

    source: MaskSource
    live: dict[str, int]

    def counts(self, hidden: Sequence[layout.Tensor | PlanTensor]) -> dict[str, patterns.LiveCount]:
        """Density and kept count of hidden tensors; those without a mask are dense. Raises InputError for other names."""
        sizes = {tensor.name: tensor.size for tensor in hidden}
        if unknown := sorted(set(self.live) - set(sizes)):
            raise InputError(f"masks: {', '.join(unknown)}: the target has no such hidden tensor")
        live = {**sizes, **self.live}
        return {name: patterns.LiveCount(live[name] / size, live[name]) for name, size in sizes.items()}

    def section(self, rows: list[PlanTensor], updates: PlanUpdates | None = None) -> PlanSparsity:
        """The plan's section: the share of all hidden weights that these masks leave alive."""
        hidden = [row for row in rows if row.role == "hidden"]
        share = Fraction(sum(row.kept for row in hidden), sum(row.size for row in hidden))
        found: dict[str, Any] = {"pattern": "exact", "distribution": "uniform", "source": self.source}
        return PlanSparsity(density=float(share), sparsity=float(1 - share), **found, updates=updates)


def asked_density(wanted: Sparsity) -> Fraction:
    """The density that a section asks for, exactly. Raises InputError where there is none or the pattern has another."""
    own = patterns.density_of(wanted.pattern)
    word = "density" if wanted.sparsity is None else "sparsity"
    given = vars(wanted)[word]
    if given is None:
        if own is None:
            raise InputError("target.sparsity: is missing; expected --sparsity or --density")
        return own
    asked = density.density_from(word, given)
    if own is not None and float(asked) not in (float(own), 1.0):  # a document's float is only the nearest to N/M
        expected = f"{own}, or 1" if word == "density" else f"{1 - own}, or 0"
        raise InputError(f"target.sparsity.{word}: {given} with the pattern {wanted.pattern}; expected {expected}")
    return asked


def live_counts(
    tensors: Sequence[layout.Tensor | PlanTensor], wanted: Sparsity, where: str, masks: GivenMasks | None = None
) -> dict[str, patterns.LiveCount]:
    """Density and kept count of every hidden tensor, by name.

    Of the overrides, the most specific wins, and tensors without one share the target. Raises InputError for an override that
    matches nothing (`where` is their place in the document) and for a tensor whose density allows no mask of the pattern.
    """
    hidden = [tensor for tensor in tensors if tensor.role == "hidden"]
    if masks is not None:
        return masks.counts(hidden)
    share, overrides = asked_density(wanted), wanted.overrides
    names = {tensor.name: layout.setting_names(tensor) for tensor in hidden}
    keys = {name: next((key for key in known if key in overrides), None) for name, known in names.items()}
    unused = sorted(set(overrides) - set(keys.values()))
    if unused:
        sites = sorted({tensor.site for tensor in hidden})
        raise InputError(
            f"{where}: {', '.join(unused)} matches no hidden tensor; expected a site ({', '.join(sites)}), attn, mlp or a tensor's name"
        )
    free = [tensor for tensor in hidden if keys[tensor.name] is None]
    shares = dict.fromkeys(keys, share) if wanted.distribution == "uniform" else _erk(free, share)
    shares |= {name: density.literal(overrides[key]) for name, key in keys.items() if key is not None}
    how = wanted.pattern, wanted.block
    return {one.name: patterns.live_count(one.name, one.size, one.fan_in, shares[one.name], *how) for one in hidden}


def _erk(tensors: Sequence[layout.Tensor | PlanTensor], target: Fraction) -> dict[str, Fraction]:
    """Erdős–Rényi-Kernel shares, density ∝ (in + out)/(in·out), capped at 1 (Evci et al. 2020, arXiv 1911.11134)."""
    shares = {tensor.name: Fraction(1) for tensor in tensors}
    left, open_ = target * sum(tensor.size for tensor in tensors), tensors
    while open_:
        scale = left / sum(sum(tensor.shape) for tensor in open_)
        full = {tensor for tensor in open_ if scale * sum(tensor.shape) > tensor.size}
        if not full:
            return shares | {tensor.name: scale * sum(tensor.shape) / tensor.size for tensor in open_}
        left -= sum(tensor.size for tensor in full)
        open_ = [tensor for tensor in open_ if tensor not in full]
    return shares


def plan_updates(updates: Updates | None, exponent: float, steps: int, rows: list[PlanTensor]) -> PlanUpdates | None:
    """How the plan's masks change. Raises InputError where they can't as it says."""
    if updates is None:
        return None
    moving, where = [row for row in rows if row.kept < row.size], "target.sparsity.updates"
    if not moving:
        raise InputError(f"{where}: no tensor is sparse, so no mask changes; expected a sparsity above 0")
    try:
        found = resolve(updates, exponent, steps)
    except InputError as error:
        raise InputError(*(f"{where}.{problem}" for problem in error.problems)) from None
    lowest = min(row.density for row in moving)
    if found.start is not None and (found.start < lowest or (found.method == "gmp" and found.start == lowest)):
        what = f"{found.start:g} is not above the density of any tensor, of which the lowest is {lowest:g}"
        raise InputError(f"{where}.start: {what}; expected a higher one")
    least = min(moving, key=lambda row: row.kept * row.fan_in // row.size)
    most = least.kept * least.fan_in // least.size
    if updates.min_per_neuron is not None and updates.min_per_neuron > most:
        what = f"{updates.min_per_neuron} for each neuron are more than the {least.wpn:.3g} of {least.name}"
        raise InputError(f"{where}.min_per_neuron: {what}; expected at most {most}")
    return found.model_copy(update={"min_per_neuron": min(found.min_per_neuron, most)})
