"""Compare every operator that a forward calls with its reference, on the inputs it meets there."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefixquant.kernels.dispatch import references
from prefixquant.kernels.int4 import unpack_int4

OPERATORS = "prefixquant"

VALUE_ERROR = 1e-2
"""Largest error of values, relative to their norm: they are sums in another order, rounded to bfloat16 (2^-9)."""

MOVED_CODES = 0.02
"""Largest share of codes that differ, by one at most: a value on the edge between two may tip over."""


class OperatorCheck(TorchDispatchMode):
    """Runs the reference beside each of the package's operators and keeps the largest differences.

    The forward goes on with the kernel's result, so that differences do not add up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, float] = {}
        """By operator: the largest difference over what is allowed; up to 1 is right."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and its reference on copies of its inputs."""
        kwargs = kwargs or {}
        if func.namespace != OPERATORS:
            return func(*args, **kwargs)
        copies = [each.clone() if isinstance(each, Tensor) else each for each in args]
        found = func(*args, **kwargs)
        with references():
            wanted = func(*copies, **kwargs)
        pairs = list(zip(_tensors(found), _tensors(wanted), strict=True))
        mutated = [
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        ]
        pairs += [(given, copy) for given, copy, is_output in zip(args, copies, mutated, strict=False) if is_output]
        name = func._schema.name.partition("::")[2]
        for ours, theirs in pairs:
            self.errors[name] = max(self.errors.get(name, 0.0), difference(ours, theirs))
        return found

    @property
    def ok(self) -> bool:
        """Return whether every operator did what its reference does."""
        return all(error <= 1 for error in self.errors.values())


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return how far a result is from its reference, over what is allowed; NaN is infinitely far."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if found.numel() == 0:
        return 0.0
    if found.dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        codes = [unpack_int4(each) if each.dtype == torch.uint8 else each for each in (found, wanted)]
        moved = (codes[0].float() - codes[1].float()).abs()
        error = max(float(moved.max()), float((moved > 0).float().mean()) / MOVED_CODES)
    else:
        error = float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30)) / VALUE_ERROR
    return error if error == error else float("inf")


def _tensors(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple | list) else (result,)
    return [each for each in parts if isinstance(each, Tensor)]
