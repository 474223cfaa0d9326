"""Make a block's quantization parameters and weights trainable, and take the trained values out again.

Letters: O outputs and I inputs of a linear, R rows and G groups that share a scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefixquant.kernels.fake_quantize import fake_quantize_with_codes
from prefixquant.tasks.model.block import Block
from prefixquant.tasks.model.quantizer import (
    MIN_SCALE,
    QuantizedWeight,
    code_range,
    fake_quantize,
    product_dtype,
    quantize,
    weight_groups,
)
from prefixquant.tasks.model.spec import WeightSpec


class WeightQuantizer(nn.Module):
    """Takes a weight to its grid in the forward, with straight-through gradients to weight, scale and zero point."""

    def __init__(self, spec: WeightSpec, scale: Tensor, zero_point: Tensor) -> None:
        """Start from a grid [R, G, 1]."""
        super().__init__()
        self.spec = spec
        self.scale = nn.Parameter(scale.clone())
        self.zero_point: Tensor
        if spec.symmetric:
            self.register_buffer("zero_point", zero_point.clone())
        else:
            self.zero_point = nn.Parameter(zero_point.clone())

    def forward(self, weight_OI: Tensor) -> Tensor:
        """Return the weight on its grid, in the autocast type if autocast is on."""
        spec, dtype = self.spec, product_dtype(weight_OI)
        scale: Tensor = self.scale  # training ends where a scale is not positive any more
        zero_point = self.zero_point
        if spec.granularity == "group":
            groups = weight_groups(weight_OI, spec)
            return fake_quantize(groups, scale, zero_point, spec.bits, spec.symmetric, dtype).reshape(weight_OI.shape)
        # The parameter itself, not a view of it: then its gradient may keep the type of the product.
        scale, zero_point = scale.squeeze(1), zero_point.squeeze(1)
        return fake_quantize(weight_OI, scale, zero_point, spec.bits, spec.symmetric, dtype)

    def with_codes(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the forward does and its codes as float8_e4m3fn, of a symmetric grid with a scale a row."""
        low, high = code_range(self.spec.bits, self.spec.symmetric)
        return fake_quantize_with_codes(weight_OI, self.scale.squeeze(1), low, high, product_dtype(weight_OI))

    @torch.no_grad()
    def codes(self, weight_OI: Tensor) -> QuantizedWeight:
        """Return the weight rounded to nearest on the present grid."""
        scale, zero_point = self.grid()
        groups = weight_groups(weight_OI.float(), self.spec)
        codes = quantize(groups, scale, zero_point, self.spec.bits, self.spec.symmetric)
        return QuantizedWeight(codes.reshape(weight_OI.shape).to(torch.int16), scale, zero_point)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point [R, G, 1] as they are stored: float32, the zero point whole."""
        top = 2**self.spec.bits - 1
        zero_point = self.zero_point if self.spec.symmetric else self.zero_point.round().clamp(0, top)
        return self.scale.detach().float().clamp_min(MIN_SCALE), zero_point.detach().float().clone()


@dataclass(frozen=True, slots=True)
class Trainable:
    """One parameter that is trained."""

    name: str
    """Its name in the block."""

    parameter: nn.Parameter

    is_weight: bool
    """A weight (or norm gain) rather than a scale, zero point or clipping ratio."""

    step: float
    """What the parameter is measured in: for a weight the mean quantization step, for a scale its own mean size."""


def make_trainable(
    block: Block, weights: Mapping[str, Tensor], quantized: Mapping[str, QuantizedWeight], spec: WeightSpec | None
) -> list[Trainable]:
    """Give the block float32 weights and trainable grids, in place; return its parameters.

    Args:
        block: with the sites set from which training starts.
        weights: the weights from which training starts, by linear; those of the full-precision block as a rule.
        quantized: the grid from which training starts, by linear; empty if weights are not quantized.
        spec: how weights are quantized.
    """
    block.float()
    found: list[Trainable] = []
    for role in block.family.linears:
        linear = block.linear(role)
        there = weights[role].to(linear.weight.device)  # first, so that the device converts
        linear.weight = nn.Parameter(there.to(torch.float32, copy=True))
        step = float(there.float().abs().mean()) / 8  # without a grid: about a step of 4 bits
        if role in quantized:
            assert spec is not None
            grid = quantized[role]
            device = linear.weight.device
            quantizer = WeightQuantizer(spec, grid.scale.to(device), grid.zero_point.to(device))
            linear.weight_quantizer = quantizer
            step = float(grid.scale.mean())
            found.append(Trainable(f"{role}.scale", quantizer.scale, False, step))
            if not spec.symmetric:
                assert isinstance(quantizer.zero_point, nn.Parameter)
                found.append(Trainable(f"{role}.zero_point", quantizer.zero_point, False, 1.0))
        found.append(Trainable(f"{role}.weight", linear.weight, True, step))
    for role in (block.family.norm1, block.family.norm2):
        norm: Any = block.layer.get_submodule(role)
        norm.weight = gain = nn.Parameter(norm.weight.detach().clone())
        found.append(Trainable(f"{role}.weight", gain, True, float(gain.detach().abs().mean()) / 8))
    for name, site in block.sites.items():
        quantizer_ = site.quantizer
        if quantizer_ is None:
            continue
        names = ("clip_ratio",) if quantizer_.spec.mode == "dynamic" else ("scale", "zero_point")
        for each in names:
            if each == "zero_point" and quantizer_.spec.symmetric:
                continue
            value: Tensor = getattr(quantizer_, each)
            delattr(quantizer_, each)
            parameter = nn.Parameter(value.detach().float().clone())
            setattr(quantizer_, each, parameter)
            step = 1.0 if each == "zero_point" else float(parameter.detach().abs().mean())
            found.append(Trainable(f"sites.{name}.{each}", parameter, False, step))
    return found


def trained_sites(block: Block) -> dict[str, dict[str, Tensor]]:
    """Return the parameters of the block's sites as they are stored: scales positive, zero points whole."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, site in block.sites.items():
        if site.quantizer is None:
            continue
        stored = {key: value.detach().float().cpu().clone() for key, value in site.quantizer.state_dict().items()}
        if "scale" in stored:
            top = 2**site.quantizer.spec.bits - 1
            stored["scale"] = stored["scale"].clamp_min(MIN_SCALE)
            if not site.quantizer.spec.symmetric:
                stored["zero_point"] = stored["zero_point"].round().clamp(0, top)
        found[name] = stored
    return found


def trained_weights(block: Block, spec: WeightSpec | None) -> dict[str, QuantizedWeight]:
    """Return the trained weights rounded to nearest on their trained grids, by linear; empty if `spec` is None."""
    if spec is None:
        return {}
    found = {}
    for role in block.family.linears:
        linear = block.linear(role)
        quantizer: WeightQuantizer = linear.weight_quantizer
        found[role] = quantizer.codes(linear.weight.detach())
    return found


def trained_norms(block: Block) -> dict[str, Tensor]:
    """Return the trained gains of the block's two norms by name of the weight."""
    norms: dict[str, Any] = {role: block.layer.get_submodule(role) for role in (block.family.norm1, block.family.norm2)}
    return {f"{role}.weight": norm.weight.detach().cpu() for role, norm in norms.items()}
