import subprocess
import sys
from typing import Any

import pytest
import tiny
import torch
from exported import Exported

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.export import load_quantized
from prefixquant.tasks.model.cache import cache_name
from prefixquant.tasks.model.sites import head_size
from prefixquant.tasks.runtime import QuantizedCausalLM
from prefixquant.tasks.runtime.faithful import compare_exactly

PREFIX = {"prefix": {"tokens": [5, 7, tiny.BOS]}}
TOKEN = {"mode": "dynamic", "granularity": "token"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-static": ("llama-biases", PREFIX),
    "qwen3-dynamic": ("qwen3", PREFIX | {"quantize": {"activations": TOKEN}}),
    "qwen2-w4a8": ("qwen2-tied", PREFIX | {"quantize": {"activations": {"bits": 8}}}),
    "llama-w8a8": ("llama", PREFIX | {"quantize": {"weights": {"bits": 8}, "activations": {"bits": 8}}}),
    "llama-w4a16": ("llama", {"prefix": {"tokens": []}, "quantize": {"activations": "off"}}),
    "llama-r4-blocks": ("llama", PREFIX | {"rotate": {"r4_block": 16}}),
    "qwen3-r4-blocks": ("qwen3", PREFIX | {"rotate": {"r4_block": 16}, "quantize": {"activations": TOKEN}}),
    "llama-no-rotation": ("llama", PREFIX | {"rotate": {"r3": False, "r4": False}}),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    return Exported(tmp_path_factory.mktemp(request.param), *CASES[request.param])


@pytest.fixture(scope="module")
def model(exported):
    return QuantizedCausalLM.load(exported.folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    return Exported(tmp_path_factory.mktemp("static"), *CASES["llama-static"])


def test_blocks_give_what_the_simulation_gives_on_the_same_input(exported, model):
    simulation = load_quantized(exported.folder)
    seen: list[tuple[Any, Any]] = []
    handles = [
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
        for layer in simulation.model.layers
    ]
    ids = tiny.random_ids(2, 24)
    simulation(input_ids=ids)
    for each in handles:
        each.remove()
    for index, (given, wanted) in enumerate(seen):
        replace = model.model.layers[index].register_forward_pre_hook(lambda _, args, given=given: (given, *args[1:]))
        found: list[Any] = []
        handle = model.model.layers[index].register_forward_hook(
            lambda _, args, output, found=found: found.append(output)
        )
        model(input_ids=ids)
        replace.remove()
        handle.remove()
        close = torch.isclose(found[0], wanted, rtol=1e-4, atol=1e-4).all(-1)
        # Sums in another order may take a value across the edge between two codes, which changes its token. A scale a
        # token at a clipping ratio of 1 puts the token's largest value, 7.5 steps, on an edge itself.
        at_edges = any(name.endswith("clip_ratio") and float(each) == 1 for name, each in simulation.named_buffers())
        assert close.float().mean() > (0.8 if at_edges else 0.95)


def test_in_float64_it_gives_the_logits_of_the_simulation(exported):
    found = compare_exactly(exported.folder, tiny.random_ids(3, 40), device=torch.device("cpu"))
    assert found.same_argmax == 1.0
    # Sums in another order, and no value so near the edge between two codes that this takes it across. A scale a token
    # is float32 in both, so that the token's largest value is off the edge of 7.5 steps by the scale's own rounding.
    assert found.logit_error < 1e-12
    assert found.ppl_runtime == pytest.approx(found.ppl_simulation, rel=1e-12)


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(model):
    ids = tiny.random_ids(2, 24)
    whole = model(input_ids=ids).logits
    cache = model.new_cache(2, places=10)
    name = cache_name(model.base_model)
    parts = [model(input_ids=ids[:, start:end], **{name: cache}).logits for start, end in ((0, 11), (11, 12), (12, 24))]
    assert cache.get_seq_length() == 24
    # The same products in batches of another shape: their last bits may differ, and then a code.
    close = torch.isclose(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4).all(-1)
    assert close.float().mean() > 0.9


def test_padded_batches_generate_what_each_prompt_does_alone(model):
    long, short = tiny.random_ids(2, 9)
    batch = torch.stack([long, torch.cat([torch.zeros(4, dtype=torch.long), short[:5]])])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)
    alone = [model.generate(each.unsqueeze(0), **options)[0, -5:].tolist() for each in (long, short[:5])]
    assert together[:, -5:].tolist() == alone


def test_padding_on_the_left_moves_no_token_from_the_prefix(static):
    model = QuantizedCausalLM.load(static.folder, dtype=torch.float32)
    ids, mask = tiny.random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    cache = model.new_cache(2)
    name = cache_name(model.base_model)
    padded = torch.cat(
        [
            model(input_ids=ids[:, :18], attention_mask=mask[:, :18], **{name: cache}).logits,
            model(input_ids=ids[:, 18:19], **{name: cache}).logits,
            model(input_ids=ids[:, 19:], attention_mask=mask, **{name: cache}).logits,
        ],
        dim=1,
    )
    alone = model(input_ids=ids[1:, 7:]).logits[0]
    # The same products in batches of another shape: their last bits may differ, and then a code.
    assert torch.isclose(padded[1, 7:], alone, rtol=1e-4, atol=1e-4).all(-1).float().mean() > 0.8


def test_padding_on_the_right_changes_nothing_before_it_and_nothing_may_follow_it(static):
    model = QuantizedCausalLM.load(static.folder, dtype=torch.float32)
    ids, mask = tiny.random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 13:] = 0
    padded, alone = model(input_ids=ids, attention_mask=mask).logits[1, :13], model(input_ids=ids[1:, :13]).logits[0]
    assert torch.isclose(padded, alone, rtol=1e-4, atol=1e-4).all(-1).float().mean() > 0.8
    with pytest.raises(ConfigError, match="pad on the left"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)


