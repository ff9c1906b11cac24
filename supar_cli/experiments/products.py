"""The products of a user's model in a step: what goes in and comes out of each weight's, their gradients, what an update changes.

Read below autograd, where modules, functions and einsum are the same few operations of ATen. A tensor computed from parameters
alone, such as a view, a copy in another precision or W·mask, is kept with how to compute it anew: an image of them. An image
of a weight that meets other values in a product is that weight's product Y = X·W. Computed anew with the updated weight and
the same X it is Y + ΔY.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as trees  # private, but the only walk through nested arguments
from torch.utils._python_dispatch import TorchDispatchMode  # private, but the documented way to see operations of ATen

Values = Mapping[str, Tensor]  # of parameters, by name
ATEN = torch.ops.aten
_NAMES = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "convolution", "_grouped_mm")
PRODUCTS = {getattr(ATEN, name).default for name in _NAMES if hasattr(ATEN, name)}
BACKWARD = PRODUCTS | {ATEN.convolution_backward.default}
LOOK_UPS = {ATEN.embedding.default, ATEN.index.Tensor, ATEN.index_select.default, ATEN.gather.default}
SUMS = {ATEN.add.Tensor, ATEN.sub.Tensor}


@dataclass(frozen=True, slots=True)
class _Image:
    """How to compute a tensor from the parameters named: from weights, from gains and shifts, or from activations and these."""

    names: frozenset[str]
    of: Literal["weight", "norm", "activation"]
    compute: Callable[[Values], Tensor]


@dataclass(slots=True)
class Product:
    """The products of one weight in a step: one call of an operation or more."""

    outputs: list[Tensor] = field(default_factory=list)
    compute: list[Callable[[Values], Tensor]] = field(default_factory=list)
    norms: frozenset[str] = frozenset()  # of a head: gain and shift of the norm that X comes from
    looked_up: Tensor | None = None  # the indices of a table's last look-up
    input_gradients: list[Tensor] = field(default_factory=list)  # dL/dX, of this product alone
    output_gradients: list[Tensor] = field(default_factory=list)

    @property
    def activation(self) -> Tensor:
        """Mean |Y|."""
        return _mean_size(self.outputs)

    @property
    def gain(self) -> Tensor:
        """|dL/dX| ÷ |dL/dY|; NaN where no gradient passes."""
        return _mean_size(self.input_gradients) / _mean_size(self.output_gradients)

    @property
    def logits(self) -> Tensor:
        """Mean |Y|, for a head that is a table without the logits of the tokens that were looked up.

        Those are Θ(1) in width where others are Θ(1/√m_d).
        """
        output, own = self.outputs[-1], self.looked_up
        if own is None or own.numel() * output.shape[-1] != output.numel():
            return self.activation
        size_NV = output.abs().flatten(0, -2)
        others = size_NV.sum() - size_NV.gather(-1, own.reshape(-1, 1)).sum()
        return others / (output.numel() - own.numel())

    def change(self, before: Values, changed: Values) -> Tensor:
        """Mean |ΔY| by the change of some parameters alone."""
        return _mean_size([compute({**before, **changed}) - compute(before) for compute in self.compute])


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of an operation."""

    func: Any
    leaves: list[Any]
    spec: Any

    def again(self, images: Mapping[int, _Image], output: int) -> Callable[[Values], Tensor]:
        """How to compute one of its outputs with the images among its arguments computed anew."""

        def compute(values: Values) -> Tensor:
            leaves = [images[at].compute(values) if at in images else leaf for at, leaf in enumerate(self.leaves)]
            args, kwargs = trees.tree_unflatten(leaves, self.spec)
            found: Tensor = trees.tree_leaves(self.func(*args, **kwargs))[output]
            return found

        return compute


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the products of weights in the forward and backward passes made inside of it; `is_backward` tells which it is.

    By name: the `weights`, the `heads` among them, the `norms` (gains and shifts), and the `tables`, which activations come
    from as they do from the batch.
    """

    def __init__(self, weights: Values, heads: Collection[str], norms: Values, tables: Values, batch: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: defaultdict[str, Product] = defaultdict(Product)
        self.is_backward = False
        self._heads, self._tables = frozenset(heads), frozenset(tables)
        self._alive: list[Tensor] = []  # so that no address is used twice
        self._multiplied: set[int] = set()  # addresses of what entered a product as a weight
        inputs = [*trees.tree_leaves(batch), *(table for name, table in tables.items() if name not in weights)]
        self._active = {_address(tensor) for tensor in inputs if isinstance(tensor, Tensor)}
        self._images: dict[tuple[Any, ...], _Image] = {}
        for name, parameter in norms.items():
            self._images[_key(parameter)] = _Image(frozenset([name]), "norm", itemgetter(name))
        for name, parameter in weights.items():
            self._images[_key(parameter)] = _Image(frozenset([name]), "weight", itemgetter(name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves, spec = trees.tree_flatten((args, kwargs or {}))
        self._read(_Call(func, leaves, spec), trees.tree_leaves(result))
        return result

    def _read(self, call: _Call, outputs: list[Any]) -> None:
        tensors = {at: leaf for at, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor)}
        images = {at: image for at, tensor in tensors.items() if (image := self._images.get(_key(tensor)))}
        weights = {at: image for at, image in images.items() if image.of == "weight"}
        others = [tensor for at, tensor in tensors.items() if at not in weights and tensor.is_floating_point()]
        active = any(_address(tensor) in self._active for tensor in tensors.values())
        if self.is_backward and not torch.is_grad_enabled():  # they are enabled in a forward pass that is made again
            if weights and others and call.func in BACKWARD:
                self._read_gradient(weights, [tensors[at] for at in weights], others[0], outputs[0])
        elif weights and others and call.func in PRODUCTS:
            self._read_product(call, images, weights, outputs[0])
            self._multiplied |= {_address(tensors[at]) for at in weights}
            active = True
        new = {at: output for at, output in enumerate(outputs) if isinstance(output, Tensor)}
        self._alive += new.values()
        if active:
            self._active |= {_address(output) for output in new.values()}
        kept, of = self._kept(call, images, others, active)
        for at, output in new.items():
            self._images.pop(_key(output), None)
            if kept:
                names = frozenset().union(*(image.names for image in kept.values()))
                self._images[_key(output)] = _Image(names, of, call.again(kept, at))

    def _read_product(self, call: _Call, images: dict[int, _Image], weights: dict[int, _Image], output: Tensor) -> None:
        """Add a call to the products of its weights. X of a head is computed anew too, by the norm that it comes from."""
        for name in frozenset().union(*(image.names for image in weights.values())):
            product = self.found[name]
            if name in self._tables:  # only the last product of a table is that of the head
                product.outputs, product.compute = [], []
            taken = weights
            if name in self._heads:
                behind = {at: image for at, image in images.items() if image.of == "activation"}
                product.norms = frozenset().union(*(image.names for image in behind.values()))
                taken = weights | behind
            product.outputs.append(output.detach())
            product.compute.append(call.again(taken, 0))

    def _read_gradient(
        self, weights: dict[int, _Image], multiplied: list[Tensor], by_output: Tensor, by_input: Tensor | None
    ) -> None:
        if by_input is None or not any(_address(tensor) in self._multiplied for tensor in multiplied):
            return
        for name in frozenset().union(*(image.names for image in weights.values())):
            self.found[name].input_gradients.append(by_input)
            self.found[name].output_gradients.append(by_output)

    def _kept(
        self, call: _Call, images: dict[int, _Image], others: list[Tensor], active: bool
    ) -> tuple[dict[int, _Image], Any]:
        """The arguments from which a call's outputs can be computed anew, and what these are images of."""
        if call.func._schema.is_mutable or torch.Tag.nondeterministic_seeded in call.func.tags:
            return {}, None
        weights, norms, behind = (
            {at: image for at, image in images.items() if image.of == of} for of in ("weight", "norm", "activation")
        )
        if weights:
            tables = [name for image in weights.values() for name in image.names & self._tables]
            if tables and call.func in LOOK_UPS:
                self.found[tables[0]].looked_up = call.leaves[1]
                return {}, None
            meets = (call.func in PRODUCTS and others) or any(_address(other) in self._active for other in others)
            return ({}, None) if meets else (weights | norms, "weight")
        if call.func in PRODUCTS:
            return {}, None
        if not active:
            return norms, "norm"
        if norms:  # a shift belongs to the norm before it; by itself it is none
            return (norms if call.func not in SUMS else norms | behind if behind else {}), "activation"
        return behind, "activation"


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from all others, but not a view from the same view made again."""
    return _address(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _mean_size(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.tensor(torch.nan)
    sizes = torch.stack([tensor.abs().sum(dtype=torch.float32) for tensor in tensors])
    return sizes.sum() / sum(tensor.numel() for tensor in tensors)
