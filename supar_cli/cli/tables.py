"""Tables of a plan on stderr: numbers per role, and estimates of size, memory and time."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from supar_cli.planning import estimate
from supar_cli.planning.overview import COLUMNS, number, plan_rows
from supar_cli.planning.plan import Plan, PlanModel


def show_plan(plan: Plan) -> None:
    """The table per role on stderr."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column(COLUMNS[0], overflow="fold")
    for heading in COLUMNS[1:]:
        table.add_column(heading, justify="right", no_wrap=heading != "shape")
    for row in plan_rows(plan):
        table.add_row(*row)
    console = Console(stderr=True)
    console.print(table)
    console.print("decay: steps in which weight decay alone divides a weight by e", highlight=False)
    if not isinstance(plan.model, PlanModel):
        return
    factors = plan.model.multipliers
    console.print(
        f"inputs × {number(factors.input)}, logits × {number(factors.output)}, q·k × {number(factors.attention)}, "
        f"residual × {number(factors.residual)}",
        highlight=False,
    )


def show_estimate(plan: Plan, processes: int = 1) -> None:
    """FLOPs, memory and time from arithmetic alone; no device is touched. Times are one device's."""
    Console(stderr=True).print("\n".join(estimate.lines(plan, processes)), highlight=False)


def counted(what: str, by_tensor: dict[str, str]) -> list[str]:
    """How many tensors have each value, as `engine: dense 12, sparse 4`."""
    counts = {value: list(by_tensor.values()).count(value) for value in sorted(set(by_tensor.values()))}
    return [f"{what}: " + ", ".join(f"{value} {count}" for value, count in counts.items())] if counts else []
