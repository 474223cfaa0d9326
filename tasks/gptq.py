"""Round weights column by column, each rounding error made up for by the columns still to come (GPTQ).

Frantar et al., arXiv:2210.17323. The grid is given and stays; only the choice of codes on it changes.
Letters: T tokens, I inputs and O outputs of a linear, R rows and G groups that share a scale, B columns of a block.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prefixquant.tasks.errors import ConfigError, NumericalError
from prefixquant.tasks.model.block import Block
from prefixquant.tasks.model.quantizer import QuantizedWeight, quantize
from prefixquant.tasks.model.spec import WeightSpec
from prefixquant.tasks.search import input_grams

DAMPING_RAISES = 3
"""How often the damping is raised tenfold before a Hessian is given up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqConfig:
    """How weights are rounded by GPTQ, on the grids that the search or the training found."""

    damping: float = 0.01
    """Added to the diagonal of the Hessian, as a fraction of its mean. 0.01 in the paper."""

    block_size: int = 128
    """Columns swept before their errors are passed on to all later ones at once. It changes the speed alone."""

    act_order: bool = False
    """True: columns of larger inputs are rounded first. Works with groups, for the grids are found beforehand."""

    activations: Literal["quantized", "full_precision"] = "quantized"
    """Whether the inputs that the Hessian is made of pass the quantization sites."""

    training: Literal["start", "end"] = "end"
    """With training. start: it starts from the rounded weights. end: the trained weights are rounded by GPTQ."""

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"gptq.damping must be above 0 and finite, got {self.damping}; 0.01 is usual")
        if self.block_size < 1:
            raise ConfigError(f"gptq.block_size must be at least 1, got {self.block_size}; 128 is usual")


@contextmanager
def _exact_products() -> Iterator[None]:
    """Within the context, float32 products on a GPU are not done in TF32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _hessian(gram_II: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix over its mean diagonal, and which inputs [I] are always zero: their diagonal is 1."""
    diagonal = gram_II.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    hessian = gram_II / mean.clamp_min(torch.finfo(gram_II.dtype).tiny)
    hessian.diagonal().add_(dead)
    return hessian, dead


