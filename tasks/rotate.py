"""Fold norm gains and rotations into the weights (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from prefixquant.kernels.hadamard import hadamard_transform, has_hadamard
from prefixquant.tasks.errors import ConfigError, NumericalError, UnsupportedModelError
from prefixquant.tasks.model.checkpoint import check_finite
from prefixquant.tasks.model.families import ModelFamily
from prefixquant.tasks.model.sites import head_size

RotationKind = Literal["hadamard", "orthogonal"]

R4_BLOCKS = (16, 64, 128, 256, 512)
"""Powers of two whose matrix is Sylvester's, as engines build it; the table's matrix of order 32 is another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RotateConfig:
    """Which rotations are applied. The function of the model stays the same; only its activations flatten."""

    r1: RotationKind | None = "hadamard"
    """Residual stream: random-sign Hadamard or random orthogonal matrix, folded into the weights. None: off."""

    r2: RotationKind | None = "hadamard"
    """Values of a head, undone in o_proj; folded into the weights, one matrix a block. None: off."""

    r3: bool = True
    """Online Hadamard on queries and keys after the rotary embedding."""

    r4: bool = True
    """Online Hadamard on down_proj's input, undone in its weight."""

    r4_block: int | None = None
    """R4 in blocks of so many channels, a power of two: the R4 that engines run. None: one over all channels."""

    seed: int = 0
    """Seed of the random signs and matrices."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"rotate.seed must not be negative, got {self.seed}")
        if self.r4_block is not None:
            if not self.r4:
                raise ConfigError("rotate.r4_block is the size of R4, which is off; set rotate.r4=true or leave it out")
            if self.r4_block not in R4_BLOCKS:
                raise ConfigError(
                    f"rotate.r4_block must be one of {', '.join(map(str, R4_BLOCKS))}, got {self.r4_block}"
                )


def check_rotations(config: PretrainedConfig, rotate: RotateConfig) -> None:
    """Raise UnsupportedModelError when a Hadamard rotation has no matrix for the model's sizes."""
    head_dim = head_size(config)
    wanted = {
        "rotate.r1": (rotate.r1 == "hadamard", "hidden_size", config.hidden_size, "orthogonal"),
        "rotate.r2": (rotate.r2 == "hadamard", "head_dim", head_dim, "orthogonal"),
        "rotate.r3": (rotate.r3, "head_dim", head_dim, "false"),
        "rotate.r4": (rotate.r4_block is None and rotate.r4, "intermediate_size", config.intermediate_size, "false"),
    }
    if rotate.r4_block is not None and config.intermediate_size % rotate.r4_block:
        fitting = [size for size in R4_BLOCKS if config.intermediate_size % size == 0]
        raise ConfigError(
            f"rotate.r4_block {rotate.r4_block} does not divide intermediate_size {config.intermediate_size}; "
            f"use {' or '.join(map(str, fitting[-2:])) or 'rotate.r4=false'}"
        )
    for key, (on, what, size, instead) in wanted.items():
        if on and not has_hadamard(size):
            raise UnsupportedModelError(
                f"{key}: no Hadamard matrix of order {size} ({what}) is known; set {key}={instead}"
            )


class Rotation:
    """An orthogonal matrix R, applied to the last axis without being formed where it has fast structure."""

    def __init__(self, kind: RotationKind, size: int, seed: int, name: str) -> None:
        """Draw a random-sign Hadamard (R = diag(signs) H) or a Haar-random orthogonal matrix of this size."""
        generator = torch.Generator().manual_seed(_derived_seed(seed, name))
        self._signs: Tensor | None = None
        self._matrix: Tensor | None = None
        if kind == "hadamard":
            if not has_hadamard(size):
                raise UnsupportedModelError(
                    f"rotate: no Hadamard matrix of order {size} is known for {name}; use 'orthogonal' for it"
                )
            self._signs = torch.randint(0, 2, (size,), generator=generator).to(torch.float64) * 2 - 1
        else:
            gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
            q, r = torch.linalg.qr(gaussian)
            self._matrix = q * torch.sign(torch.diagonal(r))

    def right(self, x: Tensor) -> Tensor:
        """Return x @ R over the last axis, float64."""
        if self._signs is not None:
            return hadamard_transform(x * self._signs.to(x.device))
        assert self._matrix is not None
        return x @ self._matrix.to(x.device)

    def transposed_left(self, x: Tensor) -> Tensor:
        """Return R^T @ x for a matrix x [n, m], float64."""
        return self.right(x.T).T


def _derived_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


@lru_cache(maxsize=2)
def _residual_rotation(kind: RotationKind, size: int, seed: int) -> Rotation:
    return Rotation(kind, size, seed, "r1")


