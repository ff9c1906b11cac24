"""Runs, plans and proxies: a run's progress and losses, a curve drawn in characters, and each as part of a report."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supar_cli.errors import SetupError, SuparError
from supar_cli.files import Record, read_json, read_jsonl
from supar_cli.planning.advice import COLUMNS, number, plan_rows, start_text
from supar_cli.planning.density_over_run import summary as summary_over_run
from supar_cli.planning.document import Document
from supar_cli.planning.kinds import parse_any
from supar_cli.planning.plan import Plan, PlanModel, read_plan
from supar_cli.planning.plan_sections import OwnModel
from supar_cli.planning.spec import Model, Proxy
from supar_cli.reporting.result import Figure, Line, Panel, ReportPart, Table, Verdict, finite, flatten
from supar_cli.training import run_directory

LOSSES = {"loss": "training", "validation_loss": "validation"}
POINTS = 200  # chosen: more than a figure of this size shows
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Unicode braille cell: 4 rows of 2
LOGARITHMIC = ("grad_norm", "density")
MEASURED = (*run_directory.SCORES, "steps", "seconds", "resumed_at", "clipped_share", "parameters", "live_parameters")
TENSOR_COLUMNS = ("name", "role", "shape", "density", "kept", "start", "lr", "weight_decay", "eps", "because")
Series = dict[float, float | None]


@dataclass(frozen=True)
class Run:
    """What a run directory holds. `result` is None before the run's end; `summary` is what `supar runs` lists."""

    plan: Plan
    records: list[Record]
    result: Record | None
    summary: dict[str, Any]

    @property
    def environment(self) -> Record:
        """What it ran on and with; empty before its end."""
        found = (self.result or {}).get("environment")
        return found if isinstance(found, dict) else {}


def read_run(folder: Path) -> Run:
    """A run directory as it stands. Raises SuparError that names the file."""
    plan, path = read_plan(folder / "plan.yaml"), folder / "metrics.jsonl"
    records = read_jsonl(path, "step")
    for at, record in enumerate(records, 1):
        if not isinstance(record["step"], int) or not isinstance(record.get("grad_norm_by_role", {}), dict):
            raise SetupError(f"{path}:{at}: not the record of a step; expected an integer `step` and norms by role")
    result = run_directory.read_result(folder / "result.json") if (folder / "result.json").exists() else None
    state, text = _state(folder, result is not None)
    names = [*LOSSES, *(name for name in ("accuracy",) if series(records, name))]
    summary = {
        "run": str(folder),
        "state": state,
        "step": records[-1]["step"] if records else 0,
        "steps": plan.train.steps,
        **{name: next(reversed(series(records, name).values()), None) for name in names},
        "written": time_written(_last_file(folder)),
        "text": text,
    }
    return Run(plan, records, result, summary)


def _state(folder: Path, is_finished: bool) -> tuple[str, str]:
    """(running, finished, preempted, failed or killed; why it ended)."""
    if run_directory.is_open(folder):
        return "running", ""
    if is_finished:
        return "finished", ""
    path = folder / run_directory.STATUS_FILE
    ended = read_json(path) if path.exists() else {}
    if not isinstance(ended, dict):
        raise SetupError(f"{path}: is corrupt; expected a state and a text")
    return str(ended.get("state", "killed")), str(ended.get("text", ""))


def summary(folder: Path) -> dict[str, Any]:
    """One run as plain data. A directory that can't be read has the state `unreadable` and says why."""
    try:
        return read_run(folder).summary
    except SuparError as error:
        return {"run": str(folder), "state": "unreadable", "text": str(error).splitlines()[0]}


def details(folder: Path) -> Run:
    """A run directory to be shown. Raises SetupError."""
    try:
        return read_run(folder)
    except SuparError as error:
        raise SetupError(str(error).splitlines()[0]) from None


