"""`supar schema`: the JSON Schema of a document, for editors."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from supar_cli.cli import terminal
from supar_cli.cli.app import command_app
from supar_cli.cli.options import Flags, command
from supar_cli.planning.layout import Layout
from supar_cli.planning.plan import Plan
from supar_cli.planning.schema import Section
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.planning.sweep import Sweep

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TYPES: dict[str, type[Section]] = {"spec": Spec, "proxy": Proxy, "plan": Plan, "sweep": Sweep, "layout": Layout}


@command(
    "kind out force quiet",
    kind={"type": StrEnum("Kind", list(TYPES))},
    out={"help": "Write it to a file; - for stdout only. [default: -]"},
)
def schema(flags: Flags) -> None:
    """Print the JSON Schema of a spec, a proxy, a plan, a sweep or a layout.

    Editors with a YAML language server check and complete a document whose first line names the schema:
    `supar schema -o supar.schema.json`, then `# yaml-language-server: $schema=supar.schema.json`.
    What spans several keys is checked by supar only.
    """
    text = json.dumps(json_schema(TYPES[flags.kind]), indent=1, ensure_ascii=False) + "\n"
    is_file = flags.out not in (None, "-")
    if is_file:
        terminal.persist(Path(flags.out), text, flags.force, terminal.Log(flags.quiet))
    if not is_file or not sys.stdout.isatty():
        terminal.to_stdout(text)


def json_schema(document: type[Section]) -> dict[str, Any]:
    """JSON Schema of a document as a user may write it: what is filled in is not required."""
    from pydantic.json_schema import GenerateJsonSchema  # the only thing that needs pydantic beyond its core

    class Sections(GenerateJsonSchema):
        """pydantic's generator, taught what a `Section` is: it asks a model's class for what only BaseModel has."""

        def model_schema(self, schema: Any) -> dict[str, Any]:
            found = self.generate_inner(schema["schema"])
            section: type[Section] = schema["cls"]
            required = [key for key in found.pop("required", []) if key not in _filled_in(section)]
            found |= {"required": required} if required else {}
            title = {"title": section.__name__, "description": " ".join((section.__doc__ or "").split())}
            return {**title, **found, "additionalProperties": False}

    (name,) = get_args(document.keys()["kind"])
    return {"$schema": DIALECT, "$id": f"urn:supar:{name}", **Sections().generate(document.schema()), "title": name}


def _filled_in(section: type[Section]) -> set[str]:
    """Keys that a section fills in before it is checked, so that a document may leave them out."""
    given = {"family": "gpt2", "width": 1, "heads": 1}
    return set(section.fill_defaults(given)) - set(given)


app = command_app(schema)
