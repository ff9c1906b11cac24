"""Tables of a plan on stderr: numbers per role, and estimates of size, memory and time."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from supar_cli.planning.overview import COLUMNS, number, plan_rows
from supar_cli.planning.plan import Plan


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
    factors = plan.model.multipliers
    console.print(
        f"decay: steps in which weight decay alone divides a weight by e\n"
        f"inputs × {number(factors.input)}, logits × {number(factors.output)}, q·k × {number(factors.attention)}, "
        f"residual × {number(factors.residual)}",
        highlight=False,
    )


# Dense bf16 peaks from the vendors' datasheets at an assumed share; the CPU rate is measured on two cores of a server.
# chosen: 40 % of peak, what well-kept dense training reaches
RATES = {"H200/H100": 0.4 * 989e12, "A100": 0.4 * 312e12, "RTX 4090": 0.4 * 165e12, "2 CPU cores": 1e11}


def show_estimate(plan: Plan) -> None:
    """FLOPs, memory and time from arithmetic alone; no device is touched."""
    live = sum(row.kept for row in plan.tensors if row.role == "hidden")
    size = sum(row.size for row in plan.tensors if row.role == "hidden")
    model = plan.model
    flops = plan.flops_per_token * plan.train.tokens
    state = plan.parameters * 16 + size  # float32 weight, gradient, two moments; one byte of mask a hidden position
    rows = plan.run.micro_batch_size or plan.train.batch_size
    activations = rows * model.context * (model.layers * (8 * model.width + 3 * model.ffn_width) * 2 + model.vocab * 8)
    lines = [
        f"parameters {plan.parameters:,}; live {plan.live:,}; hidden {live:,} of {size:,} live",
        f"lowest WPN {min(row.wpn for row in plan.tensors if row.role == 'hidden'):.4g}",
        f"{plan.train.steps:,} steps, {plan.train.tokens:,} tokens, {flops:.3g} FLOPs as computed (zeros included)",
        f"memory: {state / 2**30:.2f} GiB of state, about {activations / 2**30:.2f} GiB of activations a micro-batch of {rows}",
        "time (estimate; GPUs at an assumed 40 % of peak): "
        + ", ".join(f"{name} {_time(flops / rate)}" for name, rate in RATES.items()),
    ]
    Console(stderr=True).print("\n".join(lines), highlight=False)


def _time(seconds: float) -> str:
    from supar_cli.cli.console import duration

    if seconds < 1:
        return "under 1s"
    return duration(seconds) if seconds < 48 * 3600 else f"{seconds / 86400:.1f}d"
