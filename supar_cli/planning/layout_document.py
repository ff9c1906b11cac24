"""Document type of a layout: the tensors of a user's model at two or three sizes, from which every other size follows."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from supar_cli.errors import InputError
from supar_cli.planning.layout import MOST_EXTENTS, Tensor, check_axes, check_names
from supar_cli.planning.rules import Role
from supar_cli.planning.schema import Field, Section


class Own(Section):
    """Mean and standard deviation that a tensor's own constructor gave it at the base size."""

    mean: float
    std: float = Field(ge=0)


class LayoutRow(Section):
    """A tensor of a user's model at two or three sizes; `scales` are the axes whose extents differ between them."""

    name: str
    site: str
    role: Role
    block: int | None = Field(default=None, ge=0)
    base: list[int] = Field(min_length=1, max_length=MOST_EXTENTS)
    wider: list[int] = Field(min_length=1, max_length=MOST_EXTENTS)
    third: list[int] | None = None
    fan_in_axes: list[int]
    scales: list[int]
    writes_residual: bool = False
    tied_to: str | None = None
    own: Own | None = None
    read_by: list[str] = Field(default_factory=list)
    module: str | None = None

    def check(self) -> None:
        for key in ("base", "wider", "third"):
            extents = vars(self)[key]
            if extents is not None and (len(extents) != len(self.base) or min(extents) < 1):
                raise ValueError(f"{key}: {extents}; expected {len(self.base)} extents of 1 or more, as base has")
        check_axes(self.fan_in_axes, len(self.base))
        scales = [axis for axis, (narrow, wide) in enumerate(zip(self.base, self.wider, strict=True)) if narrow != wide]
        if self.scales != scales:
            raise ValueError(f"scales: {self.scales}; expected {scales}, where base and wider differ")
        if self.role == "hidden" and not self.fan_in_axes:
            raise ValueError("fan_in_axes: none; expected the axes that a hidden weight's product sums over")

    def extents(self, times: Fraction) -> list[Fraction]:
        """The shape at the base size plus `times` the step from base to wider."""
        return [narrow + times * (wide - narrow) for narrow, wide in zip(self.base, self.wider, strict=True)]

    def tensor(self, times: Fraction) -> Tensor:
        """The tensor of that shape. Raises InputError where it would not be whole."""
        extents = self.extents(times)
        if not all(extent.denominator == 1 and extent >= 1 for extent in extents):
            raise InputError(f"{self.name}: its shape would be {_words(self, times)}; expected whole extents")
        shape, axes = tuple(map(int, extents)), tuple(self.fan_in_axes)
        return Tensor(self.name, self.role, self.site, shape, axes, self.block, self.writes_residual, self.tied_to)


class Layout(Section):
    """`supar.layout/v1`: the tensors of a user's model, from which those of every other size follow.

    Extents are affine in the size: `third`, a size that need not be built for anything else, checks that they are.
    """

    kind: Literal["supar.layout/v1"]
    base: dict[str, int]
    wider: dict[str, int]
    third: dict[str, int] | None = None
    tensors: list[LayoutRow] = Field(min_length=1)
    notes: list[str] = Field(default_factory=list)

    def check(self) -> None:
        check_names(self.tensors)
        if self.base == self.wider:
            raise ValueError("wider: equals base, so nothing shows what scales; expected a larger size")
        times = self._times(self.wider, "wider")
        if self.third is not None:
            times = self._times(self.third, "third")
            for row in self.tensors:
                if row.third is None or row.extents(times) != row.third:
                    raise ValueError(f"tensors: {row.name}: third is {row.third}; expected {_words(row, times)}")

    def _times(self, size: dict[str, int], where: str) -> Fraction:
        """How far a size is from base, in steps from base to wider. Raises ValueError for one that is not on their line."""
        if not all(type(value) is int for value in size.values()):
            raise ValueError(f"{where}: {size}; expected whole numbers")
        if set(size) != set(self.base) or set(self.wider) != set(self.base):
            raise ValueError(f"{where}: {size}; expected the same names as base: {', '.join(self.base)}")
        steps = {name: self.wider[name] - self.base[name] for name in self.base}
        times = next((Fraction(size[name] - self.base[name], step) for name, step in steps.items() if step), None)
        if times is None or any(self.base[name] + times * step != size[name] for name, step in steps.items()):
            raise ValueError(f"{where}: {size} is not on the line through base {self.base} and wider {self.wider}")
        return times

    def at(self, size: dict[str, int]) -> list[Tensor]:
        """The tensors at a size, such as {"width": 4096}. Raises InputError where a shape would not be whole."""
        try:
            times = self._times(size, "size")
        except ValueError as error:
            raise InputError(str(error)) from None
        return [row.tensor(times) for row in self.tensors]


def _words(row: LayoutRow, times: Fraction) -> str:
    return f"[{', '.join(map(str, row.extents(times)))}]"
