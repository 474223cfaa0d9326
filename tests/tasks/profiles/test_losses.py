import pytest

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.profiles.losses import (
    GPUS,
    Rule,
    check_target,
    downgrades,
    engine_rules,
    losses_text,
    rules_for,
)
from prefixquant.tasks.profiles.profile import PROFILES, find_profile

PARTS = {"kv-static", "r3", "r4-block", "r4-full", "prefix-kv", "prefix-tokens"}


def test_table_speaks_of_schemes_and_parts_that_exist_and_of_each_once():
    rules = engine_rules()
    assert {rule.scheme for rule in rules} <= PARTS | {profile.scheme for profile in PROFILES.values()}
    seen = [(rule.engine, rule.version, rule.scheme, rule.flag, rule.gpu) for rule in rules]
    assert len(set(seen)) == len(seen)
    assert all(rule.runs for rule in rules)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_table_says_for_every_gpu_what_each_profile_s_command_runs(profile):
    for gpu in GPUS:
        found = [rule for rule in rules_for(profile.engine, profile.scheme, gpu) if rule.flag == profile.flag]
        assert len(found) == 1, f"{profile.name} on {gpu}"


def test_rule_with_an_unknown_word_is_refused():
    known = {"engine": "vllm", "version": "1", "scheme": "r3", "flag": "", "runs": "x", "evidence": "source"}
    with pytest.raises(ConfigError, match="'fine' is none of exact, real"):
        Rule(**known, gpu="any", verdict="fine")


def test_silent_downgrade_is_refused_where_the_gpu_is_named_and_told_where_it_is_not():
    profile = find_profile("vllm-w4a4-static")
    assert check_target(profile, "sm80", allow_downgrade=False) == []
    with pytest.raises(ConfigError, match=r"on sm90 runs int8 activations .*VLLM_HUMMING_INPUT_QUANT_CONFIG"):
        check_target(profile, "sm90", allow_downgrade=False)
    assert len(check_target(profile, "sm90", allow_downgrade=True)) == 1
    assert [rule.gpu for rule in downgrades(profile)] == ["sm90", "sm100", "sm120"]
    assert len(check_target(profile, None, allow_downgrade=False)) == 3


def test_losses_name_what_is_dropped_and_what_is_exempt():
    online = OnlineTransforms(r3=True, r4=False)
    profile = find_profile("vllm-w8a8-static")
    text = losses_text(profile, QuantizeConfig(), online, has_prefix=True, exempt=[7, 3])
    assert "| kv-static | nothing | any | **dropped** |" in text
    assert "the same codes of 4 bits, stored in 8" in text
    assert "8 bits over the range that was found for 4" in text
    assert "down_proj of blocks 3, 7 runs in 16 bit" in text
    assert "r4-" not in text
    exact = losses_text(find_profile("hf-exact"), QuantizeConfig(), online, has_prefix=True, exempt=[])
    assert exact.endswith("- nothing is lost\n")