def folders(root: Path) -> list[Path]:
    """Run directories in a folder or one below it, the last written first."""
    found = [path.parent for pattern in ("plan.yaml", "*/plan.yaml", "*/*/plan.yaml") for path in root.glob(pattern)]
    runs = [path for path in found if any((path / name).exists() for name in ("lock", "metrics.jsonl", "checkpoints"))]
    return sorted(runs, key=lambda path: _last_file(path).stat().st_mtime, reverse=True)


def _last_file(folder: Path) -> Path:
    return next(path for name in ("result.json", "metrics.jsonl", "plan.yaml") if (path := folder / name).exists())


def time_written(path: Path) -> str:
    """When a file was last written, UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(path.stat().st_mtime))


def series(records: list[Record], name: str) -> Series:
    """A quantity by step; None where it is there and not finite."""
    return {one["step"]: finite(one[name]) for one in records if name in one}


def downsample(by_step: Series) -> tuple[Series, int]:
    """(means of equal numbers of neighbours, at their last step; how many each). A gap within a mean makes that mean a gap."""
    each = max(1, math.ceil(len(by_step) / POINTS))
    items = [(step, math.nan if y is None else y) for step, y in sorted(by_step.items())]
    groups = [items[at : at + each] for at in range(0, len(items), each)]
    return {group[-1][0]: finite(sum(y for _, y in group) / len(group)) for group in groups}, each


def curve(records: list[Record], name: str, width: int, height: int) -> list[str]:
    """A quantity over steps in `height` lines of braille, `width` characters wide with its axis; none without numbers."""
    known = {step: y for step, y in downsample(series(records, name))[0].items() if y is not None}
    if not known:
        return []
    low, high = min(known.values()), max(known.values())
    first, last = min(known), max(known)
    labels = [f"{value:.4g}" for value in (high, low)]
    margin = max(map(len, labels)) + 2
    width = max(width, margin + 12)  # chosen: the numbers of the first and last step fit below it
    cells = [[0] * (width - margin) for _ in range(height)]
    for step, y in known.items():
        across = round((step - first) / max(last - first, 1) * (2 * (width - margin) - 1))
        down = round((high - y) / ((high - low) or 1) * (4 * height - 1))
        cells[down // 4][across // 2] |= DOTS[down % 4][across % 2]
    lines = ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
    left = [labels[0], *[""] * (height - 2), labels[1]]
    steps = f"{'':{margin}}{first:g}{f'step {last:g}':>{width - margin - len(f'{first:g}')}}"
    return [f"{label:>{margin - 2}} ┤{line}" for label, line in zip(left, lines, strict=True)] + [steps]


def masks_text(records: list[Record]) -> str:
    """What the last record says of masks that change; empty where they don't."""
    found = next((one for one in reversed(records) if "density" in one), {})
    density, changed, dead = (finite(found.get(name)) for name in ("density", "mask_changed", "dead_rows"))
    parts = [] if density is None else [f"density {density:.4g}"]
    parts += [] if changed is None else [f"{100 * changed:.3g} % of live weights exchanged by the last change"]
    parts += [] if dead is None else [f"{dead:g} rows without a live weight"]
    return f"masks at step {found['step']}: {', '.join(parts)}" if parts else ""


def run_part(folder: Path) -> ReportPart:
    """A run directory, finished or not."""
    run = read_run(folder)
    found, result, plan = run.summary, run.result, run.plan
    done = found["step"] if result is None else result.get("steps")
    step, why = f"step {done} of {found['steps']}", f": {found['text']}" if found["text"] else ""
    state = f"{found['state']}: {step}, last written {found['written']}{why}"
    part = ReportPart(str(folder), "run", f"Run {plan.name}", state, facts=_plan_facts(plan))
    part.verdicts = [Verdict(what="finished", passed=None if result is None else done == found["steps"], text=step)]
    losses = {label: series(run.records, name) for name, label in LOSSES.items()}
    _add_losses(part, losses, plan.model.loss_unit, is_final=result is not None)
    part.tables += _plan_tables(plan)
    part.figures = _run_figures(run.records, losses, plan.model)
    if result is not None:
        measured = flatten({name: result.get(name) for name in MEASURED if name in result})
        part.facts = {"Environment": flatten(run.environment), "Run": measured} | part.facts
        part.facts["Hashes"] |= flatten({"data as read": result.get("data")})
        masks, title = list(flatten(result.get("masks") or {}).items()), "Fingerprints of the masks"
        part.tables.append(Table(title=title, columns=["tensor", "mask"], rows=masks, folded=True))
        if result.get("plan") != plan.hash():
            part.notes.append(f"result.json belongs to another plan, {result.get('plan')}, not to plan.yaml beside it.")
    return part


