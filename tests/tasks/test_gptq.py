import pytest
import torch
from torch import Tensor

from prefixquant.tasks.errors import ConfigError, NumericalError
from prefixquant.tasks.gptq import GptqConfig, gptq_round
from prefixquant.tasks.model.quantizer import (
    QuantizedWeight,
    code_range,
    quantize,
    round_to_nearest,
    weight_groups,
    weight_scale,
)
from prefixquant.tasks.model.spec import WeightSpec

CHANNEL = WeightSpec()
SPECS = {
    "channel": CHANNEL,
    "channel-asymmetric": WeightSpec(symmetric=False),
    "tensor": WeightSpec(granularity="tensor", symmetric=False),
    "group": WeightSpec(bits=3, granularity="group", group_size=8),
    "group-asymmetric": WeightSpec(bits=2, granularity="group", group_size=8, symmetric=False),
}

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
either_order = pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(num_outputs: int = 12, num_inputs: int = 40, num_tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight with a mean and the Gram matrix of correlated inputs of unequal size."""
    mix = random(num_inputs, num_inputs, seed=seed + 1) * torch.linspace(3, 0.1, num_inputs)[:, None]
    x = random(num_tokens, num_inputs, seed=seed) @ mix * torch.linspace(0.3, 2, num_inputs).roll(num_inputs // 3)
    return random(num_outputs, num_inputs, seed=seed + 2) + 0.2, x.T @ x


def grid_of(weight: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    return weight_scale(weight, spec, 0.9)  # the largest weights are clipped


def rounded(weight: Tensor, gram: Tensor, spec: WeightSpec = CHANNEL, **settings: object) -> QuantizedWeight:
    return gptq_round(weight, gram, spec, *grid_of(weight, spec), GptqConfig(**settings))  # type: ignore[arg-type]


def nearest(weight: Tensor, spec: WeightSpec = CHANNEL) -> QuantizedWeight:
    return round_to_nearest(weight, spec, 0.9)


def output_errors(weight: Tensor, gram: Tensor, found: QuantizedWeight, spec: WeightSpec) -> Tensor:
    """Return d^T H d of every output, float64."""
    d = (found.dequantize(spec) - weight).double()
    return ((d @ gram.double()) * d).sum(1)


def by_definition(weight: Tensor, gram: Tensor, spec: WeightSpec, config: GptqConfig) -> Tensor:
    """Return the codes of Optimal Brain Quantization in GPTQ's fixed order, as the papers define it, in float64.

    Column after column is rounded; the others still free take the step that least raises the output's error, which
    comes from the inverse of their own Hessian.
    """
    hessian, free_weight = gram.double().clone(), weight.double().clone()
    dead = hessian.diagonal() == 0
    free_weight[:, dead] = 0
    hessian += torch.diag(dead.double() * hessian.diagonal().sum() / (~dead).sum())
    hessian += torch.eye(len(hessian), dtype=torch.float64) * config.damping * hessian.diagonal().mean()
    grid = [each.double().expand(len(weight), -1, -1) for each in grid_of(weight, spec)]
    size = weight.shape[1] // grid[0].shape[1]
    free = list(range(len(hessian)))
    if config.act_order:
        free.sort(key=lambda column: -float(hessian[column, column]))
    codes = torch.zeros(weight.shape, dtype=torch.int16)
    while free:
        column = free[0]
        scale, zero_point = (each[:, column // size, 0] for each in grid)
        code = quantize(free_weight[:, column], scale, zero_point, spec.bits, spec.symmetric)
        codes[:, column] = code.to(torch.int16)
        inverse = torch.linalg.inv(hessian[free][:, free])
        error = free_weight[:, column] - (code - zero_point) * scale
        free_weight[:, free] -= torch.outer(error / inverse[0, 0], inverse[0])
        free = free[1:]
    return codes


@either_order
@every_spec
def test_codes_are_those_of_the_definition(spec, act_order):
    weight, gram = layer()
    gram[:, 17] = gram[17, :] = 0
    config = GptqConfig(act_order=act_order, block_size=16)
    found = gptq_round(weight, gram, spec, *grid_of(weight, spec), config)
    assert torch.equal(found.codes, by_definition(weight, gram, spec, config))
    assert not torch.equal(found.codes, nearest(weight, spec).codes)


@either_order
@every_spec
def test_uncorrelated_inputs_give_round_to_nearest(spec, act_order):
    weight, _ = layer()
    found = rounded(weight, torch.diag(torch.linspace(0.1, 5, 40)), spec, act_order=act_order)
    assert torch.equal(found.codes, nearest(weight, spec).codes)


@either_order
@pytest.mark.parametrize("seed", range(3))
@every_spec
def test_output_error_is_clearly_below_that_of_round_to_nearest(spec, seed, act_order):
    weight, gram = layer(24, 64, seed=10 * seed)
    found = output_errors(weight, gram, rounded(weight, gram, spec, act_order=act_order), spec)
    wanted = output_errors(weight, gram, nearest(weight, spec), spec)
    assert found.sum() < 0.6 * wanted.sum()


@pytest.mark.parametrize("correlation", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_output_error_is_never_above_that_of_round_to_nearest(correlation):
    weight, _ = layer(64, 64)
    gram = (1 - correlation) * torch.eye(64) + correlation * torch.ones(64, 64)
    found = output_errors(weight, gram, rounded(weight, gram), CHANNEL).sum()
    # GPTQ is greedy: where hardly anything is to be won it may lose a hair
    assert found < 1.002 * output_errors(weight, gram, nearest(weight), CHANNEL).sum()


@either_order
@every_spec
def test_codes_lie_on_the_given_grid(spec, act_order):
    weight, gram = layer()
    scale, zero_point = grid_of(weight, spec)
    found = gptq_round(weight, gram, spec, scale, zero_point, GptqConfig(act_order=act_order))
    low, high = code_range(spec.bits, spec.symmetric)
    assert found.codes.dtype == torch.int16
    assert found.codes.shape == weight.shape
    assert low <= found.codes.min()
    assert found.codes.max() <= high
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.zero_point, zero_point)
    codes = quantize(weight_groups(found.dequantize(spec), spec), scale, zero_point, spec.bits, spec.symmetric)
    assert torch.equal(codes.reshape(weight.shape).to(torch.int16), found.codes)


@pytest.mark.parametrize("block_size", [1, 7, 40, 128])
def test_block_size_changes_nothing(block_size):
    weight, gram = layer()
    wanted = rounded(weight, gram, block_size=16)
    assert torch.equal(rounded(weight, gram, block_size=block_size).codes, wanted.codes)


@pytest.mark.parametrize("factor", [1e-12, 2.0, 1e12])
def test_size_of_the_inputs_changes_nothing(factor):
    weight, gram = layer()
    gram[:, 3] = gram[3, :] = 0
    assert torch.equal(rounded(weight, gram * factor).codes, rounded(weight, gram).codes)


@either_order
@every_spec
def test_weights_of_dead_inputs_are_zero(spec, act_order):
    weight, gram = layer()
    dead = [0, 9, 39]
    gram[:, dead] = gram[dead, :] = 0
    found = rounded(weight, gram, spec, act_order=act_order)
    assert (found.dequantize(spec)[:, dead] == 0).all()
    live = [column for column in range(40) if column not in dead]
    if spec is CHANNEL:  # the others do not notice
        scale, zero_point = grid_of(weight, spec)
        config = GptqConfig(act_order=act_order)
        alone = gptq_round(weight[:, live], gram[live][:, live], spec, scale, zero_point, config)
        assert torch.equal(alone.codes, found.codes[:, live])


def test_inputs_that_are_all_zero_give_zeros():
    weight, gram = layer()
    assert (rounded(weight, torch.zeros_like(gram)).codes == 0).all()


@pytest.mark.parametrize("damping", [0.01, 1e-6, 1e-9])
@pytest.mark.parametrize("num_tokens", [1, 10])
def test_fewer_tokens_than_inputs_still_help(num_tokens, damping):
    weight, gram = layer(num_tokens=num_tokens)
    found = output_errors(weight, gram, rounded(weight, gram, damping=damping), CHANNEL).sum()
    assert found < 0.5 * output_errors(weight, gram, nearest(weight), CHANNEL).sum()


def test_singular_hessian_that_is_hardly_damped_says_what_to_do():
    weight, gram = layer(num_tokens=10)
    with pytest.raises(NumericalError, match=r"raise gptq\.damping \(now 1e-30\) or give more text"):
        rounded(weight, gram, damping=1e-30)


def test_hessian_that_damping_cannot_mend_says_what_to_do():
    weight, gram = layer()
    gram[5, 5] = -100 * gram.diagonal().mean()
    with pytest.raises(NumericalError, match=r"not positive definite, even with 10 of .* raise gptq\.damping \(now 0"):
        rounded(weight, gram)


def test_damping_is_raised_where_it_does_not_suffice():
    weight, gram = layer()
    scale = gram.diagonal().mean()
    gram -= (torch.linalg.eigvalsh(gram)[0] + 0.05 * scale) * torch.eye(40)
    gram *= scale / gram.diagonal().mean()
    assert torch.equal(rounded(weight, gram, damping=0.01).codes, rounded(weight, gram, damping=0.1).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gram_matrix_is_refused(bad):
    weight, gram = layer()
    gram[3, 4] = bad
    with pytest.raises(NumericalError, match="holds NaN or infinite"):
        rounded(weight, gram)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_are_rounded_in_float32(dtype):
    weight, gram = layer()
    weight = weight.to(dtype)
    config, grid = GptqConfig(), grid_of(weight, CHANNEL)
    wanted = gptq_round(weight.float(), gram, CHANNEL, *grid, config)
    assert torch.equal(gptq_round(weight, gram, CHANNEL, *grid, config).codes, wanted.codes)


def test_inputs_are_left_as_they_were():
    weight, gram = layer()
    before = weight.clone(), gram.clone()
    rounded(weight, gram, act_order=True)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize("precision", ["tf32", "ieee", "none"])
def test_precision_of_products_is_restored(precision):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = precision
        weight, gram = layer()
        rounded(weight, gram)
        assert matmul.fp32_precision == precision
        with pytest.raises(NumericalError):
            rounded(weight, -gram)
        assert matmul.fp32_precision == precision
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    "settings", [{"damping": 0.0}, {"damping": -0.1}, {"damping": float("nan")}, {"block_size": 0}], ids=str
)
def test_config_names_the_wrong_key(settings):
    with pytest.raises(ConfigError, match=f"gptq.{next(iter(settings))} must be"):
        GptqConfig(**settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@either_order
@every_spec
def test_gpu_rounds_as_well_as_the_cpu(spec, act_order):
    weight, gram = layer(96, 320, 2000)
    found = rounded(weight.cuda(), gram, spec, act_order=act_order)
    assert found.codes.is_cuda
    on_cpu = QuantizedWeight(*(each.cpu() for each in (found.codes, found.scale, found.zero_point)))
    wanted = output_errors(weight, gram, rounded(weight, gram, spec, act_order=act_order), spec).sum()
    # a code on a rounding boundary may go the other way, and those after it follow
    torch.testing.assert_close(output_errors(weight, gram, on_cpu, spec).sum(), wanted, rtol=0.02, atol=0)
