"""What a report shows of a path: a run, a sweep, check or comparison, a demo, a plan or a proxy, finished or not."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from supar_cli.errors import InputError, SetupError
from supar_cli.files import read_json, read_jsonl
from supar_cli.planning import document
from supar_cli.planning.kinds import kinds_of
from supar_cli.planning.plan import Plan
from supar_cli.planning.sweep import TUNED
from supar_cli.reporting import result as figures
from supar_cli.reporting.html import Part, flat
from supar_cli.reporting.result import Figure, Table, Verdict
from supar_cli.reporting.run_parts import last_written, plan_part, proxy_part, run_part

STUDIES = {"supar.check-result/v1": "check", "supar.sweep-result/v1": "sweep", "supar.compare-result/v1": "comparison"}
FILES = ("plan.yaml", "result.json", "question.json", "records.jsonl", "results.json")
EXPECTED = "expected a run directory, a folder of a sweep, check, comparison or demo, a plan or a proxy"


def read(source: str) -> list[Part]:
    """The parts of one path: one, or one a document of a stream. `-` reads plans and proxies from standard input.

    Raises InputError for what is not there or is none of supar's, SetupError for what can't be read.
    """
    path = Path(source)
    if source == "-":
        return _documents(source)
    if path.is_dir():
        return [_folder(path)]
    if not path.exists():
        raise InputError(f"{source}: no such file or folder; {EXPECTED}")
    if path.suffix == ".json":
        return [_result(path, path.parent, str(path))]
    return _documents(source)


def _documents(source: str) -> list[Part]:
    parts = []
    found = document.read_file(source)
    for index, one in enumerate(found, 1):
        name = f"{one.name}, document {index} of {len(found)}" if len(found) > 1 else one.name
        kind = one.data.get("kind") if isinstance(one.data, dict) else None
        if isinstance(kind, str) and kind in kinds_of(Plan):
            parts.append(plan_part(one, name))
        elif kind == "supar.proxy/v1":
            parts.append(proxy_part(one, name))
        else:
            what = "holds no document of supar's" if kind is None else f"is {kind!r}"
            raise InputError(one.problem(("kind",), what, f"expected {next(iter(kinds_of(Plan)))} or supar.proxy/v1"))
    return parts


def _folder(folder: Path) -> Part:
    plan, result, records, demo = (
        folder / name for name in ("plan.yaml", "result.json", "records.jsonl", "results.json")
    )
    if plan.is_file() and not (folder / "question.json").is_file():
        return run_part(folder)
    if result.is_file():
        part = _result(result, folder, str(folder))
        return _with_records(part, folder, records.is_file() and records.stat().st_mtime > result.stat().st_mtime)
    if demo.is_file():
        return _result(demo, folder, str(folder))
    if records.is_file() or (folder / "question.json").is_file():
        return _running(folder)
    raise InputError(f"{folder}: is none of supar's folders (no {', '.join(FILES[:-1])} or {FILES[-1]}); {EXPECTED}")


def _result(path: Path, folder: Path, source: str) -> Part:
    """A result file of a sweep, check, comparison or demo."""
    found = read_json(path)
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind == "supar.demo/v1":
        return _demo(found, path, source)
    if kind == "supar.result/v1":
        if (folder / "plan.yaml").is_file():
            return run_part(folder)
        raise SetupError(f"{path}: the result of a run whose plan.yaml is not beside it")
    if not isinstance(kind, str) or kind not in STUDIES:
        raise InputError(f"{path}: kind: is {kind!r}; expected {', '.join(STUDIES)} or supar.demo/v1")
    part = Part(source, STUDIES[kind], str(found.get("title") or folder.name), "finished")
    part.verdicts = _typed(list[Verdict], found, "verdicts", path)
    part.figures = _typed(list[Figure], found, "figures", path)
    part.tables = _typed(list[Table], found, "tables", path)
    for table in part.tables:
        if any(len(row) != len(table.columns) for row in table.rows):
            raise SetupError(
                f"{path}: tables: {table.title}: a row has not the {len(table.columns)} cells of its columns"
            )
    if not part.verdicts:
        part.notes.append(f"This {part.kind} gives no verdicts; see its tables.")
    command = found.get("command")
    command = shlex.join(map(str, command)) if isinstance(command, list) else command
    part.facts = [
        ("Command", [("command line", str(command))] if command else []),
        ("Environment", flat(found.get("environment") or {})),
        ("Hashes", flat(found.get("parents") or {})),
    ]
    return part


def _typed(kind: Any, found: dict[str, Any], name: str, path: Path) -> Any:
    """A checked part of a result. Raises SetupError that names file and place."""
    try:
        return TypeAdapter(kind).validate_python(found.get(name) or [])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = document.dotted((name, *first["loc"]))
        raise SetupError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None


def _counts(records: list[dict[str, Any]]) -> list[Table]:
    """How many runs are done, diverged and failed, and why the last ones that are not done are not."""
    states = Counter(str(record.get("state", "unknown")) for record in records)
    order = [*(name for name in ("done", "diverged", "failed") if name in states), *states]
    rows: list[list[Any]] = [[name, states[name]] for name in dict.fromkeys(order)]
    tables = [Table(title="Runs recorded", columns=["state", "runs"], rows=rows)] if rows else []
    missed = [record for record in records if record.get("state") != "done"]
    if missed:
        reasons = [[str(one["run"])[:19], str(one.get("state")), str(one.get("why") or "–")] for one in missed]
        title = "Runs that are not done, and why"
        tables.append(Table(title=title, columns=["run", "state", "why"], rows=reasons, folded=len(missed) > 10))
    return tables


def _said(records: list[dict[str, Any]]) -> str:
    states = Counter(str(record.get("state", "unknown")) for record in records)
    return ", ".join(f"{count} {state}" for state, count in states.items()) or "none yet"


def _with_records(part: Part, folder: Path, newer: bool) -> Part:
    """Add a folder's records to what its result says."""
    records = read_jsonl(folder / "records.jsonl", "run")
    part.tables += _counts(records)
    if newer:
        when, _ = last_written(folder / "records.jsonl")
        part.state = f"running again: {len(records)} runs recorded ({_said(records)}), last written {when}"
        part.notes.append("Runs were recorded after result.json was written: verdicts and figures are of before.")
    return part


