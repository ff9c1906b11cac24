"""Replay a recorded run of the authors' model through a plan, supar's model and its optimizer, and compare the losses.

`python -m tests.reference.replay CASE.json …` prints a line a case and exits 1 when a loss is off by more than 1e-5. A case
is NAME.json beside NAME.safetensors: weights `init.*`, masks `mask.*`, `tokens` (steps · grad_accum, batch, context + 1).

The plan's numbers come from supar's rules, but for two that the authors' code has otherwise and the recordings with it: Adam's
epsilon is not divided by m_d, and gains don't decay while every matrix does with the same λ (rule `coupled`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from supar_cli.data.batches import Segment, Split, Tokens
from supar_cli.errors import SuparError
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Proxy, Target
from supar_cli.planning.transfer import transfer
from supar_cli.sparse.masks import Mask
from supar_cli.training import optimizer, prepare
from supar_cli.training.distributed import Parallel
from supar_cli.training.step import ClippedUpdate
from supar_cli.training.tasks import NextToken
from supar_cli.training.trainer import Trainer

LIMIT = 1e-5  # nats, the largest difference in a loss that float32 rounding may make over 20 steps

# What a case may say; anything else is refused rather than ignored.
KNOWN = {
    "lr_schedule": "constant",
    "activation": "gelu (erf)",
    "norm": "layernorm eps 1e-5, gain only",
    "positions": "learned",
    "bias": False,
}
READ = {
    *("n_layer", "n_head", "n_embd", "base_width", "block_size", "vocab_size", "batch_size", "grad_accum", "steps"),
    *("parameterization", "sparsity", "lr", "init_std", "alpha_input", "alpha_output", "weight_decay", "grad_clip"),
    *("betas", "eps", "tied_embeddings", "lr_by_group", "losses"),
}
RECORDED = {"grad_norms", "mean_abs_activation", "final_l2"}  # compared by nothing here

SITES = {
    "ln_1": ["attn_norm"],
    "ln_2": ["mlp_norm"],
    "attn.c_attn": ["attn.q", "attn.k", "attn.v"],
    "attn.c_proj": ["attn.o"],
    "mlp.c_fc": ["mlp.up"],
    "mlp.c_proj": ["mlp.down"],
}
OUTSIDE = {
    "transformer.wte": ["embedding"],
    "transformer.wpe": ["positions"],
    "transformer.ln_f": ["final_norm"],
    "lm_head": ["unembedding"],
}


class CaseError(Exception):
    """A case that can't be replayed."""


@dataclass
class Case:
    name: str
    numbers: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Case:
        """Raises CaseError for a case that is missing, broken or says what replay knows nothing of."""
        try:
            numbers = json.loads(path.read_text("utf-8"))
            tensors = load_file(path.with_suffix(".safetensors"))
        except (OSError, ValueError, SafetensorError) as error:
            raise CaseError(f"{path}: can't be read: {error}") from None
        absent = sorted((READ | set(KNOWN)) - set(numbers))
        strange = sorted(set(numbers) - READ - set(KNOWN) - RECORDED)
        other = [f"{key} {numbers[key]!r}" for key in KNOWN if key in numbers and numbers[key] != KNOWN[key]]
        if absent or strange or other:
            raise CaseError(f"{path}: missing {absent}, unknown {strange}, not replayed {other}")
        return cls(path.stem, numbers, tensors)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under `init.` or `mask.` by the plan's names; the rows of `c_attn` are q, then k, then v."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if name.startswith(prefix):
                names = plan_names(name.removeprefix(prefix).removesuffix(".weight"))
                found.update(zip(names, tensor.chunk(len(names)), strict=True))
        return found


