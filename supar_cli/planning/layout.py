"""From a model's shape to every tensor's name, role and shape, in the order of the forward pass.

A tensor is known by its role and site, never by its name's spelling or its number of dimensions. A weight's name is its
module's path; a bias is that path with `.bias`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from supar_cli.planning.rules import Role


class Shape(Protocol):
    """What the layout needs to know of a model; `spec.Model` has it."""

    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def ffn_width(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def norm(self) -> str: ...
    @property
    def activation(self) -> str: ...
    @property
    def positions(self) -> str: ...
    @property
    def bias(self) -> bool: ...
    @property
    def tied(self) -> bool: ...


@dataclass(frozen=True)
class Tensor:
    """One parameter tensor. `shape` is (out, in) for linear weights; `site` names its place within a block."""

    name: str
    role: Role
    site: str
    shape: tuple[int, ...]
    block: int | None = None
    writes_residual: bool = False

    @property
    def fan_in(self) -> int:
        """Inputs that feed one output; for embeddings, biases and gains the extent that scales."""
        return self.shape[-1]

    @property
    def keys(self) -> tuple[str, ...]:
        """What settings by tensor may call it, the most specific first: name, site (`attn.q`), part (`attn`), role."""
        return tuple(dict.fromkeys((self.name, self.site, self.site.partition(".")[0], self.role)))

    @property
    def size(self) -> int:
        size = 1
        for extent in self.shape:
            size *= extent
        return size


def tensors(shape: Shape) -> list[Tensor]:
    """Every tensor of a `gpt2` or `llama` family model."""
    found = [Tensor("embedding", "embedding", "embedding", (shape.vocab, shape.width))]
    if shape.positions == "learned":
        found.append(Tensor("positions", "embedding", "positions", (shape.context, shape.width)))
    for block in range(shape.layers):
        found += _block(shape, block)
    found += _norm(shape, "final_norm", "final_norm", None)
    if not shape.tied:
        found.append(Tensor("unembedding", "unembedding", "unembedding", (shape.vocab, shape.width)))
    return found


def _block(shape: Shape, block: int) -> list[Tensor]:
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = [("q", query, shape.width), ("k", key, shape.width), ("v", key, shape.width), ("o", shape.width, query)]
    ffn = [("gate", shape.ffn_width, shape.width)] if shape.activation == "swiglu" else []
    ffn += [("up", shape.ffn_width, shape.width), ("down", shape.width, shape.ffn_width)]
    found: list[Tensor] = []
    for part, linears in (("attn", attention), ("mlp", ffn)):
        found += _norm(shape, f"blocks.{block}.{part}_norm", f"{part}_norm", block)
        for letter, d_out, d_in in linears:
            name, site = f"blocks.{block}.{part}.{letter}", f"{part}.{letter}"
            found.append(Tensor(name, "hidden", site, (d_out, d_in), block, letter in ("o", "down")))
            if shape.bias:
                found.append(Tensor(f"{name}.bias", "bias", f"{site}.bias", (d_out,), block))
    return found


def _norm(shape: Shape, name: str, site: str, block: int | None) -> list[Tensor]:
    gain = Tensor(name, "norm", site, (shape.width,), block)
    if shape.norm == "layernorm" and shape.bias:
        return [gain, Tensor(f"{name}.bias", "bias", f"{site}.bias", (shape.width,), block)]
    return [gain]
