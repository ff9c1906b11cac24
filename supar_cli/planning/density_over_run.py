"""How the masks of a plan change over its run: each tensor's density, rate and decay then, and how sure the rule is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from supar_cli.planning.explain_lines import places, wrapped
from supar_cli.planning.plan import Plan, PlanModel, PlanTensor
from supar_cli.planning.rules import DENSITY_IN_RATE
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.planning.updates import DEFAULTS, METHODS, exponent_of

# SPEC §9 [D, measured]: slope γ of the best rate over density, largest shift of the optimum and regret of the dense one
MEASURED = {
    "set": ("yes", 100, "γ +.04, shift .28 octaves, regret .10 %, over 100 steps"),
    "rigl": (
        "medium: β may fall with the number of updates",
        400,
        "shift .25 octaves, regret .09 % over 400 steps with moments: mean; β .8 over 100 steps with moments: zero",
    ),
    "gmp": (
        "yes",
        1000,
        "γ −.07, shift .38 octaves, regret .33 % over 100 steps (4 seeds); −.06, .23, .15 % over 400 (3); "
        "−.11, .45, .15 % over 1000 (2)",
    ),
    "topk": (
        "yes",
        1000,
        "γ −.05, shift .22 octaves, regret .06 % over 100 steps (4 seeds); −.03, .11, .03 % over 400; "
        "−.08, .31, .09 % over 1000",
    ),
}
FAILS = "γ +.53 and 10 % regret of GMP over 100 steps, +.83 and 10 to 13 % over 400"
MOST_STEPS, WIDEST = 1000, 256  # measured: no method over more steps, nor in a wider model
SPARSEST = {"set": 32, "rigl": 16, "gmp": 32, "topk": 32}  # measured: 1/density
WHERE = "γ: slope of log₂ best rate over log₂ density; width 128, 2 layers, densities 1/4 to 1/"


@dataclass(frozen=True, slots=True)
class Moment:
    """A tensor after `step` steps. `replaced`: the share of its live weights that SET or RigL exchanged last, None if not lately."""

    step: int
    density: float
    kept: int
    rate_factor: float
    decay_factor: float
    peak_lr: float
    weight_decay: float
    replaced: float | None


def moments(plan: Plan, row: PlanTensor) -> list[Moment]:
    """A tensor at the start, at each tenth of the run and at the end; none where its mask doesn't change."""
    schedule = MaskSchedule.of(plan)
    if schedule is None or not schedule.moves(row):
        return []
    found, before = list[Moment](), 0
    for step in sorted({round(tenth * plan.train.steps / 10) for tenth in range(11)}):
        kept, last = schedule.kept(row, step), schedule.last_update(step)
        rate, decay = schedule.rate_factor(row, step), schedule.decay_factor(row, step)
        is_new = schedule.updates.drop is not None and last > max(before, schedule.begin)
        replaced = schedule.dropped(row, last) / row.kept if is_new else None
        numbers = (rate, decay, row.lr * rate, row.weight_decay * decay, replaced)
        found.append(Moment(step, kept / row.size, kept, *numbers))
        before = step
    return found


def as_json(plan: Plan, row: PlanTensor) -> dict[str, list[dict[str, float | None]]]:
    found = [asdict(moment) for moment in moments(plan, row)]
    return {"over_run": found} if found else {}


