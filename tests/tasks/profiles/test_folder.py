"""What is written: read back with the released compressed-tensors and with stock transformers, in this process."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig
from exported import Exported
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.export import block_file
from prefixquant.tasks.model.block import block_shapes
from prefixquant.tasks.model.cache import cache_name
from prefixquant.tasks.model.saved import saved_weights
from prefixquant.tasks.profiles import exact_loader
from prefixquant.tasks.profiles.folder import LOADER, ExportedModel, write_profile
from prefixquant.tasks.profiles.losses import engine_rules
from prefixquant.tasks.profiles.profile import INTEGERS, PROFILES, find_profile
from prefixquant.tasks.profiles.simulate import Simulation

PREFIX_IDS = [5, 7, tiny.BOS]
EXEMPT = (1,)


@pytest.fixture(scope="session", params=PROFILES)
def written(request, plain, tmp_path_factory) -> tuple[Any, ExportedModel, Path]:
    """A profile of the model without online rotations; those with static scales have an exempt block."""
    profile = find_profile(request.param)
    out = tmp_path_factory.mktemp(profile.name)
    write_profile(plain, profile, out, exempt=EXEMPT if profile.activations == "static" else ())
    return profile, plain, out


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("model-*.safetensors") for name, tensor in load_file(path).items()}


def without_null(value: Any) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is not None and all(map(without_null, children))


def test_config_is_parsed_by_compressed_tensors_and_holds_no_null(written):
    profile, model, out = written
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert without_null(config)
    parsed = QuantizationConfig.model_validate(config)
    group = parsed.config_groups["group_0"]
    adapted = profile.adapted(model.quantize)
    assert (group.format, parsed.format) == (profile.format, profile.format)
    assert group.weights.num_bits == adapted.weights.bits
    if adapted.activations is None:
        assert group.input_activations is None
    else:
        assert group.input_activations.num_bits == adapted.activations.bits
        assert group.input_activations.dynamic is (adapted.activations.mode == "dynamic")
    assert (parsed.kv_cache_scheme is not None) is profile.keeps_kv


def test_stored_codes_are_those_of_the_run(written):
    profile, model, out = written
    adapted = profile.adapted(model.quantize)
    for block in range(model.num_blocks):
        shapes = block_shapes(model.config, block)
        stored = load_file(model.folder / block_file(block))
        found = load_file(out / block_file(block))
        for role, weight in saved_weights(stored, shapes, model.family, block, model.quantize.weights).items():
            name = f"model.layers.{block}.{role}"
            if f"{name}.weight_scale" not in found:
                assert profile.activations == "static"
                assert (block, role) == (1, "mlp.down_proj")
                assert torch.equal(found[f"{name}.weight"], weight.dequantize(model.quantize.weights))
                continue
            if profile.format == INTEGERS:
                codes = found[f"{name}.weight"]
                assert codes.dtype == torch.int8
            else:
                shape = torch.Size(found[f"{name}.weight_shape"].tolist())
                assert shape == shapes[f"{role}.weight"]
                packed = found[f"{name}.weight_packed"]
                assert packed.dtype == torch.int32
                assert packed.shape == (shape[0], -(-shape[1] * adapted.weights.bits // 32))
                codes = unpack_from_int32(packed, adapted.weights.bits, shape)
            assert torch.equal(codes.to(torch.int16), weight.codes)
            assert torch.equal(found[f"{name}.weight_scale"], weight.scale.squeeze(-1))


def test_linears_that_engines_fuse_have_one_input_scale_over_the_range_of_the_run(written):
    profile, model, out = written
    activations = profile.adapted(model.quantize).activations
    tensors = all_tensors(out)
    scales = [name for name in tensors if name.endswith(".input_scale")]
    if activations is None or activations.mode == "dynamic":
        assert scales == []
        return
    for block in range(model.num_blocks):
        stored = load_file(model.folder / block_file(block))
        wanted = stored[f"model.layers.{block}.sites.attention_input.scale"] * 2.0 ** (4 - activations.bits)
        for role in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(tensors[f"model.layers.{block}.self_attn.{role}.input_scale"], wanted.reshape(1))
        gate, up = (tensors[f"model.layers.{block}.mlp.{role}.input_scale"] for role in ("gate_proj", "up_proj"))
        assert torch.equal(gate, up)
        exempt = profile.activations == "static" and block in EXEMPT
        assert (f"model.layers.{block}.mlp.down_proj.input_scale" in tensors) is not exempt


def test_transformers_finds_every_tensor_that_it_knows_and_computes_the_simulation(written):
    profile, model, out = written
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.endswith(("self_attn.k_scale", "self_attn.v_scale")) for name in info["unexpected_keys"])
    if profile.keeps_kv:
        loaded = exact_loader.complete(loaded, out)
    ids = tiny.random_ids(2, 24)
    simulation = Simulation(model, profile, tiny.CPU, dtype=torch.float32)
    exempt = EXEMPT if profile.activations == "static" else ()
    wanted = simulation.logits(simulation.hidden(ids, exempt))
    fed = simulation.with_prefix(ids)
    with torch.no_grad():
        found = loaded.eval()(input_ids=fed, **prefix_cache(loaded, simulation)).logits
    assert torch.equal(found[:, fed.shape[1] - 24 :], wanted)


def prefix_cache(model: Any, simulation: Simulation) -> dict[str, Any]:
    """The prefix as a stock cache, as a user makes it of prefix.safetensors."""
    prefix = simulation.prefix()
    if prefix is None:
        return {}
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(*prefix, strict=True)):
        cache.update(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), layer)
    return {cache_name(model.base_model): cache}


def test_folder_has_what_a_server_needs(written):
    profile, _, out = written
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json", "prefixquant.json"} <= names
    assert (LOADER in names) is (profile.name == "hf-exact")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == all_tensors(out).keys()
    first = AutoTokenizer.from_pretrained(out)("ab").input_ids[: len(PREFIX_IDS)]
    assert (first == PREFIX_IDS) is (profile.prefix == "tokens")


@pytest.mark.parametrize(("case", "orders"), [("blocks", {}), ("full", {"R4": [12, 2, 2, 2]})])
def test_rotations_are_named_to_compressed_tensors_where_it_has_a_name(case, orders, request, tmp_path):
    model = request.getfixturevalue(case)
    described = write_profile(model, find_profile("hf-exact"), tmp_path)
    assert described["other_rotations"] == orders
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["transform_config"]
    parsed = TransformConfig.model_validate(config)
    assert set(parsed.config_groups) == {"R3", "R4"} - orders.keys()
    assert all(apply.is_online() for group in parsed.config_groups.values() for apply in group.apply)


def test_engine_profile_of_a_model_with_r3_leaves_it_out(blocks, tmp_path):
    write_profile(blocks, find_profile("vllm-w4a16"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["quantization_config"]["transform_config"]["config_groups"]) == {"R4"}
    assert "auto_map" not in config


def test_transformers_alone_drops_what_the_table_says(blocks, tmp_path):
    """A version that drops less has its rules in engines.yaml changed, and the card's advice with them."""
    profile = find_profile("hf-exact")
    write_profile(blocks, profile, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    attention = loaded.model.layers[0].self_attn
    knows = "past_key_values" in inspect.signature(attention.forward).parameters  # transformers before 5.24
    assert hasattr(attention, "k_scale") is knows
    assert not any("R4" in name for name, _ in loaded.named_modules())
    simulation = Simulation(blocks, profile, tiny.CPU, dtype=torch.float32)
    ids = tiny.random_ids(2, 24)
    with torch.no_grad():
        found = loaded(input_ids=ids, **prefix_cache(loaded, simulation)).logits
    assert (found - simulation.logits(simulation.hidden(ids))).abs().max() > 0.1
    dropped = {rule.scheme for rule in engine_rules() if (rule.engine, rule.verdict) == ("transformers", "dropped")}
    assert dropped == {"kv-static", "r3", "r4-block", "r4-full"}


def test_rotate_of_the_loader_is_our_transform():
    from prefixquant.kernels.hadamard import hadamard_transform

    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact_loader.rotate(x, [12, 2, 2, 2]), hadamard_transform(x))
    assert torch.equal(exact_loader.rotate(x, [12, 2]), hadamard_transform(x, 24))


