"""Strict YAML documents: reading with line numbers, writing byte for byte the same, hashing.

Read as YAML 1.2 core (`1e-3` is a number, `off` is text), with duplicate keys and aliases refused. Floats are written so
that YAML 1.1 and 1.2 readers agree on them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from supar_cli.errors import InputError, Problem

Path_ = tuple[str | int, ...]

MAX_DEPTH = 100  # chosen: far beyond any document of ours, far within Python's recursion limit
TOO_DEEP = "nested too deeply"

_BaseLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BaseDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

# YAML 1.2 core schema, chapter 10.3.2: (tag, pattern, first characters)
_CORE = [
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN\0"),
]


class _Loader(_BaseLoader):  # type: ignore[misc, valid-type]
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(_BaseDumper):  # type: ignore[misc, valid-type]
    """Quotes what either YAML version would read as something other than text."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """The tag that a reader takes a plain value for. measured: a third of the time of writing, and texts repeat."""
        if kind is not yaml.ScalarNode:
            return super().resolve(kind, value, implicit)
        key = value, implicit
        found = _RESOLVED.get(key)
        if found is None:
            found = _RESOLVED[key] = super().resolve(kind, value, implicit)
        return found


_RESOLVED: dict[Any, Any] = {}

for _tag, _pattern, _first in _CORE:
    for _char in _first:
        _Loader.yaml_implicit_resolvers.setdefault("" if _char == "\0" else _char, []).append((_tag, _pattern))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first.replace("\0", "")))


@dataclass
class Document:
    """One parsed document: `data` as plain dicts, lists and scalars, and the line of each path in it."""

    data: Any
    name: str = "<document>"
    lines: dict[Path_, int] = field(default_factory=dict)

    def line(self, path: Path_) -> int | None:
        """Line of `path`, or of the nearest ancestor that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def problem(self, path: Path_, what: str, expected: str = "") -> Problem:
        return Problem(self.name, self.line(path), dotted(path), what, expected)


def dotted(path: Path_) -> str:
    """`("tensors", 3, "lr")` as `tensors[3].lr`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def read(text: str, name: str) -> list[Document]:
    """All documents of a YAML stream. Raises InputError with every problem of the first bad document."""
    documents: list[Document] = []
    try:
        _check_depth(text, name)
        nodes = list(yaml.compose_all(text, Loader=_Loader))
    except yaml.reader.ReaderError as error:
        lines_before = text.encode()[: error.position].count(b"\n")
        raise InputError(Problem(name, lines_before + 1, "", f"not valid YAML: {error.reason}")) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: text that has no UTF-8
        mark = getattr(error, "problem_mark", None)
        what = " ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
        line = mark.line + 1 if mark is not None else None
        deep = "maximum nesting depth" in what  # libyaml's own limit, which its scanner may reach ahead of any event
        raise InputError(Problem(name, line, "", TOO_DEEP if deep else f"not valid YAML: {what or error}")) from None
    for node in nodes:
        document = Document(None, name)
        problems: list[Problem] = []
        document.data = _plain(node, (), document, problems, set())
        if problems:
            raise InputError(*problems)
        documents.append(document)
    return documents


def _check_depth(text: str, name: str) -> None:
    """Raise InputError for deep nesting, before libyaml's composer, which recurses on the C stack, can crash on it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                mark = event.start_mark
                raise InputError(Problem(name, mark.line + 1 if mark else None, "", TOO_DEEP))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _plain(node: yaml.Node | None, path: Path_, document: Document, problems: list[Problem], seen: set[int]) -> Any:
    if node is None:
        return None
    document.lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:
        problems.append(document.problem(path, "an alias", "write the value out: supar reads no YAML aliases"))
        return None
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document, problems, seen)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), document, problems, seen) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, path, document, problems)


def _mapping(node: yaml.MappingNode, path: Path_, document: Document, problems: list[Problem], seen: set[int]) -> Any:
    mapping: dict[str, Any] = {}
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        line = key_node.start_mark.line + 1
        if key is None:
            problems.append(Problem(document.name, line, dotted(path), "a key that is not text"))
            continue
        if key in mapping:
            what = f"the key {key!r} stands twice"
            problems.append(
                Problem(document.name, line, dotted((*path, key)), what, f"first on line {first_line[key]}")
            )
            continue
        first_line[key] = line
        document.lines[(*path, key)] = line
        mapping[key] = _plain(value_node, (*path, key), document, problems, seen)
    return mapping


def _scalar(node: yaml.ScalarNode, path: Path_, document: Document, problems: list[Problem]) -> Any:
    text, tag = node.value, node.tag.rpartition(":")[2]
    if tag == "str":
        return text
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    try:
        if tag == "int":
            return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
        if tag == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        pass
    problems.append(document.problem(path, f"{text!r} can't be read as {tag}"))
    return None


