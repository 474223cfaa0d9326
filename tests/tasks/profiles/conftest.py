"""A tiny model, quantized by a run and exported, without online rotations, with rotations in blocks, and with all."""

from pathlib import Path

import pytest
import tiny
from exported import Exported

from prefixquant.tasks.profiles.folder import ExportedModel

PREFIX_IDS = [5, 7, tiny.BOS]
CASES = {
    "plain": {"rotate": {"r3": False, "r4": False}},
    "blocks": {"rotate": {"r4_block": 16}},
    "full": {},
}


@pytest.fixture(scope="session")
def exported_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    prefix = {"prefix": {"tokens": PREFIX_IDS}}
    return {
        case: Exported(tmp_path_factory.mktemp(case), "llama", prefix | settings).folder
        for case, settings in CASES.items()
    }


@pytest.fixture(scope="session")
def plain(exported_folders: dict[str, Path]) -> ExportedModel:
    return ExportedModel(exported_folders["plain"])


@pytest.fixture(scope="session")
def blocks(exported_folders: dict[str, Path]) -> ExportedModel:
    return ExportedModel(exported_folders["blocks"])


@pytest.fixture(scope="session")
def full(exported_folders: dict[str, Path]) -> ExportedModel:
    return ExportedModel(exported_folders["full"])
