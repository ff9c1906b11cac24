"""`supar bench`: print times and memory; fail only if worse than an earlier result (`--compare`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.app import application
from supar_cli.cli.options import Flags, command, require_one
from supar_cli.cli.values import one_of, shares
from supar_cli.errors import CheckViolated, InputError
from supar_cli.planning.density import Share, literal
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy

if TYPE_CHECKING:
    from supar_cli.bench.results import Benchmark
    from supar_cli.training.runtime import Runtime

SMALLEST = {"width": 64, "layers": 1, "heads": 1, "context": 64, "vocab": 64}
NARROWEST = 512  # chosen: narrower models start in a moment
WEIGHTS_PER_NEURON = 16  # chosen: so that live weights grow with the width, and positions with its square
# the quickstart's; time does not depend on them
HYPERPARAMETERS = {"lr": 2**-6, "init_std": 0.08, "alpha_input": 5.0, "alpha_output": 1.0, "weight_decay": 0.1}


def _shape(flag: str, text: str) -> tuple[int, int]:
    """Parse a text such as 4096x1024 as (out, in). Raises InputError."""
    parts = text.replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"{flag} {text}: expected OUTxIN, such as 4096x1024")
    return int(parts[0]), int(parts[1])


def _densities(flag: str, text: str) -> list[float]:
    """Densities in the order given. Raises InputError."""
    found = [float(literal(share)) for share in shares(flag, text)]
    if any(not 0 < value <= 1 for value in found):
        raise InputError(f"{flag} {text}: expected 0 < density <= 1")
    if len(set(found)) < len(found):
        raise InputError(f"{flag} {text}: a density appears twice")
    return found


def _density(flag: str, text: str) -> float:
    found = _densities(flag, text)
    if len(found) > 1:
        raise InputError(f"{flag} {text}: expected one density")
    return found[0]


def _sparsity(flag: str, text: str) -> Share:
    found = shares(flag, text)
    if len(found) > 1:
        raise InputError(f"{flag} {text}: expected one sparsity")
    return found[0]


DEVICE = {"device": {"default": "auto"}, "precision": {"default": "auto"}}
BLOCK = {"help": "Put live weights in aligned N×N blocks; N is 16, 32, 64 or 128."}


@command(
    "width layers heads context vocab batch_size sparsity density block engine steps device precision compile",
    "compare out force json quiet",
    **DEVICE,
    width={"default": 512},
    layers={"default": 4},
    heads={"default": 8},
    context={"default": 256},
    vocab={"default": 256},
    batch_size={"default": 8},
    sparsity={"read": _sparsity, "help": "Sparsity of the masked model. [default: 0.9]"},
    density={"read": _density, "help": "Density instead of sparsity, such as 1/128."},
    block=BLOCK,
    engine={"default": "auto", "help": "auto, dense, sparse or block."},
    steps={"default": 20, "minimum": 3, "help": "Number of timed rounds; a round runs one step of each model."},
    compile={"default": "auto"},
)
def step(flags: Flags) -> None:
    """Time supar's masked training step against a plain PyTorch GPT's, dense and with `weight * mask`; steps are interleaved.

    Examples:
      supar bench step --width 1024 --sparsity 0.98
      supar bench step --density 1/16 --engine sparse -o step.yaml
    """
    require_one(flags, "density", "sparsity")
    target: dict[str, Any] = {"sparsity": 0.9 if flags.sparsity is None else flags.sparsity}
    if flags.density is not None:
        target = {"density": flags.density}
    if flags.block is not None:
        target |= {"pattern": "block", "block": flags.block}
    plan = _plan(flags, **target)
    from supar_cli.bench import step as bench

    with documents.naming_flags(flags):
        benchmark = bench.benchmark(plan, flags.steps)
    _run(benchmark, flags)


@command(
    "shape tokens density block rounds device precision picture compare out force json quiet",
    **DEVICE,
    shape={"default": "4096x1024", "read": _shape},
    tokens={"default": 4096, "minimum": 1, "help": "Rows of the input."},
    density={"default": "0.0078125,0.03125,0.125", "read": _densities, "help": "Densities, such as 0.03125,1/8."},
    block=BLOCK,
    rounds={"default": 5},
)
def layer(flags: Flags) -> None:
    """Time one layer's forward and backward pass by each engine against dense with `weight * mask`; runs are interleaved.

    Examples:
      supar bench layer --shape 4096x1024
      supar bench layer --density 1/8,1/32 --picture ratios.png
    """
    runtime = _runtime(flags)
    from supar_cli.bench import layer as bench

    _run(bench.benchmark(flags.shape, flags.density, flags.tokens, flags.block, flags.rounds, runtime), flags)


@command(
    "shape tokens density device precision compare out force json quiet",
    **DEVICE,
    shape={"default": "8192x8192", "read": _shape},
    tokens={"default": 64, "minimum": 1, "help": "Rows of the input."},
    density={"default": "0.0078125", "read": _density, "help": "Density, such as 0.03125 or 1/32."},
)
def memory(flags: Flags) -> None:
    """Measure the peak memory of training one layer with AdamW: masked dense and each engine, each in its own process.

    Examples:
      supar bench memory
      supar bench memory --shape 8192x8192 --density 1/32 -o memory.yaml
    """
    runtime = _runtime(flags)
    from supar_cli.bench import memory as bench

    _run(bench.benchmark(flags.shape, flags.density, flags.tokens, runtime), flags)


@command(
    "width layers engine compare out force json quiet",
    width={"default": 4096, "minimum": 2 * NARROWEST, "help": "The largest width; its halves are measured first."},
    layers={"default": 1},
    engine={"default": "sparse", "help": "sparse or dense.", "read": one_of("sparse", "dense")},
)
def start(flags: Flags) -> None:
    """Measure time and memory from a plan to the first step, over width at 16 live weights per neuron, on the CPU.

    Examples:
      supar bench start
      supar bench start --width 8192 -o start.yaml
    """
    widths = [flags.width]
    while widths[0] >= 2 * NARROWEST and widths[0] % 2 == 0:
        widths.insert(0, widths[0] // 2)
    plans = [
        _plan(Flags(**{**vars(flags), "width": width}), density=f"{WEIGHTS_PER_NEURON}/{width}") for width in widths
    ]
    from supar_cli.bench import start as bench

    _run(bench.benchmark(plans, flags.engine, WEIGHTS_PER_NEURON), flags)


def _run(benchmark: Benchmark, flags: Flags) -> None:
    """Measure, show and write; raise CheckViolated if it is worse than the earlier result.

    Raises InputError, before anything is measured, where --compare or --out can't be used.
    """
    from supar_cli.bench import results

    if flags.out not in (None, "-"):
        terminal.check_writable(Path(flags.out), flags.force)
    if flags.picture is not None:
        from supar_cli.reporting import figures

        figures.require_format("--picture", flags.picture)
    earlier = None
    if flags.compare is not None:
        missing = f"expected what `supar bench {benchmark.name} -o FILE` writes"
        read = documents.read_one(flags.compare, missing, flags.places["compare"])
        earlier = benchmark.earlier(flags.compare, read.data)
    with documents.naming_flags(flags):
        document = benchmark.run()
    if flags.picture is not None and benchmark.figure is not None:
        figures.save(benchmark.figure(document), Path(flags.picture))
    tables, rows = benchmark.tables(document), []
    if earlier is not None:
        rows = document["compared"] = results.compare(earlier, benchmark.readings(document))
        tables.append(results.comparison_table(flags.compare, rows))
    log = terminal.Log(flags.quiet)
    if not log.quiet:
        terminal.show_tables(table.model_dump() for table in tables)
        log.log(", ".join(f"{key} {document['environment'][key]}" for key in ("device", "torch", "numba")))
    terminal.emit([document], flags, log, None)
    worse = [
        f"{row['what']}: {row['then']:g} then, {row['now']:g} now; {row['better']} is better"
        for row in rows
        if row["worse"]
    ]
    if worse:
        raise CheckViolated("\n".join(worse))


def _runtime(flags: Flags) -> Runtime:
    """Device and precision of a layer, resolved from the flags as for a plan."""
    plan = _plan(flags, sparsity=0.0)
    from supar_cli.training.runtime import Runtime

    with documents.naming_flags(flags):
        return Runtime.of(plan)


def _plan(flags: Flags, **target: Any) -> Plan:
    """A plan for the model and run given by the flags; sizes without a flag are those of the smallest model. Raises InputError."""
    given = vars(flags)
    values = {
        "kind": "supar.proxy/v1",
        "model": {"family": "gpt2"} | {key: given.get(key, small) for key, small in SMALLEST.items()},
        "hyperparameters": HYPERPARAMETERS,
        "train": {"steps": 10**6, "batch_size": given.get("batch_size", 1), "schedule": "constant"},
        "data": {"source": "random", "hash": "sha256:random"},
        "run": {key: given[key] for key in ("device", "precision", "engine", "compile") if key in given},
    }
    with documents.naming_flags(flags):
        return supar_cli.transfer(validate(Proxy, values, ""), allow_low_wpn=True, **target)


bench = application(
    step, layer, memory, start, help="Benchmark time and memory of masked training against plain dense training."
)
