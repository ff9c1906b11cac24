"""Forward multipliers moved into tensors' init, rate, decay and epsilon, so that models without them train the same.

For models that supar did not make (`fold_each`) and for export (`fold_factors`): supar's own models have the multipliers.

Derived by supar: A parameter w that the forward pass uses as W = a·w is replaced by u = a·w.
Gradients obey g_w = a·g_u, so with the numbers of `fold` u equals a·w at every step, exactly in real numbers. The
multipliers are those of Dey et al. 2024 (arXiv 2405.15743, Table 1). Only + - × ÷, so results are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, sqrt

from supar_cli.errors import InputError
from supar_cli.planning import layout
from supar_cli.planning.plan_sections import Multipliers, PlanModel
from supar_cli.planning.rules import Role

_EXACT = ("adamw", "adam", "sgd")


@dataclass(frozen=True)
class Numbers:
    """How one tensor starts and trains: peak rate, decay as PyTorch applies it, Adam's epsilon (SGD: unused), start.

    The start has mean `init_constant` and standard deviation `init_std`. None: not given. If both are None, the
    values of the model's constructor are kept and multiplied by the factor when the model is prepared.
    """

    lr: float
    weight_decay: float
    eps: float
    init_std: float | None = None
    init_constant: float | None = None


@dataclass(frozen=True)
class TensorUse:
    """What the forward pass does with one tensor. If any flag is set, the flags together name every use of it.

    `in_first_sum`: a summand of the first activations, or gain or shift of a norm directly on their sum (then not the
    summands). `writes_residual`: weight or bias of the last product of a residual branch. `tied`: also the weight of
    the head. `feeds_head`: gain or shift of a norm whose result only the head reads. `derived`: not used as it is
    (1 + g). `leaves_model`: the weight of a product that leaves the model; an unembedding without it is an inner readout.
    `m_d` is its ratio to the proxy's, `multiply_at` the module whose input takes a tied head's multiplier if no norm can.
    """

    name: str
    role: Role
    in_first_sum: bool = False
    writes_residual: bool = False
    tied: bool = False
    feeds_head: bool = False
    derived: bool = False
    leaves_model: bool = False
    m_d: float = 1.0
    multiply_at: str | None = None


def fold(numbers: Numbers, factor: float, optimizer: str) -> Numbers:
    """Return the numbers of u = a·w from those of w, for a forward factor a > 0. [D]

    AdamW, and Adam without decay: init a·s, rate a·η, decay λ/a, epsilon ε/a. SGD, with momentum or without: a·s, a²·η,
    λ/a². `optimizer`: in any case of letters. Clipping needs `clip_factor` too. InputError: a factor that is not finite
    or not above 0; another optimizer.
    """
    _require_factor("fold factor", factor)
    kind = optimizer.lower()
    if kind not in _EXACT or (kind == "adam" and numbers.weight_decay != 0):
        said = "Adam with coupled weight decay" if kind == "adam" else optimizer
        known = "AdamW, Adam without weight decay and SGD"
        raise InputError(f"{said}: multipliers fold exactly only for {known}; the plan can give masks but no numbers")
    lr, weight_decay, eps = factor * numbers.lr, numbers.weight_decay / factor, numbers.eps / factor
    if kind == "sgd":
        lr, weight_decay, eps = factor * lr, weight_decay / factor, numbers.eps
    std, constant = (None if start is None else factor * start for start in (numbers.init_std, numbers.init_constant))
    return Numbers(lr, weight_decay, eps, std, constant)


def clip_factor(factor: float) -> float:
    """Return the factor on a tensor's gradient in the global norm that clipping compares: the fold a itself. [D]

    Clipping by the global norm is not invariant under folding: the norm of all g_w is the norm of all a·g_u, since
    g_w = a·g_u. So take √(Σ ‖a·g_u‖²) over the tensors, each with its own a, and then multiply the plain g_u by the
    common clipping coefficient. InputError: a factor that is not finite or not above 0.
    """
    _require_factor("fold factor", factor)
    return factor


def fold_factors(uses: Iterable[TensorUse], multipliers: Multipliers) -> dict[str, float]:
    """Return {name: a} for every tensor of a decoder, a = 1 where nothing is folded. [multipliers: Dey et al. 2024; D]

    The multipliers are α_input, α_output/m_d and 1/m_L; the attention factor is never folded.

    Input: into all summands of the first activations. Output: into the weight of an untied head; for a tied head, whose
    weight holds the input factor already, output/input into gain and shift of the norm that feeds it. Residual: into
    weights and biases that write the residual stream. A bias of the head is outside of the product and keeps 1.
    InputError names every tensor into which a factor other than 1 can't go, and every such factor without a tensor.
    """
    rows = list(uses)
    for name in ("input", "output", "residual"):
        _require_factor(f"multipliers.{name}", getattr(multipliers, name))
    problems: list[str] = []
    heads = [row for row in rows if row.tied or row.role == "unembedding"]
    output, carriers = multipliers.output, heads
    tied = next((row for row in heads if row.tied), None)
    if tied is not None:
        output = multipliers.output / (multipliers.input if tied.in_first_sum else 1.0)
        _require_factor("multipliers.output / multipliers.input", output)
        carriers = [row for row in rows if row.feeds_head]
        if len(heads) > 1:
            problems.append(f"{tied.name}: a tied head and {len(heads) - 1} more; expected a single head")
        if output != 1 and not any(row.role == "norm" for row in carriers):
            why = "it is also the weight of the head, and no norm with a gain feeds the head alone"
            problems.append(f"{tied.name}: {why}; multiply the logits by {output!r} in the forward pass")
    places = (
        ("input", multipliers.input, [row for row in rows if row.in_first_sum]),
        ("residual", multipliers.residual, [row for row in rows if row.writes_residual]),
        ("output", output, carriers),
    )
    asked: dict[str, float] = {}
    for what, factor, takers in places:
        if factor != 1 and not takers and not (what == "output" and tied):
            problems.append(f"multipliers.{what}: no tensor can take the factor {factor!r}; expected 1")
        for row in takers:
            if row.derived and factor != 1:
                why = "as the forward pass uses a value derived from it (such as 1 + g)"
                problems.append(f"{row.name}: the {what} multiplier can't be folded into this tensor, {why}")
            if asked.setdefault(row.name, factor) != factor:
                problems.append(f"{row.name}: its two uses need the factors {asked[row.name]!r} and {factor!r}")
    if problems:
        raise InputError(*problems)
    return {row.name: asked.get(row.name, 1.0) for row in rows}


def fold_each(
    uses: Iterable[TensorUse], alpha_input: float, alpha_output: float, residual: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return {name: a} of the tensors of any model that a multiplier goes into, and {module: a} for what can't be folded. [D]

    As `fold_factors`, but every head has the multiplier α_output/m_d of its own fan-in, and an inner readout 1/m_d. If no
    norm with a plain gain feeds a tied head alone, the factor goes to the input of the module `multiply_at`, or under
    `""`, to be applied by the user's forward pass. InputError names everything that can't have its factor.
    """
    rows = list(uses)
    factors: dict[str, list[float]] = {}
    hooks: dict[str, float] = {}
    problems: list[str] = []
    heads = [row for row in rows if row.tied or row.leaves_model]
    outputs = {
        row.name: alpha_output / row.m_d / (alpha_input if row.in_first_sum else 1.0) for row in rows if row.tied
    }
    for row in rows:
        wanted = []
        if row.feeds_head and not row.derived:
            wanted += [outputs[head.name] for head in rows if head.tied and head.multiply_at is None]
        if row.in_first_sum:
            wanted.append(alpha_input)
        if row.writes_residual:
            wanted.append(residual)
        if row.role == "unembedding":
            wanted.append((alpha_output if row.leaves_model else 1.0) / row.m_d)
        if len(set(wanted)) > 1:  # 1 too: what one use asks for would reach the other
            problems.append(f"{row.name}: its uses need the factors {wanted}")
        if row.derived and not row.feeds_head and any(factor != 1 for factor in wanted):
            problems.append(
                f"{row.name}: {wanted} can't be folded into a tensor that the forward pass uses derived (1 + g)"
            )
        factors.setdefault(row.name, []).extend(wanted)
    if alpha_input != 1 and not any(row.in_first_sum for row in rows):
        problems.append(f"hyperparameters.alpha_input: no tensor can take the factor {alpha_input!r}; expected 1")
    if alpha_output != 1 and not heads:
        problems.append(f"hyperparameters.alpha_output: no tensor can take the factor {alpha_output!r}; expected 1")
    problems += _unfolded_heads(rows, outputs, hooks)
    if residual != 1 and not any(row.writes_residual for row in rows):
        what = f"no tensor writes the residual stream, so none can take the factor {residual!r} of its branches"
        problems.append(f"parameterization.depth_rule: {what}; expected none")
    asked = {name: [factor for factor in found if factor != 1] for name, found in factors.items()}
    problems += [f"{name}: its uses need the factors {found}" for name, found in asked.items() if len(set(found)) > 1]
    if problems:
        raise InputError(*dict.fromkeys(problems))
    folds = {name: found[0] for name, found in asked.items() if found}
    return folds, {place: factor for place, factor in hooks.items() if factor != 1}


