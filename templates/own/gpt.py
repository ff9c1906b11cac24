"""A plain GPT in a plain PyTorch loop, trained as a plan says: `python gpt.py plan.yaml`.

supar layout gpt:make --base width=64 --wider width=128 --third width=192 --example gpt:example -o layout.yaml
supar tune-proxy --layout layout.yaml --command 'python gpt.py {plan}'
supar transfer proxy.yaml --width 512 --sparsity 0.9
python gpt.py plan.yaml
"""

import math
import sys
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import supar_cli as supar

VOCAB, CONTEXT, LAYERS = 256, 64, 2  # the vocabulary is bytes
HEAD_WIDTH = 16  # at every width of the model


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        split = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, HEAD_WIDTH)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids, targets=None):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make(width):  # called with the sizes of a layout or of a plan
    return GPT(width)


def example(model):  # the arguments of one forward pass, for `supar layout`
    return (torch.randint(VOCAB, (2, CONTEXT)),)


@cache
def read_corpus():
    """The sources of Python's standard library as bytes: all but the last tenth to train on, and the rest."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return ids[: -len(ids) // 10], ids[-len(ids) // 10 :]


def batch_of(ids, size, seed, step):
    generator = torch.Generator().manual_seed(seed * 10**6 + step)
    windows = ids[torch.randint(len(ids) - CONTEXT, (size, 1), generator=generator) + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def batches(seed, step):  # for `supar check`
    return batch_of(read_corpus()[0], 8, seed, step)


@torch.no_grad()
def evaluate(model, ids, size):
    return sum(model(*batch_of(ids, size, 0, step)).item() for step in range(8)) / 8


def rate(step, train, peak):  # linear warm-up, then a cosine down to a share of the peak
    if step < train.warmup_steps:
        return peak * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return peak * (train.final_lr_fraction + (1 - train.final_lr_fraction) * (1 + math.cos(math.pi * progress)) / 2)


def main(path):
    plan = supar.load(path)
    train = plan.train
    model = make(**plan.model.target)
    prepared = supar.prepare(model, plan)
    optimizer = prepared.optimizer()
    training, held_out = read_corpus()
    for step in range(train.steps):
        if step and step % train.eval_every == 0:
            supar.report_loss(evaluate(model, held_out, train.batch_size), step)
        prepared.set_rate(rate(step, train, plan.hyperparameters.lr))
        model(*batch_of(training, train.batch_size, train.seed, step)).backward()
        prepared.clip_grad_norm_(train.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    loss = evaluate(model, held_out, train.batch_size)
    supar.report_loss(loss, train.steps)
    print(f"held-out loss after {train.steps} steps: {loss:.4f} nats per byte")


if __name__ == "__main__":
    main(sys.argv[1])
