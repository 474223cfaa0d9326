"""Train consecutive blocks: each sees what the quantized blocks before it put out and aims at what the full-precision
ones do (PrefixQuant, arXiv:2410.05265, section 5).

Letters: N sequences, T tokens, D hidden, L blocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.gptq import GptqConfig
from prefixquant.tasks.losses import LOSSES, LogitLoss
from prefixquant.tasks.model.block import Block, block_prefix, block_shapes, load_sites
from prefixquant.tasks.model.families import ModelFamily
from prefixquant.tasks.model.saved import block_tensors, block_weights, saved_weights
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.model.trainable import make_trainable, trained_norms, trained_sites, trained_weights
from prefixquant.tasks.parallel import Ranks
from prefixquant.tasks.rotate import Ends
from prefixquant.tasks.round_trained import round_trained
from prefixquant.tasks.streams import Stream, advance, choose_place
from prefixquant.tasks.train_block import BlockData, BlockLoss, Checkpoints, Epoch, mean_loss, train_block
from prefixquant.tasks.train_config import TrainConfig

FORWARD_TOKENS = 8192
"""Tokens of one forward that passes a stream on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """The model as the chain sees it."""

    config: PretrainedConfig
    family: ModelFamily
    transforms: OnlineTransforms
    quantize: QuantizeConfig
    dtype: torch.dtype
    """Of the weights, and of the streams between blocks."""

    prefix: tuple[Tensor, Tensor] | None
    """Keys and values of the prefix [L, KV heads, P, head_dim]."""

    device: torch.device

    def full_precision(self, block: int, weights: Mapping[str, Tensor]) -> Block:
        """Return a block as it is, without quantizers."""
        return self._build(block, weights, None)

    def quantized(self, block: int, tensors: Mapping[str, Tensor]) -> Block:
        """Return a stored block as the runtime would run it."""
        shapes = block_shapes(self.config, block)
        spec = self.quantize.weights
        weights, sites = block_weights(tensors, shapes, self.family, block, spec, self.dtype, self.device)
        built = self._build(block, weights, self.quantize)
        load_sites(built.sites, sites, self.device)
        return built

    def _build(self, block: int, weights: Mapping[str, Tensor], quantize: QuantizeConfig | None) -> Block:
        return Block(
            self.config,
            self.family,
            block,
            weights,
            transforms=self.transforms,
            quantize=quantize,
            device=self.device,
        )


