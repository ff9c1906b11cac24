"""The strict, frozen sections that documents are made of, validated by pydantic's core.

They use `pydantic_core` and not `pydantic.BaseModel`: to make the first class of the latter takes longer than a whole
`supar transfer` may take. Validation, its errors and the JSON Schema are pydantic's either way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, dataclass_transform, get_args, get_origin

from pydantic_core import SchemaValidator, ValidationError, core_schema

from supar_cli.errors import InputError, Problem, suggestion
from supar_cli.planning.document import Path_, dotted

_UNSET: Any = object()
LARGEST = 2**63 - 1  # the largest integer that readers in other languages, numpy and torch can hold
_PLAIN: dict[Any, Callable[..., Any]] = {
    Any: core_schema.any_schema,
    None: core_schema.none_schema,
    int: lambda **bounds: core_schema.int_schema(**{"le": LARGEST, **bounds}),
    float: core_schema.float_schema,
    str: core_schema.str_schema,
    bool: core_schema.bool_schema,
}


@dataclass(frozen=True)
class Text:
    """What a text of type `Annotated[str, Text(…)]` must match: a regular expression, and its description for errors."""

    pattern: str
    words: str


@dataclass(frozen=True)
class _Field:
    """What `Field` says of a key: its default, or the function that makes it, and its bounds."""

    default: Any = _UNSET
    bounds: dict[str, Any] = field(default_factory=dict)
    is_neutral: bool = False
    is_omitted: bool = False

    @cached_property
    def value(self) -> Any:
        """The default itself."""
        return self.default() if callable(self.default) else self.default

    def schema(self, hint: Any) -> core_schema.CoreSchema:
        """The schema of a key of a type: within its bounds, and with its default."""
        found = _typed(hint, self.bounds)
        if callable(self.default):
            return core_schema.with_default_schema(found, default_factory=self.default)
        return found if self.default is _UNSET else core_schema.with_default_schema(found, default=self.default)


def Field(
    *,
    default: Any = _UNSET,
    default_factory: Callable[[], Any] | None = None,
    neutral: bool = False,
    omit: bool = False,
    **bounds: Any,
) -> Any:
    """A key with a default or with bounds: `gt`, `ge`, `lt`, `le`, `min_length`, `max_length` as pydantic has them.

    A key that documents of an earlier version don't have must be `neutral`: its default reproduces
    their meaning and fills in a missing key, and hashes leave the key out while it has that value. With `omit`,
    documents leave it out too.
    """
    return _Field(default if default_factory is None else default_factory, bounds, neutral, omit)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class Section:
    """Strict and frozen: unknown keys, texts in place of numbers and `yes` in place of `true` are errors.

    A subclass states its keys as annotations. `fill_defaults(data)` may complete the plain data before it is validated, `check`
    may refuse the validated section with a ValueError that begins with the key that is wrong.
    """

    __slots__ = ("__dict__", "__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__")

    # a document's earlier kinds, each with the function that brings its data to today's form
    EARLIER: ClassVar[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {}
    WHOLE_SECTIONS: ClassVar[tuple[str, ...]] = ()  # sections that must have every key in documents that supar wrote

    UNHASHED: ClassVar[tuple[str, ...]] = ()  # keys that no hash includes
    SHORT: ClassVar[str] = ""  # the key that a number or a text in place of the section stands for

    def __init__(self, **values: Any) -> None:
        """Raises InputError with every problem."""
        try:
            self.validator().validate_python(values, self_instance=self)
        except ValidationError as error:
            found = (
                Problem("", what, expected, where=dotted(path)) for path, what, expected in problems(type(self), error)
            )
            raise InputError(*map(str, found)) from None

    @classmethod
    def fill_defaults(cls, data: Any) -> Any:
        return data

    def check(self) -> None:
        """Raise ValueError when keys don't go together."""

    @classmethod
    @cache
    def keys(cls) -> dict[str, Any]:
        """The types of the section's keys, by name, a base class's first."""
        hints: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Section):
                # as typing.get_type_hints, but compiled once a class: that is a tenth of a `supar transfer`
                texts = ",".join(f"{name!r}: {text}" for name, text in vars(base).get("__annotations__", {}).items())
                hints |= eval(f"{{{texts}}}", dict(vars(sys.modules[base.__module__])))
        return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}

    @classmethod
    @cache
    def schema(cls) -> core_schema.CoreSchema:
        """The section in pydantic's core schema."""
        fields = {name: core_schema.model_field(cls.fields()[name].schema(hint)) for name, hint in cls.keys().items()}
        known = core_schema.model_fields_schema(fields, model_name=cls.__name__, extra_behavior="forbid")
        config = core_schema.CoreConfig(strict=True, allow_inf_nan=False)
        found = core_schema.model_schema(cls, known, config=config)
        return core_schema.no_info_wrap_validator_function(cls._validated, found)

    @classmethod
    def _validated(cls, data: Any, validate: Callable[[Any], Self]) -> Self:
        if type(data) is cls:  # frozen, and validated when it was made
            return data
        if cls.SHORT and isinstance(data, int | float | str):
            data = {cls.SHORT: data}
        section = validate(cls.fill_defaults(data))
        section.check()
        return section

    @classmethod
    @cache
    def validator(cls) -> SchemaValidator:
        return SchemaValidator(cls.schema())

    @classmethod
    def model_validate(cls, data: Any) -> Self:
        """The section of plain data. Raises pydantic's ValidationError with everything that is wrong."""
        return cls.validator().validate_python(data)  # type: ignore[no-any-return]

    @classmethod
    @cache
    def fields(cls) -> dict[str, _Field]:
        """What the class says of each key beside its type."""
        given = {name: getattr(cls, name, _UNSET) for name in cls.keys()}  # noqa: SIM118
        return {name: one if isinstance(one, _Field) else _Field(one) for name, one in given.items()}

    def model_dump(
        self, *, include: Collection[str] | None = None, exclude: Collection[str] = (), identity: bool = False
    ) -> dict[str, Any]:
        """Plain data, keys in the order of the class; `include` and `exclude` name keys of this section.

        `identity`: what hashes are taken of, without the keys of UNHASHED and those that have their neutral value.
        """
        found, fields = {}, self.fields()
        for name, value in vars(self).items():
            if name in exclude or (include is not None and name not in include) or (identity and name in self.UNHASHED):
                continue
            own = fields[name]
            if own.is_neutral and (identity or own.is_omitted) and value == own.value:
                continue
            found[name] = _plain(value, identity)
        return found

    def identity(self, *, include: Collection[str] | None = None, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The plain data that is hashed."""
        return self.model_dump(include=include, exclude=exclude, identity=True)

    def model_copy(self, *, update: dict[str, Any]) -> Self:
        """A copy with some keys replaced, not validated again."""
        found = copy(self)
        vars(found).update(update)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} can't be set")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)


def _plain(value: Any, identity: bool) -> Any:
    if isinstance(value, Section):
        return value.model_dump(identity=identity)
    if isinstance(value, list):
        return [_plain(item, identity) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, identity) for key, item in value.items()}
    return value


def _words(hint: Any) -> str:
    """The name of a union's type in errors."""
    if get_origin(hint) is dict:
        return "a mapping of names to these"
    if get_origin(hint) is Annotated:
        return str(hint.__metadata__[0].words)
    plain = {float: "a number", int: "a number", str: "a fraction such as 1/128", NoneType: "null"}
    return plain.get(hint) or ", ".join(map(repr, get_args(hint)))


def _typed(hint: Any, bounds: dict[str, Any]) -> core_schema.CoreSchema:
    """The schema of a type; bounds hold for the value itself, not for None. Raises TypeError for a type no document has."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint](**bounds)  # type: ignore[no-any-return]
    if origin is Annotated:
        return core_schema.str_schema(pattern=hint.__metadata__[0].pattern)
    if origin is Literal:
        return core_schema.literal_schema(list(inner))
    if origin in (UnionType, Union):  # a Literal makes the latter of `|`
        return _union(inner, bounds)
    if origin is list:
        return core_schema.list_schema(_typed(inner[0], {}), **bounds)
    if origin is dict:
        return core_schema.dict_schema(core_schema.str_schema(), _typed(inner[1], {}), **bounds)
    if is_section(hint):
        return hint.schema()  # type: ignore[no-any-return]
    raise TypeError(f"{hint!r}: unsupported type of a document's key")


TAG = "family"  # the key that tells the sections of a union apart


def _union(types: tuple[Any, ...], bounds: dict[str, Any]) -> core_schema.CoreSchema:
    """The schema of a union: one of several sections is chosen by the words that each allows under TAG."""
    if all(map(is_section, types)):
        sections: dict[Any, Any] = {word: one.schema() for one in types for word in get_args(one.keys()[TAG])}
        message = f"should be one of {', '.join(sections)}"
        return core_schema.tagged_union_schema(
            sections, TAG, custom_error_type="union_tag", custom_error_message=message
        )
    if len(types) == 2 and NoneType in types:
        return core_schema.nullable_schema(_typed(types[types[0] is NoneType], bounds))
    message = f"Input should be {' or '.join(map(_words, types))}"
    choices: list[Any] = [_typed(None if one is NoneType else one, bounds) for one in types]
    return core_schema.union_schema(choices, custom_error_type="union", custom_error_message=message)


def is_section(hint: Any) -> bool:
    """Whether a type is a class of sections."""
    return isinstance(hint, type) and issubclass(hint, Section)


def section_of(annotation: Any, tag: Any = None) -> type[Section] | None:
    """The section class in a key's type, None where it holds none; of a union the one that `tag` chooses, or the first."""
    found = [one for one in (annotation, *get_args(annotation)) if is_section(one)]
    chosen = (one for one in found if tag in get_args(one.keys().get(TAG)))
    return next(chosen, next(iter(found), None))


def problems(kind: type[Section], error: ValidationError) -> Iterator[tuple[Path_, str, str]]:
    """(path, what is wrong, what is expected) of each thing that pydantic found."""
    for item in error.errors(include_url=False):
        yield _problem(kind, dict(item))


def _problem(kind: type[Section], item: dict[str, Any]) -> tuple[Path_, str, str]:
    path, section = _walk(kind, tuple(item["loc"]))
    what, expected, given = str(item["msg"]), "", item["input"]
    match item["type"]:
        case "extra_forbidden":
            known = list(section.keys()) if section is not None else []
            what, expected = f"unknown key {path[-1]!r}", suggestion(path[-1], known)
        case "missing":
            path, what = path[:-1], f"the key {path[-1]!r} is missing"
        case "value_error":
            what = what.removeprefix("Value error, ")
            where, colon, rest = what.partition(": ")
            if colon and " " not in where:  # our own validators begin with the key that is wrong
                path, what = (*path, *(int(part) if part.isdigit() else part for part in where.split("."))), rest
            what, _, expected = what.partition("; ")
        case "too_short" | "too_long" as bound:
            most, limit = bound == "too_long", item["ctx"]["max_length" if bound == "too_long" else "min_length"]
            what, expected = f"has {len(given)} items", f"expected at {'most' if most else 'least'} {limit}"
        case "union_tag" if isinstance(given, dict):
            path, what = (*path, TAG), f"{what}, not {given.get(TAG)!r}"
        case "union_tag" | "model_attributes_type" | "model_type" | "dict_type":
            what, expected = "not a mapping", "expected lines of `key: value`"
        case _:
            for words in ("Input should", "should"), ("valid string", "text"), ("valid number", "number"):
                what = what.replace(*words)
            what += "" if isinstance(given, dict | list) else f", not {given!r}"
    return path, what, expected


def _walk(kind: type[Section], location: Path_) -> tuple[Path_, type[Section] | None]:
    """The path of a document for pydantic's location, and the section that its last part is a key of.

    In a union of sections pydantic's location names the one that was chosen, a part that no document has.
    """
    path: Path_ = ()
    owner: type[Section] | None = None
    section: type[Section] | None = kind
    annotation: Any = None
    for part in location:
        if sum(map(is_section, get_args(annotation))) > 1 and isinstance(part, str) and section_of(annotation, part):
            section, annotation = section_of(annotation, part), None
            continue
        path, owner = (*path, part), section
        if get_origin(annotation) is dict and section is not None:  # a mapping of names to sections: this is a name
            annotation = section
            continue
        if isinstance(part, str):
            annotation = section.keys().get(part) if section is not None else None
            section = section_of(annotation)
    return path, owner
