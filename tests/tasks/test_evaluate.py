import math

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixquant.tasks.errors import ConfigError, NumericalError
from prefixquant.tasks.evaluate import (
    Perplexity,
    PerplexityConfig,
    block_nlls,
    merge_perplexity,
    model_nlls,
    model_perplexity,
    perplexity,
    share_of,
)
from prefixquant.tasks.find_prefix import prefix_key_values
from prefixquant.tasks.model.block import Block, Prefix
from prefixquant.tasks.rotate import Ends, RotateConfig

WINDOWS = tiny.random_ids(5, 24)
PREFIX_IDS = torch.tensor([9, 3, tiny.BOS])


def reference(model: PreTrainedModel, windows_NT: Tensor, prefix_P: Tensor | None = None) -> float:
    """exp of the mean NLL by transformers' own loss, the prefix literally in front and not counted."""
    total = 0.0
    for ids in windows_NT:
        front = prefix_P if prefix_P is not None else ids[:0]
        labels = torch.cat([torch.full_like(front, -100), ids])
        labels[len(front)] = -100  # tokens 2..T
        total += float(model(input_ids=torch.cat([front, ids])[None], labels=labels[None]).loss)
    return math.exp(total / len(windows_NT))


def by_blocks(
    model: PreTrainedModel, windows_NT: Tensor, prefix_P: Tensor | None = None, rotate: RotateConfig | None = None
) -> Perplexity:
    blocks, ends = tiny.build_blocks(model, rotate), tiny.build_ends(model, rotate)
    own: list[Prefix | None] = [None] * len(blocks)
    if prefix_P is not None:
        keys, values = prefix_key_values(blocks, ends.embedding[prefix_P], device=tiny.CPU)
        own = list(zip(keys, values, strict=True))
    pairs = zip(blocks, own, strict=True)
    return perplexity(pairs, ends, model.config.rms_norm_eps, windows_NT, device=tiny.CPU, batch_tokens=50)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_perplexity_by_blocks_is_that_of_transformers_loss(variant):
    model = tiny.tiny_variant(variant)
    found = by_blocks(model, WINDOWS)
    assert found.ppl == pytest.approx(reference(model, WINDOWS), rel=1e-5)  # float32 forwards
    assert (found.tokens, found.windows) == (5 * 23, 5)


@pytest.mark.parametrize("variant", ["llama-biases", "llama-tied", "qwen3"])
def test_prefix_in_front_equals_its_tokens_in_front(variant):
    model = tiny.tiny_variant(variant)
    wanted = reference(model, WINDOWS, PREFIX_IDS)
    assert by_blocks(model, WINDOWS, PREFIX_IDS).ppl == pytest.approx(wanted, rel=1e-5)
    assert by_blocks(model, WINDOWS, PREFIX_IDS, RotateConfig()).ppl == pytest.approx(wanted, rel=1e-4)
    assert by_blocks(model, WINDOWS).ppl != pytest.approx(wanted, rel=1e-3)


def test_whole_model_gives_the_perplexity_of_its_blocks():
    model = tiny.tiny_variant("llama")
    found = model_perplexity(model, WINDOWS, batch_tokens=50)
    assert found.ppl == pytest.approx(by_blocks(model, WINDOWS).ppl, rel=1e-5)
    assert (found.tokens, found.windows) == (5 * 23, 5)


def test_batching_does_not_change_perplexity():
    model = tiny.tiny_variant("llama")
    found = [model_perplexity(model, WINDOWS, batch_tokens=tokens).ppl for tokens in (1, 48, 8192)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_uniform_logits_give_the_size_of_the_vocabulary():
    ends = Ends(torch.randn(50, 8), torch.ones(8), torch.zeros(50, 8))
    found = perplexity([], ends, 1e-5, torch.arange(48).view(2, 24), device=tiny.CPU)
    assert found.ppl == pytest.approx(50, rel=1e-6)


def spoiled(block: Block) -> Block:
    block.linear(block.family.down).weight.data[0, 0] = float("inf")
    return block


def test_infinite_hidden_state_is_an_error_with_its_block():
    model = tiny.tiny_variant("llama", blocks=3)
    blocks = tiny.build_blocks(model)
    spoiled(blocks[1])
    with pytest.raises(NumericalError, match="evaluation, block 1"):
        perplexity([(b, None) for b in blocks], tiny.build_ends(model), 1e-3, WINDOWS, device=tiny.CPU)


def test_nan_in_the_head_is_an_error():
    ends = Ends(torch.randn(50, 8), torch.ones(8), torch.full((50, 8), float("nan")))
    with pytest.raises(NumericalError, match="logits hold NaN or infinite values"):
        perplexity([], ends, 1e-5, torch.arange(48).view(2, 24), device=tiny.CPU)


def test_nan_in_a_whole_model_is_an_error():
    model = tiny.tiny_variant("llama")
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="logits"):
        model_perplexity(model, WINDOWS)


@pytest.mark.parametrize("settings", [{"window": 1}, {"max_windows": 0}], ids=["window", "max_windows"])
def test_impossible_protocol_is_refused(settings):
    with pytest.raises(ConfigError, match=f"evaluate.{next(iter(settings))} must be at least"):
        PerplexityConfig(**settings)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 9])
def test_shares_are_whole_batches_in_order(shards):
    windows = torch.arange(17 * 24).view(17, 24)
    shares = [share_of(windows, shard, shards, batch_tokens=50) for shard in range(shards)]
    assert torch.equal(torch.cat(shares), windows)
    assert all(len(share) % 2 == 0 for share in shares[:-1])
    batches = [math.ceil(len(share) / 2) for share in shares]
    assert max(batches) - min(batches) <= 1


@pytest.mark.parametrize("shards", [2, 4, 7])
def test_shares_give_the_perplexity_of_one_to_the_bit(shards):
    model = tiny.tiny_variant("llama")
    windows = tiny.random_ids(17, 24)
    shares = [share_of(windows, shard, shards, batch_tokens=50) for shard in range(shards)]
    found = merge_perplexity([model_nlls(model, share, batch_tokens=50) for share in shares], 24)
    assert found == model_perplexity(model, windows, batch_tokens=50)

    def nlls(part: Tensor) -> Tensor:
        blocks = [(block, None) for block in tiny.build_blocks(model)]
        ends, eps = tiny.build_ends(model), model.config.rms_norm_eps
        return block_nlls(blocks, ends, eps, part, device=tiny.CPU, batch_tokens=50)

    assert merge_perplexity([nlls(share) for share in shares], 24) == merge_perplexity([nlls(windows)], 24)


def test_a_share_without_windows_touches_no_block():
    def blocks():
        raise AssertionError("a block was asked for")
        yield

    ends = Ends(torch.randn(50, 8), torch.ones(8), torch.zeros(50, 8))
    empty = torch.empty(0, 24, dtype=torch.long)
    assert block_nlls(blocks(), ends, 1e-5, empty, device=tiny.CPU).shape == (0,)
    assert model_nlls(None, empty).dtype == torch.float64