def plan_names(name: str) -> list[str]:
    """The plan's names of a recorded module. Raises CaseError for one that no model of ours has."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    block, _, site = name.removeprefix("transformer.h.").partition(".")
    if not block.isdigit() or site not in SITES:
        raise CaseError(f"{name}: an unknown module")
    return [f"blocks.{block}.{part}" for part in SITES[site]]


def plan_of(case: Case) -> Plan:
    """The plan of a case. Raises CaseError where its rates and decays are not the recorded ones."""
    n = case.numbers
    batch_size = n["batch_size"] * n["grad_accum"]
    proxy = Proxy.model_validate(
        {
            "kind": "supar.proxy/v1",
            "model": {
                "family": "gpt2",
                "width": n["base_width"],
                "layers": n["n_layer"],
                "heads": 1,  # how many heads the proxy has enters no rule
                "context": n["block_size"],
                "vocab": n["vocab_size"],
                "tied": n["tied_embeddings"],
                "norm_eps": 1e-5,
            },
            "hyperparameters": {
                key: n[key] for key in ("lr", "init_std", "alpha_input", "alpha_output", "weight_decay", "eps")
            },
            "parameterization": {"weight_decay_rule": "coupled"},
            "data": {"source": case.name, "hash": "sha256:recorded"},
            "train": {
                "steps": n["steps"],
                "batch_size": batch_size,
                "betas": n["betas"],
                "schedule": "constant",
                "warmup_fraction": 0.0,
                "grad_clip": float(n["grad_clip"]),
            },
            "run": {"device": "cpu", "precision": "float32", "micro_batch_size": n["batch_size"]},
        }
    )
    sparsity = {"sparsity": n["sparsity"], "pattern": "bernoulli"}
    target = Target.model_validate({"width": n["n_embd"], "heads": n["n_head"], "sparsity": sparsity})
    plan = transfer(proxy, target, n["parameterization"], allow_low_wpn=True)
    plan = plan.model_copy(
        update={"tensors": [row.model_copy(update={"eps": n["eps"]}) for row in plan.tensors]}  # see the module's head
    )
    require_same_rates(case, plan)
    return plan


def require_same_rates(case: Case, plan: Plan) -> None:
    """Raise CaseError unless learning rates and decays of all recorded tensors are the plan's."""
    rows = {row.name: row for row in plan.tensors}
    modules = [key.removeprefix("init.").removesuffix(".weight") for key in case.tensors if key.startswith("init.")]
    planned = sorted((rows[plan_names(name)[0]].lr, rows[plan_names(name)[0]].weight_decay) for name in modules)
    recorded = sorted((g["lr"], g["weight_decay"]) for g in case.numbers["lr_by_group"] for _ in range(g["tensors"]))
    same = len(planned) == len(recorded) and all(
        abs(a - b) <= 1e-9 * b
        for one, other in zip(planned, recorded, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    if not same:
        raise CaseError(f"{case.name}: (lr, weight decay) recorded {recorded}, planned {planned}")


class Recorded(NextToken):
    """The recorded batches of tokens."""

    def __init__(self, case: Case, plan: Plan) -> None:
        n, tokens = case.numbers, case.tensors["tokens"].long()
        stream = Split([Segment(case.name, tokens.flatten().numpy())], n["vocab_size"])
        super().__init__(plan, Tokens(stream, stream, "sha256:recorded"))
        self.recorded = tokens.view(n["steps"], n["grad_accum"] * n["batch_size"], n["block_size"] + 1)

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        return self.recorded[step, rows, :-1], self.recorded[step, rows, 1:]


class Replay(Trainer):
    """The trainer on recorded weights, masks and batches."""

    def __init__(self, case: Case, plan: Plan) -> None:
        super().__init__(plan, Recorded(case, plan))
        weights, masks = case.named("init."), case.named("mask.")
        if set(weights) != set(self.sparse_model.tensors):
            raise CaseError(
                f"{case.name}: weights of {sorted(set(weights) ^ set(self.sparse_model.tensors))} don't match"
            )

        values = {name: weight[masks[name].bool()] if name in masks else weight for name, weight in weights.items()}
        drawn = {name: Mask.of(mask.bool().numpy()) for name, mask in masks.items()}
        self.sparse_model = prepare.prepare(plan, self.runtime.device, masks=drawn, values=values)
        self.parallel = Parallel("alone", self.sparse_model.model, self.runtime.device, False, self.ranks)
        self.model = self.parallel.model
        self.optimizer = optimizer.build(plan, self.sparse_model.tensors)
        self.update = ClippedUpdate(self.optimizer, plan.train.grad_clip)


def differences(case: Case, plan: Plan) -> list[float]:
    """Absolute differences of every step's loss, nats per token."""
    replay = Replay(case, plan)
    return [abs(replay.step()[0] - recorded) for recorded in case.numbers["losses"]]


def main(paths: list[str]) -> int:
    """Exit status: 0 when all losses agree, 1 when one does not, 2 when a case can't be replayed."""
    if not paths:
        sys.stderr.write("usage: python -m tests.reference.replay CASE.json …\n")
        return 2
    torch.set_num_threads(1)  # threads of so small a model do little but wait for each other
    status = 0
    for path in paths:
        try:
            case = Case.read(Path(path))
            found = differences(case, plan_of(case))
        except (CaseError, SuparError, KeyError) as error:
            sys.stderr.write(f"error: {path}: {error}\n")
            status = 2
            continue
        sound = all(difference <= LIMIT for difference in found)  # false for a loss that is not a number
        print(f"{case.name}: largest difference in loss {max(found):.3g} over {len(found)} steps")
        status = max(status, 0 if sound else 1)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
