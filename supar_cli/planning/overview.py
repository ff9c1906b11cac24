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
        first, hidden, decay = members[0], members[0].role == "hidden", timescale_steps(members[0])
        names = list(dict.fromkeys(_label(row.name) for row in members))
        prefix = names[0].rpartition(".")[0] + "."
        label = _joined([names[0], *(name.removeprefix(prefix) for name in names[1:])])
        m_rho, wpn = (first.because.get("m_rho"), first.wpn) if hidden else (None, None)
        sizes = ["" if value is None else number(value) for value in (first.because.get("m_d"), m_rho, wpn)]
        numbers = [start_text(first), number(first.lr), number(first.weight_decay), f"{decay:.0f}" if decay else "–"]
        rows.append([label, "×".join(map(str, first.shape)), *sizes, *numbers])
    return rows
