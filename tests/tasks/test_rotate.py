import pytest
import tiny
import torch

from prefixquant.tasks.errors import ConfigError, NumericalError, UnsupportedModelError
from prefixquant.tasks.model.families import LLAMA
from prefixquant.tasks.rotate import Ends, RotateConfig, Rotation, check_rotations, rotate_block, rotate_ends

EXACT = 1e-5  # float32 roundings over two blocks

ALONE = {
    "gains": {},
    "r1-hadamard": {"r1": "hadamard"},
    "r1-orthogonal": {"r1": "orthogonal"},
    "r2-hadamard": {"r2": "hadamard"},
    "r2-orthogonal": {"r2": "orthogonal"},
    "r3": {"r3": True},
    "r4": {"r4": True},
    "r4-blocks": {"r4": True, "r4_block": 16},
}
OFF = {"r1": None, "r2": None, "r3": False, "r4": False}


def rotated(model, config: RotateConfig, block: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    weights = tiny.block_weights(model, block)
    return rotate_block(weights, tiny.family_of(model), 16, block, config, dtype=dtype, device=tiny.CPU)


@pytest.mark.parametrize("variant", ["llama-biases", "llama-tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("transform", ALONE)
def test_each_transform_alone_keeps_the_logits(variant, transform):
    model = tiny.tiny_variant(variant, seed=2)
    ids = tiny.random_ids(2, 19)
    config = RotateConfig(**(OFF | ALONE[transform]))
    assert tiny.relative_error(tiny.chain_logits(model, ids, config), model(ids).logits) < EXACT


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_rotation_is_orthogonal_and_repeats_with_its_seed_and_name(kind):
    identity = torch.eye(48, dtype=torch.float64)
    matrix = Rotation(kind, 48, 0, "r1").right(identity)
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(Rotation(kind, 48, 0, "r1").right(identity), matrix, rtol=0, atol=0)
    torch.testing.assert_close(Rotation(kind, 48, 0, "r1").transposed_left(identity), matrix.T, rtol=0, atol=0)
    for other in (Rotation(kind, 48, 1, "r1"), Rotation(kind, 48, 0, "r2/0")):
        assert (other.right(identity) - matrix).abs().max() > 0.1


def test_rotate_block_folds_the_gains_and_keeps_the_key_norm():
    model = tiny.tiny_variant("qwen3")
    before, after = tiny.block_weights(model, 0), rotated(model, RotateConfig(**OFF))
    for norm, consumer in (("input_layernorm", "self_attn.v_proj"), ("post_attention_layernorm", "mlp.up_proj")):
        assert torch.equal(after[f"{norm}.weight"], torch.ones(48, dtype=torch.float64))
        wanted = before[f"{consumer}.weight"].double() * before[f"{norm}.weight"].double()
        torch.testing.assert_close(after[f"{consumer}.weight"], wanted, rtol=1e-15, atol=0)
    assert torch.equal(after["self_attn.k_norm.weight"], before["self_attn.k_norm.weight"].double())
    assert set(before) == set(after)


def test_rotate_block_leaves_its_input_and_uses_another_r2_for_each_block():
    model = tiny.tiny_variant("llama")
    weights = tiny.block_weights(model, 0)
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    config = RotateConfig(**(OFF | {"r2": "hadamard"}))
    first, other = (
        rotate_block(weights, LLAMA, 16, block, config, dtype=torch.float32, device=tiny.CPU) for block in (0, 1)
    )
    assert all(torch.equal(weights[name], copies[name]) for name in weights)
    assert not torch.equal(first["self_attn.v_proj.weight"], other["self_attn.v_proj.weight"])


def test_rotate_block_gives_the_dtype_asked_for():
    assert {
        tensor.dtype for tensor in rotated(tiny.tiny_variant("llama"), RotateConfig(), dtype=torch.bfloat16).values()
    } == {torch.bfloat16}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rotate_block_names_block_and_tensor_of_a_bad_weight(bad):
    model = tiny.tiny_variant("llama")
    weights = tiny.block_weights(model, 1)
    weights["mlp.up_proj.weight"][3, 5] = bad
    with pytest.raises(NumericalError, match=r"block 1: mlp\.up_proj\.weight holds 1 NaN or infinite values of 4608"):
        rotate_block(weights, LLAMA, 16, 1, RotateConfig(), dtype=torch.float32, device=tiny.CPU)


@pytest.mark.parametrize("part", ["embedding", "final norm", "head"])
def test_rotate_ends_names_a_bad_tensor(part):
    tensors = {"embedding": torch.ones(6, 48), "final norm": torch.ones(48), "head": torch.ones(6, 48)}
    tensors[part].view(-1)[7] = float("nan")
    with pytest.raises(NumericalError, match=f"model ends: {part} holds 1 NaN"):
        rotate_ends(Ends(*tensors.values()), RotateConfig(), dtype=torch.float32, device=tiny.CPU)


def test_rotate_ends_gives_the_same_in_pieces_and_unties():
    model = tiny.tiny_variant("llama-tied")
    tied = tiny.build_ends(model)
    whole, pieces = (
        rotate_ends(tied, RotateConfig(), dtype=torch.float32, device=tiny.CPU, rows=rows) for rows in (10_000, 7)
    )
    assert torch.equal(tied.embedding, tied.head)
    torch.testing.assert_close(pieces.embedding, whole.embedding)
    torch.testing.assert_close(pieces.head, whole.head)
    assert (whole.embedding - whole.head).abs().max() > 0.01
    assert torch.equal(whole.gain, torch.ones(48))


@pytest.mark.real_model
def test_rotation_of_a_real_model_keeps_its_logits(smollm2_model):
    ids = torch.randint(2, 49152, (1, 48), generator=torch.Generator().manual_seed(0))
    logits = tiny.chain_logits(smollm2_model, ids, RotateConfig())
    assert tiny.relative_error(logits, smollm2_model(ids).logits) < EXACT


def test_rotation_refuses_a_size_without_hadamard_matrix():
    with pytest.raises(UnsupportedModelError, match=r"order 6 is known for r1; use 'orthogonal'"):
        Rotation("hadamard", 6, 0, "r1")


def test_rotate_config_refuses_a_negative_seed():
    with pytest.raises(ConfigError, match=r"rotate\.seed must not be negative, got -1"):
        RotateConfig(seed=-1)


@pytest.mark.parametrize(
    ("key", "sizes", "rotate"),
    [
        ("r1", {"hidden_size": 260}, RotateConfig(r2=None, r3=False, r4=False)),
        ("r2", {"head_dim": 6}, RotateConfig(r1=None, r3=False, r4=False)),
        ("r3", {"head_dim": 6}, RotateConfig(r1=None, r2=None, r4=False)),
        ("r4", {"intermediate_size": 90}, RotateConfig(r1=None, r2=None, r3=False)),
    ],
)
def test_check_rotations_names_the_setting_to_change(key, sizes, rotate):
    config = tiny.tiny_config("llama", **sizes)
    check_rotations(config, RotateConfig(r1="orthogonal", r2="orthogonal", r3=False, r4=False))
    with pytest.raises(UnsupportedModelError, match=rf"rotate\.{key}: no Hadamard matrix .*set rotate\.{key}="):
        check_rotations(config, rotate)


def test_blocks_of_r4_rotate_no_further_than_a_block():
    plain, blocks = (
        rotated(tiny.tiny_variant("llama"), RotateConfig(**(OFF | each))) for each in ({}, {"r4": True, "r4_block": 16})
    )
    before, after = (weights["mlp.down_proj.weight"].unflatten(1, (-1, 16)) for weights in (plain, blocks))
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r4_block": 48}, r"rotate\.r4_block must be one of 16, 64, 128, 256, 512, got 48"),
        ({"r4_block": 32}, r"rotate\.r4_block must be one of .* got 32"),
        ({"r4": False, "r4_block": 16}, r"rotate\.r4_block is the size of R4, which is off"),
    ],
)
def test_r4_block_that_no_engine_runs_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RotateConfig(**settings)


def test_r4_block_that_does_not_divide_the_channels_is_refused_with_one_that_does():
    config = tiny.tiny_config("llama")
    check_rotations(config, RotateConfig(r4_block=16))
    with pytest.raises(ConfigError, match=r"rotate\.r4_block 64 does not divide intermediate_size 96; use 16"):
        check_rotations(config, RotateConfig(r4_block=64))
