"""The data section of documents: a source or several, and how their files are read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from supar_cli.planning.schema import Field, Section

DataFormat = Literal["auto", "text", "jsonl", "parquet", "arrow", "nanogpt", "llmc", "npy"]
TokenType = Literal["auto", "uint16", "uint32"]
DIGITS = "digits"  # the images inside scikit-learn, 8 × 8 in 10 classes
MIXTURE = "mixture"  # what `data.source` says where `data.sources` is given


class Source(Section):
    """One of several sources. `weight`: its share of the training sequences, relative to the others'. The rest as in `Data`."""

    source: str
    weight: float = Field(gt=0)
    format: DataFormat = "auto"
    field: str = "text"
    dtype: TokenType = "auto"
    encoding: str = "utf-8"
    hash: str | None = None

    def check(self) -> None:
        _check_encoding(self.encoding)


# the keys that belong to one kind of data
_OF_TOKENS = ("format", "tokenizer", "field", "dtype", "encoding", "separator", "sources")
_OF_IMAGES = ("size", "image", "label", "flip", "shift")


class Data(Section):
    """Text or tokens, or labelled images. `hash` identifies the content and how it is read; a mismatch is refused by name.

    `dtype` is the integer of raw token files, which do not name it. `separator` is the token between documents; null: the
    tokenizer's own. With `sources`, `source` is `mixture`, and each training sequence is drawn from one of them.

    Of images, `size` is what they are resized to (height, width), `image` and `label` are columns of tables, and training
    images are mirrored at random with `flip` and moved by up to `shift` pixels.
    """

    kind: Literal["tokens", "images"] = Field(default="tokens", neutral=True, omit=True)
    source: str = "stdlib"
    format: DataFormat = "auto"
    tokenizer: str = "bytes"
    field: str = "text"
    hash: str | None = None
    dtype: TokenType = Field(default="auto", neutral=True, omit=True)
    encoding: str = Field(default="utf-8", neutral=True, omit=True)
    separator: str | None = Field(default=None, neutral=True, omit=True)
    sources: list[Source] = Field(default_factory=list, neutral=True, omit=True)
    size: list[int] | None = Field(default=None, neutral=True, omit=True, min_length=2, max_length=2)
    image: str | None = Field(default=None, neutral=True, omit=True)
    label: str | None = Field(default=None, neutral=True, omit=True)
    flip: bool = Field(default=False, neutral=True, omit=True)
    shift: int = Field(default=0, neutral=True, omit=True, ge=0, le=2**16)

    @classmethod
    def fill_defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("kind") == "images":
            data = {"source": DIGITS, **data}
        if isinstance(data, dict) and data.get("sources", True) is None:  # dropped by another source
            return {key: value for key, value in data.items() if key != "sources"}
        return {"source": MIXTURE, **data} if isinstance(data, dict) and data.get("sources") else data

    def check(self) -> None:
        _check_encoding(self.encoding)
        for key in self._of_the_other_kind:
            if vars(self)[key] != Data.fields()[key].value:
                raise ValueError(f"{key}: {vars(self)[key]!r} with the kind {self.kind}; expected no such key")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size: {self.size}; expected a height and a width of 1 or more")
        for key in ("source", "format", "field", "dtype", "encoding"):
            expected = MIXTURE if key == "source" else Data.fields()[key].value
            if self.sources and vars(self)[key] != expected:
                raise ValueError(
                    f"{key}: {vars(self)[key]} is given beside sources; expected it in each of the sources"
                )

    @property
    def _of_the_other_kind(self) -> tuple[str, ...]:
        return _OF_IMAGES if self.kind == "tokens" else _OF_TOKENS

    def model_dump(self, *, exclude: Collection[str] = (), **options: Any) -> dict[str, Any]:
        """As every section's, without the keys of the other kind."""
        return super().model_dump(exclude={*exclude, *self._of_the_other_kind}, **options)


def _check_encoding(name: str) -> None:
    try:
        "".encode(name)
    except LookupError:
        raise ValueError(f"encoding: {name} is not known; expected an encoding such as latin-1 or utf-16") from None
