"""Kernels whose launches overlap: what they do before they may. That results stay the same takes a GPU
(tests/tasks/test_runtime_gpu.py)."""

import re

import pytest
import torch
from hopper import compiled_for_hopper

pytest.importorskip("triton")
import triton.language as tl

from prefixquant.kernels.dispatch import overlapped_launches
from prefixquant.kernels.gemm.few_rows import VECTOR_TILE, vector_kernel
from prefixquant.kernels.hadamard.kernel import hadamard_kernel
from prefixquant.kernels.kv_attention.kernel import SPLIT_LAUNCH, attention_kernel, combine_kernel, split_kernel
from prefixquant.kernels.overlap import launch_flags
from prefixquant.kernels.quantize.kernel import quantize_kernel

BOUNDS = {"LOW": -8, "HIGH": 7}
LINEAR = {"X_SCALE": 1, "BIAS": False, "ADDED": True, "ASM": True}
KERNELS = {
    "quantize": (
        quantize_kernel,
        "*bf16 *bf16 *fp32 *fp32 *i8 *fp32 i32 i32 fp32",
        {"NORM": True, "DYNAMIC": False, "PACKED": False, "BLOCK": 2048, **BOUNDS},
        {"num_warps": 8},
    ),
    "vector": (
        vector_kernel,
        "*i32 *fp32 *i32 *fp32 *bf16 *bf16 *bf16 i32 i32",
        LINEAR | {name: VECTOR_TILE[name] for name in ("BN", "BW", "LINES")},
        {"num_warps": VECTOR_TILE["num_warps"]},
    ),
    "split": (
        split_kernel,
        "*bf16 *fp32 *bf16 *bf16 *bf16 *bf16 *bf16 *fp32 *fp32 *i32 *bf16 *u8 *u8 i32 i32 fp32 i32 i32",
        {"HQ": 32, "H": 8, "SCALED": False, "NORM": False, "HADAMARD": True, "C": 128, "BT": 16},
        SPLIT_LAUNCH,
    ),
    "attention": (
        attention_kernel,
        "*bf16 *u8 *u8 *fp32 *fp32 *i32 *i32 *bf16 *bf16 *fp32 *fp32 *fp32 i32 i32 i32 i32 fp32",
        {"SPLITS": 9, "G": 4, "C": 128, "BM": 16, "BN": 64, "BP": 16, "STARTS": False, "ASM": True},
        {"num_warps": 4, "num_stages": 3},
    ),
    "combine": (
        combine_kernel,
        "*fp32 *fp32 *fp32 *fp32 *i8 i32",
        {"SPLITS": 9, "BS": 16, "C": 128, "QUANTIZE": True, "DTYPE": tl.bfloat16, **BOUNDS},
        {},
    ),
    "hadamard": (
        hadamard_kernel,
        "*bf16 *bf16 *fp32 *bf16 *bf16 *fp32 *fp32 *i8 *fp32 i32 i32 i32",
        {"A": 112, "B": 128, "BA": 128, "BB": 128, "BC": 16, "TWO": True, "SWIGLU": True, "SCALED": False}
        | {"QUANTIZE": 1, **BOUNDS},
        {"num_warps": 8, "num_stages": 1},
    ),
}
MEMORY = re.compile(r"griddepcontrol\.\w+|prefetch\.global\.L2|\b(?:ld|st|red|atom)\.global|cp\.async")


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_read_or_written_before_the_kernel_in_front_is_over(name):
    kernel, types, constants, options = KERNELS[name]
    ptx = compiled_for_hopper(kernel, types.split(), constants | {"OVERLAP": True}, options | {"launch_pdl": True})
    order = MEMORY.findall(ptx)
    wait = order.index("griddepcontrol.wait")
    assert order[wait - 1] == "griddepcontrol.launch_dependents"
    assert set(order[: wait - 1]) == ({"prefetch.global.L2"} if name == "vector" else set())
    assert len(order) > wait + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.gpu
def test_launches_for_one_token_overlap_on_gpus_that_can():
    x = torch.zeros(1, device="cuda")
    can = torch.cuda.get_device_capability() >= (9, 0)
    assert launch_flags(x, 1)["OVERLAP"] == can
    assert not launch_flags(x, 2)["OVERLAP"]
    with overlapped_launches(False):
        assert launch_flags(x, 1) == {"OVERLAP": False}


def test_launches_do_not_overlap_without_a_gpu():
    assert launch_flags(torch.zeros(1), 1) == {"OVERLAP": False}
