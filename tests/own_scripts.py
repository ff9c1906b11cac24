"""A user's training script, its layout and spec, for tests of runs by a command."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from supar_cli.experiments import search as tuning
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Spec

LAYOUT = """\
kind: supar.layout/v1
factory: mymodel:make
base: {width: 64}
wider: {width: 128}
tensors:
- {name: table, site: table, role: embedding, base: [100, 64], wider: [100, 128], fan_in_axes: [], scales: [1],
   uses: [first_sum], own: {mean: 0.0, std: 1.0}}
- {name: up, site: up, role: hidden, base: [256, 64], wider: [512, 128], fan_in_axes: [1], scales: [0, 1],
   own: {mean: 0.0, std: 0.07}}
- {name: head, site: head, role: unembedding, base: [100, 64], wider: [100, 128], fan_in_axes: [1], scales: [1],
   uses: [head], own: {mean: 0.0, std: 0.07}}
"""
SPEC = """\
kind: supar.spec/v1
model: {family: own, layout: layout.yaml}
run: {command: "COMMAND"}
hyperparameters: {lr: 0.0078125, init_std: null, alpha_input: 1.0, alpha_output: 1.0, weight_decay: 0.1}
train: {steps: 30, batch_size: 4}
search: {trials: 6, finalists: 2, seeds: 2, lr: [0.001, 0.06], lr_fit_octaves: [-1.0, 1.0]}
"""
# a training script whose loss is a function of the plan: 2 + (log2 lr + 7)² / 10, a little more with another seed
SCRIPT = """\
import os, sys, time
from math import log2
import supar_cli as supar
plan = supar.load(sys.argv[1])
x = log2(plan.hyperparameters.lr) + 7
loss = 2 + 0.1 * x**2 + 0.001 * plan.train.seed
FAULT
for step in (10, 20, 30):
    print("step", step, flush=True)
    supar.report_loss(loss + 30 / step, step)
supar.report_loss(loss)
"""
REPORT = """echo '{"loss": 1.5}' >> $SUPAR_RESULT"""
KEPT = f"{sys.executable} train.py {{plan}}"


def write_spec(here: Path, by: str = KEPT, fault: str = "", **search: Any) -> Spec:
    """supar.yaml and train.py in a folder; `fault` are lines of the script."""
    (here / "train.py").write_text(SCRIPT.replace("FAULT", fault))
    spec = parse(Spec, document.read(SPEC.replace("COMMAND", by), "supar.yaml")[0])
    spec = spec.model_copy(update={"search": spec.search.model_copy(update=search)})
    (here / "supar.yaml").write_text(document.write([spec.model_dump()]))
    return spec.model_copy(update={"model": spec.model.with_hash()})  # type: ignore[union-attr]


def plan_with(by: str, **run: Any) -> Plan:
    """The plan of a trial whose command is `by`; `: {plan}` before it does nothing."""
    text = SPEC.replace("COMMAND", "COMMAND: {plan}").replace("COMMAND", "x")
    spec = parse(Spec, document.read(text, "supar.yaml")[0])
    asked = spec.run.model_copy(update={"command": by if "{plan}" in by else f": {{plan}}; {by}", **run})
    return tuning._plan(spec.model_copy(update={"run": asked}), {}, 0)


def is_alive(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


STUBBORN = "trap '' TERM; "  # a script that SIGTERM does not end
# a child in the background, and one in a session of its own, as torchrun's workers are; their numbers go to a file
CHILDREN = "sleep 60 & echo $! > first; setsid sh -c 'echo $$ > second; exec sleep 60' & "
