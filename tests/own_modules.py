"""Small modules whose layout is known: what `supar.layout` must answer for each parameter, and the judge of its answers.

An expectation is a text of alternatives between ` | `: `ask` (a question that names the parameter), `refuse` (an error that
names it) or a row: role, fan-in axes in brackets where they matter, then its uses: `embedding first_sum`,
`unembedding[1] head`. `writes` stands for writes_residual, and `*` allows any uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from supar_cli.errors import InputError
from supar_cli.planning.layout_document import Layout, LayoutRow

VOCAB, FEATURES, BATCH, TOKENS, EXPERTS = 11, 7, 2, 5, 3
BASE, WIDER, THIRD = {"width": 16}, {"width": 32}, {"width": 48}


@dataclass(frozen=True)
class Case:
    """A module made at a width, what it is run on, and what its layout must say of each parameter.

    `answers` are the roles that a user says when asked. `together`: sets of names of which either all or none have
    a use, for uses that can be put in more than one right place. `residual`: whether `writes` is compared.
    """

    name: str
    make: Callable[..., nn.Module]
    example: Callable[[nn.Module], Any]
    expected: Mapping[str, str]
    answers: Mapping[str, str] = field(default_factory=dict)
    first_sums: tuple[frozenset[str], ...] = ()
    residual: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    multiply_at: Mapping[str, str | None] = field(default_factory=dict)
    unread: frozenset[str] | None = None  # of which alone a problem may say that they are not read


class Net(nn.Module):
    """Parameters, buffers and modules by name, and a forward pass over them."""

    def __init__(self, run: Callable[..., Any], /, **parts: Any) -> None:
        super().__init__()
        self._run = run
        for name, part in parts.items():
            if isinstance(part, tuple):
                part = nn.Parameter(torch.randn(part) * 0.1)
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._run(self, *inputs, **named)


def ids(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """Token numbers."""
    return (torch.randint(0, VOCAB, (BATCH, TOKENS)),)


def features(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """Vectors of numbers that do not come from a table."""
    return (torch.randn(BATCH, TOKENS, FEATURES),)


Parts = Callable[[int], dict[str, Any]]
Body = Callable[..., torch.Tensor]


def inside(name: str, parts: Parts, body: Body, outputs: int = 1, **settings: Any) -> Case:
    """A case in the middle of a net: ids → `table` → body(model, h, ids) → `head`, of `outputs` times the width."""

    def make(width: int) -> nn.Module:
        made = parts(width)
        table, head = nn.Embedding(VOCAB, width), nn.Linear(outputs * width, VOCAB + 2, bias=False)
        return Net(lambda model, x: model.head(body(model, model.table(x), x)), table=table, **made, head=head)

    expected = {"table.weight": "embedding first_sum", "head.weight": "unembedding[1] head"}
    options = {
        key: settings.pop(key) for key in ("answers", "first_sums", "residual", "options", "unread") if key in settings
    }
    expected |= {name.replace("__", "."): text for name, text in settings.items()}
    return Case(name, make, ids, expected, **options)


def net(name: str, parts: Parts, run: Callable[..., Any], example: Any = ids, **settings: Any) -> Case:
    """A case that is a whole net: run(model, *example)."""
    keys = ("answers", "first_sums", "residual", "options", "multiply_at")
    options = {key: settings.pop(key) for key in keys if key in settings}
    expected = {name.replace("__", "."): text for name, text in settings.items()}
    return Case(name, lambda width: Net(run, **parts(width)), example, expected, **options)


@dataclass(frozen=True)
class Finding:
    """A wrong answer. `kind`: silent, question, missing (no question where one is due), or crash."""

    kind: str
    case: str
    parameter: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind.upper()} {self.case}: {self.parameter}: {self.what}"


_ROW = re.compile(r"(?P<roles>[a-z,]+)(?:\[(?P<axes>[0-9,]*)\])?(?P<uses>( [a-z_*]+)*)$")


def _fits(row: LayoutRow, alternative: str, residual: bool) -> bool:
    """Whether a row is what an alternative says."""
    match = _ROW.match(alternative)
    assert match, f"{alternative!r} is no row"
    if row.role not in match["roles"].split(","):
        return False
    long = {axis for axis, extent in enumerate(row.wider) if extent > 1}  # an axis of one tap changes no fan-in
    if match["axes"] is not None and long & set(row.fan_in_axes) != long & set(map(int, match["axes"].split(","))):
        return False
    uses = set(match["uses"].split())
    if residual and row.writes_residual != ("writes" in uses):
        return False
    uses -= {"writes"}
    found = set(row.uses)
    if not found & {"first_sum", "head", "before_head", "after_head"} and "derived" not in uses:
        found -= {"derived"}  # decides nothing where nothing is folded
    return "*" in uses or found == uses


def _names(problem: str, parameters: Iterable[str]) -> set[str]:
    """The parameters that a problem is about: those in its place, the words before the first colon with a space behind.

    A place may be a site, in which numbers and other keys of containers are `*`.
    """
    place = problem.partition(": ")[0]

    def found(name: str) -> bool:
        parts = [rf"(?:{re.escape(part)}|\*)" for part in name.split(".")[:-1]]
        pattern = r"\.".join([*parts, re.escape(name.rpartition(".")[2])])
        return re.search(rf"(?<![\w.*]){pattern}(?![\w*]|\.\w)", place) is not None

    return {name for name in parameters if found(name)}


def _alternatives(text: str) -> list[str]:
    return text.split(" | ")


def _judge_problems(case: Case, problems: Iterable[str]) -> tuple[list[Finding], set[str]]:
    """The findings about an error's problems, and the parameters that they name."""
    findings, named = list[Finding](), set[str]()
    for problem in problems:
        about = _names(problem, case.expected)
        if not about:
            findings.append(Finding("crash", case.name, "?", f"a problem that names no parameter: {problem}"))
        named |= about
        for name in about:
            wanted = _alternatives(case.expected[name])
            if case.unread is not None and name not in case.unread and "not read" in problem:
                findings.append(Finding("silent", case.name, name, f"it is read, but: {problem}"))
            if not {"ask", "refuse"} & set(wanted):
                findings.append(Finding("question", case.name, name, f"expected {case.expected[name]}, got: {problem}"))
            elif "refuse" not in wanted and "roles" not in problem:
                findings.append(Finding("crash", case.name, name, f"no roles= line in the question: {problem}"))
    return findings, named


