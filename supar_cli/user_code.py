"""The user's code: functions named as `module:function`, errors told apart from supar's, the words of a command."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from inspect import signature
from pathlib import Path
from typing import Any

from supar_cli.errors import InputError, suggestion

# folders whose code is not the user's: supar, the standard library, installed packages
_OTHER_CODE = [
    str(Path(__file__).resolve().parent),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
]


def load_function(name: str, flag: str = "") -> Any:
    """What `module:function` names; modules are sought in the working directory first. Raises InputError at the flag."""
    place = f"{flag} {name}".strip()
    module, colon, function = name.partition(":")
    is_file = module.endswith(".py")
    if is_file or not (colon and all(part.isidentifier() for part in [*module.split("."), *function.split(".")])):
        example = f"{Path(module).stem if is_file else module or 'mymodel'}:{function or 'make'}"
        raise InputError(f"{place}: expected MODULE:FUNCTION, such as {example}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()  # a module may have been written a moment ago
    with calling_user_code(place):
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not (error.name and (module == error.name or module.startswith(f"{error.name}."))):
                raise
            here = _modules_here(module)
            expected = suggestion(module, here) if here else "expected a file of that name with .py"
            raise InputError(f"{place}: no module {error.name} here; {expected}") from None
        for part in function.split("."):
            if not hasattr(found, part):
                public = [one for one, value in vars(found).items() if callable(value) and not one.startswith("_")]
                raise InputError(f"{place}: {module} has no {function}; {suggestion(part, public)}")
            found = getattr(found, part)
    return found


def _modules_here(module: str) -> list[str]:
    """The modules in the folder in which a module was sought, by the names that they are imported by."""
    package = module.rpartition(".")[0]
    folder = Path(*package.split(".")) if package else Path()
    files = [path.stem for path in folder.glob("*.py")] + [path.parent.name for path in folder.glob("*/__init__.py")]
    return sorted(f"{package}.{one}" if package else one for one in files if one != "__init__")


def require_keywords(function: Callable[..., Any], place: str, keywords: dict[str, Any]) -> None:
    """Raise InputError for a function that can't be called with these keywords alone."""
    if not callable(function):
        raise InputError(f"{place}: a value of type {type(function).__name__}; expected a function")
    try:
        signature(function).bind(**keywords)
    except TypeError as error:
        called = ", ".join(f"{name}={value}" for name, value in keywords.items())
        raise InputError(f"{place}: {error}; expected a function that can be called with ({called})") from None
    except ValueError:  # of a function without a signature only a call tells
        pass


def can_be_called(function: Any, *arguments: Any) -> bool:
    """Whether something is a function that takes these arguments; of one without a signature only a call would tell."""
    if not callable(function):
        return False
    with suppress(ValueError):
        try:
            signature(function).bind(*arguments)
        except TypeError:
            return False
    return True


@contextmanager
def calling_user_code(place: str = "") -> Iterator[None]:
    """Raise an error in the user's code as InputError with the file and line in it; what it prints goes to stderr.

    A function of the user's that does not take what it is called with has no line of his in it, and is his error too.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        at = _line_of(error)
        is_called_wrongly = bool(place) and isinstance(error, TypeError) and "argument" in str(error)
        if at is None and not is_called_wrongly:
            raise
        text = " ".join(str(error).split())
        what = type(error).__name__ + (f": {text}" if text else "")
        raise InputError(": ".join(filter(None, [place, at, what]))) from error


def _line_of(error: BaseException) -> str | None:
    """FILE:LINE of the last line of the user's code on the way to an error; None if there was none."""
    if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
        return f"{error.filename}:{error.lineno}"
    lines = [
        f"{one.filename}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__) if _is_users(one.filename)
    ]
    return lines[-1] if lines else None


def _is_users(filename: str) -> bool:
    """Whether code is the user's."""
    return not filename.startswith("<") and not any(
        Path(filename).resolve().is_relative_to(folder) for folder in _OTHER_CODE
    )


def words_of(command: str) -> list[str]:
    """The words of a command as a shell splits it; by its spaces where a quote is not closed, which the shell will say."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()
