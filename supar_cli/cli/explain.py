"""`supar explain`: the formula, the numbers and the source behind a plan's values."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.errors import InputError
from supar_cli.planning import layout, rules
from supar_cli.planning.plan import Plan, PlanTensor
from supar_cli.planning.spec import parse
from supar_cli.planning.transfer import timescale_steps

COLUMNS, INDENT = 79, 16

SOURCES = {
    "P": "Dey, Bergsma, Hestness 2024 (SμPar), arXiv 2405.15743",
    "R": "the same authors' code: EleutherAI/nanoGPT-mup, branch supar",
    "C": "CompleteP: EleutherAI/nanoGPT-mup, branch completep",
    "V": "Yang et al. 2022, Tensor Programs V (μP), arXiv 2203.03466",
    "D": "derived by supar; no paper has it",
    "SP": "standard parameterization: nothing is corrected",
}
TITLES = {"sp": "SP", "mup": "μP", "supar": "SμPar", "adamw": "AdamW", "sgd": "SGD"}
TITLES |= {"supar-init-only": "SμPar's init only", "supar-lr-only": "SμPar's rate only"}
FACTORS = {"input": "embeddings ×", "output": "logits ×", "attention": "q·k ×", "residual": "residual ×"}


def explain(
    plan: Annotated[
        str | None,
        typer.Argument(help="Plan document, run directory, or - for stdin. [default: plan.yaml]", show_default=False),
    ] = None,
    tensor: Annotated[
        str | None,
        typer.Argument(help="Only this: blocks.0.mlp.up, mlp.up (in all blocks), mlp.", show_default=False),
    ] = None,
    role: Annotated[
        str | None, typer.Option(metavar="ROLE", help="Only embedding, hidden, norm, bias or unembedding tensors.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write a JSON list, one item a plan, to stdout.")] = False,
) -> None:
    """Show the rule behind every number of a plan, worked out, and say where the plan differs from it."""
    source = plan or "plan.yaml"
    roles = get_args(rules.Role)
    if role is not None and role not in roles:
        raise InputError(f"--role {role}: expected {', '.join(roles[:-1])} or {roles[-1]}")
    if source != "-" and Path(source).is_dir():
        source = str(Path(source) / "plan.yaml")
    missing = "`supar transfer` writes it"
    if tensor is None and plan is not None and Path("plan.yaml").exists():
        missing += f"; for a tensor of that name: supar explain plan.yaml {plan}"
    documents = console.read_all(source, missing)
    explained = [Explained.of(parse(Plan, document), tensor, role) for document in documents]
    if as_json:
        console.to_stdout(json.dumps([one.as_json() for one in explained], indent=1, ensure_ascii=False) + "\n")
        return
    titles = [f"{source}, plan {i} of {len(explained)}" for i in range(1, len(explained) + 1)]
    texts = [one.text(title) for title, one in zip(titles if len(titles) > 1 else [source], explained, strict=True)]
    console.to_stdout("\n".join([*texts, "\n".join(_legend(explained)) + "\n"]))


@dataclass(frozen=True, slots=True)
class Number:
    """A number of the plan and the rule for it; `worked` is the formula with its numbers put in."""

    what: str
    stored: float
    value: float
    formula: str
    worked: str
    source: str
    note: str = ""

    @classmethod
    def of(cls, what: str, stored: float, rule: rules.Rule, symbols: dict[str, float], note: str = "") -> Number:
        # `0: why`, `formula, so that …` and `0 (option)`: what follows the formula is for people
        found = re.match(r"(.*?)(?:: |, | \()(.+?)\)?$", rule.formula)
        formula, why = found.groups() if found else (rule.formula, "")
        known = re.compile("|".join(sorted(map(re.escape, symbols), key=len, reverse=True)))
        worked = known.sub(lambda symbol: short(symbols[symbol[0]]), formula)
        return cls(what, stored, rule.value, formula, worked, rule.source, "; ".join(filter(None, (why, note))))

    @property
    def edited(self) -> str:
        if self.stored == self.value:
            return ""
        return f"edited: the plan has {self.stored!r}, the rule gives {self.value!r}"

    def lines(self) -> list[str]:
        different = [part for part, _ in groupby((self.formula, self.worked, short(self.value)))]
        parts = [different[0], *(f"= {part}" for part in different[1:])]
        parts += [f"[{self.source}]"] if self.source != "–" else []
        lines = wrapped(self.what, [*parts, *(f"({self.note})".split() if self.note else [])])
        return [*lines, *(wrapped("", self.edited.split()) if self.edited else [])]

    def as_json(self) -> dict[str, Any]:
        names = ("formula", "worked", "source", "note")
        return {
            "plan": self.stored,
            "rule": self.value,
            "edited": bool(self.edited),
            **{n: getattr(self, n) for n in names},
        }


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor of the plan, explained. `remarks` are what is wrong with the row itself."""

    tensor: PlanTensor
    site: str
    block: int | None
    numbers: tuple[Number, ...]
    remarks: tuple[str, ...]

    @property
    def sameness(self) -> tuple[Any, ...]:
        """Equal for rows that are explained in the same words."""
        own = self.tensor
        return own.role, tuple(own.shape), own.kept, tuple(own.because.items()), self.numbers, self.remarks

    def as_json(self) -> dict[str, Any]:
        own = self.tensor.model_dump()
        kept = {name: own[name] for name in ("name", "role", "shape", "density", "kept", "because")}
        numbers = {number.what: number.as_json() for number in self.numbers}
        return {**kept, "site": self.site, "remarks": list(self.remarks), **numbers}