def test_weights_and_cache_are_a_quarter_of_16_bits(static):
    model = QuantizedCausalLM.load(static.folder)
    linear = model.model.layers[0].mlp.down
    config = model.config
    assert linear.weight.nbytes * 4 == config.hidden_size * config.intermediate_size * 2
    cache = model.new_cache(3, places=256)
    assert cache.layers[0].keys.nbytes * 4 == 3 * 256 * config.num_key_value_heads * head_size(config) * 2


def test_it_is_a_model_of_its_family_and_loads_without_ray_or_mlflow(static):
    code = (
        "import sys\n"
        "from transformers import LlamaForCausalLM\n"
        "from prefixquant.tasks.runtime import QuantizedCausalLM\n"
        f"model = QuantizedCausalLM.load({str(static.folder)!r})\n"
        "assert isinstance(model, QuantizedCausalLM) and isinstance(model, LlamaForCausalLM)\n"
        "assert not {'ray', 'mlflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_another_cache_and_beams_are_refused(static):
    model = QuantizedCausalLM.load(static.folder)
    name, ids = cache_name(model.base_model), tiny.random_ids(2, 4)
    with pytest.raises(ConfigError, match=r"model\.new_cache\(2\)"):
        model(input_ids=ids, **{name: model.new_cache(1)})
    with pytest.raises(ConfigError, match="num_beams"):
        model.generate(ids, num_beams=2)


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    [
        ("llama", {"quantize": {"weights": {"granularity": "group", "group_size": 16}}}, "a scale a channel"),
        ("llama", {"quantize": {"activations": {"bits": 6}}}, "4 or 8 bits"),
        ("llama", {"quantize": {"keys": "off"}}, "keys must be static symmetric 4-bit"),
        ("mistral-window", {}, "without a sliding window"),
        ("llama", {"config.hidden_act": "gelu_pytorch_tanh"}, "hidden_act must be silu"),
    ],
    ids=["weights", "activations", "keys", "window", "hidden-act"],
)
def test_what_no_kernel_runs_is_refused(tmp_path, variant, settings, message):
    with pytest.raises(ConfigError, match=message):
        QuantizedCausalLM.load(Exported(tmp_path, variant, PREFIX | settings).folder)
