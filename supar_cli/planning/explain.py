"""How every number of a plan is computed: the formula, its values and its source, and where the plan differs from it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, groupby
from math import isclose
from typing import Any, get_args

from supar_cli.errors import InputError
from supar_cli.planning import density_over_run, folding, layout, rules
from supar_cli.planning.advice import density_exponent, timescale_steps
from supar_cli.planning.explain_lines import places, short, wrapped
from supar_cli.planning.plan import Plan, PlanModel, PlanTensor, base_model, decoder_base
from supar_cli.planning.updates import start_density

SOURCES = {
    "P": "Dey, Bergsma, Hestness 2024 (SμPar), arXiv 2405.15743",
    "R": "the same authors' code: EleutherAI/nanoGPT-mup, branch supar",
    "C": "CompleteP: EleutherAI/nanoGPT-mup, branch completep",
    "V": "Yang et al. 2022, Tensor Programs V (μP), arXiv 2203.03466",
    "E": "Evci et al. 2022 (sparse-aware init), arXiv 2010.03533",
    "D": "derived by supar; no paper has it",
    "SP": "standard parameterization: nothing is corrected",
}
TITLES = {"sp": "SP", "mup": "μP", "supar": "SμPar", "adamw": "AdamW", "sgd": "SGD"}
TITLES |= {
    "sp-si": "SP, sparse-aware init",
    "supar-init-only": "SμPar's init only",
    "supar-lr-only": "SμPar's rate only",
}
FACTORS = {"input": "embeddings ×", "output": "logits ×", "attention": "q·k ×", "residual": "residual ×"}
SYMBOLS = {"init_std": "σ init_std", "lr": "η lr", "weight_decay": "λ weight_decay", "eps": "ε eps"}
SYMBOLS |= {"alpha_input": "α_input", "alpha_output": "α_output"}
SYMBOLS |= {"embedding_lr_ratio": "r embedding_lr_ratio", "head_lr_ratio": "κ head_lr_ratio"}
NOT_OF_MODEL = "the model has no such tensor: explained as if it were outside the blocks"
RATIOS = {
    "m_d": "width",
    "m_fan_out": "fan-out",
    "m_out": "output",
    "m_rho": "density",
    "m_rho_start": "density at step 0",
    "m_L": "depth",
    "lr_ratio": "own rate",
    "g": "√(‖W‖²/‖M⊙W‖²), for the energy that pruning took",
    "own_std": "size of its own values at the base",
}


@dataclass(frozen=True, slots=True)
class Number:
    """A number of the plan and the rule for it; `worked` is the formula with its numbers put in."""

    what: str
    stored: float
    rule: rules.Rule
    worked: str
    note: str

    @classmethod
    def of(cls, what: str, stored: float, rule: rules.Rule, symbols: dict[str, float], note: str = "") -> Number:
        worked = _substitute(rule.formula, symbols)
        return cls(what, stored, rule, worked, "; ".join(filter(None, (rule.why, note))))

    @property
    def is_edited(self) -> bool:
        return self.stored != self.rule.value

    def lines(self) -> list[str]:
        first, *others = (part for part, _ in groupby((self.rule.formula, self.worked, short(self.rule.value))))
        source = [] if self.rule.source == "–" else [f"[{self.rule.source}]"]
        note = f"({self.note})".split() if self.note else []
        lines = wrapped(self.what, [first, *(f"= {part}" for part in others), *source, *note])
        edited = f"edited: the plan has {self.stored!r}, the rule gives {self.rule.value!r}"
        return lines + (wrapped("", edited.split()) if self.is_edited else [])

    def as_json(self) -> dict[str, Any]:
        worked = {"formula": self.rule.formula, "worked": self.worked, "source": self.rule.source, "note": self.note}
        return {"plan": self.stored, "rule": self.rule.value, "edited": self.is_edited, **worked}


def _substitute(formula: str, symbols: dict[str, float]) -> str:
    """A formula with numbers in place of its symbols; of two symbols that begin alike the longer one counts."""
    longest_first, worked = sorted(symbols, key=len, reverse=True), ""
    while formula:
        symbol = next((symbol for symbol in longest_first if formula.startswith(symbol)), None)
        worked += formula[0] if symbol is None else short(symbols[symbol])
        formula = formula[len(symbol or formula[0]) :]
    return worked


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor of the plan, explained. `remarks` are the errors of the row itself."""

    tensor: PlanTensor
    numbers: tuple[Number, ...]
    remarks: tuple[str, ...]

    @property
    def formulas(self) -> dict[str, str]:
        return {number.what: number.rule.formula for number in self.numbers}

    @property
    def sameness(self) -> tuple[Any, ...]:
        """Equal for rows that share one explanation."""
        own = self.tensor
        return own.role, tuple(own.shape), own.kept, tuple(own.because.items()), self.numbers, self.remarks

    def as_json(self) -> dict[str, Any]:
        own = self.tensor.model_dump()
        kept = {name: own[name] for name in ("name", "role", "shape", "density", "kept", "because", "site")}
        numbers = {number.what: number.as_json() for number in self.numbers}
        return {**kept, "remarks": list(self.remarks), **numbers}


