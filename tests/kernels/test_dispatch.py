from importlib.util import find_spec

import pytest
import torch

from prefixquant.kernels.dispatch import references, takes_values, uses_triton
from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.quantize import quantize


def test_the_cpu_runs_references():
    assert not uses_triton(torch.zeros(1))


def test_references_take_float64_and_values_alone():
    x = torch.zeros(1)
    assert all(takes_values(x, each) for each in (torch.float64, torch.float32, torch.bfloat16, torch.float16))
    assert not any(takes_values(x, each) for each in (torch.int8, torch.float8_e4m3fn))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_runs_kernels_but_inside_references():
    x = torch.zeros(1, device="cuda")
    assert uses_triton(x) == (find_spec("triton") is not None)
    with references():
        assert not uses_triton(x)
        with references():
            assert not uses_triton(x)
        assert not uses_triton(x)
    with pytest.raises(ZeroDivisionError), references():
        _ = 1 / 0
    assert uses_triton(x) == (find_spec("triton") is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not find_spec("triton"), reason="needs a CUDA GPU and Triton")
def test_kernels_refuse_float64_and_references_on_a_gpu_take_it():
    x = torch.ones(2, 32, dtype=torch.float64, device="cuda")
    with pytest.raises(KernelInputError, match="float64 on the CPU or within"):
        quantize(x)
    with references():
        assert (quantize(x, layout="int8")[0] == 7).all()