@dataclass(frozen=True, slots=True)
class Explained:
    """A plan, explained: the multipliers of its forward pass (none where tensors were asked for) and its tensors."""

    plan: Plan
    factors: list[Number]
    rows: list[Row]

    @classmethod
    def of(cls, plan: Plan, tensor: str | None, role: str | None) -> Explained:
        own = plan.parameterization
        options = own.model_dump(include={"weight_decay_rule", "depth_rule", "residual_init", "unembedding_init"})
        scheme = rules.Scheme(own.name, plan.train.optimizer, **options, edition=plan.edition)
        rows = _chosen(_rows(plan, scheme), tensor, role)
        return cls(plan, [] if tensor or role else _factors(plan, scheme), rows)

    def text(self, title: str) -> str:
        plan, own, base = self.plan, self.plan.parameterization, self.plan.parameterization.base
        head = [
            f"{TITLES[own.name]} with {TITLES[plan.train.optimizer]},",
            f"sparsity {plan.sparsity.sparsity:g} ({plan.sparsity.drawn}, {plan.sparsity.distribution});",
            *f"weight_decay_rule {own.weight_decay_rule}, depth_rule {own.depth_rule},".split(),
            *f"residual_init {own.residual_init}, unembedding_init {own.unembedding_init}".split(),
        ]
        proxy = f"width {base.width}, FFN width {base.ffn_width}, layers {base.layers};"
        tuned = [f"{_symbol(name)} = {short(value)}" for name, value in plan.hyperparameters.model_dump().items()]
        lines = [f"{title}: {plan.name}", *wrapped("rules", head), *wrapped("proxy", [proxy, *_listed(tuned)])]
        if self.factors:
            lines += ["", "forward pass", *(line for number in self.factors for line in number.lines())]
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.sameness, []).append(row)
        for members in groups.values():
            lines += ["", *_group(members)]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        return {
            "plan": self.plan.name,
            "hash": self.plan.hash(),
            "parameterization": self.plan.parameterization.model_dump(),
            "hyperparameters": self.plan.hyperparameters.model_dump(),
            "multipliers": {number.what: number.as_json() for number in self.factors},
            "tensors": [row.as_json() for row in self.rows],
        }


