"""What a report shows of a path: a run, a sweep, check or comparison, a demo, a plan or a proxy; it may be unfinished."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from supar_cli.errors import InputError, SetupError
from supar_cli.files import Record, read_json, read_jsonl, write_file
from supar_cli.planning import document
from supar_cli.planning.decoder import Model, ViT
from supar_cli.planning.sweep import TUNED
from supar_cli.reporting.result import NAMES, TITLES, Demo, Line, Panel, ReportPart, Result, Table, flatten, loss_figure
from supar_cli.reporting.runs import document_part, run_part, time_written

QUIET_S = 600.0  # chosen: a job that has written nothing for so long may not be running any more
STUDIES = {"supar.check-result/v1": "check", "supar.sweep-result/v1": "sweep", "supar.compare-result/v1": "comparison"}
FILES = ("plan.yaml", "result.json", "question.json", "records.jsonl", "results.json")
UNITS: dict[str | None, str | None] = {"vit": ViT.loss_unit, "own": None}  # of losses by family, where not that of text
EXPECTED = "expected a run, a sweep, a check, a comparison, a demo, a folder of these, a plan or a proxy"


def report(paths: str | Path | Sequence[str | Path], out: str | Path | None = None) -> str:
    """One self-contained HTML page of runs, sweeps, checks, comparisons, plans and proxies; written to `out` if given.

    Raises InputError for a path that is none of these.
    """
    from supar_cli.reporting import html

    paths = [paths] if isinstance(paths, str | Path) else paths
    text = html.render([part for path in paths for part in read(str(path))])
    if out is not None:
        write_file(Path(out), text)
    return text


def read(source: str) -> list[ReportPart]:
    """The parts of one path: one, or one a document of a stream. `-` reads plans and proxies from standard input.

    Raises InputError for a path that is missing or that supar did not write, SetupError for one that can't be read.
    """
    path = Path(source)
    if source != "-" and path.is_dir():
        return _folder(path)
    if source != "-" and not path.exists():
        raise InputError(f"{source}: no such file or folder; {EXPECTED}")
    if path.suffix == ".json":
        return [_result(path, str(path))]
    found = document.read_file(source)
    if len(found) == 1:
        return [document_part(found[0], found[0].name)]
    return [document_part(one, f"{one.name}, document {at} of {len(found)}") for at, one in enumerate(found, 1)]


def _folder(folder: Path) -> list[ReportPart]:
    """What a folder holds; the parts of those in it where it is a folder of runs or measurements."""
    has = {name for name in FILES if (folder / name).is_file()}
    if "plan.yaml" in has and "question.json" not in has:
        return [run_part(folder)]
    if "results.json" in has and "result.json" not in has:
        return [_result(folder / "results.json", str(folder))]
    if has - {"plan.yaml"}:
        return [_study(folder)]
    inner = sorted({path.parent for name in FILES for path in folder.glob(f"*/{name}")})
    if not inner:
        raise InputError(f"{folder}: holds no results of supar; {EXPECTED}")
    return [part for one in inner for part in _folder(one)]


def _result(path: Path, source: str) -> ReportPart:
    """A result file of a sweep, check, comparison or demo."""
    found = read_json(path)
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind == "supar.demo/v1":
        return _demo(Demo.parse(found, path), source)
    if kind == "supar.result/v1":
        if (path.parent / "plan.yaml").is_file():
            return run_part(path.parent)
        raise SetupError(f"{path}: the result of a run, but its folder has no plan.yaml; expected a run directory")
    if not isinstance(kind, str) or kind not in STUDIES:
        raise InputError(f"{path}: kind: is {kind!r}; expected {', '.join(STUDIES)} or supar.demo/v1")
    result = Result.parse(found, path)
    part = ReportPart(source, STUDIES[kind], result.title or path.parent.name, "finished")
    part.verdicts, part.figures, part.tables = result.verdicts, result.figures, result.tables
    if not part.verdicts:
        part.notes.append(f"This {part.kind} has no verdicts; see its tables.")
    part.facts = {
        "Command": {"command line": result.command} if result.command else {},
        "Environment": flatten(result.environment),
        "Hashes": flatten(result.parents),
    }
    return part


def _study(folder: Path) -> ReportPart:
    """A folder of a sweep, check or comparison: its records, and its result or, before there is one, its question."""
    path, asked, ended = (folder / name for name in ("records.jsonl", "question.json", "result.json"))
    records = read_jsonl(path, "run")
    if ended.is_file():
        part = _result(ended, str(folder))
        if path.is_file() and path.stat().st_mtime > ended.stat().st_mtime:
            part.state = f"running again: {_progress(records, path)}"
            part.notes.append(
                "Runs were recorded after result.json was written; its verdicts and figures do not include them."
            )
    else:
        last = path if path.is_file() else asked
        is_quiet = time.time() - last.stat().st_mtime >= QUIET_S
        word = f"nothing written for {QUIET_S / 60:.0f} minutes: still running, or stopped" if is_quiet else "running"
        question = read_json(asked) if asked.is_file() else {}
        own = question if isinstance(question, dict) else {}
        title, state = own.get("title") or own.get("name") or folder.name, f"{word}: {_progress(records, last)}"
        part = ReportPart(str(folder), "unfinished measurement", str(title), state)
        part.notes.append("No result.json yet: the verdicts follow when all runs have ended.")
        part.facts = {"Question": flatten(question)}
        model = own.get("model")
        family = model.get("family") if isinstance(model, dict) else None
        _draw_losses(part, records, UNITS.get(family, Model.loss_unit))
    _add_records(part, records)
    return part


def _states(records: list[Record]) -> list[tuple[str, int]]:
    return Counter(str(record.get("state", "unknown")) for record in records).most_common()


def _progress(records: list[Record], path: Path) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in _states(records)) or "none yet"
    return f"{len(records)} runs recorded ({counts}), last written {time_written(path)}"


def _add_records(part: ReportPart, records: list[Record]) -> None:
    """Add how many runs are done, diverged and failed, and why the others are not done."""
    missed = [one for one in records if one.get("state") != "done"]
    why = [[str(one["run"])[:19], str(one.get("state")), str(one.get("why") or "–")] for one in missed]
    title, columns = "Runs that are not done, and why", ["run", "state", "why"]
    if records:
        part.tables.append(Table(title="Runs recorded", columns=["state", "runs"], rows=_states(records)))
    if missed:
        part.tables.append(Table(title=title, columns=columns, rows=why, folded=len(why) > 10))


def _draw_losses(part: ReportPart, records: list[Record], unit: str | None) -> None:
    """Add a figure of what a sweep has measured so far, means over seeds; other measurements have none."""
    losses: dict[str, dict[str, dict[float, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    word = ""
    for one in records:
        tuned = next((name for name in TUNED if name in one), None)
        level = next((name for name in ("sparsity", "density", "layers", "width") if name in one), None)
        if "arm" in one and tuned and level and isinstance(one.get("loss"), int | float):
            word = NAMES.get(tuned, tuned)
            losses[str(one["arm"])][f"{level} {one[level]}"][float(one[tuned])].append(float(one["loss"]))
    panels = []
    for arm, levels in losses.items():
        lines = [Line.through(name, {x: sum(y) / len(y) for x, y in at.items()}) for name, at in levels.items()]
        panels.append(Panel(title=TITLES.get(arm, arm), lines=lines))
    if panels:
        title = f"Loss over {word} so far, means over the seeds that have ended"
        part.figures.append(loss_figure(title, f"{word} of the proxy", panels, unit=unit))


def _demo(demo: Demo, source: str) -> ReportPart:
    """The demo's curves and regrets."""
    part = ReportPart(
        source, "demo", "Demo: does the dense model's learning rate transfer?", "finished", verdicts=demo.verdicts
    )
    panels: dict[str, Panel] = {}
    for curve in demo.curves:
        panel = panels.setdefault(curve.parameterization, Panel(title=curve.parameterization, lines=[]))
        points = {2.0**octave: loss for octave, loss in curve.losses.items()}
        panel.lines.append(Line.through(f"density {curve.density:g}", points))
    if panels:
        x, lines = "learning rate ÷ the proxy's", list(panels.values())
        part.figures.append(loss_figure("Loss over learning rate", x, lines, "lr_transfer"))
    columns = [name.replace("_", " ") for name in (demo.regrets or [{}])[0]]
    rows = [list(row.values()) for row in demo.regrets]
    part.tables.append(Table(title="Regret of reusing the dense model's learning rate", columns=columns, rows=rows))
    part.facts = {
        "Demo": flatten({name: getattr(demo, name, None) for name in ("lr", "seeds", "steps")}),
        "Environment": flatten(demo.meta),
        "Hashes": {"proxy": demo.proxy},
    }
    return part
