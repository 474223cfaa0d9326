from dataclasses import replace

import pytest

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec

KINDS = pytest.mark.parametrize("kind", [WeightSpec, ActivationSpec, KeyValueSpec])


@KINDS
@pytest.mark.parametrize("bits", [1, 9, 16, -1])
def test_spec_refuses_bits_outside_2_to_8(kind, bits):
    with pytest.raises(ConfigError, match=f"bits must be 2 to 8, got {bits}; write `.*: off`"):
        kind(bits=bits)


@KINDS
def test_spec_refuses_a_group_size_without_group_granularity(kind):
    with pytest.raises(ConfigError, match=r"group_size goes with granularity 'group'.*group_size 32"):
        kind(group_size=32)


@KINDS
def test_spec_refuses_group_granularity_without_a_group_size(kind):
    with pytest.raises(ConfigError, match="granularity 'group' and group_size None"):
        kind(granularity="group")


@KINDS
def test_spec_refuses_an_empty_group(kind):
    with pytest.raises(ConfigError, match="group_size must be at least 1, got 0"):
        kind(granularity="group", group_size=0)


@pytest.mark.parametrize("kind", [ActivationSpec, KeyValueSpec])
@pytest.mark.parametrize(("mode", "wrong", "right"), [("static", "token", "tensor"), ("dynamic", "tensor", "token")])
def test_spec_refuses_a_granularity_that_contradicts_its_mode(kind, mode, wrong, right):
    with pytest.raises(ConfigError, match=f"'{wrong}' contradicts mode '{mode}'; use '{right}'"):
        kind(mode=mode, granularity=wrong)
    assert kind(mode=mode, granularity=right).granularity == right


def test_quantize_config_refuses_values_before_rope():
    with pytest.raises(ConfigError, match=r"values\.before_rope.*only keys"):
        QuantizeConfig(values=KeyValueSpec(before_rope=True))
    assert QuantizeConfig(keys=replace(KeyValueSpec(), before_rope=True)).keys.before_rope
