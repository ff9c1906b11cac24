"""Find and read the documents of commands, and add file and line to their problems."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supar_cli.errors import InputError, Problem
from supar_cli.files import template
from supar_cli.planning import document, spec
from supar_cli.planning.document import Document


def find(source: str | None, *names: str) -> tuple[str, str]:
    """(path, name for messages) of the requested document, else the first default name that exists, else the quickstart."""
    found = source or next((name for name in names if Path(name).exists()), None)
    return (found, found) if found else (str(template("quickstart.yaml")), "quickstart template")


def read_all(source: str, missing: str) -> list[Document]:
    """All documents of a file or `-`. Raises InputError; `missing` says how to make a file that does not exist."""
    if source != "-" and not Path(source).exists():
        raise InputError(f"{source}: no such file; {missing}")
    return document.read_file(source)


def read_one(source: str, missing: str, name: str | None = None) -> Document:
    """The only document of a file or `-`, called `name` in messages. Raises InputError."""
    found = read_all(source, missing)
    if len(found) > 1:
        raise InputError(f"{source}: holds {len(found)} documents; expected one")
    found[0].name = name or found[0].name
    return found[0]


def plan_file(source: str | None) -> str:
    """The plan's file: plan.yaml of a run directory, else the given file, by default plan.yaml."""
    source = source or "plan.yaml"
    return str(Path(source, "plan.yaml")) if source != "-" and Path(source).is_dir() else source


def set_path(read: Document, path: tuple[str, ...], value: Any) -> None:
    """Set one path of a document and create missing mappings along it. Raises InputError if a value along it is not a mapping."""
    here = read.data
    for part in path[:-1]:
        if not isinstance(here, dict):
            break
        if here.get(part) is None:
            here[part] = {}
        here = here[part]
    if not isinstance(here, dict):
        raise InputError(
            f"--set {'.'.join(path)}: a value along this path is not a mapping in {read.name}; expected a path of keys"
        )
    here[path[-1]] = value


def override(read: Document, section: tuple[str, ...], changes: dict[str, Any]) -> None:
    """Change keys of a document's section, and remove the keys that `spec.override` removes with them."""
    before: Any = read.data
    for part in section:
        before = before.get(part) if isinstance(before, dict) else None
    before = before if isinstance(before, dict) else {}
    for name, value in spec.override(before, changes).items():
        if name not in before or before[name] != value:
            set_path(read, (*section, name), value)


@contextmanager
def with_locations(read: Document) -> Iterator[None]:
    """Add file and line of `read` to a problem raised inside as `a.b: …` if `a` is one of its keys."""
    try:
        yield
    except InputError as error:
        located = InputError(*(_with_location(read, problem) for problem in error.problems))
        located.is_collective = error.is_collective
        raise located from None


def _with_location(read: Document, problem: Problem | str) -> Problem | str:
    where, _, what = str(problem).partition(": ")
    path = tuple(where.split("."))
    known = isinstance(problem, str) and isinstance(read.data, dict) and path[0] in read.data
    return read.problem(path, what) if known else problem
