"""Model families, checkpoint streaming, quantizers, quantized modules, cache."""
