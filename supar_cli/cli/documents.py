"""Find and read the documents of commands, and add file and line to their problems."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supar_cli.cli.option_table import flag_of
from supar_cli.cli.options import Flags
from supar_cli.errors import InputError, Problem
from supar_cli.files import template
from supar_cli.planning import document, spec
from supar_cli.planning.document import Document


def find(source: str | None, *names: str) -> tuple[str, str]:
    """(path, name for messages) of the requested document, else the first default name that exists, else the quickstart."""
    found = source or next((name for name in names if Path(name).exists()), None)
    return (found, found) if found else (str(template("quickstart.yaml")), "quickstart template")


def read_all(source: str, missing: str, name: str | None = None) -> list[Document]:
    """All documents of a file or `-`. Raises InputError; `missing` says how to make a file that does not exist."""
    if source != "-" and not Path(source).exists():
        raise InputError(f"{name or source}: no such file; {missing}")
    return document.read_file(source)


def read_one(source: str, missing: str, name: str | None = None) -> Document:
    """The only document of a file or `-`, called `name` in messages. Raises InputError."""
    found = read_all(source, missing, name)
    if len(found) > 1:
        raise InputError(f"{source}: holds {len(found)} documents; expected one")
    found[0].name = name or found[0].name
    return found[0]


def plan_file(source: str | None) -> str:
    """The plan's file: plan.yaml of a run directory, else the given file, by default plan.yaml. Raises InputError."""
    source = source or "plan.yaml"
    if source == "-" or not Path(source).is_dir():
        return source
    if not Path(source, "plan.yaml").exists():
        raise InputError(f"{source}: holds no plan.yaml; expected a plan or a run directory (`supar runs` lists them)")
    return str(Path(source, "plan.yaml"))


def set_path(read: Document, path: tuple[str, ...], value: Any, flag: str = "") -> None:
    """Set one path of a document and create missing mappings along it. Raises InputError if a value along it is not a mapping.

    `flag`: what was typed, which problems with the value name as their place.
    """
    here = read.data
    for end, part in enumerate(path[:-1], 1):
        if not isinstance(here, dict):
            break
        if here.get(part) is None:
            read.flags[path[:end]] = flag
        here[part] = as_section(part, here.get(part))
        here = here[part]
    if not isinstance(here, dict):
        raise InputError(
            f"{flag or '.'.join(path)}: a value along this path is not a mapping in {read.name}; expected a path of keys"
        )
    here[path[-1]] = value
    read.flags[path] = flag


def as_section(key: str, value: Any) -> Any:
    """The mapping that a key's value stands for: nothing yet, a sparsity written as a number, or updates as their method."""
    short = {"sparsity": "sparsity", "updates": "method"}.get(key)
    return {} if value is None else {short: value} if short and not isinstance(value, dict | list) else value


def override(read: Document, section: tuple[str, ...], changes: dict[str, Any], flags: dict[str, str]) -> None:
    """Change keys of a document's section, and remove the keys that `spec.override` removes with them.

    `flags`: what was typed, by key.
    """
    before = _section_of(read, section)
    for name, value in spec.override(before, changes).items():
        if name in flags or name not in before or before[name] != value:
            set_path(read, (*section, name), value, flags.get(name, ""))


def _section_of(read: Document, path: Sequence[str]) -> dict[str, Any]:
    """The mapping at a path of a document; empty where there is none."""
    here: Any = read.data
    for part in path:
        here = as_section(part, here.get(part)) if isinstance(here, dict) else None
    return here if isinstance(here, dict) else {}


def _drop_other_updates(read: Document, flags: Flags) -> None:
    """Drop how the document's masks change where --updates names another method, which has keys of its own."""
    *section, key = flags.document_paths.get("updates", "").split(".")
    if flags.updates and _section_of(read, section).get(key) not in (None, flags.updates):
        set_path(read, tuple(section), None)


def apply(read: Document, flags: Flags, same_data: bool = False) -> None:
    """Put `--set` and then the flags into a document at the table's paths, and drop the keys that a changed value replaces.

    `same_data`: `--data` only gives the data's new location, so their hash is kept. Raises InputError.
    """
    _drop_other_updates(read, flags)
    for setting in flags.set or []:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise InputError(f"--set {setting}: expected A.B=VALUE")
        found = document.read(text or "null", f"--set {path}")
        set_path(read, tuple(path.split(".")), found[0].data if found else None, f"-s {setting}")
    sections: dict[tuple[str, ...], dict[str, str]] = {}
    for name, path in flags.document_paths.items():
        if getattr(flags, name) is not None:
            *section, key = path.split(".")
            sections.setdefault(tuple(section), {})[key] = name
    for at, keys in sections.items():
        changes = {key: getattr(flags, name) for key, name in keys.items()}
        places = {key: flags.places[name] for key, name in keys.items()}
        if same_data and at == ("data",):
            for key, value in changes.items():
                set_path(read, ("data", key), value, places[key])
        else:
            override(read, at, changes, places)


@contextmanager
def naming_flags(flags: Flags) -> Iterator[None]:
    """Name the flag in a problem raised inside as `a.b: what is wrong`, where `--b`, or the flag of that key, was given."""
    try:
        yield
    except InputError as error:
        raise InputError(*(_at_flag(problem, flags) for problem in error.problems)) from None


def _at_flag(problem: Problem | str, flags: Flags) -> Problem | str:
    place, _, what = str(problem).partition(": ")
    by_path = {path: name for name, path in flags.document_paths.items()}
    given = flags.places.get(by_path.get(place, place.rpartition(".")[2]))
    if flags.corpus is not None and isinstance(problem, str):  # there is no document: the keys are flags
        for path, name in by_path.items():
            problem, what = (
                text.replace(f"{path}: ", f"{flag_of(name)} ").replace(path, flag_of(name)) for text in (problem, what)
            )
        problem = problem.removeprefix("data.source: ")
    return f"{given}: {what}" if given else problem


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
