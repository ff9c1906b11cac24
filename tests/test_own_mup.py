"""Microsoft's `mup` as an oracle of layouts and their plans: what scales, each tensor's ratio, and its rate and decay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mup
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import supar_cli
from supar_cli.planning import document
from supar_cli.planning.layout_document import Layout, LayoutRow
from supar_cli.planning.own_shapes import OwnTensors
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy, Target
from supar_cli.planning.transfer import transfer
from tests.conftest import proxy_fields
from tests.own_modules import VOCAB, features, ids

BASE, WIDER = {"width": 16, "ffn": 64}, {"width": 32, "ffn": 128}
LR, DECAY = 0.01, 0.1
TOLERANCE = 1e-12


class Block(nn.Module):
    """A pre-norm block with heads of width 4."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.norm, self.ffn_norm = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, 4)).transpose(1, 2) for x in self.qkv(self.norm(h)).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.ffn_norm(h))))


class Decoder(nn.Module):
    def __init__(self, width: int, ffn: int, tied: bool) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(VOCAB, width), nn.Parameter(torch.randn(8, width))
        self.blocks = nn.ModuleList(Block(width, ffn) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def perceptron(width: int, ffn: int) -> nn.Module:
    layers = [nn.Linear(7, width), nn.ReLU(), nn.Linear(width, ffn), nn.ReLU(), nn.Linear(ffn, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def convolutions(width: int, ffn: int) -> nn.Module:
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, ffn, 3, bias=False)]
    layers += [nn.GroupNorm(4, ffn), nn.ReLU(), nn.Conv2d(ffn, width, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


class Recurrent(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(VOCAB, width), nn.LSTM(width, ffn, 2), nn.Linear(ffn, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.table(x))[0])


def images(model: nn.Module) -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 8, 8),)


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[[nn.Module], Any]]] = {
    "perceptron": (perceptron, features),
    "convolutions": (convolutions, images),
    "recurrent": (Recurrent, ids),
    "decoder": (lambda **size: Decoder(**size, tied=False), ids),
    "tied decoder": (lambda **size: Decoder(**size, tied=True), ids),
}
TARGETS = [{"width": 64, "ffn": 64 * ratio} for ratio in (4, 8, 2)]  # 4 is the base's ratio


def read(name: str, target: dict[str, int]) -> Layout:
    make, example = MODELS[name]
    return supar_cli.layout(make, base=BASE, wider=WIDER, target=target, example=example)


def shaped(name: str, target: dict[str, int]) -> dict[str, nn.Parameter]:
    """The target's parameters as `mup` sees them."""
    make = MODELS[name][0]
    model = mup.set_base_shapes(
        make(**target), make(**BASE), delta=make(**WIDER), rescale_params=False, do_assert=False
    )
    return dict(model.named_parameters())


def shape_differences(found: Layout, theirs: dict[str, nn.Parameter], target: dict[str, int]) -> list[str]:
    """Tensors whose scaling extents or ratio are not `mup`'s."""
    ours, differing = OwnTensors(found, target), []
    for tensor in ours.tensors:
        shape, row = theirs[tensor.name].infshape, ours.rows[tensor.name]
        if shape.ninf() != len(row.scales) or (shape.ninf() == 2) != (row.role == "hidden"):
            differing.append(f"{tensor.name}: {row.role} scales along {row.scales}, mup's {shape}")
        elif ours.m_d(tensor) != pytest.approx(shape.width_mult(), rel=TOLERANCE):
            differing.append(f"{tensor.name}: ratio {ours.m_d(tensor)}, mup's {shape.width_mult()}")
    return differing


def planned(found: Layout, target: dict[str, int], optimizer: str, folder: Path) -> Plan:
    path = folder / "layout.yaml"
    path.write_text(document.write([found.model_dump()]), encoding="utf-8")
    hyper = {"lr": LR, "weight_decay": DECAY, "alpha_input": 3.0, "alpha_output": 2.0}
    fields = proxy_fields("", hyperparameters=hyper, train={"optimizer": optimizer})
    fields |= {"model": {"family": "own", "layout": str(path)}, "data": None, "target": {}}
    wanted = validate(Target, {"size": target, "sparsity": {"density": 1}}, "target")
    return transfer(validate(Proxy, fields, "proxy"), wanted, "supar")


