"""The model section of documents: the shape of a decoder-only transformer of supar's own families."""

from __future__ import annotations

from collections.abc import Collection
from math import gcd
from typing import Any, Literal

from supar_cli.planning.schema import Field, Section

Family = Literal["gpt2", "llama"]

MOST_LAYERS = 10_000  # chosen: ten times the deepest transformer trained; a plan has a line for each layer's tensors

FAMILY_PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layernorm", "activation": "gelu", "positions": "learned"},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope"},
}


class Model(Section):
    """Shape of a decoder-only transformer. What is left out follows from the family and the width, and is written out."""

    family: Family
    width: int = Field(gt=0, le=2**31)
    layers: int = Field(gt=0, le=MOST_LAYERS)
    heads: int = Field(gt=0, le=2**31)
    kv_heads: int = Field(gt=0, le=2**31)
    ffn_width: int = Field(gt=0, le=2**31)
    context: int = Field(gt=0, le=2**31)
    vocab: int = Field(gt=1, le=2**31)
    head_width: int = Field(default=None, neutral=True, gt=0, le=2**31)  # never None in a valid section
    norm: Literal["layernorm", "rmsnorm"]
    activation: Literal["gelu", "gelu_tanh", "swiglu"]
    positions: Literal["learned", "rope", "alibi"]
    bias: bool = False
    tied: bool = True
    norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)

    @classmethod
    def fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = {**FAMILY_PARTS.get(str(data.get("family")), FAMILY_PARTS["gpt2"]), **data}
        # where the key it follows from is wrong, a filled-in value is not reported as a second mistake
        heads, width = (found if isinstance(found := filled.get(key), int) else 1 for key in ("heads", "width"))
        filled.setdefault("kv_heads", max(1, heads))
        filled.setdefault("ffn_width", 4 * max(1, width))
        if filled.get("head_width") is None and width % max(1, heads) == 0:
            filled["head_width"] = max(1, width // max(1, heads))
        return filled

    def check(self) -> None:
        if self.head_width is None:
            what = f"heads: {self.heads} heads don't divide the width {self.width}"
            raise ValueError(f"{what}; expected a divisor of it, or head_width")
        if self.attention_width > 2**31:
            raise ValueError(f"head_width: {self.heads} heads of {self.head_width} are wider than {2**31}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} don't divide the {self.heads} heads; expected a divisor")
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"heads: rope positions need an even head width, not {self.head_width}")

    def model_dump(self, *, exclude: Collection[str] = (), **options: Any) -> dict[str, Any]:
        """As every section's; documents and hashes leave the head width out where it is the usual one, width / heads."""
        usual = {"head_width"} if self.attention_width == self.width else set()
        return super().model_dump(exclude={*exclude, *usual}, **options)

    @property
    def attention_width(self) -> int:
        """Extent of the queries and of the output projection's input: that of all heads together."""
        return self.heads * self.head_width

    @property
    def width_step(self) -> int:
        """The widths with as many heads per width, in whole heads, are the multiples of this one."""
        return self.width // gcd(self.width, self.heads)
