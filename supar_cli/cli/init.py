"""`supar init`: a shipped template becomes a file to start from."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.errors import InputError, SetupError
from supar_cli.planning import templates


def init(
    template: Annotated[str, typer.Argument(help="Name of a template; --list shows them.")] = "quickstart",
    list_: Annotated[bool, typer.Option("--list", help="Show the templates and write nothing.")] = False,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="Where to write; - for stdout only. [default: supar.yaml, a proxy: proxy.yaml, a sweep: NAME.yaml]",
            show_default=False,
        ),
    ] = None,
    force: console.Force = False,
    quiet: console.Quiet = False,
) -> None:
    """Write a template to start from, comments and all."""
    names = templates.names()
    if not names:
        raise SetupError(
            f"{console.template('quickstart').parent}: the installation lacks its templates; install again"
        )
    if list_:
        wide = max(map(len, names))
        console.to_stdout("".join(f"{name:{wide}}  {description(name)}\n" for name in names))
        return
    if template not in names:
        close = difflib.get_close_matches(template, names, 1, 0.5)
        expected = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"
        raise InputError(f"{template}: no such template; {expected}")
    text = templates.text(template)
    kind = kind_of(text)
    default = {"supar.proxy/v1": "proxy.yaml", "supar.sweep/v1": f"{template}.yaml"}.get(kind, "supar.yaml")
    talk = console.Talk(quiet)
    if out != "-":
        console.persist(Path(out or default), text, force, talk)
        found = out in (None, default) and kind != "supar.sweep/v1"  # without being named
        talk.log(f"next: {_next(kind, '' if found else f' {out or default}')}")
    if out == "-" or not sys.stdout.isatty():
        console.to_stdout(text)


def description(name: str) -> str:
    """What a template is for: its first line."""
    return templates.text(name).partition("\n")[0].removeprefix("#").strip()


def kind_of(text: str) -> str:
    """The kind a template's own `kind:` line names."""
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("kind:")), "")


def _next(kind: str, source: str) -> str:
    if kind == "supar.proxy/v1":
        return f"supar transfer{source} --sparsity 0.992"
    if kind == "supar.sweep/v1":
        return f"supar sweep{source}"
    return f"supar tune-proxy{source}"


app = single(init)
