"""Measure the check of users' models on stock Hugging Face ones, and what it sees of planted faults; asserts nothing.

    python -m tests.measure_own_check TEXT FOLDER [WHAT …]      # WHAT: models and faults, by default all

TEXT is a file of text, whose bytes are the tokens; FOLDER keeps all records, so that a second call goes on. The results go to
tests/evidence/own_check.jsonl, a line for each check: half an hour on a core.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import supar_cli as supar
from supar_cli.experiments import check_plans, own_coordinates
from supar_cli.experiments.coordinate_bounds import judge
from supar_cli.experiments.coordinates import why_too_hot
from supar_cli.files import Record
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.planning.plan_sections import PlanTensor
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy

sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # PyPI's does not import beside a CPU build of torch
EVIDENCE = Path(__file__).parent / "evidence" / "own_check.jsonl"
BASE, VOCAB, CONTEXT, ROWS = 64, 256, 64, 8  # 512 tokens a batch
WIDTHS, DENSITIES = [64, 128, 256, 512], [1.0, 0.5, 0.25, 0.125, 0.0625]
TUNED = {"lr": 2**-8, "init_std": 0.08, "alpha_input": 2.0, "alpha_output": 1.0, "weight_decay": 0.0}
SEEDS = 4


def llama(width: int, tied: bool = False, heads: int = 0) -> torch.nn.Module:
    """Stock Llama with half as many heads for keys and values; `heads` of 0: a head width of 16."""
    import transformers as hf

    heads = heads or width // 16
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": heads}
    shape |= {"num_key_value_heads": heads // 2, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**shape, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None))


def llama_tied(width: int) -> torch.nn.Module:
    return llama(width, tied=True)


def llama_moving_heads(width: int) -> torch.nn.Module:
    """As many heads at every width, so their width moves under the model's own 1/√d."""
    return llama(width, heads=4)


