"""The rules against an independent table, against Microsoft's `mup`, and against planted faults of their own source."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import nan, sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import mup
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from supar_cli.planning import rules

from . import oracle
from .conftest import plan_from, proxy_fields

NAMES = ("sp", "mup", "supar", "supar-init-only", "supar-lr-only")
OPTIMIZERS, DEPTHS = ("adamw", "sgd"), ("none", "completep")
DECAYS, RESIDUALS, UNEMBEDDINGS = ("independent", "coupled", "sqrt"), ("none", "gpt2"), ("normal", "zero")
# (role, in a block, writes to the residual stream)
PLACES = [
    ("embedding", False, False),
    ("hidden", True, False),
    ("hidden", True, True),
    ("norm", True, False),
    ("norm", False, False),
    ("bias", True, False),
    ("bias", False, False),
    ("unembedding", False, False),
]
TUNED = rules.ProxyValues(sigma=0.08665602, eta=1.62e-2, lam=0.1, eps=1e-8)
TOLERANCE = 1e-12  # relative: a few roundings of a double, far below any exponent's effect


def numbers_of(module: Any, scheme: Any, proxy: Any, context: Any) -> dict[str, float]:
    return {
        "init_std": module.init_std(scheme, proxy, context).value,
        "lr": module.learning_rate(scheme, proxy, context).value,
        "weight_decay": module.weight_decay(scheme, proxy, context).value,
        "eps": module.adam_eps(scheme, proxy, context).value,
    }


def forward_of(module: Any, scheme: Any, m_d: float, m_L: float) -> dict[str, float]:
    return {
        "input": module.input_multiplier(scheme, 9.1705).value,
        "output": module.output_multiplier(scheme, 1.0951835, m_d).value,
        "attention": module.attention_multiplier(scheme, 64).value,
        "residual": module.residual_multiplier(scheme, m_L).value,
    }


def expected(scheme: Any, context: Any, proxy: Any = TUNED) -> dict[str, float]:
    return oracle.numbers(**vars(scheme), **vars(context), **vars(proxy))


def differing(found: dict[str, float], wanted: dict[str, float]) -> list[str]:
    return [
        f"{what}: {found[what]!r}, the table has {wanted[what]!r}"
        for what in wanted
        if not abs(found[what] - wanted[what]) <= TOLERANCE * abs(wanted[what])
    ]


def disagreements(module: Any) -> Iterator[str]:
    """Where a module of rules leaves the table, over every option and three sets of multipliers."""
    for options in product(NAMES, OPTIMIZERS, DECAYS, DEPTHS, RESIDUALS, UNEMBEDDINGS):
        scheme = module.Scheme(*options)
        for (role, in_block, writes), (m_d, m_rho, m_L) in product(PLACES, ((8.0, 1 / 128, 3.0), (0.5, 0.3, 0.25))):
            context = module.TensorContext(role, m_d, m_rho, m_L, 12, in_block, writes)
            for line in differing(numbers_of(module, scheme, TUNED, context), expected(scheme, context)):
                yield f"{scheme} {context}: {line}"
        for m_d, m_L in ((8.0, 3.0), (0.5, 0.25)):
            wanted = oracle.forward(
                name=scheme.name,
                depth_rule=scheme.depth_rule,
                alpha_input=9.1705,
                alpha_output=1.0951835,
                m_d=m_d,
                m_L=m_L,
                d_head=64,
            )
            for line in differing(forward_of(module, scheme, m_d, m_L), wanted):
                yield f"{scheme} m_d {m_d} m_L {m_L}: {line}"


def test_the_rules_are_the_tables() -> None:
    assert list(disagreements(rules)) == []


multiplier = st.floats(2.0**-12, 2.0**12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.tuples(*map(st.sampled_from, (NAMES, OPTIMIZERS, DECAYS, DEPTHS, RESIDUALS, UNEMBEDDINGS))),
    st.sampled_from(PLACES),
    st.tuples(multiplier, st.floats(2.0**-12, 4.0), multiplier, st.integers(1, 200)),
    st.builds(rules.ProxyValues, *(st.floats(1e-10, 10.0) for _ in range(4))),
)
def test_at_any_multiplier_too(options: Any, where: Any, multipliers: Any, proxy: rules.ProxyValues) -> None:
    scheme, context = rules.Scheme(*options), rules.TensorContext(where[0], *multipliers, *where[1:])
    assert differing(numbers_of(rules, scheme, proxy, context), expected(scheme, context, proxy)) == []


@pytest.mark.parametrize("options", list(product(OPTIMIZERS, DECAYS, DEPTHS, RESIDUALS, UNEMBEDDINGS)))
def test_at_the_proxys_density_supar_and_its_halves_are_mup_bit_for_bit(options: Any) -> None:
    for (role, in_block, writes), m_d, m_L in product(PLACES, (3.0, 8.0, 0.7), (1.0, 2.5)):
        context = rules.TensorContext(role, m_d, 1.0, m_L, 12, in_block, writes)
        found = [numbers_of(rules, rules.Scheme(name, *options), TUNED, context) for name in NAMES[1:]]
        assert all(other == found[0] for other in found)
        forward = [forward_of(rules, rules.Scheme(name, *options), m_d, m_L) for name in NAMES[1:]]
        assert all(other == forward[0] for other in forward)


def test_whole_plans_of_supar_and_mup_agree_bit_for_bit_when_dense(text_file: Path) -> None:
    dense = proxy_fields(str(text_file), target={"width": 96, "sparsity": {"density": 1.0}})
    supar, mup_plan = plan_from(dense, "supar"), plan_from(dense, "mup")
    assert supar.tensors == [
        row.model_copy(update={"because": other.because})
        for row, other in zip(mup_plan.tensors, supar.tensors, strict=True)
    ]
    assert supar.model == mup_plan.model
    sparse = proxy_fields(str(text_file), target={"width": 96, "sparsity": {"density": 0.5}})
    assert [row.lr for row in plan_from(sparse, "supar").tensors] != [
        row.lr for row in plan_from(sparse, "mup").tensors
    ]


def test_the_decay_timescales_of_a_lambda_left_alone_and_of_one_corrected() -> None:
    """arXiv 2405.15743's proxy at λ = 0.1 and m_d = 8: 1/(lr·λ) falls from 4938 steps to 39 at density 2^-7."""

    def timescale(rule: Any, m_rho: float) -> float:
        scheme, context = rules.Scheme("supar", weight_decay_rule=rule), rules.TensorContext("hidden", 8.0, m_rho)
        found = numbers_of(rules, scheme, TUNED, context)
        return 1 / (found["lr"] * found["weight_decay"])

    assert round(timescale("coupled", 1.0)) == 4938
    assert round(timescale("coupled", 2.0**-7)) == 39
    proxys = 1 / (TUNED.eta * TUNED.lam)
    assert timescale("independent", 1.0) == pytest.approx(proxys) == timescale("independent", 2.0**-7)
    assert timescale("sqrt", 2.0**-7) == pytest.approx(sqrt(timescale("coupled", 2.0**-7) * proxys))


