"""Parts of a report that come from a run directory, a plan or a proxy."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from supar_cli.errors import SetupError
from supar_cli.files import Record, read_json, read_jsonl
from supar_cli.planning import document
from supar_cli.planning.overview import COLUMNS, number, plan_rows, start_text
from supar_cli.planning.plan import Plan, PlanModel, read_plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy
from supar_cli.reporting.html import Part, flat
from supar_cli.reporting.result import Figure, Table, Verdict
from supar_cli.training import run_directory
from supar_cli.training.run_directory import read_result

POINTS = 200  # chosen: more than a figure of this size shows
QUIET_S = 600.0  # chosen: a job that has written nothing for so long may not be running any more


def last_written(path: Path) -> tuple[str, bool]:
    """(when a file was last written, UTC; whether that is so short ago that its job may still run)."""
    at = path.stat().st_mtime
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at)), time.time() - at < QUIET_S


def run_files(folder: Path) -> tuple[Plan, list[Record], Record | None]:
    """(plan, metrics, result or None) of a run directory. Raises SuparError that names the file."""
    plan = read_plan(folder / "plan.yaml")
    path = folder / "metrics.jsonl"
    records = read_jsonl(path, "step")
    for at, record in enumerate(records, 1):
        if not isinstance(record["step"], int) or not isinstance(record.get("grad_norm_by_role", {}), dict):
            raise SetupError(f"{path}:{at}: not a record of a step; expected a whole number and norms by role")
    result = read_result(folder / "result.json") if (folder / "result.json").exists() else None
    return plan, records, result


def run_part(folder: Path) -> Part:
    """A run directory, finished or not."""
    source, path = folder / "plan.yaml", folder / "metrics.jsonl"
    plan, records, result = run_files(folder)
    part = Part(str(folder), "run", f"Run {plan.name}", "")
    step = records[-1]["step"] if records else 0
    _judge(part, plan, result, records, step, last_written(path if path.exists() else source)[0], state(folder, result))
    part.figures = run_figures(records)
    part.tables = [*_losses(records, result), *plan_tables(plan)]
    part.facts = plan_facts(plan)
    if result is not None:
        part.facts.insert(0, ("Environment", flat(result.get("environment") or {})))
        measured = ("steps", "seconds", "resumed_at", "parameters", "live_parameters")
        part.facts.insert(1, ("Run", [(name, _text(result.get(name))) for name in measured]))
        part.facts[-1][1].append(("data as read", _text(result.get("data"))))
        marks = [list(pair) for pair in flat(result.get("masks") or {})]
        part.tables.append(
            Table(title="Fingerprints of the masks", columns=["tensor", "mask"], rows=marks, folded=True)
        )
    return part


def state(folder: Path, result: Any) -> tuple[str, str]:
    """(running, finished, preempted, failed or killed; what was said of it) of a run directory."""
    if run_directory.is_open(folder):
        return "running", ""
    if result is not None:
        return "finished", ""
    ended = read_json(folder / run_directory.STATUS_FILE) if (folder / run_directory.STATUS_FILE).exists() else {}
    if not isinstance(ended, dict):
        raise SetupError(f"{folder / run_directory.STATUS_FILE}: is corrupt; expected a state and a text")
    return str(ended.get("state", "killed")), str(ended.get("text", ""))


def _judge(
    part: Part, plan: Plan, result: Any, records: list[Record], step: int, when: str, state: tuple[str, str]
) -> None:
    """State and verdicts of a run."""
    steps, (word, text) = plan.train.steps, state
    losses = [(one["step"], one.get(name)) for one in records for name in ("loss", "validation_loss") if name in one]
    bad = [at for at, loss in losses if finite(loss) is None]
    if result is not None:
        part.state = f"finished: step {result.get('steps')} of {steps}"
        whole = result.get("steps") == steps
        part.verdicts.append(Verdict(what="finished", passed=whole, text=f"step {result.get('steps')} of {steps}"))
        if result.get("plan") != plan.hash():
            part.notes.append(
                f"result.json is of another plan ({_text(result.get('plan'))}), not of plan.yaml beside it."
            )
    else:
        part.state = f"{word}: step {step} of {steps}, last written {when}" + (f": {text}" if text else "")
        part.verdicts.append(Verdict(what="finished", passed=None, text=part.state))
    if losses:
        text = (
            f"all of {len(losses)} are" if not bad else f"not at step {', '.join(map(str, bad[:5]))}; gaps in figures"
        )
        part.verdicts.append(Verdict(what="losses finite", passed=not bad, text=text))
    else:
        part.notes.append("No step is recorded yet.")


def finite(value: Any) -> float | None:
    """A number that can be drawn, else None."""
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def points(records: list[Record], name: str) -> dict[float, float | None]:
    """A quantity by step; None where it is there and not finite."""
    return {one["step"]: finite(one[name]) for one in records if name in one}


def thinned(by_step: dict[float, float | None]) -> tuple[dict[float, float | None], int]:
    """(means of equal numbers of neighbours, at their last step; how many each). A gap inside makes a gap."""
    each = max(1, math.ceil(len(by_step) / POINTS))
    items = sorted(by_step.items())
    groups = [items[at : at + each] for at in range(0, len(items), each)]
    means: dict[float, float | None] = {}
    for group in groups:
        known = [y for _, y in group if y is not None]
        means[group[-1][0]] = sum(known) / len(known) if len(known) == len(group) else None
    return means, each


def _line(label: str, by_step: dict[float, float | None]) -> dict[str, Any]:
    means, each = thinned(by_step)
    named = f"{label} (means of {each})".strip() if each > 1 else label
    return {"label": named, "x": list(means), "y": list(means.values())}


def _figure(name: str, title: str, y: str, lines: list[dict[str, Any]], log2: bool = False) -> list[Figure]:
    """The figure, if there is anything to draw."""
    drawn = [line for line in lines if any(y is not None for y in line["y"])]
    if not drawn:
        return []
    return [Figure(name=name, title=title, x="step", y=y, y_log2=log2, panels=[{"lines": drawn}])]  # type: ignore[list-item]


def run_figures(records: list[Record]) -> list[Figure]:
    """Losses, learning rate, gradient norms by role and speed over steps, as far as they are recorded."""
    losses = [_line("training", points(records, "loss")), _line("validation", points(records, "validation_loss"))]
    by_role = {
        role: {
            one["step"]: finite(one["grad_norm_by_role"].get(role)) for one in records if one.get("grad_norm_by_role")
        }
        for role in dict.fromkeys(role for one in records for role in one.get("grad_norm_by_role") or {})
    }
    norms = [_line("all", points(records, "grad_norm")), *(_line(role, found) for role, found in by_role.items())]
    return [
        *_figure("loss", "Loss", "loss (nats per token)", losses),
        *_figure("grad_norm", "Gradient norm by role", "norm before clipping", norms, log2=True),
        *_figure("lr", "Learning rate of the proxy, as scheduled", "learning rate", [_line("", points(records, "lr"))]),
        *_figure("tokens_per_s", "Speed", "tokens per second", [_line("", points(records, "tokens_per_s"))]),
    ]


def _losses(records: list[Record], result: Any) -> list[Table]:
    """The losses a run ended with, or has so far."""
    rows: list[list[Any]] = []
    for name, what in (("loss", "training"), ("validation_loss", "validation")):
        found = [(step, loss) for step, loss in points(records, name).items()]
        if found:
            known = [(loss, step) for step, loss in found if loss is not None]
            best = min(known, default=(None, None))
            rows.append([what, found[0][1], found[-1][1], found[-1][0], best[0], best[1]])
    title = "Final losses, nats per token" if result is not None else "Losses so far, nats per token"
    return (
        [Table(title=title, columns=["", "first", "last", "at step", "lowest", "at step"], rows=rows)] if rows else []
    )


def plan_part(found: document.Document, source: str) -> Part:
    """A plan that no run belongs to."""
    plan = parse(Plan, found)
    part = Part(source, "plan", f"Plan {plan.name}", "a plan: nothing is measured")
    part.tables, part.facts = plan_tables(plan), plan_facts(plan)
    return part


def plan_tables(plan: Plan) -> list[Table]:
    """Sets of equal tensors, and each tensor's own row, folded."""
    names = ("name", "role", "shape", "density", "kept", "start", "lr", "weight_decay", "eps", "because")
    rows: list[list[Any]] = []
    for tensor in plan.tensors:
        because = ", ".join(f"{key} {number(value)}" for key, value in tensor.because.items())
        own = {**tensor.model_dump(include=set(names)), "start": start_text(tensor)}
        rows.append([*(own[name] for name in names[:2]), "×".join(map(str, tensor.shape)), tensor.density])
        rows[-1] += [*(own[name] for name in names[4:-1]), because]
    return [
        Table(title="The plan's tensors, equal ones together", columns=list(COLUMNS), rows=plan_rows(plan)),
        Table(title="The plan, tensor by tensor", columns=list(names), rows=rows, folded=True),
    ]


