"""The strict, frozen sections that documents are made of, validated by pydantic's core.

They stand on `pydantic_core` and not on `pydantic.BaseModel`, whose first class takes longer to make than a whole
`supar transfer` may last; validation, its errors and the JSON Schema are pydantic's either way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
)

from pydantic_core import SchemaValidator, core_schema

_UNSET: Any = object()
LARGEST = 2**63 - 1  # what readers in other languages, numpy and torch hold of an integer
_PLAIN: dict[type, Callable[..., Any]] = {
    int: lambda **bounds: core_schema.int_schema(**{"le": LARGEST, **bounds}),
    float: core_schema.float_schema,
    str: core_schema.str_schema,
    bool: core_schema.bool_schema,
}


class Text:
    """What a text of type `Annotated[str, Text(…)]` has to be: a regular expression, and words for it in errors."""

    def __init__(self, pattern: str, words: str) -> None:
        self.pattern, self.words = pattern, words


class _Field:
    """Default and bounds of a key: `gt`, `ge`, `lt`, `le`, `min_length`, `max_length` as pydantic has them."""

    def __init__(
        self, default: Any, bounds: dict[str, Any], is_neutral: bool = False, is_omitted: bool = False
    ) -> None:
        self.default, self.bounds = default, bounds
        self.is_neutral, self.is_omitted = is_neutral, is_omitted

    def schema(self, schema: core_schema.CoreSchema) -> core_schema.CoreSchema:
        """The key's schema with its default."""
        if isinstance(self.default, type) and issubclass(self.default, Section):  # made of nothing by its own schema
            return core_schema.with_default_schema(schema, default_factory=dict, validate_default=True)
        if callable(self.default):
            return core_schema.with_default_schema(schema, default_factory=self.default)
        return schema if self.default is _UNSET else core_schema.with_default_schema(schema, default=self.default)

    @property
    def neutral(self) -> Any:
        """The neutral value as plain data."""
        if isinstance(self.default, type) and issubclass(self.default, Section):
            return self.default.default_data()
        return self.default() if callable(self.default) else self.default


def Field(
    *,
    default: Any = _UNSET,
    default_factory: Callable[[], Any] | None = None,
    neutral: bool = False,
    omit: bool = False,
    **bounds: Any,
) -> Any:
    """A key with a default or with bounds.

    A key that documents of an earlier version don't have must be `neutral`: its default means what they meant, is filled
    in where the key is missing, and a hash leaves the key out while it has that value. With `omit` the key is not
    written either while it has it.
    """
    return _Field(default if default_factory is None else default_factory, bounds, neutral, omit)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class Section:
    """Strict and frozen: an unknown key, a text for a number, a yes for a true are errors.

    A subclass states its keys as annotations. `fill_defaults(data)` may complete the plain data before it is validated, `check`
    may refuse the validated section with a ValueError that begins with the key that is wrong.
    """

    __slots__ = ("__dict__", "__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__")

    # a document's earlier kinds, each with the function that brings its data to today's form
    EARLIER: ClassVar[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {}
    WHOLE_SECTIONS: ClassVar[tuple[str, ...]] = ()  # of a document that supar wrote, sections that may lack no key

    _schema: ClassVar[core_schema.CoreSchema | None] = None
    _validator: ClassVar[SchemaValidator | None] = None
    _keys: ClassVar[dict[str, Any] | None] = None
    _neutral: ClassVar[dict[str, _Field] | None] = None

    def __init_subclass__(cls) -> None:
        cls._schema = cls._validator = cls._keys = cls._neutral = (
            None  # made when first used, from the class's own keys
        )

    def __init__(self, **values: Any) -> None:
        self.validator().validate_python(values, self_instance=self)

    @classmethod
    def fill_defaults(cls, data: Any) -> Any:
        return data

    def check(self) -> None:
        """Raise ValueError when keys don't go together."""

    @classmethod
    def keys(cls) -> dict[str, Any]:
        """The types of the section's keys, by name, a base class's first."""
        if cls._keys is None:
            hints: dict[str, Any] = {}
            for base in reversed(cls.__mro__):
                if issubclass(base, Section):
                    # as typing.get_type_hints, but compiled once a class: that is a tenth of a `supar transfer`
                    texts = ",".join(
                        f"{name!r}: {text}" for name, text in vars(base).get("__annotations__", {}).items()
                    )
                    hints |= eval(f"{{{texts}}}", dict(vars(sys.modules[base.__module__])))
            cls._keys = {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}
        return cls._keys

    @classmethod
    def schema(cls) -> core_schema.CoreSchema:
        """The section in pydantic's core schema."""
        if cls._schema is None:
            fields = {name: core_schema.model_field(_keyed(cls, name, hint)) for name, hint in cls.keys().items()}
            known = core_schema.model_fields_schema(fields, model_name=cls.__name__, extra_behavior="forbid")
            config = core_schema.CoreConfig(strict=True, allow_inf_nan=False)
            found = core_schema.model_schema(cls, known, config=config)
            cls._schema = core_schema.no_info_wrap_validator_function(cls._validated, found)
        return cls._schema

    @classmethod
    def _validated(cls, data: Any, validate: Callable[[Any], Self]) -> Self:
        if type(data) is cls:  # frozen, and validated when it was made
            return data
        section = validate(cls.fill_defaults(data))
        section.check()
        return section

    @classmethod
    def validator(cls) -> SchemaValidator:
        if cls._validator is None:
            cls._validator = SchemaValidator(cls.schema())
        return cls._validator

    @classmethod
    def model_validate(cls, data: Any) -> Self:
        """The section of plain data. Raises pydantic's ValidationError with everything that is wrong."""
        return cls.validator().validate_python(data)  # type: ignore[no-any-return]

    @classmethod
    def default_data(cls) -> dict[str, Any]:
        """What `model_dump` gives of a section of defaults."""
        found: dict[str, Any] = {}
        for name in cls.keys():  # noqa: SIM118
            given = getattr(cls, name)
            if not isinstance(given, _Field):
                found[name] = given
            elif not given.is_omitted:
                found[name] = given.neutral
        return found

    @classmethod
    def neutral_fields(cls) -> dict[str, _Field]:
        """The keys that older documents don't have, each with its neutral value."""
        if cls._neutral is None:
            given = {name: getattr(cls, name, None) for name in cls.keys()}  # noqa: SIM118
            cls._neutral = {
                name: field for name, field in given.items() if isinstance(field, _Field) and field.is_neutral
            }
        return cls._neutral

    def model_dump(self, *, include: Collection[str] | None = None, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Plain data, keys in the order of the class; `include` and `exclude` name keys of this section."""
        names = [name for name in vars(self) if (include is None or name in include) and name not in exclude]
        found = {name: _plain(vars(self)[name]) for name in names}
        for name, field in self.neutral_fields().items():
            if field.is_omitted and name in found and found[name] == field.neutral:
                del found[name]
        return found

    def identity(self, *, include: Collection[str] | None = None, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Plain data as hashes are taken of it: without keys that have their neutral value."""
        names = [name for name in vars(self) if (include is None or name in include) and name not in exclude]
        neutral = self.neutral_fields()
        found = {name: _plain(vars(self)[name], identity=True) for name in names}
        return {
            name: value
            for name, value in found.items()
            if name not in neutral or _plain(vars(self)[name]) != neutral[name].neutral
        }

    def model_copy(self, *, update: dict[str, Any]) -> Self:
        """A copy with some keys replaced, not validated again."""
        made = object.__new__(type(self))
        vars(made).update({**vars(self), **update})
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} can't be set")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), vars(self))


def _restored(cls: type[Section], values: dict[str, Any]) -> Section:
    made = object.__new__(cls)
    vars(made).update(values)
    return made


def _plain(value: Any, identity: bool = False) -> Any:
    if isinstance(value, Section):
        return value.identity() if identity else value.model_dump()
    if isinstance(value, list):
        return [_plain(item, identity) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, identity) for key, item in value.items()}
    return value