@dataclass(frozen=True, slots=True)
class Explained:
    """A plan, explained: the multipliers of its forward pass (none where tensors were asked for) and its tensors."""

    plan: Plan
    factors: list[Number]
    rows: list[Row]

    def text(self, title: str) -> str:
        plan, own = self.plan, self.plan.parameterization
        head = [
            f"{TITLES[own.name]} with {TITLES[plan.train.optimizer]},",
            f"sparsity {plan.sparsity.sparsity:g} ({plan.sparsity.pattern_text}, {plan.sparsity.distribution});",
            *f"weight_decay_rule {own.weight_decay_rule}, depth_rule {own.depth_rule},".split(),
            *f"residual_init {own.residual_init}, unembedding_init {own.unembedding_init}".split(),
        ]
        hyper = plan.hyperparameters.model_dump().items()
        tuned = [f"{SYMBOLS[name]} = {'own' if value is None else short(value)}" for name, value in hyper]
        lines = [f"{title}: {plan.name}", *wrapped("rules", head), *wrapped("proxy", [own.base.text, *_listed(tuned)])]
        lines += wrapped("values", plan.values.text.split()) if plan.values.path else []
        if self.factors:
            lines += ["", "forward pass", *(line for number in self.factors for line in number.lines())]
        for module, factor in getattr(plan.model, "hooks", {}).items():
            where = f"input of {module}" if module else "logits, in your own forward pass"
            lines += ["", *wrapped("not folded", [f"{where} × {short(factor)}"])]
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.sameness, []).append(row)
        for members in groups.values():
            lines += ["", *_group(members)]
        lines += density_over_run.lines(plan, [(row.tensor, row.formulas) for row in self.rows])
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        return {
            "plan": self.plan.name,
            "hash": self.plan.hash(),
            "parameterization": self.plan.parameterization.model_dump(),
            "hyperparameters": self.plan.hyperparameters.model_dump(),
            "multipliers": {number.what: number.as_json() for number in self.factors},
            "tensors": [row.as_json() | density_over_run.as_json(self.plan, row.tensor) for row in self.rows],
        }