def _unfolded_heads(rows: list[TensorUse], outputs: dict[str, float], hooks: dict[str, float]) -> list[str]:
    """Add to `hooks` the factors of tied heads that no norm can take. Returns what is wrong with them."""
    norms = [row for row in rows if row.feeds_head and row.role == "norm" and not row.derived]
    heads = [row for row in rows if row.tied and row.multiply_at is None]
    for row in rows:
        if row.tied and row.multiply_at is not None and outputs[row.name] != 1:
            hooks[row.multiply_at] = outputs[row.name]
    if len(norms) >= len(heads):
        if len({outputs[row.name] for row in heads}) > 1:
            what = f"their multipliers are {', '.join(f'{outputs[row.name]:g}' for row in heads)}"
            return [f"{', '.join(row.name for row in heads)}: {what}; expected one, or modules in multiply_at"]
        return []
    if norms or len({outputs[row.name] for row in heads}) > 1:
        count = f"{len(norms)} norm{'s' * (len(norms) != 1)}"
        what = f"{len(heads)} tied heads, but {count} before a head"
        return [f"{', '.join(row.name for row in heads)}: {what}; expected the module of each in multiply_at"]
    if outputs[heads[0].name] != 1:
        hooks[""] = outputs[heads[0].name]
    return []


def describe_uses(tensors: Iterable[layout.Tensor], tied: bool) -> list[TensorUse]:
    """Describe the tensors of supar's own families, which are known by role and site."""
    rows = list(tensors)
    writers = {row.site for row in rows if row.writes_residual}
    writers |= {f"{site}.bias" for site in writers}
    return [
        TensorUse(
            name=row.name,
            role=row.role,
            in_first_sum=row.role == "embedding" or row.site == "patches.bias",
            writes_residual=row.site in writers,
            tied=tied and row.site == "embedding",
            feeds_head=row.site in ("final_norm", "final_norm.bias"),
        )
        for row in rows
    ]


def standard_factors(model: PlanModel) -> dict[str, float]:
    """Return {name: a} for every tensor of a decoder of supar's families, as a model without multipliers needs them. [D]

    Such a model multiplies neither embeddings, residual branches nor logits, and its attention divides by √(head width): so
    queries, weight and bias, take the attention factor times √(head width). InputError as `fold_factors`.
    """
    rows = layout.tensors(model)
    found = fold_factors(describe_uses(rows, model.tied), model.multipliers)
    queries = model.multipliers.attention * sqrt(model.head_width)
    return {row.name: queries if row.site in ("attn.q", "attn.q.bias") else found[row.name] for row in rows}


def _require_factor(what: str, factor: float) -> None:
    if not isfinite(factor) or factor <= 0:
        raise InputError(f"{what}: {factor!r}; expected a finite number above 0")
