"""What `sweep` and `compare` share: from a document and flags to a study, its runs with progress, and what they show."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supar_cli.cli import console
from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.planning import document, templates
from supar_cli.planning.advice import warnings
from supar_cli.planning.problems import parse
from supar_cli.planning.sweep import LEVELS, TUNED, Sweep, plan_all

TARGET_FLAGS = ("width", "layers", "context", "batch_size", "steps", "seed")
NOT_IN_A_SWEEP = ("search", "evidence", "parents", "meta")


def read(source: str | None, full: bool, words: dict[str, Any], preset: str | None = None) -> document.Document:
    """The document asked for as that of a study. A spec or a proxy becomes one with the keys of `words`.

    Of a stream of two, the second is the one at full size. Raises InputError when there is no such document.
    """
    if source is None:
        source = next((name for name in ("proxy.yaml", "supar.yaml") if Path(name).exists()), None)
    name = f"--preset {preset}" if preset else source or "quickstart template"
    if preset:
        found = document.read(templates.text(preset), name)
    else:
        found = console.read_all(source or str(console.template("quickstart")), "`supar tune-proxy` writes a proxy")
    if full and len(found) != 2:
        raise InputError(f"{name}: holds {len(found)} document; expected a second one for --full")
    if len(found) > 2:
        raise InputError(f"{name}: holds {len(found)} documents; expected one, or a small and a full one")
    one = found[1 if full else 0]
    one.name = name
    if not isinstance(one.data, dict) or one.data.get("kind") == "supar.sweep/v1":
        return one
    if one.data.get("kind") not in ("supar.spec/v1", "supar.proxy/v1"):
        expected = "expected supar.spec/v1, supar.proxy/v1 or supar.sweep/v1"
        raise InputError(one.problem(("kind",), f"is {one.data.get('kind')!r}", expected))
    target = one.data.get("target")
    own = target.get("sparsity") if isinstance(target, dict) else None
    drawn = (
        {key: own[key] for key in ("pattern", "block", "distribution") if key in own} if isinstance(own, dict) else {}
    )
    one.data = {key: value for key, value in one.data.items() if key not in NOT_IN_A_SWEEP}
    one.data |= {
        "kind": "supar.sweep/v1",
        "name": _folder_name(Path(source).stem if source else "quickstart"),
        **copy.deepcopy(words),
    }
    one.data["target"] = {"sparsity": drawn}  # its own shape is the one to run: what it is for may not fit here
    return one


def _folder_name(stem: str) -> str:
    """A file's name without what a folder's had better not have; `-`, standard input, has none."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem).strip("-") or "sweep"


def put_flags(read: document.Document, flags: dict[str, Any]) -> None:
    """Flags stand for keys of the study."""
    console.override(read, ("target",), {name: flags[name] for name in TARGET_FLAGS})
    places = {"device": ("run", "device"), "seeds": ("seeds",), "iso": ("iso",)}
    for name, path in places.items():
        if flags.get(name) is not None:
            console.put(read, path, flags[name])
    console.override(read, ("data",), {"source": flags["data"]})
    if flags.get("parameterization") is not None:
        names = [part.strip() for part in flags["parameterization"].split(",")]
        console.put(read, ("parameterizations",), names)


def put_axes(read: document.Document, given: Iterable[str]) -> None:
    """`NAME=GRAMMAR` stands in the place of the document's axis of its kind. Raises InputError for what is no axis."""
    replaced: set[tuple[str, ...]] = set()
    for text in given:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        kind = next((kind for kind in (TUNED, LEVELS) if name in kind), None)
        if not equals or kind is None:
            raise InputError(f"--over {text}: expected NAME=VALUES, NAME one of {', '.join((*TUNED, *LEVELS))}")
        over = read.data.get("over") if isinstance(read.data, dict) else None
        if isinstance(over, dict) and kind not in replaced:
            for other in kind:
                over.pop(other, None)
        replaced.add(kind)
        console.put(read, ("over", name), values.strip())