def worked_out(formula: str, symbols: dict[str, float]) -> float:
    """The number that a formula's own text gives."""
    text = re.split(r": |, | \(", formula)[0]
    text = re.sub(r"√(\w+)", r"√(\1)", text).replace("√", "sqrt").replace("·", "*")
    return float(eval(text, {"sqrt": sqrt, **symbols}))


def test_every_formula_says_what_was_computed() -> None:
    made = 0
    for options in product(NAMES, OPTIMIZERS, DECAYS, DEPTHS, RESIDUALS, UNEMBEDDINGS):
        scheme = rules.Scheme(*options)  # type: ignore[arg-type]
        for role, in_block, writes in PLACES:
            context = rules.TensorContext(role, 8.0, 1 / 128, 3.0, 12, in_block, writes)  # type: ignore[arg-type]
            symbols = {"σ": TUNED.sigma, "η": TUNED.eta, "λ": TUNED.lam, "ε": TUNED.eps}
            symbols |= {"m_d": 8.0, "m_ρ": 1 / 128 if role == "hidden" else nan, "m_L": 3.0, "layers": 12}
            for rule in (rules.init_std, rules.learning_rate, rules.weight_decay, rules.adam_eps):
                found = rule(scheme, TUNED, context)
                assert worked_out(found.formula, symbols) == pytest.approx(found.value, rel=TOLERANCE), (
                    scheme,
                    context,
                )
                made += 1
    assert made == 5 * 2 * 3 * 2 * 2 * 2 * 8 * 4