def _running(folder: Path) -> Part:
    """A sweep, check or comparison that has no result yet."""
    path = folder / "records.jsonl"
    records = read_jsonl(path, "run")
    question = read_json(folder / "question.json") if (folder / "question.json").is_file() else {}
    when, live = last_written(path if path.is_file() else folder / "question.json")
    word = "running" if live else "not finished, and silent for a while: running or stopped"
    own = question if isinstance(question, dict) else {}
    part = Part(str(folder), "unfinished measurement", str(own.get("title") or own.get("name") or folder.name), "")
    part.state = f"{word}: {len(records)} runs recorded ({_said(records)}), last written {when}"
    part.notes.append("No result.json yet: verdicts come when all runs have ended.")
    part.figures = _typed(list[Figure], {"figures": list(filter(None, [_losses_so_far(records)]))}, "figures", path)
    part.tables = _counts(records)
    part.facts = [("Question", flat(question) if question else [])]
    return part


def _losses_so_far(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The means of what a sweep that still runs has measured; None of other records or too few."""
    means: dict[str, dict[str, dict[float, list[float]]]] = {}
    word = ""
    for one in records:
        tuned = next((name for name in TUNED if name in one), "")
        level = next((name for name in ("sparsity", "density", "layers", "width") if name in one), "")
        if "arm" not in one or not tuned or not level or not isinstance(one.get("loss"), int | float):
            continue
        at = means.setdefault(str(one["arm"]), {}).setdefault(f"{level} {one[level]}", {})
        at.setdefault(float(one[tuned]), []).append(float(one["loss"]))
        word = figures.NAMES.get(tuned, tuned)
    panels: list[dict[str, Any]] = []
    for arm, levels in means.items():
        lines = [figures.line(name, {x: sum(y) / len(y) for x, y in at.items()}) for name, at in levels.items()]
        panels.append({"title": figures.TITLES.get(arm, arm), "vertical": None, "lines": lines})
    losses = [y for panel in panels for one in panel["lines"] for y in one["y"] if y is not None]
    if not losses:
        return None
    return {
        "name": "loss",
        "title": f"Loss over {word} so far, over the seeds that have ended",
        "x": f"{word} of the proxy",
        "y": "validation loss (nats per token)",
        "x_log2": True,
        "y_log2": False,
        "y_limits": figures.loss_limits(losses),
        "panels": panels,
    }


def _demo(found: dict[str, Any], path: Path, source: str) -> Part:
    """The demo's curves and regrets."""
    try:
        panels: dict[str, list[dict[str, Any]]] = {}
        for curve in found["curves"]:
            losses = {2.0 ** float(octave): loss for octave, loss in curve["losses"].items()}
            one = {"label": f"density {curve['density']:g}", "x": sorted(losses)}
            panels.setdefault(curve["parameterization"], []).append({**one, "y": [losses[x] for x in one["x"]]})
        figure = {
            "name": "lr_transfer",
            "title": "Loss over learning rate",
            "x": "learning rate ÷ the proxy's",
            "y": "validation loss (nats per token)",
            "x_log2": True,
            "panels": [{"title": name, "lines": lines} for name, lines in panels.items()],
        }
        rows = [
            [one if isinstance(one, str | int | float) else None for one in row.values()] for row in found["regrets"]
        ]
        columns = [name.replace("_", " ") for name in found["regrets"][0]] if rows else []
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SetupError(f"{path}: is corrupt: {type(error).__name__}: {error}") from None
    part = Part(source, "demo", "Demo: does the dense model's learning rate transfer?", "finished")
    part.figures = _typed(list[Figure], {"figures": [figure] if panels else []}, "figures", path)
    part.tables = [Table(title="Regret of re-using the dense model's rate", columns=columns, rows=rows)]
    part.facts = [
        ("Demo", flat({name: found.get(name) for name in ("lr", "seeds", "steps")})),
        ("Environment", flat(found.get("meta") or {})),
        ("Hashes", [("proxy", str(found.get("proxy")))]),
    ]
    return part
