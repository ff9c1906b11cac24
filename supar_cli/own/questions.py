"""What a person says of parameters' roles, and the questions that are left: one for each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from supar_cli.errors import suggestion
from supar_cli.own.roles import Reading
from supar_cli.planning.rules import Role


def class_keys(model: nn.Module, name: str) -> list[str]:
    """`ClassName.attribute` of each module above a parameter, the outermost first."""
    parts, keys = name.split("."), []
    for depth in range(len(parts)):
        above = model.get_submodule(".".join(parts[:depth]))
        keys.append(f"{type(above).__name__}.{'.'.join(parts[depth:])}")
    return keys


def apply_said(readings: Mapping[str, Reading], roles: Mapping[str, Role], words: Mapping[str, list[str]]) -> list[str]:
    """Give parameters the roles that a person says; returns the problems.

    `words`: those by which `roles` may name each parameter, the most specific first.
    """
    problems, used = [], set[str]()
    for name, reading in readings.items():
        key = next((word for word in words[name] if word in roles), None)
        used |= set(words[name]) & set(roles)
        if key is None:
            continue
        role = roles[key]
        if role in ("hidden", "unembedding") and not reading.fan:
            why = reading.question or "no product sums over it"
            problems.append(f"roles[{key!r}]: {role} of {name}, which has no fan-in, as {why}; expected another role")
        reading.role, reading.question, reading.said = role, "", True
    known = [word for name in readings for word in words[name]]
    for key in sorted(set(roles) - used):
        expected = suggestion(key, known) if len(known) < 20 or "did" in suggestion(key, known) else "expected one"
        problems.append(f"roles[{key!r}]: names no parameter, site or ClassName.attribute; {expected}")
    return problems


def questions(
    readings: Mapping[str, Reading], sites: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> list[str]:
    """One question or refusal for each site, all layers together."""
    asked: dict[tuple[str, str], list[str]] = {}
    for name, reading in readings.items():
        if reading.role is None:
            asked.setdefault((sites[name], reading.question), []).append(name)
    found = []
    for (site, question), names in asked.items():
        reading = readings[names[0]]
        many = f" ({len(names)} tensors)" if len(names) > 1 else ""
        by = f" (read by {', '.join(reading.operations)})" if reading.operations else ""
        found.append(f"{site}{many}, {shapes[names[0]]}: {question}{by}; {_answer(site, reading)}")
    return found


def _answer(site: str, reading: Reading) -> str:
    if reading.answers:
        more = [f"or {role!r}" for role in reading.answers[1:]]
        return " ".join([f"say roles={{{site!r}: {reading.answers[0]!r}}}", *more])
    if not reading.sightings:
        return f"expected a pass that reads it, or ignore=[{site!r}] to leave it out of the layout"
    return "expected a model that uses it as one weight, gain, bias or table"