def rotate_block(
    weights: Mapping[str, Tensor],
    family: ModelFamily,
    head_dim: int,
    block: int,
    config: RotateConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the block's weights with norm gains folded and rotations applied, in `dtype`, on the CPU.

    All products are taken in float64. Names are block-relative; gains become ones; q_norm and k_norm stay as they are.
    With R4 on, down_proj expects its input transformed online; with R1 on, the stream must be rotated (`rotate_ends`).

    Raises:
        NumericalError: a weight is NaN or infinite, or becomes so in `dtype`.
        UnsupportedModelError: a size has no known Hadamard matrix.
    """
    # In two steps: at once, the host would convert, and four times the bytes travel.
    w = {name: tensor.to(device).to(torch.float64) for name, tensor in weights.items()}
    check_finite(w.items(), f"block {block}")
    for norm, consumers in ((family.norm1, family.norm1_consumers), (family.norm2, family.norm2_consumers)):
        gain = w[f"{norm}.weight"]
        for consumer in consumers:
            w[f"{consumer}.weight"] = w[f"{consumer}.weight"] * gain
        w[f"{norm}.weight"] = torch.ones_like(gain)

    if config.r1 is not None:
        r1 = _residual_rotation(config.r1, w[f"{family.q}.weight"].shape[1], config.seed)
        for consumer in (*family.norm1_consumers, *family.norm2_consumers):
            w[f"{consumer}.weight"] = r1.right(w[f"{consumer}.weight"])
        for producer in (family.o, family.down):
            w[f"{producer}.weight"] = r1.transposed_left(w[f"{producer}.weight"])
            if f"{producer}.bias" in w:
                w[f"{producer}.bias"] = r1.right(w[f"{producer}.bias"])

    if config.r2 is not None:
        r2 = Rotation(config.r2, head_dim, config.seed, f"r2/{block}")
        value, output = f"{family.v}.weight", f"{family.o}.weight"
        heads = w[value].unflatten(0, (-1, head_dim))  # [kv heads, head_dim, hidden]
        w[value] = r2.right(heads.transpose(1, 2)).transpose(1, 2).reshape(w[value].shape)
        if f"{family.v}.bias" in w:
            w[f"{family.v}.bias"] = r2.right(w[f"{family.v}.bias"].unflatten(0, (-1, head_dim))).flatten()
        w[output] = r2.right(w[output].unflatten(1, (-1, head_dim))).flatten(1)

    if config.r4:
        w[f"{family.down}.weight"] = hadamard_transform(w[f"{family.down}.weight"], config.r4_block)
    return {name: _cast(tensor, dtype, f"block {block}: {name}").contiguous() for name, tensor in w.items()}


def _cast(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Return the tensor in `dtype`, on the CPU; NumericalError if a value lies beyond the type's range."""
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        name = str(dtype).removeprefix("torch.")
        raise NumericalError(
            f"{what} reaches {float(tensor.abs().max()):.3g} once folded, {name} ends at {torch.finfo(dtype).max:.3g}; "
            f"set model.dtype=bfloat16 or float32"
        )
    return cast.cpu()


@dataclass(frozen=True, slots=True)
class Ends:
    """What lies outside the blocks."""

    embedding: Tensor
    """[vocab, hidden]"""

    gain: Tensor
    """[hidden], of the final norm."""

    head: Tensor
    """[vocab, hidden]"""


def rotate_ends(
    ends: Ends, config: RotateConfig, *, dtype: torch.dtype, device: torch.device, rows: int = 8192
) -> Ends:
    """Return embedding and head on the rotated stream, in `dtype`, on the CPU; `rows` vocabulary entries at a time.

    The final norm's gain is folded into the head. Tied embeddings leave untied: the head alone takes the gain.
    """
    check_finite([("embedding", ends.embedding), ("final norm", ends.gain), ("head", ends.head)], "model ends")
    r1 = None if config.r1 is None else _residual_rotation(config.r1, ends.embedding.shape[1], config.seed)
    gain = ends.gain.to(device=device, dtype=torch.float64)

    def rotated(matrix: Tensor, scale: Tensor | None, what: str) -> Tensor:
        result = torch.empty(matrix.shape, dtype=dtype)
        for start in range(0, len(matrix), rows):
            part = matrix[start : start + rows].to(device).to(torch.float64)
            part = part if scale is None else part * scale
            result[start : start + rows] = _cast(part if r1 is None else r1.right(part), dtype, what)
        return result

    return Ends(
        rotated(ends.embedding, None, "embedding"),
        torch.ones_like(ends.gain, dtype=dtype),
        rotated(ends.head, gain, "head"),
    )
