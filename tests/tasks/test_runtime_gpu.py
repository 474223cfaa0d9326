"""The runtime on a GPU, where kernels run, gives what it gives on the CPU, where their references do."""

from typing import Any

import pytest
import tiny
import torch
from exported import Exported

from prefixquant.kernels.dispatch import references
from prefixquant.tasks.model.cache import cache_name
from prefixquant.tasks.runtime import QuantizedCausalLM
from prefixquant.tasks.runtime.faithful import compare_exactly, given_streams, seen_streams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHARED = {"prefix": {"tokens": [5, 7, tiny.BOS]}, "config.head_dim": 32}
TOKEN = {"mode": "dynamic", "granularity": "token"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-static": ("llama", SHARED),
    "llama-static-biases": ("llama-biases", SHARED),
    "qwen3-dynamic": ("qwen3", SHARED | {"quantize": {"activations": TOKEN}}),
    "qwen2-w4a8": ("qwen2-tied", SHARED | {"quantize": {"activations": {"bits": 8}}}),
    "llama-w8a8": ("llama", SHARED | {"quantize": {"weights": {"bits": 8}, "activations": {"bits": 8}}}),
    "llama-w4a16": ("llama", SHARED | {"prefix": {"tokens": []}, "quantize": {"activations": "off"}}),
    "llama-no-rotation": ("llama", SHARED | {"rotate": {"r3": False, "r4": False}}),
}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    return Exported(tmp_path_factory.mktemp(request.param), *CASES[request.param])


def load(exported, dtype, device="cuda", **options):
    model = QuantizedCausalLM.load(exported.folder, device=device, dtype=dtype, **options)
    for name, each in model.named_buffers():
        if name.endswith("clip_ratio"):  # at 1 a token's largest value lies on the edge of two codes
            each.clamp_(max=0.93)
    return model


def relative_error(found, wanted):
    return float((found.cpu().double() - wanted.double()).norm() / wanted.double().norm())


def block_outputs(model, ids, inputs):
    """Return what each block gives of its input."""
    with given_streams(model, inputs) as outputs:
        model(input_ids=ids.to(model.device))
    return outputs


def caches_behind(model, ids):
    """Return two caches that hold the same prompt."""
    caches = [model.new_cache(len(ids)) for _ in range(2)]
    for cache in caches:
        model.forward(input_ids=ids, **{cache_name(model.base_model): cache})
    return caches


@dtypes
@pytest.mark.parametrize("fast_prompts", [False, True], ids=["packed", "fast-prompts"])
@pytest.mark.parametrize("tokens", [1, 20, 150])
@torch.no_grad()
def test_blocks_are_no_further_from_32_bits_than_the_references(exported, tokens, fast_prompts, dtype):
    cpu, same = load(exported, torch.float32, "cpu"), load(exported, dtype, "cpu")
    gpu = load(exported, dtype, fast_prompts=fast_prompts)
    gpu.recording = False  # hooks are to see each forward
    ids = tiny.random_ids(2, tokens)
    with seen_streams(cpu) as streams:
        cpu(input_ids=ids)
    outputs = (block_outputs(model, ids, streams[:-1]) for model in (cpu, same, gpu))
    for wanted, reference, found in zip(*outputs, strict=True):
        # Another rounding takes values across the edge between two codes: few in 32 bits, some in a hundred in 16.
        assert relative_error(found, wanted) < 2 * relative_error(reference, wanted) + 0.05


@dtypes
@torch.no_grad()
def test_recorded_steps_give_the_logits_of_eager_ones(exported, dtype):
    model = load(exported, dtype)
    name, ids = cache_name(model.base_model), tiny.random_ids(2, 264).cuda()
    recorded, eager = caches_behind(model, ids[:, :250])
    graphs = []
    for index in range(250, 264):  # past 256 places, where the cache grows and a step is recorded anew
        step = ids[:, index : index + 1]
        found = model(input_ids=step, **{name: recorded}).logits.clone()
        graphs += [recorded.decode_graph] if recorded.decode_graph not in graphs else []
        assert torch.equal(found, model.forward(input_ids=step, **{name: eager}).logits)
        assert recorded.get_seq_length() == eager.get_seq_length() == index + 1
    assert eager.decode_graph is None
    assert len([each for each in graphs if each is not None]) == 2


