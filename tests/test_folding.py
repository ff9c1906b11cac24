"""Folded numbers against explicit multipliers: a small decoder in float64 whose forward pass really multiplies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
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
from supar_cli.planning.folding import Numbers, TensorUse, clip_factor, describe_uses, fold, fold_each, fold_factors

V, T, D, FFN, BLOCKS, STEPS = 11, 5, 8, 12, 2, 6
AGREE, DIFFER = 1e-12, 1e-4  # measured here: float64 leaves 1e-15 at most, a planted fault 2e-3 at least
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
    "adam": lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.95)),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "radam": torch.optim.RAdam,
    "adafactor": lambda groups: torch.optim.Adafactor([{k: g[k] for k in g if k != "eps"} for g in groups]),
}
ONE: Any = SimpleNamespace(input=1.0, output=1.0, residual=1.0)
TRUE: Any = SimpleNamespace(input=2.5, output=1.8 / 3, residual=1 / 3)  # no powers of two: nothing is exact by chance
Trained = tuple[list[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One model and its optimizer. `clip`: the largest global norm."""

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
    table = TensorUse("embedding", "embedding", in_first_sum=True, tied=case.tied)
    uses = [table, replace(table, name="positions", tied=False)]
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
        "bias": Numbers(0.01, case.decay, 1e-3, init_std=0.2),  # not constant: LayerNorm would not see it
    }
    return {use.name: known[use.role] for use in uses_of(case)}


def folded_numbers(case: Case, rule: str | None = None) -> dict[str, Numbers]:
    factors = fold_factors(uses_of(case), TRUE)
    return {name: fold(row, factors[name], rule or case.optimizer) for name, row in numbers_of(case).items()}


def forward(case: Case, p: dict[str, Tensor], tokens: Tensor, m: Any) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), p[name], p[f"{name}.bias"]) if case.shift else F.rms_norm(x, (D,), p[name])

    x = (F.embedding(tokens, p["embedding"]) + p["positions"]) * m.input
    for i in range(BLOCKS):
        q, k, v = F.linear(norm(f"{i}.n1", x), p[f"{i}.qkv"]).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / D)
        x = x + F.linear(mixed, p[f"{i}.o"], p[f"{i}.o.bias"]) * m.residual
        inner = F.gelu(F.linear(norm(f"{i}.n2", x), p[f"{i}.up"], p[f"{i}.up.bias"]))
        x = x + F.linear(inner, p[f"{i}.down"], p[f"{i}.down.bias"]) * m.residual
    weight = p["embedding"] if case.tied else p["head"]
    return F.linear(norm("final", x), weight) * m.output + p["head.bias"]


def train(case: Case, numbers: dict[str, Numbers], m: Any, clip_factors: dict[str, float]) -> Trained:
    """Return the logits before each step and after the last, and the final values."""
    generator = torch.Generator().manual_seed(0)
    p: dict[str, Tensor] = {}
    for name, row in numbers.items():
        shape = SHAPES.get(name) or SHAPES.get(name.partition(".")[2]) or (D,)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        p[name] = ((row.init_std or 0.0) * normal + (row.init_constant or 0.0)).requires_grad_()
    settings = {n: {"lr": row.lr, "weight_decay": row.weight_decay, "eps": row.eps} for n, row in numbers.items()}
    optimizer = OPTIMIZERS[case.optimizer]([{"params": [p[name]], **settings[name]} for name in p])
    logits = []
    for _ in range(STEPS):
        tokens, targets = torch.randint(V, (2, 3, T), generator=generator)
        logits.append(forward(case, p, tokens, m))
        optimizer.zero_grad()
        F.cross_entropy(logits[-1].flatten(0, 1), targets.flatten()).backward()
        if case.clip is not None:
            norm = sum(float((clip_factors[name] * w.grad).square().sum()) for name, w in p.items()) ** 0.5
            assert norm > case.clip
            for w in p.values():
                w.grad *= case.clip / norm
        optimizer.step()
    logits.append(forward(case, p, tokens, m))
    return [x.detach() for x in logits], {name: w.detach() for name, w in p.items()}