def _add_losses(part: ReportPart, losses: dict[str, Series], unit: str, is_final: bool) -> None:
    """Add a run's final losses, or the last ones so far, and whether all are finite."""
    rows, steps, bad = [], 0, list[str]()
    for label, by_step in losses.items():
        found = list(by_step.items())
        known = [(loss, step) for step, loss in found if loss is not None]
        bad += [str(step) for step, loss in found if loss is None]
        steps += len(found)
        if found:
            rows.append([label, found[0][1], *reversed(found[-1]), *min(known, default=(None, None))])
    if not rows:
        part.notes.append("No step is recorded yet.")
        return
    text = f"not at step {', '.join(bad[:5])}; shown as gaps in figures" if bad else f"all {steps} are"
    part.verdicts.append(Verdict(what="losses finite", passed=not bad, text=text))
    title = f"{'Final losses' if is_final else 'Losses so far'}, {unit}"
    columns = ["", "first", "last", "at step", "lowest", "at step"]
    part.tables.append(Table(title=title, columns=columns, rows=rows))


def _run_figures(records: list[Record], losses: dict[str, Series], model: PlanModel | OwnModel) -> list[Figure]:
    """Losses, accuracy, changing masks, gradient norms by role, learning rate and speed over steps, as far as they are recorded."""
    by_role = [{**one.get("grad_norm_by_role", {}), "step": one["step"]} for one in records]
    roles = dict.fromkeys(role for one in by_role for role in one if role != "step")
    norms = {"all": series(records, "grad_norm"), **{role: series(by_role, role) for role in roles}}
    figures, speed = [], f"{model.data_kind}_per_s"
    for name, title, y, by_label in (
        ("loss", "Loss", f"loss ({model.loss_unit})", losses),
        ("accuracy", "Accuracy on held-out images", "share of them", {"": series(records, "accuracy")}),
        ("density", "Density of the tensors whose masks change", "share of weights", {"": series(records, "density")}),
        ("mask_changed", "Live weights exchanged by a change", "share of them", {"": series(records, "mask_changed")}),
        ("dead_rows", "Rows without a live weight", "rows", {"": series(records, "dead_rows")}),
        ("grad_norm", "Gradient norm by role", "norm before clipping", norms),
        ("lr", "Learning rate of the proxy, as scheduled", "learning rate", {"": series(records, "lr")}),
        (speed, "Speed", f"{model.data_kind} per second", {"": series(records, speed)}),
    ):
        lines = [_line(label, by_step) for label, by_step in by_label.items() if set(by_step.values()) - {None}]
        if lines:
            panels = [Panel(lines=lines)]
            figures.append(Figure(name=name, title=title, x="step", y=y, y_log2=name in LOGARITHMIC, panels=panels))
    return figures


def _line(label: str, by_step: Series) -> Line:
    means, each = downsample(by_step)
    return Line.through(f"{label} (means of {each})".strip() if each > 1 else label, means)


def document_part(found: Document, source: str) -> ReportPart:
    """A plan or a proxy. Raises InputError with every problem in it."""
    parsed = parse_any(found, Plan, Proxy)
    if isinstance(parsed, Proxy):
        return _proxy_part(parsed, source)
    assert isinstance(parsed, Plan)
    part = ReportPart(source, "plan", f"Plan {parsed.name}", "a plan; nothing was measured")
    part.tables, part.facts = _plan_tables(parsed), _plan_facts(parsed)
    return part


