"""Compare the Triton kernels of Hadamard transform and fake quantization with their two steps, in the interpreter.

In float32: the interpreter cuts bfloat16 off instead of rounding it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

from prefixquant.kernels.fake_quantize.reference import backward_reference, forward_reference
from prefixquant.kernels.hadamard.reference import hadamard_transform_reference
from prefixquant.kernels.hadamard.train_kernel import backward_triton, forward_triton

LOW, HIGH = -8, 7


def main() -> None:
    """Compare sizes whose axes are powers of two, and others."""
    for n in (256, 576, 1536, 28672):  # the last one in two runs of columns
        generator = torch.Generator().manual_seed(0)
        x, grad = torch.randn(3, n, generator=generator), torch.randn(3, n, generator=generator)
        scale = torch.tensor(0.21)
        y, transformed = forward_triton(x, scale, LOW, HIGH)
        torch.testing.assert_close(transformed, hadamard_transform_reference(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(y, forward_reference(transformed, scale, None, LOW, HIGH, x.dtype))
        dx, dscale = backward_triton(grad, transformed, scale, LOW, HIGH)
        wanted, dscale_wanted, _ = backward_reference(grad, transformed, scale, None, LOW, HIGH)
        assert (wanted == 0).any()  # some values are out of range
        wanted = hadamard_transform_reference(wanted, transposed=True)
        torch.testing.assert_close(dx, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dscale, dscale_wanted, rtol=1e-5, atol=1e-3)  # thousands of terms near one
        print(f"{n} matches")


if __name__ == "__main__":
    main()
