"""Small recipes, and a run of their graph in this process, node after node, without Ray."""

from pathlib import Path
from typing import Any

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.access import Byproduct
from prefixquant.pipeline.artifacts import load_artifact
from prefixquant.pipeline.build import Source, build_graph, load_node
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.recipe import Recipe, parse_recipe
from prefixquant.pipeline.source import source_fingerprint
from prefixquant.pipeline.worker import NodeCall, NodeResult, run_node
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
    """Run every node of a recipe's graph and return graph, model and what each node cost."""
    recipe = data if isinstance(data, Recipe) else parse_recipe(data)
    path = Path(recipe.model.source)
    source = Source(path=path, fingerprint=source_fingerprint(path))
    results: dict[str, NodeResult] = {}
    _run(Graph([load_node(source)]), store, results)
    model = LoadedModel.from_artifact(load_artifact(store, Graph([load_node(source)]).key("load")))
    graph = build_graph(recipe, source, model)
    _run(graph, store, results)
    return graph, model, results


def _run(graph: Graph, store: ArtifactStore, results: dict[str, NodeResult]) -> None:
    for name in graph.order:
        node = graph.nodes[name]
        if node.task.run is None or (store.has(graph.key(name)) and not graph.is_forced(name, store.keys())):
            continue
        results[name] = run_node(
            NodeCall(
                store_url=store.url,
                node=name,
                task=node.task,
                config=node.config,
                key=graph.key(name),
                input_keys=graph.input_keys(name),
                byproducts={label: Byproduct(key=graph.key(each), meta={}) for label, each in node.byproducts.items()},
                cpus=1,
            )
        )
