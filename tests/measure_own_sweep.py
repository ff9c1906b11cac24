"""The best learning rate over densities on Hugging Face models in a plain loop: SμPar against SP, hyperparameters tuned when small.

`python -m tests.measure_own_sweep llama|gpt2 [FOLDER]` appends a line for each run to FOLDER/own_sweep_NAME.jsonl and goes on
from there; `python -m tests.measure_own_sweep report [FOLDER]` prints optima, shifts and losses as JSON.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import supar_cli
from supar_cli.data import batches
from supar_cli.experiments.statistics import fit_quadratic
from supar_cli.files import append_lines, read_jsonl
from supar_cli.planning import document
from supar_cli.planning.layout_document import Layout
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import validate
from supar_cli.planning.schedule import factor
from supar_cli.planning.spec import Data, Proxy

BASE, TARGET, CONTEXT, ROWS, STEPS = 64, 128, 64, 16, 100
DENSITIES = ("1", "1/4", "1/8")
SEEDS = (11, 12, 13)  # fresh: the search has seed 0
TRIALS = 32
OCTAVES = {"supar": range(-9, -3), "sp": range(-10, -2)}


def llama(width: int) -> nn.Module:
    import transformers as hf

    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 64}
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, **heads}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=256, max_position_embeddings=CONTEXT, **shape))


def gpt2(width: int) -> nn.Module:
    import transformers as hf

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_positions": CONTEXT, "n_embd": width, "n_layer": 2, "n_head": width // 32}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=256, **shape, **off))


MODELS = {"llama": llama, "gpt2": gpt2}
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # PyPI's does not import beside a CPU build of torch
TOKENS = batches.load(Data(), vocab=256, context=CONTEXT)


def proxy_of(layout_file: Path, **hyper: float) -> Proxy:
    """A proxy of the layout with hyperparameters."""
    data: dict[str, Any] = {"kind": "supar.proxy/v1", "model": {"family": "own", "layout": str(layout_file)}}
    data["hyperparameters"] = {"weight_decay": 0.0, "eps": 1e-8, **hyper}
    data["train"] = {"steps": STEPS, "batch_size": ROWS, "final_lr_fraction": 0.1, "grad_clip": 0.0}
    return validate(Proxy, data, "proxy")


def train(name: str, plan: Plan) -> float:
    """The validation loss after the plan's steps in a plain loop, or infinity."""
    train = plan.train
    torch.manual_seed(train.seed)
    model = MODELS[name](**plan.model.target)  # type: ignore[union-attr]
    prepared = supar_cli.prepare(model, plan)
    optimizer = prepared.optimizer()
    schedule = {key: getattr(train, key) for key in ("steps", "warmup_steps", "schedule", "final_lr_fraction")}
    for step in range(train.steps):
        prepared.set_rate(plan.hyperparameters.lr * factor(step, **schedule, decay_steps=None, decay_shape=None))
        inputs, targets = TOKENS.train.batch(train.seed, step, ROWS, CONTEXT)
        loss = nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        held_out = [TOKENS.validation.evaluation(index, 8, ROWS, CONTEXT) for index in range(8)]
        losses = [
            nn.functional.cross_entropy(model(input_ids=x).logits.flatten(0, 1), y.flatten()) for x, y in held_out
        ]
    found = float(torch.stack(losses).mean())
    return found if math.isfinite(found) else math.inf


def search(seed: int = 0) -> Iterator[dict[str, float]]:
    """Random hyperparameters of the dense proxy."""
    draws = np.random.default_rng(seed)
    for _ in range(TRIALS):
        exponents = draws.uniform([-10, -5, -1, -2], [-3, -1.5, 4, 3])
        yield dict(zip(("lr", "init_std", "alpha_input", "alpha_output"), np.exp2(exponents).tolist(), strict=True))


def measure(name: str, folder: Path) -> None:
    """Make every run that has no record: the search on the dense proxy, then the sweeps at the target's width."""
    path, layout_file = folder / f"own_sweep_{name}.jsonl", Path(tempfile.mkdtemp(), "layout.yaml")
    example = {"input_ids": TOKENS.train.batch(0, 0, 2, CONTEXT)[0]}
    sizes = {"base": {"width": BASE}, "wider": {"width": 2 * BASE}}
    found: Layout = supar_cli.layout(MODELS[name], **sizes, example=lambda _: example)
    layout_file.write_text(document.write([found.model_dump()]), encoding="utf-8")
    done = {record["run"]: record for record in read_jsonl(path, "run")}

    def run(key: str, hyper: dict[str, float], **target: Any) -> float:
        if key not in done:
            plan = supar_cli.transfer(proxy_of(layout_file, **hyper), **target)
            loss = train(name, plan)
            done[key] = {"run": key, **hyper, "loss": loss if math.isfinite(loss) else None}
            append_lines(path, json.dumps(done[key]) + "\n")
        return done[key]["loss"] or math.inf

    trials = {f"search {at}": hyper for at, hyper in enumerate(search())}
    losses = {key: run(key, hyper, width=BASE, density="1", seed=0) for key, hyper in trials.items()}
    best = trials[min(losses, key=losses.__getitem__)]
    for word, octaves in OCTAVES.items():
        for density in DENSITIES:
            for seed in SEEDS:
                for octave in octaves:
                    key = f"{word} density {density} seed {seed} lr 2^{octave}"
                    how: dict[str, Any] = {"width": TARGET, "density": density, "seed": seed, "parameterization": word}
                    run(key, {**best, "lr": 2.0**octave}, **how)


def report(folder: Path) -> dict[str, Any]:
    """Optimum (octaves) and loss by model, parameterization and density; the largest shift of the optimum."""
    found: dict[str, Any] = {}
    for name in MODELS:
        done = {record["run"]: record["loss"] for record in read_jsonl(folder / f"own_sweep_{name}.jsonl", "run")}
        for word, octaves in OCTAVES.items():
            rows = {}
            for density in DENSITIES:
                at = {(o, s): done[f"{word} density {density} seed {s} lr 2^{o}"] for o in octaves for s in SEEDS}
                means = {o: np.mean([at[o, s] for s in SEEDS]) for o in octaves if all(at[o, s] for s in SEEDS)}
                centre = min(means, key=means.__getitem__)
                near = [(float(o), s, at[o, s]) for o, s in at if abs(o - centre) <= 1 and at[o, s] is not None]
                fit = fit_quadratic(near)
                rows[density] = {"octaves": fit.octaves, "ci95": fit.half_width_octaves, "loss": means[centre]}
                rows[density] |= {"grid": dict(means), "usable": fit.usable}
            optima = [row["octaves"] for row in rows.values()]
            found[f"{name} {word}"] = {"shift_octaves": max(optima) - min(optima), "densities": rows}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[2] if len(sys.argv) > 2 else "tests/evidence")
    where.mkdir(parents=True, exist_ok=True)
    if sys.argv[1] == "report":
        print(json.dumps(report(where), indent=1))
    else:
        measure(sys.argv[1], where)
