"""A multi-layer perceptron on labelled images in a plain PyTorch loop, trained as a plan says: `python mlp.py plan.yaml`.

supar layout mlp:make --base width=64 --wider width=128 --third width=192 --example mlp:example -o layout.yaml
supar tune-proxy --layout layout.yaml --command 'python mlp.py {plan}'
supar transfer proxy.yaml --width 512 --sparsity 0.9
python mlp.py plan.yaml

The images are scikit-learn's digits. `env IMAGES=fashion.npz` before each of these commands, and in --command, names others:
arrays x and y and, if there are, x_test and y_test.
"""

import math
import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import supar_cli as supar
from supar_cli.training.optimizer import rate_factor

HIDDEN = 2  # layers from width to width, after the first one
HELD_OUT = 1000  # images at most that the loss is taken of


class MLP(nn.Module):
    def __init__(self, pixels, width, classes):
        super().__init__()
        self.first = nn.Linear(pixels, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(HIDDEN))
        self.head = nn.Linear(width, classes)
        for layer in (self.first, *self.hidden, self.head):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is self.head else "relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x, targets=None):
        x = F.relu(self.first(x.flatten(1)))
        for layer in self.hidden:
            x = F.relu(layer(x))
        logits = self.head(x)
        return logits if targets is None else F.cross_entropy(logits, targets)


def make(width):  # called with the sizes of a layout or of a plan
    x, y = read_images()[0]
    return MLP(x[0].numel(), width, int(y.max()) + 1)


def example(model):  # the arguments of one forward pass, for `supar layout`
    return batches(0, 0)[:1]


@cache
def read_images():
    """Images, of mean 0 and variance 1 over some of them, and labels: those to train on, and some that are held out."""
    if path := os.environ.get("IMAGES"):
        stored = np.load(path)
        parts = [stored[name] for name in ("x", "y", "x_test", "y_test") if name in stored]
    elif package := find_spec("sklearn"):  # only its file is read: an import takes as long as a short run
        file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        parts = [rows[:, :64].reshape(-1, 8, 8), rows[:, 64]]
    else:
        sys.exit("images: scikit-learn is missing; expected `pip install scikit-learn`, or IMAGES=FILE.npz")
    if len(parts) == 2:  # every tenth is held out, as files may be sorted by class
        held_out = np.arange(len(parts[0])) % 10 == 9
        parts = [part[rows] for rows in (~held_out, held_out) for part in parts]
    x, y, x_test, y_test = (torch.from_numpy(part) for part in parts)
    std, mean = torch.std_mean(x[:HELD_OUT].float())
    held_out = ((x_test[:HELD_OUT].float() - mean) / std, y_test[:HELD_OUT].long())
    return (x, y), held_out, (mean, std)


def batch_of(size, seed, step):
    (x, y), _, (mean, std) = read_images()
    chosen = torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(seed * 10**6 + step))
    return (x[chosen].float() - mean) / std, y[chosen].long()


def batches(seed, step):  # for `supar check`
    return batch_of(64, seed, step)


@torch.no_grad()
def evaluate(model):
    """The loss of the held-out images, and the share of them that it classifies."""
    x, y = read_images()[1]
    logits = model(x)
    return F.cross_entropy(logits, y).item(), (logits.argmax(-1) == y).float().mean().item()


def main(path):
    plan = supar.load(path)
    train = plan.train
    model = make(**plan.model.target)
    prepared = supar.prepare(model, plan)
    optimizer = prepared.optimizer()
    for step in range(train.steps):
        if step and step % train.eval_every == 0:
            supar.report_loss(evaluate(model)[0], step)
        prepared.set_rate(rate_factor(plan, step) * plan.hyperparameters.lr)  # as plan.train.schedule says
        model(*batch_of(train.batch_size, train.seed, step)).backward()
        prepared.clip_grad_norm_(train.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    loss, accuracy = evaluate(model)
    supar.report_loss(loss, train.steps)
    print(f"held-out loss after {train.steps} steps: {loss:.4f} nats per image, accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main(sys.argv[1])
