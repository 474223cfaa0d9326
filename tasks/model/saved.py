"""How a quantized block is written: Hugging Face names, integer weights packed as compressed-tensors does."""

from collections.abc import Mapping

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from prefixquant.tasks.model.families import ModelFamily
from prefixquant.tasks.model.quantizer import QuantizedWeight, code_range
from prefixquant.tasks.model.spec import WeightSpec

SITES = "sites"

Sites = dict[str, dict[str, Tensor]]
"""By site: `scale` and `zero_point`, or `clip_ratio`."""


def block_tensors(
    weights: Mapping[str, Tensor],
    quantized: Mapping[str, QuantizedWeight],
    sites: Sites,
    family: ModelFamily,
    block: int,
    spec: WeightSpec | None,
) -> dict[str, Tensor]:
    """Return the tensors to store for a quantized block; `weights` and `quantized` by block-relative name.

    Integer weights: `NAME.weight_packed` int32 (codes shifted to start at 0, little-endian inside a word),
    `NAME.weight_scale` [O, G] float32 and, if asymmetric, `NAME.weight_zero_point` [O, G] int8 (shifted likewise).
    Everything else of the block (norms, biases, unquantized weights) as in `weights`; sites as
    `BLOCK.sites.SITE.scale | zero_point | clip_ratio`.
    """
    prefix = family.block_prefix(block)
    tensors = {
        prefix + name: tensor for name, tensor in weights.items() if name.removesuffix(".weight") not in quantized
    }
    for role, weight in quantized.items():
        assert spec is not None
        shift = 0 if spec.symmetric else 2 ** (spec.bits - 1)
        codes = (weight.codes - shift).to(torch.int8)
        tensors[f"{prefix}{role}.weight_packed"] = pack_to_int32(codes, spec.bits).cpu()  # packed where the codes are
        tensors[f"{prefix}{role}.weight_scale"] = weight.scale.squeeze(-1).cpu()
        if not spec.symmetric:
            tensors[f"{prefix}{role}.weight_zero_point"] = (weight.zero_point.squeeze(-1) - shift).to(torch.int8).cpu()
    for site, parameters in sites.items():
        for name, tensor in parameters.items():
            tensors[f"{prefix}{SITES}.{site}.{name}"] = tensor
    return tensors


def unpack_weight(
    tensors: Mapping[str, Tensor], name: str, shape: torch.Size, spec: WeightSpec, device: torch.device | None = None
) -> QuantizedWeight:
    """Return the integer weight stored under `name` (without suffix), on a device; None leaves it where it is."""
    shift = 0 if spec.symmetric else 2 ** (spec.bits - 1)
    packed = tensors[f"{name}.weight_packed"].to(device)
    codes = unpack_from_int32(packed, spec.bits, shape).to(torch.int16) + shift
    scale = tensors[f"{name}.weight_scale"].to(device).unsqueeze(-1)
    stored = tensors.get(f"{name}.weight_zero_point")
    zero_point = torch.zeros_like(scale) if stored is None else stored.to(device).unsqueeze(-1).float() + shift
    low, high = code_range(spec.bits, spec.symmetric)
    assert int(codes.min()) >= low
    assert int(codes.max()) <= high
    return QuantizedWeight(codes, scale, zero_point)


def saved_weights(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    family: ModelFamily,
    block: int,
    spec: WeightSpec | None,
    device: torch.device | None = None,
) -> dict[str, QuantizedWeight]:
    """Return a stored block's integer weights by linear, on a device; empty if its weights are not quantized."""
    if spec is None:
        return {}
    prefix = family.block_prefix(block)
    return {
        role: unpack_weight(tensors, prefix + role, shapes[f"{role}.weight"], spec, device) for role in family.linears
    }


def block_weights(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    family: ModelFamily,
    block: int,
    spec: WeightSpec | None,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[dict[str, Tensor], Sites]:
    """Return a stored block's weights, dequantized, by block-relative name, and its sites' parameters by site.

    `shapes`: of every block-relative weight, as the model class has them. `device`: where to unpack, and where the
    weights then are; None: where they lie.
    """
    prefix = family.block_prefix(block)
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        role = name.removesuffix(".weight")
        if f"{prefix}{role}.weight_packed" in tensors:
            assert spec is not None
            exact = torch.promote_types(dtype, torch.float32)
            weight = unpack_weight(tensors, prefix + role, shape, spec, device)
            weights[name] = weight.dequantize(spec, exact).to(dtype)
        else:
            weights[name] = tensors[prefix + name].to(device=device, dtype=dtype)
    sites: Sites = {}
    start = f"{prefix}{SITES}."
    for name, tensor in tensors.items():
        if name.startswith(start):
            site, parameter = name.removeprefix(start).split(".")
            sites.setdefault(site, {})[parameter] = tensor
    return weights, sites
