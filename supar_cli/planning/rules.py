"""The scaling rules of SP, μP, SμPar and their halves: what one tensor's init scale, learning rate, decay and epsilon are, and why.

Symbols, as in Dey, Bergsma, Hestness, "Sparse maximal update parameterization" (NeurIPS 2024, arXiv 2405.15743), [P]; each m
is a ratio of the tensor's, or the model's, to the proxy's:

    sigma   init standard deviation of the proxy        m_d        of the tensor's own extent that scales, see TensorContext
    eta     learning rate of the proxy                  m_fan_out  of the tensor's own fan-out
    lam     weight decay of the proxy                   m_out      in the multiplier of the product that leaves the model
    eps     Adam epsilon of the proxy                   m_rho      of the tensor's own density
    beta    density exponent of the rate, 1 in [P]      m_L        of the number of layers
    r       ratio of the rate of embeddings to eta      kappa      ratio of the rate of an untied head to eta

Other sources: [R] EleutherAI/nanoGPT-mup, branch supar; [C] the same, branch completep (CompleteP, alpha = 1);
[V] Tensor Programs V, arXiv 2203.03466; [E] Evci et al. 2022, arXiv 2010.03533; [D] derived by supar. Only + - × ÷ and
sqrt, and `power` for other exponents, so results are the same everywhere.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction
from math import inf, isfinite, sqrt
from sys import float_info
from typing import Literal, NamedTuple

Role = Literal["embedding", "hidden", "norm", "bias", "unembedding"]
ParameterizationName = Literal["supar", "mup", "sp", "sp-si", "supar-init-only", "supar-lr-only"]
Optimizer = Literal["adamw", "sgd"]
DecayRule = Literal["independent", "coupled", "sqrt"]
DepthRule = Literal["none", "completep"]
ResidualInit = Literal["gpt2", "none"]
UnembeddingInit = Literal["normal", "zero"]
Edition = Literal[1, 2]


OPTIONS = ("weight_decay_rule", "depth_rule", "residual_init", "unembedding_init")  # of Scheme, as documents name them
STARTS = {"norm": 1.0, "bias": 0.0}  # where every gain and every bias starts [P Table 1]


class Rule(NamedTuple):
    """A resolved number with the formula that gave it, the formula's source, and a remark on it."""

    value: float
    formula: str
    source: str
    why: str = ""


@dataclass(frozen=True)
class Scheme:
    """Which rules apply: the parameterization, the optimizer and the options that change a number.

    `density_exponent` is β: rates and decays have m_rho^β where [P] has m_rho. The init keeps √m_rho at any β, because the
    variance of a sum follows from the number of its terms alone. Where density moves while training, the init is asked with
    the m_rho of step 0, and the rate and the decay with that of the end [D].

    `edition` 1 has the rules of plans written before 2: epsilon by the tensor's own m_d, and a rate under SGD that
    leaves fan-out and fan-in of hidden weights out; `after_head` means nothing to it. For all other tensors the editions
    differ only where m_fan_out or m_out is not m_d, and elsewhere agree bit for bit.
    """

    name: ParameterizationName
    optimizer: Optimizer = "adamw"
    weight_decay_rule: DecayRule = "independent"
    depth_rule: DepthRule = "none"
    residual_init: ResidualInit = "none"
    unembedding_init: UnembeddingInit = "normal"
    density_exponent: float = 1.0
    edition: Edition = 2


@dataclass(frozen=True)
class ProxyValues:
    """The tuned hyperparameters of the proxy. `ratio` is that of the rate of embeddings to `eta`, `head_ratio` of the head's."""

    sigma: float
    eta: float
    lam: float
    eps: float
    ratio: float = 1.0
    head_ratio: float = 1.0


