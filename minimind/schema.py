"""Strict reading of flat dataclasses from JSON-like mappings.

An unknown key or a wrong type is one `UserError` that names the nearest field. Knows nothing of what the fields mean.
"""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from minimind.errors import UserError

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """A hint `; did you mean 'x'?` for a misspelt name, or an empty string where nothing is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def read_dataclass(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build the flat dataclass `cls` from `mapping`; fields left out keep their defaults.

    Args:
        where: names the source in errors, for example `run.json: train`.

    Raises:
        UserError: `mapping` is no mapping, has an unknown key, or a value of a wrong type.
    """
    return dataclasses.replace(cls(), **check_fields(cls, mapping, where))  # type: ignore[type-var]


def check_fields(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of `mapping`, each checked and converted to the type of the field of `cls` it names.

    Raises:
        UserError: as `read_dataclass`.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: expected an object with fields, found {type(mapping).__name__} {mapping!r}")
    hints = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for key, value in mapping.items():
        if key not in known:
            raise UserError(f"{where}: unknown field '{key}'{nearest(str(key), known)}")
        values[key] = _convert(value, hints[key], f"{where}: {key}")
    return values


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in args:
            if option is not type(None):
                try:
                    return _convert(value, option, where)
                except UserError:
                    continue
        raise UserError(f"{where}: {value!r} is not {_describe(hint)}")
    if origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(_convert(item, option, where) for item, option in zip(value, args, strict=True))
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, hint):
        return value
    raise UserError(f"{where}: {value!r} is not {_describe(hint)}")


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in args)
    if origin is tuple:
        return f"a list of {len(args)} values"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))
