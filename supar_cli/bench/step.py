"""Side-by-side timing of a masked training step and the same step of a plain PyTorch GPT, dense or masked as peers do."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_cli.bench.layer import WholeWeight
from supar_cli.bench.results import Benchmark, Document, Reading, machine_settings
from supar_cli.planning.plan import Plan, PlanModel
from supar_cli.reporting.result import Table
from supar_cli.sparse.autotune import interleave
from supar_cli.sparse.linear import Linear
from supar_cli.training.prepare import SparseModel
from supar_cli.training.runtime import Runtime
from supar_cli.training.tasks import Batch, BatchLoader, NextToken
from supar_cli.training.trainer import Trainer

WARMUP = 3  # chosen: the first steps allocate, compile and touch memory
SHAPE = ("family", "width", "layers", "heads", "context", "vocab")


class PlainBlock(nn.Module):
    """A GPT-2 block as usually written: fused q/k/v, SDPA, and linear layers of one dense weight each."""

    def __init__(self, config: PlanModel) -> None:
        super().__init__()
        self.heads, width, inner = config.heads, config.width, config.ffn_width
        self.attn_norm, self.mlp_norm = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": Linear(width, 3 * width, bias=False), "o": Linear(width, width, bias=False)})
        self.mlp = nn.ModuleDict({"up": Linear(width, inner, bias=False), "down": Linear(inner, width, bias=False)})

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        parts = self.attn["qkv"](self.attn_norm(x_BTD)).split(D, dim=2)
        q, k, v = (part.view(B, T, self.heads, D // self.heads).transpose(1, 2) for part in parts)
        mixed_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.attn["o"](mixed_BHTE.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.mlp["down"](F.gelu(self.mlp["up"](self.mlp_norm(x_BTD))))  # type: ignore[no-any-return]


class PlainGPT(nn.Module):
    """A GPT-2 of the plan's shape, its layers named as in the plan."""

    def __init__(self, config: PlanModel) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(PlainBlock(config) for _ in range(config.layers)))
        self.final_norm = nn.LayerNorm(config.width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        return F.linear(self.final_norm(self.blocks(x_BTD)), self.embedding.weight)


@torch.no_grad()
def masked_dense(sparse_model: SparseModel, config: PlanModel) -> PlainGPT:
    """The plain model with the current weights of supar's model, multiplied by their masks in every forward pass.

    It is of the gpt2 family, tied and without biases.
    """
    plain = PlainGPT(config)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Linear | nn.Embedding | nn.LayerNorm):
            parts = [name.replace("qkv", letter) for letter in "qkv"] if name.endswith("qkv") else [name]
            module.weight.copy_(torch.cat([sparse_model.weight(part) for part in parts]))
            if isinstance(module, Linear):
                module.engine = WholeWeight(module.weight != 0)  # normally distributed, so no live weight is zero
    return plain


class RandomTokens(NextToken):
    """Next-token prediction on uniformly random tokens; their values do not change the time of a step."""

    def __init__(self, plan: Plan) -> None:
        config, train = plan.decoder, plan.train
        self._shape, self._vocab = (train.batch_size, config.context + 1), config.vocab
        self.units_per_row, self.flops_per_unit, self.hash = config.context, plan.flops_per_token, "sha256:random"
        self.held_out_rows = train.eval_batches * train.batch_size

    def batch(self, step: int, rows: slice) -> Batch:
        random = torch.Generator().manual_seed(step)
        windows = torch.randint(self._vocab, self._shape, generator=random)[rows]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def plain_step(trainer: Trainer, plain: PlainGPT) -> Callable[[], float]:
    """A step of a plain model: the trainer's batches, precision and compile setting, clipping and fused AdamW."""
    runtime = trainer.runtime
    plain = plain.to(runtime.device)
    model: nn.Module = torch.compile(plain) if runtime.compiles else plain  # type: ignore[assignment]
    decayed = [parameter for parameter in plain.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in plain.parameters() if parameter.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    # a loader of its own: with the trainer's, only one of the arms would find the batch that was made ahead
    batch, steps = BatchLoader(trainer.task, runtime, trainer.ranks).get, itertools.count()

    def step() -> float:
        inputs, targets = runtime.to_device(batch(next(steps)))
        with runtime.autocast():
            loss = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())
        runtime.backward(loss)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def benchmark(plan: Plan, rounds: int) -> Benchmark:
    """The benchmark of a plan's step. The plan is of the gpt2 family, without biases."""
    runtime, sparsity = Runtime.of(plan), plan.sparsity
    settings: Document = {
        "shape": {name: getattr(plan.model, name) for name in SHAPE},
        "batch_size": plan.train.batch_size,
        "sparsity": sparsity.sparsity,
        "density": sparsity.density,
        "block": sparsity.block,
        "engine": plan.run.engine,
        **machine_settings(runtime.device, runtime.precision_name),
        "compiled": runtime.compiles,
    }
    return Benchmark("step", settings, runtime.device, lambda: measure(plan, rounds), tables, readings)


def measure(plan: Plan, rounds: int) -> Document:
    """Medians of a step in milliseconds, ours over dense and masked dense over ours, and our tensors by engine."""
    trainer = Trainer(plan, RandomTokens(plan))
    plain, masked = PlainGPT(plan.decoder), masked_dense(trainer.sparse_model, plan.decoder)
    steps: dict[str, Callable[[], object]] = {
        "masked": trainer.step,
        "dense": plain_step(trainer, plain),
        "masked_dense": plain_step(trainer, masked),
    }
    seconds = interleave(steps, rounds, trainer.runtime.device, WARMUP)
    ms = {name: round(1000 * statistics.median(spent), 3) for name, spent in seconds.items()}
    return {
        "steps": rounds,
        "masked_ms": ms["masked"],
        "dense_ms": ms["dense"],
        **Reading.ratio(seconds["masked"], seconds["dense"]).fields("ratio"),
        "masked_dense_ms": ms["masked_dense"],
        **Reading.ratio(seconds["masked_dense"], seconds["masked"]).fields("masked_dense_ratio"),
        "engines": dict(Counter(choice.name for choice in trainer.engines.choices.values())),
    }


def tables(document: Document) -> list[Table]:
    dense, masked_dense = (Reading.read(document, name).cells() for name in ("ratio", "masked_dense_ratio"))
    rows = [
        ["masked (supar)", f"{document['masked_ms']:.1f}", "", "", ""],
        ["plain dense", f"{document['dense_ms']:.1f}", "supar ÷ plain dense", *dense],
        ["plain masked dense", f"{document['masked_dense_ms']:.1f}", "plain masked ÷ supar", *masked_dense],
    ]
    engines = ", ".join(f"{name} {count}" for name, count in sorted(document["engines"].items())) or "none"
    title = (
        f"a training step at density {document['density']:g}, {document['precision']}, {document['steps']} rounds\n"
        f"masked tensors by engine: {engines}\n"
        "plain: a GPT without supar; masked: `weight * mask` in each step"
    )
    return [Table(title=title, columns=["step", "ms", "ratio", "median", "quartiles"], rows=rows)]


def readings(document: Document) -> dict[str, Reading]:
    """Both ratios with supar's time as the denominator, so that larger is better."""
    dense = Reading.read(document, "ratio")
    return {
        "masked dense ÷ supar": Reading.read(document, "masked_dense_ratio"),
        "plain dense ÷ supar": Reading(1 / dense.value, 1 / dense.high, 1 / dense.low),
    }
