"""A recipe's model: found, fingerprinted, and looked over once."""

from collections.abc import Callable

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact
from prefixquant.pipeline.build import Source, load_node
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.recipe import Recipe
from prefixquant.pipeline.runner import Session, execute
from prefixquant.pipeline.source import model_at, resolve_source, source_fingerprint
from prefixquant.pipeline.worker import NodeResult
from prefixquant.tasks.load import LoadedModel


def prepare(recipe: Recipe) -> Source:
    """Return the recipe's model, local and fingerprinted."""
    path = resolve_source(recipe.model)
    return Source(path=path, fingerprint=source_fingerprint(path))


def known_model(recipe: Recipe, store: ArtifactStore) -> tuple[Source, LoadedModel]:
    """Return a recipe's model without its weights, as the store has it or else read now; writes nothing."""
    source = prepare(recipe)
    key = Graph([load_node(source)]).key("load")
    if store.has(key):
        return source, LoadedModel.from_artifact(load_artifact(store, key))
    return source, model_at(str(source.path))


def look_over(
    source: Source, store: ArtifactStore, session: Callable[[], Session]
) -> tuple[LoadedModel, dict[str, NodeResult]]:
    """Return the model without its weights, and what looking it over has cost if the store did not have it.

    Raises:
        RunFailedError: its checkpoint is wrong, or the run was interrupted.
    """
    loading, results = Graph([load_node(source)]), {}
    if not store.has(loading.key("load")):
        loaded = execute(loading, ["load"], store, session())
        loaded.require()
        results = loaded.results
    return LoadedModel.from_artifact(load_artifact(store, loading.key("load"))), results
