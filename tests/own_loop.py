"""A small model that supar did not make, its plan by hand, and a training run of it that counts its steps."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import supar_cli as supar
from supar_cli.planning.document import Document
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse

from .test_layout import own_plan

VOCAB, WIDTH, INNER, LR = 16, 8, 32, 2.0**-6


class Net(nn.Module):
    """Tokens, one residual branch of two hidden weights, a norm that only the head reads, an untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def row(name: str, role: str, shape: list[int], times: float, **keys: Any) -> dict[str, Any]:
    """A row whose rate is `times` the tuned one."""
    axes = [1] if role in ("hidden", "unembedding") else []
    fan_in = prod(shape[axis] for axis in axes)
    start = (
        {"init_constant": 1.0} if role == "norm" else {"init_constant": 0.0} if role == "bias" else {"init_std": 0.1}
    )
    places = {"site": name.rpartition(".")[0], "fan_in_axes": axes, "fan_in": fan_in, "base_fan_in": fan_in}
    numbers = {"density": 1.0, "kept": prod(shape), "lr": LR * times, "weight_decay": 0.0, "eps": 1e-8, "because": {}}
    return {"name": name, "role": role, "shape": shape, **places, **start, **numbers, **keys}


def rows(fold: float = 0.25) -> list[dict[str, Any]]:
    sparse = {"density": 0.25, "kept": INNER * WIDTH // 4}
    return [
        row("tokens.weight", "embedding", [VOCAB, WIDTH], 1.0),
        row("up.weight", "hidden", [INNER, WIDTH], 1.0, **sparse, weight_decay=0.125),
        row("up.bias", "bias", [INNER], 1.0),
        row("down.weight", "hidden", [WIDTH, INNER], 0.25, **sparse, weight_decay=0.5),
        row("down.bias", "bias", [WIDTH], 1.0),
        row("norm.weight", "norm", [WIDTH], 1.0),
        row("norm.bias", "bias", [WIDTH], 1.0),
        row("head.weight", "unembedding", [VOCAB, WIDTH], fold, eps=1e-8 / fold, fold=fold),
    ]


def plan_of(tensors: list[dict[str, Any]] | None = None, **changes: Any) -> Plan:
    """The plan of `Net`; `changes` replace sections."""
    tuned = {**own_plan()["hyperparameters"], "lr": LR}
    data = own_plan(tensors=tensors or rows(), hyperparameters=tuned, **changes)
    return parse(Plan, Document(data, "plan.yaml"))


def batch(step: int) -> torch.Tensor:
    return torch.randint(VOCAB, (4, 8), generator=torch.Generator().manual_seed(step))


class Training:
    """A run of a prepared `Net`: `step` makes one and counts it when it is done."""

    def __init__(self, plan: Plan | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Net()
        self.prepared = supar.prepare(self.model, plan or plan_of())
        self.optimizer = self.prepared.optimizer(**options)
        self.steps = 0

    def loss(self, model: nn.Module | None = None) -> torch.Tensor:
        ids = batch(self.steps)
        return F.cross_entropy((model or self.model)(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss.item()

    def rates(self) -> list[float]:
        """The tuned rate that each group's rate says: equal ones where the plan's proportions hold."""
        return [group["lr"] / group["ratio"] for group in self.optimizer.param_groups]