def _judge_rows(case: Case, layout: Layout, said: Mapping[str, str]) -> list[Finding]:
    """The findings about the rows of a layout."""
    rows = {row.name: row for row in layout.tensors}
    findings = [
        Finding("silent", case.name, name, f"{'no row' if name in case.expected else 'a row'} of it")
        for name in sorted(set(rows) ^ set(case.expected))
        if case.expected.get(name) != "none"
    ]
    for name, row in rows.items():
        text = case.expected.get(name)
        if text is None:
            continue
        wanted = [one for one in _alternatives(text) if one not in ("ask", "refuse")]
        if name in said:
            wanted = wanted or [said[name] + " *"]
            if not row.said or row.role != said[name]:
                findings.append(Finding("silent", case.name, name, f"{said[name]} was said, the row says {row.role}"))
                continue
        if not any(_fits(row, one, case.residual) for one in wanted):
            writes = " writes" if case.residual and row.writes_residual else ""
            got = f"{row.role}{row.fan_in_axes} {' '.join(row.uses)}{writes}; read by {', '.join(row.read_by)}"
            kind = "missing" if not wanted else "silent"
            findings.append(Finding(kind, case.name, name, f"expected {text}, got {got}"))
        if name in case.multiply_at and row.multiply_at != case.multiply_at[name]:
            what = f"multiply_at is {row.multiply_at!r}; expected {case.multiply_at[name]!r}"
            findings.append(Finding("silent", case.name, name, what))
    if case.first_sums:
        first = frozenset(name for name, row in rows.items() if "first_sum" in row.uses)
        if first not in case.first_sums:
            sums = " or ".join(str(sorted(one)) for one in case.first_sums)
            findings.append(Finding("silent", case.name, "first_sum", f"{sorted(first)}; expected {sums}"))
    return findings


Answer = Layout | InputError


def read(case: Case, layout: Callable[..., Layout], **options: Any) -> Answer:
    """What `layout` answers for a case: a layout, or the error with its questions."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed spends a millisecond on devices
    settings = {"base": BASE, "wider": WIDER, "third": THIRD, "example": case.example, **case.options, **options}
    try:
        return layout(case.make, **settings)
    except InputError as error:
        return error


def judge(case: Case, layout: Callable[..., Layout]) -> list[Finding]:
    """Everything that is wrong in what `layout` answers for a case; a question is answered and its rows are judged too."""
    try:
        answer = read(case, layout)
        if isinstance(answer, Layout):
            return _judge_rows(case, answer, {})
        findings, named = _judge_problems(case, [str(problem) for problem in answer.problems])
        due = {name for name, text in case.expected.items() if set(_alternatives(text)) <= {"ask", "refuse"}}
        said = {name: role for name, role in case.answers.items() if name in named}
        if findings or set(said) < named:
            missed = ", ".join(sorted(named))
            return findings + [
                Finding("missing", case.name, name, f"the problems name {missed} alone") for name in sorted(due - named)
            ]
        answer = read(case, layout, roles={**case.options.get("roles", {}), **said})
    except Exception as error:  # whatever it is, it is a finding, and the next case is judged
        return [Finding("crash", case.name, "?", f"{type(error).__name__}: {error}")]
    if not isinstance(answer, Layout):
        return [Finding("question", case.name, ", ".join(sorted(said)), f"answered, but asked again: {answer}")]
    return _judge_rows(case, answer, said)
