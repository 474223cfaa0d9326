from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from prefixquant.pipeline.keys import flatten, node_key, plain_config
from prefixquant.tasks.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    bits: int = 4
    ratio: float = 0.5


@dataclass(frozen=True)
class Config:
    inner: Inner = Inner()
    names: tuple[str, ...] = ("a", "b")
    extra: Any = None


def test_key_is_sha256_hex_and_repeats():
    key = node_key("rotate", 1, Config(), {"model": "k" * 64})
    assert len(key) == 64
    assert int(key, 16)
    assert key == node_key("rotate", 1, Config(), {"model": "k" * 64})


def test_key_changes_with_each_part_of_the_identity():
    keys = {
        node_key("rotate", 1, Config(), {"model": "x", "parts": ("y", "z")}),
        node_key("prefix", 1, Config(), {"model": "x", "parts": ("y", "z")}),
        node_key("rotate", 2, Config(), {"model": "x", "parts": ("y", "z")}),
        node_key("rotate", 1, Config(inner=Inner(bits=8)), {"model": "x", "parts": ("y", "z")}),
        node_key("rotate", 1, None, {"model": "x", "parts": ("y", "z")}),
        node_key("rotate", 1, Config(), {"model": "w", "parts": ("y", "z")}),
        node_key("rotate", 1, Config(), {"other": "x", "parts": ("y", "z")}),
        node_key("rotate", 1, Config(), {"model": "x", "parts": ("z", "y")}),
    }
    assert len(keys) == 8


def test_key_ignores_the_order_in_which_inputs_are_named():
    assert node_key("t", 1, None, {"a": "x", "b": "y"}) == node_key("t", 1, None, {"b": "y", "a": "x"})


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        (float("nan"), "Config.extra is nan"),
        ([1.0, float("inf")], r"Config.extra\[1\] is inf"),
        (Path("weights"), "Config.extra is a PosixPath"),
        ({1: "x"}, "Config.extra has names that are not text"),
        ({"deep": Inner(ratio=float("nan"))}, r"Config.extra\['deep'\].ratio"),
    ],
    ids=["nan", "inf", "path", "number-as-name", "nested"],
)
def test_key_refuses_what_json_cannot_say_and_names_the_field(extra, where):
    with pytest.raises(ConfigError, match=where):
        node_key("t", 1, replace(Config(), extra=extra), {})


def test_flatten_gives_dotted_paths_of_the_leaves():
    assert flatten(plain_config(Config())) == {
        "inner.bits": 4,
        "inner.ratio": 0.5,
        "names[0]": "a",
        "names[1]": "b",
        "extra": None,
    }
    assert flatten(plain_config(None)) == {}
