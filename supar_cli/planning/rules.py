"""The scaling rules of SP, μP, SμPar and its two halves: what one tensor's init scale, learning rate, decay and epsilon are, and why.

Symbols, as in Dey, Bergsma, Hestness, "Sparse maximal update parameterization" (NeurIPS 2024, arXiv 2405.15743), [P]:

    sigma   init standard deviation of the proxy        m_d     width multiplier: fan-in / proxy fan-in; for tensors
    eta     learning rate of the proxy                          that are not hidden, the d_model ratio
    lam     weight decay of the proxy                   m_rho   density multiplier: density / proxy density
    eps     Adam epsilon of the proxy                   m_L     depth multiplier: layers / proxy layers

Other sources: [R] EleutherAI/nanoGPT-mup, branch supar; [C] the same, branch completep (CompleteP, alpha = 1);
[V] Tensor Programs V, arXiv 2203.03466; [D] derived by supar. Only + - × ÷ and sqrt, so results are the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

Role = Literal["embedding", "hidden", "norm", "bias", "unembedding"]
ParameterizationName = Literal["supar", "mup", "sp", "supar-init-only", "supar-lr-only"]
Optimizer = Literal["adamw", "sgd"]
DecayRule = Literal["independent", "coupled", "sqrt"]
DepthRule = Literal["none", "completep"]
ResidualInit = Literal["gpt2", "none"]
UnembeddingInit = Literal["normal", "zero"]


@dataclass(frozen=True)
class Rule:
    """A resolved number with the formula that gave it and the formula's source."""

    value: float
    formula: str
    source: str


@dataclass(frozen=True)
class Scheme:
    """Which rules apply: the parameterization, the optimizer and the options that change a number."""

    name: ParameterizationName
    optimizer: Optimizer = "adamw"
    weight_decay_rule: DecayRule = "independent"
    depth_rule: DepthRule = "none"
    residual_init: ResidualInit = "none"
    unembedding_init: UnembeddingInit = "normal"


@dataclass(frozen=True)
class ProxyValues:
    """The tuned hyperparameters of the proxy."""

    sigma: float
    eta: float
    lam: float
    eps: float


@dataclass(frozen=True)
class TensorContext:
    """What the rules need to know of one tensor: its role, its multipliers, and what the depth and residual options ask of it."""

    role: Role
    m_d: float
    m_rho: float = 1.0
    m_L: float = 1.0
    layers: int = 1
    in_block: bool = False
    writes_residual: bool = False


# Which parameterizations correct for density, and where: the two halves of SμPar are ablations, each right alone where the
# other is wrong. The decay follows the rate. μP corrects for none.
_DENSITY_IN_INIT = ("supar", "supar-init-only")
_DENSITY_IN_RATE = ("supar", "supar-lr-only")


def _density(corrected: bool, context: TensorContext) -> float:
    """m_rho as it enters the formulas of hidden weights, the only sparse ones."""
    return context.m_rho if corrected else 1.0


