from importlib.util import find_spec

import pytest
import torch

from prefixquant.kernels.dispatch import references, uses_triton


def test_the_cpu_runs_references():
    assert not uses_triton(torch.zeros(1))


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
