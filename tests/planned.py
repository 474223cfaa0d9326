"""Graphs of whole models that are not here, for what is planned with them."""

from dataclasses import replace
from pathlib import Path

from prefixquant.pipeline.build import Source, build_graph
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.machines import Machine, find_machine
from prefixquant.pipeline.recipe import Recipe, load_recipe
from prefixquant.pipeline.shape import Shape
from prefixquant.tasks.random_checkpoint import shape_model

H200 = find_machine("NVIDIA H200")


def build(
    shape: str,
    dtype: str,
    *overrides: str,
    machine: Machine = H200,
    recipe: str = "w4a4kv4-static-trained",
    workers: int = 1,
    blocks: int | None = None,
    vocabulary: int | None = None,
) -> tuple[Graph, Shape, Recipe]:
    """Return graph, sizes and recipe of a model of this shape, which reads texts that need no download."""
    own = ["data.calibration=python-docs", "evaluate.texts=[python-docs]"]
    checked = load_recipe(recipe, [*own, *overrides])
    model = replace(shape_model(shape), dtype=dtype)
    model.config.num_hidden_layers = blocks or model.config.num_hidden_layers
    model.config.vocab_size = vocabulary or model.config.vocab_size
    graph = build_graph(checked, Source(path=Path("x"), fingerprint="x"), model, machine=machine, workers=workers)
    return graph, Shape.of(model, dtype, checked), checked
