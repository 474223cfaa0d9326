"""Uniform integer quantization: ranges to scales, values to codes, codes to values.

A scale multiplies codes: x is near scale * (code - zero_point). Symmetric b-bit codes lie in [-2^(b-1), 2^(b-1)-1] with
zero point 0, asymmetric ones in [0, 2^b-1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefixquant.kernels.fake_quantize import fake_quantize as fake_quantize_range
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, WeightSpec

MIN_SCALE = 1e-8
"""Smallest scale, in units of x; keeps an all-zero range from dividing by zero."""


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and the largest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def scale_from_range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (both float32, the shape of low) covering [low, high].

    Symmetric: scale = 2 max(|low|, |high|) / (2^b - 1). Asymmetric: the range is widened to hold 0.
    """
    if symmetric:
        scale = 2 * torch.maximum(low.abs(), high.abs()) / (2**bits - 1)
        return scale.clamp_min(MIN_SCALE), torch.zeros_like(scale)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(MIN_SCALE)
    return scale, (-low / scale).round()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return the codes of x as float32 integers; scale and zero point broadcast against x."""
    low, high = code_range(bits, symmetric)
    return torch.clamp(torch.round(x / scale) + zero_point, low, high)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Return x rounded to its quantization grid, in `dtype` or else x's; computed in float32, of float64 in float64.

    Gradients reach x, scale and an asymmetric grid's zero point, which is rounded (`kernels/fake_quantize`).
    """
    low, high = code_range(bits, symmetric)
    return fake_quantize_range(x, scale, None if symmetric else zero_point, low, high, dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which a product reads x: its own or, of a float32 x under autocast, the autocast type."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.dtype == torch.float32 and torch.is_autocast_enabled(kind) else x.dtype


class SiteQuantizer(nn.Module):
    """Fake-quantizes one site: activations [..., channels], keys or values [batch, heads, tokens, channels].

    Static: buffers `scale` and `zero_point` hold the calibrated grid. Dynamic: the grid comes from each token's range,
    shrunk by the buffer `clip_ratio`. The buffers' shape follows the granularity (`parameter_shape`).
    """

    scale: Tensor
    zero_point: Tensor
    clip_ratio: Tensor

    def __init__(self, spec: ActivationSpec | KeyValueSpec, channels: int, heads: int | None = None) -> None:
        """Build for `channels` channels; for keys and values, which alone give `heads`, they are a head's."""
        super().__init__()
        if spec.group_size is not None and channels % spec.group_size:
            raise ConfigError(f"group_size {spec.group_size} does not divide the {channels} channels of this site")
        self.spec = spec
        self.channels = channels
        self.heads = heads
        shape = self.parameter_shape()
        if spec.mode == "static":
            self.register_buffer("scale", torch.ones(shape))
            self.register_buffer("zero_point", torch.zeros(shape))
        else:
            self.register_buffer("clip_ratio", torch.ones(shape))

    def parameter_shape(self) -> tuple[int, ...]:
        """Return the shape of `scale` or `clip_ratio`, which broadcasts against the (grouped) tensor."""
        groups = self.channels // self.spec.group_size if self.spec.group_size else 1
        if self.heads is None or self.spec.granularity in ("tensor", "token"):
            return (groups, 1) if self.spec.granularity == "group" else ()
        return (self.heads, 1, groups, 1) if self.spec.granularity == "group" else (self.heads, 1, 1)

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        return code_range(self.spec.bits, self.spec.symmetric)

    def grouped(self, x: Tensor) -> Tensor:
        """Return x with its last axis split into groups, if the granularity is `group`."""
        return x.unflatten(-1, (-1, self.spec.group_size)) if self.spec.group_size else x

    def token_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest value of each token (and head or group) of the grouped tensor, float32."""
        dims = (1, 3) if self.heads is not None and self.spec.granularity == "token" else (-1,)
        return x.amin(dims, keepdim=True).float(), x.amax(dims, keepdim=True).float()

    def channel_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return per-channel ranges ([channels] or [heads, channels]) reduced to `parameter_shape`."""
        shape = self.parameter_shape()
        if self.heads is not None:  # [heads, channels] -> [heads, 1, channels], as one token
            low, high = low.unsqueeze(1), high.unsqueeze(1)
        low, high = self.grouped(low), self.grouped(high)
        if shape == ():
            return low.amin(), high.amax()
        return low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Fix the static grid to a range of shape `parameter_shape`."""
        scale, zero_point = scale_from_range(low.float(), high.float(), self.spec.bits, self.spec.symmetric)
        self.scale = scale.to(self.scale.device)
        self.zero_point = zero_point.to(self.scale.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return x on its quantization grid, same shape, in the type in which a product reads it (`product_dtype`)."""
        y = self.grouped(x)
        if self.spec.mode == "static":
            scale, zero_point = self.scale, self.zero_point
        else:
            low, high = self.token_range(y)
            scale, zero_point = scale_from_range(
                low * self.clip_ratio, high * self.clip_ratio, self.spec.bits, self.spec.symmetric
            )
        spec = self.spec
        return fake_quantize(y, scale, zero_point, spec.bits, spec.symmetric, product_dtype(x)).reshape(x.shape)


def weight_groups(weight: Tensor, spec: WeightSpec) -> Tensor:
    """Return a weight [out, in] viewed as [rows, groups, group_size]: the last axis shares a scale."""
    if spec.granularity == "tensor":
        return weight.reshape(1, 1, -1)
    size = spec.group_size or weight.shape[1]
    if weight.shape[1] % size:
        raise ConfigError(
            f"quantize.weights.group_size {size} does not divide the {weight.shape[1]} inputs of a linear"
        )
    return weight.reshape(weight.shape[0], -1, size)


def weight_scale(weight: Tensor, spec: WeightSpec, ratio: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Return scale and zero point [rows, groups, 1] covering `ratio` of each group's range."""
    groups = weight_groups(weight.float(), spec)
    low, high = groups.amin(-1, keepdim=True) * ratio, groups.amax(-1, keepdim=True) * ratio
    return scale_from_range(low, high, spec.bits, spec.symmetric)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Integer weight of one linear: near scale * (codes - zero_point) over the groups that share a scale."""

    codes: Tensor
    """[O, I] int16, within the bits' range."""

    scale: Tensor
    """[R, G, 1] float32; R = O and G = 1 for one scale an output channel."""

    zero_point: Tensor
    """[R, G, 1] float32, whole numbers; zeros if symmetric."""

    def dequantize(self, spec: WeightSpec, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [O, I] in float32, or in float64, which holds the products of codes and scales exactly."""
        groups = weight_groups(self.codes.to(dtype), spec)
        return ((groups - self.zero_point) * self.scale).reshape(self.codes.shape)


def round_to_nearest(weight_OI: Tensor, spec: WeightSpec, ratio: Tensor | float) -> QuantizedWeight:
    """Return the weight rounded to the nearest codes of a grid over `ratio` ([R, G, 1] or a number) of its range."""
    scale, zero_point = weight_scale(weight_OI, spec, ratio)
    codes = quantize(weight_groups(weight_OI.float(), spec), scale, zero_point, spec.bits, spec.symmetric)
    return QuantizedWeight(codes.reshape(weight_OI.shape).to(torch.int16), scale, zero_point)
