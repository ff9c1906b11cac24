"""`supar layout`: the user's model becomes a document of its tensors."""

from pathlib import Path
from typing import Any

import supar_cli
from supar_cli.cli import terminal, text, values
from supar_cli.cli.option_table import flag_of
from supar_cli.cli.options import Flags, command
from supar_cli.errors import InputError, Problem
from supar_cli.planning.layout_document import Layout, LayoutRow
from supar_cli.user_code import calling_user_code, can_be_called, load_function, require_keywords

COLUMNS = ["site", "", "role", "extents, at base → wider", "start", "notes"]


@command(
    "make base wider third target example run role ignore",
    "explain out force json quiet",
    role={
        "type": list[str],
        "help": "The role of a tensor: embedding, hidden, norm, bias or unembedding; repeatable.",
        "metavar": "NAME=ROLE",
        "read": values.roles,
    },
    explain={"help": "Show the table of tensors even if stderr is not a terminal."},
)
def layout(flags: Flags) -> None:
    """Read from your own model, at two sizes, what each tensor is and which of its extents scale.

    Read the document once: a role that is wrong there is wrong in every plan.

    Examples:
      supar layout mymodel:make --base width=256 --wider width=512 --third width=768 --example mymodel:batch
      supar layout agent:make --base width=64 --wider width=128 --run agent:run --role critic.gate=hidden
    """
    log = terminal.Log(flags.quiet)
    sizes = {name: getattr(flags, name) for name in ("base", "wider", "third", "target")}
    own = _load(flags, [size for size in sizes.values() if size is not None])
    with calling_user_code():
        found = supar_cli.layout(**own, **sizes, roles=flags.role, ignore=flags.ignore or ())
    found = found.model_copy(update={"factory": flags.make})
    if flags.explain or (log.is_terminal and not flags.quiet):
        log.log(text.table(COLUMNS, _table_rows(found), right=[1]))
        log.log("extents in brackets are summed over (fan-in)")
    for note in found.notes:
        log.warn(note)
    terminal.emit([found.model_dump()], flags, log, "layout.yaml")
    if not terminal.prints(flags):
        out, module = flags.out or "layout.yaml", flags.make.partition(":")[0]
        script = f"{module}.py" if Path(f"{module}.py").is_file() else "train.py"
        log.next(f"read {out}", f"supar tune-proxy --layout {out} --command 'python {script} {{plan}}'")


def _load(flags: Flags, sizes: list[dict[str, int]]) -> dict[str, Any]:
    """The functions that flags name, by their names. Raises InputError with every problem of them."""
    found, problems = dict[str, Any](), list[Problem | str]()
    if (flags.example is None) == (flags.run is None):
        problems.append("--example: expected either --example or --run, as one kind of pass is read")
    for name in ("make", "example", "run"):
        try:
            if getattr(flags, name) is not None:
                found[name] = load_function(getattr(flags, name), "" if name == "make" else flag_of(name))
            if name == "make":
                for size in sizes:
                    require_keywords(found[name], flags.make, size)
        except InputError as error:
            problems += error.problems
    if "run" in found and not can_be_called(found["run"], None):
        problems.append(f"--run {flags.run}: expected a function that can be called with (model)")
    if callable(example := found.get("example")) and not (can_be_called(example) or can_be_called(example, None)):
        problems.append(f"--example {flags.example}: expected a function that can be called with (model) or ()")
    if problems:
        raise InputError(*problems)
    return found


def _table_rows(found: Layout) -> list[list[Any]]:
    """A row for the tensors of each site that are alike: site, count, role, extents, start, notes."""
    alike: dict[tuple[str, ...], list[LayoutRow]] = {}
    for row in found.tensors:
        alike.setdefault((row.site, row.role, _extents(row), row.init, _notes(row)), []).append(row)
    return [
        [site, f"× {len(rows)}" if len(rows) > 1 else "", role, extents, _start(rows), notes]
        for (site, role, extents, _, notes), rows in alike.items()
    ]


def _extents(row: LayoutRow) -> str:
    """The extents of a tensor, those that scale as 256→512, those that a product sums over in brackets."""
    both = [f"{a}→{b}" if a != b else f"{a}" for a, b in zip(row.base, row.wider, strict=True)]
    return " × ".join(f"[{one}]" if axis in row.fan_in_axes else one for axis, one in enumerate(both))


def _start(rows: list[LayoutRow]) -> str:
    """What the model's own constructor gives: a number, or a deviation, which in one site differs by chance."""
    known = [row.own for row in rows if row.own is not None]
    if not known:
        return ""
    if not any(own.std for own in known):
        return ", ".join(dict.fromkeys(f"{own.mean:.3g}" for own in known))
    ends = dict.fromkeys(f"{end(own.std for own in known):.2g}" for end in (min, max))
    return f"std {' to '.join(ends)}" + (", kept" if rows[0].init == "own" else "")


def _notes(row: LayoutRow) -> str:
    """What else decides its numbers: its uses, and whether a person gave the role."""
    found = [use.replace("_", " ") for use in row.uses]
    found += ["writes residual"] * row.writes_residual + [f"tied to {row.tied_to}"] * bool(row.tied_to)
    return ", ".join(found + ["said"] * row.said)