class BlockStore(Protocol):
    """Where blocks come from and go to."""

    def rotated(self, block: int) -> Mapping[str, Tensor]:
        """Return a full-precision block's weights by block-relative name."""

    def searched(self, block: int) -> Mapping[str, Tensor]:
        """Return the stored tensors of the block from which training starts."""

    def finished(self, block: int) -> Mapping[str, Tensor] | None:
        """Return the stored tensors of a block that an earlier run has trained, or None."""

    def publish(self, block: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a trained block."""

    def checkpoints(self, block: int) -> Checkpoints | None:
        """Return where the state of a block goes while it is trained."""


def rank_share(windows_NT: Tensor, batch_size: int, ranks: Ranks) -> Tensor:
    """Return the windows that this rank trains on: of every batch its consecutive part.

    Raises:
        ConfigError: the ranks cannot share a batch equally.
    """
    if batch_size % ranks.size:
        raise ConfigError(f"train.batch_size {batch_size} cannot be shared by {ranks.size} ranks; make it a multiple")
    parts = windows_NT.unflatten(0, (-1, ranks.size, batch_size // ranks.size))
    return parts[:, ranks.rank].flatten(0, 1)


def train_chain(
    chain: Chain,
    store: BlockStore,
    first: int,
    stop: int,
    ends: Ends,
    train_NT: Tensor,
    validation_NT: Tensor | None,
    config: TrainConfig,
    ranks: Ranks,
    *,
    seed: int,
    gptq: GptqConfig | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_divergence: Callable[[int, str], None] = lambda block, where: None,
) -> list[dict[str, Any]]:
    """Train the blocks first..stop-1 one after the other and return their records.

    The stream that enters the first of them is the full-precision one. Blocks that are finished are not trained again:
    the stream passes through them.

    Args:
        chain: the model.
        store: where blocks come from and go to; each is published as soon as it is trained.
        first: block from which training starts; those before it only pass the full-precision stream on.
        stop: block before which it ends.
        ends: embedding, final gain and head in `chain.dtype`.
        train_NT: token ids of the training windows, of all ranks.
        validation_NT: likewise for validation; None: there are none.
        config: how to train.
        ranks: the processes that train together.
        seed: of the order of the batches.
        gptq: whether training starts from the weights that GPTQ has rounded in the search, or its result is rounded by
            GPTQ; None: it starts from the original weights and rounds to nearest.
        on_epoch: called after every epoch of a block.
        on_divergence: called with block and place when a block's training has diverged and begins anew.

    Raises:
        ConfigError: the ranks cannot share a batch equally.
        NumericalError: a block's output is not finite, or its training diverges twice.
    """
    num_blocks = chain.config.num_hidden_layers
    windows = [rank_share(part, config.batch_size, ranks) for part in (train_NT, validation_NT) if part is not None]
    forward_tokens = FORWARD_TOKENS // ranks.parts
    streams = _Streams(torch.cat(windows), len(windows[0]), ends.embedding, config, chain.device, forward_tokens)
    records = []
    originals: dict[int, Callable[[Tensor], Tensor]] = {}  # the full-precision blocks at hand
    ahead = 0  # block that the full-precision stream enters next
    for index in range(stop):
        prefix = block_prefix(chain.prefix, index, chain.device)
        if index == first:
            streams.quantized_starts()
        last = index if index < first else min(index + config.lookahead, num_blocks - 1)
        while ahead <= last:
            weights = store.rotated(ahead)
            own = block_prefix(chain.prefix, ahead, chain.device)
            originals[ahead] = partial(chain.full_precision(ahead, weights), prefix=own)
            streams.advance_full(originals[ahead], ahead)
            ahead += 1
        original = originals.pop(index)
        if index < first:
            continue
        done = store.finished(index)
        if done is None:
            following = [_following(originals[each], chain, config) for each in range(index + 1, last + 1)]
            loss = LOSSES[config.loss]
            if index + config.lookahead >= num_blocks:
                loss = LogitLoss(ends, chain.config.rms_norm_eps, chain.device)
            if config.target != "fp_input":
                streams.make_second_target([original, *(originals[each] for each in range(index + 1, last + 1))], index)
            done, record = _train_one(
                chain, store, index, streams, config, ranks, seed, loss, following, on_epoch, on_divergence, gptq
            )
            if ranks.rank == 0:
                store.publish(index, done, record)
            records.append(record)
        if index + 1 < stop:
            streams.advance_quantized(partial(chain.quantized(index, done), prefix=prefix), index)
    return records


def _following(original: Callable[[Tensor], Tensor], chain: Chain, config: TrainConfig) -> Callable[[Tensor], Tensor]:
    """Return a full-precision block that takes the float32 output of the trained one; under autocast they all do."""
    if config.precision != "fp32" or chain.dtype == torch.float32:
        return original
    return lambda hidden_BTD: original(hidden_BTD.to(chain.dtype))


def _train_one(
    chain: Chain,
    store: BlockStore,
    index: int,
    streams: "_Streams",
    config: TrainConfig,
    ranks: Ranks,
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    following: list[Callable[[Tensor], Tensor]],
    on_epoch: Callable[[Epoch], None],
    on_divergence: Callable[[int, str], None],
    gptq: GptqConfig | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if chain.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(chain.device)
    weights, searched = store.rotated(index), store.searched(index)
    shapes = block_shapes(chain.config, index)
    spec = chain.quantize.weights
    prefix = block_prefix(chain.prefix, index, chain.device)
    block = chain.quantized(index, searched)
    start = saved_weights(searched, shapes, chain.family, index, spec, chain.device)
    originals = {role: weights[f"{role}.weight"] for role in chain.family.linears}
    if spec is not None and gptq is not None and gptq.training == "start":
        originals = {role: weight.dequantize(spec) for role, weight in start.items()}
    trainables = make_trainable(block, originals, start, spec)
    del start  # its codes would lie on the device beside the training
    result = train_block(
        block,
        trainables,
        streams.train,
        streams.validation,
        prefix,
        config,
        ranks,
        seed=seed + index,
        loss=loss,
        following=following,
        on_epoch=on_epoch,
        on_divergence=on_divergence,
        checkpoints=store.checkpoints(index),
    )
    record = result.record()
    plain = dict(weights) | {name: gain.to(chain.dtype) for name, gain in trained_norms(block).items()}
    if spec is None:
        plain |= {f"{role}.weight": block.linear(role).weight.detach().to(chain.dtype).cpu() for role in originals}
    rounded, sites = trained_weights(block, spec), trained_sites(block)
    tensors = block_tensors(plain, rounded, sites, chain.family, index, spec)
    if spec is not None and gptq is not None and gptq.training == "end":
        runtime = chain.quantized(index, tensors)
        trained = {role: block.linear(role).weight.detach() for role in originals}
        sizes = {"batch_size": config.batch_size, "forward_size": streams.batch}
        rounded = round_trained(runtime, streams.train.inputs, prefix, trained, rounded, spec, gptq, ranks, **sizes)
        tensors = block_tensors(plain, rounded, sites, chain.family, index, spec)
        module = BlockLoss(runtime.float(), prefix, loss, following)
        record["loss_gptq"] = mean_loss(module, streams.validation or streams.train, config, ranks)
    return tensors, {**record, "tensors": sorted(tensors)}


class _Streams:
    """The full-precision stream, the quantized one and, if the target wants it, the full-precision block's output for
    the quantized one; training sequences first, then the validation ones."""

    def __init__(
        self,
        windows_NT: Tensor,
        num_train: int,
        embedding: Tensor,
        config: TrainConfig,
        device: torch.device,
        forward_tokens: int,
    ) -> None:
        self.num_train, self.target = num_train, config.target
        shape = (*windows_NT.shape, embedding.shape[1])
        count = 2 if config.target == "fp_input" else 3
        total = count * torch.Size(shape).numel() * embedding.element_size()
        place = choose_place(total, device, offload_to_disk=config.offload_to_disk)
        self._streams = [Stream.empty(shape, embedding.dtype, place, device) for _ in range(count)]
        self.batch = max(1, forward_tokens // windows_NT.shape[1])
        full = self._streams[0].data
        for start in range(0, len(windows_NT), self.batch):
            full[start : start + self.batch] = embedding[windows_NT[start : start + self.batch]].to(full.device)

    def quantized_starts(self) -> None:
        """Let the quantized stream begin as the full-precision one."""
        self._streams[1].data.copy_(self._streams[0].data)

    def advance_full(self, function: Callable[[Tensor], Tensor], block: int) -> None:
        """Pass the full-precision stream through a block."""
        advance(function, self._streams[0], self._streams[0], self.batch, f"full-precision stream, block {block}")

    def advance_quantized(self, function: Callable[[Tensor], Tensor], block: int) -> None:
        """Pass the quantized stream through a block."""
        advance(function, self._streams[1], self._streams[1], self.batch, f"quantized stream, block {block}")

    def make_second_target(self, functions: list[Callable[[Tensor], Tensor]], block: int) -> None:
        """Pass the quantized stream through full-precision blocks."""
        source = self._streams[1]
        for function in functions:
            advance(function, source, self._streams[2], self.batch, f"target, block {block}")
            source = self._streams[2]

    @property
    def train(self) -> BlockData:
        """The training sequences of the present block and the targets that lie ahead of it."""
        return self._data(slice(0, self.num_train))

    @property
    def validation(self) -> BlockData | None:
        """The validation sequences, if there are any."""
        data = self._data(slice(self.num_train, None))
        return data if len(data.inputs) else None

    def _data(self, part: slice) -> BlockData:
        full, quantized, *rest = (Stream(stream.data[part], stream.device) for stream in self._streams)
        targets = {"fp_input": (full,), "quant_input": tuple(rest), "both": (full, *rest)}[self.target]
        return BlockData(quantized, targets)
