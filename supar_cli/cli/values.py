"""The values of flags, read from their texts with errors that name the flag, and the words that shells complete."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

from supar_cli.errors import InputError, suggestion
from supar_cli.planning import document, templates
from supar_cli.planning.density import Share, share
from supar_cli.planning.rules import ParameterizationName, Role
from supar_cli.planning.schema import Section, section_of

FIGURES = ("fig1", "fig6", "fig7", "fig9", "fig10", "fig11", "fig12", "fig12-400", "fig13", "fig14")  # of the paper
PRESETS = (*FIGURES, "nm", "imp", "ppo", "mlp-lr", "mlp-lr-sgd", "vit-lr", "vit-width")


def number(kind: type[int] | type[float], least: int | None) -> Callable[[str, str], Any]:
    """The reader of numbers of a kind, from the least on where there is one."""
    expected = f"expected a {'whole ' if kind is int else ''}number"
    expected += "" if least is None else f" of at least {least}"

    def read(flag: str, text: str) -> Any:
        try:
            found = kind(text)
            if least is None or found >= least:
                return found
        except ValueError:
            pass
        raise InputError(f"{flag} {text}: {expected}")

    return read


def seconds(flag: str, text: str) -> float:
    """Seconds of `90s`, `30m`, `2h` or `1:30:00`. Raises InputError."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    parts = text.split(":")
    try:
        if 2 <= len(parts) <= 3 and all(part.isascii() and part.isdigit() for part in parts):
            found = sum(int(part) * 60.0**power for power, part in enumerate(reversed(parts)))
        else:
            found = float(text[:-1]) * units[text[-1:]]
        if not 0 < found < float("inf"):
            raise ValueError
    except (KeyError, ValueError):
        raise InputError(f"{flag} {text}: expected a time such as 90s, 30m, 2h or 1:30:00") from None
    return found


def counts(flag: str, text: str) -> list[int]:
    """Whole numbers above 0 with commas between them. Raises InputError."""
    return [number(int, 1)(flag, part.strip()) for part in text.split(",")]


def names(_flag: str, text: str) -> list[str]:
    """Names with commas between them."""
    return [part.strip() for part in text.split(",")]


def shares(flag: str, text: str) -> list[Share]:
    """Numbers, fractions or percentages with commas between them, exactly as they are written. Raises InputError."""
    for part in text.split(","):
        try:
            share(part)
        except ValueError:
            expected = "expected a number such as 0.992, 99.2% or 127/128"
            raise InputError(f"{flag} {text}: {part!r} is not a number; {expected}") from None
    return [share(part) for part in text.split(",")]


def one_share(flag: str, text: str) -> Share:
    """A single number, fraction or percentage. Raises InputError."""
    found = shares(flag, text)
    if len(found) != 1:
        raise InputError(f"{flag} {text}: expected a single one; --over density=… takes several")
    return found[0]


def one_of(*words: str) -> Callable[[str, str], str]:
    """The reader of one of several words."""

    def read(flag: str, text: str) -> str:
        if text not in words:
            raise InputError(f"{flag} {text}: {suggestion(text, words)}")
        return text

    return read


parameterization = one_of(*get_args(ParameterizationName))
scope, scale = one_of("tensor", "global"), one_of("energy", "none")


def file(_flag: str, text: str) -> str:
    """The path of a file that a document elsewhere is to name."""
    return str(Path(text).absolute())


def sizes(flag: str, text: str) -> dict[str, int]:
    """`NAME=N` with commas between them. Raises InputError."""
    found = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if not name.isidentifier() or name in found or not value.isdecimal() or int(value) < 1:
            raise InputError(f"{flag} {text}: expected NAME=N[,NAME=N…] with whole numbers above 0, such as width=256")
        found[name] = int(value)
    return found


def roles(flag: str, texts: list[str]) -> dict[str, str]:
    """`NAME=ROLE` of each text. Raises InputError."""
    found, known = {}, get_args(Role)
    for text in texts:
        name, _, role = text.rpartition("=")
        if not name or role not in known:
            expected = suggestion(role, known) if name else "expected NAME=ROLE, such as router.weight=unembedding"
            raise InputError(f"{flag} {text}: {expected}")
        found[name] = role
    return found


def executor_settings(flag: str, texts: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` of each text, VALUE being YAML. Raises InputError."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise InputError(f"{flag} {text}: expected KEY=VALUE")
        found[key.strip().replace("-", "_")] = document.read(value, f"{flag} {key}")[0].data
    return found


def words_of(name: str, begun: str) -> list[str]:
    """What a shell may complete for an option: the names of templates and presets, and for --set the keys of documents."""
    from supar_cli.planning.kinds import AnyDocument

    known = templates.names() if name == "template" else list(PRESETS) if name == "preset" else []
    if name == "set":
        known = sorted({f"{key}=" for kind in get_args(AnyDocument) for key in keys_of(kind)})
    return [word for word in known if word.startswith(begun)]


def keys_of(kind: type[Section]) -> Iterable[str]:
    """The dotted keys of a section and of the sections in it."""
    for name, annotation in kind.keys().items():
        below = section_of(annotation)
        yield from (f"{name}.{key}" for key in keys_of(below)) if below is not None else [name]
