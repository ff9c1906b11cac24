"""`supar bench`: times and memory, printed; asserted only against an earlier result, with `--compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from supar_cli.cli import bench_transfer, console, studies
from supar_cli.errors import CheckViolated, InputError
from supar_cli.planning import density as sparsities
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Hyperparameters, Model, Proxy, Run, Sparsity, Target, Train
from supar_cli.planning.transfer import transfer

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Measure what supar does against what it replaces."""


HELP = {"help_option_names": ["-h", "--help"]}
Compare = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="An earlier result of the same command; exit 5 where a ratio fell by a tenth."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Block = Annotated[
    int | None, typer.Option(help="Live weights in aligned N×N blocks, N of 16, 32, 64 or 128.", show_default=False)
]

Width = Annotated[int, typer.Option(help="Model width.")]
Layers = Annotated[int, typer.Option(help="Number of blocks.")]
Heads = Annotated[int, typer.Option(help="Attention heads.")]
Context = Annotated[int, typer.Option(help="Tokens per sequence.")]
Vocab = Annotated[int, typer.Option(help="Vocabulary.")]
BatchSize = Annotated[int, typer.Option(help="Sequences per step.")]
StepSparsity = Annotated[
    float | None, typer.Option(help="Sparsity of the masked model. [default: 0.9]", show_default=False)
]
StepDensity = Annotated[
    float | None,
    typer.Option(parser=sparsities.number, help="Density instead of sparsity, such as 1/128.", show_default=False),
]
EngineName = Annotated[str, typer.Option(help="auto, dense, sparse or block.")]
Compile = Annotated[str, typer.Option("--compile", help="auto, on or off.")]


