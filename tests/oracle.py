"""An independent statement of the scaling rules as a table of exponents, from the paper's tables; it imports nothing of supar_cli.

A number is its tuned value times m_d^a · m_ρ^b · m_L^c. Sources as in Dey, Bergsma, Hestness 2024 (arXiv 2405.15743), Table 1,
D.3.1 and D.4, Yang et al. 2022 (arXiv 2203.03466), Table 8 with the forward 1/m_d, and CompleteP with α = 1. What a
parameterization does not correct for has the multiplier 1, so each line is written once, for SμPar.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# which of (m_d, m_ρ, m_L) a parameterization corrects for, in the init and in the rate, which the decay follows
SEEN_BY_INIT = {
    "sp": (0, 0, 0),
    "mup": (1, 0, 1),
    "supar": (1, 1, 1),
    "supar-init-only": (1, 1, 1),
    "supar-lr-only": (1, 0, 1),
}
SEEN_BY_RATE = {**SEEN_BY_INIT, "supar-init-only": (1, 0, 1), "supar-lr-only": (1, 1, 1)}

INIT = {
    "embedding": (0, 0, 0),
    "hidden": (-0.5, -0.5, 0),
    "unembedding": (0, 0, 0),
}  # of σ; gains and biases don't vary
RATE = {
    # the depth rule's m_L^(α - 1) is m_L^0
    "adamw": {
        "embedding": (0, 0, 0),
        "hidden": (-1, -1, 0),
        "bias": (0, 0, 0),
        "norm": (0, 0, 0),
        "unembedding": (0, 0, 0),
    },
    "sgd": {
        "embedding": (1, 0, 0),
        "hidden": (0, -1, 0),
        "bias": (1, 0, 0),
        "norm": (1, 0, 0),
        "unembedding": (1, 0, 0),
    },
}
DECAY_SHARE = {"independent": 1.0, "sqrt": 0.5, "coupled": 0.0}  # how much of the rate's exponents λ undoes
DECAYS = {"embedding", "hidden", "unembedding"}
EPSILON, EPSILON_IN_BLOCK = (-1, 0, 0), (-1, 0, -1)

# exponents of α_input and α_output, and of d_head
INPUT = {"sp": 0, "mup": 1, "supar": 1, "supar-init-only": 1, "supar-lr-only": 1}
ATTENTION = {"sp": -0.5, "mup": -1, "supar": -1, "supar-init-only": -1, "supar-lr-only": -1}
OUTPUT, RESIDUAL = (-1, 0, 0), (0, 0, -1)


def numbers(
    *,
    name: str,
    optimizer: str,
    weight_decay_rule: str,
    depth_rule: str,
    residual_init: str,
    unembedding_init: str,
    role: str,
    m_d: float,
    m_rho: float,
    m_L: float,
    layers: int,
    in_block: bool,
    writes_residual: bool,
    sigma: float,
    eta: float,
    lam: float,
    eps: float,
) -> dict[str, float]:
    """init_std, lr, weight_decay and eps of one tensor."""
    density = m_rho if role == "hidden" else 1.0
    base = np.array([m_d, density, m_L if depth_rule == "completep" else 1.0])
    by_init, by_rate = np.array(SEEN_BY_INIT[name]), np.array(SEEN_BY_RATE[name])

    def scaled(value: float, exponents: tuple[float, float, float], seen: Any = by_rate, share: float = 1.0) -> float:
        return float(value * np.prod(base ** (share * seen * np.array(exponents))))

    std = scaled(sigma, INIT[role], by_init) if role in INIT else 0.0
    if role == "unembedding" and unembedding_init == "zero":
        std = 0.0
    if role == "hidden" and writes_residual and residual_init == "gpt2":
        std *= (2 * layers) ** -0.5
    rate = RATE[optimizer][role]
    epsilon = EPSILON_IN_BLOCK if in_block else EPSILON
    return {
        "init_std": std,
        "lr": scaled(eta, rate),
        "weight_decay": scaled(lam, rate, share=-DECAY_SHARE[weight_decay_rule]) if role in DECAYS else 0.0,
        "eps": scaled(eps, epsilon) if optimizer == "adamw" else 0.0,
    }


def forward(
    *, name: str, depth_rule: str, alpha_input: float, alpha_output: float, m_d: float, m_L: float, d_head: int
) -> dict[str, float]:
    """The constant factors: on embeddings, on logits, on q·k, on residual branches."""
    base = np.array([m_d, 1.0, m_L if depth_rule == "completep" else 1.0])
    seen = np.array(SEEN_BY_RATE[name])  # no exponent of m_ρ here
    return {
        "input": float(alpha_input ** INPUT[name]),
        "output": float(alpha_output ** INPUT[name] * np.prod(base ** (seen * np.array(OUTPUT)))),
        "attention": float(d_head ** ATTENTION[name]),
        "residual": float(np.prod(base ** (seen * np.array(RESIDUAL)))),
    }
