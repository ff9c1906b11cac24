"""Tables of a plan on stderr: numbers per role, and estimates of size, memory and time."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from supar_cli.planning import estimate
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
# measured: `supar bench layer` on two cores of EPYC (Zen 4), float32, densities 1/128 to 1/8: seconds a number of X and Y
# for the three products together, and FLOP/s at live weights beyond that
SPARSE_SECONDS, SPARSE_RATE = 0.9e-9, 6e10
# measured there, on whole steps of width 1024 and 2048: seconds a number of what is between the products; with it the
# estimate is within a third of both
BETWEEN_SECONDS = 1.3e-9


def show_estimate(plan: Plan, processes: int = 1) -> None:
    """FLOPs, memory and time from arithmetic alone; no device is touched. Times are one device's."""
    masked = [row for row in plan.tensors if row.kept < row.size]
    live, size = (sum(getattr(row, key) for row in plan.tensors if row.role == "hidden") for key in ("kept", "size"))
    flops = plan.flops_per_token * plan.train.tokens
    rows = plan.run.micro_batch_size or max(1, plan.train.batch_size // processes)
    between = estimate.numbers_between(plan)
    activations = estimate.activation_bytes(plan, rows, 2)
    states = ", ".join(f"{name} {_gib(value)}" for name, value in _states(plan).items())
    lines = [
        f"parameters {plan.parameters:,}; live {plan.live:,}; hidden {live:,} of {size:,} live",
        f"lowest WPN {min(row.wpn for row in plan.tensors if row.role == 'hidden'):.4g}",
        f"{plan.train.steps:,} steps, {plan.train.tokens:,} tokens, {flops:.3g} FLOPs as a dense engine computes them",
        f"memory of state by engine: {states}",
        f"and about {_gib(activations)} of activations a micro-batch of {rows} sequences",
        *([f"in shards over {processes} processes, each has 1/{processes} of the state"] if processes > 1 else []),
        "time (estimate; GPUs at an assumed 40 % of peak): "
        + ", ".join(f"{name} {_time(flops / rate)}" for name, rate in RATES.items()),
    ]
    if masked:
        dense = flops - 6.0 * sum(row.size for row in masked) * plan.train.tokens
        seconds = dense / RATES["2 CPU cores"] + plan.train.tokens * between * BETWEEN_SECONDS
        for row in masked:
            seconds += plan.train.tokens * (sum(row.shape) * SPARSE_SECONDS + 6.0 * row.kept / SPARSE_RATE)
        lines.append(f"2 CPU cores with the sparse engine: {_time(seconds)} (`supar bench layer` measures it here)")
    Console(stderr=True).print("\n".join(lines), highlight=False)


def _states(plan: Plan) -> dict[str, int]:
    """Bytes of state by engine."""
    engines = {"dense in bfloat16": ("dense", 2), "dense in float32": ("dense", 4), "sparse (CPU)": ("sparse", 4)}
    if plan.sparsity.block:
        engines["block"] = ("block", 4)
    if all(row.kept == row.size for row in plan.tensors):
        engines = {"dense": ("dense", 4)}
    return {name: estimate.state_bytes(plan, *how) for name, how in engines.items()}


def counted(what: str, by_tensor: dict[str, str]) -> list[str]:
    """How many tensors have each value, as `engine: dense 12, sparse 4`."""
    counts = {value: list(by_tensor.values()).count(value) for value in sorted(set(by_tensor.values()))}
    return [f"{what}: " + ", ".join(f"{value} {count}" for value, count in counts.items())] if counts else []


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    from supar_cli.cli.console import duration

    if seconds < 1:
        return "under 1s"
    return duration(seconds) if seconds < 48 * 3600 else f"{seconds / 86400:.1f}d"
