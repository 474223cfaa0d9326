"""Sizes of well-known models of the Llama family, for work on random weights of their shape."""

from dataclasses import dataclass

from transformers import LlamaConfig


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a Llama model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int
    rope_theta: float = 10_000.0

    def config(self, blocks: int | None = None) -> LlamaConfig:
        """Return it as a config of transformers, perhaps with another number of blocks."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=blocks or self.blocks,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            bos_token_id=0,
            eos_token_id=1,
        )


SHAPES = {
    "smollm2-135m": ModelShape(576, 1536, 9, 3, 30, 49152, 100_000.0),
    "llama-2-7b": ModelShape(4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": ModelShape(4096, 14336, 32, 8, 32, 128256, 500_000.0),
    "llama-3-70b": ModelShape(8192, 28672, 64, 8, 80, 128256, 500_000.0),
}
