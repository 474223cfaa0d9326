"""Runs a quantized model on its integer codes, without Ray or MLflow."""

from prefixquant.tasks.runtime.model import QuantizedCausalLM

__all__ = ["QuantizedCausalLM"]
