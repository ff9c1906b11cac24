"""How sizes change with width or density, compared with bounds: the verdict on each sweep of a coordinate check.

Arrays: R seeds, Z points of a sweep, S steps, N names (linears, attentions or logits) of one quantity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, isfinite, nan

import numpy as np
from numpy.typing import NDArray

from supar_cli.experiments.check_plans import SlopeSweep
from supar_cli.experiments.coordinates import LINEAR, SHARE, common_names, log_sizes
from supar_cli.experiments.statistics import half_widths, log_slopes
from supar_cli.files import Record
from supar_cli.planning.decoder import ViT
from supar_cli.reporting.result import Table, Verdict

# Bounds on |slope|. Right parameterizations stay below them at such sizes, and controls exceed CONTROL in the median.
# measured: the quickstart's shape over width 128 to 1024 (the harder axis), 11 seeds. Chance of a false alarm at 4 seeds:
# activations of linears that read a norm 6e-10; of those that write the residual stream .04, 1e-4 at 16 seeds; logits 2e-8.
# The gain of attn.k has .030 ± .007 at narrow ends, which a bound of .03 would take for a fault.
STEP_1 = {"activation": 0.03, "gain": 0.05, "attention": 0.05, "logits": 0.03}
# Of a vision transformer's logits: a head that reads one position has nearly the same few logits for all images at the start.
# measured: digits, width 64 to 512, 4 seeds: +.08 with an interval of ±.21; a head without its 1/m_d is off by 1
IMAGE_LOGITS = 0.3
WRITERS = 0.05  # at step 1 of activations that are added to the residual stream (o, down), which are noisier
MEDIAN = 0.15  # median over the linears, at every step
EACH = {"density": 0.3, "width": 0.5, "plan": 0.5}  # of each linear, at every step; narrow ends bend it over width
# Of the head's share of Δlogits in the mean over steps, as single steps are noisy; of the final norm's it is EACH.
# measured, as above at a 4th of the rate, 4 seeds: head -.009 (SE .009), final norm -.10 (.03). A head's rate m_d times too large
# has .69 over width 128 to 512 (untied), a final norm's .83 (tied), of which the sum of both shares hides all: .00.
HEAD = 0.08
# Of the change of q·k over width, in the mean over steps: q and k learn to agree, so at a model's own 1/√d it grows with the
# head width, and growth is what is bounded (a fall as of each linear, EACH). measured: Hugging Face models over width 64 to 512,
# rate 2^-8, 4 to 8 seeds, two sets of them: -.16 to -.04 (half an interval .02 to .11) where the head width is fixed, +.21 and
# +.24 where it moves
GROWTH_OF_CHANGE = 0.12
CONTROL = 0.4


@dataclass(frozen=True, slots=True)
class Finding:
    """A bound on a quantity, and the slope that comes nearest to it or exceeds it most; at step 1, the first to exceed it."""

    quantity: str
    bound: str
    limit: float
    value: float
    half_width: float = nan  # of the 95 % interval over seeds; medians have none
    step: int | None = None
    tensor: str = ""

    @property
    def within_bound(self) -> bool:
        return abs(self.value) <= self.limit  # a NaN is not

    @property
    def inconclusive(self) -> bool:
        """Whether the bound is exceeded by less than the interval, so that more seeds could decide."""
        return not self.within_bound and abs(self.value) - self.limit < self.half_width

    @property
    def text(self) -> str:
        name = self.quantity if self.tensor in ("", self.quantity) else f"{self.quantity} of {self.tensor}"
        at = f" at step {self.step}" if self.step else ""
        return f"{name}: {self.bound} slope {self.value:+.3f}{at}, bound {self.limit}"

    @property
    def cells(self) -> list[str | int]:
        """A row of the table."""
        value = f"{self.value:+.3f}" if self.tensor else f"{self.value:.3f}"
        half_width = f"±{self.half_width:.3f}" if isfinite(self.half_width) else ""
        limit, verdict = "–", ""
        if isfinite(self.limit):
            limit, verdict = f"{self.limit:g}", "kept" if self.within_bound else "exceeded"
        return [self.quantity, self.bound, value, half_width, limit, self.tensor, self.step or "", verdict]


@dataclass(slots=True)
class CheckResult:
    """The outcome of a sweep: its findings, or why it failed or can't be judged."""

    sweep: SlopeSweep
    findings: list[Finding] = field(default_factory=list)
    failure: str = ""
    unjudged: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def violations(self) -> list[Finding]:
        """The bounds exceeded, by how many times, the worst first."""
        return sorted((f for f in self.findings if not f.within_bound), key=lambda f: -abs(f.value) / f.limit)

    @property
    def inconclusive(self) -> bool:
        """Whether every bound exceeded is by less than its interval, and one is."""
        return not self.sweep.is_control and bool(self.violations) and all(f.inconclusive for f in self.violations)

    @property
    def passed(self) -> bool | None:
        """Whether sizes stay within their bounds. A control passes, which it should not, if no median exceeds CONTROL."""
        if self.unjudged or self.failure:
            return None if self.unjudged else False
        medians = [abs(f.value) for f in self.findings if f.bound == "median"]
        return all(median <= CONTROL for median in medians) if self.sweep.is_control else not self.violations

    @property
    def text(self) -> str:
        """The verdict in a sentence."""
        if self.unjudged or self.failure:
            return f"can't be judged: {self.unjudged}" if self.unjudged else self.failure
        highest = max((f for f in self.findings if f.bound == "median"), key=lambda f: abs(f.value))
        if self.sweep.is_control:
            word = "passes, but should fail" if self.passed else "fails, as expected"
            median = f"median |slope| of {highest.quantity} up to {abs(highest.value):.2f}"
            return f"{word}: {median} (over {CONTROL} expected)"
        if self.passed:
            return f"every slope is within its bound; largest median |slope| {abs(highest.value):.3f}, bound {MEDIAN}"
        worst, seeds = self.violations[0], len(self.sweep.plans)
        interval = (
            f", exceeded by less than the 95 % interval ±{worst.half_width:.3g} of {seeds} seeds: more seeds may decide"
            if seeds > 1
            else ", exceeded; one seed gives no interval: more seeds may decide"
        )
        return worst.text + (interval if worst.inconclusive else "")

    @property
    def verdict(self) -> Verdict:
        return Verdict(what=self.sweep.label, passed=self.passed, control=self.sweep.is_control, text=self.text)

    @property
    def table(self) -> Table:
        sweep, columns = self.sweep, ["quantity", "bound on", "slope", "95 %", "limit", "at", "step", "verdict"]
        title = f"Slopes of log2(size) against log2({sweep.word}), {sweep.name}{', a control' * sweep.is_control}"
        return Table(title=title, columns=columns, rows=[f.cells for f in self.findings], folded=sweep.is_control)


