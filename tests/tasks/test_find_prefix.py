from pydoc_data.topics import topics

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoTokenizer

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.find_prefix import (
    FindPrefixConfig,
    PrefixChoice,
    choose_prefix,
    down_input_peaks,
    prefix_key_values,
)
from prefixquant.tasks.rotate import RotateConfig

BOS, DOT, BREAK, COMMA = 1, 46, 10, 44


def choose(peaks: dict[tuple[int, int, int], float], *, tokens: dict[tuple[int, int], int], **settings) -> PrefixChoice:
    """Choose among 20 sequences of 9 tokens in 3 blocks; peaks are 1 but those given by (block, sequence, position)."""
    ids = torch.arange(100, 109).repeat(20, 1)
    for place, token in tokens.items():
        ids[place] = token
    peak = torch.ones(3, 20, 9)
    for place, value in peaks.items():
        peak[place] = value
    return choose_prefix(ids, peak, BOS, FindPrefixConfig(**settings))


def everywhere(token: int, position: int, count: int = 20) -> tuple[dict, dict]:
    """A token at a position of the first `count` sequences that is an outlier in block 1."""
    return {(1, row, position): 500.0 for row in range(count)}, {(row, position): token for row in range(count)}


def merged(*parts: tuple[dict, dict]) -> tuple[dict, dict]:
    return {key: value for peaks, _ in parts for key, value in peaks.items()}, {
        key: value for _, tokens in parts for key, value in tokens.items()
    }


def test_delimiters_come_by_frequency_and_bos_last():
    peaks, tokens = merged(everywhere(BREAK, 5, 12), everywhere(DOT, 3, 20))
    choice = choose(peaks, tokens=tokens)
    assert choice.token_ids == (DOT, BREAK, BOS)
    assert choice.counts == {DOT: 20, BREAK: 12}
    assert choice.outliers_per_sequence == pytest.approx((0, 1.6, 0))
    assert choice.peak_ratio == pytest.approx((1, 500, 1))


def test_counts_are_listed_most_frequent_first():
    peaks, tokens = merged(everywhere(BREAK, 5, 12), everywhere(DOT, 3, 20), everywhere(COMMA, 7, 15))
    assert list(choose(peaks, tokens=tokens).counts.items()) == [(DOT, 20), (COMMA, 15), (BREAK, 12)]


def test_position_0_counts_for_the_length_but_not_as_a_token():
    first = everywhere(77, 0)
    assert choose(*first[:1], tokens=first[1]).token_ids == (BOS,)
    peaks, tokens = merged(first, everywhere(DOT, 3), everywhere(BREAK, 5, 12))
    choice = choose(peaks, tokens=tokens)
    assert choice.token_ids == (DOT, BREAK, BOS)
    assert 77 not in choice.counts


def test_length_is_that_of_the_block_with_the_most_outliers_rounded_up():
    dots, breaks = everywhere(DOT, 3), everywhere(BREAK, 5, 2)
    peaks, tokens = merged(dots, breaks, ({(0, 0, 7): 500.0}, {(0, 7): COMMA}))
    # block 1 has 22 outliers in 20 sequences, so two tokens; the third most frequent is left out
    assert choose(peaks, tokens=tokens).token_ids == (DOT, BREAK, BOS)
    assert choose(*dots[:1], tokens=dots[1]).token_ids == (DOT, BOS)


@pytest.mark.parametrize(("count", "wanted"), [(1, (BOS,)), (2, (DOT, BOS))])
def test_lone_candidate_of_fewer_than_a_tenth_of_the_sequences_is_dropped(count, wanted):
    peaks, tokens = everywhere(DOT, 3, count)
    assert choose(peaks, tokens=tokens).token_ids == wanted


def test_two_rare_candidates_are_no_chance():
    peaks, tokens = {(1, 0, 3): 500.0, (1, 0, 5): 500.0}, {(0, 3): DOT, (0, 5): BREAK}
    assert len(choose(peaks, tokens=tokens).token_ids) == 2


def test_without_outliers_bos_alone_is_left():
    choice = choose({}, tokens={})
    assert choice.token_ids == (BOS,)
    assert choice.counts == {}


