"""A device that runs out of memory: the node runs once more with half as much at a time, and yields the same.

The device's limit is kept by hooks on the layers of the real blocks: one whose output is larger gets what a GPU's
allocator raises. The real thing is in tests/test_gpu.py.
"""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import Tensor, nn

from prefixquant.pipeline.artifacts import TENSORS, load_record
from prefixquant.pipeline.build import targets
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.runner import execute

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

MANY = (
    "data.statistics={sequences: 256, length: 32}",
    "data.search={sequences: 256, length: 32}",
    "search={coarse_points: 2, fine_points: 0, weight_points: 3}",
)
"""The 8192 tokens of one forward."""

FORWARD_BYTES = 8192 * 96 * 4
"""Of the largest output of a layer in such a forward: the tiny model has 96 intermediate channels."""

CONFINED = ("prefix", "calibrate", "stream[1]", "block[0]", "block[1]")


@dataclass(frozen=True)
class Limited:
    """A task's function on a small device."""

    run: Any
    limit: int
    for_backward: bool = False
    """Count only what a backward needs."""

    def __call__(self, context: Any) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            counts = isinstance(output, Tensor) and (output.requires_grad or not self.for_backward)
            if counts and output.nbytes > self.limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {output.nbytes} bytes.")

        hook = nn.modules.module.register_module_forward_hook(check)
        try:
            return self.run(context)
        finally:
            hook.remove()


def on_small_device(graph: Graph, limit: int, *names: str, for_backward: bool = False) -> Graph:
    """Return the graph with some nodes confined; keys stay, since a task's function is no part of them."""
    nodes = []
    for node in graph.nodes.values():
        confined = (
            replace(node.task, run=Limited(node.task.run, limit, for_backward)) if node.name in names else node.task
        )
        nodes.append(replace(node, task=confined))
    return Graph(nodes)


@pytest.fixture(scope="module")
def undisturbed(finished, ray_session):
    """The keys, digests and records of a run that had memory enough."""
    graph = finished.graph(*MANY)
    assert execute(graph, targets(graph), finished.store, ray_session).ok
    return finished


def test_a_node_without_memory_runs_again_with_half_as_much_and_yields_the_same(world, undisturbed, ray_session):
    graph = world.graph(*MANY)
    small = on_small_device(graph, FORWARD_BYTES - 1, *CONFINED)
    events = []
    result = execute(small, targets(graph), world.store, ray_session, on_event=events.append)
    assert result.ok, result.failures
    reduced = Counter(event.node for event in events if event.kind == "reduced")
    assert reduced == Counter(CONFINED)
    assert all("Tried to allocate" in event.message for event in events if event.kind == "reduced")
    for name in graph.order:
        key = graph.key(name)
        if graph.nodes[name].task.ephemeral:
            continue
        mine, other = world.store.manifest(key), undisturbed.store.manifest(key)
        if TENSORS in mine.files:
            assert mine.files[TENSORS].sha256 == other.files[TENSORS].sha256, name
        assert mine.meta.get("parts", 1) == (2 if name in reduced else 1)
    assert (
        load_record(world.store, graph.key("report"))["perplexity"]
        == (load_record(undisturbed.store, graph.key("report"))["perplexity"])
    )


def test_a_node_that_lacks_memory_again_fails_with_advice_and_without_a_third_try(world, undisturbed, ray_session):
    graph = world.graph(*MANY)
    small = on_small_device(graph, FORWARD_BYTES // 4, "calibrate")
    events = []
    result = execute(small, ["calibrate"], world.store, ray_session, on_event=events.append)
    assert [event.kind for event in events if event.node == "calibrate"] == [
        "submitted",
        "reduced",
        "submitted",
        "failed",
    ]
    (failure,) = result.failures
    assert failure.error.startswith("OutOfMemoryError: CUDA out of memory")
    assert "lower the batch or calibration size" in failure.advice


TRAIN = (
    "train={epochs: 2, sequences: 512, validation_sequences: 0, sequence_length: 32, batch_size: 256, "
    "scale_learning_rate: 0.005, weight_learning_rate: 0.005, relative_learning_rates: true, precision: fp32}",
    "evaluate.texts=[]",
)


def test_training_without_memory_takes_its_steps_in_two_parts(done, ray_session):
    graph, events = done.graph(*TRAIN), []
    small = on_small_device(graph, FORWARD_BYTES - 1, "train[0]", for_backward=True)
    assert execute(small, targets(graph), done.store, ray_session, on_event=events.append).ok
    assert [event.node for event in events if event.kind == "reduced"] == ["train[0]"]
    found = [load_record(done.store, graph.key(f"trained[{block}]")) for block in (0, 1)]
    for name in ("train[0]", "trained[0]", "trained[1]"):
        done.store.discard(graph.key(name))
    assert execute(graph, targets(graph), done.store, ray_session).ok
    for mine, block in zip(found, (0, 1), strict=True):
        other = load_record(done.store, graph.key(f"trained[{block}]"))
        # sums in another order, which a value on the edge between two codes may make visible
        assert mine["loss_before"] == pytest.approx(other["loss_before"], rel=1e-4)
        assert mine["loss_after"] == pytest.approx(other["loss_after"], rel=0.02)
