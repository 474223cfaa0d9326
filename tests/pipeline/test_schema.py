from dataclasses import dataclass, field
from typing import Literal

import pytest

from prefixquant.pipeline.schema import build, schema_of
from prefixquant.tasks.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Oven:
    degrees: float = 180.0
    fan: bool = True
    level: Literal["low", "high"] = "low"

    def __post_init__(self) -> None:
        if self.degrees > 300:
            raise ConfigError(f"oven.degrees must be at most 300, got {self.degrees}")


@dataclass(frozen=True, kw_only=True)
class Cake:
    name: str
    eggs: tuple[int, ...] | None = None
    oven: Oven | None = field(default_factory=Oven)
    note: str | None = None
    secret: int = 7


def problems(data: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(Cake, data, hidden=["secret"])
    return str(caught.value).splitlines()


def test_build_fills_partial_groups_from_the_defaults():
    assert build(Cake, {"name": "x", "oven": {"fan": False}}) == Cake(name="x", oven=Oven(fan=False))


def test_build_takes_whole_numbers_for_floats_and_lists_for_tuples():
    cake = build(Cake, {"name": "x", "eggs": [1, 2], "oven": {"degrees": 200}})
    assert cake.eggs == (1, 2)
    assert cake.oven is not None
    assert isinstance(cake.oven.degrees, float)


@pytest.mark.parametrize("off", [None, False, "off"])
def test_optional_groups_and_keys_may_be_off(off):
    cake = build(Cake, {"name": "x", "oven": off, "note": off})
    assert cake.oven is None
    assert cake.note is None


def test_build_collects_every_problem_one_line_each():
    assert problems({"oven": {"degres": 1, "fan": "yes"}, "eggs": [1.5]}) == [
        "unknown key oven.degres; did you mean oven.degrees?",
        'oven.fan must be true or false, got "yes"',
        "eggs must be a list of whole numbers or null, got [1.5]",
        "name is missing; it must be text",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": 4}, "name must be text, got 4; put it in quotes"),
        ({"name": "x", "eggs": False}, "eggs must be a list of whole numbers or null, got off; [] is the empty list"),
        ({"name": "x", "oven": True}, "oven must be a group of keys or off, got true; {} stands for all defaults"),
        (
            {"name": "x", "oven": {"level": "hihg"}},
            'oven.level must be one of low, high, got "hihg"; did you mean',
        ),
        ({"name": "x", "oven": {"degrees": float("nan")}}, "oven.degrees must be a number, got NaN"),
        ({"name": "x", "oven": {"degrees": True}}, "oven.degrees must be a number, got true"),
        ({"name": "x", "oven": {"degrees": 400}}, "oven.degrees must be at most 300, got 400.0"),
        ({"name": "x", "fan": True}, "unknown key fan; did you mean oven.fan?"),
        ({"name": "x", "secret": 1}, "unknown key secret; known here: name, eggs, oven, note"),
        ({"name": "x", "oven.fan": True}, "unknown key 'oven.fan'; dotted names are for the command line"),
        ({"name": "x", 1: True}, "unknown key 1; known here: name, eggs, oven, note"),
        ([], "a recipe must be a group of keys, got []; set its keys: name, eggs, oven, note"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_problem_names_key_expectation_finding_and_next_step(data, message):
    (line,) = problems(data)
    assert line.startswith(message)


def test_schema_lists_every_key_but_the_hidden():
    assert list(schema_of(Cake, hidden=["secret"])) == [
        *("name", "eggs", "oven", "oven.degrees", "oven.fan", "oven.level", "note"),
    ]
