"""Compiling Triton kernels for an H100 on a machine without one."""

import re
import subprocess

import pytest

CAPABILITY = 90
SHARED_BYTES = 227 * 1024
"""What a block may have on Hopper."""


def compiled_for_hopper(kernel, types, constants, options):
    """Return the kernel's PTX; `types` are those of its arguments in order, pointers and sizes multiples of 16."""
    return _compiled(kernel, types, constants, options).asm["ptx"]


def spilled_on_hopper(kernel, types, constants, options, folder):
    """Return the bytes of a thread that do not fit its registers."""
    from triton import knobs

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(_compiled(kernel, types, constants, options).asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def _compiled(kernel, types, constants, options):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = {(index,): [["tt.divisibility", 16]] for index, each in enumerate(types) if each != "fp32"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES
    return compiled
