"""`supar init`: a shipped template becomes a file to start from."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

from supar_cli.cli import terminal
from supar_cli.cli.app import command_app
from supar_cli.cli.options import Flags, command
from supar_cli.errors import InputError, SetupError
from supar_cli.files import template, template_names

# of a template's kind: the file that it becomes by default, and what to do next; None: a file of the template's name
NEXT = {
    "supar.spec/v1": ("supar.yaml", "tune-proxy{}"),
    "supar.proxy/v1": ("proxy.yaml", "transfer{} --sparsity 0.992"),
    "supar.sweep/v1": (None, "sweep{}"),
}


@command(
    "template list out force quiet",
    out={"help": "Where to write; - for stdout only. [default: supar.yaml, a proxy: proxy.yaml, a sweep: NAME.yaml]"},
)
def init(flags: Flags) -> None:
    """Write a template to start from, comments and all."""
    names, name = template_names(), flags.template
    if not names:
        raise SetupError(f"{template('quickstart.yaml').parent}: the installation lacks its templates; install again")
    if flags.list:
        wide = max(map(len, names))
        terminal.to_stdout("".join(f"{name:{wide}}  {_text(name).splitlines()[0].strip('# ')}\n" for name in names))
        return
    if name not in names:
        close = difflib.get_close_matches(name, names, 1, 0.5)
        expected = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"
        raise InputError(f"{name}: no such template; {expected}")
    text, log = _text(name), terminal.Log(flags.quiet)
    default, command = NEXT[next(line for line in text.splitlines() if line.startswith("kind:")).removeprefix("kind: ")]
    out = flags.out or default or f"{name}.yaml"
    if out != "-":
        terminal.persist(Path(out), text, flags.force, log)
        log.log(f"next: supar {command.format('' if out == default else f' {out}')}")
    if out == "-" or not sys.stdout.isatty():
        terminal.to_stdout(text)


def _text(name: str) -> str:
    return template(f"{name}.yaml").read_bytes().decode("utf-8")


app = command_app(init)
