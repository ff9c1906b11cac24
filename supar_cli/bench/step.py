"""Side-by-side timing of a masked training step and the same step of a plain PyTorch GPT, dense or masked as peers do."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_cli.data.batches import Segment, Split, Tokens
from supar_cli.planning.plan import Plan, PlanModel
from supar_cli.training.prepare import SparseModel
from supar_cli.training.runtime import Runtime
from supar_cli.training.tasks import NextToken
from supar_cli.training.trainer import Trainer


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is stored dense and multiplied with its mask (out, in) in every forward pass."""

    mask: Tensor

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__(d_in, d_out, bias)
        self.register_buffer("mask", torch.ones(d_out, d_in, dtype=torch.bool))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


class PlainBlock(nn.Module):
    """A GPT-2 block as usually written: fused q/k/v, SDPA, nn.Linear."""

    def __init__(self, config: PlanModel, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(config.width, bias=False) for _ in range(2))
        self.qkv = linear(config.width, 3 * config.width, bias=False)
        self.o = linear(config.width, config.width, bias=False)
        self.up = linear(config.width, config.ffn_width, bias=False)
        self.down = linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        parts = self.qkv(self.norm_1(x_BTD)).split(D, dim=2)
        q, k, v = (part.view(B, T, self.heads, D // self.heads).transpose(1, 2) for part in parts)
        mixed_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.o(mixed_BHTE.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))  # type: ignore[no-any-return]


class PlainGPT(nn.Module):
    """A GPT-2 of the plan's shape that knows nothing of supar; `linear` is the class of its hidden layers."""

    def __init__(self, config: PlanModel, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(PlainBlock(config, linear) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        return F.linear(self.norm(self.blocks(x_BTD)), self.embedding.weight)


@torch.no_grad()
def masked_dense(sparse_model: SparseModel, config: PlanModel) -> PlainGPT:
    """The plain model with the masks of ours and its present weights; of the gpt2 family, tied and without biases."""
    plain = PlainGPT(config, MaskedLinear)

    def copy(layer: nn.Module, *names: str) -> None:
        weights = [sparse_model.weight(name) for name in names]
        layer.get_parameter("weight").copy_(torch.cat(weights))
        if isinstance(layer, MaskedLinear):
            masked = [sparse_model.masks.get(name) for name in names]
            alive = [
                np.ones(tuple(w.shape), np.bool_) if m is None else m.alive()
                for m, w in zip(masked, weights, strict=True)
            ]
            layer.mask.copy_(torch.from_numpy(np.concatenate(alive)))

    copy(plain.embedding, "embedding")
    copy(plain.positions, "positions")
    copy(plain.norm, "final_norm")
    for number, block in enumerate(plain.blocks):
        of = f"blocks.{number}."
        assert isinstance(block, PlainBlock)
        copy(block.norm_1, of + "attn_norm")
        copy(block.norm_2, of + "mlp_norm")
        copy(block.qkv, of + "attn.q", of + "attn.k", of + "attn.v")
        copy(block.o, of + "attn.o")
        copy(block.up, of + "mlp.up")
        copy(block.down, of + "mlp.down")
    return plain


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians of interleaved steps in seconds: ours, of the plain dense model, and of the plain masked one.

    `ratio` is the median over rounds of ours ÷ dense, `masked_dense_ratio` of masked dense ÷ ours, each with quartiles.
    `engines` counts our masked tensors by engine.
    """

    masked_s: float
    dense_s: float
    ratio: float
    quartiles: tuple[float, float]
    steps: int
    masked_dense_s: float
    masked_dense_ratio: float
    masked_dense_quartiles: tuple[float, float]
    engines: dict[str, int]

    def fields(self) -> dict[str, Any]:
        """The comparison as a document has it, times in milliseconds."""
        return {
            "steps": self.steps,
            "masked_ms": round(1000 * self.masked_s, 3),
            "dense_ms": round(1000 * self.dense_s, 3),
            "ratio": round(self.ratio, 4),
            "ratio_quartiles": [round(value, 4) for value in self.quartiles],
            "masked_dense_ms": round(1000 * self.masked_dense_s, 3),
            "masked_dense_ratio": round(self.masked_dense_ratio, 4),
            "masked_dense_ratio_quartiles": [round(value, 4) for value in self.masked_dense_quartiles],
            "engines": self.engines,
        }


def random_task(plan: Plan) -> NextToken:
    """The task on uniform tokens: what they are changes no step's time."""
    train = Split(
        [Segment("random", np.random.default_rng(0).integers(0, plan.decoder.vocab, 1_000_000, np.uint16))],
        plan.decoder.vocab,
    )
    return NextToken(plan, Tokens(train, train, "sha256:random"))


def plain_step(trainer: Trainer, plain: PlainGPT) -> Callable[[], float]:
    """A step of a plain model: the trainer's batches, precision and compile setting, clipping and fused AdamW."""
    runtime = trainer.runtime
    plain = plain.to(runtime.device)
    model: nn.Module = torch.compile(plain) if runtime.compiles else plain  # type: ignore[assignment]
    decayed = [parameter for parameter in plain.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in plain.parameters() if parameter.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    done = 0

    def step() -> float:
        nonlocal done
        inputs, targets = (tensor.to(runtime.device, non_blocking=True) for tensor in trainer.batch(done))
        done += 1
        with runtime.autocast():
            loss = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def compare(plan: Plan, steps: int, warmup: int = 3) -> Comparison:
    """Time `steps` rounds of a step each, their order alternating. The plan is of the gpt2 family, without biases."""
    trainer = Trainer(plan, random_task(plan))
    plain, masked = PlainGPT(plan.decoder), masked_dense(trainer.sparse_model, plan.decoder)
    runs: list[Callable[[], object]] = [trainer.step, plain_step(trainer, plain), plain_step(trainer, masked)]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(warmup + steps):
        for which in range(len(runs)) if turn % 2 else reversed(range(len(runs))):
            seconds = _timed(runs[which], trainer.runtime)
            if turn >= warmup:
                times[which].append(seconds)
    ours, dense, peer = times
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, dense, strict=True)], n=4)
    peer_low, peer_middle, peer_high = statistics.quantiles([a / b for a, b in zip(peer, ours, strict=True)], n=4)
    return Comparison(
        masked_s=statistics.median(ours),
        dense_s=statistics.median(dense),
        ratio=middle,
        quartiles=(low, high),
        steps=steps,
        masked_dense_s=statistics.median(peer),
        masked_dense_ratio=peer_middle,
        masked_dense_quartiles=(peer_low, peer_high),
        engines=dict(Counter(choice.name for choice in trainer.engines.choices.values())),
    )


def _timed(run: Callable[[], object], runtime: Runtime) -> float:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    started = time.perf_counter()
    run()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    return time.perf_counter() - started
