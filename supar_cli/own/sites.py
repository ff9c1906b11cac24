"""Sites: names of parameters with `*` in place of the number of a layer, where layers are alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class Place:
    """An entry of a module that holds numbered ones. `at`: its part of a name; `rest`: the parts behind it."""

    at: int
    container: str
    number: int
    rest: str


def places(name: str, model: nn.Module) -> list[Place]:
    """The numbered entries that a parameter or module is in, the outermost first."""
    found, module, parts = list[Place](), model, name.split(".")
    for at, part in enumerate(parts):
        keys = [key for key, _ in module.named_children()]
        if isinstance(module, CONTAINERS) and part in keys:
            found.append(Place(at, ".".join(parts[:at]), keys.index(part), ".".join(parts[at + 1 :])))
        module = getattr(module, part)
        if not isinstance(module, nn.Module):
            break
    return found


def starred(name: str, at: Collection[int]) -> str:
    """A name with `*` in place of some of its parts."""
    return ".".join("*" if number in at else part for number, part in enumerate(name.split(".")))


def question_sites(model: nn.Module, alike: Mapping[str, Any]) -> dict[str, str]:
    """Sites of questions: a number is `*` if another entry has the same parameter, by `alike`."""

    def shared(entries: dict[int, dict[str, Any]], rest: str) -> bool:
        found = [entry[rest] for entry in entries.values() if rest in entry]
        return len(found) > 1 and all(one == found[0] for one in found)

    return {name: site for name, (site, _) in _sites(model, alike, shared).items()}


def sites(model: nn.Module, alike: Mapping[str, Any], ends: Collection[str]) -> dict[str, tuple[str, int | None]]:
    """{name: (site, block)}: a number is `*` if all entries are layers of one kind and the parameter is alike in all.

    Layers are of one kind if none lacks a parameter that the smallest has. `ends`: the parameters that do what only the
    first or last layer can do, so that a single layer says nothing of others.
    """

    def shared(entries: dict[int, dict[str, Any]], rest: str) -> bool:
        smallest = min(entries.values(), key=len)
        if not all(smallest.keys() <= entry.keys() for entry in entries.values()) or rest not in smallest:
            return False
        return all(entry[rest] == smallest[rest] for entry in entries.values())

    found = _sites(model, alike, shared)
    return {name: (name, None) if name in ends and _is_alone(name, model) else found[name] for name in found}


def _is_alone(name: str, model: nn.Module) -> bool:
    outermost = next(iter(places(name, model)), None)
    return outermost is not None and len(list(model.get_submodule(outermost.container).children())) == 1


def _sites(
    model: nn.Module, alike: Mapping[str, Any], shared: Callable[[dict[int, dict[str, Any]], str], bool]
) -> dict[str, tuple[str, int | None]]:
    inside = {name: places(name, model) for name in alike}
    entries: dict[str, dict[int, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, found in inside.items():
        for place in found:
            entries[place.container][place.number][place.rest] = alike[name]
    sites = {}
    for name, found in inside.items():
        kept = [place for place in found if shared(entries[place.container], place.rest)]
        sites[name] = starred(name, [place.at for place in kept]), kept[0].number if kept else None
    return sites


def module_site(name: str, model: nn.Module) -> str:
    """A module's name with `*` in place of all numbers."""
    return starred(name, [place.at for place in places(name, model)]) if name else ""
