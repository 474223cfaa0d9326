"""What a quantizer does to one tensor: bits, symmetry, granularity. Plain, validated data."""

from dataclasses import dataclass
from typing import Literal

from prefixquant.tasks.errors import ConfigError

Mode = Literal["static", "dynamic"]


def _check_bits(owner: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ConfigError(f"{owner}.bits must be 2 to 8, got {bits}; write `{owner}: off` to leave it unquantized")


def _check_group(owner: str, granularity: str, group_size: int | None) -> None:
    if (granularity == "group") != (group_size is not None):
        raise ConfigError(
            f"{owner}.group_size goes with granularity 'group' and with nothing else, "
            f"got granularity {granularity!r} and group_size {group_size}"
        )
    if group_size is not None and group_size < 1:
        raise ConfigError(f"{owner}.group_size must be at least 1, got {group_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpec:
    """How the seven linears of a block are quantized. Always static."""

    bits: int = 4
    """Bits of a code, 2 to 8."""

    symmetric: bool = True
    """True: codes in [-2^(b-1), 2^(b-1)-1] and no zero point. False: codes in [0, 2^b-1] with a zero point."""

    granularity: Literal["tensor", "channel", "group"] = "channel"
    """One scale per matrix, per output channel, or per `group_size` consecutive inputs of an output channel."""

    group_size: int | None = None
    """Inputs that share a scale; only with granularity `group`."""

    def __post_init__(self) -> None:
        _check_bits("quantize.weights", self.bits)
        _check_group("quantize.weights", self.granularity, self.group_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSpec:
    """How the four input sites of a block are quantized: norm1 and norm2 outputs, o_proj and down_proj inputs."""

    bits: int = 4
    """Bits of a code, 2 to 8."""

    symmetric: bool = True
    """True: codes in [-2^(b-1), 2^(b-1)-1] and no zero point. False: codes in [0, 2^b-1] with a zero point."""

    mode: Mode = "static"
    """static: scales fixed by calibration. dynamic: scales computed from each token at run time."""

    granularity: Literal["tensor", "token", "group"] = "tensor"
    """Static: `tensor` or `group`. Dynamic: `token` or `group` (per token and group)."""

    group_size: int | None = None
    """Channels that share a scale; only with granularity `group`."""

    def __post_init__(self) -> None:
        _check_bits("quantize.activations", self.bits)
        _check_group("quantize.activations", self.granularity, self.group_size)
        _check_mode("quantize.activations", self.mode, self.granularity)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyValueSpec:
    """How keys or values are quantized on their way into the KV cache."""

    bits: int = 4
    """Bits of a code, 2 to 8."""

    symmetric: bool = True
    """True: codes in [-2^(b-1), 2^(b-1)-1] and no zero point. False: codes in [0, 2^b-1] with a zero point."""

    mode: Mode = "static"
    """static: scales fixed by calibration. dynamic: scales computed from each token at run time."""

    granularity: Literal["tensor", "token", "head", "group"] = "head"
    """`head`: one scale a KV head (dynamic: a token and head). `group`: `group_size` channels of a head share one.
    `tensor`: one for all heads (static). `token`: one for all heads of a token (dynamic)."""

    group_size: int | None = None
    """Channels of a head that share a scale; only with granularity `group`."""

    before_rope: bool = False
    """Keys only: quantize before the rotary embedding instead of after it (and after R3)."""

    def __post_init__(self) -> None:
        _check_bits("quantize.keys or values", self.bits)
        _check_group("quantize.keys or values", self.granularity, self.group_size)
        _check_mode("quantize.keys or values", self.mode, self.granularity)


def _check_mode(owner: str, mode: Mode, granularity: str) -> None:
    wrong = "token" if mode == "static" else "tensor"
    if granularity == wrong:
        other = "tensor" if mode == "static" else "token"
        raise ConfigError(f"{owner}: granularity {granularity!r} contradicts mode {mode!r}; use {other!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig:
    """What is quantized in every block. A group that is None stays in full precision."""

    weights: WeightSpec | None = WeightSpec()
    """Weights of q, k, v, o, gate, up and down_proj."""

    activations: ActivationSpec | None = ActivationSpec()
    """Inputs of those linears."""

    keys: KeyValueSpec | None = KeyValueSpec()
    """Keys in the KV cache."""

    values: KeyValueSpec | None = KeyValueSpec()
    """Values in the KV cache."""

    def __post_init__(self) -> None:
        if self.values is not None and self.values.before_rope:
            raise ConfigError(
                "quantize.values.before_rope: values pass no rotary embedding; only keys have this choice"
            )