def _inverse_factor(hessian_II: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U^T U = (H + damping)^-1, float32, or float64 where float32 fails.

    With the rows and columns of H in reverse, its lower Cholesky factor L becomes an upper R with H = R R^T, and
    U = R^-1: one factorization, and no inverse of H is formed.

    Raises:
        NumericalError: H is not positive definite, however much it is damped.
    """
    for damping_used in (damping * 10**raises for raises in range(DAMPING_RAISES + 1)):
        for dtype in (torch.float32, torch.float64):
            damped = hessian_II.to(dtype, copy=True)
            damped.diagonal().add_(damping_used)
            lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
            identity = torch.eye(len(damped), dtype=dtype, device=damped.device)
            factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if bool((info == 0) & torch.isfinite(factor).all()):
                return factor
    raise NumericalError(
        f"the Gram matrix of the inputs is not positive definite, even with {damping_used:g} of its mean diagonal "
        f"added; raise gptq.damping (now {damping:g}) or give more text in data.search.sequences"
    )


def gptq_round(
    weight_OI: Tensor, gram_II: Tensor, spec: WeightSpec, scale: Tensor, zero_point: Tensor, config: GptqConfig
) -> QuantizedWeight:
    """Return the weight's codes on a given grid, chosen for a small error d^T H d of the layer's output.

    Nothing waits for the device but the checks of H and of its factor, before the sweep.

    Args:
        weight_OI: the weight in full precision. All is computed on its device.
        gram_II: H = X^T X of the linear's inputs X [T, I], float32; its size does not matter.
        spec: bits and symmetry of the codes.
        scale: [R, G, 1], of the grid.
        zero_point: likewise.
        config: how to round.

    Raises:
        NumericalError: H holds NaN or infinite values or cannot be factorized.
    """
    device, num_inputs = weight_OI.device, weight_OI.shape[1]
    gram_II, scale, zero_point = gram_II.to(device), scale.to(device), zero_point.to(device)
    if not bool(torch.isfinite(gram_II).all()):
        raise NumericalError("the Gram matrix of the inputs holds NaN or infinite values")
    hessian_II, dead_I = _hessian(gram_II)
    order_I = torch.arange(num_inputs, device=device)
    if config.act_order:
        order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
        hessian_II = hessian_II[order_I][:, order_I]
    with _exact_products():
        factor_II = _inverse_factor(hessian_II, config.damping)
        # Columns of the weight as rows: each is then contiguous.
        weight_IO = weight_OI.masked_fill(dead_I, 0)[:, order_I].to(factor_II.dtype).T.contiguous()
        group_I = order_I // (num_inputs // scale.shape[1])
        codes_IO = _sweep(weight_IO, factor_II, spec, scale[..., 0].T, zero_point[..., 0].T, group_I, config.block_size)
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.int16, device=device)
    codes_OI[:, order_I] = codes_IO.T
    return QuantizedWeight(codes_OI, scale, zero_point)


def _sweep(
    weight_IO: Tensor,
    factor_II: Tensor,
    spec: WeightSpec,
    scale_GR: Tensor,
    zero_point_GR: Tensor,
    group_I: Tensor,
    block_size: int,
) -> Tensor:
    """Return the codes [I, O], int16; the weight is used up."""
    codes_IO = torch.empty(weight_IO.shape, dtype=torch.int16, device=weight_IO.device)
    for start in range(0, len(weight_IO), block_size):
        stop = min(start + block_size, len(weight_IO))
        block_BO, factor_BB = weight_IO[start:stop], factor_II[start:stop, start:stop]
        scale_BR, zero_BR = (each[group_I[start:stop]].to(weight_IO.dtype) for each in (scale_GR, zero_point_GR))
        error_BO = torch.empty_like(block_BO)
        for j in range(stop - start):
            code_O = quantize(block_BO[j], scale_BR[j], zero_BR[j], spec.bits, spec.symmetric)
            codes_IO[start + j] = code_O
            error_BO[j] = (block_BO[j] - (code_O - zero_BR[j]) * scale_BR[j]) / factor_BB[j, j]
            block_BO[j + 1 :].addr_(factor_BB[j, j + 1 :], error_BO[j], alpha=-1)
        weight_IO[stop:].addmm_(factor_II[start:stop, stop:].T, error_BO, alpha=-1)
    return codes_IO


@torch.no_grad()
def gptq_block(
    block: Block,
    run: Callable[[], object],
    originals: Mapping[str, Tensor],
    weights: Mapping[str, QuantizedWeight],
    spec: WeightSpec,
    config: GptqConfig,
) -> dict[str, QuantizedWeight]:
    """Round a block's linears in the order data flows, each on inputs that passed the rounded ones before it.

    The block is left with the rounded weights. One Gram matrix [I, I] is held at a time.

    Args:
        block: with its sites set.
        run: passes the calibration data through the block; called four times.
        originals: weights in full precision, by linear.
        weights: by linear; their grids are kept, their codes are not looked at.
        spec: how weights are quantized.
        config: how to round.

    Raises:
        NumericalError: the inputs of a linear do not allow it; names the block and the linear.
    """
    family = block.family
    enabled = tuple(block.sites) if config.activations == "quantized" else ()
    rounded: dict[str, QuantizedWeight] = {}
    for step in (family.norm1_consumers, (family.o,), family.norm2_consumers, (family.down,)):
        with block.only(*enabled):  # the linears of a step read the same input; a scale a channel asks for all of H
            (gram_II,) = input_grams(block, run, WeightSpec(), roles=step[:1])[step[0]]
        for role in step:
            grid, linear = weights[role], block.linear(role)
            try:
                rounded[role] = gptq_round(originals[role], gram_II, spec, grid.scale, grid.zero_point, config)
            except NumericalError as err:
                raise NumericalError(f"block {block.index}, {role}: {err}") from err
            linear.weight.data = rounded[role].dequantize(spec).to(linear.weight.dtype)
    return rounded
