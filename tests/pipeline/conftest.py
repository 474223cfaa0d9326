"""A small world to run the product in: a tiny model, local texts and a store, all below one folder."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from prefixquant.cluster.ray_session import RaySession
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.overrides import apply_overrides
from prefixquant.pipeline.plan import Plan
from prefixquant.pipeline.recipe import Recipe, parse_recipe
from prefixquant.pipeline.run import RunOptions, RunSummary, plan_recipe, run_recipe

SENTENCE = "the prefix carries what one static scale per tensor cannot, so keep it whole and in front"


def write_text(path: Path, seed: int, documents: int = 8) -> Path:
    """Write a .jsonl file of random sentences and return its path."""
    rng = random.Random(seed)
    lines = (json.dumps({"text": " ".join(rng.choices(SENTENCE.split(), k=60))}) for _ in range(documents))
    path.write_text("\n".join(lines))
    return path


class World:
    """Runs recipes on its model. Everything it makes lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.store_path = folder, folder / "model", folder / "store"
        self.calibration = write_text(folder / "calibration.jsonl", 0)
        self.text = write_text(folder / "evaluation.jsonl", 1)

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(str(self.store_path))

    def data(self, *overrides: str) -> dict[str, Any]:
        """Return a recipe that takes a second or two, as YAML would give it."""
        data = {
            "name": "tiny",
            "model": {"source": str(self.model)},
            "data": {
                "calibration": str(self.calibration),
                "statistics": {"sequences": 4, "length": 32},
                "search": {"sequences": 2, "length": 32},
            },
            "search": {"coarse_points": 3, "fine_points": 2, "weight_points": 4},
            "evaluate": {"texts": [str(self.text)], "window": 32, "max_windows": 4},
        }
        return apply_overrides(data, overrides)

    def recipe(self, *overrides: str) -> Recipe:
        return parse_recipe(self.data(*overrides))

    def recipe_file(self, *overrides: str) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.data(*overrides)))
        return path

    def run(self, *overrides: str, tracking: str | None = "off", out: Path | None = None) -> RunSummary:
        options = RunOptions(store=str(self.store_path), tracking=tracking, out=out)
        return run_recipe(self.recipe(*overrides), options)

    def plan(self, *overrides: str) -> Plan:
        return plan_recipe(self.recipe(*overrides), str(self.store_path))[1]

    def graph(self, *overrides: str) -> Graph:
        return plan_recipe(self.recipe(*overrides), str(self.store_path))[0]

    def keys(self, *overrides: str) -> dict[str, str]:
        """Return node name -> key of a recipe."""
        return {entry.node.name: entry.key for entry in self.plan(*overrides).entries}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: RaySession) -> World:
    """A world whose recipe has run, to be copied: a run of another recipe in it costs what differs."""
    world = World(tmp_path_factory.mktemp("finished"))
    tiny.write_tiny_model(world.model, blocks=2)
    world.run()
    return world


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: RaySession) -> Iterator[World]:
    """A world with a Llama of two blocks and no store, on the shared Ray."""
    monkeypatch.setenv("PREFIXQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PREFIXQUANT_STORE", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of tiny products only wait for each other
    world = World(tmp_path)
    tiny.write_tiny_model(world.model, blocks=2)
    yield world
    torch.set_num_threads(threads)


@pytest.fixture
def done(world: World, finished: World) -> World:
    """A world of the same model and texts with the store of the finished run."""
    shutil.copytree(finished.store_path, world.store_path)
    return world


@pytest.fixture(scope="module")
def finished_copy(tmp_path_factory: pytest.TempPathFactory, finished: World) -> World:
    """A copy of the finished world for the tests of one file, which may run more in it."""
    world = World(tmp_path_factory.mktemp("copy"))
    shutil.copytree(finished.model, world.model)
    shutil.copytree(finished.store_path, world.store_path)
    return world