@dataclass(frozen=True)
class TensorContext:
    """What the rules need to know of one tensor: its role, its ratios to the proxy's, and its options.

    `m_d` is the ratio of the tensor's own extent that scales: the fan-in of hidden weights and unembeddings, and the one
    extent of embeddings, biases and gains (d_ff's of the up projection's bias); 1 where none scales. Edition 1 took d_model's
    ratio for all tensors that are not hidden.
    `m_fan_out` is the ratio of a hidden weight's own fan-out; None means m_d.
    `m_out` is the ratio in the multiplier of the product that leaves the model, d_model's in a decoder; 1 without such a
    product, and the smallest of several. It is a number of the model, the same for all its tensors.
    `m_rho` is the density ratio at the end of training, `m_rho_start` that of step 0, None where it is the same.
    `after_head` marks what is added to the result of that product or scales it, such as the head's own bias.
    `first_sum` marks the embeddings whose sum is the first activation, those of tokens and positions, `head` the weight of
    a product that leaves the model.
    """

    role: Role
    m_d: float
    _: KW_ONLY
    m_out: float
    m_fan_out: float | None = None
    m_rho: float = 1.0
    m_rho_start: float | None = None
    m_L: float = 1.0
    layers: int = 1
    in_block: bool = False
    writes_residual: bool = False
    after_head: bool = False
    first_sum: bool = False
    head: bool = False

    @property
    def fan_out(self) -> float:
        """m_fan_out, or m_d if none was given."""
        return self.m_d if self.m_fan_out is None else self.m_fan_out


