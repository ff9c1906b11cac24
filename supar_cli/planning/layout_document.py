"""The layout document: the tensors of a user's model, what is known of each, and their shapes at every size."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from supar_cli.errors import InputError, suggestion
from supar_cli.planning.document import content_hash, read_file
from supar_cli.planning.layout import MOST_EXTENTS, Tensor, check_axes, check_names
from supar_cli.planning.problems import parse
from supar_cli.planning.rules import Role
from supar_cli.planning.schema import Field, Section

# Uses of a tensor that decide where multipliers of the forward pass are folded (`planning.folding.TensorUse`):
# first_sum    a summand of the first activations (a table that is looked up, positions, a patch convolution's output has
#              one too), or gain or shift of a norm directly on their sum (then not the summands)
# head         the weight of a product that leaves the model
# before_head  gain or shift of a norm whose result only a tied head reads
# after_head   added to the result of such a product, or scales it: the head's own bias
# derived      the forward pass uses a value derived from it, such as 1 + g
Use = Literal["first_sum", "head", "before_head", "after_head", "derived"]


class Own(Section):
    """Mean and standard deviation that a tensor's own constructor gave it at the base size."""

    mean: float
    std: float = Field(ge=0)


class LayoutRow(Section):
    """A tensor of a user's model at two or more sizes, and what its model does with it.

    `scales` are the axes whose extents differ between base and wider, `read_by` the operations that take it, `also` its
    further names in the model. `init`: whether its start is drawn normal, or the constructor's own values are kept and scaled.
    `multiply_at` names the module whose input is multiplied where nothing can be folded. `said`: a person gave the role.
    """

    name: str
    site: str
    role: Role
    block: int | None = Field(default=None, ge=0)
    base: list[int] = Field(min_length=1, max_length=MOST_EXTENTS)
    wider: list[int] = Field(min_length=1, max_length=MOST_EXTENTS)
    third: list[int] | None = None
    target: list[int] | None = Field(default=None, neutral=True, omit=True)
    fan_in_axes: list[int]
    scales: list[int]
    writes_residual: bool = Field(default=False, neutral=True, omit=True)
    tied_to: str | None = Field(default=None, neutral=True, omit=True)
    also: list[str] = Field(default_factory=list, neutral=True, omit=True)
    uses: list[Use] = Field(default_factory=list, neutral=True, omit=True)
    multiply_at: str | None = Field(default=None, neutral=True, omit=True)
    own: Own | None = None
    init: Literal["normal", "own"] = Field(default="normal", neutral=True, omit=True)
    read_by: list[str] = Field(default_factory=list)
    module: str | None = None
    said: bool = Field(default=False, neutral=True, omit=True)

    def check(self) -> None:
        for key in ("base", "wider", "third", "target"):
            extents = vars(self)[key]
            if extents is not None and (len(extents) != len(self.base) or min(extents) < 1):
                raise ValueError(f"{key}: {extents}; expected {len(self.base)} extents of 1 or more, as base has")
        check_axes(self.fan_in_axes, len(self.base), self.role)
        scales = [axis for axis, (narrow, wide) in enumerate(zip(self.base, self.wider, strict=True)) if narrow != wide]
        if "head" in self.uses and self.role not in ("embedding", "unembedding"):
            raise ValueError(
                f"uses: head on a tensor of role {self.role}; expected an unembedding, or a tied embedding"
            )
        if self.scales != scales:
            raise ValueError(f"scales: {self.scales}; expected {scales}, where base and wider differ")

    def extents(self, times: Fraction) -> list[Fraction]:
        """The shape at the base size plus `times` the step from base to wider."""
        return [narrow + times * (wide - narrow) for narrow, wide in zip(self.base, self.wider, strict=True)]

    def tensor(self, times: Fraction) -> Tensor:
        """The tensor of that shape. Raises InputError if an extent would not be a whole number."""
        extents = self.extents(times)
        if not all(extent.denominator == 1 and extent >= 1 for extent in extents):
            raise InputError(f"{self.name}: its shape would be {_words(self, times)}; expected whole numbers above 0")
        return self.tensor_of(list(map(int, extents)))

    def tensor_of(self, shape: list[int]) -> Tensor:
        """The tensor of a shape."""
        axes = tuple(self.fan_in_axes)
        return Tensor(
            self.name, self.role, self.site, tuple(shape), axes, self.block, self.writes_residual, self.tied_to
        )


