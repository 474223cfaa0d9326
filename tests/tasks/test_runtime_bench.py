import math

import pytest
import tiny
import torch
from exported import Exported

from prefixquant.kernels.gemm import quantized_linear
from prefixquant.kernels.int4 import pack_int4
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.shapes import ModelShape
from prefixquant.tasks.runtime.bench import BenchConfig, bench
from prefixquant.tasks.runtime.check import OperatorCheck, difference
from prefixquant.tasks.runtime.faithful import compare_exactly, compare_with_simulation
from prefixquant.tasks.runtime.graphs import _filled_up
from prefixquant.tasks.runtime.model import QuantizedCausalLM
from prefixquant.tasks.runtime.random_model import RandomSource

SHAPE = ModelShape(64, 192, 4, 2, 2, 128)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_a_random_model_keeps_its_activations_near_one_and_its_operators_are_right(dynamic):
    cpu = torch.device("cpu")
    model = QuantizedCausalLM.build(RandomSource(SHAPE.config(), cpu, dynamic=dynamic), cpu, torch.bfloat16)
    spreads = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: spreads.append(float(output.float().std())))
    ids = tiny.random_ids(1, 20) % SHAPE.vocabulary
    check = OperatorCheck()
    with check:
        logits = model(input_ids=ids).logits
    assert logits.shape == (1, 20, SHAPE.vocabulary)
    assert all(0.5 < spread < 3 for spread in spreads)
    assert {"linear", "quantize", "hadamard_quantize", "split_heads", "kv_attention"} <= check.errors.keys()
    assert check.ok


@pytest.mark.parametrize(("rope_type", "recorded"), [("default", True), ("linear", True), ("dynamic", False)])
def test_frequencies_that_follow_the_longest_sequence_are_not_recorded(rope_type, recorded):
    cpu, config = torch.device("cpu"), SHAPE.config()
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    model = QuantizedCausalLM.build(RandomSource(config, cpu), cpu, torch.bfloat16)
    assert model.recording == recorded


def test_the_check_finds_what_is_wrong():
    codes = torch.randint(-8, 8, (64, 64), generator=torch.Generator().manual_seed(0))
    assert difference(codes.to(torch.int8), codes.to(torch.int8)) == 0
    assert difference(codes.to(torch.int8), (codes + 2).to(torch.int8)) > 1  # by more than a step
    assert difference(codes.to(torch.int8), (codes + 1).to(torch.int8)) > 1  # by a step, but everywhere
    one = codes.clone()
    one[0, 0] = one[0, 0] - 1 if one[0, 0] > 0 else one[0, 0] + 1
    assert 0 < difference(pack_int4(codes), pack_int4(one)) <= 1  # one code on the edge
    values = codes.float()
    assert difference(values, values * 1.1) > 1
    assert difference(values.fill_(math.nan), codes.float()) == math.inf
    assert difference(values, values.bfloat16()) == math.inf


def test_the_check_leaves_the_forward_as_it_is():
    x = torch.randint(-8, 8, (3, 16), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    arguments = x, torch.tensor(0.5), pack_int4(x), torch.ones(3)
    with OperatorCheck() as check:
        found = quantized_linear(*arguments, dtype=torch.float32)
    assert torch.equal(found, quantized_linear(*arguments, dtype=torch.float32))
    assert check.errors == {"linear": 0.0}


def test_the_runtime_is_faithful_to_the_simulation(tmp_path):
    exported = Exported(tmp_path, "llama", {"prefix": {"tokens": [5, 7, tiny.BOS]}})
    windows = tiny.random_ids(3, 32)
    found = compare_with_simulation(exported.folder, windows, device=torch.device("cpu"), dtype=torch.float32)
    assert found.tokens == 96
    assert found.same_argmax == 1.0
    assert found.block_error < 0.05  # sums in another order move a code now and then, which is a step of the grid
    assert min(found.same_argmax_free, found.same_argmax_control) > 0.9  # and this model is two blocks
    assert abs(found.ppl_runtime / found.ppl_simulation - 1) < 0.01
    assert abs(found.ppl_control / found.ppl_simulation - 1) < 0.01
    assert "same argmax on" in str(found)


def test_an_export_in_16_bits_is_compared_as_well(tmp_path):
    exported = Exported(tmp_path, "llama", {"prefix": {"tokens": [5, 7, tiny.BOS]}, "model.dtype": "bfloat16"})
    windows, cpu = tiny.random_ids(2, 24), torch.device("cpu")
    found = compare_with_simulation(exported.folder, windows, device=cpu, dtype=torch.bfloat16)
    assert found.change == torch.finfo(torch.bfloat16).eps
    assert found.same_argmax_control < 1.0  # the change is not rounded away
    assert compare_exactly(exported.folder, windows, device=cpu).same_argmax == 1.0


def test_a_runtime_that_computes_something_else_is_seen(tmp_path, monkeypatch):
    exported = Exported(tmp_path, "llama", {"prefix": {"tokens": [5, 7, tiny.BOS]}})
    load = QuantizedCausalLM.load

    def wrong(*args, **options):
        model = load(*args, **options)
        model.model.layers[1].mlp.down.weight_scale.mul_(1.5)
        return model

    monkeypatch.setattr(QuantizedCausalLM, "load", wrong)
    cpu = torch.device("cpu")
    found = compare_with_simulation(exported.folder, tiny.random_ids(3, 32), device=cpu, dtype=torch.float32)
    assert found.same_argmax < 1.0
    assert found.block_error > 0.1
    exact = compare_exactly(exported.folder, tiny.random_ids(3, 32), device=cpu)
    assert exact.logit_error > 0.01
    assert exact.ppl_runtime != pytest.approx(exact.ppl_simulation, rel=1e-4)
    assert "same argmax on" in str(exact)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU says")
def test_bench_asks_for_a_gpu():
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        bench("llama-3-8b", BenchConfig())


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(2, 16), (17, 32), (200, 256), (256, 256), (257, 512), (2048, 2048), (2050, 2304)]
)
def test_recorded_prompts_are_filled_up_to_few_lengths(tokens, wanted):
    assert _filled_up(tokens) == wanted
