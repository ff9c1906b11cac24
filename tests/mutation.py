"""Documents and files that nobody meant, made from valid ones: values replaced by others of every kind, texts garbled."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 10**4, 2**31, 2**31 + 1, 2**63 - 1, 2**63, 10**30, 10**400]),
    st.integers(-(2**70), 2**70),
    st.sampled_from(
        [-1.0, 0.0, 1e-300, 1e-5, 0.5, 0.992, 1.0, 1.5, 1e30, 1e308, float("inf"), float("-inf"), float("nan")]
    ),
    st.sampled_from(
        ["", "auto", "off", "1e-3", "gpt2", "../..", "a b", "x" * 3000, "\u2028", "\ud800", "é", "stdlib", "/"]
    ),
    st.just([]),
    st.just({}),
    st.just([[1, 2], [3]]),
    st.just({"a": {"b": None}}),
)


ODD = [
    *(b"\xef\xbb\xbf", b"\0", b"\t", b"&a ", b"*a", b"!!python/object:os.system ", b"---\n", b"...\n", b"\xff"),
    *(b"? ", b"<<: ", b"| ", b"'", b"%YAML 9\n"),
]


def paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a document, the outer ones first."""
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(found for key, part in parts for found in paths(part, (*path, key)))]


WORDS = [
    *("auto", "gpt2", "llama", "cpu", "exact", "fixed_fan_in", "bernoulli", "block", "2:4", "1:64", "uniform", "erk"),
    *("linear", "cosine", "constant", "none", "completep", "adamw", "sgd", "independent", "coupled"),
    *("sqrt", "rope", "alibi", "learned", "rmsnorm", "layernorm", "swiglu", "gelu", "float32", "bfloat16"),
    *("dense", "sparse", "supar", "sp", "mup", "tensorboard", "text.txt", "bytes", "hidden", "norm"),
    *("random", "tpe", "qmc", "median", "halving", "zero"),
]


def alike(value: Any) -> st.SearchStrategy[Any]:
    """Another value of the same kind, of a size that may well be meant."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 70)
    if isinstance(value, float):
        return st.floats(0, 2) | st.sampled_from([1e-9, 0.25, 0.5, 30.0])
    if isinstance(value, str):
        return st.sampled_from(WORDS)
    return st.just(value) if value is not None else st.integers(0, 70) | st.sampled_from(WORDS)


def changed(draw: st.DataObject, data: Any) -> str:
    """A document with up to three values replaced, removed or doubled."""
    data = copy.deepcopy(data)
    for _ in range(draw.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = [path for path in paths(data) if path]
        if not places:
            break
        *above, key = draw.draw(st.sampled_from(places))
        here = data
        for part in above:
            here = here[part]
        how = draw.draw(st.sampled_from([*["mild"] * 6, "replace", "replace", "remove", "add"]))
        if how == "mild":
            here[key] = draw.draw(alike(here[key]))
        elif how == "remove":
            del here[key]
        elif how == "add" and isinstance(here, dict):
            here[draw.draw(st.sampled_from(["lr", "steps", "x", "kind", "width", "", "~"]))] = copy.deepcopy(
                draw.draw(SCALARS)
            )
        else:
            here[key] = copy.deepcopy(draw.draw(SCALARS))
    return json.dumps(data)  # which is YAML, infinities and all that no YAML has included


def garbled(draw: st.DataObject, text: str) -> bytes:
    """A document's text with bytes replaced, lines doubled, a part cut out or nested deeply."""
    raw = bytearray(text.encode())
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, len(raw) - 1)) if raw else 0
        how = draw.draw(st.sampled_from(["byte", "cut", "line", "deep", "odd", "end"]))
        if how == "byte" and raw:
            raw[at] = draw.draw(st.integers(0, 255))
        elif how == "cut":
            del raw[at : at + draw.draw(st.integers(1, 200))]
        elif how == "line":
            start = raw.rfind(b"\n", 0, at) + 1
            line = raw[start : raw.find(b"\n", at) + 1]
            raw[start:start] = line
        elif how == "deep":
            raw[at:at] = b"[" * draw.draw(st.sampled_from([3, 90, 200, 5000]))
        elif how == "odd":
            raw[at:at] = draw.draw(st.sampled_from(ODD))
        else:
            del raw[at:]
    return bytes(raw)


def garbled_bytes(draw: st.DataObject, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(draw.draw(st.integers(0, 4))):
        changed[draw.draw(st.integers(0, min(len(changed), 2000) - 1))] = draw.draw(st.integers(0, 255))
    return bytes(changed[: draw.draw(st.integers(0, len(changed)))] if draw.draw(st.booleans()) else changed)
