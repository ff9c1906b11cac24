"""Estimates of what training a plan takes, FLOPs, memory and time, from arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from math import ceil

from supar_cli.planning.plan import Plan, PlanModel, PlanTensor
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.planning.updates import METHODS


def state_bytes(plan: Plan, engine: str, number_bytes: int) -> int:
    """Bytes of weights, gradients, AdamW's moments and indices under an engine; `number_bytes` is the size of a number.

    The most of a run: where density falls that of its start. Activations are not among them.
    """
    masked, schedule = [row for row in plan.tensors if row.kept < row.size], MaskSchedule.of(plan)
    size, live = sum(row.size for row in masked), start_live(masked, plan)
    rest = 16 * (plan.parameters - size)  # float32 weight, gradient and two moments
    if schedule and schedule.stores_dense(0):  # each position and its mask; in bfloat16 also a copy and its gradient
        return rest + (17 + (2 * number_bytes if number_bytes < 4 else 0)) * size
    if schedule and schedule.updates.grow == "gradient" and (engine != "dense" or _sums_gradients(plan)):
        rest += _grown_by_bytes(plan, masked)
    # a live weight: value, gradient, two moments, and its index, three for the sparse engine; dense also has
    # the weight and gradient of each position; the indices of blocks are a share of 1/block
    return rest + {"sparse": 28 * live, "block": 16 * live}.get(engine, 2 * number_bytes * size + 20 * live)


def _sums_gradients(plan: Plan) -> bool:
    """Whether a step has several micro-batches in one process; in more processes it may have one in each."""
    return plan.run.micro_batch_size not in (None, plan.train.batch_size)


def _grown_by_bytes(plan: Plan, masked: Sequence[PlanTensor]) -> int:
    """Bytes of the dense gradients that weights grow by: of one tensor at a time, of all where micro-batches are summed."""
    sizes = [4 * row.size for row in masked]
    return sum(sizes) if _sums_gradients(plan) else max(sizes)


MOST_BYTES = 2**30  # chosen: of logits in float32 that are held at once
CHUNK_BYTES = 2**28  # chosen: of those of a chunk; at 50,000 words 1342 tokens, enough for the speed of a product


def start_live(rows: Sequence[PlanTensor], plan: Plan) -> int:
    """The live weights of rows at step 0, the most that they have in a run."""
    schedule = MaskSchedule.of(plan)
    return sum(row.kept if schedule is None else schedule.kept(row, 0) for row in rows)


def _mean_kept(plan: Plan, row: PlanTensor) -> float:
    """A row's live weights, on average over the run."""
    schedule, train = MaskSchedule.of(plan), plan.train
    if schedule is None or schedule.updates.start is None:
        return row.kept
    # chosen: at a hundred steps, which is within 1 % of the mean of all
    return sum(schedule.kept(row, (2 * i + 1) * train.steps // 200) for i in range(100)) / 100


def loss_chunk(plan: Plan, rows: int) -> int | None:
    """The tokens of `rows` sequences whose logits are held at a time; None: all. The run section's number if it has one."""
    if plan.run.loss_chunk_tokens is not None or not isinstance(plan.model, PlanModel):
        return plan.run.loss_chunk_tokens
    token_bytes, tokens = 4 * plan.model.vocab, rows * plan.model.positions_of("unembedding")
    return max(1, CHUNK_BYTES // token_bytes) if tokens * token_bytes > MOST_BYTES else None


def activation_bytes(plan: Plan, rows: int, number_bytes: int, fused: bool = False) -> int:
    """Bytes kept for the backward pass of `rows` sequences, with the logits and their gradient in float32.

    `fused`: whether attention with a bias is fused too, as on CUDA; without one it is fused everywhere.
    """
    if not isinstance(plan.model, PlanModel):
        return 0  # how much a user's model keeps is not known
    scored = rows * plan.model.positions_of("unembedding")
    at_once = min(scored, loss_chunk(plan, rows) or scored)
    between = rows * plan.model.context * numbers_between(plan.model) * number_bytes
    return between + at_once * plan.model.vocab * 8 + squared_bytes(plan, rows, fused)


def squared_bytes(plan: Plan, rows: int, fused: bool = False) -> int:
    """Those of them that grow with the square of the context: ALiBi's bias and what attention keeps with it."""
    if not isinstance(plan.model, PlanModel) or plan.model.positions != "alibi":
        return 0
    bias = 4 * plan.model.heads * plan.model.context**2  # until the first pass; in bfloat16 half of it from then on
    return bias if fused else bias + rows * bias * (SCORES_KEPT * plan.model.layers + SCORES_PASSING)


# measured: whole steps on two cores of EPYC with ALiBi, contexts 1024 and 2048, one to three blocks, less those with RoPE:
# within 20 % as scores in float32 of each block, and of one block at once. The process holds more than autograd keeps
SCORES_KEPT, SCORES_PASSING = 2, 2


def numbers_between(model: PlanModel) -> int:
    """How many numbers the blocks of a transformer keep for each position."""
    return model.layers * (4 * model.width + 4 * model.attention_width + 3 * model.ffn_width)


# Dense bf16 peaks from the vendors' datasheets at an assumed share; the CPU rate is measured on two cores of a server.
# chosen: 40 % of peak, what well-tuned dense training reaches
RATES = {"H200/H100": 0.4 * 989e12, "A100": 0.4 * 312e12, "RTX 4090": 0.4 * 165e12, "2 CPU cores": 1e11}
# measured: `supar bench layer` on two cores of EPYC (Zen 4), float32, densities 1/128 to 1/8: seconds per number of X and Y
# for the three products together, and FLOP/s at live weights beyond that
SPARSE_SECONDS, SPARSE_RATE = 0.9e-9, 6e10
# measured there, on whole steps of width 1024 and 2048: seconds per number for everything between the products; with it
# the estimate is within a third of both
BETWEEN_SECONDS = 1.3e-9
# measured there, on steps of width 32 and 64: what each layer costs however small it is
# chosen: as much on a GPU, whose operations the CPU launches one by one
LAYER_SECONDS = 1e-3


def step_seconds(plan: Plan, device: str = "2 CPU cores", sparse: bool = False) -> float:
    """Seconds of a step on one of RATES, on average over the run, by arithmetic; with `sparse` by that engine."""
    if not isinstance(plan.model, PlanModel):
        return LAYER_SECONDS  # a user's model: the least
    rows, tokens = plan.train.batch_size, plan.train.batch_size * plan.model.context
    masked = [row for row in plan.tensors if row.kept < row.size] if sparse else []
    flops = rows * plan.flops_per_row - 6.0 * tokens * sum(row.size for row in masked)
    fixed, products = (1 + plan.model.layers) * LAYER_SECONDS, flops / RATES[device]
    if "CPU" not in device:  # it computes while the next operations are launched
        return max(fixed, products)
    seconds = fixed + products + tokens * numbers_between(plan.model) * BETWEEN_SECONDS
    schedule = MaskSchedule.of(plan)
    dense = schedule.end / schedule.steps if schedule and schedule.stores_dense(0) else 0.0  # share of the steps
    for row in masked:
        ends = row.fan_in + row.size // row.fan_in  # numbers of X and of Y a token
        by_sparse = ends * SPARSE_SECONDS + 6.0 * _mean_kept(plan, row) / SPARSE_RATE
        seconds += tokens * ((1 - dense) * by_sparse + dense * 6.0 * row.size / RATES[device])
    return seconds


def run_seconds(plan: Plan, device: str = "2 CPU cores", sparse: bool = False) -> float:
    """Seconds of a plan's steps and evaluations. An evaluation has no backward pass, which takes two thirds of a step."""
    train = plan.train
    evaluations = -(-train.steps // train.eval_every)
    return (train.steps + evaluations * train.eval_batches / 3) * step_seconds(plan, device, sparse)


def lines(plan: Plan, processes: int = 1) -> list[str]:
    """A plan's size, FLOPs, memory and time in a few lines."""
    hidden = [row for row in plan.tensors if row.role == "hidden"]
    live, size = sum(row.kept for row in hidden), sum(row.size for row in hidden)
    length, seen, model = f"{plan.train.steps:,} steps", plan.train.steps * plan.train.batch_size, plan.model
    if not isinstance(model, PlanModel):
        length += f" of {plan.train.batch_size} rows"
    else:
        flops, units = plan.flops_per_row * seen, seen if plan.train.tokens is None else plan.train.tokens
        length += f", {units:,} {model.data_kind}, {flops:.3g} FLOPs as a dense engine computes them"
        if plan.sparsity.updates is not None:
            dead = sum(row.size - _mean_kept(plan, row) for row in plan.tensors if row.kept < row.size)
            length += f", {flops - 6 * dead * seen * model.context:.3g} without those of dead weights"
    found = [
        f"parameters {plan.parameters:,}; live {plan.live:,}; hidden {live:,} of {size:,} live",
        f"fewest weights per neuron: {min((row.wpn for row in hidden), default=0):.4g}",
        length,
        f"memory of weights, gradients and moments, by engine: {', '.join(f'{name} {_gib(held)}' for name, held in _states(plan).items())}",
        *_of_updates(plan),
    ]
    rows = plan.run.micro_batch_size or max(1, plan.train.batch_size // processes)
    if isinstance(model, PlanModel):
        activations = _gib(activation_bytes(plan, rows, 2))
        found.append(f"activations take about {activations} for a micro-batch of {rows} {model.rows}")
        if squared := squared_bytes(plan, rows):
            bias = _gib(squared_bytes(plan, 0))
            scores = f"ALiBi: {bias} of bias, and on CPUs attention's scores"
            found[-1] += f"; {_gib(squared)} grow with the square of the context ({scores})"
    if processes > 1:
        found.append(f"sharded over {processes} processes, each holds 1/{processes} of all but activations")
    return found


def _of_updates(plan: Plan) -> list[str]:
    """What changing masks do to memory and time, in a line; none where masks stay or it is nothing."""
    schedule = MaskSchedule.of(plan)
    if schedule is None:
        return []
    updates, name = schedule.updates, METHODS[schedule.updates.method]
    masked = [row for row in plan.tensors if row.kept < row.size]
    if schedule.stores_dense(0):
        what = "keeps weights, gradients and moments of all positions and computes them densely"
        return [
            f"{name} {what} until step {schedule.end:,}, its last change of the masks: the memory is that of this time"
        ]
    if updates.grow == "gradient":
        held = "of all tensors, to sum them over micro-batches," if _sums_gradients(plan) else "of one tensor at a time"
        most = _gib(_grown_by_bytes(plan, masked))
        return [f"{name} makes the dense gradients {held} when masks change; {most} is counted for them"]
    if updates.start is not None:
        first = f"{start_live(masked, plan):,} live weights of sparse tensors, {sum(row.kept for row in masked):,} at the end"
        return [f"{name} starts with {first}: the memory is that of the start, the times are those of the whole run"]
    return []


def timing_seconds(plan: Plan) -> float:
    """Seconds of three steps and an evaluation on two CPU cores by the faster engine, by arithmetic."""
    return (3 + plan.train.eval_batches / 3) * min(step_seconds(plan, sparse=sparse) for sparse in (False, True))


def times(plans: Sequence[Plan]) -> list[str]:
    """The time that runs of plans take one after another on one device, by arithmetic, in a line or two."""

    def total(device: str, sparse: bool = False) -> str:
        return duration(sum(run_seconds(plan, device, sparse) for plan in plans))

    if not all(isinstance(plan.model, PlanModel) for plan in plans):
        return []
    what = "time" if len(plans) == 1 else "time of all runs, one after another"
    by_device = ", ".join(f"{name} {total(name)}" for name in RATES)
    found = [f"{what} (estimate; GPUs at an assumed 40 % of peak): {by_device}"]
    if any(row.kept < row.size for plan in plans if not _stays_dense(plan) for row in plan.tensors):
        missing = "" if find_spec("numba") else ", once numba is installed: `pip install numba`"
        found.append(f"2 CPU cores with the sparse engine: {total('2 CPU cores', sparse=True)}{missing}")
    return found


def _stays_dense(plan: Plan) -> bool:
    """Whether tensors are stored whole until the last step."""
    schedule = MaskSchedule.of(plan)
    return schedule is not None and schedule.stores_dense(plan.train.steps - 1)


def _states(plan: Plan) -> dict[str, int]:
    """Bytes of state by engine."""
    engines = {"dense in bfloat16": ("dense", 2), "dense in float32": ("dense", 4), "sparse (CPU)": ("sparse", 4)}
    if plan.sparsity.block:
        engines["block"] = ("block", 4)
    if (schedule := MaskSchedule.of(plan)) and schedule.stores_dense(0):
        del engines["sparse (CPU)"]
    if all(row.kept == row.size for row in plan.tensors):
        engines = {"dense": ("dense", 4)}
    return {name: state_bytes(plan, *how) for name, how in engines.items()}


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 0.01 * 2**30 else f"{value / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as `45s`, `12m`, `3h20m`, `5 days`, `3.2 years`."""
    if seconds < 90:
        return f"{ceil(seconds)}s"
    days, minutes = seconds / 86400, round(seconds / 60)
    if days >= 2:
        years = days / 365.25
        return f"{days:.0f} days" if years < 2 else f"{years:.1f} years" if years < 10 else f"{years:,.0f} years"
    return f"{minutes}m" if minutes < 90 else f"{minutes // 60}h{minutes % 60:02d}m"
