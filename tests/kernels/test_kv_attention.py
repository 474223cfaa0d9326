import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.hadamard import hadamard_transform
from prefixquant.kernels.int4 import pack_int4, unpack_int4
from prefixquant.kernels.kv_attention import kv_attention, rotate, store_heads

HOPPER = 90


def counter(*values):
    return torch.tensor(values, dtype=torch.int32)


def heads(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments():
    keys, values = pack_int4(torch.randint(-8, 8, (2, 2, 2, 9, 16), generator=torch.Generator().manual_seed(1)))
    return {
        "query": heads(2, 4, 3, 16),
        "keys": keys,
        "values": values,
        "key_scale": torch.tensor([0.1, 0.2]),
        "value_scale": torch.tensor([0.3, 0.1]),
        "length": counter(7),
        "scaling": 0.25,
    }


def test_attention_is_that_of_the_dequantized_cache_behind_the_prefix():
    given = arguments()
    prefix = tuple(heads(2, 2, 2, 16, seed=2))
    y = kv_attention(**given, prefix=prefix)
    key, value = (
        torch.cat([part.expand(2, -1, -1, -1), unpack_int4(given[name])[:, :, :7] * scale.view(-1, 1, 1)], dim=2)
        for part, name, scale in zip(
            prefix, ("keys", "values"), (given["key_scale"], given["value_scale"]), strict=True
        )
    )
    mask = torch.ones(3, 9, dtype=torch.bool).tril(6)  # the last 3 of 7 places behind a prefix of 2
    wanted = F.scaled_dot_product_attention(given["query"], key, value, mask, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(y, wanted.transpose(1, 2))


def test_padding_is_not_seen():
    given = arguments()
    y = kv_attention(**given, start=counter(0, 4))
    changed = given["keys"].clone()
    changed[1, :, :4] ^= 0xFF
    assert torch.equal(kv_attention(**(given | {"keys": changed}), start=counter(0, 4)), y)
    assert not torch.equal(kv_attention(**(given | {"keys": changed})), kv_attention(**given))


def test_what_is_stored_is_rotated_and_quantized_and_the_rest_is_left():
    x, packed = heads(1, 2, 3, 16), torch.full((1, 2, 6, 8), 7, dtype=torch.uint8)
    angle = torch.rand(1, 3, 8).repeat(1, 1, 2)
    scale = torch.tensor([0.5, 0.25])
    store_heads(x, scale, packed, counter(2), cos=angle.cos(), sin=angle.sin(), hadamard=True)
    wanted = rotate(x, angle.cos(), angle.sin(), hadamard=True)
    plain = rotate(x, angle.cos(), angle.sin(), hadamard=False)
    torch.testing.assert_close(wanted, hadamard_transform(plain))
    codes = torch.clamp(torch.round(wanted / scale.view(-1, 1, 1)), -8, 7)
    assert torch.equal(unpack_int4(packed[:, :, 2:5]), codes.to(torch.int8))
    assert bool((packed[:, :, :2] == 7).all())
    assert bool((packed[:, :, 5:] == 7).all())
    store_heads(x, scale, packed, counter(5))  # only the first token has a place left
    assert torch.equal(
        unpack_int4(packed[:, :, 5:]), torch.clamp(torch.round(x[:, :, :1] / scale.view(-1, 1, 1)), -8, 7)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": heads(2, 4, 3, 16).double()}, "contiguous query"),
        ({"query": heads(2, 3, 4, 16).transpose(1, 2)}, "contiguous query"),
        ({"query": heads(2, 3, 3, 16)}, "dividing the query's"),
        ({"query": heads(2, 4, 3, 24)}, "16, 32, 64 or 128"),
        ({"query": heads(2, 4, 10, 16)}, "9 places"),
        ({"keys": torch.zeros(2, 2, 9, 8)}, "uint8"),
        ({"key_scale": torch.ones(1)}, r"key_scale must be float32 \[2\]"),
        ({"length": torch.tensor([7])}, "length must be int32"),
        ({"start": counter(0)}, r"start must be int32 \[2\]"),
        ({"prefix": tuple(heads(2, 1, 2, 16))}, r"prefix must be \[2, P, 16\]"),
        ({"splits": 0}, "splits"),
        ({"value_scale": torch.ones(2, device="meta")}, "one device"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_input_is_refused_before_anything_runs(change, message):
    with pytest.raises(KernelInputError, match=message):
        kv_attention(**(arguments() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": heads(1, 2, 3, 15)}, "C even"),
        ({"scale": torch.ones(3)}, r"float32 \[2\]"),
        ({"packed": torch.zeros(1, 2, 6, 4, dtype=torch.uint8)}, r"places, 8\]"),
        ({"place": torch.tensor(0)}, "int32"),
        ({"cos": torch.zeros(1, 3, 16)}, "needs cos and sin"),
        ({"hadamard": True}, "R3 comes after"),
        ({"cos": torch.zeros(1, 4, 16), "sin": torch.zeros(1, 4, 16)}, r"\[1 or 1, 3, 16\]"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_input_of_the_cache_is_refused(change, message):
    given = {
        "x": heads(1, 2, 3, 16),
        "scale": torch.ones(2),
        "packed": torch.zeros(1, 2, 6, 8, dtype=torch.uint8),
        "place": counter(0),
    }
    with pytest.raises(KernelInputError, match=message):
        store_heads(**(given | change))


def test_kernels_match_the_references_in_the_interpreter():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted_kv_attention.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["rotate", "matches", "attention", "matches"]


@pytest.mark.parametrize("rows", [16, 64], ids=["decode", "prefill"])
def test_attention_compiles_for_hopper(rows):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prefixquant.kernels.kv_attention.kernel import attention_kernel

    constants = {"SPLITS": 4, "G": 4, "C": 128, "BM": rows, "BN": 64, "BP": 16, "STARTS": True}
    types = ["*bf16", "*u8", "*u8", "*fp32", "*fp32", "*i32", "*i32", "*bf16", "*bf16", "*fp32", "*fp32", "*fp32"]
    types += ["i32"] * 4 + ["fp32"]
    signature = dict(zip(attention_kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(12)}
    source = ASTSource(attention_kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options={"num_warps": 4, "num_stages": 3})
    assert ("wgmma" if rows >= 64 else "mma.sync") in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024  # bytes that a block may have on Hopper
