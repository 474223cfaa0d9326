"""The part of the graph that trains blocks: windows, segments, and what they yield."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prefixquant.pipeline.graph import Gang, Node, Task
from prefixquant.pipeline.recipe import Recipe
from prefixquant.pipeline.stages import COMPUTE
from prefixquant.pipeline.training import POLISH, POLISHED, TRAIN, TRAINED, TrainedNode, TrainNode
from prefixquant.tasks.evaluate import PerplexityConfig
from prefixquant.tasks.gptq import GptqConfig
from prefixquant.tasks.load import LoadedModel
from prefixquant.tasks.texts import TextConfig, WindowsConfig
from prefixquant.tasks.train_config import TrainConfig

_LENGTH = "train.sequence_length"


def training_windows(
    recipe: Recipe, train: TrainConfig
) -> list[tuple[str, TextConfig, WindowsConfig | PerplexityConfig, str]]:
    """Return node, text, windows and the recipe key of their length, of what training reads."""
    windows = WindowsConfig(count=train.sequences, length=train.sequence_length, seed=recipe.seed)
    found: list[tuple[str, TextConfig, WindowsConfig | PerplexityConfig, str]] = [
        ("tokens[train]", recipe.calibration_text, windows, _LENGTH)
    ]
    if train.validation_sequences:
        held_out = replace(windows, count=train.validation_sequences)
        found.append(("tokens[validation]", recipe.validation_text, held_out, _LENGTH))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """The training of one recipe."""

    recipe: Recipe
    train: TrainConfig
    num_blocks: int
    dtype: str

    suffix: str = ""
    """Of the names of its nodes, if the recipe trains in more than one way."""

    @classmethod
    def of(cls, recipe: Recipe, train: TrainConfig, model: LoadedModel, dtype: str) -> "Training":
        """Return the training of a recipe on a model."""
        return cls(recipe=recipe, train=train, num_blocks=model.num_blocks, dtype=dtype)

    def in_sequence(self, suffix: str) -> "Training":
        """Return the same training without segments."""
        return replace(self, train=replace(self.train, segments=1, polish=False), suffix=suffix)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks as training leaves them."""
        return self._named("polished" if self.train.polish else "trained", self.suffix)

    def nodes(self) -> list[Node]:
        """Return the nodes that train and the blocks that they yield."""
        count = self.train.segments
        bounds = [segment * self.num_blocks // count for segment in range(count + 1)]
        found: list[Node] = []
        for segment in range(count):
            first, stop = bounds[segment : segment + 2]
            name = f"train[{segment}]{self.suffix}"
            found += self._run(name, TRAIN, TRAINED, self._named("block"), first, stop, self.recipe.gptq)
        if self.train.polish:
            rounded = replace(self.recipe.gptq or GptqConfig(), training="start")
            found += self._run("polish", POLISH, POLISHED, self._named("trained"), 0, self.num_blocks, rounded)
        return found

    def _named(self, task: str, suffix: str = "") -> tuple[str, ...]:
        return tuple(f"{task}[{block}]{suffix}" for block in range(self.num_blocks))

    def _run(
        self,
        name: str,
        task: Task,
        product: Task,
        searched: tuple[str, ...],
        first: int,
        stop: int,
        gptq: GptqConfig | None,
    ) -> list[Node]:
        """Return a node that trains blocks first..stop-1, and the nodes of what it yields."""
        train = self.train
        last = min(stop - 1 + train.lookahead, self.num_blocks - 1)
        inputs: Mapping[str, str | tuple[str, ...]] = {
            "load": "load",
            "ends": "rotate[ends]",
            "prefix": "prefix",
            "windows": "tokens[train]",
            **({"validation": "tokens[validation]"} if train.validation_sequences else {}),
            "rotated": tuple(f"rotate[{block}]" for block in range(last + 1)),
            "searched": searched[first:stop],
        }
        run = Node(
            name=name,
            task=task,
            config=TrainNode(
                first=first,
                stop=stop,
                transforms=self.recipe.transforms,
                quantize=self.recipe.quantize,
                train=replace(train, segments=1, polish=False),
                gptq=gptq,
                dtype=self.dtype,
                seed=self.recipe.seed,
            ),
            inputs=inputs,
            byproducts={str(block): f"{product.name}[{block}]{self.suffix}" for block in range(first, stop)},
            resources=replace(
                COMPUTE,
                gang=Gang(
                    batch=train.batch_size,
                    shares=train.segments if task is TRAIN else 1,
                    sharding=train.sharding,
                ),
            ),
        )
        yielded = [
            Node(
                name=f"{product.name}[{block}]{self.suffix}",
                task=product,
                config=TrainedNode(block=block),
                inputs={"train": name},
            )
            for block in range(first, stop)
        ]
        return [run, *yielded]
