"""Grid search of the scales of one block: weights on their layer's output error, sites on the block's.

Letters: T tokens, I inputs and O outputs of a linear, R rows and G groups that share a scale, N sequences, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.block import Block, Prefix
from prefixquant.tasks.model.modules import Site
from prefixquant.tasks.model.quantizer import fake_quantize, weight_groups, weight_scale
from prefixquant.tasks.model.spec import WeightSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """Which scales are searched and over which grid. What is not searched keeps the full calibrated range.

    A ratio shrinks the calibrated range (static) or the range of each token (dynamic: it is the clipping ratio).
    """

    weights: bool = True
    """Search the weight scales, per output channel or group, on the layer's output error."""

    activations: bool = True
    """Search the activation scales (static) or clipping ratios (dynamic) on the block's output error."""

    keys: bool = True
    """Search the scales or clipping ratios of the keys on the block's output error."""

    values: bool = True
    """Search the scales or clipping ratios of the values on the block's output error."""

    coarse_points: int = 8
    """Points of the first grid, equally spaced over [min_ratio, max_ratio]."""

    fine_points: int = 4
    """Points of the second grid, over one coarse step on both sides of the best coarse point. 0: no second grid."""

    min_ratio: float = 0.25
    """Smallest ratio of the first grid."""

    max_ratio: float = 1.0
    """Largest ratio of the first grid."""

    weight_points: int = 36
    """Ratios tried for a weight scale, equally spaced from 1 down to `weight_min_ratio`."""

    weight_min_ratio: float = 0.3
    """Smallest ratio tried for a weight scale."""

    def __post_init__(self) -> None:
        if self.coarse_points < 2 or self.fine_points < 0 or self.weight_points < 1:
            raise ConfigError(
                f"search needs coarse_points >= 2, fine_points >= 0 and weight_points >= 1, "
                f"got {self.coarse_points}, {self.fine_points} and {self.weight_points}"
            )
        if not 0 < self.min_ratio < self.max_ratio:
            raise ConfigError(f"search needs 0 < min_ratio < max_ratio, got {self.min_ratio} and {self.max_ratio}")
        if not 0 < self.weight_min_ratio <= 1:
            raise ConfigError(f"search.weight_min_ratio must lie in (0, 1], got {self.weight_min_ratio}")


def set_site(site: Site, site_range: tuple[Tensor, Tensor], ratio: float) -> None:
    """Set a site's static grid to `ratio` of its calibrated range, or its dynamic clipping ratio."""
    quantizer = site.quantizer
    assert quantizer is not None
    if quantizer.spec.mode == "dynamic":
        quantizer.clip_ratio.fill_(ratio)
        return
    low, high = quantizer.channel_range(*site_range)
    quantizer.set_range(low * ratio, high * ratio)


def input_grams(
    block: Block, run: Callable[[], object], spec: WeightSpec, roles: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return X^T X of every linear's input while `run` passes the stream through the block.

    Shape [G, I/G, I/G], float32: only the diagonal blocks that weights sharing a scale need. The input is what the
    product sees, transformed and quantized as the sites are set. `roles` names the linears; None: all of them.
    """
    roles = block.family.linears if roles is None else roles
    size = {role: spec.group_size or block.linear(role).in_features for role in roles}
    grams: dict[str, Tensor] = {}

    def accumulate(role: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = module.prepare(inputs[0]).flatten(0, -2).float()  # type: ignore[operator]
            x_GTI = x.unflatten(-1, (-1, size[role])).transpose(0, 1)
            gram = x_GTI.transpose(1, 2) @ x_GTI
            if role in grams:
                grams[role] += gram
            else:
                grams[role] = gram

        return hook

    handles = [block.linear(role).register_forward_pre_hook(accumulate(role)) for role in roles]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return grams


def search_weight(weight_OI: Tensor, gram_GII: Tensor, spec: WeightSpec, config: SearchConfig) -> Tensor:
    """Return the ratio [R, G, 1] of each group's range that least disturbs the layer's output.

    The disturbance of row o is d^T (X^T X) d with d the rounding error of its weights.
    """
    weight = weight_OI.float()
    groups_RGI = weight_groups(weight, spec)
    best: Tensor | None = None
    ratio = torch.ones_like(groups_RGI[..., :1])
    for candidate in torch.linspace(1.0, config.weight_min_ratio, config.weight_points).tolist():
        scale, zero_point = weight_scale(weight, spec, candidate)
        error = groups_RGI - fake_quantize(groups_RGI, scale, zero_point, spec.bits, spec.symmetric)
        d_GOI = error.reshape(weight.shape[0], gram_GII.shape[0], -1).transpose(0, 1)
        loss = ((d_GOI @ gram_GII) * d_GOI).sum(-1).T  # [O, G]
        loss = loss.sum().reshape(1, 1, 1) if spec.granularity == "tensor" else loss.unsqueeze(-1)
        if best is None:
            best = loss
            continue
        better = loss < best
        best = torch.where(better, loss, best)
        ratio = torch.where(better, candidate, ratio)
    return ratio


def search_site(loss_of: Callable[[float], Tensor], config: SearchConfig) -> tuple[float, str]:
    """Return the best ratio and the grid it came from ("coarse" or "fine").

    `loss_of` sets the site to a ratio and returns the loss, a scalar tensor.
    """
    step = (config.max_ratio - config.min_ratio) / (config.coarse_points - 1)
    best, loss = _least(loss_of, [config.min_ratio + step * point for point in range(config.coarse_points)])
    offsets = [2 * (point + 1) / (config.fine_points + 1) - 1 for point in range(config.fine_points)]
    fine = [best + step * offset for offset in offsets if best + step * offset > 0]
    if fine:
        refined, fine_loss = _least(loss_of, fine)
        if fine_loss < loss:
            return refined, "fine"
    return best, "coarse"


def _least(loss_of: Callable[[float], Tensor], ratios: list[float]) -> tuple[float, float]:
    losses = torch.stack([loss_of(ratio) for ratio in ratios])  # one synchronization for the whole grid
    index = int(losses.argmin())
    return ratios[index], float(losses[index])


def block_output(block: Block, stream_NTD: Tensor, prefix: Prefix | None, batch_size: int) -> Tensor:
    """Return the block's output for a stream on the block's device."""
    return torch.cat([block(part, prefix) for part in stream_NTD.split(batch_size)])


def squared_error(
    block: Block, stream_NTD: Tensor, target_NTD: Tensor, prefix: Prefix | None, batch_size: int
) -> Tensor:
    """Return the summed squared difference between the block's output and the target, a float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=target_NTD.device)
    for part, wanted in zip(stream_NTD.split(batch_size), target_NTD.split(batch_size), strict=True):
        total += (block(part, prefix).float() - wanted.float()).square().sum()
    return total


def site_is_searched(name: str, config: SearchConfig | None) -> bool:
    """Return whether the recipe asks to search this site."""
    if config is None:
        return False
    return {"keys": config.keys, "values": config.values}.get(name, config.activations)
