"""Read a GGUF file tensor by tensor under Hugging Face names."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf.quants import quant_shape_to_byte_shape
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from prefixquant.tasks.errors import CheckpointError, UnsupportedModelError
from prefixquant.tasks.model.checkpoint import Checkpoint, TensorInfo
from prefixquant.tasks.model.families import ModelFamily, find_family

_TOP = {"token_embd": "embedding", "output_norm": "final_norm", "output": "head"}
_BLOCK = {
    "attn_norm": "norm1",
    "ffn_norm": "norm2",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


class GGUFCheckpoint(Checkpoint):
    """A GGUF file; quantized tensors are dequantized to float32 when read."""

    default_dtype = torch.float32

    def __init__(self, path: Path, index: dict[str, Any] | None = None) -> None:
        """Open a file; with the `index` of an earlier opening its header, seconds of work, is not parsed again."""
        self.path = path
        self._index = self.index = _read_index(path) if index is None else index
        self._family = find_family(self._index["model_type"])
        self.tensors = {
            name: TensorInfo(shape=tuple(entry["shape"]), dtype=entry["type"])
            for name, entry in self._index["tensors"].items()
        }

    def config(self) -> PretrainedConfig:
        """Return the config transformers derives from the file's metadata."""
        config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name, trust_remote_code=False)
        config.tie_word_embeddings = not self.has_head(self._family)
        config.architectures = [self._family.architecture]
        return config

    def read(self, name: str) -> Tensor:
        """Return one tensor, float32."""
        entry = self._index["tensors"][name]
        kind = GGMLQuantizationType[entry["type"]]
        shape = quant_shape_to_byte_shape(tuple(entry["shape"]), kind)
        try:
            data = np.memmap(self.path, np.uint8, "r", entry["offset"], shape)
        except (ValueError, OSError) as err:
            raise CheckpointError(f"{self.path}: cannot read {name} ({err}); download it again") from err
        values = torch.tensor(dequantize(data, kind), dtype=torch.float32).reshape(entry["shape"])
        inner = name.split(".", 3)[-1].rsplit(".", 1)[0]
        if self._family.gguf_rotary_pairs and inner in (self._family.q, self._family.k):
            return _uninterleave(values, self._index["heads" if inner == self._family.q else "kv_heads"])
        return values


def _read_index(path: Path) -> dict[str, Any]:
    """Return what reading tensors takes, as JSON values: family, head counts, each tensor's type, shape and offset."""
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as err:
        raise CheckpointError(f"{path} is truncated or no GGUF file ({err}); download it again") from err
    model_type = _field(reader, "general.architecture", "unknown")
    family = find_family(model_type)
    scaling = _field(reader, f"{model_type}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors):
        raise UnsupportedModelError(
            f"{path}: it scales its rotary frequencies, which transformers does not read from GGUF files; "
            f"use the model's Hugging Face folder"
        )
    tensors = {}
    for tensor in reader.tensors:
        name = _hugging_face_name(path, family, tensor.name)
        if name is not None:
            tensors[name] = {
                "type": GGMLQuantizationType(tensor.tensor_type).name,
                "shape": [int(size) for size in reversed(tensor.shape)],
                "offset": int(tensor.data_offset),
            }
    heads = _field(reader, f"{model_type}.attention.head_count", 0)
    kv_heads = _field(reader, f"{model_type}.attention.head_count_kv", heads)
    return {"model_type": model_type, "heads": int(heads), "kv_heads": int(kv_heads), "tensors": tensors}


def _field(reader: GGUFReader, name: str, default: Any) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _hugging_face_name(path: Path, family: ModelFamily, name: str) -> str | None:
    stem, suffix = name.rsplit(".", 1)
    if stem in _TOP:
        return f"{getattr(family, _TOP[stem])}.{suffix}"
    if not stem.startswith("blk."):
        return None
    _, block, part = stem.split(".", 2)
    inner = _QK_NORMS.get(part) or getattr(family, _BLOCK.get(part, ""), None)
    if inner is None:
        raise CheckpointError(f"{path}: tensor {name} has no place in a {family.model_type} block")
    return f"{family.block_prefix(int(block))}{inner}.{suffix}"


def _uninterleave(rows: Tensor, heads: int) -> Tensor:
    """GGUF keeps the two members of a rotary pair side by side; Hugging Face keeps them half a head apart."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()
