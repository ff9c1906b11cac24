"""The model section of documents: the shape of a transformer of supar's own families, decoders and the vision transformer."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from math import gcd
from typing import Any, ClassVar, Literal

from supar_cli.planning.data_section import Data
from supar_cli.planning.schema import Field, Section

Family = Literal["gpt2", "llama"]

MOST_LAYERS = 10_000  # chosen: ten times the deepest transformer trained; a plan has a line for each layer's tensors

FAMILY_PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layernorm", "activation": "gelu", "positions": "learned"},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope"},
    "vit": {"norm": "layernorm", "activation": "gelu", "positions": "learned", "bias": True, "tied": False},
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

    data_kind: ClassVar[str] = "tokens"  # what it reads
    rows: ClassVar[str] = "sequences"  # what a batch has so many of
    loss_unit: ClassVar[str] = "nats per token"
    is_causal: ClassVar[bool] = True  # whether a position sees only those before it
    patch_inputs: ClassVar[int] = 0  # numbers of a patch; 0 where tokens are looked up
    has_class_token: ClassVar[bool] = False

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
    def rows_text(self) -> str:
        """What rows of a batch are, in words."""
        return f"{self.rows} of {self.context} tokens"

    @property
    def attention_width(self) -> int:
        """Extent of the queries and of the output projection's input: that of all heads together."""
        return self.heads * self.head_width

    @property
    def width_step(self) -> int:
        """The widths with as many heads per width, in whole heads, are the multiples of this one."""
        return self.width // gcd(self.width, self.heads)


class ViT(Model):
    """Shape of a vision transformer: patches of an image in place of tokens, each of which sees all others.

    `context` is the number of patches, and one more with a class token; `vocab` is the number of classes. Both follow from
    the other keys, and documents leave them out. Dosovitskiy et al. 2021, arXiv 2010.11929.
    """

    family: Literal["vit"]  # type: ignore[assignment]
    image: list[int] = Field(min_length=2, max_length=2)  # height, width
    channels: int = Field(gt=0, le=2**16)
    patch: int = Field(gt=0, le=2**16)
    classes: int = Field(gt=1, le=2**31)
    pooling: Literal["class", "mean"] = "class"
    context: int = Field(default=None, neutral=True, gt=0, le=2**31)  # never None in a valid section
    vocab: int = Field(default=None, neutral=True, gt=1, le=2**31)  # nor this one

    data_kind: ClassVar[str] = "images"
    rows: ClassVar[str] = "images"
    loss_unit: ClassVar[str] = "nats per image"
    is_causal: ClassVar[bool] = False

    @classmethod
    def fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = dict(super().fill_defaults(data))
        with suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
            height, width = filled["image"]
            has_token = filled.get("pooling", "class") == "class"
            filled.setdefault("context", (height // filled["patch"]) * (width // filled["patch"]) + has_token)
            filled.setdefault("vocab", max(2, filled["classes"]))  # a wrong number is reported once
        return filled

    def check(self) -> None:
        if min(self.image) < 1 or any(extent % self.patch for extent in self.image):
            raise ValueError(f"patch: patches of {self.patch} don't divide the image {self.image}; expected a divisor")
        super().check()
        shape = {"context": self.patches + self.has_class_token, "vocab": self.classes}
        fixed = {"norm": "layernorm", "positions": "learned", "tied": False, **shape}
        for key, value in fixed.items():
            if vars(self)[key] != value:
                raise ValueError(f"{key}: {vars(self)[key]}; expected {value} of a vision transformer, or no such key")

    def model_dump(self, *, exclude: Collection[str] = (), **options: Any) -> dict[str, Any]:
        return super().model_dump(exclude={*exclude, "context", "vocab"}, **options)

    @property
    def rows_text(self) -> str:
        return f"{self.rows} of {self.image[0]}×{self.image[1]} in patches of {self.patch}×{self.patch}"

    @property
    def patches(self) -> int:
        """The patches of an image."""
        return (self.image[0] // self.patch) * (self.image[1] // self.patch)

    @property
    def patch_inputs(self) -> int:  # type: ignore[override]
        """The numbers of a patch."""
        return self.channels * self.patch**2

    @property
    def has_class_token(self) -> bool:  # type: ignore[override]
        return self.pooling == "class"


def require_kind(model: Model, data: Data | None) -> None:
    """Raise ValueError unless the data are of the kind that a model reads."""
    if data is not None and data.kind != model.data_kind:
        raise ValueError(f"data.kind: {data.kind}; expected {model.data_kind}, which the family {model.family} reads")
