"""`supar bench`: timings, printed and never asserted."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Annotated, Any

import typer

from supar_cli.cli import console
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Hyperparameters, Model, Proxy, Run, Sparsity, Target, Train
from supar_cli.planning.transfer import transfer

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Time what supar does against what it replaces."""


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def step(
    width: Annotated[int, typer.Option(help="Model width.")] = 512,
    layers: Annotated[int, typer.Option(help="Number of blocks.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 8,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    vocab: Annotated[int, typer.Option(help="Vocabulary.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    sparsity: Annotated[float, typer.Option(help="Sparsity of the masked model.")] = 0.9,
    steps: Annotated[int, typer.Option(min=3, help="Pairs of steps timed.")] = 20,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    compile_: Annotated[str, typer.Option("--compile", help="auto, on or off.")] = "auto",
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Time a masked training step against the same step of a plain dense GPT, interleaved."""
    talk = console.Talk(quiet)
    proxy = {"family": "gpt2", "width": width, "layers": layers, "heads": heads, "context": context, "vocab": vocab}
    plan = _plan(proxy, batch_size, steps, sparsity, {"device": device, "precision": precision, "compile": compile_})
    import torch

    from supar_cli.analysis import benchmark
    from supar_cli.training.trainer import Setup

    setup = Setup.of(plan)
    found = benchmark.compare(plan, steps)
    cuda = setup.device.type == "cuda"
    result: dict[str, Any] = {
        "kind": "supar.bench/v1",
        "shape": proxy,
        "batch_size": batch_size,
        "sparsity": sparsity,
        "device": torch.cuda.get_device_name(setup.device) if cuda else f"cpu ({torch.get_num_threads()} threads)",
        "precision": str(setup.precision).removeprefix("torch."),
        "compiled": setup.compiles,
        "torch": str(torch.__version__),
        "steps": steps,
        "masked_ms": round(1000 * found.masked_s, 3),
        "dense_ms": round(1000 * found.dense_s, 3),
        "ratio": round(found.ratio, 4),
        "ratio_quartiles": [round(value, 4) for value in found.quartiles],
    }
    low, high = result["ratio_quartiles"]
    talk.log(
        f"masked {result['masked_ms']:.1f} ms, plain dense {result['dense_ms']:.1f} ms, ratio {result['ratio']:.3f} "
        f"(quartiles {low:.3f} to {high:.3f}, {steps} pairs)\n{result['device']}, {result['precision']}, torch {result['torch']}"
    )
    console.emit([result], None, None, force=True, as_json=as_json, talk=talk)


PROXY = """\
kind: supar.proxy/v1
model: {family: gpt2, width: 128, layers: 2, heads: 2, context: 128, vocab: 256}
hyperparameters: {lr: 0.015625, init_std: 0.08, alpha_input: 5.0, alpha_output: 1.0, weight_decay: 0.1}
train: {steps: 300, batch_size: 16}
data: {source: stdlib, hash: "sha256:known"}
"""
IMPORTS = "import typer, pydantic, yaml"


@app.command("transfer", context_settings={"help_option_names": ["-h", "--help"]})
def transfer_(
    rounds: Annotated[int, typer.Option(min=3, help="Times each command is run.")] = 15,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Time `supar transfer` against importing its libraries, and a target of 100 layers against one of 2."""
    import statistics

    def transfer_to(layers: int) -> list[str]:
        return [
            sys.executable,
            "-m",
            "supar_cli",
            "transfer",
            "-",
            "--sparsity",
            "0.992",
            "--width",
            "2048",
            "--layers",
            str(layers),
            "-o",
            "-",
        ]

    commands = {"imports": [sys.executable, "-c", IMPORTS], "2 layers": transfer_to(2), "100 layers": transfer_to(100)}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, input=PROXY.encode(), capture_output=True, check=True)
            times[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "kind": "supar.bench/v1",
        "rounds": rounds,
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "transfer_over_imports": round(median["2 layers"] / median["imports"], 3),
        "100_layers_minus_twice_2_layers_s": round(median["100 layers"] - 2 * median["2 layers"], 3),
    }
    console.Talk(quiet).log(
        f"`{IMPORTS}` {median['imports']:.3f} s; `supar transfer` {median['2 layers']:.3f} s with 2 layers "
        f"({result['transfer_over_imports']} times that), {median['100 layers']:.3f} s with 100"
    )
    console.emit([result], None, None, force=True, as_json=as_json, talk=console.Talk(quiet))


def _plan(shape: dict[str, Any], batch_size: int, steps: int, sparsity: float, run: dict[str, Any]) -> Plan:
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
        return transfer(proxy, Target(sparsity=Sparsity(sparsity=sparsity)))
    except ValueError as error:
        raise console.input_error(error) from None
