"""torch.compile takes a training step as one graph, the same for every block; checked without generating code."""

import pytest
import tiny
import torch

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.losses import mse
from prefixquant.tasks.model.quantizer import round_to_nearest
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec
from prefixquant.tasks.model.trainable import make_trainable
from prefixquant.tasks.rotate import RotateConfig
from prefixquant.tasks.steps import SingleRank
from prefixquant.tasks.streams import Stream
from prefixquant.tasks.train_block import BlockData, BlockLoss, train_block
from prefixquant.tasks.train_config import TrainConfig

CASES = {
    "static": QuantizeConfig(),
    "dynamic": QuantizeConfig(
        activations=ActivationSpec(mode="dynamic", granularity="token"),
        keys=KeyValueSpec(mode="dynamic", before_rope=True),
        values=KeyValueSpec(mode="dynamic"),
    ),
    "asymmetric": QuantizeConfig(
        weights=WeightSpec(symmetric=False), activations=ActivationSpec(symmetric=False), keys=None, values=None
    ),
    "weights-in-groups": QuantizeConfig(
        weights=WeightSpec(granularity="group", group_size=16), activations=None, keys=None, values=None
    ),
}


def losses_of(quantize=CASES["static"], variant="llama", prefixed=True):
    """Return the training loss of every block of a tiny model."""
    model = tiny.tiny_variant(variant)
    found = []
    for index, block in enumerate(tiny.build_blocks(model, RotateConfig(), quantize)):
        generator = torch.Generator().manual_seed(index)
        for site in block.sites.values():
            if site.quantizer is not None and site.quantizer.spec.mode == "static":
                site.quantizer.scale.fill_(0.4)
        weights = {role: block.linear(role).weight.data.clone() for role in block.family.linears}
        grids = {role: round_to_nearest(weight, quantize.weights, 0.7) for role, weight in weights.items()}
        for each in make_trainable(block, weights, grids, quantize.weights):
            each.parameter.requires_grad_(True)
        shape = model.config.num_key_value_heads, 3, block.attention.head_dim
        prefix = (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        found.append(BlockLoss(block, prefix if prefixed else None, mse))
    return found


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 10, 48, generator=generator) for _ in range(2)]


def gradients(module, precision=None):
    for each in module.parameters():
        each.grad = None
    with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
        loss = module(*batch())
    loss.backward()
    return loss.detach(), {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


class Backend:
    """Runs a graph as it was traced, forward and backward, and counts the graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def compile_with():
    torch._dynamo.reset()
    yield lambda module, backend: setattr(
        module, "_compiled", torch.compile(module._loss, backend=backend, fullgraph=True, dynamic=False)
    )
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("case", "variant", "prefixed"),
    [(case, "llama", True) for case in CASES] + [("static", "llama", False), ("static", "qwen3", True)],
)
def test_a_compiled_step_is_one_graph_with_the_gradients_of_the_eager_one(compile_with, case, variant, prefixed):
    module = losses_of(CASES[case], variant, prefixed)[0]
    loss, wanted = gradients(module, torch.bfloat16)
    backend = Backend()
    compile_with(module, backend)
    found_loss, found = gradients(module, torch.bfloat16)
    assert backend.graphs == 1
    assert found.keys() == wanted.keys()
    # the same operators on the same values
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_all_blocks_share_one_compiled_step(compile_with):
    backend = Backend()
    for module in losses_of():
        compile_with(module, backend)
        gradients(module)
    assert backend.graphs == 1


def test_weight_gradients_keep_the_type_of_the_product_where_they_may():
    module = losses_of()[0]
    _, wanted = gradients(module, torch.bfloat16)
    weight = "block.model.layers.0.mlp.down_proj.weight"
    assert wanted[weight].dtype == torch.float32
    for each in module.parameters():
        each.grad_dtype = None
    _, found = gradients(module, torch.bfloat16)
    assert found[weight].dtype == torch.bfloat16
    for name, gradient in found.items():
        assert torch.equal(gradient.float(), wanted[name]), name  # no digit is lost


class Hooked(SingleRank):
    compiles = False


def test_always_compiling_is_refused_where_it_cannot_be():
    config = TrainConfig(compile="always", sequences=4, validation_sequences=0, batch_size=4)
    data = BlockData(*([Stream(each, tiny.CPU) for each in batch()][:1]), targets=())
    block = losses_of()[0].block
    with pytest.raises(ConfigError, match=r"not go with train\.sharding=zero"):
        train_block(block, [], data, None, None, config, Hooked(), seed=0, loss=mse)