# Planted faults: (text in rules.py, what stands there instead). Each must leave the table.
MUTANTS = [
    ("context.m_rho if corrected else 1.0", "context.m_rho"),
    ("context.m_rho if corrected else 1.0", "1.0"),
    ('_DENSITY_IN_INIT = ("supar", "supar-init-only")', '_DENSITY_IN_INIT = ("supar",)'),
    ('_DENSITY_IN_INIT = ("supar", "supar-init-only")', '_DENSITY_IN_INIT = ("supar", "supar-lr-only")'),
    ('_DENSITY_IN_INIT = ("supar", "supar-init-only")', '_DENSITY_IN_INIT = ("supar", "supar-init-only", "mup")'),
    ('_DENSITY_IN_RATE = ("supar", "supar-lr-only")', '_DENSITY_IN_RATE = ("supar",)'),
    ('_DENSITY_IN_RATE = ("supar", "supar-lr-only")', '_DENSITY_IN_RATE = ("supar", "supar-init-only")'),
    ('_DENSITY_IN_RATE = ("supar", "supar-lr-only")', '_DENSITY_IN_RATE = ("supar", "supar-lr-only", "mup")'),
    ("follows = scheme.name in _DENSITY_IN_RATE", "follows = scheme.name in _DENSITY_IN_INIT"),
    ("by_density = scheme.name in _DENSITY_IN_RATE", "by_density = scheme.name in _DENSITY_IN_INIT"),
    ("by_density = scheme.name in _DENSITY_IN_INIT", "by_density = scheme.name in _DENSITY_IN_RATE"),
    (
        "proxy.sigma / sqrt(context.m_d * _density(by_density, context))",
        "proxy.sigma / (context.m_d * _density(by_density, context))",
    ),
    ("proxy.sigma / sqrt(context.m_d * _density(by_density, context))", "proxy.sigma / sqrt(context.m_d)"),
    (
        "proxy.sigma / sqrt(context.m_d * _density(by_density, context))",
        "proxy.sigma / sqrt(_density(by_density, context))",
    ),
    (
        "proxy.sigma / sqrt(context.m_d * _density(by_density, context))",
        "proxy.sigma / sqrt(context.m_d / _density(by_density, context))",
    ),
    ("value / sqrt(2.0 * context.layers)", "value / sqrt(context.layers)"),
    ("value / sqrt(2.0 * context.layers)", "value / (2.0 * context.layers)"),
    ('scheme.residual_init == "gpt2" and context.writes_residual', 'scheme.residual_init == "gpt2"'),
    ('scheme.residual_init == "gpt2" and context.writes_residual', "context.writes_residual"),
    ('context.role == "unembedding" and scheme.unembedding_init == "zero"', 'scheme.unembedding_init == "zero"'),
    ('context.role == "unembedding" and scheme.unembedding_init == "zero"', 'context.role == "unembedding"'),
    (
        'if context.role != "hidden":\n        return Rule(proxy.sigma',
        'if context.role == "embedding":\n        return Rule(proxy.sigma',
    ),
    ('Rule(0.0, "0: every gain starts', 'Rule(proxy.sigma, "0: every gain starts'),
    ('Rule(0.0, "0: every bias starts', 'Rule(proxy.sigma, "0: every bias starts'),
    ("value = proxy.eta / (m_d * m_rho)", "value = proxy.eta / m_d"),
    ("value = proxy.eta / (m_d * m_rho)", "value = proxy.eta / m_rho"),
    ("value = proxy.eta / (m_d * m_rho)", "value = proxy.eta / sqrt(m_d * m_rho)"),
    ("value = proxy.eta / (m_d * m_rho)", "value = proxy.eta * m_rho / m_d"),
    (
        'if scheme.optimizer == "adamw":\n        if context.role != "hidden"',
        'if scheme.optimizer == "adamw":\n        if context.role not in ("hidden", "unembedding")',
    ),
    ('Rule(proxy.eta * m_d, "η·m_d"', 'Rule(proxy.eta, "η·m_d"'),
    ('Rule(proxy.eta * m_d, "η·m_d"', 'Rule(proxy.eta / m_d, "η·m_d"'),
    ("Rule(proxy.eta / m_rho, *", "Rule(proxy.eta / (m_d * m_rho), *"),
    ("Rule(proxy.eta / m_rho, *", "Rule(proxy.eta, *"),
    ('if context.role in ("bias", "norm")', 'if context.role == "bias"'),
    ('if context.role in ("bias", "norm")', 'if context.role == "norm"'),
    ("divisor = m_d * m_rho if scheme.optimizer", "divisor = m_d if scheme.optimizer"),
    ('divisor = m_d * m_rho if scheme.optimizer == "adamw" else m_rho', "divisor = m_d * m_rho"),
    ("divisor, symbol = 1.0 / m_d", "divisor, symbol = 1.0"),
    ("divisor, symbol = 1.0 / m_d", "divisor, symbol = m_d"),
    ('scheme.weight_decay_rule == "coupled" or not', "not"),
    ('or not symbol or scheme.name == "sp"', "or not symbol"),
    ('if scheme.name != "sp":\n        by_density', 'if scheme.name == "supar":\n        by_density'),
    ("proxy.lam * sqrt(divisor)", "proxy.lam * divisor"),
    ("Rule(proxy.lam * divisor, f", "Rule(proxy.lam / divisor, f"),
    ("Rule(proxy.lam * divisor, f", "Rule(proxy.lam, f"),
    ("proxy.eps / (context.m_d * context.m_L)", "proxy.eps / context.m_d"),
    ("proxy.eps / (context.m_d * context.m_L)", "proxy.eps / (context.m_d / context.m_L)"),
    ("if context.in_block and scheme.depth_rule", "if scheme.depth_rule"),
    ("Rule(proxy.eps / context.m_d, ", "Rule(proxy.eps, "),
    ("Rule(proxy.eps / context.m_d, ", "Rule(proxy.eps / (context.m_d * context.m_rho), "),
    ('Rule(proxy.eps, "ε", "SP")', 'Rule(proxy.eps / context.m_d, "ε", "SP")'),
    ('Rule(1.0, "1", "SP") if scheme.name == "sp" else Rule(alpha_input', "Rule(alpha_input"),
    ('Rule(1.0, "1", "SP") if scheme.name == "sp" else Rule(alpha_output', "Rule(alpha_output"),
    ("Rule(alpha_output / m_d", "Rule(alpha_output"),
    ("Rule(alpha_output / m_d", "Rule(alpha_output / sqrt(m_d)"),
    ("Rule(1.0 / sqrt(head_width)", "Rule(1.0 / head_width"),
    ("return Rule(1.0 / head_width", "return Rule(1.0 / sqrt(head_width)"),
    ("Rule(1.0 / m_L", "Rule(1.0 / sqrt(m_L)"),
    ("Rule(1.0 / m_L", "Rule(1.0"),
    (
        'if scheme.name != "sp" and scheme.depth_rule == "completep":\n        return Rule(1.0',
        'if scheme.depth_rule == "completep":\n        return Rule(1.0',
    ),
]
SOURCE = Path(rules.__file__).read_text("utf-8")


