import pytest
import tiny
import torch
from torch import Tensor

from prefixquant.tasks.errors import NumericalError
from prefixquant.tasks.find_prefix import prefix_key_values
from prefixquant.tasks.model.block import Prefix, block_prefix, run_batched, single_block_config
from prefixquant.tasks.model.sites import ALL_SITES
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig
from prefixquant.tasks.rotate import RotateConfig

EXACT = 1e-5  # float32 roundings over two blocks
DYNAMIC = QuantizeConfig(
    weights=None,
    activations=ActivationSpec(mode="dynamic", granularity="token", bits=3),
    keys=KeyValueSpec(mode="dynamic", bits=3),
    values=KeyValueSpec(mode="dynamic", bits=3),
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_block(variant: str = "llama", rotate: RotateConfig | None = None, quantize: QuantizeConfig | None = None):
    return tiny.build_blocks(tiny.tiny_variant(variant, blocks=1), rotate, quantize)[0]


def random_prefix(tokens: int = 4) -> Prefix:
    return random(2, tokens, 16, seed=8), random(2, tokens, 16, seed=9)


@pytest.mark.parametrize("rotate", [None, RotateConfig(seed=3)], ids=["plain", "rotated"])
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_tokens_behind_the_prefix_are_those_of_the_prepended_sequence(variant, rotate):
    model = tiny.tiny_variant(variant, blocks=3)
    prefix_ids, ids = torch.tensor([77, 12, tiny.BOS]), tiny.random_ids(3, 17)
    blocks, embedding = tiny.build_blocks(model, rotate), tiny.build_ends(model, rotate).embedding
    stacked = prefix_key_values(blocks, embedding[prefix_ids], device=tiny.CPU)
    heads = model.config.num_key_value_heads
    assert {tuple(part.shape) for part in stacked} == {(3, heads, 3, 16)}
    prefix = [block_prefix(stacked, index, tiny.CPU) for index in range(3)]
    whole = torch.cat((prefix_ids.expand(3, -1), ids), dim=1)

    behind = tiny.chain_hidden(model, ids, rotate, prefix)
    assert tiny.relative_error(behind, tiny.chain_hidden(model, whole, rotate)[:, 3:]) < EXACT
    logits = tiny.chain_logits(model, ids, rotate, prefix)
    assert tiny.relative_error(logits, model(whole).logits[:, 3:]) < EXACT
    assert tiny.relative_error(logits, model(ids).logits) > 0.01  # the prefix matters here


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_mask_behind_a_prefix_is_causal(variant):
    block, prefix, hidden = one_block(variant, RotateConfig()), random_prefix(), random(2, 9, 48)
    changed = hidden.clone()
    changed[:, 6] += 1
    before, after = block(hidden, prefix), block(changed, prefix)
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-6)
    assert ((after - before)[:, 6:].abs().amax(-1) > 1e-4).all()


def test_every_prefix_token_influences_every_token():
    block, hidden = one_block(), random(2, 9, 48)
    keys, values = random_prefix()
    before = block(hidden, (keys, values))
    for position in range(4):
        other = values.clone()
        other[:, position] += 5
        assert ((block(hidden, (keys, other)) - before).abs().amax(-1) > 1e-4).all()


def test_sequences_of_a_batch_do_not_influence_each_other():
    block, prefix, hidden = one_block("qwen3", RotateConfig()), random_prefix(), random(3, 9, 48)
    together = block(hidden, prefix)
    alone = torch.cat([block(row.unsqueeze(0), prefix) for row in hidden])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_forward_leaves_the_prefix_as_it_was():
    block, hidden = one_block(), random(2, 9, 48)
    keys, values = random_prefix()
    copies = keys.clone(), values.clone()
    first, second = (block(hidden, (keys, values)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(keys, copies[0])
    assert torch.equal(values, copies[1])


def test_prefix_itself_is_never_quantized():
    model = tiny.tiny_variant("llama", blocks=1)
    plain, quantized = (tiny.build_blocks(model, RotateConfig(), config)[0] for config in (None, DYNAMIC))
    hidden = random(1, 4, 48)
    output, (keys, values) = plain.prefix_states(hidden)
    output_q, (keys_q, values_q) = quantized.prefix_states(hidden)
    for got, wanted in ((output_q, output), (keys_q, keys), (values_q, values)):
        assert torch.equal(got, wanted)
    assert all(site.enabled for site in quantized.sites.values())


def test_quantizers_that_are_not_enabled_leave_full_precision():
    model = tiny.tiny_variant("qwen2", blocks=1)
    plain, quantized = (tiny.build_blocks(model, RotateConfig(), config)[0] for config in (None, DYNAMIC))
    hidden, prefix = random(2, 9, 48), random_prefix()
    with quantized.only():
        assert torch.equal(quantized(hidden, prefix), plain(hidden, prefix))
    assert tiny.relative_error(quantized(hidden, prefix), plain(hidden, prefix)) > 0.01


@pytest.mark.parametrize("name", ALL_SITES)
def test_each_site_alone_changes_the_output(name):
    block, hidden, prefix = one_block(quantize=DYNAMIC), random(2, 9, 48), random_prefix()
    with block.only():
        exact = block(hidden, prefix)
    with block.only(name):
        assert [site for site, it in block.sites.items() if it.enabled] == [name]
        assert tiny.relative_error(block(hidden, prefix), exact) > 1e-4


def test_only_restores_what_was_set_even_after_an_error():
    block = one_block(quantize=DYNAMIC)
    block.sites["values"].enabled = False

    def fail_inside() -> None:
        with block.only("keys"), block.only("values", "o_input"):
            assert [name for name, site in block.sites.items() if site.enabled] == ["values", "o_input"]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert [name for name, site in block.sites.items() if not site.enabled] == ["values"]


def test_single_block_config_keeps_the_attention_kind_of_the_block():
    config = tiny.tiny_config("qwen2", blocks=4, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    assert [single_block_config(config, index).layer_types for index in (1, 2)] == [
        ["full_attention"],
        ["sliding_attention"],
    ]
    assert config.num_hidden_layers == 4


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_sliding_window_shorter_than_the_sequence_is_kept(model_type):
    settings = {"use_sliding_window": True, "max_window_layers": 1} if model_type == "qwen2" else {}
    model = tiny.tiny_model(tiny.tiny_config(model_type, blocks=2, sliding_window=5, **settings))
    ids = tiny.random_ids(2, 17)
    assert tiny.relative_error(tiny.chain_logits(model, ids, RotateConfig()), model(ids).logits) < EXACT


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_run_batched_gives_the_whole_stream(batch_size):
    stream = random(5, 3, 48)
    assert torch.equal(run_batched(lambda x: 2 * x, stream, batch_size, tiny.CPU, "here"), 2 * stream)


def test_run_batched_names_where_a_nan_appeared():
    stream = random(5, 3, 48)
    stream[3, 1, 7] = float("nan")
    with pytest.raises(NumericalError, match=r"block 4: .*NaN or infinite values \(sequences 2 and on\)"):
        run_batched(lambda x: x, stream, 2, tiny.CPU, "block 4")
