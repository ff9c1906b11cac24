"""Sites: names of parameters with `*` in place of the number of a layer, where layers are alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
Alike = Callable[[str], Any]  # what has to be equal of two parameters that share a site


def containers_of_layers(model: nn.Module, alike: Alike, names: Collection[str]) -> set[str]:
    """Modules whose entries are numbered layers: all that hold parameters have the same ones, by `alike`."""
    found = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, CONTAINERS):
            continue
        entries = []
        for key, _ in module.named_children():
            prefix = f"{path}.{key}." if path else f"{key}."
            inside = {name.removeprefix(prefix): alike(name) for name in names if name.startswith(prefix)}
            if inside:
                entries.append(inside)
        if entries and all(entry == entries[0] for entry in entries):
            found.add(path)
    return found


def site_of(name: str, model: nn.Module, layers: Collection[str]) -> tuple[str, int | None]:
    """The site of a parameter or module, and the number of the outermost layer that it is in."""
    parts: list[str] = []
    module: Any = model
    path, block = "", None
    for part in name.split("."):
        starred = path in layers and isinstance(module, CONTAINERS)
        parts.append("*" if starred else part)
        children = dict(module.named_children()) if isinstance(module, nn.Module) else {}
        if starred and block is None:
            block = list(children).index(part)
        module = children.get(part, getattr(module, part, None))
        path = f"{path}.{part}" if path else part
    return ".".join(parts), block


def sites(
    model: nn.Module, names: Collection[str], alike: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, int | None]], set[str]]:
    """{name: (site, block)}, and the modules that hold numbered layers."""
    layers = containers_of_layers(model, lambda name: alike[name], names)
    return {name: site_of(name, model, layers) for name in names}, layers
