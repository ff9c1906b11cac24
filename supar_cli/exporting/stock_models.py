"""The classes of transformers that hold models of supar's families: their tensors and their configs, both ways.

`stock_models.yaml` is the table of them; nothing here imports transformers. A multiplier that a class doesn't have is folded
into its tensors (`planning/folding.py`); its attention divides by the root of the head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supar_cli.errors import InputError, suggestion
from supar_cli.planning import document, layout
from supar_cli.planning.plan import PlanModel, PlanViT
from supar_cli.planning.plan_sections import Multipliers

Config = dict[str, Any]
HEAD_BIAS = "unembedding.bias"  # a tensor that supar's families don't have; 0 in a class that has one
NESTED = ("rope_parameters", "rope_scaling", "attn_config")


@dataclass(frozen=True)
class StockTensor:
    """A tensor of a stock model: the plan's tensors `parts` one below the other, `groups` times a share of each.

    `transposed`: stored as (in, out). `reshaped`: the shape that it is stored in, where that has other axes.
    """

    name: str
    parts: tuple[layout.Tensor, ...]
    groups: int = 1
    transposed: bool = False
    reshaped: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reshaped or self._joined_shape

    @property
    def _joined_shape(self) -> tuple[int, ...]:
        whole = (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])
        return whole[::-1] if self.transposed else whole

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """The stored tensor of the parts' values."""
        joined = torch.cat([self._grouped(value) for value in values], dim=1).flatten(0, 1)
        return (joined.t() if self.transposed else joined).reshape(self.shape).contiguous()

    def split(self, stored: Tensor) -> dict[str, Tensor]:
        """The parts' values by their names in the plan."""
        joined = stored.reshape(self._joined_shape)
        rows = self._grouped(joined.t() if self.transposed else joined)
        found = torch.split(rows, [part.shape[0] // self.groups for part in self.parts], dim=1)
        return {part.name: value.flatten(0, 1) for part, value in zip(self.parts, found, strict=True)}

    def _grouped(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.groups, -1, *rows.shape[1:])


@dataclass(frozen=True)
class StockClass:
    """One class. Keys of its config are dotted where they are nested; of several names all are written, and the first that
    is given is read.

    `modules`: the plan's sites in each module, `{}` the number of the block; in `parameters` those that are no module's weight
    but a parameter by themselves, in `shapes` those that are stored in another shape, made of keys of the model section.
    `biases`: parts with biases, and the key that says so (None: always). `required`: the values that a key may have, of
    which the first is written. With every key comes what its absence means; None of the attention's factor: the usual one.
    """

    architecture: str
    model_type: str
    family: str  # that of a model read from it
    norm: str
    positions: str
    activation_key: str | None
    activations: dict[str, str]  # the config's words, of which the first for an activation is written
    keys: dict[str, str]
    defaults: Config  # of supar's keys where the config lacks them; None: it follows from the others
    required: dict[str, tuple[list[Any], Any]]
    dropouts: list[str]
    prefix: str
    heads: list[str]  # names of the module of the untied head, the first of which is written
    modules: dict[str, list[str]]
    biases: dict[str, tuple[str, bool] | None]
    multipliers: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    shapes: dict[str, list[int | str]] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)  # tensors of old files that hold no weights
    is_transposed: bool = False
    is_interleaved: bool = False  # queries, keys and values of a head stand together
    divides_width: bool = False  # the number of heads has to

    @property
    def data_kind(self) -> str:
        """What its models read."""
        return self._section.data_kind

    @property
    def _section(self) -> type[PlanModel]:
        return PlanViT if self.family == "vit" else PlanModel

    def reasons_against(self, model: PlanModel) -> list[str]:
        """Why the class can't hold a model, each beginning with the key of its model section."""
        if model.data_kind != self.data_kind:
            return [f"family {model.family} (it reads {self.data_kind})"]
        activations = list(dict.fromkeys(self.activations.values()))
        wanted: dict[str, list[Any]] = {"norm": [self.norm], "activation": activations, "positions": [self.positions]}
        if "kv_heads" not in self.keys:
            wanted["kv_heads"] = [model.heads]
        if "ffn_ratio" in self.keys:  # transformers' class has this ratio, whatever its config says
            wanted["ffn_width"] = [4 * model.width]
        if not self.biases:
            wanted["bias"] = [False]
        if isinstance(model, PlanViT):
            wanted["pooling"] = ["class"]
        found = [
            f"{key} {vars(model)[key]} (it has {' or '.join(map(str, values))})"
            for key, values in wanted.items()
            if vars(model)[key] not in values
        ]
        if "head_width" not in self.keys and model.attention_width != model.width:
            found.append(f"head_width {model.head_width} (it has width / heads)")
        if self.divides_width and model.width % model.heads:
            found.append(f"heads {model.heads} (it has a divisor of the width)")
        return found

    def held(self, model: PlanModel) -> PlanModel:
        """The model with the multipliers that the class has, the others folded away."""
        plain = {"input": 1.0, "output": 1.0, "attention": 1 / sqrt(model.head_width), "residual": 1.0}
        kept = {name: getattr(model.multipliers, name) for name in self.multipliers}
        return model.model_copy(update={"multipliers": model.multipliers.model_copy(update=plain | kept)})

    def tensors(self, model: PlanModel, biased: Sequence[str] | None = None) -> Iterator[StockTensor]:
        """The class's tensors of a model. `biased`: the parts with biases, by default those that the model needs."""
        if biased is None:
            biased = [part for part, said in self.biases.items() if said is None or model.bias]
        rows = {row.name: row for row in layout.tensors(model.model_copy(update={"bias": True}))}
        rows[HEAD_BIAS] = layout.Tensor(HEAD_BIAS, "bias", HEAD_BIAS, (model.vocab,))
        modules = {self.prefix + module: sites for module, sites in self.modules.items()}
        for module, sites in (modules | {self.heads[0]: ["unembedding"]}).items():
            for block in range(model.layers) if "{}" in module else (0,):
                at = f"blocks.{block}." if "{}" in module else ""
                name = module.format(block)
                for suffix in ("", ".bias"):
                    parts = tuple(rows[at + site + suffix] for site in sites if at + site + suffix in rows)
                    if parts and (not suffix or sites[0].partition(".")[0] in biased):
                        groups = model.heads if self.is_interleaved and len(parts) > 1 else 1
                        turned = self.is_transposed and parts[0].role == "hidden"
                        ending = "" if sites[0] in self.parameters else suffix or ".weight"
                        axes = self.shapes.get(parts[0].site, [])
                        shape = tuple(vars(model)[one] if isinstance(one, str) else one for one in axes)
                        yield StockTensor(name + ending, parts, groups, turned, shape or None)

    def buffer_names(self, model: PlanModel) -> set[str]:
        """The names of tensors that may be in a file and that the model doesn't need."""
        return {self.prefix + name.format(block) for name in self.buffers for block in range(model.layers)}

    def config(self, model: PlanModel) -> Config:
        """The config of a model whose multipliers the class has, or folded (`held`); tokens, classes and precision are not in it."""
        flat: Config = {"architectures": [self.architecture], "model_type": self.model_type}
        for key, names in self.keys.items():
            value = model.ffn_width // model.width if key == "ffn_ratio" else getattr(model, key)
            flat |= dict.fromkeys(names.split(), value)
        if self.activation_key is not None:
            words = {activation: word for word, activation in reversed(list(self.activations.items()))}
            flat[self.activation_key] = words[model.activation]
        for names, (allowed, _) in self.required.items():
            flat |= dict.fromkeys(names.split(), allowed[0])
        flat |= dict.fromkeys(self.dropouts, 0)
        flat |= {said[0]: model.bias for said in self.biases.values() if said}
        for name, (key, _) in self.multipliers.items():
            value = getattr(model.multipliers, name)
            flat[key] = 1 / value if name == "output" else value  # Granite divides the logits
        return _nested(flat)

    def model_of(self, config: Config) -> tuple[PlanModel, list[str], list[str]]:
        """The model of a config, with biases if it has any, the parts with biases, and notes on what it doesn't say.

        Raises InputError with every key that supar's families can't express.
        """
        read = _Reader(config)
        shape: Config = {"norm": self.norm, "positions": self.positions}
        shape["family"] = self.family
        for key, names in self.keys.items():
            value = read.take(names, self.defaults.get(key))
            if value is None and key not in self.defaults:
                read.problems.append(f"{names.split()[0]}: is missing; expected the model's {key}")
            elif value is not None:
                shape[key] = value
        if "ffn_ratio" in shape:
            ratio, width = shape.pop("ffn_ratio"), shape.get("width")
            shape["ffn_width"] = ratio * width if isinstance(ratio, int) and isinstance(width, int) else ratio
        if self.data_kind == "images":
            edge = shape.get("image")
            shape["image"] = [edge, edge] if isinstance(edge, int) else edge
            names = read.take("id2label", dict.fromkeys(range(2)))  # transformers leaves out that there are two
            shape["classes"] = len(names) if isinstance(names, dict) else names
        word = read.take(self.activation_key or "", self.defaults["activation"])
        shape["activation"] = self.activations.get(str(word))
        if shape["activation"] is None:
            read.problems.append(f"{self.activation_key}: {word!r}; expected one of {', '.join(self.activations)}")
        for names, (allowed, absent) in self.required.items():
            read.require(names, allowed, absent)
        for name, values in _table()["refused"].items():
            read.require(name, values, None)
        biased = [part for part, said in self.biases.items() if said is None or read.take(*said)]
        multipliers = read.multipliers(self.multipliers)
        notes = read.finish(self.dropouts)
        return self._validated(shape | {"bias": bool(biased)}, multipliers), biased, notes

    def _validated(self, shape: Config, multipliers: Config) -> PlanModel:
        """The model section; the attention's factor is the usual one unless the class has another. Raises InputError."""
        plain = Multipliers(input=1.0, output=1.0, attention=1.0, residual=1.0)
        try:
            model = self._section(**shape, multipliers=plain)
        except InputError as error:
            parts = [str(problem).partition(": ") for problem in error.problems]
            raise InputError(*(f"{self.keys.get(key, key).split()[0]}: {what}" for key, _, what in parts)) from None
        found = {"attention": 1 / sqrt(model.head_width)} | multipliers
        return model.model_copy(update={"multipliers": plain.model_copy(update=found)})


class _Reader:
    """A config read key by key, so that at its end no key was overlooked."""

    def __init__(self, config: Config) -> None:
        self.given = {key: value for key, value in _flat(config) if value is not None}
        self.taken, self.problems = set[str](), list[str]()
        if config.get("rope_scaling") and config.get("rope_parameters"):
            self.problems.append(
                "rope_scaling: is given beside rope_parameters, and readers differ; expected one of them"
            )

    def take(self, names: str, default: Any = None) -> Any:
        """The value of the first of the names that is given."""
        self.taken.update(names.split())
        return next((self.given[name] for name in names.split() if name in self.given), default)

    def require(self, names: str, allowed: list[Any], absent: Any) -> None:
        value = self.take(names, absent)
        if value is not None and value not in allowed:
            name = next((name for name in names.split() if name in self.given), names.split()[0])
            expected = " or ".join(map(repr, allowed)) or "no such key"
            self.problems.append(f"{name}: {value!r}; supar's families have nothing like it, expected {expected}")

    def multipliers(self, keys: dict[str, tuple[str, float | None]]) -> Config:
        """The multipliers of the forward pass, those that are not the usual ones."""
        found: Config = {}
        for name, (key, absent) in keys.items():
            value = self.take(key, absent)
            if value is None:
                continue
            if type(value) not in (int, float) or not isfinite(value) or value <= 0:
                self.problems.append(f"{key}: {value!r}; expected a number above 0")
            else:
                found[name] = 1 / value if name == "output" else float(value)
        return found

    def finish(self, dropouts: list[str]) -> list[str]:
        """A note on dropouts that are not 0, and on unknown keys. Raises InputError with all problems."""
        if self.problems:
            raise InputError(*self.problems)
        known = self.taken.union(_table()["harmless"], [name for name in dropouts if self.given.get(name) == 0])
        unknown = [name for name in self.given if name not in known and name.rpartition(".")[2] not in known]
        listed = ", ".join(f"{name} {self.given[name]}" for name in unknown)
        return [f"{listed}: supar's models have nothing like it, and take no notice of it"] if unknown else []


def _flat(config: Config) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in NESTED and isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _nested(flat: Config) -> Config:
    found: Config = {}
    for name, value in flat.items():
        section, _, key = name.rpartition(".")
        (found.setdefault(section, {}) if section else found)[key] = value
    return found


@cache
def _table() -> Config:
    path = Path(__file__).with_name("stock_models.yaml")
    found: Config = document.read_file(str(path))[0].data
    return found


@cache
def stock_classes() -> dict[str, StockClass]:
    """The classes by the names of `supar export --to`."""
    rows = {name: row for name, row in _table().items() if "architecture" in row}
    return {
        name: StockClass(
            **{key: value for key, value in (rows.get(row.get("like"), {}) | row).items() if key != "like"}
        )
        for name, row in rows.items()
    }


def find_class(config: Config) -> StockClass:
    """The class of a config. Raises InputError for one that is none of these."""
    given = config.get("model_type")
    for one in stock_classes().values():
        if one.model_type == given:
            return one
    expected = suggestion(given, [one.model_type for one in stock_classes().values()])
    raise InputError(f"model_type: {given!r}, which none of supar's families can hold; {expected}")
