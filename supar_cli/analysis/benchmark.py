"""Side-by-side timing of a masked training step and the same step of a plain dense PyTorch GPT."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_cli.planning.plan import Plan, PlanModel
from supar_cli.training.data import Segment, Split, Tokens
from supar_cli.training.trainer import Setup, Trainer


class PlainBlock(nn.Module):
    """A GPT-2 block as usually written: fused q/k/v, SDPA, nn.Linear."""

    def __init__(self, config: PlanModel) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(config.width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.o = nn.Linear(config.width, config.width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        parts = self.qkv(self.norm_1(x_BTD)).split(D, dim=2)
        q, k, v = (part.view(B, T, self.heads, D // self.heads).transpose(1, 2) for part in parts)
        mixed_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.o(mixed_BHTE.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))  # type: ignore[no-any-return]


class PlainGPT(nn.Module):
    """A dense GPT-2 of the plan's shape that knows nothing of supar."""

    def __init__(self, config: PlanModel) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(PlainBlock(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        return F.linear(self.norm(self.blocks(x_BTD)), self.embedding.weight)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians of interleaved steps in seconds. `ratio` is the median of the pairs' ratios, with its quartiles."""

    masked_s: float
    dense_s: float
    ratio: float
    quartiles: tuple[float, float]
    steps: int


def random_tokens(plan: Plan) -> Tokens:
    """Uniform tokens: what they are changes no step's time."""
    train = Split(
        [Segment("random", np.random.default_rng(0).integers(0, plan.model.vocab, 1_000_000, np.uint16))],
        plan.model.vocab,
    )
    return Tokens(train, train, "sha256:random")


def plain_step(trainer: Trainer) -> Callable[[], float]:
    """A step of the plain model: the trainer's batches, precision and compile setting, clipping and fused AdamW."""
    setup, plan = trainer.setup, trainer.plan
    plain = PlainGPT(plan.model).to(setup.device)
    model: nn.Module = torch.compile(plain) if setup.compiles else plain  # type: ignore[assignment]
    decayed = [parameter for parameter in plain.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in plain.parameters() if parameter.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    done = 0

    def step() -> float:
        nonlocal done
        inputs, targets = (tensor.to(setup.device, non_blocking=True) for tensor in trainer.batch(done))
        done += 1
        with setup.autocast():
            loss = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def compare(plan: Plan, steps: int, warmup: int = 3) -> Comparison:
    """Time `steps` pairs of steps, the order within a pair alternating. The plan is of the gpt2 family, without biases."""
    trainer = Trainer(plan, random_tokens(plan))
    runs: list[Callable[[], object]] = [trainer.step, plain_step(trainer)]
    times: list[list[float]] = [[], []]
    for pair in range(warmup + steps):
        for which in (0, 1) if pair % 2 else (1, 0):
            seconds = _timed(runs[which], trainer.setup)
            if pair >= warmup:
                times[which].append(seconds)
    ratios = [masked / dense for masked, dense in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Comparison(statistics.median(times[0]), statistics.median(times[1]), middle, (low, high), steps)


def _timed(run: Callable[[], object], setup: Setup) -> float:
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)
    started = time.perf_counter()
    run()
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)
    return time.perf_counter() - started