def gpt2(width: int) -> torch.nn.Module:
    import transformers as hf

    shape = {"n_embd": width, "n_layer": 2, "n_head": width // 16, "vocab_size": VOCAB, "n_positions": CONTEXT}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**shape, **dropout, bos_token_id=None, eos_token_id=None))


def batches(seed: int, step: int) -> dict[str, torch.Tensor]:
    text = np.frombuffer(Path(os.environ["OWN_CHECK_TEXT"]).read_bytes(), np.uint8).astype(np.int64)
    starts = np.random.default_rng([seed, step]).integers(0, len(text) - CONTEXT, ROWS)
    tokens = torch.from_numpy(np.stack([text[start : start + CONTEXT] for start in starts]))
    return {"input_ids": tokens, "labels": tokens}


def proxy_of(make: Callable[..., torch.nn.Module], folder: Path, lr: float) -> Proxy:
    """The proxy of a model, its layout written beside the records."""
    sizes = {"base": {"width": BASE}, "wider": {"width": 2 * BASE}, "third": {"width": 3 * BASE}}
    layout = supar.layout(make, **sizes, example=lambda _: {"input_ids": batches(0, 0)["input_ids"]})
    path = folder / f"{make.__name__}.layout.yaml"
    path.write_text(document.write([layout.model_dump()]))
    model = {"family": "own", "layout": str(path), "factory": f"tests.measure_own_check:{make.__name__}"}
    train = {"steps": 10, "batch_size": ROWS}
    fields = {"kind": "supar.proxy/v1", "model": model, "hyperparameters": {**TUNED, "lr": lr}, "train": train}
    return validate(Proxy, fields, "proxy")


def whole_check(make: Callable[..., torch.nn.Module], folder: Path) -> Record:
    """The check as the command makes it: over density at width x4, over width, and its controls."""
    where = {"out": folder / make.__name__, "jobs": 1}
    functions = {"batches": "tests.measure_own_check:batches"}
    proxy = proxy_of(make, folder, TUNED["lr"])
    found = supar.check(proxy, width=WIDTHS, density=DENSITIES, seeds=SEEDS, **functions, **where)
    tables = [{key: table[key] for key in ("title", "columns", "rows")} for table in found["tables"]]
    return {"verdicts": found["verdicts"], "tables": tables, "notes": found["notes"], "lr_factor": found["lr_factor"]}


def one_sweep(
    make: Callable[..., torch.nn.Module], folder: Path, fault: Callable[[PlanTensor], PlanTensor], lr: float = 2**-8
) -> Record:
    """The sweep over width alone, dense, with a fault in every plan's rows."""
    proxy, own = check_plans.with_layout(proxy_of(make, folder, lr), None)
    assert own is not None
    code = own_coordinates.own_code(own, make, batches, None)
    assert code is not None
    sweep = check_plans.sweeps_of(proxy, widths=WIDTHS, densities=[1.0], seeds=SEEDS, own=own)[0]

    def planted(plan: Plan) -> Plan:
        return plan.model_copy(update={"tensors": [fault(row) for row in plan.tensors]})

    sweep.plans = [[planted(plan) for plan in plans] for plans in sweep.plans]
    by_run = {plan.hash(): own_coordinates.measure(plan, code) for plans in sweep.plans for plan in plans}
    result = judge(sweep, by_run)
    too_hot = why_too_hot([by_run[plan.hash()] for plan in sweep.base])
    exceeded = [finding.text for finding in result.violations]
    table = {"title": result.table.title, "columns": result.table.columns, "rows": result.table.rows}
    return {"too_hot": too_hot, "passed": result.passed, "exceeded": exceeded, "tables": [table]}


def forgotten(role: str, key: str, row: PlanTensor) -> PlanTensor:
    """A row of a role without its fold in one of its numbers."""
    value = getattr(row, key)
    is_meant = row.role == role and row.fold is not None and value is not None
    return row.model_copy(update={key: value / row.fold}) if is_meant else row


CHECKS: dict[str, Callable[[Path], Record]] = {
    "llama": partial(whole_check, llama),
    "llama_tied": partial(whole_check, llama_tied),
    "gpt2": partial(whole_check, gpt2),
    "a moving head width": lambda folder: one_sweep(llama_moving_heads, folder, lambda row: row),
    "llama: the head's fold forgotten in init": lambda folder: one_sweep(
        llama, folder, partial(forgotten, "unembedding", "init_std")
    ),
    "llama: the head's fold forgotten in rate": lambda folder: one_sweep(
        llama, folder, partial(forgotten, "unembedding", "lr")
    ),
    "llama_tied: the head's fold forgotten in init": lambda folder: one_sweep(
        llama_tied, folder, partial(forgotten, "norm", "init_constant")
    ),
    "llama_tied: the head's fold forgotten in rate": lambda folder: one_sweep(
        llama_tied, folder, partial(forgotten, "norm", "lr")
    ),
    "gpt2: the head's fold forgotten in init": lambda folder: one_sweep(
        gpt2, folder, partial(forgotten, "norm", "init_constant")
    ),
    "gpt2: the head's fold forgotten in rate": lambda folder: one_sweep(gpt2, folder, partial(forgotten, "norm", "lr")),
    "llama: a rate that is too hot": lambda folder: one_sweep(llama, folder, lambda row: row, lr=2**-4),
}


def run(folder: Path, names: list[str]) -> Iterator[Record]:
    for name in names:
        began_s = time.monotonic()
        found = CHECKS[name](folder)
        yield {"check": name, **found, "seconds": round(time.monotonic() - began_s)}


def main(text: str, folder: str, *names: str) -> None:
    os.environ["OWN_CHECK_TEXT"] = text
    Path(folder).mkdir(parents=True, exist_ok=True)
    lines = EVIDENCE.read_text("utf-8").splitlines() if EVIDENCE.exists() else []
    records: dict[str, Any] = {record["check"]: record for record in map(json.loads, lines)}
    for record in run(Path(folder), list(names) or list(CHECKS)):
        records[record["check"]] = record
        ordered = [records[name] for name in CHECKS if name in records]
        EVIDENCE.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in ordered), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
