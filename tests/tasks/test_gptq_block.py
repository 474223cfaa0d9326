"""GPTQ in its place, a whole block; tests/tasks/test_gptq.py has the rounding of one weight."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixquant.tasks.calibrate import CalibrateConfig, Ranges, calibrate_blocks
from prefixquant.tasks.errors import NumericalError
from prefixquant.tasks.gptq import GptqConfig, gptq_block, gptq_round
from prefixquant.tasks.model.block import Block
from prefixquant.tasks.model.sites import OnlineTransforms, head_size
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec
from prefixquant.tasks.quantize_block import BlockResult, quantize_block
from prefixquant.tasks.rotate import RotateConfig, rotate_block
from prefixquant.tasks.search import SearchConfig, input_grams

CHANNEL = WeightSpec()
FEW_STEPS = SearchConfig(coarse_points=3, fine_points=0, weight_points=10)
STATIC = QuantizeConfig(weights=WeightSpec(bits=3))
BLOCK_CASES = {
    "static": STATIC,
    "groups": replace(STATIC, weights=WeightSpec(bits=3, symmetric=False, granularity="group", group_size=16)),
    "dynamic": replace(
        STATIC,
        activations=ActivationSpec(mode="dynamic", granularity="token"),
        keys=KeyValueSpec(mode="dynamic", before_rope=True),
    ),
    "weights-only": replace(STATIC, activations=None, keys=None, values=None),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Prepared:
    """A rotated tiny block with its ranges and stream, quantized anew by every `quantize`."""

    def __init__(self, quantize: QuantizeConfig, variant: str = "llama-biases") -> None:
        self.blocks = tiny.build_blocks(tiny.tiny_variant(variant), RotateConfig(), quantize)[:1]
        self.spec = quantize.weights
        # As in a trained model the states lie near few directions. More tokens than inputs: no fitting of noise.
        self.stream = random(8, 30, 8) @ random(8, 48, seed=1) + 0.3 * random(8, 30, 48, seed=2)
        self.ranges: Ranges = calibrate_blocks(
            self.blocks, None, self.stream, CalibrateConfig(ema=0.5), batch_size=4, device=tiny.CPU
        )[0]
        self.originals = {role: self.block.linear(role).weight.data for role in self.block.family.linears}

    @property
    def block(self) -> Block:
        return self.blocks[0]

    def quantize(self, gptq: GptqConfig | None) -> BlockResult:
        for role, original in self.originals.items():
            self.block.linear(role).weight.data = original
        return quantize_block(self.block, self.ranges, self.stream, None, self.spec, FEW_STEPS, batch_size=3, gptq=gptq)


@pytest.mark.parametrize("quantize", BLOCK_CASES.values(), ids=BLOCK_CASES.keys())
@pytest.mark.parametrize("variant", ["llama-biases", "qwen3"])
def test_gptq_lowers_the_block_error(variant, quantize):
    prepared = Prepared(quantize, variant)
    without, result = prepared.quantize(None), prepared.quantize(GptqConfig())
    assert without.error_nearest is None
    assert result.error_nearest == without.error
    assert result.error < 0.9 * without.error
    assert result.error_before == without.error_before
    assert result.search == without.search
    for role, weight in result.weights.items():
        assert torch.equal(weight.scale, without.weights[role].scale)
        assert torch.equal(weight.zero_point, without.weights[role].zero_point)
        assert torch.equal(prepared.block.linear(role).weight, weight.dequantize(prepared.spec))
    assert list(result.weights) == list(without.weights)
    assert all(site.enabled for site in prepared.block.sites.values())


@pytest.mark.parametrize("activations", ["quantized", "full_precision"])
def test_each_linear_is_rounded_on_what_the_rounded_ones_before_it_pass_on(activations):
    prepared = Prepared(STATIC)
    found = prepared.quantize(config := GptqConfig(activations=activations))
    block, spec = prepared.block, prepared.spec
    # Once all are rounded, the inputs of each linear are those it was rounded on.
    with block.only(*(block.sites if activations == "quantized" else ())):
        grams = input_grams(block, lambda: [block(part, None) for part in prepared.stream.split(3)], CHANNEL)
    for role, original in prepared.originals.items():
        weight = found.weights[role]
        wanted = gptq_round(original, grams[role][0], spec, weight.scale, weight.zero_point, config)
        assert torch.equal(weight.codes, wanted.codes)


def test_full_precision_inputs_give_other_codes():
    prepared = Prepared(STATIC)
    first = prepared.quantize(GptqConfig())
    second = prepared.quantize(GptqConfig(activations="full_precision"))
    assert any(not torch.equal(first.weights[role].codes, second.weights[role].codes) for role in first.weights)


def test_weights_that_are_off_are_not_rounded():
    prepared = Prepared(replace(STATIC, weights=None))
    result = prepared.quantize(GptqConfig())
    assert result.weights == {}
    assert result.error_nearest is None
    assert result.error == prepared.quantize(None).error


def test_trained_weights_may_be_rounded_while_they_require_gradients():
    prepared = Prepared(STATIC)
    found = prepared.quantize(None)
    prepared.block.requires_grad_(True)
    weights = {role: prepared.block.linear(role).weight for role in prepared.originals}
    rounded_weights = gptq_block(
        prepared.block, lambda: prepared.block(prepared.stream, None), weights, found.weights, CHANNEL, GptqConfig()
    )
    assert all(not weight.codes.requires_grad for weight in rounded_weights.values())


def test_bad_inputs_name_block_and_linear():
    prepared = Prepared(replace(STATIC, activations=None))
    found = prepared.quantize(None)
    broken = prepared.stream.clone()
    broken[0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"block 0, self_attn\.q_proj: the Gram matrix .* NaN"):
        gptq_block(
            prepared.block,
            lambda: prepared.block(broken, None),
            prepared.originals,
            found.weights,
            prepared.spec,
            GptqConfig(),
        )


@pytest.mark.real_model
def test_gptq_lowers_the_error_of_a_real_block_on_tokens_it_did_not_see(smollm2_model: PreTrainedModel):
    config, family, rotate = smollm2_model.config, tiny.family_of(smollm2_model), RotateConfig()
    weights = tiny.block_weights(smollm2_model, 0)
    weights = rotate_block(weights, family, head_size(config), 0, rotate, dtype=torch.float32, device=tiny.CPU)
    transforms = OnlineTransforms(r3=rotate.r3, r4=rotate.r4)
    block = Block(config, family, 0, weights, transforms=transforms, quantize=QuantizeConfig(), device=tiny.CPU)
    ids = torch.randint(config.vocab_size, (24, 128), generator=torch.Generator().manual_seed(0))
    seen, unseen = tiny.build_ends(smollm2_model, rotate).embedding[ids].split((18, 6))
    ranges = calibrate_blocks([block], None, seen, CalibrateConfig(), batch_size=6, device=tiny.CPU)[0]
    with block.only():
        target = block(unseen, None)
    errors = []
    for gptq in (None, GptqConfig()):
        for role in family.linears:
            block.linear(role).weight.data = weights[f"{role}.weight"]
        quantize_block(block, ranges, seen, None, CHANNEL, None, batch_size=6, gptq=gptq)
        errors.append(float((block(unseen, None) - target).square().sum()))
    assert errors[1] < 0.9 * errors[0]