@app.command(context_settings=HELP)
def step(
    width: Width = 512,
    layers: Layers = 4,
    heads: Heads = 8,
    context: Context = 256,
    vocab: Vocab = 256,
    batch_size: BatchSize = 8,
    sparsity: StepSparsity = None,
    density: StepDensity = None,
    block: Block = None,
    engine: EngineName = "auto",
    steps: Annotated[int, typer.Option(min=3, help="Rounds of steps timed.")] = 20,
    device: Device = "auto",
    precision: Precision = "auto",
    compile_: Compile = "auto",
    compare: Compare = None,
    out: console.Out = None,
    force: console.Force = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Time a masked training step against a plain GPT's, dense and masked as peers do it, interleaved."""
    flags = locals()
    plan = _step_plan(flags)
    from supar_cli.bench import step as benchmark
    from supar_cli.training.runtime import Runtime

    setup = Runtime.of(plan)
    start = _step_settings("step", plan, flags, setup)
    earlier = _earlier(start, flags)
    _finish(start | benchmark.compare(plan, steps).fields(), earlier, setup.device, flags)


SHAPE = ("family", "width", "layers", "heads", "context", "vocab")


def _step_settings(bench: str, plan: Plan, flags: dict[str, Any], setup: Any) -> dict[str, Any]:
    """What a benchmark of a whole model's steps is of."""
    from supar_cli.bench import results as bench_results

    return {
        "bench": bench,
        "shape": {name: getattr(plan.model, name) for name in SHAPE},
        "batch_size": plan.train.batch_size,
        "sparsity": plan.sparsity.sparsity,
        "density": plan.sparsity.density,
        "block": flags["block"],
        "engine": flags["engine"],
        **bench_results.where(setup.device, setup.precision),
        "compiled": setup.compiles,
    }


def _step_plan(flags: dict[str, Any]) -> Plan:
    if flags["sparsity"] is not None and flags["density"] is not None:
        raise InputError("--density: given beside --sparsity; expected only one of them")
    given = {name: flags[name] for name in ("sparsity", "density") if flags[name] is not None}
    wanted: dict[str, Any] = given or {"sparsity": 0.9}
    if flags["block"]:
        wanted |= {"pattern": "block", "block": flags["block"]}
    shape = {"family": "gpt2", **{name: flags[name] for name in SHAPE[1:]}}
    run = {name: flags[name] for name in ("device", "precision", "engine")} | {"compile": flags["compile_"]}
    return _plan(shape, flags["batch_size"], flags["steps"], wanted, run)


@app.command(context_settings=HELP)
def run(
    width: Width = 512,
    layers: Layers = 4,
    heads: Heads = 8,
    context: Context = 256,
    vocab: Vocab = 256,
    batch_size: BatchSize = 8,
    sparsity: StepSparsity = None,
    density: StepDensity = None,
    block: Block = None,
    engine: EngineName = "auto",
    steps: Annotated[int, typer.Option(min=3, help="Rounds of steps timed.")] = 20,
    device: Device = "auto",
    precision: Precision = "auto",
    compile_: Compile = "auto",
    compare: Compare = None,
    out: console.Out = None,
    force: console.Force = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Time what is added to a step: checkpoints, metrics and monitors; on a CPU also a second process and its gradients."""
    flags = locals()
    plan = _step_plan(flags)
    from supar_cli.bench import run_costs as bench_run
    from supar_cli.training.runtime import Runtime

    setup = Runtime.of(plan)
    start = _step_settings("run", plan, flags, setup)
    earlier = _earlier(start, flags)
    found = bench_run.measure(plan, steps)
    parallel = bench_run.measure_processes(plan, steps) if setup.device.type == "cpu" else None
    _finish(start | found | {"parallel": parallel}, earlier, setup.device, flags)


@app.command(context_settings=HELP)
def layer(
    shape: Annotated[str, typer.Option(metavar="OUTxIN", help="Shape of the weight.")] = "4096x1024",
    tokens: Annotated[int, typer.Option(min=1, help="Rows of the input.")] = 4096,
    density: Annotated[str, typer.Option(help="Densities, such as 0.03125,1/8.")] = "0.0078125,0.03125,0.125",
    block: Block = None,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds timed, after one that warms up.")] = 5,
    device: Device = "auto",
    precision: Precision = "auto",
    picture: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw the ratios over density.", show_default=False)
    ] = None,
    compare: Compare = None,
    out: console.Out = None,
    force: console.Force = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Time one layer's forward pass and both gradients by each engine against masked dense, interleaved."""
    flags = locals()
    sides, densities = _shape(shape), _densities(density)
    setup = _setup(device, precision)
    from supar_cli.bench import layer as bench_layers
    from supar_cli.bench import results as bench_results
    from supar_cli.sparse.autotune import LayerCase

    bench_layers.require_blocks(sides, block)
    start = {
        "bench": "layer",
        "shape": list(sides),
        "tokens": tokens,
        "density": densities,
        "block": block,
        **bench_results.where(setup.device, setup.precision),
    }
    earlier = _earlier(start, flags)
    case = LayerCase(setup.device, setup.precision, tokens, block)
    found = [bench_layers.measure(sides, one, case, rounds) for one in densities]
    result = start | {"rounds": rounds, "densities": found, "break_even": bench_layers.break_evens(found)}
    if picture is not None:
        from supar_cli.reporting import figures

        figures.save(bench_layers.picture(result), Path(picture))
    _finish(result, earlier, setup.device, flags)


@app.command(context_settings=HELP)
def memory(
    shape: Annotated[str, typer.Option(metavar="OUTxIN", help="Shape of the weight.")] = "8192x8192",
    tokens: Annotated[int, typer.Option(min=1, help="Rows of the input.")] = 64,
    density: Annotated[str, typer.Option(help="Density, such as 0.03125 or 1/32.")] = "0.0078125",
    device: Device = "auto",
    precision: Precision = "auto",
    compare: Compare = None,
    out: console.Out = None,
    force: console.Force = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Measure the peak memory of training one layer with AdamW, masked dense and by engine, a process each."""
    flags = locals()
    sides, densities = _shape(shape), _densities(density)
    if len(densities) > 1:
        raise InputError(f"--density {density}: expected one density")
    setup = _setup(device, precision)
    from supar_cli.bench import memory as bench_memory
    from supar_cli.bench import results as bench_results
    from supar_cli.sparse.autotune import LayerCase

    start = {
        "bench": "memory",
        "shape": list(sides),
        "tokens": tokens,
        "density": densities[0],
        **bench_results.where(setup.device, setup.precision),
    }
    earlier = _earlier(start, flags)
    arms = bench_memory.measure_all(sides, densities[0], LayerCase(setup.device, setup.precision, tokens))
    _finish(start | {"arms": arms}, earlier, setup.device, flags)


def _shape(text: str) -> tuple[int, int]:
    """(out, in) of a text such as 4096x1024. Raises InputError."""
    parts = text.replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--shape {text}: expected OUTxIN, such as 4096x1024")
    return int(parts[0]), int(parts[1])


def _densities(text: str) -> list[float]:
    """Densities in the order given. Raises InputError."""
    try:
        found = [sparsities.number(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--density {text}: expected numbers with commas between them") from None
    if any(not 0 < value <= 1 for value in found) or len(set(found)) < len(found):
        raise InputError(f"--density {text}: expected 0 < density <= 1, each once")
    return found


def _setup(device: str, precision: str) -> Any:
    """The device and precision that these words mean on this machine, as a plan's do."""
    shape = {"family": "gpt2", "width": 64, "layers": 1, "heads": 1, "context": 64, "vocab": 64}
    plan = _plan(shape, 1, 1, {"sparsity": 0.0}, {"device": device, "precision": precision, "compile": "off"})
    from supar_cli.training.runtime import Runtime

    return Runtime.of(plan)


def _earlier(settings: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any] | None:
    """The result to compare with. Raises InputError, before anything is measured, where it or --out can't be used."""
    if flags["out"] is not None:
        console.check_writable(flags["out"], flags["out"], flags["force"])
    if flags["compare"] is None:
        return None
    from supar_cli.bench import results as bench_results

    read = console.read_one(flags["compare"], f"`supar bench {settings['bench']} --json` writes one to stdout")
    bench_results.require_same(flags["compare"], read.data, settings)
    return dict(read.data)


def _finish(result: dict[str, Any], earlier: dict[str, Any] | None, device: Any, flags: dict[str, Any]) -> None:
    """Show the tables, write the document, and raise CheckViolated where it is worse than the earlier one."""
    from supar_cli.bench import results as bench_results
    from supar_cli.bench import tables as bench_tables

    document = {"kind": "supar.bench/v1", **result, "environment": bench_results.environment(device)}
    tables = bench_tables.tables(document)
    rows = [] if earlier is None else bench_results.compared(flags["compare"], earlier, document)
    if earlier is not None:
        document["compared"] = rows
        tables.append(bench_tables.comparison(flags["compare"], rows))
    talk = console.Talk(flags["quiet"])
    if not talk.quiet:
        studies.show(tables)
        talk.log(", ".join(f"{key} {document['environment'][key]}" for key in ("device", "torch", "numba")))
    console.emit([document], flags["out"], None, force=True, as_json=flags["as_json"], talk=talk)
    worse = [f"{row['what']}: was {row['then']:g}, is {row['now']:g}" for row in rows if row["worse"]]
    if worse:
        raise CheckViolated("\n".join(worse))


app.command("transfer", context_settings=HELP)(bench_transfer.transfer)


def _plan(shape: dict[str, Any], batch_size: int, steps: int, sparsity: dict[str, Any], run: dict[str, Any]) -> Plan:
    """A plan of the shape; its hyperparameters are those of the quickstart, which time doesn't depend on."""
    try:
        proxy = Proxy(
            kind="supar.proxy/v1",
            model=Model(**shape),
            hyperparameters=Hyperparameters(
                lr=2**-6, init_std=0.08, alpha_input=5.0, alpha_output=1.0, weight_decay=0.1
            ),
            train=Train(steps=steps + 10, batch_size=batch_size, schedule="constant"),
            run=Run(**run),
        )
        return transfer(proxy, Target(sparsity=Sparsity(**sparsity)), allow_low_wpn=True)
    except ValueError as error:
        raise console.input_error(error) from None
