"""Strict reading of flat dataclasses from JSON-like mappings, with limits of numbers beside their fields.

An unknown key, a wrong type or a number outside its limits is one `UserError`.
"""

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from minimind.errors import UserError


def nearest(name: str, known: list[str]) -> str:
    """A hint `; did you mean 'x'?` for a misspelt name, or an empty string where nothing is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a finite number, or of each number of a tuple, beside its type: `Annotated[int, AT_LEAST_1]`."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    fix: str = ""
    """What to do about a value outside, where that is not plain."""

    def allow(self, value: Any) -> bool:
        """Whether a number, or every number of a tuple, is inside; None always is."""
        if value is None or isinstance(value, tuple):
            return all(map(self.allow, value or ()))
        return self.at_least <= value <= self.at_most and self.above < value < self.below and abs(value) < math.inf

    def __str__(self) -> str:
        if abs(self.at_least) < math.inf and self.at_most < math.inf:
            return f"a number from {self.at_least:g} to {self.at_most:g}" + (f"; {self.fix}" if self.fix else "")
        bounds = (("of {:g} or more", self.at_least), ("above {:g}", self.above), ("up to {:g}", self.at_most))
        words = [text.format(bound) for text, bound in (*bounds, ("below {:g}", self.below)) if abs(bound) < math.inf]
        return "a finite number " + " and ".join(words) + (f"; {self.fix}" if self.fix else "")


AT_LEAST_0, AT_LEAST_1, ABOVE_0 = Limits(at_least=0), Limits(at_least=1), Limits(above=0)


def check_fields(cls: type, mapping: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The values of `mapping`, each checked and converted to the type of the field of `cls` that it names.

    Args:
        where: names the source in errors, for example `run.json: train`.

    Raises:
        UserError: `mapping` is no mapping, has an unknown key, or a value of a wrong type or outside its `Limits`.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: expected an object with fields, found {type(mapping).__name__} {mapping!r}")
    hints = _field_types(cls)
    values = {}
    for key, value in mapping.items():
        if key not in hints:
            raise UserError(f"{where}: unknown field '{key}'{nearest(str(key), list(hints))}")
        values[key] = convert(value, hints[key], f"{where}: {key}" if where else key)
    return values


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: only an integer becomes a float, and a list a tuple.

    Raises:
        UserError: it is of another type, or outside the `Limits` that `hint` is annotated with.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = convert(value, args[0], where)
        for limits in args[1:]:
            if isinstance(limits, Limits) and not limits.allow(value):
                verb = "are not each" if isinstance(value, tuple) else "is not"
                raise UserError(f"{where}: {value!r} {verb} {limits}")
        return value
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return convert(value, option, where)
            except UserError:
                continue
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            options = [args[0]] * len(value) if args[1:] == (...,) else args
            if len(value) == len(options):
                return tuple(convert(item, option, where) for item, option in zip(value, options, strict=True))
    elif hint in (int, float):
        if isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool):
            return hint(value)
    elif isinstance(value, hint):
        return value
    raise UserError(f"{where}: {value!r} is not {_describe(hint)}")


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(option) for option in args)
    if origin is Annotated:
        return next((str(limits) for limits in args if isinstance(limits, Limits)), _describe(args[0]))
    if origin is tuple:
        return "a list" if args[1:] == (...,) else f"a list of {len(args)} values"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "an object"}
    return "null" if hint is type(None) else names.get(hint, str(hint))