LAYERS = "layers"  # the size that is the number of blocks; it need not differ between base and wider


class Layout(Section):
    """`supar.layout/v1`: the tensors of a user's model, from which those of every other size follow.

    Extents are affine in the size: `third`, a size that need not be built for anything else, checks that they are. Where
    they are not, `target` has its extents listed. `ignored` names parameters that nothing reads. `factory` is the
    `module:function` that the layout was read from.
    """

    kind: Literal["supar.layout/v1"]
    factory: str | None = Field(default=None, neutral=True, omit=True)
    base: dict[str, int]
    wider: dict[str, int]
    third: dict[str, int] | None = None
    target: dict[str, int] | None = Field(default=None, neutral=True, omit=True)
    tensors: list[LayoutRow] = Field(min_length=1)
    ignored: list[str] = Field(default_factory=list, neutral=True, omit=True)
    notes: list[str] = Field(default_factory=list)

    def check(self) -> None:
        check_names(self.tensors)
        if self.base == self.wider:
            raise ValueError("wider: equals base, so nothing shows what scales; expected a larger size")
        self._times(self.wider, "wider")
        for row in self.tensors:
            if (row.target is None) != (self.target is None):
                raise ValueError(f"tensors: {row.name}: target is {row.target}; expected it in all rows or in none")
        if self.third is not None and self.target is None:
            times = self._times(self.third, "third")
            for row in self.tensors:
                if row.third is None or row.extents(times) != row.third:
                    what = f"third is {row.third}; expected {_words(row, times)}"
                    raise ValueError(f"tensors: {row.name}: {what}, or the sizes to train at as the layout's target")

    def hash(self) -> str:
        """Identity of the layout."""
        return content_hash(self.identity(exclude=("notes", "factory")))

    def _times(self, size: dict[str, int], where: str) -> Fraction:
        """How far a size is from base, in steps from base to wider. Raises ValueError for one that is not on their line."""
        if not all(type(value) is int for value in size.values()):
            raise ValueError(f"{where}: {size}; expected whole numbers")
        if set(size) != set(self.base) or set(self.wider) != set(self.base):
            raise ValueError(f"{where}: {size}; expected the same names as base: {', '.join(self.base)}")
        steps = {name: self.wider[name] - self.base[name] for name in self.base}
        is_free = {name: name == LAYERS and not step for name, step in steps.items()}
        times = next((Fraction(size[name] - self.base[name], step) for name, step in steps.items() if step), None)
        if times is None or any(
            self.base[name] + times * step != size[name] for name, step in steps.items() if not is_free[name]
        ):
            raise ValueError(f"{where}: {size} is not on the line through base {self.base} and wider {self.wider}")
        return times

    def complete(self, given: dict[str, int]) -> dict[str, int]:
        """The whole size from the values of some of its names; the others follow along the line through base and wider.

        Raises InputError for names that the layout does not have and for values that are not on the line.
        """
        if unknown := [name for name in given if name not in self.base]:
            what = "is not a size of the layout"
            how = f"set it by -s target.size.{next(iter(self.base))}=N"
            raise InputError(
                *(f"target.{name}: {what}; {suggestion(name, list(self.base))}; {how}" for name in unknown)
            )
        steps = {name: self.wider[name] - self.base[name] for name in self.base}
        is_target = self.target is not None and given.items() <= self.target.items()
        if self.target is not None and is_target and any(steps[name] for name in given):
            return self.target
        times = next(
            (Fraction(given[name] - self.base[name], steps[name]) for name in given if steps[name]), Fraction(0)
        )
        followed = {name: self.base[name] + times * step for name, step in steps.items()}
        if not all(value.denominator == 1 for value in followed.values()):
            sizes = ", ".join(f"{name} {value}" for name, value in followed.items())
            raise InputError(f"target.size: {given} makes {sizes}; expected whole numbers")
        return {name: int(value) for name, value in followed.items()} | given

    def at(self, size: dict[str, int]) -> list[Tensor]:
        """The tensors at a size, such as {"width": 4096}. Raises InputError if a shape would not have whole extents.

        At another number of layers the tensors of further blocks are those of the first block at their sites.
        """
        if self.target is not None and size == self.target:
            found = [row.tensor_of(row.target or row.base) for row in self.tensors]
        else:
            try:
                times = self._times(size, "size")
            except ValueError as error:
                raise InputError(str(error)) from None
            found = [row.tensor(times) for row in self.tensors]
        layers, wanted = self.base.get(LAYERS), size.get(LAYERS)
        return found if layers is None or wanted is None else _with_blocks(found, layers, wanted)


