import pytest
import tiny
from torch import nn

from prefixquant.tasks.errors import UnsupportedModelError
from prefixquant.tasks.model.families import FAMILIES, find_family
from prefixquant.tasks.rotate import RotateConfig

EXACT = 1e-5  # float32 roundings over two blocks of sums of up to 96 terms


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_family_names_every_part_of_its_model(model_type):
    family = find_family(model_type)
    model = tiny.tiny_model(tiny.tiny_config(model_type, blocks=1))
    assert type(model).__name__ == family.architecture
    for name in (family.embedding, family.blocks, family.final_norm, family.head):
        model.get_submodule(name)
    layer = model.get_submodule(f"{family.blocks}.0")
    assert set(family.linears) == {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert (family.key_norm is not None) == hasattr(layer.get_submodule(family.attention), "k_norm")
    for name in (family.attention, family.norm1, family.norm2, *filter(None, [family.key_norm])):
        layer.get_submodule(name)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_blocks_compute_what_transformers_computes(variant):
    model = tiny.tiny_variant(variant)
    ids = tiny.random_ids(3, 21)
    assert tiny.relative_error(tiny.chain_logits(model, ids), model(ids).logits) < EXACT


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_rotation_of_everything_keeps_the_logits(variant, kind):
    model = tiny.tiny_variant(variant, seed=1)
    ids = tiny.random_ids(3, 21)
    rotate = RotateConfig(r1=kind, r2=kind, r3=True, r4=True, seed=5)
    assert tiny.relative_error(tiny.chain_logits(model, ids, rotate), model(ids).logits) < EXACT


def test_find_family_refuses_an_unknown_type_with_the_known_ones():
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported; known are llama, mistral, qwen2, qwen3"):
        find_family("gpt2")