# 50 digits: a double has 17, so the rounding to a double decides, and its result is the nearest one. No traps: a result
# beyond every double is an infinity, which `power` names.
_DECIMAL = Context(prec=50, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
_EXACT_EXPONENT = 1024  # chosen: no double but 1 stays finite in larger ones, and the fractions stay short


def power(base: float, exponent: float) -> float:
    """base^exponent, the nearest double to it, so that it is the same on every machine.

    C's `pow` is not: libraries differ in the last bit. Whole exponents are worked out by exact fractions, ½ is the square
    root of IEEE 754, which is correctly rounded everywhere, and all others have 50 digits before they are rounded.

    Raises ValueError for a base that is not above 0 or numbers that are not finite, OverflowError beyond the largest double.
    """
    if not (0 < base < inf and isfinite(exponent)):
        raise ValueError(f"{base!r} to the power of {exponent!r}; expected a finite base above 0 and a finite exponent")
    if exponent == 0.5:
        return sqrt(base)
    if exponent == int(exponent) and abs(exponent) <= _EXACT_EXPONENT:
        exact = Fraction(base) ** int(exponent)
        result = float(exact) if exact <= float_info.max else inf
    else:
        result = float(_DECIMAL.power(Decimal(base), Decimal(exponent)))
    if result == inf:
        raise OverflowError(f"{base!r} to the power of {exponent!r} is beyond the largest double")
    return result


# Which parameterizations correct for width at all, for density in the init and for density in the rate, which the decay
# follows. The halves of SμPar and SP with sparse-aware init are ablations. μP corrects for width alone.
SP = ("sp", "sp-si")
_DENSITY_IN_INIT = ("supar", "supar-init-only", "sp-si")
DENSITY_IN_RATE = ("supar", "supar-lr-only")


def init_std(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> Rule:
    """Standard deviation of the initial values. [P Table 1; residual_init: R; zero unembedding: V]"""
    if context.role == "norm":
        return Rule(0.0, "0", "P Table 1", "every gain starts at exactly 1")
    if context.role == "bias":
        return Rule(0.0, "0", "P Table 1", "every bias starts at exactly 0")
    if context.role == "unembedding" and scheme.unembedding_init == "zero":
        return Rule(0.0, "0", "V App. D.2", "unembedding_init: zero")
    if context.role != "hidden":
        return Rule(proxy.sigma, "σ", "P Table 1")
    by_width, by_density, start = scheme.name not in SP, scheme.name in _DENSITY_IN_INIT, context.m_rho_start
    m_rho = (context.m_rho if start is None else start) if by_density else 1.0
    value = proxy.sigma / sqrt((context.m_d if by_width else 1.0) * m_rho)
    symbols = ["m_d"] * by_width + ["m_ρ" if start is None else "m_ρ,start"] * by_density
    formula = f"σ/√({'·'.join(symbols)})" if len(symbols) > 1 else "/√".join(["σ", *symbols])
    source = ("P Table 1" if by_density else "V Table 8") if by_width else "E" if by_density else "SP"
    source = "D" if by_density and start is not None else source
    if scheme.residual_init == "gpt2" and context.writes_residual:
        value, formula, source = value / sqrt(2.0 * context.layers), formula + " /√(2·layers)", source + ", R"
    return Rule(value, formula, source)


def _hidden_divisor(scheme: Scheme, context: TensorContext) -> tuple[float, list[str], list[str]]:
    """What the rate of a hidden weight is divided by: the number, and its symbols above and below η's fraction bar.

    Under SGD a step is as large as the gradient, and V assumes the gradient of an output to be Θ(1/fan-out). [P Table 1, D.3.1; V]
    That holds if fan-out scales with d_model. At an FFN ratio changed by r, ΔY of the down projection is constant; that of the up
    projection moves as √r at the first step and less later (edition 1: as r, and as 1/√r) [D, measured at widths to 256].
    """
    follows = scheme.name in DENSITY_IN_RATE
    m_rho = power(context.m_rho, scheme.density_exponent) if follows else 1.0
    symbols = [] if not follows else ["m_ρ"] if scheme.density_exponent == 1 else ["m_ρ^β"]
    if scheme.optimizer == "adamw":
        return context.m_d * m_rho, [], ["m_d", *symbols]
    if scheme.edition == 1:
        return m_rho, [], symbols
    # the ratio first: it is exactly 1 where both are equal, and then the numbers are those of edition 1
    return context.m_d / context.fan_out * m_rho, ["m_fan_out"], ["m_d", *symbols]


def _fraction(above: list[str], below: list[str]) -> str:
    """`η/(m_d·m_ρ)` from its symbols."""
    bar = "/({})" if len(below) > 1 else "/{}" if below else ""
    return "·".join(above) + bar.format("·".join(below))


_AFTER_HEAD = "the output multiplier is not in its gradient"


def _is_after_head(scheme: Scheme, context: TensorContext) -> bool:
    """Whether the multiplier of what leaves the model is absent from the tensor's gradient, which then is Θ(1). [D]"""
    return context.after_head and scheme.edition == 2


def learning_rate(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> Rule:
    """Peak learning rate. [P Table 1; SGD: P D.3.1, V; depth: C, where alpha = 1 makes the factor m_L^0 = 1; ratio: D]"""
    rule, (ratio, symbol, key) = _rate_without_ratio(scheme, proxy, context), _own_ratio(proxy, context)
    return rule if ratio == 1 else Rule(rule.value * ratio, f"{rule.formula}·{symbol}", "D", f"{symbol} is {key}")


def _own_ratio(proxy: ProxyValues, context: TensorContext) -> tuple[float, str, str]:
    """The factor on a tensor's rate under any parameterization, at every width and density; its symbol and its key. [D]"""
    if context.role == "embedding" and context.first_sum:
        return proxy.ratio, "r", "embedding_lr_ratio"
    if context.role == "unembedding" and context.head:
        return proxy.head_ratio, "κ", "head_lr_ratio"
    return 1.0, "", ""


def _rate_without_ratio(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> Rule:
    if scheme.name in SP:
        return Rule(proxy.eta, "η", "SP")
    if context.role == "hidden":
        divisor, above, below = _hidden_divisor(scheme, context)
        source = "P Table 1" if scheme.optimizer == "adamw" else "P D.3.1, V" if above else "P D.3.1"
        source = source if scheme.name in DENSITY_IN_RATE else "V Table 8"
        return Rule(proxy.eta / divisor, _fraction(["η", *above], below), source)
    if scheme.optimizer == "adamw":
        return Rule(proxy.eta, "η", "P Table 1")
    if _is_after_head(scheme, context):
        return Rule(proxy.eta, "η", "D", _AFTER_HEAD)
    return Rule(proxy.eta * context.m_d, "η·m_d", "V Table 8 with the forward 1/m_d")


def weight_decay(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> Rule:
    """Decay λ as PyTorch applies it, shrinking by lr·λ a step. [independent: V; coupled: R; sqrt: arXiv 2510.15262]"""
    if context.role in ("bias", "norm"):
        return Rule(0.0, "0", "P Table 1", "biases and gains do not decay")
    divisor, symbol, factors = 1.0, "", []
    if context.role == "hidden" and scheme.name not in SP:
        divisor, above, below = _hidden_divisor(scheme, context)
        symbol = _fraction(below, above)
    elif scheme.optimizer == "sgd" and not _is_after_head(scheme, context) and scheme.name not in SP:
        divisor, factors = 1.0 / context.m_d, ["m_d"]
    ratio, ratio_symbol, _ = _own_ratio(proxy, context)
    if ratio != 1:
        divisor, factors = divisor / ratio, [*factors, ratio_symbol]
    symbol = f"({_fraction(['1'], factors)})" if factors else symbol
    if scheme.weight_decay_rule == "coupled" or not symbol:
        return Rule(proxy.lam, "λ", "R" if scheme.weight_decay_rule == "coupled" else "V")
    if scheme.weight_decay_rule == "sqrt":
        return Rule(proxy.lam * sqrt(divisor), f"λ·√({symbol})", "arXiv 2510.15262")
    return Rule(proxy.lam * divisor, f"λ·{symbol}", "V, D", "so that lr·λ equals the proxy's")


def adam_eps(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> Rule:
    """Adam's epsilon, scaled like the gradients, which the output multiplier makes Θ(1/m_out). [C; without m_rho: D]"""
    if scheme.optimizer == "sgd":
        return Rule(0.0, "0", "–", "SGD has no epsilon")
    if scheme.name in SP:
        return Rule(proxy.eps, "ε", "SP")
    if _is_after_head(scheme, context):
        return Rule(proxy.eps, "ε", "D", _AFTER_HEAD)
    divisor, symbol = (context.m_d, "m_d") if scheme.edition == 1 else (context.m_out, "m_out")
    if context.in_block and scheme.depth_rule == "completep":
        return Rule(proxy.eps / (divisor * context.m_L), f"ε/({symbol}·m_L)", "C")
    return Rule(proxy.eps / divisor, f"ε/{symbol}", "C, D")


def tensor_rules(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> dict[str, Rule]:
    """The numbers of one tensor by their names in a plan."""
    return {
        "init_std": init_std(scheme, proxy, context),
        "lr": learning_rate(scheme, proxy, context),
        "weight_decay": weight_decay(scheme, proxy, context),
        "eps": adam_eps(scheme, proxy, context),
    }


def because(scheme: Scheme, proxy: ProxyValues, context: TensorContext) -> dict[str, float]:
    """The ratios that a tensor's numbers come from, those of its output only where they differ from m_d."""
    found = {"m_d": context.m_d}
    if scheme.edition == 2 and scheme.name not in SP:
        by_output = {"m_out": context.m_out} if scheme.optimizer == "adamw" else {"m_fan_out": context.fan_out}
        found |= {key: value for key, value in by_output.items() if value != context.m_d}
    if context.role == "hidden":
        found["m_rho"] = context.m_rho
        if context.m_rho_start is not None:
            found["m_rho_start"] = context.m_rho_start
    if scheme.depth_rule == "completep" and context.in_block:
        found["m_L"] = context.m_L
    if (ratio := _own_ratio(proxy, context)[0]) != 1:
        found["lr_ratio"] = ratio
    return found


def forward_rules(
    scheme: Scheme, alpha_input: float, alpha_output: float, m_d: float, m_L: float, head_width: int
) -> dict[str, Rule]:
    """The factors of the forward pass by their names in a plan. [P Table 1; residual: C, alpha = 1]

    `input` is on the sum of token and position embedding, `output` on the logits, inside the head, `m_d` being the ratio of
    the head's fan-in, `attention` on q·k, and `residual` on each residual branch.
    """
    if scheme.name in SP:
        one, attention = Rule(1.0, "1", "SP"), Rule(1.0 / sqrt(head_width), "1/√d_head", "SP")
        return {"input": one, "output": one, "attention": attention, "residual": Rule(1.0, "1", "–")}
    by_depth = scheme.depth_rule == "completep"
    return {
        "input": Rule(alpha_input, "α_input", "P Table 1"),
        "output": Rule(alpha_output / m_d, "α_output/m_d", "P Table 1"),
        "attention": Rule(1.0 / head_width, "1/d_head", "P Table 1"),
        "residual": Rule(1.0 / m_L, "1/m_L", "C") if by_depth else Rule(1.0, "1", "–"),
    }