def number_differences(plan: Plan, theirs: dict[str, nn.Parameter], optimizer: str) -> list[str]:
    """Tensors whose rate or decay, the fold taken out, is not that of `mup`'s groups.

    `mup` leaves it to the user which tensors decay, and has no rule for ε.
    """
    make = mup.MuAdamW if optimizer == "adamw" else mup.MuSGD
    groups = make(theirs.values(), lr=LR, weight_decay=DECAY).param_groups
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    differing = []
    for row in plan.tensors:
        group, fold = group_of[id(theirs[row.name])], row.fold or 1.0
        power = fold if optimizer == "adamw" else fold**2
        if row.lr / power != pytest.approx(group["lr"], rel=TOLERANCE):
            differing.append(f"{row.name}: rate {row.lr / power}, mup's {group['lr']}")
        decays = row.role not in ("bias", "norm")
        if decays and row.weight_decay * power != pytest.approx(group["weight_decay"], rel=TOLERANCE):
            differing.append(f"{row.name}: decay {row.weight_decay * power}, mup's {group['weight_decay']}")
    return differing


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"ffn={target['ffn'] // 64}")
@pytest.mark.parametrize("name", MODELS)
def test_mup_agrees_on_every_tensor(name: str, target: dict[str, int], tmp_path: Path) -> None:
    found, theirs = read(name, target), shaped(name, target)
    assert {row.name for row in found.tensors} == set(theirs)
    assert shape_differences(found, theirs, target) == []
    for optimizer in ("adamw", "sgd"):
        assert number_differences(planned(found, target, optimizer, tmp_path), theirs, optimizer) == []


Edit = Callable[[LayoutRow], dict[str, Any]]
FAULTS: dict[str, tuple[Edit, str, str]] = {
    "a fan-in of the other axis": (
        lambda row: {"fan_in_axes": [0]} if row.name == "blocks.0.up.weight" else {},
        "decoder",
        "blocks.0.up.weight: ratio",
    ),
    "a fan-in of the taps alone": (
        lambda row: {"fan_in_axes": [2, 3]} if row.name == "3.weight" else {},
        "convolutions",
        "3.weight: ratio",
    ),
    "a hidden weight taken for a table": (
        lambda row: {"role": "embedding", "fan_in_axes": []} if row.name == "cell.weight_hh_l0" else {},
        "recurrent",
        "cell.weight_hh_l0: embedding scales",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_layout_differs(fault: str, tmp_path: Path) -> None:
    edit, name, what = FAULTS[fault]
    target = TARGETS[1]
    found, theirs = read(name, target), shaped(name, target)
    wrong = found.model_copy(update={"tensors": [row.model_copy(update=edit(row)) for row in found.tensors]})
    assert any(line.startswith(what) for line in shape_differences(wrong, theirs, target))
    wrong_name = what.partition(": ")[0]
    plans = {optimizer: planned(wrong, target, optimizer, tmp_path) for optimizer in ("adamw", "sgd")}
    lines = [line for optimizer, plan in plans.items() for line in number_differences(plan, theirs, optimizer)]
    assert {line.partition(": ")[0] for line in lines} == {wrong_name}


def test_the_bias_of_the_head_taken_for_another_differs(tmp_path: Path) -> None:
    target = TARGETS[0]
    found, theirs = read("decoder", target), shaped("decoder", target)
    rows = [
        row.model_copy(update={"uses": [], "scales": [0], "wider": [22]}) if row.name == "head.bias" else row
        for row in found.tensors
    ]
    rows = [row.model_copy(update={"target": [4 * VOCAB]}) if row.name == "head.bias" else row for row in rows]
    plan = planned(found.model_copy(update={"tensors": rows}), target, "sgd", tmp_path)
    assert [line.partition(":")[0] for line in number_differences(plan, theirs, "sgd")] == ["head.bias"]