def explain(plan: Plan, tensor: str | None = None, role: str | None = None) -> Explained:
    """The formula, the numbers and the source behind a plan's values, of all tensors or of those named.

    `.text(title)` is what `supar explain` prints, `.as_json()` its data. Raises InputError where no tensor is named so.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"{type(plan).__name__}: expected a Plan")
    roles = get_args(rules.Role)
    if role is not None and role not in roles:
        raise InputError(f"--role {role}: expected {', '.join(roles[:-1])} or {roles[-1]}")
    own = plan.parameterization
    options = own.model_dump(include=rules.OPTIONS)
    beta = density_exponent(plan)
    scheme = rules.Scheme(own.name, plan.train.optimizer, **options, density_exponent=beta, edition=own.edition)
    rows = _chosen(_rows(plan, scheme), tensor, role)
    return Explained(plan, [] if tensor or role else _factors(plan, scheme), rows)


def _rows(plan: Plan, scheme: rules.Scheme) -> list[Row]:
    hyper, decoder = plan.hyperparameters, plan.model if isinstance(plan.model, PlanModel) else None
    known = {tensor.name: tensor for tensor in layout.tensors(decoder)} if decoder else {}
    base = {tensor.site: tensor for tensor in layout.tensors(base_model(plan))} if decoder else {}
    m_width = decoder.width / decoder_base(plan).width if decoder else None
    rows = []
    for row in plan.tensors:
        tensor = known.get(row.name)
        shapes: dict[str, float | None] = {"m_d": m_width, "m_fan_out": None, "m_out": m_width}
        if tensor is not None and (row.role == "hidden" or scheme.edition == 2):
            shapes["m_d"], shapes["m_fan_out"] = layout.ratios(tensor, base[tensor.site])
        elif row.role == "hidden":
            shapes["m_d"] = row.fan_in / row.base_fan_in
        given = {**shapes, **row.because}
        context = rules.TensorContext(
            row.role,
            given["m_d"] or 1.0,
            m_fan_out=given["m_fan_out"],
            m_out=given["m_out"] or given["m_d"] or 1.0,
            m_rho=row.because.get("m_rho", 1.0),
            m_rho_start=row.because.get("m_rho_start"),
            m_L=row.because.get("m_L", 1.0),
            layers=decoder.layers if decoder else 1,
            in_block=row.block is not None,
            writes_residual=tensor is not None and tensor.writes_residual,
            first_sum="lr_ratio" in row.because,
            head="lr_ratio" in row.because,
        )
        remarks = [NOT_OF_MODEL] if known and not tensor else []
        remarks += [
            f"edited: the plan has {key} {given[key]!r}, the shapes give {value!r}"
            for key, value in shapes.items()
            if value is not None and given[key] != value
        ]
        remarks += _start_remarks(plan, row)
        sigma = row.because.get("own_std", hyper.init_std or 0.0)
        tuned = hyper.with_sigma(sigma)
        rows.append(Row(row, _numbers(row, scheme, tuned, context, _fold_formula(plan, row)), tuple(remarks)))
    return rows


def _start_remarks(plan: Plan, row: PlanTensor) -> list[str]:
    """What an edited plan says wrongly of the density at step 0, by which its init was made."""
    if row.role != "hidden" or row.init == "file":
        return []
    own, start = row.because.get("m_rho", 1.0), start_density(plan.sparsity.updates)
    wanted = own * max(start, row.density) / row.density if row.kept < row.size else own
    given = row.because.get("m_rho_start", own)
    if isclose(given, wanted, rel_tol=1e-9):
        return []
    return [f"edited: init_std is that of m_rho_start {given:g}; masks start at {wanted:g}"]


def _numbers(
    row: PlanTensor, scheme: rules.Scheme, tuned: rules.ProxyValues, context: rules.TensorContext, fold: str
) -> tuple[Number, ...]:
    symbols = {"σ": tuned.sigma, "η": tuned.eta, "λ": tuned.lam, "ε": tuned.eps, "layers": context.layers}
    symbols |= {"r": tuned.ratio, "κ": tuned.head_ratio, "m_d": context.m_d, "m_fan_out": context.fan_out}
    symbols |= {"m_out": context.m_out, "a": row.fold or 1.0}
    symbols |= {"m_ρ": context.m_rho, "m_ρ,start": context.m_rho_start or 0.0}
    gain = row.because.get("g", 1.0)
    symbols |= {"β": scheme.density_exponent, "m_L": context.m_L, "g": gain, "rms": (row.init_std or 0.0) / gain}
    found = rules.tensor_rules(scheme, tuned, context)
    if row.init_constant is not None:  # a constant initial value where the rules give a deviation
        std, constant = found.pop("init_std"), rules.STARTS.get(row.role, row.init_constant)
        why = std.why if row.role in rules.STARTS else "a constant"
        found = {"init_constant": rules.Rule(constant, f"{constant:g}", std.source, why), **found}
    if row.init == "file":
        formula = "g·rms" if "g" in row.because else "rms"
        found["init_std"] = rules.Rule(row.init_std or 0.0, formula, "D", "measured on the file's values")
    if row.init == "own" and row.role in rules.STARTS:
        found["init_std"] = rules.Rule(tuned.sigma, "σ", "D", "the constructor's own values, scaled to this size")
    if row.fold is not None:
        found = {name: _folded(name, rule, row.fold, fold, scheme.optimizer) for name, rule in found.items()}
    decay = timescale_steps(row)
    notes = {"weight_decay": f"1/(lr·λ) = {decay:.0f} steps" if decay else ""}
    if row.lr != found["lr"].value or row.weight_decay != found["weight_decay"].value:
        found["weight_decay"] = found["weight_decay"]._replace(why="")  # what it says of lr·λ holds for the rules' own
    return tuple(Number.of(name, vars(row)[name], rule, symbols, notes.get(name, "")) for name, rule in found.items())


def _fold_formula(plan: Plan, row: PlanTensor) -> str:
    """The multipliers of the forward pass that a row's fold stands for."""
    hyper, m_d = plan.hyperparameters, row.because.get("m_d", 1.0)
    m_out = row.because.get("m_out", m_d)
    known = {
        "α_input": hyper.alpha_input,
        "α_output/m_d": hyper.alpha_output / m_d,
        "1/m_d": 1.0 / m_d,
        "α_output/(m_out·α_input)": hyper.alpha_output / m_out / hyper.alpha_input,
        "α_output/m_out": hyper.alpha_output / m_out,
        "1/m_L": 1.0 / row.because.get("m_L", 1.0),
    }
    return next((formula for formula, value in known.items() if value == row.fold), "a multiplier")


