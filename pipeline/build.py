"""From a recipe and a model to the graph of a run."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prefixquant.pipeline.build_evaluation import Evaluation, is_result
from prefixquant.pipeline.build_training import Training, training_windows
from prefixquant.pipeline.estimates import estimate
from prefixquant.pipeline.graph import Graph, Node
from prefixquant.pipeline.machines import CPU, Machine, find_machine
from prefixquant.pipeline.recipe import Recipe
from prefixquant.pipeline.report import REPORT, ReportNode
from prefixquant.pipeline.shape import Shape
from prefixquant.pipeline.stage_profiles import EXPORT_PROFILE, PROFILE, ProfileNode
from prefixquant.pipeline.stages import (
    BLOCK,
    CALIBRATE,
    CHEAP,
    COMPUTE,
    EXPORT,
    LOAD,
    PREFIX,
    ROTATE,
    STREAM,
    TOKENS,
    BlockNode,
    CalibrateNode,
    ExportNode,
    LoadNode,
    PrefixNode,
    RotateNode,
    StreamNode,
    TokensNode,
)
from prefixquant.pipeline.stages_evaluate import ModelNode
from prefixquant.tasks.errors import ConfigError, UnsupportedModelError
from prefixquant.tasks.evaluate import PerplexityConfig
from prefixquant.tasks.find_prefix import FindPrefixConfig
from prefixquant.tasks.load import LoadedModel
from prefixquant.tasks.model.sites import head_size
from prefixquant.tasks.model.spec import KeyValueSpec, QuantizeConfig
from prefixquant.tasks.rotate import RotateConfig, check_rotations
from prefixquant.tasks.texts import TextConfig, WindowsConfig, source_fingerprint

WITHOUT_PREFIX = "/without_prefix"
"""Ends the names of the nodes that quantize once more without the prefix."""

UNTRAINED = "/untrained"
SEQUENTIAL = "/sequential"
"""Ends the names of the nodes that measure the quantized model before training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model at hand."""

    path: Path | str
    """Local, or a URL."""
    fingerprint: str


def load_node(source: Source) -> Node:
    """Return the node that looks the checkpoint over."""
    config = LoadNode(fingerprint=source.fingerprint, path=str(source.path))
    return Node(name="load", task=LOAD, config=config, resources=CHEAP)


def build_graph(
    recipe: Recipe, source: Source, model: LoadedModel, *, machine: Machine | None = None, workers: int = 1
) -> Graph:
    """Return the graph of a run; its targets are `targets(graph)`.

    `machine`: where tasks will run, None for CPU cores; it serves the estimates only. `workers`: tasks that run at the
    same time; it serves to cut what is measured into parts, and changes no key but theirs.

    Raises:
        ConfigError, UnsupportedModelError: recipe and model do not go together.
        DataError: a text's file is missing.
    """
    check_fit(recipe, model)
    graph = Graph(_Builder(recipe, source, model, machine or find_machine(CPU), workers).nodes())
    graph.check()
    return graph


def targets(graph: Graph) -> tuple[str, ...]:
    """Return the names of the nodes that a run is for: report, export, and what the export is made of.

    The output folder's shards are the artifacts the export describes, so those are wanted even if the export is there.
    """
    profiles = (name for name, node in graph.nodes.items() if node.task is EXPORT_PROFILE)
    return ("export", *graph.parents("export"), *profiles, "report")


def check_fit(recipe: Recipe, model: LoadedModel) -> None:
    """Raise ConfigError or UnsupportedModelError where the recipe asks for what the model's sizes do not allow."""
    if recipe.train is not None and recipe.train.segments > model.num_blocks:
        raise ConfigError(
            f"train.segments {recipe.train.segments} is more than the model's {model.num_blocks} blocks; lower it"
        )
    config, quantize = model.config, recipe.quantize
    check_rotations(config, recipe.rotate)
    inputs = (config.hidden_size, config.num_attention_heads * head_size(config), config.intermediate_size)
    sizes = {
        "quantize.weights": (quantize.weights, inputs),
        "quantize.activations": (quantize.activations, inputs),
        "quantize.keys": (quantize.keys, (head_size(config),)),
        "quantize.values": (quantize.values, (head_size(config),)),
    }
    for key, (spec, dimensions) in sizes.items():
        for dimension in dimensions:
            if spec is not None and spec.group_size is not None and dimension % spec.group_size:
                raise ConfigError(f"{key}.group_size {spec.group_size} does not divide the model's {dimension}")
    if recipe.prefix.tokens is None and model.bos_token_id is None:
        raise UnsupportedModelError(
            "prefix: the tokenizer has no BOS token, with which a searched prefix ends; "
            "name the prefix yourself with prefix.tokens=[...], or prefix.tokens=[] for none"
        )
    for token in recipe.prefix.tokens or ():
        if token >= config.vocab_size:
            raise ConfigError(f"prefix.tokens: token {token} is outside the vocabulary of {config.vocab_size}")


def _rounds_after_training(recipe: Recipe) -> bool:
    return recipe.train is not None and recipe.gptq is not None and recipe.gptq.training == "end"


