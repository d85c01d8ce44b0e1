"""Strict reading of flat dataclasses: what is accepted, and what each mistake is called."""

import dataclasses
from typing import Annotated, Literal

import pytest

from minimind.errors import UserError
from minimind.schema import ABOVE_0, AT_LEAST_1, Limits, check_fields, nearest


@dataclasses.dataclass(frozen=True)
class Sample:
    count: int = 1
    rate: float = 0.5
    name: str = "x"
    on: bool = False
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.0, 1.0)
    words: tuple[str, ...] = ()
    maybe: int | None = None
    described: Annotated[float | None, "text for --help"] = None
    size: Annotated[int, AT_LEAST_1] = 1
    speed: Annotated[float | None, "text for --help", ABOVE_0] = None
    shares: Annotated[tuple[float, float], Limits(at_least=0, at_most=1, fix="write 0.4 for 40%")] = (0.0, 1.0)
    momentum: Annotated[float, Limits(at_least=0, below=1)] = 0.0


def test_good_values_are_taken_and_the_rest_keeps_its_defaults():
    values = {"size": 1, "speed": None, "shares": [0, 1], "momentum": 0.0}
    assert check_fields(Sample, values) == {**values, "shares": (0.0, 1.0)}
    values = {"count": 3, "rate": 2, "pair": [1, 2], "maybe": None, "described": 1, "kind": "b", "on": True}
    values |= {"words": ["x", "y", "z"]}
    sample = Sample(**check_fields(Sample, values, "file"))
    assert sample == Sample(count=3, rate=2.0, pair=(1.0, 2.0), words=("x", "y", "z"), kind="b", on=True, described=1.0)
    assert type(sample.rate) is float and type(sample.described) is float
    assert check_fields(Sample, {}, "file") == {}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cuont": 1}, "file: unknown field 'cuont'; did you mean 'count'?"),
        ({"zzzzzz": 1}, "file: unknown field 'zzzzzz'"),
        ({"count": 1.0}, "file: count: 1.0 is not an integer"),
        ({"count": "1"}, "file: count: '1' is not an integer"),
        ({"count": True}, "file: count: True is not an integer"),
        ({"count": None}, "file: count: None is not an integer"),
        ({"rate": "fast"}, "file: rate: 'fast' is not a number"),
        ({"rate": False}, "file: rate: False is not a number"),
        ({"name": 3}, "file: name: 3 is not a string"),
        ({"on": 1}, "file: on: 1 is not true or false"),
        ({"kind": "c"}, "file: kind: 'c' is not one of 'a', 'b'"),
        ({"kind": ["a"]}, "file: kind: ['a'] is not one of 'a', 'b'"),
        ({"pair": [1]}, "file: pair: [1] is not a list of 2 values"),
        ({"pair": [1, "x"]}, "file: pair: 'x' is not a number"),
        ({"pair": "12"}, "file: pair: '12' is not a list of 2 values"),
        ({"words": "x"}, "file: words: 'x' is not a list"),
        ({"words": ["x", 1]}, "file: words: 1 is not a string"),
        ({"maybe": "y"}, "file: maybe: 'y' is not an integer or null"),
        ({"described": "y"}, "file: described: 'y' is not a number or null"),
        ({"size": 0}, "file: size: 0 is not a finite number of 1 or more"),
        ({"size": "1"}, "file: size: '1' is not an integer"),
        ({"speed": 0}, "file: speed: 0.0 is not a finite number above 0"),
        ({"speed": float("inf")}, "file: speed: inf is not a finite number above 0"),
        ({"speed": float("nan")}, "file: speed: nan is not a finite number above 0"),
        (
            {"shares": [0.5, 1.5]},
            "file: shares: (0.5, 1.5) are not each a number from 0 to 1; write 0.4 for 40%",
        ),
        ({"momentum": 1.0}, "file: momentum: 1.0 is not a finite number of 0 or more and below 1"),
        ([1], "file: expected an object with fields, found list [1]"),
        (None, "file: expected an object with fields, found NoneType None"),
    ],
)
def test_each_mistake_has_its_words(values, words):
    with pytest.raises(UserError) as error:
        check_fields(Sample, values, "file")
    assert str(error.value) == words


def test_nearest_says_nothing_when_nothing_is_near():
    assert nearest("seq_length", ["seq_len", "seed"]) == "; did you mean 'seq_len'?"
    assert nearest("colour", ["seq_len", "seed"]) == ""
