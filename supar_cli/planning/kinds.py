"""Every document type by its `kind`, those of earlier versions too."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from supar_cli.errors import InputError
from supar_cli.planning.document import Document, read_file
from supar_cli.planning.layout_document import Layout
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse, wrong_kind
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.planning.sweep import Sweep

AnyDocument = Spec | Proxy | Plan | Sweep | Layout


def parse_any(document: Document, *types: type[AnyDocument]) -> AnyDocument:
    """A document of one of the types, of any by default. Raises InputError with every problem in it."""
    types = types or get_args(AnyDocument)
    known = {get_args(one.keys()["kind"])[0]: one for one in types}
    known |= {kind: one for one in types for kind in one.EARLIER}
    kind = document.data.get("kind") if isinstance(document.data, dict) else None
    if not isinstance(kind, str) or kind not in known:
        raise wrong_kind(document, *known)
    return parse(known[kind], document)


def load(path: str | Path) -> AnyDocument:
    """The document in a file, as its kind says. Raises InputError with every problem in it."""
    found = read_file(str(path))
    if len(found) != 1:
        raise InputError(f"{path}: holds {len(found)} documents; expected one")
    parsed = parse_any(found[0])
    return parsed.beside(str(path)) if isinstance(parsed, Plan | Proxy | Spec | Sweep) else parsed
