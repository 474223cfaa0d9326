"""Sizes of a model and of what a recipe does with it, from which its tasks' costs are estimated."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from prefixquant.pipeline.recipe import Recipe
from prefixquant.tasks.load import LoadedModel
from prefixquant.tasks.model.sites import head_size
from prefixquant.tasks.search import SearchConfig

TOKENS_A_DOCUMENT = 200
"""Of a task of lm-eval: four choices of fifty tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a run."""

    hidden: int
    intermediate: int
    vocabulary: int
    head_dim: int
    linears: tuple[tuple[int, int], ...]
    """Outputs and inputs of the seven linears of a block."""

    blocks: int
    dtype: str
    bytes_per_weight: int
    bits: int
    """Of a stored weight."""

    group_size: int | None
    statistics_tokens: int
    search_tokens: int
    evaluation_tokens: int
    window: int
    task_tokens: int
    """Of a task of lm-eval, whose documents nobody has counted yet."""

    search: SearchConfig | None
    searches_prefix: bool
    sequences: Mapping[str, int]
    """Windows of the search and of the statistics."""

    rotates_down: bool
    """Whether what enters down_proj is rotated online (R4)."""

    on_cpu: bool = False
    """Whether it is a CPU that computes."""

    @classmethod
    def of(cls, model: LoadedModel, dtype: str, recipe: Recipe) -> "Shape":
        """Return the sizes for a model and a recipe."""
        config, data, weights = model.config, recipe.data, recipe.quantize.weights
        item = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        windows = recipe.evaluate.max_windows or 133
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            head_dim=head_size(config),
            linears=_linears(config),
            blocks=model.num_blocks,
            dtype=dtype,
            bytes_per_weight=item,
            bits=8 * item if weights is None else weights.bits,
            group_size=None if weights is None else weights.group_size,
            statistics_tokens=data.statistics.sequences * data.statistics.length,
            search_tokens=data.search.sequences * data.search.length,
            evaluation_tokens=windows * recipe.evaluate.window,
            window=recipe.evaluate.window,
            task_tokens=TOKENS_A_DOCUMENT * (recipe.evaluate.limit or 2000) * (1 + (recipe.evaluate.shots or 0)),
            search=recipe.search,
            searches_prefix=recipe.prefix.tokens is None,
            sequences={"search": data.search.sequences, "statistics": data.statistics.sequences},
            rotates_down=recipe.transforms.r4,
        )

    @property
    def parameters(self) -> int:
        """Of a block."""
        return sum(outputs * inputs for outputs, inputs in self.linears)

    @property
    def largest(self) -> int:
        """Parameters of the largest matrix of a block."""
        return max(outputs * inputs for outputs, inputs in self.linears)

    @property
    def block_bytes(self) -> int:
        """Of a block's weights as kept."""
        return self.parameters * self.bytes_per_weight

    @property
    def quantized_bytes(self) -> int:
        """Of a quantized block as stored."""
        return self.parameters * self.bits // 8

    @property
    def ends_bytes(self) -> int:
        """Of embedding and head."""
        return 2 * self.vocabulary * self.hidden * self.bytes_per_weight

    @property
    def channels(self) -> int:
        """What the element-wise work of a token grows with."""
        return self.hidden + self.intermediate

    def stream_bytes(self, tokens: int) -> int:
        """Of the hidden states of so many tokens."""
        return tokens * self.hidden * self.bytes_per_weight

    def forward_bytes(self, tokens: int) -> int:
        """At hand in a forward of so many tokens, nothing kept for a backward.

        The batch is among it, or what the batch before put out.
        """
        most = (4 * self.intermediate + 7 * self.hidden) * self.bytes_per_weight
        if self.on_cpu and self.rotates_down and self.dtype == "float32":
            # A CPU rotates in float64: three such matrices, beside three of what they come from.
            most = max(most, (3 * 8 + 3 * 4) * self.intermediate + 3 * 4 * self.hidden)
        return tokens * most


def _linears(config: PretrainedConfig) -> tuple[tuple[int, int], ...]:
    hidden, wide, head = config.hidden_size, config.intermediate_size, head_size(config)
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return (
        (queries, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, queries),
        (wide, hidden),
        (wide, hidden),
        (hidden, wide),
    )