def _with_blocks(tensors: list[Tensor], layers: int, wanted: int) -> list[Tensor]:
    """The tensors of a model with another number of blocks; sites that do not have `layers` blocks stay as they are."""
    if layers == wanted:
        return tensors
    blocks: dict[str, int] = {}
    for tensor in tensors:
        if tensor.block is not None:
            blocks[tensor.site] = max(blocks.get(tensor.site, 0), tensor.block + 1)
    grows = {site for site, count in blocks.items() if count == layers}
    if not grows:
        raise InputError(f"target.layers: {wanted}, but no site of the layout has {layers} blocks; expected {layers}")
    found = []
    for tensor in tensors:
        if tensor.site not in grows:
            found.append(tensor)
        elif tensor.block == 0:
            found += [replace(tensor, name=_in_block(tensor, block), block=block) for block in range(wanted)]
    return found


def _in_block(tensor: Tensor, block: int) -> str:
    """The name of a tensor of the first block in another block: the number takes the place of the site's first `*`."""
    parts, at = tensor.name.split("."), tensor.site.split(".").index("*")
    return ".".join([*parts[:at], str(block), *parts[at + 1 :]])


class OwnShape(Section):
    """The model of a spec or proxy that is the user's: its layout's file, and the function that makes it.

    `factory` is `module:function`, called with the names of the layout's sizes. `hash` is the layout's.
    """

    family: Literal["own"]
    layout: str
    hash: str | None = None
    factory: str | None = None

    UNHASHED = ("layout",)  # the hash says which one it is

    def with_hash(self) -> OwnShape:
        """The section with the hash of its layout filled in. Raises InputError as `read_layout` does."""
        return self.model_copy(update={"hash": self.read_layout().hash()})

    def read_layout(self) -> Layout:
        """The layout. Raises InputError for a file that can't be read or has another hash."""
        found = _read(self.layout, _stamp(self.layout))
        if self.hash not in (None, found.hash()):
            expected = f"expected {self.hash}, the layout that the hyperparameters were tuned with"
            raise InputError(f"model.layout: {self.layout} has the hash {found.hash()}; {expected}")
        return found


def _stamp(path: str) -> tuple[int, int]:
    """What changes when a file is written: its time, in nanoseconds, and its size; zeros for one that can't be read."""
    with suppress(OSError):
        found = os.stat(path)
        return found.st_mtime_ns, found.st_size
    return 0, 0


@lru_cache(maxsize=4)  # a search and a check make a plan for each of their runs from one layout
def _read(path: str, stamp: tuple[int, int]) -> Layout:
    return parse(Layout, read_file(path)[0])


def _words(row: LayoutRow, times: Fraction) -> str:
    return f"[{', '.join(map(str, row.extents(times)))}]"
