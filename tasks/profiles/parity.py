"""The parity gate: a folder, loaded anew by stock tools in a process of its own, computes what the simulation does."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefixquant.tasks.errors import PrefixQuantError
from prefixquant.tasks.profiles.folder import LOADER, ExportedModel, needs_loader
from prefixquant.tasks.profiles.prefix import ADAPTER
from prefixquant.tasks.profiles.profile import Profile
from prefixquant.tasks.profiles.simulate import Simulation

SEQUENCES, LENGTH = 2, 48
"""Of the token ids that are compared."""

ROTATED_TOLERANCE = 1e-4
"""Largest difference of two logits with online rotations, which two implementations may sum in another order."""


class ParityError(PrefixQuantError):
    """The exported folder does not compute what the simulation does, or cannot be loaded."""


@dataclass(frozen=True, slots=True)
class Parity:
    """What the gate found."""

    largest_difference: float
    """Largest absolute difference of two logits, in float32."""

    tolerance: float
    """Largest one allowed: 0 without online rotations."""

    logits: int
    """Logits compared."""

    standard_deviation: float
    """Of the simulation's logits, to compare the difference with."""

    versions: dict[str, str]
    """Of the packages that loaded the folder."""


def check_parity(
    model: ExportedModel, profile: Profile, out: Path, exempt: tuple[int, ...] = (), ids_NT: Tensor | None = None
) -> Parity:
    """Return how far the logits of an exported folder are from the simulation's, both in float32 on the CPU.

    The other process holds the model whole. `ids_NT`: token ids to compare on; None: random ones.

    Raises:
        ParityError: they differ by more than the tolerance, or the folder cannot be loaded without this package.
    """
    if ids_NT is None:
        generator = torch.Generator().manual_seed(0)
        ids_NT = torch.randint(0, model.config.vocab_size, (SEQUENCES, LENGTH), generator=generator)
    transforms = profile.transforms(model.transforms)
    tolerance = ROTATED_TOLERANCE if transforms.r3 or transforms.r4 else 0.0
    simulation = Simulation(model, profile, torch.device("cpu"), dtype=torch.float32)
    wanted = simulation.logits(simulation.hidden(ids_NT, exempt))
    found, versions = _reloaded_logits(model, profile, out, simulation.with_prefix(ids_NT))
    found = found[:, found.shape[1] - wanted.shape[1] :]
    parity = Parity(
        largest_difference=float((found.double() - wanted.double()).abs().max()),
        tolerance=tolerance,
        logits=wanted.numel(),
        standard_deviation=float(wanted.std()),
        versions=versions,
    )
    if not parity.largest_difference <= tolerance:
        raise ParityError(
            f"{out}: reloaded by transformers {versions['transformers']}, the logits differ from the simulation's by "
            f"up to {parity.largest_difference:.3g} (their standard deviation is {parity.standard_deviation:.3g}), "
            f"{tolerance:g} is allowed; do not use the folder, and report it with the versions {versions}"
        )
    return parity


def _reloaded_logits(model: ExportedModel, profile: Profile, out: Path, ids: Tensor) -> tuple[Tensor, dict[str, str]]:
    has_adapter = profile.prefix == "kv" and bool(model.prefix_token_ids)
    with tempfile.TemporaryDirectory() as scratch:
        ids_file, logits_file, report, job = (
            Path(scratch, name) for name in ("ids.safetensors", "logits.safetensors", "report.json", "job.json")
        )
        save_file({"ids": ids.contiguous()}, ids_file)
        settings: dict[str, Any] = {
            "folder": str(out),
            "adapter": str(out / ADAPTER) if has_adapter else None,
            "loader": str(out / LOADER) if needs_loader(profile, model) else None,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "ids": str(ids_file),
            "out": str(logits_file),
            "report": str(report),
        }
        job.write_text(json.dumps(settings))
        script = Path(__file__).with_name("reload.py")
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.run(
            [sys.executable, "-P", str(script), str(job)],
            env=os.environ | offline,
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode != 0:
            reason = next((line for line in reversed(process.stderr.splitlines()) if "Error" in line), process.stderr)
            raise ParityError(f"{out} cannot be loaded by transformers: {reason}")
        said = json.loads(report.read_text())
        if said["ours"]:
            raise ParityError(f"{out}: loading it imported {', '.join(said['ours'])}; stock tools must be enough")
        return load_file(logits_file)["logits"], said["versions"]
