"""What a task is to cost, in units that do not depend on the machine."""

from dataclasses import dataclass
from typing import Any

from prefixquant.pipeline.machines import Work
from prefixquant.pipeline.shape import Shape
from prefixquant.tasks.train_chain import FORWARD_TOKENS

SEARCH_BYTES = 30
"""Float32 matrices at hand while the scales of the largest one are searched on a CPU, in bytes of its entries; a
quarter of it where a trained one is rounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one task, or of one of its ranks."""

    work: Work
    device: float = 0
    """Bytes of tensors where the task computes."""

    host: float = 0
    """Bytes beside these in host memory, even if a GPU computes."""

    staged: float = 0
    """Bytes of weights in host memory on their way to a GPU; a CPU computes with them where they are."""

    stored: float = 0
    """Bytes published."""

    disk: float = 0
    """Bytes of local disk while it runs."""


def forward_work(shape: Shape, tokens: int, blocks: float = 1, *, logits: int = 0) -> dict[str, Any]:
    """Return the work of passing tokens through blocks, and of the logits of some."""
    rate = "float32" if shape.dtype == "float32" else "bfloat16"
    products = tokens * blocks * shape.parameters + logits * shape.vocabulary * shape.hidden
    return {
        "flops": {f"forward_{rate}": 2.0 * products},
        "elements": {"forward": float(tokens * shape.channels * blocks)},
        "forwards": blocks * max(1, -(-tokens // FORWARD_TOKENS)) if tokens else 0,
    }