def judge(sweep: SlopeSweep, by_run: dict[str, Record]) -> CheckResult:
    """Fit a sweep's slopes and compare them with the bounds. `by_run` has the record of each plan's hash."""
    result = CheckResult(sweep)
    records = [[by_run[plan.hash()] for plan in plans] for plans in sweep.plans]
    bad = [record for row in records for record in row if record["state"] != "done"]
    if bad:
        result.failure = f"{len(bad)} of {sum(map(len, records))} runs {bad[0]['state']}: {bad[0].get('why', '')}"
        return result
    everything = [record for row in records for record in row]
    for quantity in records[0][0]["steps"][0]:
        names = common_names(everything, quantity)
        if not names:  # what was not measured is said elsewhere
            continue
        log_RZSN = np.stack([log_sizes(row, quantity, names) for row in records])
        measured_S = np.flatnonzero(np.isfinite(log_RZSN).any(axis=(0, 1, 3)))
        if not len(measured_S):  # a zero unembedding has no gradients at step 1
            result.unjudged = f"{quantity} is zero in every step; expected more than {log_RZSN.shape[2]}"
            break
        first = int(measured_S[0])
        if first:
            zero = f"{quantity} is zero everywhere at step {first}"
            result.notes.append(f"{zero}, so it is fitted from step {first + 1} on")
        slope_RSN = log_slopes(log_RZSN[:, :, first:], sweep.sizes)
        result.findings += _findings(sweep, quantity, names, slope_RSN, first + 1)
    return result


def _findings(
    sweep: SlopeSweep, quantity: str, names: list[str], slope_RSN: NDArray[np.float64], first_step: int
) -> Iterator[Finding]:
    each = EACH[sweep.axis]
    if quantity == "logits":
        slope_RSN = slope_RSN - sweep.logits_slope
    if quantity in (SHARE, "Δattention"):  # the mean over the steps that have numbers
        slope_RSN = np.ma.masked_invalid(slope_RSN).mean(axis=1, keepdims=True).filled(nan)
    mean_SN, half_SN = slope_RSN.mean(axis=0), half_widths(slope_RSN)

    def finding(bound: str, limit: float, name: int, step: int = 0) -> Finding:
        value, half_width = float(mean_SN[step, name]), float(half_SN[step, name])
        shown_step = None if bound == "mean" else first_step + step
        return Finding(quantity, bound, limit, value, half_width, shown_step, names[name])

    roles = {row.name: row.role for row in sweep.base[0].tensors}
    if quantity == SHARE:
        is_head = [roles.get(name) in ("embedding", "unembedding") for name in names]
        yield from (finding("mean", HEAD if is_head[at] else each, at) for at in range(len(names)))
        return
    if quantity == "Δattention":
        value_N = np.nan_to_num(mean_SN[0], nan=inf)
        grown = [at for at in range(len(names)) if value_N[at] > GROWTH_OF_CHANGE]  # of these, the surest
        if not grown and (value_N < -each).any():
            grown = [int(value_N.argmin())]
        name = max(grown, key=(value_N - half_SN[0]).__getitem__, default=int(value_N.argmax()))
        limit = GROWTH_OF_CHANGE if value_N[name] > 0 else each
        yield finding("mean", limit if sweep.axis == "width" else inf, name)
        return
    size_SN = np.nan_to_num(np.abs(mean_SN), nan=inf)
    if quantity in STEP_1 and first_step == 1:
        is_noisier = sweep.writers if quantity == "activation" else ()
        usual = IMAGE_LOGITS if quantity == "logits" and isinstance(sweep.base[0].model, ViT) else STEP_1[quantity]
        limits = [WRITERS if name in is_noisier else usual for name in names]
        for limit in dict.fromkeys(limits):
            at = [n for n in range(len(names)) if limits[n] == limit]
            # an error in a tensor also shows in later tensors and may be larger there, so the first one is named
            exceeded, largest = [n for n in at if size_SN[0, n] > limit], max(at, key=size_SN[0].__getitem__)
            yield finding("step 1", limit, (exceeded or [largest])[0])
    if quantity != "logits":
        # attention and all of Δlogits are shown without a bound: the paper has none for them, and they are noisier than linears
        step, name = divmod(int(size_SN.argmax()), len(names))
        yield finding("each", each if quantity in LINEAR else inf, name, step)
    if quantity in LINEAR:
        median_S = np.median(size_SN, axis=1)
        step = int(median_S.argmax())
        yield Finding(quantity, "median", MEDIAN, float(median_S[step]), step=first_step + step)