def _folded(name: str, rule: rules.Rule, factor: float, formula: str, optimizer: rules.Optimizer) -> rules.Rule:
    """The rule of a number with a multiplier of the forward pass folded into it."""
    numbers = {"lr": 0.0, "weight_decay": 0.0, "eps": 0.0, name: rule.value}
    value = vars(folding.fold(folding.Numbers(**numbers), factor, optimizer))[name]
    if rule.value == 0:
        return rule
    times = "×" if name in ("lr", "init_std", "init_constant") else "÷"
    square = "²" if optimizer == "sgd" and name in ("lr", "weight_decay") else ""
    why = f"{times} {factor:.6g}{square}: {formula} folded, the forward pass is yours"
    return rules.Rule(value, f"{rule.formula} {times} a{square}", rule.source, "; ".join(filter(None, (rule.why, why))))


def _factors(plan: Plan, scheme: rules.Scheme) -> list[Number]:
    if not isinstance(plan.model, PlanModel):  # a user's model has its multipliers in the numbers of its tensors
        return []
    hyper, base, head_width = plan.hyperparameters, decoder_base(plan), plan.model.head_width
    m_d, m_L = plan.model.width / base.width, plan.model.layers / base.layers
    found = rules.forward_rules(scheme, hyper.alpha_input, hyper.alpha_output, m_d, m_L, head_width)
    symbols = {"α_input": hyper.alpha_input, "α_output": hyper.alpha_output, "m_d": m_d, "m_L": m_L}
    symbols["d_head"] = head_width
    stored = vars(plan.model.multipliers)
    return [Number.of(FACTORS[name], stored[name], rule, symbols) for name, rule in found.items()]


def _chosen(rows: list[Row], word: str | None, role: str | None) -> list[Row]:
    """The rows with a name, site or part, and with a role. Raises InputError when there are none."""
    found = rows
    if word is not None:
        word = word.removeprefix("*.")  # as the table of `supar transfer` writes a site
        found = [r for r in rows if word in (r.tensor.name, r.tensor.site, r.tensor.site.partition(".")[0])]
        if not found:
            sites = list(dict.fromkeys(row.tensor.site for row in rows))
            close = difflib.get_close_matches(word, [*sites, *(row.tensor.name for row in rows)], 3, 0.5)
            expected = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(sites)}"
            raise InputError(f"{word}: the plan has no such tensor; {expected}")
    if role is not None:
        having = list(dict.fromkeys(row.tensor.role for row in found))
        found = [row for row in found if row.tensor.role == role]
        if not found:
            raise InputError(f"--role {role}: {word or 'the plan'} has no such tensor; expected {' or '.join(having)}")
    return found


def _group(members: list[Row]) -> list[str]:
    """Title and numbers of rows that share one explanation."""
    row, title = members[0].tensor, places([member.tensor for member in members])
    count = f"{len(members)} tensors, each " if len(members) > 1 else ""
    shape = f"({row.role}, {count}{'×'.join(map(str, row.shape))})"
    lines = wrapped(None, [*title.split(), *shape.split()])
    if row.role == "hidden":
        own = f"{short(row.density)}: {row.kept:,} of {row.size:,} weights live, {short(row.wpn)} per neuron"
        end = " at the end of the run; so are lr and weight_decay, init_std is that of step 0"
        lines += wrapped("density", (own + end if "m_rho_start" in row.because else own).split())
    factors = [f"{k.replace('rho', 'ρ')} = {short(v)} ({RATIOS.get(k, '?')})" for k, v in row.because.items()]
    lines += wrapped("because", _listed(factors))
    lines += [line for number in members[0].numbers for line in number.lines()]
    return lines + [line for remark in members[0].remarks for line in wrapped("", remark.split())]


def _listed(parts: list[str]) -> list[str]:
    return [*(f"{part}," for part in parts[:-1]), *parts[-1:]]


def legend(explained: Iterable[Explained]) -> list[str]:
    """What the letters in brackets mean, for those that were used."""
    numbers = chain.from_iterable(chain(one.factors, *(row.numbers for row in one.rows)) for one in explained)
    used = {source.split()[0] for number in numbers for source in number.rule.source.split(", ")}
    used |= {"D" for one in explained if one.plan.sparsity.updates}
    return ["sources", *(f"  {key:2}  {text}" for key, text in SOURCES.items() if key in used)]
