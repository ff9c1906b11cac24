"""An independent statement of the scaling rules as a table of exponents, from the papers' tables; it imports nothing of supar_cli.

A number is its tuned value times a product of ratios, each to a power that the table names:

    own      of the tensor's own extent that scales: the fan-in of weights that are multiplied, the extent of all others
    fan_out  of the tensor's own fan-out (hidden weights)
    out      in the multiplier of the product that leaves the model
    density  of the tensor's density, in rates and decays to the power of the density exponent
    depth    of the number of layers
    ratio    of the rate of the embeddings that are summed first to all others', under every parameterization; the untied
             weight of a product that leaves the model has one too

Where density moves while training, the init has that of step 0.

Sources: Dey, Bergsma, Hestness 2024 (arXiv 2405.15743), Table 1, D.3.1 and D.4; Yang et al. 2022 (arXiv 2203.03466), Table 8
with the forward 1/m_d, where SGD's rate of a matrix has fan-out over fan-in and that of a vector its own extent; CompleteP
with α = 1; ε follows the gradients, and so the multiplier of what leaves the model. Edition 1 of the rules had ε by the
tensor's own fan-in and SGD's rate of a matrix without its extents, which is the same where all ratios of width are equal.
What a parameterization does not correct for has the ratio 1, so each line is written once, for SμPar.
"""

from __future__ import annotations

from math import prod

Exponents = dict[str, float]

# the ratios that a parameterization corrects for, in the init and in the rate, which the decay and ε follow
WIDTHS = {"own", "fan_out", "out", "depth"}
SEEN_BY_INIT = {
    "sp": set[str](),
    "sp-si": {"density"},
    "mup": WIDTHS,
    "supar": WIDTHS | {"density"},
    "supar-init-only": WIDTHS | {"density"},
    "supar-lr-only": WIDTHS,
}
SEEN_BY_RATE = {**SEEN_BY_INIT, "sp-si": set[str](), "supar-init-only": WIDTHS, "supar-lr-only": WIDTHS | {"density"}}

# of σ; gains and biases don't vary
INIT: dict[str, Exponents] = {"embedding": {}, "hidden": {"own": -0.5, "density": -0.5}, "unembedding": {}}
VECTORS = ("embedding", "bias", "norm", "unembedding")
RATE: dict[tuple[str, int], dict[str, Exponents]] = {
    # the depth rule's m_L^(α - 1) is m_L^0
    ("adamw", 2): {**{role: {} for role in VECTORS}, "hidden": {"own": -1, "density": -1}},
    ("sgd", 2): {**{role: {"own": 1} for role in VECTORS}, "hidden": {"fan_out": 1, "own": -1, "density": -1}},
}
RATE["adamw", 1] = RATE["adamw", 2]
RATE["sgd", 1] = {**RATE["sgd", 2], "hidden": {"density": -1}}
DECAY_SHARE = {"independent": 1.0, "sqrt": 0.5, "coupled": 0.0}  # how much of the rate's exponents λ undoes
DECAYS = {"embedding", "hidden", "unembedding"}
EPSILON: dict[int, Exponents] = {1: {"own": -1}, 2: {"out": -1}}
EPSILON_IN_BLOCK: Exponents = {"depth": -1}

# exponents of α_input and α_output, and of d_head
INPUT = {"sp": 0, "sp-si": 0, "mup": 1, "supar": 1, "supar-init-only": 1, "supar-lr-only": 1}
ATTENTION = {"sp": -0.5, "sp-si": -0.5, "mup": -1, "supar": -1, "supar-init-only": -1, "supar-lr-only": -1}
OUTPUT: Exponents = {"own": -1}
RESIDUAL: Exponents = {"depth": -1}


def scale(ratios: dict[str, float], exponents: Exponents, seen: set[str], share: float = 1.0) -> float:
    return prod(ratios[name] ** (share * exponent) for name, exponent in exponents.items() if name in seen)


def numbers(
    *,
    name: str,
    optimizer: str,
    weight_decay_rule: str,
    depth_rule: str,
    residual_init: str,
    unembedding_init: str,
    density_exponent: float,
    edition: int,
    role: str,
    m_d: float,
    m_out: float,
    m_fan_out: float | None,
    m_rho: float,
    m_rho_start: float | None,
    m_L: float,
    layers: int,
    in_block: bool,
    writes_residual: bool,
    after_head: bool,
    first_sum: bool,
    head: bool,
    sigma: float,
    eta: float,
    lam: float,
    eps: float,
    ratio: float,
    head_ratio: float,
) -> dict[str, float]:
    """init_std, lr, weight_decay and eps of one tensor."""
    ratios = {
        "own": m_d,
        "fan_out": m_d if m_fan_out is None else m_fan_out,
        "out": m_out,
        "density": m_rho if m_rho_start is None else m_rho_start,  # of hidden weights alone
        "depth": m_L if depth_rule == "completep" else 1.0,
        "ratio": {("embedding", first_sum): ratio, ("unembedding", head): head_ratio}.get((role, True), 1.0),
    }
    std = sigma * scale(ratios, INIT[role], SEEN_BY_INIT[name]) if role in INIT else 0.0
    if role == "unembedding" and unembedding_init == "zero":
        std = 0.0
    if role == "hidden" and writes_residual and residual_init == "gpt2":
        std *= (2 * layers) ** -0.5
    ratios["density"] = m_rho**density_exponent  # of rates and decays alone
    rate, epsilon = RATE[optimizer, edition][role], EPSILON[edition] | (EPSILON_IN_BLOCK if in_block else {})
    if after_head and edition == 2:  # behind the product that leaves the model the gradient is the loss's own
        rate, epsilon = {}, {}
    rate, seen = {**rate, "ratio": 1}, SEEN_BY_RATE[name] | {"ratio"}
    decay = scale(ratios, rate, seen, -DECAY_SHARE[weight_decay_rule])
    return {
        "init_std": std,
        "lr": eta * scale(ratios, rate, seen),
        "weight_decay": lam * decay if role in DECAYS else 0.0,
        "eps": eps * scale(ratios, epsilon, seen) if optimizer == "adamw" else 0.0,
    }


def forward(
    *, name: str, depth_rule: str, alpha_input: float, alpha_output: float, m_d: float, m_L: float, d_head: int
) -> dict[str, float]:
    """The constant factors: on embeddings, on logits, on q·k, on residual branches."""
    ratios, seen = {"own": m_d, "depth": m_L if depth_rule == "completep" else 1.0}, SEEN_BY_RATE[name]
    return {
        "input": float(alpha_input ** INPUT[name]),
        "output": float(alpha_output ** INPUT[name] * scale(ratios, OUTPUT, seen)),
        "attention": float(d_head ** ATTENTION[name]),
        "residual": scale(ratios, RESIDUAL, seen),
    }
