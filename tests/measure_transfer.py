"""What planning costs, against the imports that it cannot do without, and a plan of 100 layers against one of 2.

`python -m tests.measure_transfer [ROUNDS]` prints seconds and ratios as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from functools import partial
from typing import Any

import torch

from supar_cli.sparse.autotune import interleave

PROXY = """\
kind: supar.proxy/v1
model: {family: gpt2, width: 128, layers: 2, heads: 2, context: 128, vocab: 256}
hyperparameters: {lr: 0.015625, init_std: 0.08, alpha_input: 5.0, alpha_output: 1.0, weight_decay: 0.1}
train: {steps: 300, batch_size: 16}
data: {source: stdlib, hash: "sha256:known"}
"""
TRANSFER = "-m supar_cli transfer - --sparsity 0.992 --width 2048 -o - --layers"
COMMANDS = {
    "imports": ["-c", "import typer, pydantic, yaml"],
    "2 layers": [*TRANSFER.split(), "2"],
    "100 layers": [*TRANSFER.split(), "100"],
}


def measure(rounds: int) -> dict[str, Any]:
    """Median seconds of each command, and how the others compare with the imports."""
    run = partial(subprocess.run, input=PROXY.encode(), capture_output=True, check=True)
    runs = {name: partial(run, [sys.executable, *command]) for name, command in COMMANDS.items()}
    seconds = interleave(runs, rounds, torch.device("cpu"))
    median = {name: statistics.median(spent) for name, spent in seconds.items()}
    return {
        "rounds": rounds,
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "transfer_over_imports": round(median["2 layers"] / median["imports"], 3),
        "100_layers_minus_twice_2_layers_s": round(median["100 layers"] - 2 * median["2 layers"], 3),
    }


if __name__ == "__main__":
    json.dump(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 15), sys.stdout, indent=1)
