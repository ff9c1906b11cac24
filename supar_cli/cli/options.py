"""Commands made from the table of all options.

A command names the options that it takes, in the order of its help, and gets their values as one object:

    @command("proxy width steps", "set out force json quiet", steps={"help": "Training steps of a run."})
    def transfer(flags: Flags) -> None:
        read = documents.read_one(flags.proxy or "proxy.yaml", "expected a proxy, which `supar tune-proxy` writes")
        documents.apply(read, flags)

Keywords change columns of the table (`option_table.py`) for this command alone. `flags.width` is the value of `--width`; an
option that the command does not take is None. `documents.apply` puts `--set` and every flag that has a path into the
document.
"""

from collections.abc import Callable
from dataclasses import replace
from inspect import Signature, getdoc
from types import SimpleNamespace
from typing import Any

from supar_cli.cli.option_table import OPTIONS, flag_of
from supar_cli.errors import InputError, Problem


class Flags(SimpleNamespace):
    """The values of a command's options by name, None for those that it does not take.

    `document_paths`: the keys that options set, by name; `places`: what was typed, such as `--width 64`, by name.
    """

    document_paths: dict[str, str]
    places: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        if name not in OPTIONS:
            raise AttributeError(name)
        return None


def command(*taken: str, **changes: dict[str, Any]) -> Callable[[Callable[[Flags], None]], Callable[..., None]]:
    """Make a command with the named options (each text lists several names). `changes` overrides columns of single options.

    The command's docstring is its help, and ends with the line `Examples:` and examples.
    """
    options = {name: replace(OPTIONS[name], **changes.get(name, {})) for text in taken for name in text.split()}

    def decorate(function: Callable[[Flags], None]) -> Callable[..., None]:
        def call(**given: Any) -> None:
            read, problems = {}, list[Problem | str]()
            for name, option in options.items():
                try:
                    read[name] = option.value(name if option.argument else flag_of(name), given[name])
                except InputError as error:
                    problems += error.problems
            if read.get("dry_run") and read.get("json"):
                problems.append("--json: a dry run shows text on stderr; expected only one of --dry-run and --json")
            if problems:
                raise InputError(*problems)
            paths = {name: option.path for name, option in options.items() if option.path}
            places = {name: _place(name, given[name]) for name, option in options.items() if not option.argument}
            function(Flags(**read, document_paths=paths, places=places))

        call.__name__ = function.__name__
        call.__doc__, _, call.examples = (getdoc(function) or "").partition("Examples:\n")  # type: ignore[attr-defined]
        call.__signature__ = Signature([option.parameter(name) for name, option in options.items()])  # type: ignore[attr-defined]
        return call

    return decorate


def _place(name: str, given: Any) -> str:
    """A flag as it was typed, for problems with its value."""
    words = given if isinstance(given, list) else [] if given is None or isinstance(given, bool) else [given]
    return " ".join(f"{flag_of(name)} {word}" for word in words)


def require_one(flags: Flags, one: str, other: str) -> None:
    """Raise InputError where both of two options are given."""
    if getattr(flags, one) is not None and getattr(flags, other) is not None:
        raise InputError(f"{flag_of(one)}: cannot be combined with {flag_of(other)}; expected only one of them")


def workers_of(flags: Flags) -> dict[str, Any]:
    """The keyword arguments that tell the package's functions where to execute runs."""
    return {name: getattr(flags, name) for name in ("jobs", "executor", "executor_set", "verbose")}