def _keyed(cls: type[Section], name: str, hint: Any) -> core_schema.CoreSchema:
    """The schema of one key: its type within its bounds, and its default."""
    given = getattr(cls, name, _UNSET)
    field = given if isinstance(given, _Field) else _Field(given, {})
    return field.schema(_typed(hint, field.bounds))


def _words(hint: Any) -> str:
    """A type of a union as an error names it."""
    if get_origin(hint) is dict:
        return "a mapping to these"
    if get_origin(hint) is Annotated:
        return str(hint.__metadata__[0].words)
    plain = {float: "a number", int: "a number", str: "a fraction such as 1/128", NoneType: "null"}
    return plain.get(hint) or ", ".join(map(repr, get_args(hint)))


def _typed(hint: Any, bounds: dict[str, Any]) -> core_schema.CoreSchema:
    """The schema of a type; bounds hold for the value itself, not for None. Raises TypeError for a type no document has."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint](**bounds)  # type: ignore[no-any-return]
    if hint is Any:
        return core_schema.any_schema()
    if origin is Annotated:
        return core_schema.str_schema(pattern=hint.__metadata__[0].pattern)
    if origin is Literal:
        return core_schema.literal_schema(list(inner))
    if origin in (UnionType, Union) and len(inner) == 2 and NoneType in inner:
        return core_schema.nullable_schema(_typed(next(one for one in inner if one is not NoneType), bounds))
    if origin in (UnionType, Union) and all(isinstance(one, type) and issubclass(one, Section) for one in inner):
        return _tagged(inner)
    if origin in (UnionType, Union):  # a Literal makes the latter of `|`
        said = " or ".join(map(_words, inner))
        choices: list[Any] = [_typed(one, bounds) for one in inner]
        return core_schema.union_schema(
            choices, custom_error_type="union", custom_error_message=f"Input should be {said}"
        )
    if origin is list:
        return core_schema.list_schema(_typed(inner[0], {}), **bounds)
    if origin is dict:
        return core_schema.dict_schema(core_schema.str_schema(), _typed(inner[1], {}), **bounds)
    if hint in (None, NoneType):
        return core_schema.none_schema()
    if isinstance(hint, type) and issubclass(hint, Section):
        return hint.schema()
    raise TypeError(f"{hint!r}: no document has such a key")


TAG = "family"  # the key that tells the sections of a union apart


def _tagged(sections: tuple[type[Section], ...]) -> core_schema.CoreSchema:
    """The schema of a union of sections, chosen by the words that each allows under TAG."""
    choices: dict[Any, Any] = {word: section.schema() for section in sections for word in get_args(section.keys()[TAG])}
    words = ", ".join(map(str, choices))
    return core_schema.tagged_union_schema(
        choices,
        discriminator=TAG,
        custom_error_type="union_tag",
        custom_error_message=f"should be one of {words}",
    )


def section_of(annotation: Any, tag: Any = None) -> type[Section] | None:
    """The section class in a key's type, None where it holds none; of a union the one that `tag` chooses, or the first."""
    found = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, Section)]
    chosen = (one for one in found if tag in get_args(one.keys().get(TAG)))
    return next(chosen, next(iter(found), None))
