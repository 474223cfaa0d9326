"""A tiny model quantized and exported by a real run, for tests of what is done with the folder."""

from pathlib import Path
from typing import Any

import tiny
import torch
from inline import run_inline, small_recipe
from torch import Tensor

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.materialize import materialize
from prefixquant.pipeline.recipe import Recipe, parse_recipe
from prefixquant.tasks.load import LoadedModel
from prefixquant.tasks.model.block import Block, block_prefix, block_shapes, load_sites
from prefixquant.tasks.model.saved import block_weights


class Exported:
    """A run's folder, and the same run's artifacts. Settings are groups of a recipe, the model's dtype as
    `model.dtype`, and values of the tiny model's config as `config.NAME`."""

    def __init__(self, folder: Path, variant: str, settings: dict[str, Any]) -> None:
        config = {name.removeprefix("config."): value for name, value in settings.items() if name.startswith("config.")}
        model = tiny.tiny_variant(variant, **config)
        model.save_pretrained(folder / "model")
        tiny.tiny_tokenizer().save_pretrained(folder / "model")
        groups = {key: value for key, value in settings.items() if "." not in key}
        data = small_recipe(folder, folder / "model", **groups) | {"evaluate": {"texts": [], "full_precision": False}}
        data["model"] |= {"dtype": settings.get("model.dtype", "auto")}
        self.recipe: Recipe = parse_recipe(data)
        self.store = ArtifactStore(str(folder / "store"))
        self.graph: Graph
        self.model: LoadedModel
        self.graph, self.model, _ = run_inline(self.recipe, self.store)
        self.folder = folder / "exported"
        materialize(self.graph, self.store, self.folder, self.model.num_blocks)

    def simulated_logits(self, ids_NT: Tensor) -> Tensor:
        """The logits of the block chain over the stored codes and scales."""
        family, config, quantize = self.model.family, self.model.config, self.recipe.quantize
        ends = load_artifact(self.store, self.graph.key("rotate[ends]")).tensors
        embedding, head = (ends[f"{name}.weight"] for name in (family.embedding, family.head))
        stored = load_artifact(self.store, self.graph.key("prefix")).tensors
        prefix = (stored["keys"], stored["values"]) if stored else None
        hidden = embedding[ids_NT]
        transforms = self.recipe.transforms
        for index in range(self.model.num_blocks):
            tensors = load_artifact(self.store, self.graph.key(f"block[{index}]")).tensors
            shapes = block_shapes(config, index)
            weights, sites = block_weights(tensors, shapes, family, index, quantize.weights, embedding.dtype)
            block = Block(config, family, index, weights, transforms=transforms, quantize=quantize, device=tiny.CPU)
            load_sites(block.sites, sites, tiny.CPU)
            hidden = block(hidden, block_prefix(prefix, index, tiny.CPU))
        x = hidden.float()
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)).to(embedding.dtype)
        return (ends[f"{family.final_norm}.weight"] * x) @ head.T