def plan_facts(plan: Plan) -> list[tuple[str, list[tuple[str, str]]]]:
    """Model, rules, data and hashes of a plan."""
    model, multipliers, shape = plan.model, list[tuple[str, str]](), plan.model.label
    if isinstance(model, PlanModel):
        multipliers = flat(model.multipliers.model_dump())
        shape = (
            f"{model.family}, width {model.width}, {model.layers} layers, {model.heads} heads, context {model.context}"
        )
    length = "" if plan.train.tokens is None else f", {plan.train.tokens:,} tokens"
    sizes = [
        ("shape", shape),
        ("parameters", f"{plan.parameters:,}; live {plan.live:,}"),
        ("sparsity", f"{plan.sparsity.sparsity:g} ({plan.sparsity.pattern_text}, {plan.sparsity.distribution})"),
        ("training", f"{plan.train.steps:,} steps of {plan.train.batch_size} sequences{length}"),
        ("data", plan.data.source),
    ]
    return [
        ("Model", sizes),
        ("Parameterization", flat(plan.parameterization.model_dump())),
        ("Hyperparameters", flat(plan.hyperparameters.model_dump())),
        ("Multipliers of the forward pass", multipliers),
        ("Notes of the plan", flat(plan.meta) if plan.meta else []),
        ("Hashes", [("plan", plan.hash()), *plan.parents.items(), ("data", _text(plan.data.hash))]),
    ]


