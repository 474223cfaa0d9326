"""The task that exports a profile: its folder is the artifact."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from prefixquant.pipeline.graph import Resources, Task
from prefixquant.pipeline.keys import outside_key
from prefixquant.pipeline.worker import TaskContext, TaskOutput
from prefixquant.tasks.artifact import Artifact
from prefixquant.tasks.export import ENDS_FILE, PREFIX_FILE, block_file
from prefixquant.tasks.profiles.export import ProfileExportConfig, export_profile
from prefixquant.tasks.profiles.profile import find_profile

PROFILE = Resources(gpus=1, cpus=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileNode:
    """Which profile is written, and how."""

    profile: str
    export: ProfileExportConfig

    recipe: str = field(metadata=outside_key())
    """Of the run, as JSON, for the card."""


def run_profile(context: TaskContext) -> TaskOutput:
    """Write a profile of the finished model to a folder, measure it, and compare it with the simulation."""
    config: ProfileNode = context.config
    assert context.scratch is not None
    base, out = context.scratch() / "exported", context.scratch() / "profile"
    _write_exported(context, base)
    out.mkdir()
    measuring = context.inputs["measuring"].tensors["windows"] if "measuring" in context.inputs else None
    result = export_profile(
        base,
        find_profile(config.profile),
        out,
        config.export,
        planning_NT=context.inputs["planning"].tensors["windows"],
        measuring_NT=measuring,
        device=context.device,
        origin={"recipe": json.loads(config.recipe)},
    )
    files = {path.relative_to(out).as_posix(): path for path in sorted(out.rglob("*")) if path.is_file()}
    metrics: dict[str, Any] = {
        "ppl": result.perplexity,
        "folder_bytes": result.folder_bytes,
        "write_seconds": result.write_seconds,
        "exempt": len(result.exempt),
        "largest_difference": None if result.parity is None else result.parity.largest_difference,
    }
    record = json.loads(json.dumps(result.to_json()))
    known = {name: value for name, value in metrics.items() if value is not None}
    return TaskOutput(Artifact(record=record, large_files=files), metrics=known)


def _write_exported(context: TaskContext, folder: Path) -> None:
    """Write the folder that `prefixquant run --out` gives, a block at a time."""
    folder.mkdir()
    for name, content in context.inputs["export"].files.items():
        (folder / name).write_bytes(content)
    for index, artifact in enumerate(context.inputs["blocks"]):
        save_file(artifact.tensors, folder / block_file(index), metadata={"format": "pt"})
    save_file(context.inputs["ends"].tensors, folder / ENDS_FILE, metadata={"format": "pt"})
    prefix = context.inputs["prefix"].tensors
    if prefix:
        save_file(prefix, folder / PREFIX_FILE, metadata={"format": "pt"})


EXPORT_PROFILE = Task(name="export_profile", version=1, run=run_profile)
