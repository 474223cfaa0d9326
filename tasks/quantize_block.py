"""Quantize one block: search its scales, round its weights, keep what the runtime needs.

Letters: N sequences, T tokens, D hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefixquant.tasks.calibrate import Ranges
from prefixquant.tasks.errors import NumericalError
from prefixquant.tasks.gptq import GptqConfig, gptq_block
from prefixquant.tasks.model.block import Block, Prefix
from prefixquant.tasks.model.modules import Site
from prefixquant.tasks.model.quantizer import QuantizedWeight, round_to_nearest
from prefixquant.tasks.model.spec import WeightSpec
from prefixquant.tasks.search import (
    SearchConfig,
    block_output,
    input_grams,
    search_site,
    search_weight,
    set_site,
    site_is_searched,
    squared_error,
)


@dataclass(frozen=True, slots=True)
class BlockResult:
    """A quantized block and how it was found."""

    weights: dict[str, QuantizedWeight]
    """By block-relative name of the linear; empty if weights are not quantized."""

    sites: dict[str, dict[str, Tensor]]
    """By site: `scale` and `zero_point`, or `clip_ratio`."""

    error: float
    """Squared error of the block's output over the squared norm of the target."""

    error_before: float
    """The same with the full calibrated ranges, before any search."""

    search: dict[str, Any] = field(default_factory=dict)
    """By site: the ratio found and the grid it came from."""

    error_nearest: float | None = None
    """The error with every weight rounded to nearest, before GPTQ; None without GPTQ."""


class _Quantization:
    """The search of one block as it proceeds."""

    def __init__(
        self,
        block: Block,
        ranges: Ranges,
        weight_spec: WeightSpec | None,
        config: SearchConfig | None,
        loss: Callable[[], Tensor],
        run: Callable[[], Tensor],
    ) -> None:
        self.block, self.ranges, self.spec, self.config = block, ranges, weight_spec, config
        self.loss, self.run = loss, run
        self.originals: dict[str, Tensor] = {role: block.linear(role).weight.data for role in block.family.linears}
        self.weights: dict[str, QuantizedWeight] = {}
        self.quantized_sites = [name for name, site in block.sites.items() if site.quantizer is not None]
        self.log: dict[str, Any] = {}

    def start(self) -> None:
        """Put every site and weight on the grid of its full range."""
        for name in self.quantized_sites:
            set_site(self.block.sites[name], self.ranges[name], 1.0)
        self._round_weights(dict.fromkeys(self.originals, 1.0))

    def _round_weights(self, ratios: Mapping[str, Tensor | float]) -> None:
        if self.spec is None:
            return
        for role, original in self.originals.items():
            self.weights[role] = round_to_nearest(original, self.spec, ratios[role])
            linear = self.block.linear(role)
            linear.weight.data = self.weights[role].dequantize(self.spec).to(original.dtype)

    def search_weights(self) -> None:
        """Search all weight scales on the inputs of the full-precision block."""
        if self.spec is None or self.config is None or not self.config.weights:
            return
        for role, original in self.originals.items():
            self.block.linear(role).weight.data = original
        with self.block.only():
            grams = input_grams(self.block, self.run, self.spec)
        self._round_weights(
            {role: search_weight(self.originals[role], grams[role], self.spec, self.config) for role in self.originals}
        )

    def search_sites(self) -> None:
        """Search the sites in the order data flows, each behind those before it; those after it are still off."""
        for index, name in enumerate(self.quantized_sites):
            if self.config is None or not site_is_searched(name, self.config):
                continue
            site = self.block.sites[name]

            def loss_of(ratio: float, name: str = name, site: Site = site) -> Tensor:
                set_site(site, self.ranges[name], ratio)
                return self.loss()

            with self.block.only(*self.quantized_sites[: index + 1]):
                ratio, grid = search_site(loss_of, self.config)
            set_site(site, self.ranges[name], ratio)
            self.log[name] = {"ratio": ratio, "grid": grid}

    def round_by_gptq(self, config: GptqConfig) -> None:
        """Round the original weights again, on their grids and behind the sites as they are set."""
        assert self.spec is not None
        self.weights = gptq_block(self.block, self.run, self.originals, self.weights, self.spec, config)


def quantize_block(
    block: Block,
    ranges: Ranges,
    stream_NTD: Tensor,
    prefix: Prefix | None,
    weight_spec: WeightSpec | None,
    config: SearchConfig | None,
    *,
    batch_size: int,
    gptq: GptqConfig | None = None,
) -> BlockResult:
    """Return the quantized block; the block is left with its quantized weights and grids in place.

    Args:
        block: with full-precision weights and a quantizer at every site to quantize.
        ranges: calibrated per-channel ranges of its sites.
        stream_NTD: what the full-precision blocks before it put out, on the block's device. It enters both the
            full-precision block, which makes the target, and the quantized one (docs/decisions/search-stream.md).
        prefix: keys and values of the prefix in this block.
        weight_spec: how weights are quantized; None leaves them.
        config: the search; None keeps the full ranges.
        batch_size: sequences a forward.
        gptq: how weights are rounded once all grids are found; None rounds them to nearest.

    Raises:
        NumericalError: the block's output, in full precision or quantized, is NaN or infinite, or GPTQ cannot use the
            inputs of a linear.
    """
    with block.only():
        target = block_output(block, stream_NTD, prefix, batch_size)
    norm = float(target.float().square().sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny))
    if not norm < float("inf"):
        raise NumericalError(f"block {block.index}: its full-precision output holds NaN or infinite values")
    state = _Quantization(
        block,
        {name: (low.to(target.device), high.to(target.device)) for name, (low, high) in ranges.items()},
        weight_spec,
        config,
        loss=lambda: squared_error(block, stream_NTD, target, prefix, batch_size),
        run=lambda: block_output(block, stream_NTD, prefix, batch_size),
    )
    state.start()
    with block.only(*state.quantized_sites):
        error_before = float(state.loss()) / norm
    state.search_weights()
    state.search_sites()
    error_nearest = None
    if gptq is not None and weight_spec is not None:
        with block.only(*state.quantized_sites):
            error_nearest = float(state.loss()) / norm
        state.round_by_gptq(gptq)
    with block.only(*state.quantized_sites):
        error = float(state.loss()) / norm
    if not error < float("inf"):
        raise NumericalError(f"block {block.index}: its quantized output holds NaN or infinite values")
    sites = {
        name: {key: value.detach().cpu() for key, value in block.sites[name].quantizer.state_dict().items()}  # type: ignore[union-attr]
        for name in state.quantized_sites
    }
    return BlockResult(state.weights, sites, error, error_before, state.log, error_nearest)
