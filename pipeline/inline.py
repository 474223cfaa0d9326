"""Run a graph in this process, node after node, without Ray: for one GPU, or where nothing can be installed."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.access import Byproduct
from prefixquant.pipeline.artifacts import load_artifact
from prefixquant.pipeline.build import Source, build_graph, load_node
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.machines import local_machine
from prefixquant.pipeline.recipe import Recipe
from prefixquant.pipeline.source import resolve_source, source_fingerprint
from prefixquant.pipeline.worker import Messages, NodeCall, NodeResult, run_node
from prefixquant.tasks.load import LoadedModel


@dataclass(frozen=True, slots=True)
class InlineRuns:
    """Runs graphs here. What a store holds is not computed again, so several graphs share what they have in common."""

    store: ArtifactStore
    device: torch.device

    listener: Messages | None = None
    """Told what tasks say, and `{"node": NAME}` when one begins."""

    def open(self, recipe: Recipe) -> tuple[Graph, LoadedModel]:
        """Return the graph of a recipe, and its model, whose checkpoint is looked over if it has not been.

        Raises what `resolve_source`, `load_model` and `build_graph` raise.
        """
        path = resolve_source(recipe.model)
        source = Source(path=path, fingerprint=source_fingerprint(path))
        load = Graph([load_node(source)])
        self.run(load, ["load"])
        model = LoadedModel.from_artifact(load_artifact(self.store, load.key("load")))
        machine = local_machine() if self.device.type == "cuda" else None
        return build_graph(recipe, source, model, machine=machine), model

    def run(self, graph: Graph, targets: Iterable[str]) -> dict[str, NodeResult]:
        """Make the targets and all that they are made of; return what each node that ran has cost.

        Raises what a task raises; what was stored before it stays.
        """
        results: dict[str, NodeResult] = {}
        needed = _needed(graph, targets)
        for name in graph.order:
            if name not in needed or graph.nodes[name].task.run is None:
                continue
            if self.store.has(graph.key(name)) and not graph.is_forced(name, self.store.keys()):
                continue
            results[name] = self._run(graph, name)
        return results

    def _run(self, graph: Graph, name: str) -> NodeResult:
        if self.listener is not None:
            self.listener.put({"node": name})
        node = graph.nodes[name]
        call = NodeCall(
            store_url=self.store.url,
            node=name,
            task=node.task,
            config=node.config,
            key=graph.key(name),
            input_keys=graph.input_keys(name),
            byproducts={
                label: Byproduct(key=graph.key(each), meta=graph.nodes[each].meta())
                for label, each in node.byproducts.items()
            },
            cpus=torch.get_num_threads(),
            mailbox=self.listener,
        )
        return run_node(call, device=self.device)


def _needed(graph: Graph, targets: Iterable[str]) -> set[str]:
    """Return the targets and everything that they are made of."""
    found: set[str] = set()
    waiting = list(targets)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            yielder = graph.yielder(name)
            waiting += [*graph.parents(name), *([] if yielder is None else [yielder])]
    return found
