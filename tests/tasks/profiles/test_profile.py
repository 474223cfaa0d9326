import pytest

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec
from prefixquant.tasks.profiles.profile import PROFILES, check_profile, find_profile

STATIC = QuantizeConfig()
PLAIN = OnlineTransforms(r3=False, r4=False)
FULL = OnlineTransforms(r3=True, r4=True)
BLOCKS = OnlineTransforms(r3=True, r4=True, r4_block=128)
GROUPS = QuantizeConfig(weights=WeightSpec(granularity="group", group_size=16))
TOKEN = QuantizeConfig(activations=ActivationSpec(mode="dynamic", granularity="token"))


def accepts(name: str, quantize: QuantizeConfig, transforms: OnlineTransforms) -> bool:
    try:
        check_profile(find_profile(name), quantize, transforms)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    ("quantize", "transforms", "accepted"),
    [
        (STATIC, PLAIN, set(PROFILES)),
        (STATIC, BLOCKS, {"hf-exact", "vllm-w4a16", "vllm-w8a8-static", "vllm-w4a4-dynamic"}),
        (STATIC, FULL, {"hf-exact"}),
        (GROUPS, PLAIN, {"hf-exact", "vllm-w4a16", "vllm-w4a4-static", "vllm-w4a4-dynamic"}),
        (TOKEN, PLAIN, {"vllm-w4a16", "vllm-w4a4-dynamic"}),
        (
            QuantizeConfig(activations=ActivationSpec(bits=8)),
            PLAIN,
            {"hf-exact", "vllm-w4a16", "vllm-w8a8-static", "vllm-w4a8-static", "vllm-w4a4-dynamic"},
        ),
        (QuantizeConfig(weights=WeightSpec(bits=8)), PLAIN, {"hf-exact", "vllm-w8a8-static"}),
        (QuantizeConfig(values=KeyValueSpec(bits=2)), PLAIN, set(PROFILES) - {"hf-exact"}),
        (QuantizeConfig(weights=None), PLAIN, set()),
        (QuantizeConfig(weights=WeightSpec(symmetric=False)), PLAIN, set()),
    ],
    ids=["plain", "r4-blocks", "r4-full", "groups", "dynamic", "a8", "w8", "kv-unequal", "w16", "zero-points"],
)
def test_profile_holds_what_its_engine_loads(quantize, transforms, accepted):
    assert {name for name in PROFILES if accepts(name, quantize, transforms)} == accepted


def test_refusal_names_every_key_to_change():
    with pytest.raises(ConfigError) as caught:
        check_profile(find_profile("vllm-w4a8-static"), QuantizeConfig(activations=None), FULL)
    assert "profile vllm-w4a8-static cannot hold this model" in str(caught.value)
    assert "quantize.activations must not be off" in str(caught.value)
    assert "set rotate.r4=false" in str(caught.value)


def test_unknown_profile_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="no export profile 'vllm'; known are hf-exact, vllm-w4a16"):
        find_profile("vllm")


def test_profile_without_quantized_keys_needs_no_r3():
    assert find_profile("vllm-w4a16").transforms(BLOCKS) == OnlineTransforms(r3=False, r4=True, r4_block=128)
    assert find_profile("hf-exact").transforms(BLOCKS) == BLOCKS
