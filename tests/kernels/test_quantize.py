import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.int4 import pack_int4, unpack_int4
from prefixquant.kernels.quantize import quantize
from prefixquant.tasks.model.quantizer import SiteQuantizer
from prefixquant.tasks.model.spec import ActivationSpec


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_codes_survive_packing():
    codes = torch.randint(-8, 8, (3, 5, 12), generator=torch.Generator().manual_seed(0))
    packed = pack_int4(codes)
    assert packed.shape == (3, 5, 6)
    assert torch.equal(unpack_int4(packed), codes.to(torch.int8))
    assert unpack_int4(torch.tensor([0x8F], dtype=torch.uint8)).tolist() == [-1, -8]


@pytest.mark.parametrize("codes", [torch.zeros(3), torch.tensor([8, 0]), torch.tensor([0.5, 0.0])], ids=str)
def test_what_is_no_pair_of_codes_is_not_packed(codes):
    with pytest.raises(KernelInputError):
        pack_int4(codes)


@pytest.mark.parametrize("layout", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_codes_times_scale_are_the_fake_quantized_values(layout, mode):
    x = values(2, 7, 96)
    site = SiteQuantizer(
        ActivationSpec(bits=4, mode=mode, granularity="tensor" if mode == "static" else "token", symmetric=True), 96
    )
    if mode == "static":
        site.scale = torch.tensor(0.37)
        codes, scale = quantize(x, site.scale, layout=layout)
    else:
        site.clip_ratio = torch.tensor(0.8)
        codes, scale = quantize(x, clip_ratio=site.clip_ratio, layout=layout)
        assert scale.shape == (2, 7, 1)
    whole = unpack_int4(codes) if layout == "int4" else codes
    assert torch.equal(whole.float() * scale, site(x))


def test_a_norm_in_front_is_the_norm_of_the_model():
    x, gain = values(3, 64).bfloat16(), values(64).bfloat16()
    wanted, _ = quantize(torch.nn.functional.rms_norm(x, (64,), gain, 1e-5), torch.tensor(0.2))
    assert torch.equal(quantize(x, torch.tensor(0.2), gain=gain, eps=1e-5)[0], wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": values(4, 8).int()}, "float32, bfloat16 or float16"),
        ({"x": values(4, 7)}, "K even"),
        ({"x": values(8, 4).T}, "contiguous"),
        ({"x": torch.zeros(1, 65538)}, "65536"),
        ({"bits": 8, "layout": "fp8"}, "8 bits as int8"),
        ({"layout": "int5"}, "int5"),
        ({"clip_ratio": torch.tensor(1.0)}, "not both"),
        ({"scale": torch.ones(4)}, "one float32"),
        ({"scale": torch.ones((), device="meta")}, "on meta"),
        ({"gain": torch.ones(4)}, r"gain \[8\]"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_input_is_refused_before_anything_runs(change, message):
    arguments = {"x": values(4, 8), "scale": torch.tensor(1.0)} | change
    with pytest.raises(KernelInputError, match=message):
        quantize(arguments.pop("x"), arguments.pop("scale"), **arguments)


def test_kernels_match_the_references_in_the_interpreter():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted_linear.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        *("quantize", "matches", "linear", "matches", "few", "rows", "match", "many", "rows", "match"),
        *("hadamard", "matches"),
    ]