FAMILIES = {
    "llama-biases": {},
    "llama-tied": {"model.dtype": "bfloat16"},
    "mistral-window": {"rotate": {"r4_block": 16}},
    "qwen2-tied": {},
    "qwen3": {"rotate": {"r4_block": 16}},
    "qwen3-tied": {"quantize": {"weights": {"bits": 3, "granularity": "group", "group_size": 16}}},
}


@pytest.mark.parametrize("variant", FAMILIES)
def test_every_family_reloads_bit_for_bit(variant, tmp_path):
    settings = {"prefix": {"tokens": PREFIX_IDS}} | FAMILIES[variant]
    model = ExportedModel(Exported(tmp_path, variant, settings).folder)
    profile, out = find_profile("hf-exact"), tmp_path / "out"
    out.mkdir()
    write_profile(model, profile, out)
    loaded = exact_loader.complete(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), out)
    ids = tiny.random_ids(2, 24)
    simulation = Simulation(model, profile, tiny.CPU, dtype=torch.float32)
    with torch.no_grad():
        found = loaded.eval()(input_ids=ids, **prefix_cache(loaded, simulation)).logits
    assert torch.equal(found, simulation.logits(simulation.hidden(ids)))


def test_weights_alone_export_as_dynamic_activations(tmp_path):
    model = ExportedModel(
        Exported(tmp_path, "llama", {"quantize": {"activations": "off"}, "rotate": {"r4": False}}).folder
    )
    profile, out = find_profile("vllm-w4a4-dynamic"), tmp_path / "out"
    out.mkdir()
    write_profile(model, profile, out)
    simulation = Simulation(model, profile, tiny.CPU, dtype=torch.float32)
    ids = tiny.random_ids(2, 24)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        found = loaded(input_ids=simulation.with_prefix(ids)).logits[:, -24:]
    assert torch.equal(found, simulation.logits(simulation.hidden(ids)))


def test_profile_is_not_exported_again(plain, tmp_path):
    write_profile(plain, find_profile("vllm-w4a16"), tmp_path)
    with pytest.raises(ConfigError, match="is the export profile vllm-w4a16; give a run"):
        ExportedModel(tmp_path)
