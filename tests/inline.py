"""Small recipes, and a run of their graph in this process, without Ray."""

from pathlib import Path
from typing import Any

import torch

from prefixquant.cluster.inline_session import InlineSession
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.build import build_graph
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.loading import look_over, prepare
from prefixquant.pipeline.recipe import Recipe, parse_recipe
from prefixquant.pipeline.runner import execute
from prefixquant.pipeline.worker import NodeResult
from prefixquant.tasks.load import LoadedModel

TEXT = "\n\n".join(f"Paragraph {number}: the {number * 7919 % 997} quick foxes, and so on." for number in range(60))


def small_recipe(folder: Path, model: Path, **groups: Any) -> dict[str, Any]:
    """Return a recipe's data: three windows of 32 tokens and the smallest grids; texts are written to `folder`."""
    for name in ("calibration.txt", "evaluation.txt"):
        if not (folder / name).exists():
            (folder / name).write_text(TEXT)
    windows = {"sequences": 3, "length": 32}
    return {
        "name": "small",
        "model": {"source": str(model)},
        "data": {"calibration": str(folder / "calibration.txt"), "statistics": windows, "search": windows},
        "search": {"coarse_points": 3, "fine_points": 2, "weight_points": 4},
        "evaluate": {"texts": [str(folder / "evaluation.txt")], "window": 32, "max_windows": 3},
    } | groups


def run_inline(data: dict[str, Any] | Recipe, store: ArtifactStore) -> tuple[Graph, LoadedModel, dict[str, NodeResult]]:
    """Run every node of a recipe's graph on the CPU and return graph, model and what each node cost."""
    recipe = data if isinstance(data, Recipe) else parse_recipe(data)
    session = InlineSession(device="cpu", cpus=torch.get_num_threads())
    source = prepare(recipe)
    model, loaded = look_over(source, store, lambda: session)
    graph = build_graph(recipe, source, model)
    result = execute(graph, graph.nodes, store, session)
    result.require()
    return graph, model, loaded | result.results
