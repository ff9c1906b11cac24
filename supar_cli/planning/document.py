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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from supar_cli.errors import InputError, Problem

Path_ = tuple[str | int, ...]

MAX_DEPTH = 100  # chosen: far beyond any document of ours, far within Python's recursion limit
TOO_DEEP = "nested too deeply"

_BaseLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BaseDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
# YAML 1.2 core schema, chapter 10.3.2: (tag, pattern, first characters)
_CORE = [
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    ("float", _FLOAT, [*"-+.0123456789"]),
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
]
_VALUES: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 0 if text.startswith(("0o", "0x")) else 10),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


class _Loader(_BaseLoader):  # type: ignore[misc, valid-type]
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(_BaseDumper):  # type: ignore[misc, valid-type]
    """Quotes what either YAML version would read as something other than text; a list of mappings has a line for each."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: list[Any]) -> yaml.Node:
        by_line = bool(data) and all(isinstance(item, dict) for item in data)
        node = self.represent_sequence(_TAG + "seq", data, flow_style=not by_line)
        for item in node.value if by_line else ():
            item.flow_style = True
        return node  # type: ignore[no-any-return]


_Dumper.add_representer(list, _Dumper.represent_list)
for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _tag, re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class Document:
    """One parsed document: `data` as plain dicts, lists and scalars, and the line of each path in it.

    `flags`: what was typed on the command line to set a path.
    """

    data: Any
    name: str = "<document>"
    lines: dict[Path_, int] = field(default_factory=dict)
    flags: dict[Path_, str] = field(default_factory=dict)

    def line(self, path: Path_) -> int | None:
        """Line of `path`, or of the nearest ancestor that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def problem(self, path: Path_, what: str, expected: str = "", line: int | None = None) -> Problem:
        """A problem at a path: its place is the flag that set the path or a section around it, else the file and line."""
        for end in range(len(path), 0, -1):
            if flag := self.flags.get(path[:end]):
                return Problem(flag, what, expected, where="" if end == len(path) else dotted(path))
        return Problem(self.name, what, expected, line=line or self.line(path), where=dotted(path))


def dotted(path: Path_) -> str:
    """`("tensors", 3, "lr")` as `tensors[3].lr`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def read(text: str, name: str) -> list[Document]:
    """All documents of a YAML stream. Raises InputError with every problem of the first bad document."""
    try:
        _check_depth(text, name)
        nodes = list(yaml.compose_all(text, Loader=_Loader))
    except yaml.reader.ReaderError as error:
        line = text.encode()[: error.position].count(b"\n") + 1
        raise InputError(Problem(name, f"not valid YAML: {error.reason}", line=line)) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: text that has no UTF-8
        mark = getattr(error, "problem_mark", None)
        what = " ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
        deep = "maximum nesting depth" in what  # libyaml's own limit, which its scanner may reach ahead of any event
        what = TOO_DEEP if deep else f"not valid YAML: {_tab(text, mark) or what or error}"
        raise InputError(Problem(name, what, line=mark.line + 1 if mark else None)) from None
    return [_Reader(name).document(node) for node in nodes]


def _tab(text: str, mark: Any) -> str:
    """What to say of a tab at the place of an error, which YAML's own words do not name."""
    here = text.split("\n")[mark.line][mark.column :] if mark and mark.line < text.count("\n") + 1 else ""
    return "a tab; expected spaces, by which YAML indents" if here.startswith("\t") else ""


