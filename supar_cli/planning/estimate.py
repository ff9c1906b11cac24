"""Estimates of what training a plan takes in memory, from arithmetic alone."""

from __future__ import annotations

from supar_cli.planning.plan import Plan


def state_bytes(plan: Plan, engine: str, number_bytes: int) -> int:
    """Bytes of weights, gradients, AdamW's moments and indices under an engine; `number_bytes` of the precision.

    Activations are not among them.
    """
    masked = [row for row in plan.tensors if row.kept < row.size]
    size, live = sum(row.size for row in masked), sum(row.kept for row in masked)
    rest = 16 * (plan.parameters - size)  # float32 weight, gradient and two moments
    # a live weight: value, gradient, two moments, and its index, three for the sparse engine; dense has each position's
    # weight and gradient besides; the indices of blocks are a share of 1/block
    return rest + {
        "dense": 2 * number_bytes * size + 20 * live,
        "sparse": 28 * live,
        "block": 16 * live,
    }.get(engine, 2 * number_bytes * size + 20 * live)


def activation_bytes(plan: Plan, rows: int, number_bytes: int) -> int:
    """Bytes of what is kept for the backward pass of `rows` sequences, the logits in float32 with their gradient."""
    return rows * plan.model.context * (numbers_between(plan) * number_bytes + plan.model.vocab * 8)


def numbers_between(plan: Plan) -> int:
    """Numbers a token that the blocks keep."""
    return plan.model.layers * (8 * plan.model.width + 3 * plan.model.ffn_width)
