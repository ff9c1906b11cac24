"""Planted faults in the text of rules.py, each of which must leave the independent table."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from supar_cli.planning import rules

from .test_rules import disagreements

# (text in rules.py, what stands there instead)
MUTANTS = [
    ('SP = ("sp", "sp-si")', 'SP = ("sp",)'),
    ('SP = ("sp", "sp-si")', 'SP = ("sp-si",)'),
    ('_DENSITY_IN_INIT = ("supar", "supar-init-only", "sp-si")', '_DENSITY_IN_INIT = ("supar", "sp-si")'),
    ('_DENSITY_IN_INIT = ("supar", "supar-init-only", "sp-si")', '_DENSITY_IN_INIT = ("supar", "supar-init-only")'),
    ('"supar-init-only", "sp-si")', '"supar-init-only", "sp-si", "sp")'),
    ('"supar-init-only", "sp-si")', '"supar-init-only", "sp-si", "mup")'),
    ('"supar-init-only", "sp-si")', '"supar-init-only", "sp-si", "supar-lr-only")'),
    ('DENSITY_IN_RATE = ("supar", "supar-lr-only")', 'DENSITY_IN_RATE = ("supar",)'),
    ('DENSITY_IN_RATE = ("supar", "supar-lr-only")', 'DENSITY_IN_RATE = ("supar", "supar-init-only")'),
    ('DENSITY_IN_RATE = ("supar", "supar-lr-only")', 'DENSITY_IN_RATE = ("supar", "supar-lr-only", "mup")'),
    ("follows = scheme.name in DENSITY_IN_RATE", "follows = scheme.name in _DENSITY_IN_INIT"),
    ("follows = scheme.name in DENSITY_IN_RATE", "follows = True"),
    ("follows = scheme.name in DENSITY_IN_RATE", "follows = False"),
    (
        "by_density, start = scheme.name not in SP, scheme.name in _DENSITY",
        "by_density, start = True, scheme.name in _DENSITY",
    ),
    (
        "by_density, start = scheme.name not in SP, scheme.name in _DENSITY_IN_INIT",
        "by_density, start = scheme.name not in SP, True",
    ),
    (
        "by_density, start = scheme.name not in SP, scheme.name in _DENSITY_IN_INIT",
        "by_density, start = scheme.name not in SP, scheme.name in DENSITY_IN_RATE",
    ),
    ("context.m_rho if start is None else start", "context.m_rho"),
    ("context.m_rho if start is None else start", "start or 1.0"),
    ("power(context.m_rho, scheme.density", "power(context.m_rho_start or context.m_rho, scheme.density"),
    ("else 1.0) * m_rho)", "else 1.0) * power(m_rho, scheme.density_exponent))"),
    ("sqrt((context.m_d if by_width", "((context.m_d if by_width"),
    ("sqrt((context.m_d if by_width else 1.0) * m_rho", "sqrt(m_rho"),
    ("sqrt((context.m_d if by_width else 1.0) * m_rho", "sqrt((context.m_d if by_width else 1.0) / m_rho"),
    ("(context.m_d if by_width else 1.0)", "(context.m_out if by_width else 1.0)"),
    ("(context.m_d if by_width else 1.0)", "(context.fan_out if by_width else 1.0)"),
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
    ('Rule(0.0, "0", "P Table 1", "every gain', 'Rule(proxy.sigma, "0", "P Table 1", "every gain'),
    ('Rule(0.0, "0", "P Table 1", "every bias', 'Rule(proxy.sigma, "0", "P Table 1", "every bias'),
    ("power(context.m_rho, scheme.density_exponent) if follows", "context.m_rho if follows"),
    (
        "power(context.m_rho, scheme.density_exponent) if follows",
        "power(scheme.density_exponent, context.m_rho) if follows",
    ),
    ("return context.m_d * m_rho, []", "return context.m_d, []"),
    ("return context.m_d * m_rho, []", "return m_rho, []"),
    ("return context.m_d * m_rho, []", "return sqrt(context.m_d * m_rho), []"),
    ("return context.m_d * m_rho, []", "return context.m_d / m_rho, []"),
    ("return context.m_d * m_rho, []", "return context.m_out * m_rho, []"),
    ("return context.m_d * m_rho, []", "return context.m_d / context.fan_out * m_rho, []"),
    ("return m_rho, [], symbols", "return 1.0, [], symbols"),
    ("return m_rho, [], symbols", "return context.m_d * m_rho, [], symbols"),
    ("return m_rho, [], symbols", "return context.m_d / context.fan_out * m_rho, [], symbols"),
    ("context.m_d / context.fan_out * m_rho", "context.m_d / context.fan_out"),
    ("context.m_d / context.fan_out * m_rho", "context.fan_out / context.m_d * m_rho"),
    ("context.m_d / context.fan_out * m_rho", "sqrt(context.m_d / context.fan_out) * m_rho"),
    ("context.m_d / context.fan_out * m_rho", "context.m_d * m_rho"),
    ("context.m_d / context.fan_out * m_rho", "context.m_d / context.m_out * m_rho"),
    ("context.m_d / context.fan_out * m_rho", "context.m_out / context.fan_out * m_rho"),
    ("context.m_d / context.fan_out * m_rho", "m_rho"),
    ("self.m_d if self.m_fan_out is None", "1.0 if self.m_fan_out is None"),
    ("self.m_d if self.m_fan_out is None else self.m_fan_out", "self.m_d"),
    (
        'if scheme.optimizer == "adamw":\n        return context.m_d',
        'if scheme.optimizer == "sgd":\n        return context.m_d',
    ),
    ("    if scheme.edition == 1:\n        return m_rho", "    if scheme.edition == 2:\n        return m_rho"),
    ("    if scheme.edition == 1:\n        return m_rho", "    if False:\n        return m_rho"),
    ("return context.after_head and scheme.edition == 2", "return context.after_head"),
    ("return context.after_head and scheme.edition == 2", "return False"),
    ("return context.after_head and scheme.edition == 2", "return scheme.edition == 2"),
    ('context.role == "embedding" and context.first_sum', 'context.role == "embedding"'),
    ('context.role == "embedding" and context.first_sum', "context.first_sum"),
    ('context.role == "unembedding" and context.head', 'context.role == "unembedding"'),
    ('context.role == "unembedding" and context.head', "context.head"),
    ('return proxy.head_ratio, "κ"', 'return proxy.ratio, "κ"'),
    ("Rule(rule.value * ratio", "Rule(rule.value / ratio"),
    ("Rule(rule.value * ratio", "Rule(rule.value"),
    ("divisor / ratio", "divisor * ratio"),
    ("divisor / ratio", "divisor"),
    ("divisor / ratio", "1.0 / ratio"),
    ('Rule(proxy.eta, "η", "D"', 'Rule(proxy.eta * context.m_d, "η", "D"'),
    (
        'if context.role == "hidden":\n        divisor, above, below',
        'if context.role in ("hidden", "unembedding"):\n        divisor, above, below',
    ),
    ("Rule(proxy.eta / divisor", "Rule(proxy.eta * divisor"),
    ('Rule(proxy.eta * context.m_d, "η·m_d"', 'Rule(proxy.eta, "η·m_d"'),
    ('Rule(proxy.eta * context.m_d, "η·m_d"', 'Rule(proxy.eta / context.m_d, "η·m_d"'),
    ('Rule(proxy.eta * context.m_d, "η·m_d"', 'Rule(proxy.eta * context.m_out, "η·m_d"'),
    ('if context.role in ("bias", "norm")', 'if context.role == "bias"'),
    ('if context.role in ("bias", "norm")', 'if context.role == "norm"'),
    ("divisor, factors = 1.0 / context.m_d", "divisor, factors = 1.0"),
    ("divisor, factors = 1.0 / context.m_d", "divisor, factors = context.m_d"),
    ("divisor, factors = 1.0 / context.m_d", "divisor, factors = 1.0 / context.m_out"),
    ('scheme.optimizer == "sgd" and not _is_after_head(scheme, context) and', 'scheme.optimizer == "sgd" and'),
    ('scheme.optimizer == "sgd" and not _is_after_head(scheme, context)', "not _is_after_head(scheme, context)"),
    ("not _is_after_head(scheme, context) and scheme.name not in SP", "not _is_after_head(scheme, context)"),
    ('context.role == "hidden" and scheme.name not in SP', 'context.role == "hidden"'),
    ('scheme.weight_decay_rule == "coupled" or not', "not"),
    ("proxy.lam * sqrt(divisor)", "proxy.lam * divisor"),
    ("Rule(proxy.lam * divisor, f", "Rule(proxy.lam / divisor, f"),
    ("Rule(proxy.lam * divisor, f", "Rule(proxy.lam, f"),
    ("proxy.eps / (divisor * context.m_L)", "proxy.eps / divisor"),
    ("proxy.eps / (divisor * context.m_L)", "proxy.eps / (divisor / context.m_L)"),
    ("if context.in_block and scheme.depth_rule", "if scheme.depth_rule"),
    ('if context.in_block and scheme.depth_rule == "completep"', "if context.in_block"),
    ("Rule(proxy.eps / divisor, ", "Rule(proxy.eps, "),
    ("Rule(proxy.eps / divisor, ", "Rule(proxy.eps / (divisor * context.m_rho), "),
    ('(context.m_d, "m_d") if scheme.edition == 1', '(context.m_out, "m_d") if scheme.edition == 1'),
    ('else (context.m_out, "m_out")', 'else (context.m_d, "m_out")'),
    ('else (context.m_out, "m_out")', 'else (context.fan_out, "m_out")'),
    ('"m_d") if scheme.edition == 1', '"m_d") if scheme.edition == 2'),
    (
        'else (context.m_out, "m_out")',
        'else ((context.m_d if context.role == "hidden" else context.m_out), "m_out")',
    ),
    ('Rule(proxy.eps, "ε", "SP")', 'Rule(proxy.eps / context.m_out, "ε", "SP")'),
    ('Rule(proxy.eps, "ε", "D"', 'Rule(proxy.eps / context.m_out, "ε", "D"'),
    ("Fraction(base) ** int(exponent)", "Fraction(base) ** (int(exponent) + 1)"),
    ("_DECIMAL.power(Decimal(base), Decimal(exponent))", "_DECIMAL.power(Decimal(base), Decimal(-exponent))"),
    ('{"input": one, "output"', '{"input": Rule(alpha_input, "", ""), "output"'),
    ('"output": one, "attention"', '"output": Rule(alpha_output / m_d, "", ""), "attention"'),
    ("Rule(alpha_output / m_d", "Rule(alpha_output"),
    ("Rule(alpha_output / m_d", "Rule(alpha_output / sqrt(m_d)"),
    ("Rule(1.0 / sqrt(head_width)", "Rule(1.0 / head_width"),
    ('"attention": Rule(1.0 / head_width', '"attention": Rule(1.0 / sqrt(head_width)'),
    ("Rule(1.0 / m_L", "Rule(1.0 / sqrt(m_L)"),
    ("Rule(1.0 / m_L", "Rule(1.0"),
    ('"residual": Rule(1.0, "1", "–")}', '"residual": Rule(1.0 / m_L, "", "")}'),
    ('by_depth = scheme.depth_rule == "completep"', "by_depth = True"),
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
