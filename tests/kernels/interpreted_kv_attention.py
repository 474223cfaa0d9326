"""Compare the Triton kernels of the 4-bit KV cache with the references, by Triton's interpreter, in float32."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch import Tensor

from prefixquant.kernels.int4 import pack_int4, unpack_int4
from prefixquant.kernels.kv_attention.kernel import attention_triton, dequantize_triton, split_triton
from prefixquant.kernels.kv_attention.reference import attention_reference, split_reference
from prefixquant.kernels.quantize.reference import quantize_reference

GENERATOR = torch.Generator().manual_seed(0)


def counter(value: int) -> Tensor:
    """Return a place or length as kernels read it."""
    return torch.tensor([value], dtype=torch.int32)


def compare_split() -> None:
    """Channel scales, norms and R3 on and off; grouped queries, a batch, a prompt and a token, and too little room."""
    for channels, tokens, heads, kv_heads in ((16, 1, 4, 2), (32, 70, 3, 3), (64, 1, 6, 2), (128, 20, 2, 1)):
        width = (heads + 2 * kv_heads) * channels
        x = torch.randn(2, tokens, width, generator=GENERATOR)
        angle = torch.rand(2, tokens, channels // 2, generator=GENERATOR).repeat(1, 1, 2)
        scales = tuple(0.2 + 0.2 * torch.rand(2, kv_heads, generator=GENERATOR))
        channel_scale = 0.5 + torch.rand(width, generator=GENERATOR)
        gains = tuple(0.5 + torch.rand(2, channels, generator=GENERATOR))
        for flags in range(8) if channels == 16 else (0, 7):
            scaled, norm, hadamard = (bool(flags & bit) for bit in (1, 2, 4))
            part = slice(None) if flags % 3 else slice(1)  # positions of their own, or shared by the batch
            places = tokens + (8 if flags % 2 else -tokens // 3)  # the rest of the tokens has no place
            found, wanted = torch.full((2, 2, 2, kv_heads, max(5, places), channels // 2), 7, dtype=torch.uint8)
            given = (x, channel_scale if scaled else None, gains if norm else None, 1e-3, angle.cos()[part])
            given = (*given, angle.sin()[part], hadamard, scales)
            query = split_triton(*given, (found[0], found[1]), counter(4))
            expected = split_reference(*given, (wanted[0], wanted[1]), counter(4))
            torch.testing.assert_close(query, expected, rtol=1e-5, atol=1e-5)  # float32 sums of 128
            difference = (unpack_int4(found).float() - unpack_int4(wanted).float()).abs()
            assert difference.max() <= 1  # a value on the edge between two codes
            assert difference.mean() <= 1e-3
            assert bool((found[:, :, :, :4] == 7).all())
            assert bool((found[:, :, :, 4 + tokens :] == 7).all())
            assert not bool((found[:, :, :, 4 : 4 + tokens] == 7).all())
    print("split matches")


def compare_dequantize() -> None:
    """The filled places of a cache alone and behind a prefix, across tiles."""
    for batch, heads, places, length, channels in ((2, 3, 80, 70, 16), (1, 2, 9, 9, 64), (2, 1, 70, 1, 128)):
        codes = torch.randint(-8, 8, (batch, heads, places, channels), generator=GENERATOR)
        scale = 0.1 + torch.rand(heads, generator=GENERATOR)
        values = codes[:, :, :length] * scale[:, None, None]
        assert torch.equal(dequantize_triton(pack_int4(codes), scale, None, length, torch.float32), values)
        prefix = torch.randn(heads, 5, channels, generator=GENERATOR)
        found = dequantize_triton(pack_int4(codes), scale, prefix, length, torch.float32)
        assert torch.equal(found, torch.cat([prefix.expand(batch, -1, -1, -1), values], dim=2))
    print("dequantize matches")


def compare_attention() -> None:
    """Prefill and decode, grouped queries, prefix, padding, more places than tokens, parts that see nothing, codes."""
    for batch, kv_heads, groups, tokens, length, channels in (
        (2, 2, 3, 1, 150, 64),
        (2, 1, 4, 70, 70, 128),
        (1, 2, 1, 5, 130, 32),
        (1, 1, 1, 1, 1, 64),
    ):
        query = torch.randn(batch, kv_heads * groups, tokens, channels, generator=GENERATOR)
        codes = torch.randint(-8, 8, (2, batch, kv_heads, length + 9, channels), generator=GENERATOR)
        keys, values = pack_int4(codes)
        scales = 0.05 + 0.1 * torch.rand(2, kv_heads, generator=GENERATOR)
        prefix = tuple(torch.randn(2, kv_heads, 3, channels, generator=GENERATOR))
        starts = torch.tensor([0, min(3, length - 1)][:batch], dtype=torch.int32)
        for own_prefix in (None, prefix):
            for start in (None, starts):
                given = (query, keys, values, scales[0], scales[1], counter(length), start, own_prefix, channels**-0.5)
                wanted = attention_reference(*given)
                for splits in (1, 4):
                    y = attention_triton(*given, splits)
                    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)  # float32 against float64
                for bits, scale in ((4, torch.tensor(0.07)), (8, torch.tensor(0.004)))[start is None :]:
                    found = attention_triton(*given, 3, scale, bits)
                    expected, _ = quantize_reference(wanted, scale, None, None, 0.0, bits, "int8")
                    difference = (found.float() - expected.float()).abs()
                    assert found.dtype == torch.int8
                    assert difference.max() <= 1  # a value on the edge between two codes
                    assert difference.mean() <= 1e-3
    print("attention matches")


if __name__ == "__main__":
    compare_split()
    compare_dequantize()
    compare_attention()