def _check_depth(text: str, name: str) -> None:
    """Raise InputError for deep nesting, before libyaml's composer, which recurses on the C stack, can crash on it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            mark = event.start_mark
            raise InputError(Problem(name, TOO_DEEP, line=mark.line + 1 if mark else None))


class _Reader:
    """Makes plain data of the nodes of one document, and collects what is wrong with them."""

    def __init__(self, name: str) -> None:
        self._found = Document(None, name)
        self._problems: list[Problem] = []
        self._seen: set[int] = set()

    def document(self, node: yaml.Node) -> Document:
        self._found.data = self._value(node, ())
        if self._problems:
            raise InputError(*self._problems)
        return self._found

    def _value(self, node: yaml.Node, path: Path_) -> Any:
        self._found.lines.setdefault(path, node.start_mark.line + 1)
        if id(node) in self._seen:
            self._report(path, "a YAML alias", "write the value itself: supar does not read aliases")
            return None
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, i)) for i, item in enumerate(node.value)]
        tag = node.tag.rpartition(":")[2]
        try:
            return _VALUES[tag](node.value)
        except (KeyError, ValueError):
            self._report(path, f"{node.value!r} can't be read as {tag}")

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._report(path, "a key must be text", line=line)
            elif key in mapping:
                first = self._found.lines[(*path, key)]
                self._report((*path, key), f"the key {key!r} appears twice", f"first on line {first}", line=line)
            else:
                self._found.lines[(*path, key)] = line
                mapping[key] = self._value(value_node, (*path, key))
        return mapping

    def _report(self, path: Path_, what: str, expected: str = "", line: int | None = None) -> None:
        self._problems.append(self._found.problem(path, what, expected, line))


def standard_input() -> bytes:
    """All of standard input, or of the file that SUPAR_STDIN names: one of several processes has read it for all.

    Raises InputError where it is empty.
    """
    already = os.environ.get("SUPAR_STDIN")
    raw = Path(already).read_bytes() if already else sys.stdin.buffer.read()
    if not raw.strip():
        expected = "did the command before the pipe fail? `set -o pipefail` shows it"
        raise InputError(Problem("<stdin>", "standard input is empty", expected))
    return raw


def read_file(source: str) -> list[Document]:
    """Documents of a file, or of standard input for `-`. Raises InputError when there is nothing to read."""
    name = "<stdin>" if source == "-" else source
    try:
        raw = standard_input() if source == "-" else Path(source).read_bytes()
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(Problem(name, "not UTF-8 text", line=raw[: error.start].count(b"\n") + 1)) from None
    except OSError as error:
        raise InputError(Problem(name, f"can't be read: {error.strerror or error}")) from None
    if documents := read(text, name):
        return documents
    raise InputError(Problem(name, "the document is empty"))


def write(documents: Iterable[Any]) -> str:
    """YAML text of the documents, keys in the order given; a list of mappings gets one line per item."""
    documents = list(documents)
    start = "---\n" if len(documents) > 1 else ""
    return "".join(start + _text(one) for one in documents)


def write_ascii(documents: list[Any]) -> str:
    """YAML of the documents in ASCII, other characters escaped, for a stream whose encoding is not UTF-8."""
    is_many = len(documents) > 1
    return str(yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1_000_000, explicit_start=is_many))


def _text(document: Any) -> str:
    if isinstance(document, dict) and document:
        return "".join(map(_entry, document, document.values()))
    return _dump(document)


def _dump(value: Any) -> str:
    keywords: dict[str, Any] = {"default_flow_style": False, "sort_keys": False, "allow_unicode": True}
    return str(yaml.dump(value, Dumper=_Dumper, width=1_000_000, **keywords))


def _entry(key: str, value: Any) -> str:
    """A key of a document. PyYAML would take several times as long for a list of mappings."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return f"{_scalar_text(key)}:\n" + "".join(f"- {_flow_text(row)}\n" for row in value)
    return _dump({key: value})


def _flow_text(value: Any) -> str:
    """A value on one line, as PyYAML writes it."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_scalar_text(key)}: {_flow_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow_text, value))}]"
    if value == 0:
        return _scalar_text.__wrapped__(value)  # a cache takes -0.0 for 0.0
    return _scalar_text(value)


@lru_cache(maxsize=4096, typed=True)  # chosen: the words and numbers of the rows of a hundred blocks
def _scalar_text(value: Any) -> str:
    """A text, a number or null, as PyYAML writes it within a list."""
    if (
        isinstance(value, str) and not value.isprintable()
    ):  # else over several lines, which no key within a line may have
        return str(yaml.dump(value, Dumper=_Dumper, width=1_000_000, default_style='"', allow_unicode=True))[:-1]
    return _dump([value])[1:-2]


def content_hash(data: Any) -> str:
    """SHA-256 over the canonical JSON of plain data."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
