import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hopper import compiled_for_hopper

from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.hadamard import hadamard_transform
from prefixquant.kernels.int4 import pack_int4, unpack_int4
from prefixquant.kernels.kv_attention import kv_attention, split_heads
from prefixquant.kernels.quantize import quantize


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


def test_an_output_scale_gives_the_codes_that_quantize_gives():
    given, scale = arguments(), torch.tensor(0.02)
    y = kv_attention(**given).flatten(2)
    for bits in (4, 8):
        codes = kv_attention(**given, out_scale=scale, out_bits=bits)
        assert codes.shape == (2, 3, 4, 16)
        assert torch.equal(codes.flatten(2), quantize(y, scale, bits=bits, layout="int8")[0])


def projection():
    """Arguments of split_heads: 3 query heads, 1 of keys, 1 of values, of 16 channels."""
    angle = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 2)
    return {
        "x": heads(2, 3, 80),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "scales": (torch.tensor([0.5]), torch.tensor([0.25])),
        "caches": tuple(torch.full((2, 2, 1, 6, 8), 7, dtype=torch.uint8)),
        "place": counter(2),
        "hadamard": True,
    }


def codes_of(x, scale):
    return torch.clamp(torch.round(x / scale), -8, 7).to(torch.int8)


def test_heads_are_split_rotated_and_stored_and_the_rest_of_the_cache_is_left():
    given = projection()
    query = split_heads(**given)
    mixed = given["x"].view(2, 3, 5, 16).transpose(1, 2)
    low, high = mixed.chunk(2, dim=-1)
    turned = mixed * given["cos"].unsqueeze(1) + torch.cat([-high, low], dim=-1) * given["sin"].unsqueeze(1)
    torch.testing.assert_close(query, hadamard_transform(turned[:, :3]))
    keys, values = given["caches"]
    assert torch.equal(unpack_int4(keys[:, :, 2:5]), codes_of(hadamard_transform(turned[:, 3:4]), 0.5))
    assert torch.equal(unpack_int4(values[:, :, 2:5]), codes_of(mixed[:, 4:], 0.25))
    for cache in (keys, values):
        assert bool((cache[:, :, :2] == 7).all())
        assert bool((cache[:, :, 5:] == 7).all())


def test_what_lies_past_the_end_of_the_cache_is_dropped():
    given = projection() | {"place": counter(5)}
    query = split_heads(**given)
    assert torch.equal(query, split_heads(**projection()))
    values = given["caches"][1]
    assert torch.equal(unpack_int4(values[:, :, 5]), codes_of(given["x"].view(2, 3, 5, 16)[:, :1, 4], 0.25))
    assert bool((values[:, :, :5] == 7).all())


