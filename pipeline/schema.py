"""Read plain nested data into nested frozen dataclasses: strict, with one line for each thing that is wrong.

The dataclasses are the schema: a field that is a dataclass is a group of keys, every other field is a key. `| None`
means that the key may be `off`. Nothing is coerced, except that a whole number passes for a float, a list for a tuple.
"""

import difflib
import json
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from prefixquant.tasks.errors import ConfigError

T = TypeVar("T")

_NOUNS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key or group of the schema."""

    path: str
    """Dotted name, such as `quantize.weights.bits`."""

    kind: Any
    """Its type, without None; a dataclass for a group."""

    optional: bool
    """Whether it may be off."""

    default: Any
    """Value where it is not written; `dataclasses.MISSING` where it must be."""

    @property
    def is_group(self) -> bool:
        """Whether it holds keys of its own."""
        return is_dataclass(self.kind)

    @property
    def expected(self) -> str:
        """The values it takes, in words."""
        return _in_words(self.kind) + (f" or {'null' if self._is_list else 'off'}" if self.optional else "")

    @property
    def _is_list(self) -> bool:
        return get_origin(self.kind) is tuple

    def is_off(self, value: object) -> bool:
        """Whether `value` turns the key off. For a list only null does: `off` could as well mean the empty list."""
        return self.optional and (value is None or (not self._is_list and (value is False or value == "off")))


def schema_of(root: type, *, hidden: Collection[str] = ()) -> dict[str, Key]:
    """Return every group and key of a dataclass by dotted name, parents before children, without the `hidden` ones."""
    found: dict[str, Key] = {}

    def visit(kind: type, parent: str) -> None:
        hints = get_type_hints(kind)
        for item in fields(cast(Any, kind)):
            path = f"{parent}.{item.name}" if parent else item.name
            if path not in hidden:
                plain, optional = _without_none(hints[item.name])
                found[path] = Key(path=path, kind=plain, optional=optional, default=_default(item))
                if is_dataclass(plain):
                    visit(cast(type, plain), path)

    visit(root, "")
    return found


def build(root: type[T], data: object, *, hidden: Collection[str] = ()) -> T:
    """Return `data` as a `root`; keys that are not written take their defaults.

    Raises:
        ConfigError: a line for each key that is unknown, missing, of the wrong type, out of range or contradictory.
    """
    builder = _Builder(schema_of(root, hidden=hidden))
    value = builder.group(root, "", data)
    if builder.problems:
        raise ConfigError("\n".join(builder.problems))
    return cast(T, value)


def show(value: object) -> str:
    """Return a value as a message prints it: text in quotes, False as off."""
    return "off" if value is False else json.dumps(value, default=str)


class _Builder:
    """Walks the data beside the schema and collects what is wrong."""

    def __init__(self, schema: Mapping[str, Key]) -> None:
        self.schema = schema
        self.problems: list[str] = []

    def children(self, path: str) -> dict[str, Key]:
        parents = {key: key.path.rpartition(".") for key in self.schema.values()}
        return {name: key for key, (parent, _, name) in parents.items() if parent == path}

    def group(self, kind: type, path: str, data: object) -> Any:
        """Return a `kind` made of `data`, or None after noting why that is not possible."""
        known, before = self.children(path), len(self.problems)
        if not isinstance(data, Mapping):
            self.problems.append(self.no_group(path, data, list(known)))
            return None
        values = {}
        for name, value in data.items():
            if name in known:
                values[name] = self.value(known[name], value)
            else:
                self.problems.append(self.unknown(path, str(name), list(known)))
        for name, key in known.items():
            if name not in data and key.default is MISSING:
                self.problems.append(f"{key.path} is missing; it must be {key.expected}")
        if len(self.problems) > before:
            return None
        try:
            return kind(**values)
        except ConfigError as error:
            # One class describes keys and values alike and cannot know which of the two it is.
            self.problems += str(error).replace("quantize.keys or values", path).splitlines()
            return None

    def value(self, key: Key, value: object) -> Any:
        """Return the value of one key, or None after noting what is wrong with it."""
        if key.is_off(value):
            return None
        if key.is_group:
            return self.group(key.kind, key.path, value)
        try:
            return _adapter(key.kind).validate_python(tuple(value) if isinstance(value, list) else value)
        except ValidationError:
            self.problems.append(f"{key.path} must be {key.expected}, got {show(value)}{_hint(key, value)}")
            return None

    def no_group(self, path: str, data: object, known: list[str]) -> str:
        """Return the message for a group that is written as a plain value."""
        if path and self.schema[path].optional:
            return f"{path} must be a group of keys or off, got {show(data)}; {{}} stands for all defaults"
        where = path or "a recipe"
        return f"{where} must be a group of keys, got {show(data)}; set its keys: {', '.join(known)}"

    def unknown(self, path: str, name: str, siblings: list[str]) -> str:
        """Return the message for a name that `path` does not have, with the nearest that exists."""
        dotted = f"{path}.{name}" if path else name
        if "." in name:
            return f"unknown key {dotted!r}; dotted names are for the command line, in a file nest the groups"
        prefix = f"{path}." if path else ""
        near = (
            [prefix + match for match in difflib.get_close_matches(name, siblings, n=1)]
            or [other for other in self.schema if other.rpartition(".")[2] == name]
            or difflib.get_close_matches(dotted, self.schema, n=1)
        )
        advice = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(siblings)}"
        return f"unknown key {dotted}; {advice}"


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _default(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Return a type without `| None`, and whether it had that."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    members = [member for member in get_args(hint) if member is not type(None)]
    return Union[tuple(members)], len(members) < len(get_args(hint))  # noqa: UP007 - the members are known at run time


def _in_words(kind: Any) -> str:
    if is_dataclass(kind):
        return "a group"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind)) if len(get_args(kind)) > 1 else f"{get_args(kind)[0]}"
    if get_origin(kind) is tuple:
        return f"a list of {_NOUNS[get_args(kind)[0]][1]}"
    return _NOUNS[kind][0]


def _hint(key: Key, value: object) -> str:
    """Return the next step after a value of the wrong type, where there is an obvious one."""
    if get_origin(key.kind) is Literal:
        near = difflib.get_close_matches(str(value), get_args(key.kind), n=1)
        return f"; did you mean {near[0]}?" if near else ""
    if key.kind is str and isinstance(value, (int, float)):
        return "; put it in quotes"
    if get_origin(key.kind) is tuple and (value is False or value == "off"):
        return "; [] is the empty list"
    return ""