def study(read: document.Document, talk: console.Talk) -> Sweep:
    """The document as a study whose runs can all be planned, its data identified."""
    sweep = parse(Sweep, read)
    with console.located(read):
        if sweep.data.hash is None:
            sweep = sweep.model_copy(update={"data": corpus.identified(sweep.data)})
        plans = plan_all(sweep)
    for message in dict.fromkeys(message for plan in plans for message in warnings(plan)[:1]):
        talk.warn(message)
    return sweep


def describe(sweep: Sweep, talk: console.Talk) -> None:
    """What will be run, in a few lines."""
    names, levels = ", ".join(sweep.parameterizations), sweep.levels
    model = sweep.model
    talk.log(f"{sweep.title or sweep.name}: {names}; {sweep.seeds} seed{'s' if sweep.seeds > 1 else ''} a point")
    train, target = sweep.train, sweep.target
    talk.log(
        f"width {levels[0].width} (proxy {model.width}), {levels[0].layers} layers, context {target.context or model.context}, "
        f"batch {target.batch_size or train.batch_size}, {target.steps or train.steps} steps, data {sweep.data.source}"
    )
    if sweep.iso != "none":
        keeps = {"parameters": "live hidden parameters", "wpn": "weights per neuron"}[sweep.iso]
        talk.log(
            f"widths that keep the {keeps} of density {levels[0].density:g}, to whole heads of {model.head_width}:"
        )
        for level in levels:
            first, power = levels[0], 2 if sweep.iso == "parameters" else 1
            share = level.width**power * level.density / (first.width**power * first.density)
            live = f"{level.width * level.density:g} weights per neuron"
            talk.log(f"  density {level.density:g}: width {level.width}, {live}, {100 * share:.1f} % of it")


def workers(flags: dict[str, Any], device: str, folder: Path) -> Any:
    """The workers that flags ask for; by default a process a GPU, or one a core, at most 8."""
    from supar_cli.jobs import workers as execute

    return execute.make_workers(
        flags.get("executor", "local"),
        jobs=flags["jobs"],
        settings=console.executor_settings(flags.get("executor_set")),
        device=device,
        on_cpu=execute.CPU_JOBS,
        folder=folder / "slurm",
        verbose=flags["verbose"],
    )


def how(flags: dict[str, Any]) -> dict[str, Any]:
    """How a study's runs are made, as flags say."""
    settings = console.executor_settings(flags["executor_set"])
    return {**{name: flags[name] for name in ("jobs", "executor", "verbose", "force")}, "executor_set": settings}


@contextmanager
def progress_of(what: str, folder: Path, quiet: bool, verbose: bool) -> Iterator[console.Progress]:
    """Progress that says, when the user stops it, how to go on."""
    with console.Progress(what, quiet, verbose) as progress:
        try:
            yield progress
        except KeyboardInterrupt:
            progress.warn(f"stopped; the same command goes on from {folder / 'records.jsonl'}")
            raise


def show(tables: list[dict[str, Any]]) -> None:
    """Tables on stderr, within 80 columns."""
    for one in tables:
        _draw(one["title"], one["columns"], one["rows"], lambda i, heading: "right" if heading or i == 0 else "left")


def show_verdicts(verdicts: list[dict[str, Any]]) -> None:
    """One line a verdict; in brackets those of controls, whose texts say so for other readers."""
    words = {True: "pass", False: "FAIL", None: "?"}
    controls = {True: "(pass)", False: "(miss)", None: "?"}
    rows = [
        [(controls if one["control"] else words)[one["passed"]], one["what"], one["text"].partition(" (a control")[0]]
        for one in verdicts
    ]
    title = "verdicts" + (
        "; in brackets controls, which are to miss" if any(one["control"] for one in verdicts) else ""
    )
    _draw(title, ["", "", "measured; pass mark"], rows, lambda i, heading: "left")


def _draw(title: str, columns: list[str], rows: list[list[Any]], justify: Callable[[int, str], Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold", title=title, title_justify="left")
    for i, heading in enumerate(columns):
        table.add_column(heading, justify=justify(i, heading), overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    Console(stderr=True, width=80, highlight=False).print(table)