class _Builder:
    def __init__(self, recipe: Recipe, source: Source, model: LoadedModel, machine: Machine, workers: int) -> None:
        self.recipe, self.model = recipe, model
        self.path = str(source.path)
        self.source = source
        self.dtype = model.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
        self.transforms = recipe.transforms
        self.shape = Shape.of(model, self.dtype, recipe)
        self.machine = machine
        self.labels = text_labels(recipe.evaluate.texts)
        self.evaluation = Evaluation.of(recipe, self.labels, workers)
        self.training = None if recipe.train is None else Training.of(recipe, recipe.train, model, self.dtype)
        self.sequential: Training | None = None
        if self.training is not None and recipe.evaluate.sequential:
            self.sequential = self.training.in_sequence(SEQUENTIAL)
        self.rotated = tuple(f"rotate[{block}]" for block in range(model.num_blocks))

    def nodes(self) -> list[Node]:
        """Return all nodes, in the order in which ready ones should start."""
        recipe = self.recipe
        found = [*self._estimated([load_node(self.source)]), *self._tokens(), *self._rotate()]
        found += self._quantized(recipe.prefix, "")
        if self.training is not None:
            found += self._estimated(self.training.nodes())
        found += [self._export(), *self._profiles()]
        evaluated = self._estimated(self.evaluation.requests())
        if recipe.evaluate.full_precision:
            evaluated += self._evaluate("full_precision", "")
        evaluated += self._evaluate("quantized", "")
        if self.training is not None and recipe.evaluate.untrained:
            evaluated += self._evaluate("quantized", UNTRAINED)
        if self.sequential is not None:
            found += self._estimated(self.sequential.nodes())
            evaluated += self._evaluate("quantized", SEQUENTIAL)
        if recipe.evaluate.without_prefix:
            found += self._quantized(FindPrefixConfig(tokens=()), WITHOUT_PREFIX)
            evaluated += self._evaluate("quantized", WITHOUT_PREFIX)
        return [*found, *evaluated, self._report([node for node in evaluated if is_result(node)])]

    def _node(self, **fields: object) -> Node:
        return self._estimated([Node(**fields)])[0]  # type: ignore[arg-type]

    def _estimated(self, nodes: Iterable[Node]) -> list[Node]:
        return [replace(node, estimate=estimate(node, self.shape, self.machine)) for node in nodes]

    def _tokens(self) -> list[Node]:
        recipe = self.recipe
        calibration = recipe.calibration_text
        wanted: list[tuple[str, TextConfig, WindowsConfig | PerplexityConfig, str]] = [
            ("tokens[statistics]", calibration, recipe.statistics_windows, "data.statistics.length"),
            ("tokens[search]", calibration, recipe.search_windows, "data.search.length"),
        ]
        if recipe.train is not None:
            wanted += training_windows(recipe, recipe.train)
        texts = zip(self.labels, recipe.evaluation_texts, strict=True)
        wanted += [(f"tokens[{label}]", text, recipe.perplexity, "evaluate.window") for label, text in texts]
        fingerprints = {text: source_fingerprint(text) for _, text, _, _ in wanted}
        return [
            self._node(
                name=name,
                task=TOKENS,
                config=TokensNode(
                    fingerprint=fingerprints[text],
                    windows=windows,
                    where=where,
                    text=_absolute(text),
                    split=text.split,
                ),
                inputs={"load": "load"},
                resources=CHEAP,
            )
            for name, text, windows, where in wanted
        ]

    def _rotate(self) -> list[Node]:
        blocks: list[int | None] = [None, *range(self.model.num_blocks)]
        return [
            self._node(
                name="rotate[ends]" if block is None else f"rotate[{block}]",
                task=ROTATE,
                config=RotateNode(rotate=self._folded(block), dtype=self.dtype, block=block, path=self.path),
                inputs={"load": "load"},
                resources=COMPUTE,
            )
            for block in blocks
        ]

    def _folded(self, block: int | None) -> RotateConfig:
        """Return what of the rotations changes weights: R3 none, and R1 alone those of the ends."""
        rotate = self.recipe.rotate
        return (
            replace(rotate, r3=False)
            if block is not None
            else replace(rotate, r2=None, r3=False, r4=False, r4_block=None)
        )

    def _quantized(self, find: FindPrefixConfig, suffix: str) -> list[Node]:
        """Return prefix, calibration, streams and blocks, their names ending in `suffix`."""
        recipe, transforms = self.recipe, self.transforms
        prefix = f"prefix{suffix}"
        model = {"load": "load", "ends": "rotate[ends]"}
        searches = find.tokens is None
        found = [
            self._node(
                name=prefix,
                task=PREFIX,
                config=PrefixNode(find=find, transforms=transforms),
                inputs={
                    **model,
                    "blocks": self.rotated,
                    **({"windows": "tokens[statistics]"} if searches else {}),
                },
                resources=COMPUTE,
            ),
            self._node(
                name=f"calibrate{suffix}",
                task=CALIBRATE,
                config=CalibrateNode(
                    calibrate=recipe.calibrate, transforms=transforms, quantize=_observed(recipe.quantize)
                ),
                inputs={**model, "blocks": self.rotated, "prefix": prefix, "windows": "tokens[statistics]"},
                resources=COMPUTE,
            ),
        ]
        for block in range(self.model.num_blocks):
            first = {"ends": "rotate[ends]", "windows": "tokens[search]"}
            later = {"block": f"rotate[{block - 1}]", "prefix": prefix, "stream": f"stream[{block - 1}]{suffix}"}
            found.append(
                self._node(
                    name=f"stream[{block}]{suffix}",
                    task=STREAM,
                    config=StreamNode(block=block, transforms=transforms),
                    inputs={"load": "load", **(later if block else first)},
                    resources=COMPUTE,
                )
            )
            found.append(
                self._node(
                    name=f"block[{block}]{suffix}",
                    task=BLOCK,
                    config=BlockNode(
                        block=block,
                        transforms=transforms,
                        quantize=recipe.quantize,
                        search=recipe.search,
                        gptq=None if _rounds_after_training(recipe) else recipe.gptq,
                    ),
                    inputs={
                        "load": "load",
                        "block": f"rotate[{block}]",
                        "prefix": prefix,
                        "ranges": f"calibrate{suffix}",
                        "stream": f"stream[{block}]{suffix}",
                    },
                    resources=COMPUTE,
                )
            )
        return found

    def _blocks(self, suffix: str) -> tuple[str, ...]:
        """Return the blocks that are measured under this suffix; without one they are the final ones."""
        if self.training is not None and not suffix:
            return self.training.blocks
        if self.sequential is not None and suffix == SEQUENTIAL:
            return self.sequential.blocks
        searched = "" if suffix == UNTRAINED else suffix
        return tuple(f"block[{block}]{searched}" for block in range(self.model.num_blocks))

    def _export(self) -> Node:
        return self._node(
            name="export",
            task=EXPORT,
            config=ExportNode(
                profile=self.recipe.export.profile,
                quantize=self.recipe.quantize,
                transforms=self.transforms,
                dtype=self.dtype,
            ),
            inputs={"load": "load", "ends": "rotate[ends]", "prefix": "prefix", "blocks": self._blocks("")},
            resources=CHEAP,
        )

    def _profiles(self) -> list[Node]:
        measuring = {"measuring": f"tokens[{self.labels[0]}]"} if self.labels else {}
        return [
            self._node(
                name=f"export[{profile}]",
                task=EXPORT_PROFILE,
                config=ProfileNode(
                    profile=profile,
                    export=self.recipe.export.of(profile),
                    recipe=json.dumps(self.recipe.resolved()),
                ),
                inputs={
                    "export": "export",
                    "ends": "rotate[ends]",
                    "prefix": "prefix",
                    "blocks": self._blocks(""),
                    "planning": "tokens[search]",
                    **measuring,
                },
                resources=PROFILE,
            )
            for profile in self.recipe.export.profiles
        ]

    def _evaluate(self, variant: str, suffix: str) -> list[Node]:
        quantized = variant == "quantized"
        of_variant: Mapping[str, str | tuple[str, ...]] = (
            {
                "ends": "rotate[ends]",
                "prefix": f"prefix{WITHOUT_PREFIX}" if suffix == WITHOUT_PREFIX else "prefix",
                "blocks": self._blocks(suffix),
            }
            if quantized
            else {}
        )
        model = ModelNode(
            variant=variant,  # type: ignore[arg-type]
            transforms=self.transforms if quantized else None,
            quantize=self.recipe.quantize if quantized else None,
            dtype=self.dtype,
            path=self.path,
        )
        return self._estimated(self.evaluation.nodes(model, suffix, of_variant))

    def _report(self, evaluated: list[Node]) -> Node:
        inputs: dict[str, str | tuple[str, ...]] = {"prefix": "prefix", "blocks": self._blocks("")}
        if self.training is not None:
            inputs["searched"] = self._blocks(UNTRAINED)
        inputs |= {node.name: node.name for node in evaluated}
        return self._node(
            name="report",
            task=REPORT,
            config=ReportNode(
                name=self.recipe.name,
                texts=self.labels,
                segments=self.recipe.train.segments if self.recipe.train is not None else 1,
            ),
            inputs=inputs,
            resources=CHEAP,
        )


def text_labels(texts: Sequence[str]) -> tuple[str, ...]:
    """Return a short name for each text: a file's name without its folder, numbered where two are the same."""
    names = [Path(text).name for text in texts]
    return tuple(name if names.count(name) == 1 else f"{name}#{index}" for index, name in enumerate(names, start=1))


def _absolute(text: TextConfig) -> TextConfig:
    """Workers run in a folder of their own."""
    path = Path(text.source)
    return replace(text, source=str(path.absolute())) if path.is_file() else text


def _observed(quantize: QuantizeConfig) -> QuantizeConfig:
    """Return what of the quantization decides the statistics: only where the keys' site sits."""
    before_rope = quantize.keys is not None and quantize.keys.before_rope
    keys = KeyValueSpec(before_rope=True) if before_rope else None
    return QuantizeConfig(weights=None, activations=None, values=None, keys=keys)
