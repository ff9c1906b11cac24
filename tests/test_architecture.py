"""The architecture that `supar_cli/README.md` maps, as checks of the source text, each shown to fail on a planted offence."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

PACKAGE = CHECKOUT / "supar_cli"
LINES_PER_FILE, LINES_PER_FUNCTION = 350, 60


def module_name(path: Path) -> str:
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGES = {module_name(path) for path in PACKAGE.rglob("__init__.py")}
SOURCES = {module_name(path): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def is_below(module: str, *packages: str) -> bool:
    """Whether a module is one of the packages or stands inside of one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import at any depth; `from a import b` is the module a.b where there is one, else a."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if module in PACKAGES else module.rpartition(".")[0]
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else relative
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if name in SOURCES or not is_below(base, "supar_cli") else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


LEAVES = ("errors", "files", "version", "streams", "standard_streams", "user_code")
PLANNING_OF_TRAINING = [f"planning.{name}" for name in ("plan", "patterns", "schedule", "document", "estimate")]
PLANNING_OF_OWN = [
    f"planning.{name}" for name in ("plan", "layout", "layout_document", "rules", "patterns", "schedule", "document")
]
# what the modules of a package may import of supar; every pair that is not here is forbidden
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "planning": (),
    "sparse": ("planning.patterns",),
    "models": ("sparse", "planning.plan", "planning.layout"),
    "data": ("planning.plan",),
    "training": ("sparse", "models", "data", *PLANNING_OF_TRAINING),
    "jobs": ("training", "planning"),
    "reporting": ("planning", "training.run_directory"),
    "exporting": ("training", "models", "sparse", "data", "planning"),
    "own": ("sparse", "training.prepare", *PLANNING_OF_OWN),
    "experiments": (
        "jobs",
        "training",
        "models",
        "data.corpus",
        "own",
        "planning",
        "reporting.result",
        "reporting.figures",
    ),
    "bench": ("training", "sparse", "jobs", "planning.plan", "reporting.result"),
    "cli": (
        "",
        "planning",
        "reporting",
        "data",
        "training",
        "exporting",
        "experiments",
        "bench",
    ),  # the first: the face
}


def import_offences(module: str, source: str) -> list[str]:
    """A package imports itself, the leaves and what MAY_IMPORT allows, also inside functions and under TYPE_CHECKING."""
    package = module.split(".")[1] if module.count(".") else ""
    if package not in MAY_IMPORT:
        return []
    below = [f"supar_cli.{name}" for name in (*LEAVES, package, *filter(None, MAY_IMPORT[package]))]
    face = {"supar_cli"} if "" in MAY_IMPORT[package] else set()
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(module, source)
        if is_below(name, "supar_cli") and not is_below(name, *below) and name not in face
    ]