def init_std(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> Rule:
    """Standard deviation of the initial values. [P Table 1; residual_init: R; zero unembedding: V]"""
    if context.role == "norm":
        return Rule(0.0, "0: every gain starts at exactly 1", "P Table 1")
    if context.role == "bias":
        return Rule(0.0, "0: every bias starts at exactly 0", "P Table 1")
    if context.role == "unembedding" and scheme.unembedding_init == "zero":
        return Rule(0.0, "0 (unembedding_init: zero)", "V App. D.2")
    if context.role != "hidden":
        return Rule(proxy.sigma, "σ", "P Table 1")
    value, formula, source = proxy.sigma, "σ", "SP"
    if scheme.name != "sp":
        by_density = scheme.name in _DENSITY_IN_INIT
        value = proxy.sigma / sqrt(context.m_d * _density(by_density, context))
        formula, source = ("σ/√(m_d·m_ρ)", "P Table 1") if by_density else ("σ/√m_d", "V Table 8")
    if scheme.residual_init == "gpt2" and context.writes_residual:
        value, formula, source = value / sqrt(2.0 * context.layers), formula + " /√(2·layers)", source + ", R"
    return Rule(value, formula, source)


def learning_rate(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> Rule:
    """Peak learning rate. [P Table 1; SGD: P D.3.1, V; depth: C, where alpha = 1 makes the factor m_L^0 = 1]"""
    by_density = scheme.name in _DENSITY_IN_RATE
    m_d, m_rho = context.m_d, _density(by_density, context)
    if scheme.name == "sp":
        return Rule(proxy.eta, "η", "SP")
    if scheme.optimizer == "adamw":
        if context.role != "hidden":
            return Rule(proxy.eta, "η", "P Table 1")
        value = proxy.eta / (m_d * m_rho)
        return Rule(value, *(("η/(m_d·m_ρ)", "P Table 1") if by_density else ("η/m_d", "V Table 8")))
    if context.role != "hidden":
        return Rule(proxy.eta * m_d, "η·m_d", "V Table 8 with the forward 1/m_d")
    return Rule(proxy.eta / m_rho, *(("η/m_ρ", "P D.3.1") if by_density else ("η", "V Table 8")))


def weight_decay(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> Rule:
    """Decay λ as PyTorch applies it, shrinking by lr·λ a step. [independent: V; coupled: R; sqrt: arXiv 2510.15262]"""
    if context.role in ("bias", "norm"):
        return Rule(0.0, "0: biases and gains do not decay", "P Table 1")
    follows = scheme.name in _DENSITY_IN_RATE
    m_d, m_rho = context.m_d, _density(follows, context)
    if context.role == "hidden":
        divisor = m_d * m_rho if scheme.optimizer == "adamw" else m_rho
        symbol = "·".join(["m_d"] * (scheme.optimizer == "adamw") + ["m_ρ"] * follows)
    elif scheme.optimizer == "sgd":
        divisor, symbol = 1.0 / m_d, "(1/m_d)"
    else:
        divisor, symbol = 1.0, ""
    if scheme.weight_decay_rule == "coupled" or not symbol or scheme.name == "sp":
        return Rule(proxy.lam, "λ", "R" if scheme.weight_decay_rule == "coupled" else "V")
    if scheme.weight_decay_rule == "sqrt":
        return Rule(proxy.lam * sqrt(divisor), f"λ·√({symbol})", "arXiv 2510.15262")
    return Rule(proxy.lam * divisor, f"λ·{symbol}, so that lr·λ is the proxy's", "V, D")


def adam_eps(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> Rule:
    """Adam's epsilon, scaled like the gradients, which the output multiplier makes Θ(1/m_d). [C; without m_rho: D]"""
    if scheme.optimizer == "sgd":
        return Rule(0.0, "0: SGD has no epsilon", "–")
    if scheme.name == "sp":
        return Rule(proxy.eps, "ε", "SP")
    if context.in_block and scheme.depth_rule == "completep":
        return Rule(proxy.eps / (context.m_d * context.m_L), "ε/(m_d·m_L)", "C")
    return Rule(proxy.eps / context.m_d, "ε/m_d", "C, D")


def input_multiplier(scheme: Scheme, alpha_input: float) -> Rule:
    """Factor on the sum of token and position embedding. [P Table 1]"""
    return Rule(1.0, "1", "SP") if scheme.name == "sp" else Rule(alpha_input, "α_input", "P Table 1")


def output_multiplier(scheme: Scheme, alpha_output: float, m_d: float) -> Rule:
    """Factor on the logits, inside the head. `m_d` is the d_model ratio. [P Table 1]"""
    return Rule(1.0, "1", "SP") if scheme.name == "sp" else Rule(alpha_output / m_d, "α_output/m_d", "P Table 1")


def attention_multiplier(scheme: Scheme, head_width: int) -> Rule:
    """Factor on q·k. [P Table 1]"""
    if scheme.name == "sp":
        return Rule(1.0 / sqrt(head_width), "1/√d_head", "SP")
    return Rule(1.0 / head_width, "1/d_head", "P Table 1")


def residual_multiplier(scheme: Scheme, m_L: float) -> Rule:
    """Factor on each residual branch. [C, alpha = 1]"""
    if scheme.name != "sp" and scheme.depth_rule == "completep":
        return Rule(1.0 / m_L, "1/m_L", "C")
    return Rule(1.0, "1", "–")
