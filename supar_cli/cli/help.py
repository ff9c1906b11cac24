"""`supar help`: the pages of the manual, and what every key of a document means."""

import difflib
import pydoc
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import typer.main

from supar_cli.cli import terminal
from supar_cli.cli.options import Flags, command
from supar_cli.errors import InputError

PAGES = Path(__file__).parents[1] / "help"
# on the page of keys: a section's heading and first paragraph, and a key's name, unit and description
_SECTION = re.compile(r"^## ([a-z_]+)\n\n((?:.+\n)+)", re.MULTILINE)
_KEY = re.compile(r"^- `([a-z_.]+)`(?: \(([^)]*)\))?: (.*(?:\n  .*)*)", re.MULTILINE)


@command("topic")
def help(flags: Flags) -> None:
    """Print a page of the manual, what a key of a document means, or a command's help.

    Examples:
      supar help rules
      supar help train.grad_clip
    """
    text = _lookup(flags.topic) if flags.topic else _contents()
    if sys.stdout.isatty():
        pydoc.pager(text)
    else:
        terminal.to_stdout(text)


def page(topic: str) -> str:
    return (PAGES / f"{topic}.md").read_text("utf-8")


def topics() -> list[str]:
    return sorted(path.stem for path in PAGES.glob("*.md"))


@cache
def key_descriptions() -> dict[str, str]:
    """What every key of a document means, on one line, with its unit; keys are paths such as `train.steps`."""
    text = page("keys")
    found = {name: what for name, what in _SECTION.findall(text)}
    found |= {name: f"{what} Unit: {unit}." if unit else what for name, unit, what in _KEY.findall(text)}
    return {name: " ".join(what.split()) for name, what in found.items()}


def shared(path: str) -> str:
    """Where a key is described: `target.sparsity` has the keys of `sparsity`, `arms.updates` those of its `updates`."""
    return re.sub(r"^arms\.updates\.", "sparsity.updates.", path.removeprefix("target."))


def _contents() -> str:
    titles = {topic: page(topic).partition("\n")[0].removeprefix("# ").partition(": ")[2] for topic in topics()}
    wide = max(map(len, titles))
    lines = "".join(f"  {topic:{wide}}  {title}\n" for topic, title in titles.items())
    return (
        f"supar help TOPIC\n\n{lines}\nsupar help KEY (lr, train.steps, search, …) and supar help COMMAND work too.\n"
    )


def _lookup(word: str) -> str:
    """A topic's page or a command's help, then the keys of that name. Raises InputError for an unknown word."""
    from supar_cli.cli.app import app  # which imports this module when the command is called

    group: Any = typer.main.get_command(app)
    parts = []
    if word in topics():
        parts.append(page(word))
    elif word in group.list_commands(None):
        own = group.get_command(None, word)
        parts.append(own.get_help(own.make_context(f"supar {word}", [], resilient_parsing=True)) + "\n")
    parts += re.findall(rf"^## {re.escape(word)}\n.*?(?=^## |\Z)", page("keys"), re.MULTILINE | re.DOTALL)
    # `target.sparsity` has the keys of `sparsity`
    names = (word, word.removeprefix("target."), *(name for name in key_descriptions() if name.endswith(f".{word}")))
    keys = [
        found[0] for found in _KEY.finditer(page("keys")) if found[1] in names and not found[1].startswith(f"{word}.")
    ]
    parts += ["\n".join([*keys, ""])] if keys else []
    if parts:
        return "\n".join(parts)
    known = [*topics(), *group.list_commands(None), *key_descriptions()]
    close = difflib.get_close_matches(word, [*known, *(name.rpartition(".")[2] for name in known)], 1)
    expected = f"did you mean {close[0]}?" if close else "`supar help` lists the topics"
    raise InputError(f"supar help {word}: no such topic, key or command; {expected}")
