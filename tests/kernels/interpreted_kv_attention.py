"""Compare the Triton kernels of the 4-bit KV cache with the references, by Triton's interpreter, in float32."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

from prefixquant.kernels.int4 import pack_int4, unpack_int4
from prefixquant.kernels.kv_attention.kernel import attention_triton, rotate_triton
from prefixquant.kernels.kv_attention.reference import attention_reference, pack_heads_reference, rotate_reference

GENERATOR = torch.Generator().manual_seed(0)


def compare_rotate() -> None:
    """Rotary embedding and R3, alone and into a cache; strided input, a prompt and a single token."""
    for channels in (32, 64, 128):
        for tokens in (1, 70):
            x = torch.randn(2, tokens, 3, channels, generator=GENERATOR).transpose(1, 2)  # as a projection gives it
            angle = torch.rand(2, tokens, channels // 2, generator=GENERATOR).repeat(1, 1, 2)
            cos, sin = angle.cos(), angle.sin()
            for hadamard in (False, True):
                wanted = rotate_reference(x, cos, sin, hadamard)
                y = rotate_triton(x, cos, sin, hadamard)
                torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5)  # float32 sums of 128
                scale = 0.2 + 0.1 * torch.rand(3, generator=GENERATOR)
                cache = torch.full((2, 3, 75, channels // 2), 7, dtype=torch.uint8)
                rotate_triton(x, cos, sin, hadamard, scale, cache, torch.tensor([4], dtype=torch.int32))
                difference = unpack_int4(cache[:, :, 4 : 4 + tokens]) - unpack_int4(pack_heads_reference(wanted, scale))
                assert difference.abs().max() <= 1  # a value on the edge between two codes
                assert difference.abs().float().mean() <= 1e-3
                assert bool((cache[:, :, :4] == 7).all())
                assert bool((cache[:, :, 4 + tokens :] == 7).all())
            cache = torch.full((2, 3, tokens, channels // 2), 7, dtype=torch.uint8)
            place = torch.tensor([0], dtype=torch.int32)
            rotate_triton(x, None, None, False, scale, cache, place)
            assert torch.equal(cache, pack_heads_reference(x, scale))
    print("rotate matches")


def compare_attention() -> None:
    """Prefill and decode, grouped queries, prefix, padding, more places than tokens, and parts that see nothing."""
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
        filled = torch.tensor([length], dtype=torch.int32)
        for own_prefix in (None, prefix):
            for start in (None, starts):
                for splits in (1, 4):
                    given = (query, keys, values, scales[0], scales[1], filled, start, own_prefix, channels**-0.5)
                    y = attention_triton(*given, splits)
                    wanted = attention_reference(*given)
                    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)  # float32 against float64
    print("attention matches")


if __name__ == "__main__":
    compare_rotate()
    compare_attention()
