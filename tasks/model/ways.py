"""What a training step can compute in several ways, equal but for floating-point order."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch.nn.attention import SDPBackend, sdpa_kernel

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True, slots=True)
class StepWays:
    """Ways of one block's training step. The defaults are what has been measured to be fastest so far
    (`tasks.bench_training --variants` measures)."""

    attention: Literal["lower_right", "padded", "cudnn"] = "lower_right"
    """Behind a prefix of P tokens: as T queries over P + T keys, with a mask aligned to the last of both, or, padded,
    with P queries more in front, so that the plain causal mask is right. cudnn: padded, by cuDNN where it can."""

    code_products: bool = False
    """In compiled steps of a single process the forward products are made of codes in fp8, which holds those of 4 bits
    exactly; the backward ones from the quantized values, as ever."""

    @contextmanager
    def preferred(self) -> Iterator[None]:
        """Within it PyTorch prefers the kernels that these ways ask for."""
        if self.attention != "cudnn":
            yield
            return
        with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
            yield