def changes(plan: Plan) -> int:
    """How often the masks of a plan change."""
    schedule = MaskSchedule.of(plan)
    return -((schedule.begin - schedule.end) // schedule.updates.every_steps) if schedule else 0


def summary(plan: Plan) -> str:
    """How the masks change, in a line; empty where they don't."""
    schedule = MaskSchedule.of(plan)
    if schedule is None:
        return ""
    updates, end = schedule.updates, f"{plan.sparsity.density:.4g}"
    how = f"density {updates.start:g} → {end}" if updates.start else f"density {end} all along, live weights replaced"
    when = f"{changes(plan):,} changes of the masks, from step {schedule.begin:,} to {schedule.end:,}"
    at_end = "; the numbers of a row are those of the end, init std that of step 0" if updates.start else ""
    return f"{how} by {METHODS[updates.method]}; {when}{at_end}"


def formulas(plan: Plan, rate: str, decay: str) -> dict[str, str]:
    """How the masks change, the rate and decay of hidden weights in a step, from their formulas, and how sure these are."""
    schedule = MaskSchedule.of(plan)
    if schedule is None:
        return {}
    updates, sure = schedule.updates, how_sure(plan)
    if updates.rates_follow == "now":
        rate, decay = (formula.replace("m_ρ", "m_ρ(t)") for formula in (rate, decay))
    where = f"β = {updates.exponent:g}; m_ρ(t): the density after step t over the proxy's [D, measured]"
    return {
        "masks": summary(plan),
        "rate at t": f"schedule(t) × {rate}" + (f"; {where}" if "m_ρ(t)" in rate else ""),
        "decay at t": f"{decay} ({plan.parameterization.weight_decay_rule}) [D]",
        "how sure": sure,
    }


def how_sure(plan: Plan) -> str:
    """How well it is known that the rates of a plan whose masks change keep the proxy's optimum, and what was measured."""
    updates = plan.sparsity.updates
    if updates is None or plan.parameterization.name not in DENSITY_IN_RATE:
        return "these rules do not correct rates for the density"
    where = f"{WHERE}{SPARSEST[updates.method]}"
    if updates.rates_follow == "end":
        return f"it fails, a control: {FAILS}; {where}"
    sure, _, measured = MEASURED[updates.method]
    if others := not_measured(plan):
        sure = f"not measured with {', '.join(others)}; else {sure}"
    return f"{sure}; {measured}; {where}"


def not_measured(plan: Plan) -> list[str]:
    """What a plan has of its own where its method's rates were measured with something else."""
    updates, steps = plan.sparsity.updates, plan.train.steps
    if updates is None or plan.parameterization.name not in DENSITY_IN_RATE:
        return []
    usual, longest = DEFAULTS[updates.method].get("moments"), MEASURED[updates.method][1]
    known = exponent_of(updates.model_copy(update={"exponent": None}), None)
    has_state = updates.moments == usual or (updates.method, updates.moments) == ("rigl", "zero")
    found = [] if updates.exponent == known else [f"β {updates.exponent:g} ({known:g} was)"]
    found += [] if has_state else [f"moments: {updates.moments} ({usual} was)"]
    found += [] if plan.train.optimizer == "adamw" else ["SGD (AdamW was)"]
    found += [f"{steps:,} steps (at most {longest:,} were)"] if steps > MOST_STEPS else []
    width = plan.model.width if isinstance(plan.model, PlanModel) else 0
    found += [f"width {width:,} (at most {WIDEST} was)"] if width > WIDEST else []
    least, most = min(row.density for row in plan.tensors), SPARSEST[updates.method]
    return found + ([f"density {least:.4g} (at least 1/{most} was)"] if least * most < 0.99 else [])


def tables(plan: Plan, rows: Sequence[PlanTensor]) -> Iterator[tuple[list[PlanTensor], list[list[str]]]]:
    """The tensors whose factors agree, and a table of texts for them, its first row the header.

    Its last columns are the live weights and peak rates of those tensors, one of each where these agree too; where they
    are too many for a line, a further table follows.
    """
    groups: dict[tuple[tuple[str, ...], ...], list[tuple[PlanTensor, list[Moment]]]] = {}
    for row in rows:
        if found := moments(plan, row):
            groups.setdefault(tuple(map(_factors, found)), []).append((row, found))
    for shared, members in groups.items():
        columns = [(f"kept of {row.size:,}", *(f"{one.kept:,}" for one in found)) for row, found in members]
        columns += [("peak lr", *(f"{one.peak_lr:.3g}" for one in found)) for _, found in members]
        if any(one.replaced for one in members[0][1]):
            columns.append(("replaced", *(_percent(one.replaced) for one in members[0][1])))
        columns, fixed = list(dict.fromkeys(columns)), [("step", "density", "rate", "decay"), *shared]
        for first in range(0, len(columns), 3):  # as many as fit beside the others
            beside = zip(*columns[first : first + 3], strict=True)
            yield [row for row, _ in members], [[*left, *right] for left, right in zip(fixed, beside, strict=True)]


def lines(plan: Plan, rows: Sequence[tuple[PlanTensor, dict[str, str]]]) -> list[str]:
    """What changes while a plan trains, as `supar explain` prints it below the numbers of its rows; nothing where masks stay."""
    moving = [(row, formulas_of) for row, formulas_of in rows if moments(plan, row)]
    if not moving:
        return []
    first = moving[0][1]
    found = ["", "over the run"]
    for label, text in formulas(plan, first["lr"], first["weight_decay"]).items():
        found += wrapped(label, text.split())
    for members, table in tables(plan, [row for row, _ in moving]):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        found += ["", *wrapped(None, places(members).split())]
        found += ["  " + "  ".join(map(str.rjust, cells, widths)) for cells in table]
    return found


def _factors(moment: Moment) -> tuple[str, ...]:
    """The texts of what tensors of one table have in common; three digits, as small tensors round their live weights."""
    factors = (f"× {moment.rate_factor:.3g}", f"× {moment.decay_factor:.3g}")
    return f"{moment.step:,}", f"{moment.density:.3g}", *factors


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"