def compiled(source: str) -> ModuleType:
    """A module of rules from its source text."""
    module = ModuleType("planted_rules")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, "planted_rules.py", "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]
    return module


def test_the_source_itself_survives() -> None:
    assert next(disagreements(compiled(SOURCE)), None) is None


@pytest.mark.parametrize("fault", MUTANTS, ids=lambda fault: f"{fault[0][:40]} → {fault[1][:40]}")
def test_a_planted_fault_is_found(fault: tuple[str, str]) -> None:
    text, instead = fault
    assert SOURCE.count(text) == 1, "the fault names no single place of rules.py any more"
    assert next(disagreements(compiled(SOURCE.replace(text, instead))), None) is not None


class Little(nn.Module):
    """One tensor of every role that μP tells apart, as `mup` wants its models."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, ffn_width), nn.Linear(ffn_width, width, bias=False)
        self.readout = mup.MuReadout(width, 11, bias=False, output_mult=1.0951835)


# name in `Little` → role; fan-in ratios are d_model's but for `down`, whose own is its FFN's
ROLES = {
    "embedding.weight": "embedding",
    "norm.weight": "norm",
    "up.weight": "hidden",
    "up.bias": "bias",
    "down.weight": "hidden",
    "readout.weight": "unembedding",
}


def shaped(width: int, ffn_width: int) -> Little:
    model = Little(width, ffn_width)
    return mup.set_base_shapes(model, Little(32, 128), delta=Little(64, 256), do_assert=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("optimizer", "width", "ffn_width"), [("adamw", 256, 1024), ("adamw", 256, 512), ("sgd", 256, 1024)]
)
def test_mup_agrees_on_rates_and_decays(optimizer: str, width: int, ffn_width: int) -> None:
    model = shaped(width, ffn_width)
    make = mup.MuAdamW if optimizer == "adamw" else mup.MuSGD
    groups = make(model.parameters(), lr=TUNED.eta, weight_decay=TUNED.lam).param_groups
    by_id = {id(parameter): group for group in groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    assert set(ROLES) <= set(parameters)
    for name, role in ROLES.items():
        m_d = ffn_width / 128 if name == "down.weight" else width / 32
        context = rules.TensorContext(role, m_d)  # type: ignore[arg-type]
        found = numbers_of(rules, rules.Scheme("mup", optimizer), TUNED, context)  # type: ignore[arg-type]
        theirs = by_id[id(parameters[name])]
        assert theirs["lr"] == pytest.approx(found["lr"], rel=TOLERANCE), name
        if role not in ("bias", "norm"):  # `mup` leaves it to the user which tensors decay
            assert theirs["weight_decay"] == pytest.approx(found["weight_decay"], rel=TOLERANCE), name
        off = replace(context, m_d=2 * m_d)
        if found["lr"] != TUNED.eta:  # the comparison sees a wrong multiplier
            wrong = numbers_of(rules, rules.Scheme("mup", optimizer), TUNED, off)  # type: ignore[arg-type]
            assert theirs["lr"] != pytest.approx(wrong["lr"], rel=0.1)


def test_mup_agrees_on_init_and_the_output_multiplier() -> None:
    """n = 256·1024 and 256² normals: their deviations have relative standard errors of 0.14 % and 0.28 %; 6 of them are allowed."""
    torch.manual_seed(0)
    model = shaped(256, 1024)
    for name in ("up.weight", "down.weight", "embedding.weight"):
        parameter = dict(model.named_parameters())[name]
        mup.normal_(parameter, std=TUNED.sigma)
        context = rules.TensorContext(ROLES[name], 8.0)  # type: ignore[arg-type]
        wanted = rules.init_std(rules.Scheme("mup"), TUNED, context).value
        allowed = 6 / sqrt(2 * parameter.numel())
        assert float(parameter.detach().std()) == pytest.approx(wanted, rel=allowed), name
    x = torch.randn(3, 256)
    found = model.readout(x) / (x @ model.readout.weight.T)
    wanted = rules.output_multiplier(rules.Scheme("mup"), 1.0951835, 8.0).value
    assert torch.allclose(found, torch.full_like(found, wanted), rtol=1e-3)
