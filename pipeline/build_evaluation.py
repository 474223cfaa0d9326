"""The nodes that measure a model, cut into as many parts as asked for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from prefixquant.pipeline.graph import Node, Resources, Task
from prefixquant.pipeline.recipe import Recipe
from prefixquant.pipeline.stages import CHEAP, COMPUTE
from prefixquant.pipeline.stages_evaluate import (
    EVALUATE,
    EVALUATE_PART,
    HARNESS,
    HARNESS_PART,
    REQUESTS_TASK,
    HarnessNode,
    ModelNode,
    PartNode,
    PerplexityNode,
    RequestsNode,
)
from prefixquant.tasks.evaluate import windows_a_batch
from prefixquant.tasks.harness import HarnessConfig, check_task_names, folder_fingerprint

Inputs = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a recipe measures of each model."""

    recipe: Recipe
    labels: tuple[str, ...]
    """Of the texts."""
    workers: int
    """Tasks that run at the same time, for the number of parts where the recipe names none."""
    folder: Path | None
    """Of task files."""
    fingerprint: str | None
    """Of what is in it."""

    @classmethod
    def of(cls, recipe: Recipe, labels: tuple[str, ...], workers: int) -> "Evaluation":
        """Return the evaluation of a recipe.

        Raises:
            ConfigError: there is no such task, or no such folder of task files.
        """
        config = recipe.evaluate
        folder = None if config.task_folder is None else Path(config.task_folder).absolute()
        fingerprint = None if folder is None else folder_fingerprint(folder)
        check_task_names(config.tasks, folder)
        return cls(recipe, labels, workers, folder, fingerprint)

    def requests(self) -> list[Node]:
        """Return the nodes that build what the tasks ask."""
        return [
            Node(
                name=f"requests[{harness.name}]",
                task=REQUESTS_TASK,
                config=RequestsNode(harness=harness, fingerprint=self.fingerprint, folder=self._folder),
                resources=CHEAP,
            )
            for harness in self._harnesses
        ]

    def nodes(self, model: ModelNode, suffix: str, inputs: Inputs) -> list[Node]:
        """Return the nodes that measure one model; those that `is_result` accepts have the numbers.

        `suffix`: end of their names. `inputs`: what the model is made of.
        """
        found = []
        for label in self.labels:
            whole = Node(
                name=f"evaluate[{model.variant},{label}]{suffix}",
                task=EVALUATE,
                config=PerplexityNode(model=model),
                inputs={"load": "load", "windows": f"tokens[{label}]", **inputs},
                resources=COMPUTE,
            )
            found += _in_parts(whole, EVALUATE_PART, self._text_parts)
        for harness in self._harnesses:
            whole = Node(
                name=f"tasks[{model.variant},{harness.name}]{suffix}",
                task=HARNESS,
                config=HarnessNode(model=model, harness=harness, folder=self._folder, gpus=self._gpus),
                inputs={"load": "load", "requests": f"requests[{harness.name}]", **inputs},
                resources=Resources(gpus=self._gpus, cpus=1),
            )
            found += _in_parts(whole, HARNESS_PART, self._task_parts, keeps=("requests",))
        return found

    @property
    def _gpus(self) -> int:
        return self.recipe.evaluate.gpus

    @property
    def _folder(self) -> str | None:
        return None if self.folder is None else str(self.folder)

    @property
    def _harnesses(self) -> list[HarnessConfig]:
        config = self.recipe.evaluate
        return [HarnessConfig(name=name, shots=config.shots, limit=config.limit) for name in config.tasks]

    @property
    def _text_parts(self) -> int:
        """Parts of a text; not more than it can have batches, as far as the recipe tells."""
        config = self.recipe.evaluate
        if config.shards is not None:
            return config.shards
        if config.max_windows is None:
            return self.workers
        return min(self.workers, math.ceil(config.max_windows / windows_a_batch(config.window)))

    @property
    def _task_parts(self) -> int:
        config = self.recipe.evaluate
        return config.shards if config.shards is not None else max(1, self.workers // self._gpus)


def is_result(node: Node) -> bool:
    """Return whether a node holds what is measured of a model on a text or a task, and is no part of that."""
    return node.task in (EVALUATE, HARNESS)


def _in_parts(whole: Node, part: Task, count: int, keeps: tuple[str, ...] = ()) -> list[Node]:
    """Return a node cut into parts and merged again, under its own key; itself if there is one part.

    `keeps`: its inputs that merging takes as well.
    """
    if count == 1:
        return [whole]
    stem, bracket, suffix = whole.name.rpartition("]")
    inside = stem.partition("[")[2]
    parts = [
        Node(
            name=f"{part.name}[{inside},{shard}{bracket}{suffix}",
            task=part,
            config=PartNode(of=whole.config, shard=shard, shards=count),
            inputs=whole.inputs,
            resources=whole.resources,
        )
        for shard in range(count)
    ]
    merged = {name: whole.inputs[name] for name in keeps} | {"parts": tuple(each.name for each in parts)}
    return [*parts, replace(whole, inputs=merged, key_inputs=whole.inputs, resources=CHEAP)]