def test_bos_inside_a_sequence_is_not_taken_twice():
    peaks, tokens = merged(everywhere(BOS, 4), everywhere(DOT, 3, 15))
    assert choose(peaks, tokens=tokens).token_ids == (DOT, BOS)


@pytest.mark.parametrize(
    ("limit", "wanted"), [(1, (BOS,)), (2, (DOT, BOS)), (3, (DOT, BREAK, BOS)), (9, (DOT, BREAK, BOS))]
)
def test_max_tokens_counts_bos(limit, wanted):
    peaks, tokens = merged(everywhere(BREAK, 5, 12), everywhere(DOT, 3))
    assert choose(peaks, tokens=tokens, max_tokens=limit).token_ids == wanted


def test_outlier_ratio_is_relative_to_the_median_of_the_sequence():
    ids = torch.arange(100, 109).repeat(20, 1)
    ids[:, 3] = DOT
    peak = torch.rand(3, 20, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    peak[:, :, 3] = 20 * peak.median(dim=-1).values
    for ratio, wanted in ((19.0, (DOT, BOS)), (21.0, (BOS,))):
        for size in (1e-6, 1e6):
            assert choose_prefix(ids, size * peak, BOS, FindPrefixConfig(outlier_ratio=ratio)).token_ids == wanted


def test_dead_block_has_no_outliers():
    peaks = torch.zeros(2, 20, 9)
    choice = choose_prefix(torch.arange(9).repeat(20, 1), peaks, BOS, FindPrefixConfig())
    assert choice.token_ids == (BOS,)


def hooked_peaks(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return [blocks, N, T] largest |down_proj input| of a plain transformers forward."""
    peaks: list[Tensor] = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: peaks.append(inputs[0].abs().amax(-1)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack(peaks)


@pytest.mark.parametrize("rotate", [None, RotateConfig()], ids=["plain", "rotated"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_peaks_are_those_of_transformers_with_or_without_rotation(rotate, batch_size):
    model = tiny.tiny_variant("qwen2", blocks=3)
    ids = tiny.random_ids(4, 9)
    stream = tiny.build_ends(model, rotate).embedding[ids]
    blocks = tiny.build_blocks(model, rotate)
    peaks = down_input_peaks(blocks, stream, batch_size=batch_size, device=tiny.CPU)
    assert peaks.shape == (3, 4, 9)
    torch.testing.assert_close(peaks, hooked_peaks(model, ids), rtol=1e-4, atol=1e-5)
    assert not any(block.linear("mlp.down_proj")._forward_pre_hooks for block in blocks)


def test_prefix_key_values_are_transformers_cache():
    model = tiny.tiny_variant("qwen3", blocks=3)
    ids = torch.tensor([77, 12, tiny.BOS])
    keys, values = prefix_key_values(tiny.build_blocks(model), tiny.build_ends(model).embedding[ids], device=tiny.CPU)
    cache = model(ids.unsqueeze(0), use_cache=True).past_key_values
    torch.testing.assert_close(keys, torch.cat([layer.keys for layer in cache.layers]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, torch.cat([layer.values for layer in cache.layers]), rtol=1e-4, atol=1e-5)


@pytest.mark.real_model
def test_real_prefix_holds_its_delimiter_and_ends_with_bos(smollm2, smollm2_model):
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    text = "\n\n".join(topics.values())[:60_000]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0, : 16 * 256].reshape(16, 256)
    stream = tiny.build_ends(smollm2_model).embedding[ids]
    peaks = down_input_peaks(tiny.build_blocks(smollm2_model), stream, batch_size=4, device=tiny.CPU)
    choice = choose_prefix(ids, peaks, tokenizer.bos_token_id, FindPrefixConfig())
    assert choice.token_ids[-1] == tokenizer.bos_token_id == 1
    assert 260 in choice.token_ids
    assert max(choice.peak_ratio) > 1000  # the phenomenon the method lives on


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outlier_ratio": 1.0}, "outlier_ratio must be above 1, got 1.0"),
        ({"max_tokens": 0}, r"max_tokens must be at least 1, got 0; use prefix.tokens=\[\] for none"),
        ({"tokens": (5,), "max_tokens": 3}, "contradict each other"),
        ({"tokens": (5, -1)}, r"must be token ids, got \[5, -1\]"),
    ],
)
def test_find_prefix_config_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        FindPrefixConfig(**settings)
