"""`supar bench transfer`: what planning costs, against the imports that it cannot do without."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Annotated

import typer

from supar_cli.cli import console

PROXY = """\
kind: supar.proxy/v1
model: {family: gpt2, width: 128, layers: 2, heads: 2, context: 128, vocab: 256}
hyperparameters: {lr: 0.015625, init_std: 0.08, alpha_input: 5.0, alpha_output: 1.0, weight_decay: 0.1}
train: {steps: 300, batch_size: 16}
data: {source: stdlib, hash: "sha256:known"}
"""
IMPORTS = "import typer, pydantic, yaml"


def transfer(
    rounds: Annotated[int, typer.Option(min=3, help="Times each command is run.")] = 15,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Time `supar transfer` against importing its libraries, and a target of 100 layers against one of 2."""

    def transfer_to(layers: int) -> list[str]:
        flags = f"--sparsity 0.992 --width 2048 --layers {layers} -o -"
        return [sys.executable, "-m", "supar_cli", "transfer", "-", *flags.split()]

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
