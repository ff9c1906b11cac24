"""The data section of documents: a source or several, and how their files are read."""

from __future__ import annotations

from typing import Any, Literal

from supar_cli.planning.schema import Field, Section

DataFormat = Literal["auto", "text", "jsonl", "parquet", "arrow", "nanogpt", "llmc", "npy"]
TokenType = Literal["auto", "uint16", "uint32"]
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


class Data(Section):
    """Text or tokens. `hash` identifies the content and how it is read; a mismatch is refused by name.

    `dtype` is the integer of raw token files, which do not name it. `separator` is the token between documents; null: the
    tokenizer's own. With `sources`, `source` is `mixture`, and each training sequence is drawn from one of them.
    """

    source: str = "stdlib"
    format: DataFormat = "auto"
    tokenizer: str = "bytes"
    field: str = "text"
    hash: str | None = None
    dtype: TokenType = Field(default="auto", neutral=True, omit=True)
    encoding: str = Field(default="utf-8", neutral=True, omit=True)
    separator: str | None = Field(default=None, neutral=True, omit=True)
    sources: list[Source] = Field(default_factory=list, neutral=True, omit=True)

    @classmethod
    def fill_defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sources", True) is None:  # dropped by another source
            return {key: value for key, value in data.items() if key != "sources"}
        return {"source": MIXTURE, **data} if isinstance(data, dict) and data.get("sources") else data

    def check(self) -> None:
        _check_encoding(self.encoding)
        for key in ("source", "format", "field", "dtype", "encoding"):
            expected = MIXTURE if key == "source" else Data.fields()[key].value
            if self.sources and vars(self)[key] != expected:
                raise ValueError(
                    f"{key}: {vars(self)[key]} is given beside sources; expected it in each of the sources"
                )


def _check_encoding(name: str) -> None:
    try:
        "".encode(name)
    except LookupError:
        raise ValueError(f"encoding: {name} is not known; expected an encoding such as latin-1 or utf-16") from None