@dtypes
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_overlapped_launches_change_no_bit(exported, batch, dtype):
    model = load(exported, dtype)
    name, ids = cache_name(model.base_model), tiny.random_ids(batch, 80).cuda()
    one_by_one, overlapped = caches_behind(model, ids[:, :40])
    for index in range(40, 80):
        step = ids[:, index : index + 1]
        model.overlapping = False
        wanted = model(input_ids=step, **{name: one_by_one}).logits.clone()
        model.overlapping = True
        found = model(input_ids=step, **{name: overlapped}).logits
        assert torch.equal(found, wanted)
    for ours, theirs in zip(overlapped.layers, one_by_one.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("tokens", [20, 150, 300])
@torch.no_grad()
def test_recorded_prompts_give_the_logits_of_eager_ones(exported, tokens):
    model = load(exported, torch.float32)
    name, ids = cache_name(model.base_model), tiny.random_ids(2, tokens + 1).cuda()
    eager, recorded = model.new_cache(2), model.new_cache(2)
    wanted = model.forward(input_ids=ids[:, :tokens], **{name: eager}).logits
    model(input_ids=ids[:, :tokens])
    for _ in range(2):  # recorded when the length comes again, then replayed
        assert relative_error(model(input_ids=ids[:, :tokens]).logits, wanted.cpu()) < 0.05
    last = model(input_ids=ids[:, :tokens], logits_to_keep=1, **{name: recorded}).logits
    assert last.shape == wanted[:, -1:].shape
    assert recorded.get_seq_length() == int(recorded.length) == tokens
    steps = [model.forward(input_ids=ids[:, tokens:], **{name: cache}).logits for cache in (recorded, eager)]
    assert relative_error(steps[0], steps[1].cpu()) < 0.05


@torch.no_grad()
def test_kernels_give_the_logits_of_the_references_on_the_same_gpu(exported):
    model, ids = load(exported, torch.float32), tiny.random_ids(2, 24).cuda()
    with references():
        wanted = model(input_ids=ids).logits.cpu()
    assert relative_error(model(input_ids=ids).logits, wanted) < 0.05


@pytest.mark.parametrize("tokens", [24, 300])
def test_in_float64_the_references_give_the_logits_of_the_simulation(exported, tokens):
    found = compare_exactly(exported.folder, tiny.random_ids(2, tokens), device=torch.device("cuda"))
    assert found.same_argmax == 1.0
    assert found.logit_error < 1e-9


def test_generated_tokens_are_those_of_the_references(exported):
    """With padding and without; a token may differ where the two best were all but equal, and what follows with it."""
    cpu, gpu = load(exported, torch.float32, "cpu"), load(exported, torch.float32)
    long, short = tiny.random_ids(2, 9)
    padded = torch.stack([long, torch.cat([torch.zeros(4, dtype=torch.long), short[:5]])])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    for ids, attention_mask in ((padded, mask), (long[None], torch.ones(1, 9, dtype=torch.long))):
        wanted = cpu.generate(ids, attention_mask=attention_mask, **options)
        found = gpu.generate(ids.cuda(), attention_mask=attention_mask.cuda(), **options)
        logits = torch.stack(wanted.logits, dim=1)
        for row, pair in enumerate(zip(found.sequences[:, -8:].cpu(), wanted.sequences[:, -8:], strict=True)):
            first = next((place for place, (one, other) in enumerate(zip(*pair, strict=True)) if one != other), None)
            if first is not None:
                ours, best = (float(logits[row, first, each[first]]) for each in pair)
                assert best - ours < 0.1 * float(logits[row, first].std())