def _plan_tables(plan: Plan) -> list[Table]:
    """Sets of equal tensors, and each tensor's own row, folded."""
    rows = []
    for one in plan.tensors:
        because = ", ".join(f"{key} {number(value)}" for key, value in one.because.items())
        row = {**one.model_dump(), "shape": "×".join(map(str, one.shape)), "start": start_text(one), "because": because}
        rows.append([row[name] for name in TENSOR_COLUMNS])
    moving = summary_over_run(plan)
    title = "; ".join(filter(None, ("The plan's tensors, equal ones in one row", moving)))
    return [
        Table(title=title, columns=list(COLUMNS), rows=plan_rows(plan)),
        Table(title="The plan, tensor by tensor", columns=list(TENSOR_COLUMNS), rows=rows, folded=True),
    ]


def _plan_facts(plan: Plan) -> dict[str, dict[str, str]]:
    """Model, rules, data and hashes of a plan."""
    model, multipliers, shape = plan.model, dict[str, Any](), plan.model.label
    if isinstance(model, PlanModel):
        multipliers, layers = model.multipliers.model_dump(), f"{model.layers} layers, {model.heads} heads"
        shape = f"{model.family}, width {model.width}, {layers}, {model.rows_text}"
    files = {"masks": plan.sparsity.source.hash, "values": plan.values.hash, "data": plan.data and plan.data.hash}
    length = "" if plan.train.tokens is None else f", {plan.train.tokens:,} tokens"
    sizes = {
        "shape": shape,
        "parameters": f"{plan.parameters:,}; live {plan.live:,}",
        "sparsity": f"{plan.sparsity.sparsity:g} ({plan.sparsity.pattern_text}, {plan.sparsity.distribution})",
        "values": plan.values.text,
        "training": f"{plan.train.steps:,} steps of {plan.train.batch_size} {model.rows}{length}",
        "data": "the training script's own" if plan.data is None else plan.data.source,
    }
    return {
        "Model": sizes,
        "Parameterization": flatten(plan.parameterization.model_dump()),
        "Hyperparameters": flatten(plan.hyperparameters.model_dump()),
        "Multipliers of the forward pass": flatten(multipliers),
        "Notes of the plan": flatten(plan.meta),
        "Hashes": flatten({"plan": plan.hash(), "parents": plan.parents, **files}),
    }


def _proxy_part(proxy: Proxy, source: str) -> ReportPart:
    """A proxy: what it is, and the evidence of its tuning."""
    model, evidence = proxy.model, dict(proxy.evidence)
    state = "tuned" if evidence else "a proxy without evidence of tuning"
    title = (
        f"Proxy of width {model.width}, {model.layers} layers" if isinstance(model, Model) else "Proxy of an own model"
    )
    part = ReportPart(source, "proxy", title, state)
    finalists = evidence.pop("finalists", None)
    if isinstance(finalists, list) and finalists and all(isinstance(one, dict) for one in finalists):
        columns = list(finalists[0])
        rows = [[_cell(one.get(name)) for name in columns] for one in finalists]
        part.tables = [Table(title="Finalists, losses by seed", columns=columns, rows=rows)]
    part.facts = {
        "Hyperparameters": flatten(proxy.hyperparameters.model_dump()),
        "Evidence": flatten(evidence),
        "Model": flatten(model.model_dump()),
        "Training": flatten(proxy.train.model_dump()),
        "Notes of the proxy": flatten(proxy.meta),
        "Hashes": flatten({"proxy": proxy.hash(), **proxy.parents, "data": proxy.data and proxy.data.hash}),
    }
    return part


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(f"{one:.4f}" if isinstance(one, float) else str(one) for one in value)
    return "yes" if value is True else "" if value is False else value
