"""Every tensor of a model: name, role, shape and fan-in axes, from the shape of one of supar's families.

A tensor is known by its role and site, never by its name's spelling or its number of dimensions. In supar's own families
a weight's name is its module's path; a bias is that path with `.bias`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import SimpleNamespace
from typing import Any

from supar_cli.planning.rules import Role

# what the layout needs to know of a model; `spec.Model` has it all
_SHAPE: tuple[str, ...] = ("width", "layers", "heads", "kv_heads", "head_width", "ffn_width", "context", "vocab")
_SHAPE += ("norm", "activation", "positions", "bias", "tied", "patch_inputs", "has_class_token")


@dataclass(frozen=True)
class Tensor:
    """One parameter tensor. `site` names its place within a block.

    `fan_in_axes` are the axes that a product sums over: (1,) of a linear weight (out, in), (0,) of GPT-2's Conv1D
    (in, out), (1, 2, 3) of a convolution; none where the parameter enters no product, or is looked up.
    """

    name: str
    role: Role
    site: str
    shape: tuple[int, ...]
    fan_in_axes: tuple[int, ...] = ()
    block: int | None = None
    writes_residual: bool = False
    tied_to: str | None = None

    @property
    def fan_in(self) -> int:
        """Inputs that feed one output; 1 where no product sums over an axis."""
        return prod(self.shape[axis] for axis in self.fan_in_axes)

    @property
    def fan_out(self) -> int:
        """Number of outputs: the product of the extents that are not fan-in."""
        return self.size // self.fan_in

    @property
    def size(self) -> int:
        return prod(self.shape)


# chosen: a transformer's widest product sums over 4 times as many inputs as its head; measured: 9 times, in 3×3 convolutions,
# is enough for the best rate to move with density while alpha_output is 1
LARGEST_FAN_IN_RATIO = 4


def largest_over_head(tensors: Sequence[Any]) -> tuple[Any, float] | None:
    """The hidden tensor of the largest fan-in and its ratio to the head's, None up to LARGEST_FAN_IN_RATIO."""
    heads = [tensor.fan_in for tensor in tensors if tensor.role == "unembedding"]
    hidden = [tensor for tensor in tensors if tensor.role == "hidden"]
    if not heads or not hidden:
        return None
    largest = max(hidden, key=lambda tensor: tensor.fan_in)
    ratio = largest.fan_in / min(heads)
    return (largest, ratio) if ratio > LARGEST_FAN_IN_RATIO else None


def setting_names(tensor: Any) -> tuple[str, ...]:
    """The keys that settings by tensor may use for one, the most specific first: name, site (`attn.q`), part, role."""
    return tuple(dict.fromkeys((tensor.name, tensor.site, tensor.site.partition(".")[0], tensor.role)))


def tensors(model: Any) -> list[Tensor]:
    """Every tensor of a model of supar's own families."""
    return list(_tensors(**{name: getattr(model, name) for name in _SHAPE}))


@lru_cache(maxsize=8)  # chosen: a plan is made, checked and explained from a few shapes
def _tensors(**values: Any) -> tuple[Tensor, ...]:
    shape = SimpleNamespace(**values)
    found = _inputs(shape)
    if shape.positions == "learned":
        found.append(Tensor("positions", "embedding", "positions", (shape.context, shape.width)))
    for block in range(shape.layers):
        found += _block(shape, block)
    found += _norm(shape, "final_norm", "final_norm", None)
    if not shape.tied:
        found.append(Tensor("unembedding", "unembedding", "unembedding", (shape.vocab, shape.width), (1,)))
    return tuple(found)


def _inputs(shape: SimpleNamespace) -> list[Tensor]:
    """What makes the first activations of tokens, or of an image's patches, before positions are added."""
    if not shape.patch_inputs:
        return [Tensor("embedding", "embedding", "embedding", (shape.vocab, shape.width))]
    found = [Tensor("patches", "embedding", "patches", (shape.width, shape.patch_inputs), (1,))]
    if shape.bias:
        found.append(Tensor("patches.bias", "bias", "patches.bias", (shape.width,)))
    if shape.has_class_token:
        found.append(Tensor("class_token", "embedding", "class_token", (1, shape.width)))
    return found


def _block(shape: SimpleNamespace, block: int) -> list[Tensor]:
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = [("q", query, shape.width), ("k", key, shape.width), ("v", key, shape.width), ("o", shape.width, query)]
    ffn = [("gate", shape.ffn_width, shape.width)] if shape.activation == "swiglu" else []
    ffn += [("up", shape.ffn_width, shape.width), ("down", shape.width, shape.ffn_width)]
    found: list[Tensor] = []
    for part, linears in (("attn", attention), ("mlp", ffn)):
        found += _norm(shape, f"blocks.{block}.{part}_norm", f"{part}_norm", block)
        for letter, d_out, d_in in linears:
            name, site = f"blocks.{block}.{part}.{letter}", f"{part}.{letter}"
            found.append(Tensor(name, "hidden", site, (d_out, d_in), (1,), block, letter in ("o", "down")))
            if shape.bias:
                found.append(Tensor(f"{name}.bias", "bias", f"{site}.bias", (d_out,), (), block))
    return found


def _norm(shape: SimpleNamespace, name: str, site: str, block: int | None) -> list[Tensor]:
    gain = Tensor(name, "norm", site, (shape.width,), (), block)
    if shape.norm == "layernorm" and shape.bias:
        return [gain, Tensor(f"{name}.bias", "bias", f"{site}.bias", (shape.width,), (), block)]
    return [gain]


def ratios(tensor: Tensor, base: Tensor) -> tuple[float, float | None]:
    """m_d and m_fan_out of a tensor relative to the same tensor of the proxy.

    For a hidden weight these are the ratios of its fan-in and its fan-out; for every other tensor of supar's families the
    ratio of the extent that scales, an embedding's outputs or the last one, and None.
    """
    if tensor.role == "hidden":
        return tensor.fan_in / base.fan_in, tensor.fan_out / base.fan_out
    if tensor.role == "embedding":
        return tensor.shape[0 if tensor.fan_in_axes else -1] / base.shape[0 if tensor.fan_in_axes else -1], None
    return tensor.shape[-1] / base.shape[-1], None


MOST_EXTENTS = 5  # a three-dimensional convolution has five


def check_axes(axes: list[int], extents: int, role: Role) -> None:
    """Raise ValueError unless these are different axes, in rising order, of a tensor with this many extents; one or more if hidden."""
    if role == "hidden" and not axes:
        raise ValueError("fan_in_axes: none; expected the axes that a hidden weight's product sums over")
    if axes != sorted(set(axes)) or not all(0 <= axis < extents for axis in axes):
        raise ValueError(f"fan_in_axes: {axes}; expected rising numbers from 0 to {extents - 1}")


def check_names(rows: Sequence[Any]) -> None:
    """Raise ValueError if two rows have the same name or a row is tied to a name that is not among them."""
    names = Counter(row.name for row in rows)
    for row in rows:
        if names[row.name] > 1:
            raise ValueError(f"tensors: {row.name} appears twice")
        if row.tied_to is not None and row.tied_to not in names:
            raise ValueError(f"tensors: {row.name} is tied to {row.tied_to}; expected the name of another tensor")
