"""Errors of the operators."""


class KernelInputError(ValueError):
    """An operator was called with a shape, dtype, stride, device or size it does not take."""