def planning_offences(module: str, source: str) -> list[str]:
    """`planning` knows the standard library, PyYAML and pydantic: no torch, no numpy."""
    if not is_below(module, "supar_cli.planning"):
        return []
    allowed = ("supar_cli", "yaml", "pydantic", "pydantic_core", *sys.stdlib_module_names)
    return [f"{module}:{line} imports {name}" for line, name in imports(module, source) if not is_below(name, *allowed)]


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle; none where there is no such circle."""
    graph = {name: {other for _, other in imports(name, text) if other in sources} for name, text in sources.items()}
    done, path = set[str](), list[str]()

    def visit(name: str) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        found = next((found for other in sorted(graph[name] - {name}) if (found := visit(other))), [])
        path.pop()
        done.add(name)
        return found

    return next((found for name in graph if (found := visit(name))), [])


def cli_offences(module: str, source: str) -> list[str]:
    """Nothing but the command line imports the command line and the face."""
    if is_below(module, "supar_cli.cli", "supar_cli.__main__"):
        return []
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(module, source)
        if is_below(name, "supar_cli.cli") or name == "supar_cli"
    ]


PRIVATE_NAMES = {
    "supar_cli.jobs.clusters",
    "supar_cli.own.flow",
    "supar_cli.experiments.products",
}  # modules that may import private names of others, each saying why


def private_offences(module: str, source: str) -> list[str]:
    """No private name of another project is imported."""
    if module in PRIVATE_NAMES:
        return []
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(module, source)
        if not is_below(name, "supar_cli") and any(part.startswith("_") for part in name.split(".") if part[:2] != "__")
    ]


def stdout_offences(module: str, source: str) -> list[str]:
    """Nothing but the command line writes to stdout."""
    if is_below(module, "supar_cli.cli"):
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            if not any(keyword.arg == "file" for keyword in node.keywords):
                found.append(f"{module}:{node.lineno} prints")
        elif isinstance(node, ast.Attribute) and node.attr in ("stdout", "__stdout__", "echo", "secho"):
            found.append(f"{module}:{node.lineno} uses {node.attr}")
        elif isinstance(node, ast.ImportFrom) and {a.name for a in node.names} & {"stdout", "__stdout__", "echo"}:
            found.append(f"{module}:{node.lineno} imports it")
    return found


HANDLES_TENSORS = [f"supar_cli.{name}" for name in ("planning", "sparse", "models", "data", "training", "own")]


def recognition_offences(module: str, source: str) -> list[str]:
    """A tensor is known by role and site: where tensors are handled there are no regular expressions and no `ndim`.

    Documents and the first bytes of data files are no tensors.
    """
    if module in ("supar_cli.planning.document", "supar_cli.data.formats") or not is_below(module, *HANDLES_TENSORS):
        return []
    found = [
        f"{module}:{line} imports {name}" for line, name in imports(module, source) if is_below(name, "re", "fnmatch")
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("ndim", "dim", "ndimension"):
            found.append(f"{module}:{node.lineno} counts dimensions")
    return found


CHECKS: dict[Callable[[str, str], list[str]], list[tuple[str, str]]] = {
    planning_offences: [
        ("supar_cli.planning.rules", "import torch"),
        ("supar_cli.planning.rules", "def f():\n    import numpy as np"),
        ("supar_cli.planning.spec", "from torch import nn"),
        ("supar_cli.planning.plan", "if True:\n    from optuna.trial import Trial"),
        ("supar_cli.planning.plan", "from safetensors import safe_open"),
        ("supar_cli.planning.plan", "import importlib\nimportlib.import_module('torch')"),
        ("supar_cli.planning.plan", "__import__('numpy')"),
    ],
    import_offences: [
        ("supar_cli.planning.plan", "from supar_cli.sparse import masks"),
        ("supar_cli.planning.plan", "from supar_cli import training"),
        ("supar_cli.planning.plan", "from ..experiments.search import tune"),
        ("supar_cli.planning.plan", "from .. import experiments"),
        ("supar_cli.planning.plan", "def f():\n    from supar_cli.cli.terminal import emit"),
        ("supar_cli.sparse.csr", "from supar_cli.planning.plan import Plan"),
        ("supar_cli.sparse.csr", "if TYPE_CHECKING:\n    from supar_cli.training.runtime import Runtime"),
        ("supar_cli.sparse.csr", "import supar_cli.models.transformer"),
        ("supar_cli.models.transformer", "from supar_cli.data import batches"),
        ("supar_cli.models.transformer", "from supar_cli.planning import spec"),
        ("supar_cli.data.batches", "from supar_cli.planning.spec import Data"),
        ("supar_cli.data.batches", "from supar_cli.sparse.masks import Mask"),
        ("supar_cli.training.optimizer", "from supar_cli.planning import plan, rules"),
        ("supar_cli.training.runtime", "def f():\n    from ..planning.layout import tensors"),
        ("supar_cli.training.optimizer", "import supar_cli.planning.density"),
        ("supar_cli.training.trainer", "from supar_cli.planning.transfer import transfer"),
        ("supar_cli.training.trainer", "from supar_cli.planning.folding import fold"),
        ("supar_cli.training.trainer", "import supar_cli"),
        ("supar_cli.training.trainer", "from supar_cli.experiments import search"),
        ("supar_cli.training.runtime", "from supar_cli import __version__"),
        ("supar_cli.training.trainer", "if TYPE_CHECKING:\n    from supar_cli.planning.folding import fold"),
        ("supar_cli.jobs.runs", "from supar_cli.reporting import figures"),
        ("supar_cli.jobs.runs", "from supar_cli.experiments.curves import measure"),
        ("supar_cli.reporting.read", "from supar_cli.training.trainer import Trainer"),
        ("supar_cli.experiments.sweep", "from supar_cli.reporting import html"),
        ("supar_cli.experiments.sweep", "def f():\n    from supar_cli.sparse import masks"),
        ("supar_cli.bench.step", "from supar_cli.experiments import search"),
        ("supar_cli.cli.train", "from supar_cli.jobs import workers"),
        ("supar_cli.cli.check", "from supar_cli.sparse.linear import Linear"),
    ],
    private_offences: [
        ("supar_cli.training.trainer", "from torch._inductor import config"),
        ("supar_cli.cli.app", "import typer._click"),
    ],
    cli_offences: [
        ("supar_cli.data.corpus", "from supar_cli.cli import terminal"),
        ("supar_cli.reporting.html", "def f():\n    from supar_cli import transfer"),
        ("supar_cli.experiments.search", "def f():\n    import supar_cli.cli.app"),
        ("supar_cli", "from . import cli"),
    ],
    stdout_offences: [
        ("supar_cli.training.trainer", "print('loss')"),
        ("supar_cli.training.trainer", "import sys\nsys.stdout.write('x')"),
        ("supar_cli.training.trainer", "from sys import stdout"),
        ("supar_cli.experiments.search", "def f():\n    typer.echo('x')"),
    ],
    recognition_offences: [
        ("supar_cli.planning.layout", "import re"),
        ("supar_cli.training.optimizer", "def f():\n    from re import match"),
        ("supar_cli.training.optimizer", "import fnmatch"),
        ("supar_cli.training.optimizer", "decays = parameter.ndim >= 2"),
        ("supar_cli.training.optimizer", "decays = parameter.dim() >= 2"),
    ],
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_module_offends(check: Callable[[str, str], list[str]]) -> None:
    assert [offence for module, source in SOURCES.items() for offence in check(module, source)] == []


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [(check, *planted) for check, all_planted in CHECKS.items() for planted in all_planted],
)
def test_a_planted_offence_is_found(check: Callable[[str, str], list[str]], module: str, source: str) -> None:
    assert len(check(module, source)) >= 1


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(SOURCES) == []
    planted = {"supar_cli.sparse.linear": "def f():\n    from supar_cli.sparse.csr import Sparse"}
    planted |= {"supar_cli.sparse.csr": "if TYPE_CHECKING:\n    from supar_cli.sparse import linear"}
    assert set(circle(SOURCES | planted)) == {"supar_cli.sparse.linear", "supar_cli.sparse.csr"}


def test_all_packages_are_walked() -> None:
    packages = {name.split(".")[1] for name in SOURCES if name.count(".") >= 2}
    assert packages == set(MAY_IMPORT)
    assert "supar_cli.planning.rules" in SOURCES and "supar_cli.sparse.csr" in SOURCES


def too_long(sources: dict[str, str]) -> list[str]:
    """Files of more lines, and functions of more lines, than there may be."""
    files = [name for name, source in sources.items() if len(source.splitlines()) > LINES_PER_FILE]
    functions = [
        f"{name}.{node.name}"
        for name, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (node.end_lineno or node.lineno) - node.lineno >= LINES_PER_FUNCTION
    ]
    return files + functions


def test_files_and_functions_are_short() -> None:
    assert too_long(SOURCES) == []
    assert too_long({"planted": "x = 1\n" * (LINES_PER_FILE + 1)}) == ["planted"]
    assert too_long({"planted": "def f():\n" + "    x = 1\n" * LINES_PER_FUNCTION}) == ["planted.f"]
    assert too_long({"planted": "def f():\n" + "    x = 1\n" * (LINES_PER_FUNCTION - 1)}) == []


def not_empty(sources: dict[str, str]) -> list[str]:
    """The `__init__` files with something in them, but the face."""
    return [name for name in PACKAGES - {"supar_cli"} if sources[name].strip()]


def test_only_the_face_has_something_in_its_init_file() -> None:
    assert not_empty(SOURCES) == []
    assert not_empty({**SOURCES, "supar_cli.jobs": "from supar_cli.jobs import runs"}) == ["supar_cli.jobs"]


def without_docstring(sources: dict[str, str]) -> list[str]:
    return [name for name, source in sources.items() if source and not ast.get_docstring(ast.parse(source))]


def test_every_module_says_what_it_holds() -> None:
    assert without_docstring(SOURCES) == []
    assert without_docstring({"planted": "x = 1\n"}) == ["planted"]


def unmapped(text: str, paths: set[str]) -> set[str]:
    """Modules that a map doesn't list, and names of files on it that are not there."""
    tree = text.partition("## The tree")[2].partition("\n## ")[0]
    listed, package = set[str](), ""
    for line in tree.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            package = line.split()[0] if line.split()[0].endswith("/") else ""
        subfolder = "launch/" if line.strip().startswith("launch/") else ""
        listed |= {package + subfolder + name for name in re.findall(r"[a-z_/]+\.py\b", line)}
    return listed ^ paths


def test_the_map_lists_every_module() -> None:
    paths = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.stat().st_size}
    text = (PACKAGE / "README.md").read_text("utf-8")
    assert unmapped(text, paths) == set()
    assert unmapped(text, {*paths, "jobs/new.py"} - {"jobs/queue.py"}) == {"jobs/new.py", "jobs/queue.py"}


def table_of(text: str) -> dict[str, set[str]]:
    """What a map's table allows each package to import."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?)(?:; .*)? \|$", text, re.MULTILINE)
    return {package: set(re.findall(r"`([\w.]+)`", allowed)) for package, allowed in rows}


def test_the_map_has_the_table_of_imports() -> None:
    text = (PACKAGE / "README.md").read_text("utf-8")
    expected = {package: {name or "supar_cli" for name in allowed} for package, allowed in MAY_IMPORT.items()}
    assert table_of(text) == expected
    assert table_of(text.replace("| `cli` | `supar_cli`,", "| `cli` | `jobs`,")) != expected
