"""The prefix as a PEFT prefix-tuning adapter, whose embedding is the prefix' keys and values.

Letters: L blocks, H KV heads, P prefix tokens, C channels of a head.
"""

import json
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PretrainedConfig

from prefixquant.tasks.model.sites import head_size

FOLDER = "prefix-adapter"


def adapter_files(keys_LHPC: Tensor, values_LHPC: Tensor, config: PretrainedConfig) -> dict[str, bytes]:
    """Return the files of an adapter folder that `peft.PeftModel.from_pretrained` loads.

    Row p of its embedding holds for each block the keys, then the values of prefix token p, head by head; keys are as
    the cache holds them, behind the rotary embedding.
    """
    blocks, heads, tokens, channels = keys_LHPC.shape
    stacked = torch.stack([keys_LHPC, values_LHPC], dim=1)  # [L, 2, H, P, C]
    embedding = stacked.permute(3, 0, 1, 2, 4).reshape(tokens, blocks * 2 * heads * channels).contiguous()
    settings: dict[str, Any] = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "prefix_projection": False,
        "num_virtual_tokens": tokens,
        "num_layers": blocks,
        "num_attention_heads": heads,
        "token_dim": heads * head_size(config),
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * head_size(config),
    }
    return {
        "adapter_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        "adapter_model.safetensors": save({"prompt_embeddings": embedding}, metadata={"format": "pt"}),
    }
