"""Pruning: how many weights of a run's tensors are to live, and the plan of the pruned net by the run's own rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supar_cli.errors import InputError, suggestion
from supar_cli.planning import layout
from supar_cli.planning.explain import Row, explain
from supar_cli.planning.live_counts import GivenMasks, live_counts
from supar_cli.planning.patterns import LiveCount
from supar_cli.planning.plan import Plan, PlanTensor
from supar_cli.planning.plan_sections import Parameterization, Values
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.spec import Sparsity

SCOPES = ("tensor", "global")
ONLY_RATES = {"supar", "mup", "supar-init-only", "supar-lr-only"}  # differ in nothing else once the values are given


def rules_of(plan: Plan, name: ParameterizationName | None) -> Parameterization:
    """A run's rules, or those of a name that differs from theirs in the rates alone. Raises InputError for another name."""
    own = plan.parameterization
    if name not in (None, own.name) and not {name, own.name} <= ONLY_RATES:
        what = f"the run's is {own.name}, which differs from {name} by more than the rates"
        raise InputError(f"parameterization: {what}; expected {own.name}")
    return own.model_copy(update={"name": name or own.name})


def live_by_group(plan: Plan, wanted: Sparsity, scope: str) -> list[dict[str, int]]:
    """How many weights of each hidden tensor are to live, in the groups of tensors that share one threshold.

    Tensors that the plan's `sparsity.overrides` name keep those densities. Raises InputError where more weights would live
    than do in the run, or as many.
    """
    if scope not in SCOPES:
        raise InputError(f"scope: {scope}; {suggestion(scope, SCOPES)}")
    overrides = plan.sparsity.overrides
    rows = {row.name: row for row in plan.tensors if row.role == "hidden"}
    wanted = wanted.model_copy(update={"overrides": overrides})
    counts = live_counts(list(rows.values()), wanted, "sparsity.overrides")
    is_free = {name: not overrides.keys() & set(layout.setting_names(row)) for name, row in rows.items()}
    groups = [{name: one.count} for name, one in counts.items() if scope == "tensor" or not is_free[name]]
    if scope == "global":
        groups.append({name: one.count for name, one in counts.items() if is_free[name]})
    problems, pruned = [], 0
    for group in groups:
        now, size, asked = sum(rows[n].kept for n in group), sum(rows[n].size for n in group), sum(group.values())
        pruned += now - asked
        if asked > now:
            what = f"{now:,} of {size:,} weights live in the run, fewer than the {asked:,} asked for"
            problems.append(f"{', '.join(group)}: {what}; expected a density below {now / size:.4g}")
    if problems or not pruned:
        raise InputError(*problems or ["density: no weight would be pruned; expected a lower one than the run has"])
    return groups


def plan_pruned(
    plan: Plan,
    masks: GivenMasks,
    values: Values,
    starts: Mapping[str, tuple[float, float | None]],
    parents: Mapping[str, str],
    rules: Parameterization,
) -> Plan:
    """The plan of a net with these masks that starts from these values; `plan` is that of the run they come from.

    `starts` are by tensor the root mean square of its values and the factor g that they were scaled by, None if not. Rates
    and decays move from the run's density to that of the masks as `rules` say; what was edited in the run's plan stays edited
    by the same factor.
    """
    counts = masks.counts([row for row in plan.tensors if row.role == "hidden"])
    rows = [_row(row, counts.get(row.name), *starts[row.name]) for row in plan.tensors]
    sparsity = masks.section(rows).model_copy(update={"overrides": plan.sparsity.overrides})
    known = {key: value for key, value in plan.parents.items() if key != "rewind"}  # that of an earlier round
    changes: dict[str, Any] = {"sparsity": sparsity, "values": values, "parents": {**known, **parents}}
    draft = plan.model_copy(update={**changes, "parameterization": rules, "tensors": rows})
    pairs = zip(explain(plan).rows, explain(draft).rows, strict=True)
    return Plan(**{**vars(draft), "tensors": [_with_rates(before, after) for before, after in pairs]})


def with_rate(plan: Plan, lr: float) -> Plan:
    """The plan with another tuned rate, and all rates in proportion: a pruned net has its values, and no proxy to plan from."""
    factor = lr / plan.hyperparameters.lr
    rows = [row.model_copy(update={"lr": row.lr * factor}) for row in plan.tensors]
    return plan.model_copy(
        update={"tensors": rows, "hyperparameters": plan.hyperparameters.model_copy(update={"lr": lr})}
    )


def _row(row: PlanTensor, count: LiveCount | None, size: float, gain: float | None) -> PlanTensor:
    """The row with its density, and the values that it starts from."""
    because = {key: value for key, value in row.because.items() if key != "g"}
    changes: dict[str, Any] = {"init": "file", "init_std": size, "init_constant": None, "because": because}
    if count is not None:
        because["m_rho"] = count.density / (
            row.density / because.get("m_rho", row.density)
        )  # the proxy's may be sparse
        changes |= {"density": count.density, "kept": count.count}
    if gain is not None:
        because["g"] = gain
    return row.model_copy(update=changes)


def _with_rates(before: Row, after: Row) -> PlanTensor:
    """The row after pruning with its rate and decay: those of the rules, by the factor that the run's plan was edited by."""
    found = {}
    for old, new in zip(before.numbers, after.numbers, strict=True):
        if new.what in ("lr", "weight_decay"):
            edited = old.stored / old.rule.value if old.is_edited and old.rule.value else 1.0
            found[new.what] = new.rule.value * edited if old.rule.value else old.stored
    return after.tensor.model_copy(update=found)