def _rows(plan: Plan, scheme: rules.Scheme) -> list[Row]:
    hyper, base = plan.hyperparameters, plan.parameterization.base
    tuned = rules.ProxyValues(hyper.init_std, hyper.lr, hyper.weight_decay, hyper.eps)
    known = {tensor.name: tensor for tensor in layout.tensors(plan.model)}
    # the proxy's shapes by site: they depend on its two widths and the keys' share only
    kv_share = Fraction(base.kv_share).limit_denominator(base.width)
    shape = {"width": base.width, "ffn_width": base.ffn_width, "layers": 1}
    shape |= {"heads": kv_share.denominator, "kv_heads": max(1, kv_share.numerator)}
    base_shape = {tensor.site: tensor.shape for tensor in layout.tensors(plan.model.model_copy(update=shape))}
    rows = []
    for row in plan.tensors:
        tensor = known.get(row.name) or layout.Tensor(row.name, row.role, row.name, tuple(row.shape))
        is_hidden = row.role == "hidden"
        m_width = plan.model.width / base.width
        m_d, m_fan_out = m_width, None
        if tensor.site in base_shape and (is_hidden or scheme.edition == 2):
            m_d = tensor.fan_in / base_shape[tensor.site][-1]
            m_fan_out = tensor.shape[0] / base_shape[tensor.site][0] if is_hidden else None
        context = rules.TensorContext(
            row.role,
            row.because.get("m_d", m_d),
            m_fan_out=row.because.get("m_fan_out", m_fan_out),
            m_out=row.because.get("m_out", m_width),
            m_rho=row.because.get("m_rho", 1.0),
            m_L=row.because.get("m_L", 1.0),
            layers=plan.model.layers,
            in_block=tensor.block is not None,
            writes_residual=tensor.writes_residual,
        )
        remarks = [] if row.name in known else ["no tensor of this model: explained as one outside of the blocks"]
        for key, given in {"m_d": m_d, "m_fan_out": m_fan_out, "m_out": m_width}.items():
            if row.because.get(key, given) != given:
                remarks.append(f"edited: the plan has {key} {row.because[key]!r}, the shapes give {given!r}")
        rows.append(Row(row, tensor.site, tensor.block, _numbers(row, scheme, tuned, context), tuple(remarks)))
    return rows


def _numbers(
    row: PlanTensor, scheme: rules.Scheme, tuned: rules.ProxyValues, context: rules.TensorContext
) -> tuple[Number, ...]:
    symbols = {"σ": tuned.sigma, "η": tuned.eta, "λ": tuned.lam, "ε": tuned.eps, "layers": context.layers}
    symbols |= {"m_d": context.m_d, "m_fan_out": context.fan_out, "m_out": context.m_out}
    symbols |= {"m_ρ": context.m_rho, "β": scheme.density_exponent, "m_L": context.m_L}
    decay = timescale_steps(row)
    return (
        Number.of("init_std", row.init_std, rules.init_std(scheme, tuned, context), symbols),
        Number.of("lr", row.lr, rules.learning_rate(scheme, tuned, context), symbols),
        Number.of(
            "weight_decay",
            row.weight_decay,
            rules.weight_decay(scheme, tuned, context),
            symbols,
            f"1/(lr·λ) = {decay:.0f} steps" if decay else "",
        ),
        Number.of("eps", row.eps, rules.adam_eps(scheme, tuned, context), symbols),
    )


def _factors(plan: Plan, scheme: rules.Scheme) -> list[Number]:
    hyper, base, stored = plan.hyperparameters, plan.parameterization.base, plan.model.multipliers.model_dump()
    m_d, m_L, head_width = plan.model.width / base.width, plan.model.layers / base.layers, plan.model.head_width
    found = {
        "input": rules.input_multiplier(scheme, hyper.alpha_input),
        "output": rules.output_multiplier(scheme, hyper.alpha_output, m_d),
        "attention": rules.attention_multiplier(scheme, head_width),
        "residual": rules.residual_multiplier(scheme, m_L),
    }
    symbols = {"α_input": hyper.alpha_input, "α_output": hyper.alpha_output, "m_d": m_d, "m_L": m_L}
    symbols["d_head"] = head_width
    return [Number.of(FACTORS[name], stored[name], rule, symbols) for name, rule in found.items()]


