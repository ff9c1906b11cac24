"""Folded numbers against explicit multipliers: a small decoder in float64 whose forward pass really multiplies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from supar_cli.errors import InputError
from supar_cli.planning import layout
from supar_cli.planning.folding import Numbers, TensorUse, clip_factor, describe_uses, fold, fold_factors

V, T, D, FFN, BLOCKS, STEPS = 11, 5, 8, 12, 2, 8
AGREE, DIFFER = 1e-10, 1e-4  # chosen: float64 leaves about 1e-14; the smallest planted fault leaves more than 1e-4
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
    "adam": lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.95)),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "RAdam": lambda groups: torch.optim.RAdam(groups),
    "Adafactor": lambda groups: torch.optim.Adafactor([{k: g[k] for k in g if k != "eps"} for g in groups]),
}


@dataclass(frozen=True)
class Multipliers:
    input: float = 1.0
    output: float = 1.0
    residual: float = 1.0


TRUE = Multipliers(input=2.5, output=1.8 / 3, residual=1 / 3)  # no powers of two: nothing is exact by chance


@dataclass(frozen=True)
class Case:
    """One model and optimizer. `clip`: the largest global norm, with the gradients weighted as `train` is told."""

    tied: bool
    shift: bool = True  # LayerNorm with gain and shift, else RMSNorm with gain
    optimizer: str = "adamw"
    decay: float = 0.1
    clip: float | None = None


def uses_of(case: Case) -> list[TensorUse]:
    """Every tensor of the test's decoder, by hand."""
    block = [TensorUse(name, "hidden") for name in ("qkv", "up")] + [TensorUse("up.bias", "bias")]
    block += [TensorUse(name, "hidden", writes_residual=True) for name in ("o", "down")]
    block += [TensorUse(f"{name}.bias", "bias", writes_residual=True) for name in ("o", "down")]
    norms = [TensorUse("n1", "norm"), TensorUse("n2", "norm"), TensorUse("final", "norm", feeds_head=True)]
    norms += [replace(norm, name=f"{norm.name}.bias", role="bias") for norm in norms] if case.shift else []
    block += [norm for norm in norms if not norm.feeds_head]
    uses = [TensorUse("embedding", "embedding", in_first_sum=True, tied=case.tied)]
    uses += [TensorUse("positions", "embedding", in_first_sum=True)]
    uses += [replace(use, name=f"{i}.{use.name}") for i in range(BLOCKS) for use in block]
    uses += [norm for norm in norms if norm.feeds_head] + [TensorUse("head.bias", "bias")]
    return uses + ([] if case.tied else [TensorUse("head", "unembedding")])


SHAPES = {"embedding": (V, D), "positions": (T, D), "head": (V, D), "head.bias": (V,), "qkv": (3 * D, D), "o": (D, D)}
SHAPES |= {"up": (FFN, D), "down": (D, FFN), "up.bias": (FFN,)}


def numbers_of(case: Case) -> dict[str, Numbers]:
    """Unfolded numbers: another rate, start and epsilon for every role; epsilon matters beside these gradients."""
    known = {
        "embedding": Numbers(0.02, case.decay, 2e-3, init_std=0.3),
        "hidden": Numbers(0.01, case.decay / 2, 1e-3, init_std=0.25),
        "unembedding": Numbers(0.03, case.decay * 2, 3e-3, init_std=0.4),
        "norm": Numbers(0.02, case.decay, 1e-3, init_constant=1.0),
        "bias": Numbers(0.01, case.decay, 1e-3, init_constant=0.2),
    }
    return {use.name: known[use.role] for use in uses_of(case)}


