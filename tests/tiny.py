"""Tiny random models of every family, built in milliseconds, and the pipeline's block chain over them.

Weights, gains and biases are random and far from their initial values, so that a gain folded twice, a forgotten bias or
a lost rotation shows in the logits. Sizes are no powers of two where a Hadamard matrix allows it.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from prefixquant.tasks.model.block import Block, Prefix
from prefixquant.tasks.model.families import FAMILIES, ModelFamily
from prefixquant.tasks.model.sites import OnlineTransforms, head_size
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.random_checkpoint import byte_tokenizer
from prefixquant.tasks.rotate import Ends, RotateConfig, rotate_block, rotate_ends

CPU = torch.device("cpu")
BOS, EOS = 0, 1
VOCABULARY = 258
"""BOS, EOS and the 256 bytes."""

NO_ROTATION = RotateConfig(r1=None, r2=None, r3=False, r4=False)

VARIANTS = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-all-heads": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
}
"""Readable id -> model_type and what its config says beyond the defaults of `tiny_config`."""


def tiny_config(model_type: str, *, blocks: int = 2, **settings: object) -> PretrainedConfig:
    """Return a config of hidden size 48, 4 query and 2 KV heads of 16 channels, 96 intermediate channels."""
    sizes: dict[str, object] = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-3,  # far from any default: a lost eps shows
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(model_type, **(sizes | settings))
    config.architectures = [FAMILIES[model_type].architecture]
    return config


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a float32 model whose matrices, gains and biases are all random."""
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.5, generator=generator)
        elif parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model


def tiny_variant(name: str, *, blocks: int = 2, seed: int = 0, **more: object) -> PreTrainedModel:
    """Return the model of one of `VARIANTS`; `more` goes into its config."""
    model_type, settings = VARIANTS[name]
    return tiny_model(tiny_config(model_type, blocks=blocks, **settings, **more), seed)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes (id 2 and on) that puts BOS in front, as Llama's does."""
    return byte_tokenizer()


def write_tiny_model(
    folder: Path,
    model_type: str = "llama",
    *,
    blocks: int = 4,
    seed: int = 0,
    sharded: bool = False,
    **settings: object,
) -> PreTrainedModel:
    """Write a tiny model and its tokenizer as a Hugging Face folder and return the model."""
    model = tiny_model(tiny_config(model_type, blocks=blocks, **settings), seed)
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    tiny_tokenizer().save_pretrained(folder)
    return model


def edit_config(folder: Path, **settings: object) -> None:
    """Overwrite keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def family_of(model: PreTrainedModel) -> ModelFamily:
    """Return the family of a model."""
    return FAMILIES[model.config.model_type]


def random_ids(count: int, length: int, seed: int = 0) -> Tensor:
    """Return token ids [count, length], BOS and EOS aside."""
    return torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def block_weights(model: PreTrainedModel, block: int) -> dict[str, Tensor]:
    """Return copies of a block's tensors by block-relative name."""
    prefix = family_of(model).block_prefix(block)
    state = model.state_dict()
    return {name.removeprefix(prefix): value.clone() for name, value in state.items() if name.startswith(prefix)}


def build_blocks(
    model: PreTrainedModel, rotate: RotateConfig | None = None, quantize: QuantizeConfig | None = None
) -> list[Block]:
    """Return the model's blocks, rotated, or with their weights as they are if `rotate` is None."""
    family = family_of(model)
    online = rotate or NO_ROTATION
    blocks = []
    for index in range(model.config.num_hidden_layers):
        weights = block_weights(model, index)
        if rotate is not None:
            weights = rotate_block(
                weights, family, head_size(model.config), index, rotate, dtype=torch.float32, device=CPU
            )
        transforms = OnlineTransforms(r3=online.r3, r4=online.r4, r4_block=online.r4_block)
        blocks.append(Block(model.config, family, index, weights, transforms=transforms, quantize=quantize, device=CPU))
    return blocks


def build_ends(model: PreTrainedModel, rotate: RotateConfig | None = None) -> Ends:
    """Return embedding, final gain and head around those blocks."""
    ends = Ends(
        embedding=model.get_input_embeddings().weight.data,
        gain=model.model.norm.weight.data,
        head=model.get_output_embeddings().weight.data,
    )
    return ends if rotate is None else rotate_ends(ends, rotate, dtype=torch.float32, device=CPU)


def chain_hidden(
    model: PreTrainedModel, ids_NT: Tensor, rotate: RotateConfig | None = None, prefix: list[Prefix] | None = None
) -> Tensor:
    """Return the hidden states after the last block."""
    hidden = build_ends(model, rotate).embedding[ids_NT]
    for block in build_blocks(model, rotate):
        hidden = block(hidden, None if prefix is None else prefix[block.index])
    return hidden


def chain_logits(
    model: PreTrainedModel, ids_NT: Tensor, rotate: RotateConfig | None = None, prefix: list[Prefix] | None = None
) -> Tensor:
    """Return the logits of embedding, blocks and head, each taken through the project's own code."""
    ends = build_ends(model, rotate)
    hidden = chain_hidden(model, ids_NT, rotate, prefix)
    mean_square = hidden.square().mean(-1, keepdim=True)
    return hidden * torch.rsqrt(mean_square + model.config.rms_norm_eps) * ends.gain @ ends.head.T


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """Return the largest difference over the largest magnitude wanted."""
    return float((actual - wanted).abs().max() / wanted.abs().max())