def compare(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative difference over all steps."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def difference(case: Case, numbers: dict[str, Numbers], clip_factors: dict[str, float] | None = None) -> float:
    """How far a decoder without multipliers, trained with these numbers, leaves the one with multipliers."""
    ones = dict.fromkeys(numbers, 1.0)
    found = train(case, numbers, ONE, clip_factors or ones)[0]
    return compare(found, train(case, numbers_of(case), TRUE, ones)[0])


SETTINGS = (("adamw", 0.1), ("adam", 0.0), ("sgd", 0.1))
CASES = [Case(tied, shift, *setting) for tied, shift, setting in product((False, True), (True, False), SETTINGS)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_folded_numbers_train_the_same_and_trained_values_are_folded(case: Case) -> None:
    assert difference(case, folded_numbers(case)) < AGREE
    factors, tokens = fold_factors(uses_of(case), TRUE), torch.arange(T)[None]
    trained = train(case, numbers_of(case), TRUE, {})[1]
    exported, wanted = {name: factors[name] * w for name, w in trained.items()}, forward(case, trained, tokens, TRUE)
    assert compare([forward(case, exported, tokens, ONE)], [wanted]) < AGREE
    assert compare([forward(case, trained, tokens, ONE)], [wanted]) > DIFFER


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_comparison_reports_a_fold_that_is_forgotten(case: Case) -> None:
    plain, folded, factors = numbers_of(case), folded_numbers(case), fold_factors(uses_of(case), TRUE)
    skipped = {"eps": case.optimizer == "sgd", "weight_decay": not case.decay, "init_constant": not case.tied}
    for field in ("init_std", "init_constant", "lr", "weight_decay", "eps"):
        faulty = {name: replace(row, **{field: getattr(plain[name], field)}) for name, row in folded.items()}
        assert (faulty == folded) == skipped.get(field, False)
        assert skipped.get(field) or difference(case, faulty) > DIFFER, field
    assert difference(case, folded_numbers(case, "adamw" if case.optimizer == "sgd" else "sgd")) > DIFFER
    carriers = [name for name, factor in factors.items() if factor != 1]
    assert len(carriers) == 2 + 4 * BLOCKS + (1 + case.shift if case.tied else 1)
    for name in carriers:
        assert difference(case, {**folded, name: plain[name]}) > DIFFER, name


@pytest.mark.parametrize("case", [replace(case, clip=0.1) for case in CASES if case.decay], ids=str)
def test_clipping_agrees_only_with_the_norm_of_weighted_gradients(case: Case) -> None:
    weights = {name: clip_factor(a) for name, a in fold_factors(uses_of(case), TRUE).items()}
    assert difference(case, folded_numbers(case), weights) < AGREE
    assert difference(case, folded_numbers(case)) > DIFFER


@pytest.mark.parametrize("name", ["RAdam", "Adafactor", "LAMB", "Muon", "lion", "Adam with coupled weight decay"])
def test_an_optimizer_without_an_exact_rule_is_refused_by_name(name: str) -> None:
    optimizer = name.partition(" ")[0]
    said = f"^{name}: .* exactly only for AdamW, Adam without weight decay and SGD; the plan can give masks"
    with pytest.raises(InputError, match=said):
        fold(Numbers(0.1, 0.1, 1e-8), 2.0, optimizer)
    if optimizer.lower() in OPTIMIZERS:  # AdamW's numbers would be wrong
        case = Case(True, optimizer=optimizer.lower(), decay=0.1 if optimizer == "Adam" else 0.0)
        assert difference(case, folded_numbers(case, "AdamW")) > DIFFER


@pytest.mark.parametrize("factor", [0.0, -1.0, inf, nan])
def test_a_factor_must_be_finite_and_positive(factor: float) -> None:
    for call in (lambda: fold(Numbers(0.1, 0.0, 1e-8), factor, "sgd"), lambda: clip_factor(factor)):
        with pytest.raises(InputError, match=f"^fold factor: {factor!r}; expected a finite number above 0"):
            call()
    with pytest.raises(InputError, match=f"^multipliers.residual: {factor!r}; expected"):
        fold_factors(uses_of(Case(False)), SimpleNamespace(**{**vars(ONE), "residual": factor}))
    with pytest.raises(InputError, match=r"^multipliers.output / multipliers.input: inf; expected"):
        fold_factors(uses_of(Case(True)), SimpleNamespace(input=1e-200, output=1e200, residual=1.0))


def refusals(uses: list[TensorUse]) -> list[str]:
    with pytest.raises(InputError) as caught:
        fold_factors(uses, TRUE)
    return [str(problem) for problem in caught.value.problems]


def test_what_no_factor_can_go_into_is_refused_by_name() -> None:
    tied, untied = uses_of(Case(True)), uses_of(Case(False))

    def change(uses: list[TensorUse], name: str, **changes: Any) -> list[TensorUse]:
        return [replace(use, **changes) if use.name == name else use for use in uses]

    for loose in (change(tied, "final", feeds_head=False), [use for use in tied if not use.feeds_head]):
        (said,) = refusals(loose)
        assert said.startswith("embedding: it is also the weight of the head, and no norm") and "by 0.24 in" in said
        assert fold_factors(loose, SimpleNamespace(input=2.5, output=2.5, residual=1.0))["embedding"] == 2.5
    for uses, name, what in ((tied, "final", "output"), (tied, "positions", "input"), (untied, "1.o", "residual")):
        (said,) = refusals(change(uses, name, derived=True))
        assert said.startswith(f"{name}: ") and f"the {what} multiplier can't be folded into this tensor" in said
        assert set(fold_factors(change(uses, name, derived=True), ONE).values()) == {1.0}
    (said,) = refusals(change(untied, "head", in_first_sum=True))
    assert said == "head: its two uses need the factors 2.5 and 0.6"
    assert refusals([*tied, untied[-1]]) == ["embedding: a tied head and 1 more; expected a single head"]
    said, *more = refusals([gain := TensorUse("gain", "norm")])
    assert said == "multipliers.input: no tensor can take the factor 2.5; expected 1" and len(more) == 2
    assert fold_factors([gain], ONE) == {"gain": 1.0}


@pytest.mark.parametrize(
    ("tied", "norm", "patch"),
    [*product((False, True), ("layernorm", "rmsnorm"), (0,)), (False, "layernorm", 12)],
)
def test_the_factors_of_our_own_families(tied: bool, norm: str, patch: int) -> None:
    sizes = {"width": D, "layers": 2, "heads": 2, "kv_heads": 2, "head_width": 4, "ffn_width": FFN, "context": T}
    kinds = {"vocab": V, "norm": norm, "activation": "gelu", "positions": "learned", "bias": True, "tied": tied}
    shape: Any = SimpleNamespace(**sizes, **kinds, patch_inputs=patch, has_class_token=patch > 0)
    tensors = layout.tensors(shape)
    inputs = ["patches", "patches.bias", "class_token"] if patch else ["embedding"]
    expected = dict.fromkeys([*inputs, "positions"], 2.5) | ({} if tied else {"unembedding": 0.6})
    expected |= {f"blocks.{i}.{w}{b}": 1 / 3 for i in (0, 1) for w in ("attn.o", "mlp.down") for b in ("", ".bias")}
    expected |= dict.fromkeys(["final_norm", "final_norm.bias"][: tied * (1 + (norm == "layernorm"))], 0.24)
    found = fold_factors(describe_uses(tensors, tied), TRUE)
    assert {name: factor for name, factor in found.items() if factor != 1} == pytest.approx(expected, rel=1e-15)
    assert list(found) == [tensor.name for tensor in tensors]
    # a norm directly on the embeddings takes the input's factor, and the table none
    uses = [TensorUse("table", "embedding", tied=True), TensorUse("norm", "norm", in_first_sum=True)]
    uses += [TensorUse("final", "norm", feeds_head=True), TensorUse("o", "hidden", writes_residual=True)]
    assert fold_factors(uses, TRUE) == {"table": 1, "norm": TRUE.input, "final": TRUE.output, "o": TRUE.residual}


FACTORS, VALUES = st.floats(2.0**-20, 2.0**20), st.just(0.0) | st.floats(1e-12, 1e3)
ROWS = st.builds(Numbers, *[VALUES] * 3, st.none() | VALUES, st.none() | VALUES)


@given(ROWS, FACTORS, FACTORS, st.sampled_from(["adamw", "sgd"]))
def test_two_folds_are_one_and_a_fold_by_one_is_none(row: Numbers, a: float, b: float, optimizer: str) -> None:
    twice, once = fold(fold(row, a, optimizer), b, optimizer), fold(row, a * b, optimizer)
    for name, value in vars(once).items():
        assert getattr(twice, name) == (value and pytest.approx(value, rel=1e-14, abs=0)), name
    assert repr(fold(row, 1.0, optimizer)) == repr(row)


def test_two_uses_of_one_tensor_need_one_factor() -> None:
    """A factor of 1 is one too: what the first activations are multiplied by must not reach a residual branch."""
    both = TensorUse("shared", "embedding", in_first_sum=True, writes_residual=True)
    head = TensorUse("head", "unembedding", leaves_model=True)
    assert fold_each([both, head], 1.0, 2.0, 1.0) == ({"head": 2.0}, {})
    with pytest.raises(InputError, match=r"^shared: its uses need the factors \[2\.0, 1\.0\]"):
        fold_each([both, head], 2.0, 1.0, 1.0)
    tied = [TensorUse(name, "embedding", in_first_sum=True, tied=True, m_d=m_d) for name, m_d in (("a", 2), ("b", 4))]
    with pytest.raises(InputError, match=r"^a, b: 2 tied heads, but 0 norms before a head"):
        fold_each(tied, 1.0, 1.0, 1.0)