def forward(case: Case, p: dict[str, Tensor], tokens: Tensor, m: Multipliers) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        if case.shift:
            return F.layer_norm(x, (D,), p[name], p[f"{name}.bias"])
        return F.rms_norm(x, (D,), p[name])

    x = (F.embedding(tokens, p["embedding"]) + p["positions"]) * m.input
    for i in range(BLOCKS):
        q, k, v = F.linear(norm(f"{i}.n1", x), p[f"{i}.qkv"]).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / D)
        x = x + F.linear(mixed, p[f"{i}.o"], p[f"{i}.o.bias"]) * m.residual
        inner = F.gelu(F.linear(norm(f"{i}.n2", x), p[f"{i}.up"], p[f"{i}.up.bias"]))
        x = x + F.linear(inner, p[f"{i}.down"], p[f"{i}.down.bias"]) * m.residual
    weight = p["embedding"] if case.tied else p["head"]
    return F.linear(norm("final", x), weight) * m.output + p["head.bias"]


def train(
    case: Case, numbers: dict[str, Numbers], m: Multipliers, weights: dict[str, float] | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(logits before each step and after the last, final values). `weights`: factors on gradients in the clipped norm."""
    generator = torch.Generator().manual_seed(0)
    p: dict[str, Tensor] = {}
    for name, row in numbers.items():
        shape = SHAPES.get(name) or SHAPES.get(name.partition(".")[2]) or (D,)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        p[name] = ((row.init_std or 0.0) * normal + (row.init_constant or 0.0)).requires_grad_()
    groups = [
        {"params": [p[name]], "lr": row.lr, "weight_decay": row.weight_decay, "eps": row.eps}
        for name, row in numbers.items()
    ]
    optimizer = OPTIMIZERS[case.optimizer](groups)
    logits = []
    for _ in range(STEPS):
        tokens, targets = torch.randint(V, (2, 3, T), generator=generator)
        logits.append(forward(case, p, tokens, m))
        optimizer.zero_grad()
        F.cross_entropy(logits[-1].flatten(0, 1), targets.flatten()).backward()
        if case.clip is not None:
            squares = [((weights or {}).get(name, 1.0) * w.grad).square().sum() for name, w in p.items()]
            norm = torch.stack(squares).sum().sqrt()
            assert norm > case.clip or weights is None or m != TRUE, "the case must clip"
            for w in p.values():
                w.grad *= min(1.0, case.clip / float(norm))
        optimizer.step()
    logits.append(forward(case, p, tokens, m))
    return [x.detach() for x in logits], {name: w.detach() for name, w in p.items()}


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative difference of the logits over all steps."""
    assert len(found) == len(wanted) == STEPS + 1
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def folded_numbers(case: Case, rule: str | None = None) -> dict[str, Numbers]:
    factors = fold_factors(uses_of(case), TRUE)
    return {name: fold(row, factors[name], rule or case.optimizer) for name, row in numbers_of(case).items()}


def difference(case: Case, numbers: dict[str, Numbers], weights: dict[str, float] | None = None) -> float:
    """How far a decoder without multipliers, trained with these numbers, leaves the one with multipliers."""
    ones = dict.fromkeys(numbers, 1.0)
    return largest_difference(train(case, numbers, Multipliers(), weights)[0], train(case, numbers_of(case), TRUE, ones)[0])


CASES = [
    Case(tied, shift, optimizer, decay)
    for tied in (False, True)
    for shift in (True, False)
    for optimizer, decay in (("adamw", 0.1), ("adam", 0.0), ("sgd", 0.1))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_folded_numbers_train_the_same(case: Case) -> None:
    assert difference(case, folded_numbers(case)) < AGREE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_comparison_reports_a_fold_that_is_forgotten(case: Case) -> None:
    plain, folded, factors = numbers_of(case), folded_numbers(case), fold_factors(uses_of(case), TRUE)
    for fields in (("init_std",), ("init_constant",), ("lr",), ("weight_decay",), ("eps",)):
        if (fields == ("eps",) and case.optimizer == "sgd") or (fields == ("weight_decay",) and not case.decay):
            assert all(getattr(plain[name], fields[0]) == getattr(folded[name], fields[0]) for name in plain)
            continue
        faulty = {n: replace(row, **{f: getattr(plain[n], f) for f in fields}) for n, row in folded.items()}
        assert difference(case, faulty) > DIFFER, fields
    carriers = [name for name, factor in factors.items() if factor != 1]
    assert len(carriers) == 2 + 4 * BLOCKS + (1 if not case.tied else 1 + case.shift)
    for name in carriers:
        assert difference(case, {**folded, name: plain[name]}) > DIFFER, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("optimizer", "rule"), [("adamw", "sgd"), ("sgd", "adamw")])
def test_the_rule_of_the_other_optimizer_is_wrong(tied: bool, optimizer: str, rule: str) -> None:
    case = Case(tied, optimizer=optimizer)
    assert difference(case, folded_numbers(case, rule)) > DIFFER


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_clipping_agrees_only_with_the_norm_of_weighted_gradients(tied: bool, optimizer: str) -> None:
    case = Case(tied, optimizer=optimizer, clip=0.1)
    weights = {name: clip_factor(factor) for name, factor in fold_factors(uses_of(case), TRUE).items()}
    assert difference(case, folded_numbers(case), weights) < AGREE
    assert difference(case, folded_numbers(case), None) > DIFFER


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trained_values_times_the_fold_compute_the_same_without_multipliers(case: Case) -> None:
    factors, tokens = fold_factors(uses_of(case), TRUE), torch.arange(T)[None] * 2
    trained = train(case, numbers_of(case), TRUE)[1]
    exported = {name: factors[name] * w for name, w in trained.items()}
    wanted = forward(case, trained, tokens, TRUE)
    assert float((forward(case, exported, tokens, Multipliers()) - wanted).norm() / wanted.norm()) < AGREE
    assert float((forward(case, trained, tokens, Multipliers()) - wanted).norm() / wanted.norm()) > DIFFER


@pytest.mark.parametrize(("optimizer", "decay"), [("adam", 0.1), ("RAdam", 0.0), ("Adafactor", 0.0)])
def test_optimizers_without_an_exact_rule_are_refused_with_reason(optimizer: str, decay: float) -> None:
    case = Case(True, optimizer=optimizer, decay=decay)
    assert difference(case, folded_numbers(case, "adamw")) > DIFFER  # what the refusal prevents
    with pytest.raises(InputError, match="the plan can give masks but no numbers"):
        folded_numbers(case)


@pytest.mark.parametrize("optimizer", ["RAdam", "Adafactor", "LAMB", "Muon", "lion"])
def test_a_refused_optimizer_is_named(optimizer: str) -> None:
    with pytest.raises(InputError, match=f"^{optimizer}: .* AdamW, Adam without weight decay and SGD only; for {optimizer}"):
        fold(Numbers(0.1, 0.0, 1e-8), 2.0, optimizer)
    assert fold(Numbers(0.1, 0.1, 1e-8), 2.0, "AdamW") == Numbers(0.2, 0.05, 5e-9)
    with pytest.raises(InputError, match="^Adam with coupled weight decay: "):
        fold(Numbers(0.1, 0.1, 1e-8), 2.0, "adam")


@pytest.mark.parametrize("factor", [0.0, -1.0, inf, -inf, nan])
def test_a_factor_must_be_finite_and_positive(factor: float) -> None:
    for call in (lambda: fold(Numbers(0.1, 0.0, 1e-8), factor, "sgd"), lambda: clip_factor(factor)):
        with pytest.raises(InputError, match=f"fold factor: {factor!r}; expected a finite number above 0"):
            call()
    with pytest.raises(InputError, match=f"^multipliers.residual: {factor!r}; expected"):
        fold_factors(uses_of(Case(False)), Multipliers(residual=factor))


def test_a_result_outside_of_floats_is_refused() -> None:
    with pytest.raises(InputError, match="^fold factor: 1e\\+300 turns lr 1e-10 into inf, beyond a float's range"):
        fold(Numbers(1e-10, 0.0, 0.0), 1e300, "sgd")
    with pytest.raises(InputError, match="turns weight_decay 0.1 into inf"):
        fold(Numbers(1e300, 0.1, 0.0), 1e-200, "sgd")
