"""`supar init` and `schema`: a template to start from, and the JSON Schema by which editors check what it becomes."""

import json
import sys
from pathlib import Path
from typing import Any, get_args

from supar_cli.cli import terminal
from supar_cli.cli import text as words
from supar_cli.cli.help import key_descriptions, shared
from supar_cli.cli.options import Flags, command
from supar_cli.cli.values import one_of
from supar_cli.errors import InputError, SetupError, suggestion
from supar_cli.planning import templates
from supar_cli.planning.layout_document import Layout
from supar_cli.planning.plan import Plan
from supar_cli.planning.schema import Section
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.planning.sweep import Sweep

# by the template's kind: the default file name (None: the template's name) and the next command
NEXT = {
    "supar.spec/v1": ("supar.yaml", "tune-proxy{}"),
    "supar.proxy/v1": ("proxy.yaml", "transfer{} --sparsity 0.992"),
    "supar.sweep/v1": (None, "sweep{}"),
}

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TYPES: dict[str, type[Section]] = {"spec": Spec, "proxy": Proxy, "plan": Plan, "sweep": Sweep, "layout": Layout}


@command(
    "template list out force quiet",
    out={
        "help": "Where to write; - for stdout only. [default: supar.yaml for a spec, proxy.yaml for a proxy, else the template's name]"
    },
)
def init(flags: Flags) -> None:
    """Write a commented template to start from: a document, or a training script of a model of your own.

    Examples:
      supar init gpt.py
      supar init interpretability -o spec.yaml
    """
    names, name = [*templates.names(), *templates.scripts()], flags.template
    if not names:
        raise SetupError("the installation lacks its templates; install again")
    if flags.list:
        wide = max(map(len, names))
        titles = {name: templates.text(name).splitlines()[0].strip('#" ') for name in names}
        listed = [f"{name:{wide}}  {title}" for name, title in titles.items()]
        columns = words.width() if sys.stdout.isatty() else 10**6
        terminal.to_stdout("".join(f"{part}\n" for line in listed for part in words.wrap(line, columns, wide + 2)))
        return
    if name not in names:
        raise InputError(f"{name}: no such template; {suggestion(name, names)}")
    text, log = templates.text(name), terminal.Log(flags.quiet)
    default, command = _next(name, text)
    file = default or f"{name}.yaml"
    terminal.write_text(text, flags, log, file)
    if flags.out != "-":
        out = flags.out or file
        log.next(f"supar {command.format('' if out == default else f' {out}', module=Path(out).stem)}")


def _next(name: str, text: str) -> tuple[str | None, str]:
    """A template's default file (None: its name with .yaml), and the command that comes next."""
    if name in templates.scripts():
        first = next(line for line in text.splitlines() if line.startswith("supar layout "))  # of its own commands
        return name, first.removeprefix("supar ").replace(f"{name.removesuffix('.py')}:", "{module}:")
    default, command = NEXT[next(line for line in text.splitlines() if line.startswith("kind:")).removeprefix("kind: ")]
    script = next((one for one in templates.scripts() if f" {one} " in text), None)  # that its command runs
    return default, f"init {script}" if script else command


@command(
    "kind out force quiet",
    kind={"read": one_of(*TYPES)},
    out={"help": "Write it to a file. [default: stdout]"},
)
def schema(flags: Flags) -> None:
    """Print the JSON Schema of a spec, a proxy, a plan, a sweep or a layout.

    Editors with a YAML language server check and complete a document whose first line names the schema:
    `supar schema -o supar.schema.json`, then `# yaml-language-server: $schema=supar.schema.json`.
    Rules that involve several keys are checked only by supar.

    Examples:
      supar schema -o supar.schema.json
      supar schema plan
    """
    text = json.dumps(json_schema(TYPES[flags.kind]), indent=1, ensure_ascii=False) + "\n"
    terminal.write_text(text, flags, terminal.Log(flags.quiet), "-")


def json_schema(document: type[Section]) -> dict[str, Any]:
    """JSON Schema of a document as a user may write it: keys that supar fills in are not required."""
    from pydantic.json_schema import GenerateJsonSchema  # the only thing that needs pydantic beyond its core

    class Sections(GenerateJsonSchema):
        """pydantic's generator, adapted to `Section`: the original needs attributes that only BaseModel has."""

        def model_schema(self, schema: Any) -> dict[str, Any]:
            found = self.generate_inner(schema["schema"])
            section: type[Section] = schema["cls"]
            required = [key for key in found.pop("required", []) if key not in _filled_in(section)]
            found |= {"required": required} if required else {}
            found = {"title": section.__name__, **found, "additionalProperties": False}
            return {"anyOf": [found, found["properties"][section.SHORT]]} if section.SHORT else found

    (name,) = get_args(document.keys()["kind"])
    found = Sections().generate(document.schema())
    _describe(found)
    about = " ".join((document.__doc__ or "").split())
    return {"$schema": DIALECT, "$id": f"urn:supar:{name}", **found, "title": name, "description": about}


def _describe(schema: dict[str, Any], path: str = "") -> None:
    """Give every key below a schema its description."""
    known = key_descriptions()
    for name, inner in schema.get("properties", {}).items():
        at = path + name
        if what := known.get(at) or known.get(shared(at)):
            inner["description"] = what
        _describe(inner, f"{at}.")
    for part in ("anyOf", "oneOf", "items", "additionalProperties"):
        given = schema.get(part)
        for inner in given if isinstance(given, list) else [given] if isinstance(given, dict) else []:
            _describe(inner, path)


def _filled_in(section: type[Section]) -> set[str]:
    """Keys that a section fills in before it is checked, so that a document may leave them out."""
    given = {"family": "gpt2", "width": 1, "heads": 1}
    return set(section.fill_defaults(given)) - set(given)
