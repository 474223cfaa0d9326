"""Models of well-known shapes with random weights, for measuring speed where no checkpoint is at hand."""

from typing import Any

import torch
from torch import Tensor

from prefixquant.tasks.model.block import block_shapes
from prefixquant.tasks.model.families import find_family
from prefixquant.tasks.model.quantizer import QuantizedWeight
from prefixquant.tasks.model.saved import SITES
from prefixquant.tasks.model.sites import (
    ATTENTION_INPUT,
    DOWN_INPUT,
    KEYS,
    MLP_INPUT,
    O_INPUT,
    VALUES,
    OnlineTransforms,
)
from prefixquant.tasks.model.spec import ActivationSpec, QuantizeConfig

PREFIX_TOKENS = 3


class RandomSource:
    """A W4A4KV4 model, static or with a scale a token, of random codes; activations stay near a deviation of 1."""

    def __init__(self, config: Any, device: torch.device, *, dynamic: bool = False, seed: int = 0) -> None:
        """The tensors are made on `device`, one block at a time."""
        activations = ActivationSpec(mode="dynamic", granularity="token") if dynamic else ActivationSpec()
        self.config, self.quantize = config, QuantizeConfig(activations=activations)
        self.transforms = OnlineTransforms(r3=True, r4=True)
        self.prefix_token_ids = list(range(2, 2 + PREFIX_TOKENS))
        self._device, self._family = device, find_family(config.model_type)
        self._generator = torch.Generator(device).manual_seed(seed)

    def block(self, index: int) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Return a block's integer weights by linear, and all its other tensors by block-relative name."""
        family, shapes = self._family, block_shapes(self.config, 0)
        weights: dict[str, QuantizedWeight] = {}
        for role in family.linears:
            size = shapes[f"{role}.weight"]
            normal = torch.randn(size, generator=self._generator, device=self._device)
            codes = (normal * 2.6).round_().clamp_(-8, 7).to(torch.int16)  # as a 4-bit grid fits a normal weight
            spread = 0.75 + 0.5 * torch.rand(size[0], 1, 1, generator=self._generator, device=self._device)
            scale = spread * size[1] ** -0.5 / 2.6
            weights[role] = QuantizedWeight(codes, scale, torch.zeros_like(scale))
        ones = torch.ones(self.config.hidden_size, device=self._device)
        own = {f"{norm}.weight": ones for norm in (family.norm1, family.norm2)}
        dynamic = self.quantize.activations is not None and self.quantize.activations.mode == "dynamic"
        for site, deviation in ((ATTENTION_INPUT, 1.0), (O_INPUT, 0.1), (MLP_INPUT, 1.0), (DOWN_INPUT, 0.6)):
            value = torch.tensor(0.9 if dynamic else deviation / 2.6, device=self._device)
            own[f"{SITES}.{site}.{'clip_ratio' if dynamic else 'scale'}"] = value
        heads = self.config.num_key_value_heads
        own |= {f"{SITES}.{site}.scale": torch.full((heads,), 1 / 2.6, device=self._device) for site in (KEYS, VALUES)}
        return weights, own

    def ends(self) -> dict[str, Tensor]:
        """Return embedding, final norm and head by name."""
        family, size = self._family, (self.config.vocab_size, self.config.hidden_size)
        embedding, head = (
            torch.randn(size, generator=self._generator, device=self._device, dtype=torch.bfloat16) for _ in range(2)
        )
        gain = torch.ones(size[1], device=self._device)
        return {
            f"{family.embedding}.weight": embedding,
            f"{family.head}.weight": head * size[1] ** -0.5,
            f"{family.final_norm}.weight": gain,
        }

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the prefix [L, H, P, C]."""
        config = self.config
        shape = config.num_hidden_layers, config.num_key_value_heads, PREFIX_TOKENS, config.head_dim
        keys, values = torch.randn(2, *shape, generator=self._generator, device=self._device)
        return keys, values
