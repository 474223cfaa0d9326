"""The export profiles: what each keeps of a quantized model, and what it needs the recipe to be."""

from dataclasses import dataclass, replace
from typing import Literal

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import ActivationSpec, QuantizeConfig, WeightSpec

PACKED, INTEGERS = "pack-quantized", "int-quantized"
"""Formats of compressed-tensors: codes packed in int32 words, or one int8 a code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One way to write a quantized model for others to load."""

    name: str
    """As users write it."""

    engine: str
    """What loads it: `transformers` or `vllm`."""

    scheme: str
    """Key into the table of what engines run (`engines.yaml`)."""

    flag: str = ""
    """What the engine's command line needs besides the folder."""

    format: str = PACKED
    """How compressed-tensors stores the weights."""

    weight_groups: bool = True
    """Whether the engine takes weights whose scales are shared by groups of inputs."""

    weight_bits: int | None = 4
    """Bits of a stored weight; codes of fewer bits are stored in these. None: the recipe's."""

    activations: Literal["recipe", "static", "dynamic", "none"] = "recipe"
    """What is said of the linears' inputs."""

    activation_bits: int = 4
    """Bits of those, where the recipe does not say."""

    keeps_kv: bool = False
    """Whether keys and values stay quantized as the recipe says, with R3 where it has it."""

    prefix: Literal["kv", "tokens"] = "tokens"
    """How the prefix gets in front: as keys and values in full precision, or as ordinary tokens."""

    r4: Literal["any", "block", "off"] = "off"
    """Which online rotation of down_proj's input the engine runs."""

    def adapted(self, quantize: QuantizeConfig) -> QuantizeConfig:
        """Return what the exported model quantizes."""
        weights = quantize.weights
        if weights is not None and self.weight_bits is not None:
            weights = replace(weights, bits=self.weight_bits)
        activations = {
            "recipe": quantize.activations,
            "static": ActivationSpec(bits=self.activation_bits),
            "dynamic": ActivationSpec(bits=self.activation_bits, mode="dynamic", granularity="token"),
            "none": None,
        }[self.activations]
        keys, values = (quantize.keys, quantize.values) if self.keeps_kv else (None, None)
        return QuantizeConfig(weights=weights, activations=activations, keys=keys, values=values)

    def transforms(self, transforms: OnlineTransforms) -> OnlineTransforms:
        """Return the online rotations of the exported model.

        R3 matters to quantized keys alone: queries and keys turn together.
        """
        return transforms if self.keeps_kv else replace(transforms, r3=False)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="hf-exact",
            engine="transformers",
            scheme="hf-exact",
            weight_bits=None,
            keeps_kv=True,
            prefix="kv",
            r4="any",
        ),
        Profile(name="vllm-w4a16", engine="vllm", scheme="w4a16", activations="none", r4="block"),
        Profile(
            name="vllm-w8a8-static",
            engine="vllm",
            scheme="w8a8-static",
            format=INTEGERS,
            weight_groups=False,
            weight_bits=8,
            activations="static",
            activation_bits=8,
            r4="block",
        ),
        Profile(
            name="vllm-w4a8-static",
            engine="vllm",
            scheme="w4a8-static",
            flag="--quantization humming",
            weight_groups=False,
            activations="static",
            activation_bits=8,
        ),
        Profile(
            name="vllm-w4a4-static",
            engine="vllm",
            scheme="w4a4-static",
            flag="--quantization humming",
            activations="static",
        ),
        Profile(name="vllm-w4a4-dynamic", engine="vllm", scheme="w4a4-dynamic", activations="dynamic", r4="block"),
    )
}


def find_profile(name: str) -> Profile:
    """Return a profile. Raises ConfigError listing the known ones."""
    if name not in PROFILES:
        raise ConfigError(f"there is no export profile {name!r}; known are {', '.join(PROFILES)}")
    return PROFILES[name]


def check_profile(profile: Profile, quantize: QuantizeConfig, transforms: OnlineTransforms) -> None:
    """Raise ConfigError, naming the recipe's keys, unless the profile can hold such a model."""
    problems = [*_weights(profile, quantize.weights), *_activations(profile, quantize.activations)]
    if profile.keeps_kv:
        problems += _keys_and_values(quantize)
    if transforms.r4 and profile.r4 == "off":
        problems.append("its engine applies no online rotation; set rotate.r4=false")
    if transforms.r4 and profile.r4 == "block" and transforms.r4_block is None:
        problems.append("its engine rotates down_proj's input in blocks; set rotate.r4_block=128 or rotate.r4=false")
    if problems:
        raise ConfigError(f"export profile {profile.name} cannot hold this model: {'; '.join(problems)}")


def _weights(profile: Profile, weights: WeightSpec | None) -> list[str]:
    if weights is None:
        return ["there are no integer weights; quantize.weights must not be off"]
    problems = []
    if not weights.symmetric:
        problems.append("zero points of weights are not written; set quantize.weights.symmetric=true")
    if profile.weight_bits is not None and weights.bits > profile.weight_bits:
        problems.append(f"its weights have {profile.weight_bits} bits; set quantize.weights.bits={profile.weight_bits}")
    if weights.granularity == "tensor" or (weights.granularity == "group" and not profile.weight_groups):
        problems.append("weights need a scale a channel; set quantize.weights.granularity=channel")
    return problems


def _activations(profile: Profile, activations: ActivationSpec | None) -> list[str]:
    if profile.activations in ("none", "dynamic") or (profile.activations == "recipe" and activations is None):
        return []
    if activations is None:
        return ["it needs static scales of activations; quantize.activations must not be off"]
    problems = []
    if activations.mode != "static" or activations.granularity != "tensor":
        problems.append("activations need a static scale a tensor; set quantize.activations.mode=static")
    if not activations.symmetric:
        problems.append("zero points of activations are not written; set quantize.activations.symmetric=true")
    if profile.activations == "static" and activations.bits > profile.activation_bits:
        bits = profile.activation_bits
        problems.append(f"its activations have {bits} bits; set quantize.activations.bits={bits}")
    return problems


def _keys_and_values(quantize: QuantizeConfig) -> list[str]:
    keys = quantize.keys
    if keys != quantize.values:
        return ["one scheme holds for keys and values; make quantize.keys and quantize.values equal"]
    if keys is None:
        return []
    problems = []
    if keys.before_rope or keys.mode == "dynamic":
        problems.append("keys are quantized behind the rotary embedding and static; set quantize.keys so")
    if keys.granularity != "head":
        problems.append("keys and values need a scale a head; set quantize.keys.granularity=head, values likewise")
    if not keys.symmetric:
        problems.append("zero points of keys are not written; set quantize.keys.symmetric=true, values likewise")
    return problems
