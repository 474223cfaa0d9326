"""Compare the Triton kernels of Hadamard transform and fake quantization with their two steps, in the interpreter.

In float32: the interpreter cuts bfloat16 off instead of rounding it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.kernels.fake_quantize.reference import backward_reference, forward_reference
from prefixquant.kernels.hadamard.reference import hadamard_transform_reference
from prefixquant.kernels.hadamard.train_kernel import backward_triton, forward_triton

LOW, HIGH = -8, 7


def main() -> None:
    """Compare sizes whose axes are powers of two, and others."""
    for n in (256, 576, 1536, 7168):  # the last one in two runs of columns behind a SwiGLU
        generator = torch.Generator().manual_seed(0)
        x, grad = torch.randn(3, n, generator=generator), torch.randn(3, n, generator=generator)
        scale = torch.tensor(0.21)
        y, transformed = forward_triton(x, scale, LOW, HIGH)
        torch.testing.assert_close(transformed, hadamard_transform_reference(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(y, forward_reference(transformed, scale, None, LOW, HIGH, x.dtype))
        dx, dup, dscale = backward_triton(grad, transformed, scale, LOW, HIGH)
        wanted, dscale_wanted, _ = backward_reference(grad, transformed, scale, None, LOW, HIGH)
        assert dup is None
        assert (wanted == 0).any()  # some values are out of range
        wanted = hadamard_transform_reference(wanted, transposed=True)
        torch.testing.assert_close(dx, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dscale, dscale_wanted, rtol=1e-5, atol=1e-3)  # thousands of terms near one
        compare_swiglu(x, torch.randn(3, n, generator=generator), grad, scale)
        print(f"{n} matches")


def compare_swiglu(gate: Tensor, up: Tensor, grad: Tensor, scale: Tensor) -> None:
    """Compare with the transform alone behind a SwiGLU, and its gradients with autograd's."""
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    product = F.silu(leaves[0]) * leaves[1]
    y, transformed = forward_triton(gate, scale, LOW, HIGH, up)
    wanted = hadamard_transform_reference(product.detach())
    torch.testing.assert_close(transformed, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(y, forward_reference(transformed, scale, None, LOW, HIGH, y.dtype))
    dproduct, _, dscale_wanted = backward_triton(grad, transformed, scale, LOW, HIGH)
    dgate, dup, dscale = backward_triton(grad, transformed, scale, LOW, HIGH, gate, up)
    assert torch.equal(dscale, dscale_wanted)
    assert dup is not None
    torch.testing.assert_close((dgate, dup), torch.autograd.grad(product, leaves, dproduct), rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    main()
