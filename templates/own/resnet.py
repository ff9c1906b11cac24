"""A residual net of 3×3 convolutions on labelled images in a plain PyTorch loop, trained as a plan says: `python resnet.py plan.yaml`.

supar layout resnet:make --base width=32 --wider width=64 --third width=96 --example resnet:example -o layout.yaml
supar tune-proxy --layout layout.yaml --command 'python resnet.py {plan}' -s 'search.alpha_output=[1, 4, 8, 16]'
supar transfer proxy.yaml --width 128 --sparsity 0.9
python resnet.py plan.yaml

The images are scikit-learn's digits. `env IMAGES=fashion.npz` before each of these commands, and in --command, names others:
arrays x and y and, if there are, x_test and y_test; colours, if there are, come before height and width. With `make_group_norm`
for `make` the net has GroupNorm.
"""

import math
import os
import sys
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import supar_cli as supar
from supar_cli.training.optimizer import rate_factor

BLOCKS = 2  # of two convolutions each, at one resolution
KERNEL = 3  # pixels along each side of a convolution
GROUPS = 4  # channel groups of GroupNorm, at every width
HELD_OUT = 1000  # images at most that the loss is taken of


class Block(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.conv_1, self.norm_1 = convolution(width, width), norm(width)
        self.conv_2, self.norm_2 = convolution(width, width), norm(width)

    def forward(self, x):
        inner = F.relu(self.norm_1(self.conv_1(x)))
        return F.relu(x + self.norm_2(self.conv_2(inner)))


class ResNet(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        images, labels = read_images()[0]
        _, channels, height, _ = images.shape
        self.stem, self.norm = convolution(channels, width, stride=2 if height > 8 else 1), norm(width)
        self.blocks = nn.Sequential(*(Block(width, norm) for _ in range(BLOCKS)))
        self.head = nn.Linear(width, int(labels.max()) + 1)
        nn.init.kaiming_normal_(self.head.weight, nonlinearity="linear")
        nn.init.zeros_(self.head.bias)

    def forward(self, x, targets=None):
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        logits = self.head(x.mean((2, 3)))
        return logits if targets is None else F.cross_entropy(logits, targets)


def convolution(inputs, outputs, stride=1):
    layer = nn.Conv2d(inputs, outputs, KERNEL, stride, padding=KERNEL // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # by its fan-in, inputs × KERNEL²
    return layer


def make(width):  # channels; called with the sizes of a layout or of a plan
    return ResNet(width, nn.BatchNorm2d)


def make_group_norm(width):
    return ResNet(width, partial(nn.GroupNorm, GROUPS))


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
    if x.dim() == 4 and x.shape[1] > 4 >= x.shape[3]:
        sys.exit(
            f"images: of shape {list(x.shape[1:])}; expected colours before height and width: x.transpose(0, 3, 1, 2)"
        )
    if x.dim() == 3:  # grey
        x, x_test = x[:, None], x_test[:, None]
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
    logits = model.eval()(x)
    model.train()
    return F.cross_entropy(logits, y).item(), (logits.argmax(-1) == y).float().mean().item()


def main(path):
    plan = supar.load(path)
    train = plan.train
    chosen = globals()[(plan.model.factory or "resnet:make").partition(":")[2]]  # make, or make_group_norm
    model = chosen(**plan.model.target)
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
