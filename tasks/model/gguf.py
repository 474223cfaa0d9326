"""Read a GGUF file tensor by tensor under Hugging Face names."""

from functools import cached_property
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from prefixquant.tasks.errors import CheckpointError
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

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, OSError) as err:
            raise CheckpointError(f"{path} is truncated or no GGUF file ({err}); download it again") from err
        self._by_name = {}
        self.tensors = {}
        for tensor in self._reader.tensors:
            name = self._hugging_face_name(tensor.name)
            if name is not None:
                self._by_name[name] = tensor
                shape = tuple(int(size) for size in reversed(tensor.shape))
                self.tensors[name] = TensorInfo(shape=shape, dtype=GGMLQuantizationType(tensor.tensor_type).name)

    @cached_property
    def _family(self) -> ModelFamily:
        field = self._reader.get_field("general.architecture")
        return find_family(field.contents() if field is not None else "unknown")

    def _hugging_face_name(self, name: str) -> str | None:
        stem, suffix = name.rsplit(".", 1)
        if stem in _TOP:
            return f"{getattr(self._family, _TOP[stem])}.{suffix}"
        if not stem.startswith("blk."):
            return None  # rope_freqs and the like: part of the config
        _, block, part = stem.split(".", 2)
        inner = _QK_NORMS.get(part) or getattr(self._family, _BLOCK.get(part, ""), None)
        if inner is None:
            raise CheckpointError(f"{self.path}: tensor {name} has no place in a {self._family.model_type} block")
        return f"{self._family.block_prefix(int(block))}{inner}.{suffix}"

    def config(self) -> PretrainedConfig:
        """Return the config transformers derives from the file's metadata."""
        config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        config.tie_word_embeddings = not self.has_head(self._family)
        config.architectures = [self._family.architecture]
        return config

    def read(self, name: str) -> Tensor:
        """Return one tensor, float32."""
        stored = self._by_name[name]
        values = torch.tensor(dequantize(stored.data, stored.tensor_type), dtype=torch.float32)
        values = values.reshape(self.tensors[name].shape)
        inner = name.split(".", 3)[-1].rsplit(".", 1)[0]
        if self._family.gguf_rotary_pairs and inner in (self._family.q, self._family.k):
            return self._uninterleave(values, inner == self._family.q)
        return values

    def _uninterleave(self, rows: Tensor, is_query: bool) -> Tensor:
        """GGUF keeps the two members of a rotary pair side by side; Hugging Face keeps them half a head apart."""
        field = "head_count" if is_query else "head_count_kv"
        heads = int(self._reader.get_field(f"{self._family.model_type}.attention.{field}").contents())
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()

    def files(self) -> list[Path]:
        """Return the file itself."""
        return [self.path]
