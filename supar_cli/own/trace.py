"""Layouts of users' models: each tensor's role, fan-in and scaling extents, read from what a forward pass does with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from inspect import signature
from typing import Any, get_args

import torch
from torch import Tensor, nn

from supar_cli.errors import InputError, suggestion
from supar_cli.own import constants, starts
from supar_cli.own.flow import Flow
from supar_cli.own.models import Shapes, arguments_of, plain_operations, refusals, shapes_of
from supar_cli.own.questions import apply_said, class_keys, questions
from supar_cli.own.record import Record
from supar_cli.own.roles import Reading, read
from supar_cli.own.sites import module_site, question_sites, sites
from supar_cli.own.uses import Uses, find_uses
from supar_cli.own.values import tensors_in
from supar_cli.planning.layout import largest_over_head
from supar_cli.planning.layout_document import Layout, LayoutRow
from supar_cli.planning.rules import Role

Size = Mapping[str, int]
SEEDS = 6  # chosen: a layer that a pass skips with probability ½ is missed by all of them in 1 of 64 models


def layout(
    make: Callable[..., nn.Module],
    base: Size,
    wider: Size,
    third: Size | None = None,
    target: Size | None = None,
    example: Callable[[nn.Module], Any] | None = None,
    run: Callable[[nn.Module], Any] | None = None,
    roles: Mapping[str, Role] | None = None,
    ignore: Collection[str] = (),
) -> Layout:
    """Read the layout of a model from a forward pass at two sizes.

    `make(**base)` and `make(**wider)` are built on the CPU and run on `example(model)`, a tuple of arguments or a dict of
    keywords (the example may also be a function of nothing, or the arguments), or by `run(model)`, which returns what
    leaves the model. `third` and `target` are built without memory.
    `roles`: {name, site or ClassName.attribute: role} of what can't be decided. `ignore`: names or sites left out.
    Raises InputError with every question and problem.
    """
    sizes = {"base": base, "wider": wider, "third": third, "target": target}
    _check_arguments(make, sizes, example, run, roles or {})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = _Reader(make, base, wider, example, run, dict(roles or {}), list(ignore))
        return reader.read(third, target)


def _check_arguments(
    make: Any, sizes: Mapping[str, Size | None], example: Any, run: Any, roles: Mapping[str, str]
) -> None:
    problems = []
    base, wider, third = (dict(sizes[key] or {}) for key in ("base", "wider", "third"))
    for key, size in sizes.items():
        if size is not None and set(size) != set(base):
            problems.append(f"{key}: {dict(size)}; expected the names of base: {', '.join(base)}")
        elif size is not None and not all(type(value) is int for value in size.values()):
            problems.append(f"{key}: {dict(size)}; expected whole numbers")
    try:
        signature(make).bind(**base)
    except (TypeError, ValueError) as error:
        problems.append(f"make: {error}; expected a function of {', '.join(base)}")
    if base == wider:
        problems.append(f"wider: {wider} equals base, so nothing scales; expected a larger size")
    if third in (base, wider):
        problems.append(f"third: {third}; expected a size that is neither base nor wider")
    if (example is None) == (run is None):
        problems.append("example: expected either example(model), which returns arguments, or run(model)")
    known = get_args(Role)
    problems += [
        f"roles[{key!r}]: {role!r}; {suggestion(role, known)}" for key, role in roles.items() if role not in known
    ]
    if problems:
        raise InputError(*problems)


@dataclass
class _Pass:
    """A model of one size, what a pass did with its parameters, and whether it returned what leaves it."""

    model: nn.Module
    record: Record
    returns: bool = True


class _Reader:
    """Reads one layout. Problems are collected and raised together."""

    def __init__(
        self, make: Any, base: Size, wider: Size, example: Any, run: Any, roles: dict[str, Role], ignore: list[str]
    ) -> None:
        self.make, self.base, self.wider, self.example, self.run = make, dict(base), dict(wider), example, run
        self.roles, self.ignore, self.used = roles, ignore, set[str]()
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.ignored: dict[str, None] = {}
        self.narrow, self.wide = self._build(self.base), self._build(self.wider)
        self._refuse(self.narrow)
        every = dict(self.narrow.named_parameters())
        shapes = {name: list(parameter.shape) for name, parameter in every.items()}
        self.question_sites = question_sites(self.narrow, shapes)
        self.own = self._parameters(self.narrow)

    def read(self, third: Size | None, target: Size | None) -> Layout:
        shapes = {"base": shapes_of(self.own), "wider": self._shapes(self.wide, "wider")}
        for key, size in (("third", third), ("target", target)):
            if size is not None:
                shapes[key] = self._shapes(self._build_without_memory(key, size), key)
        self._raise()
        self.shapes = shapes
        self.scales = {
            name: frozenset(a for a, (n, w) in enumerate(zip(shape, shapes["wider"][name], strict=True)) if n != w)
            for name, shape in shapes["base"].items()
        }
        if not any(self.scales.values()):
            raise InputError(
                f"wider: nothing scales from {self.base} to {self.wider}; expected a size that widens the model"
            )
        self._check_growth()
        passes = [self._trace(self.narrow), self._trace(self.wide)]
        readings = self._read_roles(*passes)
        uses = find_uses(passes[1].record, readings, passes[1].model, passes[1].returns)
        rows = self._rows(readings, uses)
        self.notes += uses.notes
        self._raise()
        self.notes += constants.compare(
            passes[0].record.numbers, passes[1].record.numbers, lambda module: module_site(module, self.narrow)
        )
        if not passes[1].returns:
            self.notes.append(
                "run returned nothing: readouts whose result no other weight takes count as leaving the model"
            )
        if found := largest_over_head([row.tensor(Fraction(0)) for row in rows]):
            what = f"{found[0].site}: its fan-in, {found[0].fan_in}, is {found[1]:.3g} times the head's"
            why = "in nets of convolutions, which have that, the best rate moves with density while alpha_output is 1"
            how = "tune both on the dense proxy, such as by search.alpha_output: [1, 4, 8, 16]"
            self.notes.append(f"{what}; {why}: {how}")
        return Layout(
            kind="supar.layout/v1",
            base=self.base,
            wider=self.wider,
            third=dict(third) if third else None,
            target=dict(target) if target else None,
            tensors=rows,
            ignored=list(self.ignored),
            notes=list(dict.fromkeys(self.notes)),
        )

    def _raise(self) -> None:
        if self.problems:
            raise InputError(*dict.fromkeys(self.problems))

    # models

    def _build(self, size: Mapping[str, int]) -> nn.Module:
        torch.default_generator.manual_seed(0)
        model = self.make(**size)
        if not isinstance(model, nn.Module):
            raise InputError(f"make: returned a {type(model).__name__}; expected a torch.nn.Module")
        return model.train()

    def _build_without_memory(self, key: str, size: Size) -> nn.Module:
        try:
            with torch.device("meta"):
                return self._build(size)
        except Exception as error:  # whatever a constructor does with values that are not there
            self.notes.append(
                f"{key}: built in memory, as it could not be built on the meta device ({type(error).__name__})"
            )
            return self._build(size)

    def _refuse(self, model: nn.Module) -> None:
        self.problems += refusals(model)
        self._raise()

    def _is_ignored(self, name: str) -> bool:
        words = (name, self.question_sites.get(name))
        found = [word for word in self.ignore if word in words or name.startswith(f"{word}.")]
        self.used |= set(found)
        self.ignored |= dict.fromkeys([name] if found else [])
        return bool(found)

    def _parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """Those of a model by name, without the ignored."""
        self._refuse(model)
        return {name: one for name, one in model.named_parameters() if not self._is_ignored(name)}

    def _shapes(self, model: nn.Module, key: str) -> Shapes:
        found = shapes_of({n: p for n, p in model.named_parameters() if not self._is_ignored(n)})
        for name in sorted(set(found) ^ set(self.own)):
            where = key if name in found else "base"
            self.problems.append(f"{name}: is in the model at {where} only; expected sizes that differ in width alone")
        for name, shape in shapes_of(self.own).items():
            if name in found and len(found[name]) != len(shape):
                self.problems.append(f"{name}: has {len(shape)} extents at base and {len(found[name])} at {key}")
        return found

    def _check_growth(self) -> None:
        """Only what grows from base to wider may grow further."""
        for key in ("third", "target"):
            for name, shape in self.shapes.get(key, {}).items():
                base = self.shapes["base"][name]
                odd = [
                    a for a, (n, w) in enumerate(zip(base, shape, strict=True)) if n != w and a not in self.scales[name]
                ]
                if odd:
                    self.problems.append(
                        f"{name}: extent {odd[0]} is {base[odd[0]]} at base and wider but {shape[odd[0]]} at {key}"
                    )

    # passes

    def _trace(self, model: nn.Module) -> _Pass:
        parameters = self._parameters(model)
        record = Record(parameters, self.scales)
        flow, found = Flow(record), _Pass(model, record)
        numbers = None
        for seed in range(SEEDS):
            if seed and all(record.sightings.values()):
                break
            found.returns = self._pass(model, flow, seed)
            numbers = numbers or list(record.numbers)
        if not all(record.sightings.values()):  # some parts run in evaluation only
            model.eval()
            self._pass(model, flow, 0)
            model.train()
        record.numbers = numbers or []
        return found

    def _pass(self, model: nn.Module, flow: Flow, seed: int) -> bool:
        flow.begin()
        with plain_operations():
            torch.default_generator.manual_seed(seed)
            if self.run is not None:
                with flow.watching(model):
                    result = self.run(model)
            else:
                args, keywords = arguments_of(self.example, model)
                flow.take((args, keywords))
                with flow.watching(model):
                    result = model(*args, **keywords)
        flow.leave(result)
        return next(tensors_in(result), None) is not None

    # roles

    def _read_roles(self, narrow: _Pass, wide: _Pass) -> dict[str, Reading]:
        found = {}
        for name, parameter in self.own.items():
            values = parameter.detach()
            is_constant = bool((values == values.flatten()[0]).all())
            shape = self.shapes["wider"][name]
            reading = read(wide.record, name, shape, self.scales[name], is_constant)
            small = read(narrow.record, name, self.shapes["base"][name], self.scales[name], is_constant)
            if (small.role, small.fan) != (reading.role, reading.fan) and 1 not in self.shapes["base"][name]:
                reading.question = reading.question or "base and wider use it in different ways"
                reading.role, reading.answers = None, ()
            found[name] = reading
        places = self.question_sites
        words = {name: [name, places[name], *class_keys(self.narrow, name)] for name in found}
        self.problems += apply_said(found, self.roles, words)
        self.problems += questions(found, places, self.shapes["base"])
        self.problems += [
            f"ignore: {word!r} names no parameter; {suggestion(word, list(found))}"
            for word in self.ignore
            if word not in self.used
        ]
        return found

    # rows

    def _rows(self, readings: dict[str, Reading], uses: Uses) -> list[LayoutRow]:
        own = {name: starts.measure(parameter) for name, parameter in self.own.items()}
        kept = {
            name: readings[name].role is not None
            and starts.keeps_own(parameter, readings[name].role or "bias", readings[name].is_looked_up)
            for name, parameter in self.own.items()
        }
        alike = {
            name: (
                (self.shapes["base"][name], self.shapes["wider"][name]),
                (one.role, one.fan, tuple(uses.of[name]), name in uses.writers, kept[name]),
            )
            for name, one in readings.items()
        }
        ends = {name for name, found in uses.of.items() if set(found) - {"derived"}}
        places = sites(self.narrow, alike, ends)
        others = self._other_names()
        rows: list[dict[str, Any]] = []
        for name, reading in readings.items():
            site, block = places[name]
            module = self.narrow.get_submodule(name.rpartition(".")[0])
            if reading.role is None:
                continue
            rows.append(
                dict(
                    name=name,
                    site=site,
                    role=reading.role,
                    block=block,
                    **{key: self.shapes[key][name] for key in self.shapes},
                    fan_in_axes=list(reading.fan),
                    scales=sorted(self.scales[name]),
                    writes_residual=name in uses.writers,
                    also=others.get(name, []),
                    uses=uses.of[name],
                    multiply_at=uses.multiply_at.get(name),
                    own=own[name],
                    init="own" if kept[name] else "normal",
                    read_by=reading.operations,
                    module=type(module).__name__,
                    said=reading.said,
                )
            )
        return [] if self.problems else [LayoutRow(**row) for row in rows]

    def _other_names(self) -> dict[str, list[str]]:
        """Further names of parameters that have several."""
        first = {id(parameter): name for name, parameter in self.own.items()}
        found: dict[str, list[str]] = {}
        for name, parameter in self.narrow.named_parameters(remove_duplicate=False):
            known = first.get(id(parameter))
            if known is not None and known != name:
                found.setdefault(known, []).append(name)
        return found
