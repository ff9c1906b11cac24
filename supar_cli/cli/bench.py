"""`supar bench`: times and memory, printed; asserted only against an earlier result, with `--compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supar_cli.cli import console, studies
from supar_cli.errors import CheckViolated, InputError
from supar_cli.planning import density as densities_of
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Hyperparameters, Model, Proxy, Run, Sparsity, Target, Train
from supar_cli.planning.transfer import transfer

if TYPE_CHECKING:
    from supar_cli.bench.results import Benchmark
    from supar_cli.sparse.autotune import LayerCase

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Measure what supar does against what it replaces."""


HELP = {"help_option_names": ["-h", "--help"]}
SHAPE = ("width", "layers", "heads", "context", "vocab")
Compare = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="An earlier result of the same command; exit 5 where a ratio fell by a tenth."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Block = Annotated[
    int | None, typer.Option(help="Live weights in aligned N×N blocks, N of 16, 32, 64 or 128.", show_default=False)
]
Shape = Annotated[str, typer.Option(metavar="OUTxIN", help="Shape of the weight.")]
Tokens = Annotated[int, typer.Option(min=1, help="Rows of the input.")]


@app.command(context_settings=HELP)
def step(
    width: Annotated[int, typer.Option(help="Model width.")] = 512,
    layers: Annotated[int, typer.Option(help="Number of blocks.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 8,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    vocab: Annotated[int, typer.Option(help="Vocabulary.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    sparsity: Annotated[
        float | None, typer.Option(help="Sparsity of the masked model. [default: 0.9]", show_default=False)
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            parser=densities_of.number, help="Density instead of sparsity, such as 1/128.", show_default=False
        ),
    ] = None,
    block: Block = None,
    engine: Annotated[str, typer.Option(help="auto, dense, sparse or block.")] = "auto",
    steps: Annotated[int, typer.Option(min=3, help="Rounds of steps timed.")] = 20,
    device: Device = "auto",
    precision: Precision = "auto",
    compile_: Annotated[str, typer.Option("--compile", help="auto, on or off.")] = "auto",
    compare: Compare = None,
    out: console.Out = None,
    force: console.Force = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Time a masked training step against a plain GPT's, dense and masked as peers do it, interleaved."""
    flags = locals()
    if sparsity is not None and density is not None:
        raise InputError("--density: can't be combined with --sparsity; expected only one of them")
    wanted = {name: flags[name] for name in ("sparsity", "density") if flags[name] is not None} or {"sparsity": 0.9}
    if block:
        wanted |= {"pattern": "block", "block": block}
    run = {"device": device, "precision": precision, "engine": engine, "compile": compile_}
    plan = _plan({name: flags[name] for name in SHAPE}, {"steps": steps + 10, "batch_size": batch_size}, wanted, run)
    from supar_cli.bench import step as bench

    _run(bench.benchmark(plan, steps), flags)


@app.command(context_settings=HELP)
def layer(
    shape: Shape = "4096x1024",
    tokens: Tokens = 4096,
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
    case = _case(device, precision, tokens, block)
    from supar_cli.bench import layer as bench

    _run(bench.benchmark(sides, densities, case, rounds), flags)


@app.command(context_settings=HELP)
def memory(
    shape: Shape = "8192x8192",
    tokens: Tokens = 64,
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
    case = _case(device, precision, tokens)
    from supar_cli.bench import memory as bench

    _run(bench.benchmark(sides, densities[0], case), flags)


def _run(benchmark: Benchmark, flags: dict[str, Any]) -> None:
    """Measure, show and write; raise CheckViolated where it is worse than the earlier result.

    Raises InputError, before anything is measured, where --compare or --out can't be used.
    """
    from supar_cli.bench import results

    out, name = flags["out"], flags["compare"]
    if out is not None:
        console.check_writable(out, out, flags["force"])
    earlier = None
    if name is not None:
        read = console.read_one(name, f"`supar bench {benchmark.name} --json` writes one to stdout")
        earlier = benchmark.earlier(name, read.data)
    document = benchmark.run()
    tables, rows = benchmark.tables(document), []
    if earlier is not None:
        rows = document["compared"] = results.compare(earlier, benchmark.readings(document))
        tables.append(results.comparison_table(name, rows))
    if flags.get("picture") is not None:
        from supar_cli.bench import layer
        from supar_cli.reporting import figures

        figures.save(layer.figure(document), Path(flags["picture"]))
    talk = console.Talk(flags["quiet"])
    if not talk.quiet:
        studies.show([table.model_dump() for table in tables])
        talk.log(", ".join(f"{key} {document['environment'][key]}" for key in ("device", "torch", "numba")))
    console.emit([document], out, None, force=True, as_json=flags["as_json"], talk=talk)
    worse = [f"{row['what']}: was {row['then']:g}, is {row['now']:g}" for row in rows if row["worse"]]
    if worse:
        raise CheckViolated("\n".join(worse))


def _shape(text: str) -> tuple[int, int]:
    """(out, in) of a text such as 4096x1024. Raises InputError."""
    parts = text.replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--shape {text}: expected OUTxIN, such as 4096x1024")
    return int(parts[0]), int(parts[1])


def _densities(text: str) -> list[float]:
    """Densities in the order given. Raises InputError."""
    try:
        found = [densities_of.number(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--density {text}: expected numbers with commas between them") from None
    if any(not 0 < value <= 1 for value in found) or len(set(found)) < len(found):
        raise InputError(f"--density {text}: expected 0 < density <= 1, each once")
    return found


def _case(device: str, precision: str, tokens: int, block: int | None = None) -> LayerCase:
    """A layer's case on this machine: device and precision mean what they mean in a plan."""
    shape = {"width": 64, "layers": 1, "heads": 1, "context": 64, "vocab": 64}
    run = {"device": device, "precision": precision, "compile": "off"}
    plan = _plan(shape, {"steps": 1, "batch_size": 1}, {"sparsity": 0.0}, run)
    from supar_cli.sparse.autotune import LayerCase
    from supar_cli.training.runtime import Runtime

    runtime = Runtime.of(plan)
    return LayerCase(runtime.device, runtime.precision, tokens, block)


def _plan(shape: dict[str, Any], train: dict[str, Any], sparsity: dict[str, Any], run: dict[str, Any]) -> Plan:
    """A plan of the shape; its hyperparameters are those of the quickstart, which time doesn't depend on."""
    tuned = Hyperparameters(lr=2**-6, init_std=0.08, alpha_input=5.0, alpha_output=1.0, weight_decay=0.1)
    try:
        proxy = Proxy(
            kind="supar.proxy/v1",
            model=Model(family="gpt2", **shape),
            hyperparameters=tuned,
            train=Train(**train, schedule="constant"),
            run=Run(**run),
        )
        return transfer(proxy, Target(sparsity=Sparsity(**sparsity)), allow_low_wpn=True)
    except ValueError as error:
        raise console.input_error(error) from None
