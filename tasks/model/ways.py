"""What a training step can compute in several ways, equal but for floating-point order."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class StepWays:
    """Ways of one block's training step. The defaults are the fastest on an H100 (`tasks.bench_training --variants`
    measures, `docs/decisions/block-training.md` has the figures); the others are what they are compared with."""

    attention: Literal["padded", "lower_right"] = "padded"
    """Behind a prefix of P tokens: with P queries more in front, so that the plain causal mask is right, for which
    PyTorch has its fastest kernels; or as T queries over P + T keys, with a mask aligned to the last of both."""

    code_products: bool = True
    """In compiled steps of a single process the forward products are made of codes in fp8, which holds those of 4 bits
    exactly; the backward ones from the quantized values, as ever. Only where two symmetric static grids meet and the
    GPU has fp8 (`SiteLinear.multiplies_codes`); elsewhere the products are the ordinary ones."""
