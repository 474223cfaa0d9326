import pytest

from prefixquant.pipeline.overrides import apply_overrides, read_yaml
from prefixquant.tasks.errors import ConfigError


def test_overrides_set_nested_values_and_leave_the_input_alone():
    data = {"quantize": {"keys": {"bits": 4}}, "seed": 1}
    assert apply_overrides(data, ["quantize.keys.bits=8", "seed=2"]) == {"quantize": {"keys": {"bits": 8}}, "seed": 2}
    assert data == {"quantize": {"keys": {"bits": 4}}, "seed": 1}


def test_the_last_override_of_a_key_wins():
    assert apply_overrides({}, ["seed=1", "seed=2"]) == {"seed": 2}


@pytest.mark.parametrize("off", [None, False, "off"])
def test_overrides_open_groups_that_are_off(off):
    assert apply_overrides({"train": off}, ["train.epochs=5"]) == {"train": {"epochs": 5}}


def test_overrides_open_groups_that_are_absent():
    assert apply_overrides({}, ["a.b.c=1"]) == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("5e-5", 5e-5),
        ("-.5", -0.5),
        ("off", False),
        ("true", True),
        ("null", None),
        ("[260, 216, 1]", [260, 216, 1]),
        ("{mode: dynamic, granularity: token}", {"mode": "dynamic", "granularity": "token"}),
        ("'4'", "4"),
        ("2024-01-31", "2024-01-31"),
        ("1:30", "1:30"),
        ("0123", "0123"),
        ("hf://a=b", "hf://a=b"),
    ],
)
def test_an_override_value_is_yaml(text, value):
    result = apply_overrides({}, [f"key={text}"])["key"]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("override", ["bits", "=8", "quantize..bits=8", ".bits=8", "a-b=1", "--json"])
def test_a_malformed_override_is_refused_with_an_example(override):
    with pytest.raises(ConfigError, match=r"write key=value, such as quantize\.activations\.bits=8"):
        apply_overrides({}, [override])


def test_an_override_without_a_value_is_refused():
    with pytest.raises(ConfigError, match="has no value"):
        apply_overrides({}, ["model.revision="])


def test_an_override_through_a_plain_value_is_refused():
    with pytest.raises(ConfigError, match=r"passes through model\.source, which holds 'x' and no keys"):
        apply_overrides({"model": {"source": "x"}}, ["model.source.path=1"])


def test_invalid_yaml_is_refused_in_one_line_with_its_place():
    with pytest.raises(ConfigError, match=r"^recipe x, line 3, column 1: not valid YAML, [^\n]+$"):
        read_yaml("a: 1\nb: [1, 2\n", where="recipe x")


def test_a_key_written_twice_is_refused():
    with pytest.raises(ConfigError, match="the key 'seed' is written twice"):
        read_yaml("seed: 1\nseed: 2\n", where="recipe x")
