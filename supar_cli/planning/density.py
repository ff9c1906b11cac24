"""From a target density to each hidden tensor's own density and kept count, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from supar_cli.errors import InputError
from supar_cli.planning.layout import Tensor
from supar_cli.planning.patterns import LiveCount, live_count

LARGEST_EXPONENT = 400  # chosen: beyond what a double holds; the exact value of more would take memory without end
Share = float | str  # a density or a sparsity: a number, or a fraction such as "1/3", which no float holds


def literal(value: Share | int) -> Fraction:
    """The exact value of a number as written, such as 0.992 or 1/128; a float counts as its shortest text. ValueError."""
    text = value if isinstance(value, str) else repr(value)
    parts = text.split("/", 1)
    try:
        numbers = [Decimal(part.strip()) for part in parts]
    except InvalidOperation:
        raise ValueError(f"{value!r} is not a number") from None
    if not all(number.is_finite() and abs(number.adjusted()) < LARGEST_EXPONENT for number in numbers):
        raise ValueError(f"{value!r} is not finite")
    if len(numbers) == 2 and not numbers[1]:
        raise ValueError(f"{value!r} divides by zero")
    return Fraction(numbers[0]) / (Fraction(numbers[1]) if len(numbers) == 2 else 1)


def share(text: str) -> Share:
    """A share as documents keep it: a plain number as a float, a fraction such as 1/3 as it was written. ValueError."""
    exact = literal(text)
    return text.strip() if "/" in text else float(exact)


def density_from(word: str, value: Share, where: str = "") -> Fraction:
    """The exact density of a `sparsity` or a `density` as written. Raises ValueError outside [0, 1) or (0, 1].

    `where` is the value's place in a document if that is not the word.
    """
    try:
        given = literal(value)
    except ValueError as error:
        raise ValueError(f"{where or word}: {error}; expected a number or a fraction such as 1/128") from None
    density = 1 - given if word == "sparsity" else given
    if not 0 < density <= 1:
        allowed = "0 <= sparsity < 1" if word == "sparsity" else "0 < density <= 1"
        raise ValueError(f"{where or word}: {value}{' leaves no weights' if density <= 0 else ''}; expected {allowed}")
    return density


def number(text: str) -> float:
    """A number written as 0.0078125 or as 1/128. Raises ValueError."""
    return float(literal(text))


def distribute(
    hidden: Iterable[Tensor],
    density: Fraction,
    distribution: str,
    pattern: str,
    overrides: Mapping[str, Share],
    where: str = "sparsity.overrides",
    block: int | None = None,
) -> dict[str, LiveCount]:
    """Density and kept count of every hidden tensor, by name.

    `overrides` maps a tensor name, a site (`attn.q`), a part (`attn`, `mlp`) or `hidden` to a density; the most specific wins,
    and the others share the target. Raises InputError for an override that matches nothing (`where` is their place in the
    document) and for a tensor that can have no mask of the pattern at its density.
    """
    hidden = list(hidden)
    keys = {tensor.name: next((key for key in tensor.setting_names if key in overrides), None) for tensor in hidden}
    unused = sorted(set(overrides) - set(keys.values()))
    if unused:
        sites = sorted({tensor.site for tensor in hidden})
        raise InputError(f"{where}: {', '.join(unused)} matches no hidden tensor; sites are {', '.join(sites)}")
    fixed = {name: literal(overrides[key]) for name, key in keys.items() if key is not None}
    free = [tensor for tensor in hidden if tensor.name not in fixed]
    shares = {tensor.name: density for tensor in free} if distribution == "uniform" else _erk(free, density)
    shares |= fixed
    return {
        tensor.name: live_count(tensor.name, tensor.size, tensor.fan_in, shares[tensor.name], pattern, block)
        for tensor in hidden
    }


def _erk(tensors: list[Tensor], target: Fraction) -> dict[str, Fraction]:
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
