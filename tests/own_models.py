"""Small models that supar did not make, and plans of them with rows written by hand, for tests of `prepare`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import supar_cli as supar
from supar_cli.own.prepared import Prepared
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.updates import Updates, resolve

VOCAB, WIDTH, TOKENS = 48, 32, 8
METHODS, STEPS = ("set", "rigl", "gmp", "topk"), 12  # of plans whose masks move
Change = Callable[[dict[str, Any]], dict[str, Any]]


class Block(nn.Module):
    """Pre-norm mixing of all earlier tokens, then a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Small(nn.Module):
    """A decoder of one's own: tokens (B, T) → logits (B, T, V). `scale` multiplies the logits."""

    def __init__(self, width: int = WIDTH, layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.last_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.table.weight
        self.table_scale = self.scale = 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) * self.table_scale
        for block in self.blocks:
            x = block(x)
        return F.linear(self.last_norm(x), self.head.weight) * self.scale + (
            0 if self.head.bias is None else self.head.bias
        )


def make(seed: int = 0, **shape: Any) -> Small:
    """A model with its constructor's values, the same for the same seed."""
    torch.manual_seed(seed)
    return Small(**shape)


def rows_of(model: nn.Module, density: float = 0.25) -> list[dict[str, Any]]:
    """A row for each parameter, as a plan of a layout would have it, rates halved and ε moved for hidden weights."""
    owners = dict(model.named_modules())
    rows = []
    for name, tensor in model.named_parameters():
        owner = owners[name.rpartition(".")[0]]
        is_weight = isinstance(owner, nn.Linear) and name.endswith("weight")
        is_hidden = is_weight and "head" not in name
        role = "hidden" if is_hidden else "unembedding" if is_weight else "embedding"
        role = role if isinstance(owner, nn.Linear | nn.Embedding) else "norm"
        role = "bias" if name.endswith("bias") else role
        shape, live = list(tensor.shape), density if is_hidden else 1.0
        start = {"bias": 0.0, "norm": 1.0}.get(role)
        fan_in = shape[1] if is_weight else 1
        numbers: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1 if start is None else 0.0, "eps": 1e-8}
        if is_hidden:
            numbers |= {"lr": 0.005, "weight_decay": 0.2, "eps": 5e-9}
        row = {"name": name, "role": role, "site": name, "shape": shape, "fan_in_axes": [1] if is_weight else []}
        row |= {"fan_in": fan_in, "base_fan_in": fan_in, "density": live, "kept": round(live * tensor.numel())}
        row |= {"init_std": 0.08} if start is None else {"init_constant": start}
        rows.append({**row, **numbers, "because": {"m_d": 1.0, **({"m_rho": live} if is_hidden else {})}})
    return rows


def plan_of(
    module: nn.Module, /, density: float = 0.25, change: Change = lambda row: row, **sections: dict[str, Any]
) -> Plan:
    """The plan of a model; `change` edits each row, and sections are merged into those of the plan."""
    hyper = {"lr": 0.01, "init_std": 0.08, "alpha_input": 1.0, "alpha_output": 1.0, "weight_decay": 0.1}
    data: dict[str, Any] = {
        "kind": "supar.plan/v2",
        "model": {"family": "own", "layout": "sha256:0", "factory": "m:make", "base": {"w": 8}, "target": {"w": 32}},
        "parameterization": {"name": "supar", "base": {"steps": 10, "batch_size": 4}, "edition": 2},
        "hyperparameters": hyper,
        "sparsity": {"density": density, "sparsity": 1 - density, "pattern": "exact", "distribution": "uniform"},
        "tensors": [change(row) for row in rows_of(module, density)],
        "data": {"source": "theirs", "hash": "sha256:1"},
        "train": {"steps": 10, "batch_size": 4, "warmup_steps": 1},
    }
    for name, section in sections.items():
        data[name] = {**data[name], **section}
    return parse(Plan, document.Document(data, "plan.yaml"))


def updates(method: str, **keys: Any) -> dict[str, Any]:
    """Updates that change masks in every second step, or in each one for top-k, of which no default is asked for."""
    exponent = 0.9 if method == "rigl" else 1.0
    given = {"every_steps": 1 if method == "topk" else 2, "min_per_neuron": 0, "end": 0.9, **keys}
    return {"method": method, "exponent": exponent, **given}


def moving_plan(method: str = "rigl", **changes: Any) -> Plan:
    """The plan of `Small` with updates after steps 2, 4, …, 10 of 12, for top-k after each."""
    train, given = {"steps": STEPS, **changes.pop("train", {})}, updates(method)
    resolved = resolve(Updates(**given), given["exponent"], STEPS).model_dump()
    return plan_of(make(), sparsity={"updates": resolved}, train=train, **changes)


def batch(step: int, rows: int = 4) -> Tensor:
    """Tokens (rows, T + 1) of a step."""
    return torch.randint(0, VOCAB, (rows, TOKENS + 1), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3, first: int = 0) -> list[float]:
    """Losses of a plain training loop."""
    found = []
    for step in range(first, first + count):
        loss = loss_of(model, batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def prepared(model: nn.Module | None = None, **plan: Any) -> Prepared:
    """A model, by default `make()`, prepared by its plan."""
    model = make() if model is None else model
    return supar.prepare(model, plan_of(model, **plan))
