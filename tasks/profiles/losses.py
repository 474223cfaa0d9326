"""What engines really run of a folder: recorded in `engines.yaml`, looked up before anything is written."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal, get_args

import yaml

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.profiles.profile import Profile

Gpu = Literal["sm80", "sm89", "sm90", "sm100", "sm120"]
GPUS: tuple[Gpu, ...] = get_args(Gpu)
VERDICTS = ("exact", "real", "simulated", "downgraded", "refused", "dropped")
EVIDENCE = ("executed", "source")
ALSO_LOADED_BY = {"vllm": ("sglang",)}
"""Engines that read the same folders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What one version of an engine does with one thing."""

    engine: str
    version: str
    scheme: str
    """What a profile writes, or a part of a model."""
    flag: str
    """What the command line needs; empty for nothing."""
    gpu: str
    """A GPU generation, or `any`."""
    verdict: str
    runs: str
    """What is computed, in words."""
    evidence: str
    """`executed`: the engine's own code was run on this; `source`: it was read."""

    def __post_init__(self) -> None:
        for value, known in ((self.gpu, (*GPUS, "any")), (self.verdict, VERDICTS), (self.evidence, EVIDENCE)):
            if value not in known:
                raise ConfigError(
                    f"engines.yaml: {value!r} is none of {', '.join(known)} ({self.engine} {self.scheme})"
                )


@cache
def engine_rules() -> tuple[Rule, ...]:
    """Return the recorded rules."""
    text = (resources.files("prefixquant.tasks.profiles") / "engines.yaml").read_text(encoding="utf-8")
    return tuple(Rule(**entry) for entry in yaml.safe_load(text))


def rules_for(engine: str, scheme: str, gpu: str | None = None) -> list[Rule]:
    """Return what an engine does with a scheme, on one GPU generation or on all."""
    return [
        rule
        for rule in engine_rules()
        if rule.engine == engine and rule.scheme == scheme and (gpu is None or rule.gpu in ("any", gpu))
    ]


def downgrades(profile: Profile, gpu: str | None = None) -> list[Rule]:
    """Return where the profile's own command silently runs something else, or nothing."""
    found = rules_for(profile.engine, profile.scheme, gpu)
    return [rule for rule in found if rule.flag == profile.flag and rule.verdict in ("downgraded", "refused")]


def check_target(profile: Profile, gpu: str | None, *, allow_downgrade: bool) -> list[str]:
    """Return warnings for the GPUs that the profile's command silently downgrades on.

    Raises:
        ConfigError: it does so on the `gpu` that is asked for, and that is not allowed.
    """
    found = downgrades(profile, gpu)
    messages = []
    for rule in found:
        better = [other for other in rules_for(rule.engine, rule.scheme, rule.gpu) if other.verdict == "real"]
        advice = f"; started with {better[0].flag} it runs {better[0].runs}" if better else ""
        messages.append(f"{rule.engine} {rule.version} with `{rule.flag}` on {rule.gpu} runs {rule.runs}{advice}")
    if gpu is not None and found and not allow_downgrade:
        raise ConfigError(
            f"export profile {profile.name}: {'; '.join(messages)}. Choose another profile or GPU, or allow it "
            f"(--allow-downgrade, export.allow_downgrade=true)"
        )
    return messages


def parts(quantize: QuantizeConfig, transforms: OnlineTransforms, *, has_prefix: bool, profile: Profile) -> list[str]:
    """Return the parts of a model, by their names in the table, that an engine may leave out."""
    found = ["kv-static"] if quantize.keys is not None or quantize.values is not None else []
    found += ["r3"] if transforms.r3 else []
    if transforms.r4:
        found.append("r4-full" if transforms.r4_block is None else "r4-block")
    if has_prefix:
        found += ["prefix-kv", *(["prefix-tokens"] if profile.prefix == "tokens" else [])]
    return found


def losses_text(
    profile: Profile, quantize: QuantizeConfig, transforms: OnlineTransforms, *, has_prefix: bool, exempt: Iterable[int]
) -> str:
    """Return `LOSSES.md`: what of the model the engine runs, GPU by GPU, and what it does not."""
    engines = (profile.engine, *ALSO_LOADED_BY.get(profile.engine, ()))
    versions = ", ".join(version for engine in engines for version in _versions(engine))
    lines = [
        f"# What {' and '.join(engines)} run of this folder",
        "",
        f"Profile `{profile.name}`. Recorded from the engines' code ({versions}); `executed`: its own dispatch was run "
        f"on this scheme, `source`: it was read. Another version may do otherwise.",
        "",
        "| engine | what | started with | GPU | verdict | what is computed | evidence |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for scheme in (profile.scheme, *parts(quantize, transforms, has_prefix=has_prefix, profile=profile)):
        for rule in (rule for engine in engines for rule in rules_for(engine, scheme)):
            flag = f"`{rule.flag}`" if rule.flag else "nothing"
            cells = (rule.engine, rule.scheme, flag, rule.gpu, f"**{rule.verdict}**", rule.runs, rule.evidence)
            lines.append(f"| {' | '.join(cells)} |")
    adapted = profile.adapted(quantize)
    lines += ["", "Against the model as it was quantized:", ""]
    lines += [f"- {each}" for each in _differences(profile, quantize, adapted, sorted(exempt)) or ["nothing is lost"]]
    return "\n".join(lines) + "\n"


def _versions(engine: str) -> list[str]:
    return sorted({f"{rule.engine} {rule.version}" for rule in engine_rules() if rule.engine == engine})


def _differences(profile: Profile, quantize: QuantizeConfig, adapted: QuantizeConfig, exempt: list[int]) -> list[str]:
    found = []
    before, after = quantize.weights, adapted.weights
    if before is not None and after is not None and before.bits != after.bits:
        found.append(f"weights: the same codes of {before.bits} bits, stored in {after.bits}; nothing is rounded again")
    if quantize.activations is not None and adapted.activations is None:
        found.append("activations are not quantized; their scales are left out")
    if quantize.activations != adapted.activations and adapted.activations is not None:
        if adapted.activations.mode == "dynamic":
            found.append(
                "activations: a scale a token, its largest value unclipped; static scales and clips are left out"
            )
        elif quantize.activations is not None:
            bits = adapted.activations.bits
            found.append(f"activations: {bits} bits over the range that was found for {quantize.activations.bits}")
    if (quantize.keys, quantize.values) != (adapted.keys, adapted.values):
        found.append("keys and values enter the cache unquantized; their scales are left out")
    if profile.prefix == "tokens":
        found.append("the prefix is ordinary tokens, whose keys and values are computed by the quantized model")
    if exempt:
        found.append(f"down_proj of blocks {', '.join(map(str, exempt))} runs in 16 bit, its weight as quantized")
    return found
