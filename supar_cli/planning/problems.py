"""From plain data to a validated document: every problem at once, as file:line:path, close misses named."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from pydantic_core import ValidationError

from supar_cli.errors import InputError
from supar_cli.planning.document import Document
from supar_cli.planning.schema import Section, problems

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
        raise wrong_kind(document, today[0])
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
        for own in (vars(parsed)[section],)
        for key in required_keys(type(own))
        if key not in data[section] and key in own.model_dump()
    ]
    if absent:
        raise InputError(*absent)
    return parsed


# what becomes of a document, by its type
USES = {
    "spec": "`supar tune-proxy` makes a proxy of it",
    "proxy": "`supar transfer` makes a plan of it",
    "plan": "`supar train` trains it",
    "sweep": "`supar sweep` measures it",
}


def wrong_kind(document: Document, *expected: str) -> InputError:
    """The error of a document of another kind, or of none, with the command that takes it."""
    kind = document.data.get("kind") if isinstance(document.data, dict) else None
    wanted = f"expected {'one of ' * (len(expected) > 1)}{', '.join(expected)}"
    if kind is None:
        return InputError(document.problem(("kind",), "is missing", wanted))
    use = USES.get(str(kind).removeprefix("supar.").partition("/")[0])
    return InputError(document.problem(("kind",), f"is {kind!r}" + (f" ({use})" if use else ""), wanted))


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
