"""The model that a profile promises, computed by the project's own blocks, one in memory at a time.

Letters: N sequences, T tokens, P prefix tokens, D hidden, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.tasks.errors import NumericalError
from prefixquant.tasks.export import ENDS_FILE, PREFIX_FILE, block_file, read_shard
from prefixquant.tasks.model.block import Block, block_prefix, block_shapes, load_sites, run_batched
from prefixquant.tasks.model.saved import Sites, block_weights
from prefixquant.tasks.model.sites import ALL_SITES, DOWN_INPUT, KEYS, VALUES
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.profiles.codes import static_scale
from prefixquant.tasks.profiles.folder import ExportedModel
from prefixquant.tasks.profiles.profile import Profile

BATCH_TOKENS = 8192
"""Tokens of one forward through a block."""


class Simulation:
    """An exported model under a profile, its prefix as keys and values or as ordinary tokens."""

    def __init__(self, model: ExportedModel, profile: Profile, device: torch.device, *, dtype: torch.dtype) -> None:
        """`dtype`: in which blocks run; the folder's own is `model.dtype`."""
        self.model, self.profile, self.device, self.dtype = model, profile, device, dtype
        ends = read_shard(model.folder / ENDS_FILE)
        family = model.family
        names = (family.embedding, family.final_norm, family.head)
        self.embedding, self.gain, self.head = (ends[f"{name}.weight"].to(dtype) for name in names)

    def blocks(self, *, quantize_inputs: bool = True) -> Iterator[Block]:
        """Yield the blocks in order; with inputs left in full precision if so asked."""
        quantize = self.profile.adapted(self.model.quantize)
        if not quantize_inputs:
            quantize = replace(quantize, activations=None)
        for index in range(self.model.num_blocks):
            yield self._block(index, quantize)

    def _block(self, index: int, quantize: QuantizeConfig) -> Block:
        model = self.model
        stored = read_shard(model.folder / block_file(index))
        shapes = block_shapes(model.config, index)
        weights, sites = block_weights(stored, shapes, model.family, index, model.quantize.weights, self.dtype)
        block = Block(
            model.config,
            model.family,
            index,
            weights,
            transforms=self.profile.transforms(model.transforms),
            quantize=quantize,
            device=self.device,
        )
        load_sites(block.sites, self._sites(sites, quantize), self.device)
        return block

    def _sites(self, stored: Sites, quantize: QuantizeConfig) -> Sites:
        """Return the parameters of the profile's sites; a dynamic one that the folder does not have clips nothing."""
        activations, before = quantize.activations, self.model.quantize.activations
        found = dict(stored)
        for site in set(ALL_SITES) - {KEYS, VALUES}:
            if activations is not None and activations.mode == "static":
                scale = static_scale(stored[site]["scale"], before, activations)
                found[site] = {"scale": scale, "zero_point": torch.zeros_like(scale)}
            else:
                found[site] = {"clip_ratio": torch.ones(())}
        return found

    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of the prefix, [L, KV heads, P, C]; None where it goes as tokens or is empty."""
        if self.profile.prefix == "tokens" or not self.model.prefix_token_ids:
            return None
        stored = read_shard(self.model.folder / PREFIX_FILE)
        return stored["keys"].to(self.dtype), stored["values"].to(self.dtype)

    def with_prefix(self, ids_NT: Tensor) -> Tensor:
        """Return what the model is fed: the ids, behind the prefix' ids [N, P+T] where those are ordinary tokens."""
        if self.profile.prefix == "kv":
            return ids_NT
        first = torch.tensor(self.model.prefix_token_ids, dtype=ids_NT.dtype).expand(len(ids_NT), -1)
        return torch.cat([first, ids_NT], dim=1)

    def hidden(self, ids_NT: Tensor, exempt: Collection[int] = ()) -> Tensor:
        """Return the hidden states [N, T, D] after the last block, those of prefix tokens cut off."""
        return self.hidden_variants(ids_NT, [exempt])[0]

    def hidden_variants(self, ids_NT: Tensor, variants: Sequence[Collection[int]]) -> list[Tensor]:
        """Return `hidden` for each set of blocks whose down_proj sees its input in full precision."""
        fed, prefix = self.with_prefix(ids_NT), self.prefix()
        start = self.embedding[fed]
        streams = [start for _ in variants]
        batch = max(1, BATCH_TOKENS // fed.shape[1])
        for block in self.blocks():
            own = block_prefix(prefix, block.index, self.device)
            for each, exempt in enumerate(variants):
                block.sites[DOWN_INPUT].enabled = block.index not in exempt
                streams[each] = run_batched(
                    lambda x, block=block, own=own: block(x, own),  # type: ignore[misc]
                    streams[each],
                    batch,
                    self.device,
                    f"export {self.profile.name}, block {block.index}",
                )
        return [stream[:, fed.shape[1] - ids_NT.shape[1] :] for stream in streams]

    def logits(self, hidden_NTD: Tensor) -> Tensor:
        """Return the logits [N, T, V] of hidden states."""
        x = hidden_NTD.to(self.device).float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.config.rms_norm_eps)
        gain, head = self.gain.to(self.device), self.head.to(self.device)
        return F.linear(gain * x.to(self.dtype), head)

    def perplexity(self, hidden_NTD: Tensor, ids_NT: Tensor) -> float:
        """Return exp of the mean negative log-likelihood of tokens 2..T of each window."""
        total = torch.zeros((), dtype=torch.float64)
        for hidden_TD, ids_T in zip(hidden_NTD, ids_NT, strict=True):
            logits = self.logits(hidden_TD[:-1]).float()
            total += F.cross_entropy(logits, ids_T[1:].to(self.device), reduction="sum").double().cpu()
        ppl = float((total / (ids_NT.shape[0] * (ids_NT.shape[1] - 1))).clamp_max(700).exp())
        if ppl != ppl:
            raise NumericalError(f"export {self.profile.name}: the logits hold NaN values")
        return ppl
