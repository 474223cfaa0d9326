"""One folder an operator: wrapper, PyTorch reference, benchmark, and a README with the maths."""