def standard_input() -> bytes:
    """All of standard input, or of the file that SUPAR_STDIN names: one of several processes has read it for all."""
    already = os.environ.get("SUPAR_STDIN")
    return Path(already).read_bytes() if already else sys.stdin.buffer.read()


def read_file(source: str) -> list[Document]:
    """Documents of a file, or of standard input for `-`. Raises InputError when there is nothing to read."""
    if source == "-":
        name, raw = "<stdin>", standard_input()
        if not raw.strip():
            raise InputError(
                Problem(
                    name,
                    None,
                    "",
                    "standard input is empty",
                    "the command before the pipe failed? (`set -o pipefail` shows it)",
                )
            )
    else:
        name = source
        try:
            raw = Path(source).read_bytes()
        except OSError as error:
            raise InputError(Problem(name, None, "", f"can't be read: {error.strerror or error}")) from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(Problem(name, line, "", "not UTF-8 text")) from None
    documents = read(text, name)
    if not documents:
        raise InputError(Problem(name, None, "", "the document is empty"))
    return documents


MANY_ROWS = 8  # chosen: a list of so many mappings is written without PyYAML, which takes several times as long


def write(documents: Iterable[Any]) -> str:
    """YAML text of the documents, keys in the order given; a list of mappings gets one line per item."""
    documents = list(documents)
    start = "---\n" if len(documents) > 1 else ""
    return "".join(start + (_pieces(one) or _serialize(one)) for one in documents)


def _serialize(value: Any) -> str:
    return str(yaml.serialize(_node(value), Dumper=_Dumper, allow_unicode=True, width=1_000_000))


def _pieces(document: Any) -> str | None:
    """A mapping whose long lists of mappings are plain, key by key; None for any other document."""
    if not isinstance(document, dict):
        return None
    lines = {
        key: _lines(value) for key, value in document.items() if isinstance(value, list) and len(value) >= MANY_ROWS
    }
    if not any(lines.values()):
        return None
    return "".join(
        f"{key}:\n{rows}" if (rows := lines.get(key)) else _serialize({key: value}) for key, value in document.items()
    )


def _lines(rows: list[Any]) -> str | None:
    """A line for each mapping; None where something in them needs quotes."""
    try:
        return "".join(f"- {_flow_text(row)}\n" for row in rows) if all(isinstance(row, dict) for row in rows) else None
    except _NotPlainError:
        return None


class _NotPlainError(Exception):
    """A value that only PyYAML knows how to write."""


def _flow_text(value: Any) -> str:
    if isinstance(value, str):
        return _plain_text(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_plain_text(key)}: {_flow_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow_text, value))}]"
    return _represent(type(value), repr(value), value)[1]


@cache
def _plain_text(text: str) -> str:
    """A text that needs no quotes. Raises _NotPlainError."""
    if not _PLAIN_WORD.fullmatch(text) or _DUMPER.resolve(yaml.ScalarNode, text, (True, False)) != _TAG + "str":
        raise _NotPlainError
    return text


_PLAIN_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,99}")
_DUMPER = _Dumper(StringIO())
_TAG = "tag:yaml.org,2002:"
_REPRESENTER = yaml.representer.SafeRepresenter()


def _node(value: Any, flow: bool = False) -> yaml.Node:
    """Plain data as the nodes that YAML is written from; `flow`: on one line. Faster than PyYAML's own way to them."""
    kind = type(value)
    if kind is str:
        return yaml.ScalarNode(_TAG + "str", value)
    if kind is int:
        return yaml.ScalarNode(_TAG + "int", str(value))
    if isinstance(value, dict):
        pairs = [(_node(key), _node(item, flow)) for key, item in value.items()]
        return yaml.MappingNode(_TAG + "map", pairs, flow_style=flow)
    if isinstance(value, list):
        # a list of mappings has one line for each
        by_line = not flow and bool(value) and all(isinstance(item, dict) for item in value)
        return yaml.SequenceNode(_TAG + "seq", [_node(item, True) for item in value], flow_style=not by_line)
    tag, text = _represent(kind, repr(value), value)
    return yaml.ScalarNode(tag, text)


_SCALARS: dict[tuple[type, str], tuple[str, str]] = {}


def _represent(kind: type, text: str, value: Any) -> tuple[str, str]:
    """Tag and text of a number, a truth value or nothing, as PyYAML writes them."""
    if (kind, text) not in _SCALARS:
        node = _REPRESENTER.represent_data(value)
        _SCALARS[kind, text] = node.tag, node.value
    return _SCALARS[kind, text]


def content_hash(data: Any) -> str:
    """SHA-256 over the canonical JSON of plain data."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