def proxy_part(found: document.Document, source: str) -> Part:
    """A proxy: what it is, and the evidence of its tuning."""
    proxy = parse(Proxy, found)
    model, evidence = proxy.model, dict(proxy.evidence)
    state = "tuned" if evidence else "a proxy without evidence of tuning"
    part = Part(source, "proxy", f"Proxy of width {model.width}, {model.layers} layers", state)
    finalists = evidence.pop("finalists", None)
    if isinstance(finalists, list) and finalists and all(isinstance(one, dict) for one in finalists):
        columns = list(finalists[0])
        rows = [[_cell(one.get(name)) for name in columns] for one in finalists]
        part.tables.append(Table(title="Finalists, losses by seed", columns=columns, rows=rows))
    part.facts = [
        ("Hyperparameters", flat(proxy.hyperparameters.model_dump())),
        ("Evidence", flat(evidence) if evidence else []),
        ("Model", flat(model.model_dump())),
        ("Training", flat(proxy.train.model_dump())),
        ("Notes of the proxy", flat(proxy.meta) if proxy.meta else []),
        ("Hashes", [("proxy", proxy.hash()), *proxy.parents.items(), ("data", _text(proxy.data.hash))]),
    ]
    return part


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(f"{one:.4f}" if isinstance(one, float) else str(one) for one in value)
    return "yes" if value is True else "" if value is False else value


def _text(value: Any) -> str:
    return flat(value)[0][1] if flat(value) else "–"