def _chosen(rows: list[Row], word: str | None, role: str | None) -> list[Row]:
    """Rows of a tensor's name, site or part, and of a role. Raises InputError when there are none."""
    found = rows
    if word is not None:
        word = word.removeprefix("*.")  # as the table of `supar transfer` writes a site
        found = [row for row in rows if word in (row.tensor.name, row.site, row.site.partition(".")[0])]
        if not found:
            sites = list(dict.fromkeys(row.site for row in rows))
            close = difflib.get_close_matches(word, [*sites, *(row.tensor.name for row in rows)], 3, 0.5)
            expected = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(sites)}"
            raise InputError(f"{word}: the plan has no such tensor; {expected}")
    if role is not None:
        having = list(dict.fromkeys(row.tensor.role for row in found))
        found = [row for row in found if row.tensor.role == role]
        if not found:
            raise InputError(f"--role {role}: no such tensor; {word or 'the plan'} has {', '.join(having)}")
    return found


def _group(members: list[Row]) -> list[str]:
    """Title and numbers of rows that are explained in the same words."""
    row, blocks = members[0].tensor, dict[str, list[int]]()
    for member in members:
        blocks.setdefault(member.site, []).extend([] if member.block is None else [member.block])
    places: dict[str, list[str]] = {}
    for site, numbers in blocks.items():
        places.setdefault(_ranges(numbers), []).append(site)
    title = "; ".join(", ".join(sites) + place for place, sites in places.items())
    count = f"{len(members)} tensors, each " if len(members) > 1 else ""
    shape = f"({row.role}, {count}{'×'.join(map(str, row.shape))})"
    lines = wrapped(None, [*title.split(), *shape.split()])
    if row.role == "hidden":
        own = f"{short(row.density)}: {row.kept:,} of {row.size:,} live, {short(row.wpn)} per neuron"
        lines += wrapped("density", own.split())
    because = {"m_d": "width", "m_fan_out": "fan-out", "m_out": "output", "m_rho": "density", "m_L": "depth"}
    factors = [f"{k.replace('rho', 'ρ')} = {short(v)} ({because.get(k, '?')})" for k, v in row.because.items()]
    lines += wrapped("because", _listed(factors))
    lines += [line for number in members[0].numbers for line in number.lines()]
    return lines + [line for remark in members[0].remarks for line in wrapped("", remark.split())]


def _ranges(blocks: list[int]) -> str:
    """` in blocks 0–3, 5` for the numbers of blocks."""
    if not blocks:
        return ""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    words = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
    return f" in block{'s' if len(blocks) > 1 else ''} {words}"


def _symbol(name: str) -> str:
    symbols = {"init_std": "σ", "lr": "η", "weight_decay": "λ", "eps": "ε"}
    return f"{symbols[name]} {name}" if name in symbols else name.replace("alpha", "α")


def _listed(parts: list[str]) -> list[str]:
    return [*(f"{part}," for part in parts[:-1]), *parts[-1:]]


def _legend(explained: Iterable[Explained]) -> list[str]:
    """What the letters in brackets stand for, those that were used."""
    numbers = [
        number for one in explained for group in (one.factors, *(r.numbers for r in one.rows)) for number in group
    ]
    used = {source.split()[0] for number in numbers for source in number.source.split(", ")}
    return ["sources", *(f"  {key:2}  {text}" for key, text in SOURCES.items() if key in used)]


def short(value: float) -> str:
    """Six significant digits at most."""
    return f"{value:.6g}"


def wrapped(label: str | None, parts: Iterable[str]) -> list[str]:
    """Parts on as few lines as hold them, after a label; no part is broken. None: flush left, for a title."""
    indent = 4 if label is None else INDENT
    lines, line, bare = [], "" if label is None else f"  {label:<{INDENT - 2}}", True
    for part in parts:
        if not bare and len(line) + 1 + len(part) > COLUMNS:
            lines.append(line)
            line, bare = " " * indent, True
        line, bare = line + ("" if bare else " ") + part, False
    return [*lines, line.rstrip()]


app = single(explain)
