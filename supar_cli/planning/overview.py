"""A plan at a glance: one row of texts for each set of equal tensors, as terminals and reports show it."""

from __future__ import annotations

from supar_cli.planning.advice import timescale_steps
from supar_cli.planning.plan import Plan, PlanTensor

COLUMNS = ("tensor", "shape", "m_d", "m_ρ", "WPN", "init std", "peak lr", "λ", "decay")


def _label(name: str) -> str:
    """`blocks.3.attn.q` as `*.attn.q`: what equal rows of all blocks are shown under."""
    head, _, rest = name.partition(".")
    return f"*.{rest.partition('.')[2]}" if head == "blocks" else name


def _joined(names: list[str]) -> str:
    """Names in one word while that fits the column, in several, which wrap, otherwise."""
    text = ",".join(names)
    return text if len(text) <= 16 else ", ".join(names)


def number(value: float) -> str:
    """Four significant digits, short."""
    return f"{value:.4g}"


def start_text(row: PlanTensor) -> str:
    """Where a tensor starts: its deviation, or the number."""
    return number(row.init_std if row.init_std is not None else row.init_constant or 0.0)


def plan_rows(plan: Plan) -> list[list[str]]:
    """One row for each set of equal tensors: name, shape, m_d, m_ρ, WPN, init std, lr, λ, decay timescale in steps."""
    groups: dict[tuple[object, ...], list[PlanTensor]] = {}
    for row in plan.tensors:
        key = (row.role, tuple(row.shape), row.kept, row.init_std, row.init_constant, row.lr, row.weight_decay, row.eps)
        groups.setdefault(key, []).append(row)
    rows = []
    for members in groups.values():
        first, names = (
            members[0],
            sorted({_label(row.name) for row in members}, key=[_label(r.name) for r in members].index),
        )
        prefix = names[0].rpartition(".")[0] + "."
        short = [names[0], *(n.removeprefix(prefix) for n in names[1:])] if prefix != "." else names
        decay = timescale_steps(first)
        hidden = first.role == "hidden"
        rows.append(
            [
                _joined(short),
                "×".join(map(str, first.shape)),
                number(first.because["m_d"]) if "m_d" in first.because else "",
                number(first.because["m_rho"]) if hidden and "m_rho" in first.because else "",
                number(first.wpn) if hidden else "",
                start_text(first),
                number(first.lr),
                number(first.weight_decay),
                f"{decay:.0f}" if decay else "–",
            ]
        )
    return rows
