"""Export a quantized model as a profile: checked, planned, written, measured, compared, described."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.export import DESCRIPTION
from prefixquant.tasks.model.block import block_shapes
from prefixquant.tasks.profiles.card import card_text
from prefixquant.tasks.profiles.exemptions import Exemptions, plan_exemptions
from prefixquant.tasks.profiles.folder import ExportedModel, write_json, write_profile
from prefixquant.tasks.profiles.losses import check_target, losses_text
from prefixquant.tasks.profiles.parity import Parity, check_parity
from prefixquant.tasks.profiles.profile import PROFILES, Profile
from prefixquant.tasks.profiles.simulate import Simulation

MEASURED_TOKENS = 8192
"""Tokens at most of the windows that a profile is measured on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileExportConfig:
    """How a profile is exported."""

    exempt: tuple[int, ...] | None = None
    """Blocks whose down_proj stays in 16 bit. None: as few as measurements ask for, where the prefix is plain tokens
    and scales are static; none elsewhere."""

    verify: bool = True
    """Load the folder anew in a process of its own and compare its logits with the simulation's."""

    gpu: str | None = None
    """GPU generation to serve on; None: warn of those that run something else."""

    allow_downgrade: bool = False
    """Export also for a GPU on which the engine silently runs something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileExport:
    """What was written, and what is known of it."""

    profile: str
    exempt: tuple[int, ...]
    """Blocks whose down_proj stays in 16 bit."""
    exemptions: Exemptions | None
    """Evidence for them, where they were planned."""
    perplexity: float | None
    """Of the profile over the windows given, by the simulation. None: none were given."""
    perplexity_prefix_kv: float | None
    """Of the model as quantized, its prefix as keys and values, over the same windows."""
    measured_tokens: int
    """Tokens of those windows."""
    parity: Parity | None
    """What the gate found; None if it was not asked for."""
    folder_bytes: int
    """Of all files written."""
    bf16_bytes: int
    """The same model's weights in bfloat16, head and embedding untied."""
    write_seconds: float
    """Of writing the folder, without planning, measuring and comparing."""
    warnings: tuple[str, ...]
    """GPUs on which the engine silently runs something else."""

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self)


def export_profile(
    folder: Path,
    profile: Profile,
    out: Path,
    config: ProfileExportConfig,
    *,
    planning_NT: Tensor | None,
    measuring_NT: Tensor | None,
    device: torch.device,
    origin: Mapping[str, Any],
) -> ProfileExport:
    """Write a profile of an exported folder to an empty one and return what was measured on the way.

    Args:
        folder: as `prefixquant run --out` writes it.
        profile: what is written.
        out: where.
        config: how.
        planning_NT: windows of token ids on which exemptions are planned.
        measuring_NT: windows on which perplexity is measured; None: it is not.
        device: where blocks run; the gate runs on the CPU.
        origin: what the card tells of the run: its recipe and the perplexities it measured.

    Raises:
        ConfigError: the profile cannot hold the model, or the engine would silently run something else.
        ParityError: the folder does not compute what the simulation does.
        CheckpointError: a file of the folder is missing or damaged.
    """
    model = ExportedModel(folder)
    model.check(profile)
    warnings = check_target(profile, config.gpu, allow_downgrade=config.allow_downgrade)
    simulation = Simulation(model, profile, device, dtype=model.dtype)
    exempt, planned = _exemptions(model, profile, config, simulation, _few(planning_NT))
    windows = _few(measuring_NT)
    start = time.monotonic()
    described = write_profile(model, profile, out, exempt=exempt)
    seconds = time.monotonic() - start
    perplexity = reference = None
    if windows is not None:
        perplexity = _perplexity(simulation, windows, exempt)
        exact = Simulation(model, PROFILES["hf-exact"], device, dtype=model.dtype)
        reference = perplexity if profile.name == "hf-exact" else _perplexity(exact, windows)
    parity = check_parity(model, profile, out, exempt) if config.verify else None
    result = ProfileExport(
        profile=profile.name,
        exempt=exempt,
        exemptions=planned,
        perplexity=perplexity,
        perplexity_prefix_kv=reference,
        measured_tokens=0 if windows is None else windows.numel(),
        parity=parity,
        folder_bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        bf16_bytes=2 * num_parameters(model),
        write_seconds=seconds,
        warnings=tuple(warnings),
    )
    has_prefix = bool(model.prefix_token_ids)
    text = losses_text(profile, model.quantize, model.transforms, has_prefix=has_prefix, exempt=exempt)
    (out / "LOSSES.md").write_text(text, encoding="utf-8")
    (out / "README.md").write_text(card_text(model, profile, result.to_json(), described, origin), encoding="utf-8")
    write_json(out / DESCRIPTION, model.description | {"export": {**described, "measured": result.to_json()}})
    return result


def _exemptions(
    model: ExportedModel,
    profile: Profile,
    config: ProfileExportConfig,
    simulation: Simulation,
    windows_NT: Tensor | None,
) -> tuple[tuple[int, ...], Exemptions | None]:
    if config.exempt is not None:
        beyond = [block for block in config.exempt if not 0 <= block < model.num_blocks]
        if beyond:
            raise ConfigError(
                f"exempt: there is no block {beyond[0]}; the model has blocks 0 to {model.num_blocks - 1}"
            )
        return config.exempt, None
    if not wants_exemptions(profile) or not model.prefix_token_ids:
        return (), None
    if windows_NT is None:
        raise ConfigError(
            f"export profile {profile.name} has the prefix as ordinary tokens, which its static scales clip; give a "
            f"text to find out which down_proj must stay in 16 bit, or name the blocks (--text, --exempt)"
        )
    planned = plan_exemptions(simulation, windows_NT)
    return planned.blocks, planned


def wants_exemptions(profile: Profile) -> bool:
    """Return whether a profile's static scales clip a prefix of ordinary tokens."""
    return profile.prefix == "tokens" and profile.activations == "static"


def _few(windows_NT: Tensor | None) -> Tensor | None:
    return None if windows_NT is None else windows_NT[: max(1, MEASURED_TOKENS // windows_NT.shape[1])]


def _perplexity(simulation: Simulation, windows_NT: Tensor, exempt: Sequence[int] = ()) -> float:
    return simulation.perplexity(simulation.hidden(windows_NT, exempt), windows_NT)


def num_parameters(model: ExportedModel) -> int:
    """Return how many weights the model has, head and embedding both counted."""
    blocks = sum(
        shape.numel() for block in range(model.num_blocks) for shape in block_shapes(model.config, block).values()
    )
    return blocks + 2 * model.config.vocab_size * model.config.hidden_size + model.config.hidden_size
