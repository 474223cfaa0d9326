"""Kernels whose launches overlap: what they do before they may. That results stay the same takes a GPU
(tests/tasks/test_runtime_gpu.py)."""

import re

import pytest
import torch
from hopper import compiled_for_hopper

pytest.importorskip("triton")
import triton.language as tl

from prefixquant.kernels.dispatch import overlapped_launches
from prefixquant.kernels.gemm.few_rows import VECTOR_TILE, rows_kernel, tiling, vector_kernel
from prefixquant.kernels.hadamard.kernel import hadamard_kernel
from prefixquant.kernels.kv_attention.kernel import SPLIT_LAUNCH, attention_kernel, combine_kernel, split_kernel
from prefixquant.kernels.overlap import EARLY, LATE, launch_flags
from prefixquant.kernels.quantize.kernel import quantize_kernel

BOUNDS = {"LOW": -8, "HIGH": 7}
ROWS_TILE = tiling(16, 4096, 2048)
LINEAR = {"X_SCALE": 1, "BIAS": True, "ADDED": True, "ASM": True}
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
        LINEAR | {name: VECTOR_TILE[name] for name in ("BN", "BW")},
        {"num_warps": VECTOR_TILE["num_warps"]},
    ),
    "rows": (
        rows_kernel,
        "*i8 *fp32 *i8 *fp32 *bf16 *bf16 *bf16 *i32 *i32 i32 i32 i32",
        LINEAR | {name: size for name, size in ROWS_TILE.items() if not name.startswith("num")},
        {name: size for name, size in ROWS_TILE.items() if name.startswith("num")},
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
    "hadamard of one axis": (
        hadamard_kernel,
        "*bf16 *bf16 *fp32 *bf16 *bf16 *fp32 *fp32 *i8 *fp32 i32 i32 i32",
        {"A": 1, "B": 128, "BA": 64, "BB": 128, "BC": 128, "TWO": False, "SWIGLU": True, "SCALED": False}
        | {"QUANTIZE": 1, **BOUNDS},
        {"num_warps": 8, "num_stages": 1},
    ),
}
FIXED = {
    "quantize": {"gain"},
    "vector": {"weight", "weight_scale", "bias"},
    "rows": {"weight_scale", "bias"},
    "split": {"matrix"},
    "attention": set(),
    "combine": set(),
    "hadamard": {"first", "last"},
    "hadamard of one axis": {"last"},
}
"""Arguments that no kernel writes shortly before."""

INSTRUCTION = re.compile(r"^\s*\{?\s*(?:@!?%\w+ )?([\w.:]+)\s+(.*?);", re.M)


def instructions_and_what_they_are_made_of(ptx, names):
    """Return (instruction, names of the kernel's arguments that the addresses and values it uses come from)."""
    sources = {}
    for operation, operands in INSTRUCTION.findall(ptx):
        found = {names[int(index)] for index in re.findall(r"_param_(\d+)", operands) if int(index) < len(names)}
        registers = re.findall(r"%\w+", operands)
        found |= set().union(*(sources.get(each, set()) for each in registers))
        if operation.startswith(("ld.global", "st.global", "red.global", "atom.global", "cp.async", "grid")):
            yield operation, found
        if not operation.startswith(("ld.global", "st.", "red.")):  # what is loaded is no address here
            written = re.findall(r"%\w+", operands.split("}")[0]) if operands.startswith("{") else registers[:1]
            for each in written:
                sources[each] = sources.get(each, set()) | found


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("name", KERNELS)
def test_only_what_is_fixed_is_read_before_the_kernel_in_front_is_over(name, early):
    kernel, types, constants, options = KERNELS[name]
    flags = {"OVERLAP": EARLY if early else LATE}
    ptx = compiled_for_hopper(kernel, types.split(), constants | flags, options | {"launch_pdl": True})
    order = list(instructions_and_what_they_are_made_of(ptx, kernel.arg_names))
    operations = [operation for operation, _ in order]
    wait = operations.index("griddepcontrol.wait")
    assert ("griddepcontrol.launch_dependents" in operations[:wait]) == early
    assert len(operations) > wait + 1
    pointers = {each for each, kind in zip(kernel.arg_names, types.split(), strict=False) if kind.startswith("*")}
    before = [(operation, found & pointers) for operation, found in order[:wait] if not operation.startswith("grid")]
    assert not any(operation.startswith(("st", "red", "atom")) for operation, _ in before)
    assert set().union(*(found for _, found in before)) == FIXED[name]
    assert all(len(found) == 1 for _, found in before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.gpu
def test_launches_for_few_tokens_overlap_where_asked_for_on_gpus_that_can():
    x = torch.zeros(1, device="cuda")
    can = torch.cuda.get_device_capability() >= (9, 0)
    assert launch_flags(x, 1) == {"OVERLAP": 0}
    with overlapped_launches():
        assert launch_flags(x, 1)["OVERLAP"] == EARLY * can
        assert launch_flags(x, 2)["OVERLAP"] == LATE * can
        assert launch_flags(x, 2, brief=True)["OVERLAP"] == EARLY * can
        assert launch_flags(x, 2048) == {"OVERLAP": 0}


def test_launches_do_not_overlap_without_a_gpu():
    with overlapped_launches():
        assert launch_flags(torch.zeros(1), 1) == {"OVERLAP": 0}
