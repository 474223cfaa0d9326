"""A checkpoint with random weights of any shape, made block by block: to rehearse a run on a model not at hand."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.load import LoadedModel
from prefixquant.tasks.model.block import block_shapes
from prefixquant.tasks.model.checkpoint import INDEX_FILE
from prefixquant.tasks.model.families import FAMILIES
from prefixquant.tasks.model.shapes import SHAPES as MODEL_SHAPES
from prefixquant.tasks.model.shapes import ModelShape

BOS, EOS = 0, 1
MIN_VOCABULARY = 258
"""BOS, EOS and the 256 bytes."""


SHAPES = {"tiny": ModelShape(48, 96, 4, 2, 2, MIN_VOCABULARY), **MODEL_SHAPES}
"""Models whose checkpoints can be made up: those of `model/shapes.py`, and one that takes no time."""


def shape_model(name: str) -> LoadedModel:
    """Return what is known of the model of a shape without its files: enough to plan with. No tokenizer."""
    shape = SHAPES[name]
    dtype = torch.float32 if name == "tiny" else torch.bfloat16
    return LoadedModel(
        config=shape_config(shape, blocks=shape.blocks, vocabulary=shape.vocabulary, dtype=dtype),
        family=FAMILIES["llama"],
        dtype=str(dtype).removeprefix("torch."),
        bos_token_id=BOS,
        files={},
        index=None,
    )


def shape_config(shape: ModelShape, *, blocks: int, vocabulary: int, dtype: torch.dtype) -> LlamaConfig:
    """Return the config of a Llama of this shape with so many blocks and tokens."""
    config = replace(shape, vocabulary=vocabulary).config(blocks)
    config.dtype = dtype
    config.architectures = [FAMILIES["llama"].architecture]
    return config


def write_random_checkpoint(
    folder: Path,
    shape: ModelShape,
    *,
    blocks: int,
    vocabulary: int = MIN_VOCABULARY,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device,
    seed: int = 0,
) -> int:
    """Write a Hugging Face folder, a shard a block and one for the ends, and return its bytes.

    Matrices are normal with variance 1 / inputs, gains ones; the tokenizer is one of bytes. No more than one shard is
    held; `device` draws the numbers.

    Raises:
        ConfigError: no block, or a vocabulary smaller than the tokenizer's.
    """
    if blocks < 1 or vocabulary < MIN_VOCABULARY:
        raise ConfigError(
            f"a random checkpoint needs at least 1 block and {MIN_VOCABULARY} tokens, got {blocks} and {vocabulary}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = shape_config(shape, blocks=blocks, vocabulary=vocabulary, dtype=dtype)
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    family = FAMILIES["llama"]
    generator = torch.Generator(device).manual_seed(seed)

    def random(size: torch.Size) -> Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=dtype)
        matrix = torch.empty(size, dtype=dtype, device=device)
        return matrix.normal_(std=size[-1] ** -0.5, generator=generator).cpu()

    shards = [
        {f"{family.block_prefix(block)}{name}": size for name, size in block_shapes(config, block).items()}
        for block in range(blocks)
    ]
    ends = torch.Size((vocabulary, shape.hidden))
    shards.append(
        {
            f"{family.embedding}.weight": ends,
            f"{family.head}.weight": ends,
            f"{family.final_norm}.weight": torch.Size((shape.hidden,)),
        }
    )
    weight_map: dict[str, str] = {}
    total = 0
    for index, sizes in enumerate(shards, start=1):
        name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = {each: random(size) for each, size in sizes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index_file, indent=1))
    return total


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes (ids 2 and on) that puts BOS in front, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BOS, "</s>": EOS} | {letter: index for index, letter in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