def test_channel_scales_and_norms_come_before_the_rotary_embedding():
    given, scale = projection() | {"hadamard": False}, 0.5 + torch.rand(80, generator=torch.Generator().manual_seed(2))
    gains = tuple(heads(2, 16, seed=3))
    query = split_heads(**given, channel_scale=scale, gains=gains, eps=1e-3)
    mixed = (given["x"] * scale).view(2, 3, 5, 16)
    parts = zip((mixed[:, :, :3], mixed[:, :, 3:4]), gains, strict=True)
    normed = [F.rms_norm(part, (16,), gain, 1e-3) for part, gain in parts]
    plain = projection() | {"hadamard": False, "x": torch.cat([*normed, mixed[:, :, 4:]], dim=2).flatten(2)}
    assert torch.equal(query, split_heads(**plain))
    for found, wanted in zip(given["caches"], plain["caches"], strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": heads(2, 4, 3, 16).int()}, "contiguous query"),
        ({"query": heads(2, 3, 4, 16).transpose(1, 2)}, "contiguous query"),
        ({"query": heads(2, 3, 3, 16)}, "dividing the query's"),
        ({"query": heads(2, 4, 3, 24)}, "32, 64 or 128"),
        ({"query": heads(2, 4, 10, 16)}, "9 places"),
        ({"keys": torch.zeros(2, 2, 9, 8)}, "uint8"),
        ({"key_scale": torch.ones(1)}, r"key_scale must be contiguous float32 \[2\]"),
        ({"length": torch.tensor([7])}, "length must be contiguous int32"),
        ({"start": counter(0)}, r"start must be contiguous int32 \[2\]"),
        ({"prefix": tuple(heads(2, 1, 2, 16))}, r"prefix must be \[2, P, 16\]"),
        ({"prefix": (heads(2, 2, 16), heads(2, 3, 16))}, "as many keys as values"),
        ({"prefix": tuple(heads(2, 2, 2, 16).transpose(1, 2))}, "prefix must be contiguous"),
        ({"prefix": tuple(torch.empty(2, 2, 2, 16, device="meta"))}, "prefix on meta"),
        ({"splits": 0}, "splits"),
        ({"filled": 2}, "filled must lie between 3 and 9, got 2"),
        ({"filled": 10}, "filled must lie between 3 and 9, got 10"),
        ({"out_scale": torch.ones(1)}, "out_scale must be a float32 scalar"),
        ({"out_scale": torch.ones((), dtype=torch.float64)}, "out_scale must be a float32 scalar"),
        ({"out_scale": torch.ones(()), "out_bits": 5}, "out_bits 4 or 8"),
        ({"out_scale": torch.ones((), device="meta")}, "out_scale on meta"),
        ({"start": torch.zeros(2, dtype=torch.int32, device="meta")}, "start on meta"),
        ({"key_scale": torch.ones(1).expand(2)}, "key_scale must be contiguous"),
        ({"value_scale": torch.ones(2, device="meta")}, "one device"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_input_is_refused_before_anything_runs(change, message):
    with pytest.raises(KernelInputError, match=message):
        kv_attention(**(arguments() | change))


def caches(*shape, device=None):
    return tuple(torch.zeros(2, *shape, dtype=torch.uint8, device=device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": heads(2, 3, 80).int()}, "contiguous"),
        ({"x": heads(6, 80)}, r"\[B, T, channels\]"),
        ({"x": heads(3, 2, 80).transpose(0, 1)}, "contiguous"),
        ({"x": heads(2, 3, 72)}, "got 72 channels"),
        ({"x": heads(2, 3, 32)}, "more than 2 of them"),
        ({"caches": caches(2, 1, 6, 12)}, "32, 64 or 128"),
        ({"caches": caches(2, 6, 8)}, "caches must be alike"),
        ({"caches": (*caches(2, 1, 6, 8)[:1], *caches(2, 1, 7, 8)[:1])}, "caches must be alike"),
        ({"caches": caches(1, 1, 6, 8)}, r"uint8 \[2, 1, places, 8\]"),
        ({"caches": caches(2, 1, 6, 8, device="meta")}, "cache on meta"),
        ({"caches": tuple(torch.zeros(2, 2, 1, 6, 8))}, "contiguous uint8"),
        ({"scales": (torch.ones(1), torch.ones(2))}, r"scales must be contiguous float32 \[1\]"),
        ({"scales": (torch.ones(1).double(), torch.ones(1))}, r"scales must be contiguous float32 \[1\]"),
        ({"place": torch.tensor(0)}, r"place must be contiguous int32 \[1\]"),
        ({"place": torch.zeros(1, dtype=torch.int32, device="meta")}, "place on meta"),
        ({"cos": torch.zeros(2, 3, 8)}, r"\[2 or 1, 3, 16\]"),
        ({"sin": torch.zeros(2, 4, 16)}, r"\[2 or 1, 3, 16\]"),
        ({"sin": torch.zeros(1, 3, 16)}, "alike"),
        ({"cos": torch.zeros(1, 3, 16)}, "alike"),
        ({"sin": torch.zeros(2, 3, 16).double()}, "torch.float64"),
        ({"sin": torch.zeros(3, 2, 16).transpose(0, 1)}, "alike"),
        ({"channel_scale": torch.ones(16)}, r"channel_scale must be contiguous float32 \[80\]"),
        ({"channel_scale": torch.ones(1).expand(80)}, r"channel_scale must be contiguous float32 \[80\]"),
        ({"channel_scale": torch.ones(80, device="meta")}, "channel_scale on meta"),
        ({"gains": (torch.ones(16), torch.ones(80))}, r"gains must be contiguous float32 \[16\]"),
        ({"gains": (torch.ones(16).bfloat16(), torch.ones(16))}, r"gains must be contiguous float32 \[16\]"),
        ({"gains": (torch.ones(16), torch.ones(16, device="meta"))}, "gain on meta"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_input_of_split_heads_is_refused_before_anything_runs(change, message):
    given = projection() | change
    with pytest.raises(KernelInputError, match=message):
        split_heads(**given)
    assert all(bool((cache == 7).all()) for cache in given["caches"] if "caches" not in change)


def test_kernels_match_the_references_in_the_interpreter():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted_kv_attention.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["split", "matches", "dequantize", "matches", "attention", "matches"]


@pytest.mark.parametrize("rows", [16, 64], ids=["decode", "prefill"])
def test_attention_compiles_for_hopper(rows):
    pytest.importorskip("triton")
    from prefixquant.kernels.kv_attention.kernel import attention_kernel

    constants = {"SPLITS": 4, "G": 4, "C": 128, "BM": rows, "BN": 64, "BP": 16, "STARTS": True, "ASM": True}
    types = ["*bf16", "*u8", "*u8", "*fp32", "*fp32", "*i32", "*i32", "*bf16", "*bf16", "*fp32", "*fp32", "*fp32"]
    types += ["i32"] * 4 + ["fp32"]
    options = {"num_warps": 4, "num_stages": 3}
    ptx = compiled_for_hopper(attention_kernel, types, constants | {"OVERLAP": False}, options)
    assert ("wgmma" if rows >= 64 else "mma.sync") in ptx


@pytest.mark.parametrize("tokens", [1, 300])
def test_splitting_compiles_for_hopper_and_rounds_every_product(tokens):
    pytest.importorskip("triton")
    from prefixquant.kernels.kv_attention.kernel import SPLIT_LAUNCH, split_kernel

    constants = {"HQ": 32, "H": 8, "SCALED": True, "NORM": False, "HADAMARD": True, "OVERLAP": False, "C": 128}
    constants["BT"] = 16 if tokens <= 16 else 64
    types = ["*bf16", "*fp32", *["*bf16"] * 5, "*fp32", "*fp32", "*i32", "*bf16", "*u8", "*u8", "i32", "i32", "fp32"]
    ptx = compiled_for_hopper(split_kernel, [*types, "i32", "i32"], constants, SPLIT_LAUNCH)
    assert "mma" in ptx
    assert "fma.rn.bf16" not in ptx
