"""Model families as tables of roles: where a family keeps its embedding, norms, linears and head.

Algorithms ask for a role and never test the family. To add one, write its record here; its tiny random model is then
tested by tests/tasks/model/test_families.py.
"""

from dataclasses import dataclass, replace

from prefixquant.tasks.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFamily:
    """Names of the parts of a decoder, relative to the model (first group) or to a block (second group)."""

    architecture: str
    """Class name in config.json's `architectures`."""

    model_type: str
    """`model_type` in config.json."""

    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    attention: str = "self_attn"
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    key_norm: str | None = None
    """Norm of each key head between k_proj and the rotary embedding, if the family has one."""

    eos_serves_as_bos: bool = False
    """The tokenizers of this family have no BOS token; the end-of-text token starts a sequence."""

    gguf_rotary_pairs: bool = False
    """GGUF files of this family store the rows of q and k as interleaved rotary pairs."""

    @property
    def norm1_consumers(self) -> tuple[str, ...]:
        """Linears that read norm1's output."""
        return (self.q, self.k, self.v)

    @property
    def norm2_consumers(self) -> tuple[str, ...]:
        """Linears that read norm2's output."""
        return (self.gate, self.up)

    @property
    def linears(self) -> tuple[str, ...]:
        """The seven linears of a block, in the order data flows through them."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)

    def block_prefix(self, block: int) -> str:
        """Return what precedes a block-relative name in the checkpoint, e.g. `model.layers.3.`."""
        return f"{self.blocks}.{block}."


LLAMA = ModelFamily(architecture="LlamaForCausalLM", model_type="llama", gguf_rotary_pairs=True)
MISTRAL = replace(LLAMA, architecture="MistralForCausalLM", model_type="mistral")
QWEN2 = ModelFamily(architecture="Qwen2ForCausalLM", model_type="qwen2", eos_serves_as_bos=True)
QWEN3 = replace(QWEN2, architecture="Qwen3ForCausalLM", model_type="qwen3", key_norm="self_attn.k_norm")

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def find_family(model_type: str) -> ModelFamily:
    """Return the family of a config's `model_type`.

    Raises:
        UnsupportedModelError: the family is not known.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported; known are {', '.join(sorted(FAMILIES))}. "
            f"A family is one record in prefixquant/tasks/model/families.py"
        ) from None
