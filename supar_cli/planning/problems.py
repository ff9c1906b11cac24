"""From plain data to a validated document: every problem at once, as file:line:path, close misses named."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic_core import ValidationError

from supar_cli.errors import InputError
from supar_cli.planning.document import Document, Path_
from supar_cli.planning.schema import TAG, Section, is_section, section_of

SectionT = TypeVar("SectionT", bound=Section)


def parse(kind: type[SectionT], document: Document) -> SectionT:
    """`document` as a `kind`, one of an earlier version brought to today's form.

    Raises InputError with every problem, each with its line and close misses named.
    """
    data = document.data
    if not isinstance(data, dict):
        raise InputError(document.problem((), "not a mapping", "expected lines of `key: value`"))
    today = get_args(kind.keys().get("kind"))  # none of a section that is not a document
    if upgrade := kind.EARLIER.get(str(data.get("kind"))):
        data = upgrade(data)
    if today and data.get("kind") not in today:
        raise InputError(document.problem(("kind",), f"is {data.get('kind')!r}", f"expected {today[0]}"))
    written = bool(data.get("parents"))  # by supar, with every key: one that is not there was cut off
    lost = [key for key in required_keys(kind) if key not in data] if written else []
    if lost:
        what = f"the keys {', '.join(lost)} are missing"
        raise InputError(document.problem((), what, "expected the whole document: it was cut or edited"))
    try:
        parsed = kind.model_validate(data)
    except ValidationError as error:
        raise InputError(*(document.problem(*problem) for problem in problems(kind, error))) from None
    absent = [  # none of the numbers that decide a run may fall back to a default
        document.problem((section,), f"the key {key!r} is missing")
        for section in kind.WHOLE_SECTIONS
        if written and isinstance(data[section], dict)
        for key in required_keys(type(vars(parsed)[section]))
        if key not in data[section]
    ]
    if absent:
        raise InputError(*absent)
    return parsed


def required_keys(kind: type[Section]) -> list[str]:
    """The keys that a document which supar wrote must have: all but those that were added since."""
    return [key for key, own in kind.fields().items() if not own.is_neutral]


def validate(kind: type[SectionT], values: dict[str, Any], where: str) -> SectionT:
    """Values given in Python as a section. Raises InputError in the words of a document's problems.

    `where` is the values' place, such as `target`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        place = Document(values, name="")
        found = (place.problem((where, *path), what, expected) for path, what, expected in problems(kind, error))
        raise InputError(*map(str, found)) from None


def problems(kind: type[Section], error: ValidationError) -> Iterator[tuple[Path_, str, str]]:
    """(path, what is wrong, what is expected) of each thing that pydantic found."""
    for item in error.errors(include_url=False):
        yield _problem(kind, dict(item))


def _problem(kind: type[Section], item: dict[str, Any]) -> tuple[Path_, str, str]:
    path, section = _walk(kind, tuple(item["loc"]))
    what, expected, given = str(item["msg"]), "", item["input"]
    match item["type"]:
        case "extra_forbidden":
            known = list(section.keys()) if section is not None else []
            close = difflib.get_close_matches(str(path[-1]), known, 1)
            what = f"unknown key {path[-1]!r}"
            expected = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        case "missing":
            path, what = path[:-1], f"the key {path[-1]!r} is missing"
        case "value_error":
            what = what.removeprefix("Value error, ")
            where, colon, rest = what.partition(": ")
            if colon and " " not in where:  # our own validators begin with the key that is wrong
                path, what = (*path, *(int(part) if part.isdigit() else part for part in where.split("."))), rest
            what, _, expected = what.partition("; ")
        case "union_tag" if isinstance(given, dict):
            path, what = (*path, TAG), f"{what}, not {given.get(TAG)!r}"
        case "union_tag" | "model_attributes_type" | "model_type" | "dict_type":
            what, expected = "not a mapping", "expected lines of `key: value`"
        case _:
            for words in ("Input should", "should"), ("valid string", "text"), ("valid number", "number"):
                what = what.replace(*words)
            what += "" if isinstance(given, dict | list) else f", not {given!r}"
    return path, what, expected


def _walk(kind: type[Section], location: Path_) -> tuple[Path_, type[Section] | None]:
    """The path of a document for pydantic's location, and the section that its last part is a key of.

    In a union of sections pydantic's location names the one that was chosen, a part that no document has.
    """
    path: Path_ = ()
    owner: type[Section] | None = None
    section: type[Section] | None = kind
    annotation: Any = None
    for part in location:
        if sum(map(is_section, get_args(annotation))) > 1 and isinstance(part, str) and section_of(annotation, part):
            section, annotation = section_of(annotation, part), None
            continue
        path, owner = (*path, part), section
        if isinstance(part, str):
            annotation = section.keys().get(part) if section is not None else None
            section = section_of(annotation)
    return path, owner
