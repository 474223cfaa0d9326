"""A whole export: planned, written, measured, and reloaded in a process that does not have this package's modules."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.export import DESCRIPTION, block_file
from prefixquant.tasks.profiles.exemptions import plan_exemptions
from prefixquant.tasks.profiles.export import ProfileExport, ProfileExportConfig, export_profile
from prefixquant.tasks.profiles.folder import LOADER, write_profile
from prefixquant.tasks.profiles.parity import ROTATED_TOLERANCE, ParityError, check_parity
from prefixquant.tasks.profiles.profile import find_profile
from prefixquant.tasks.profiles.simulate import Simulation

WINDOWS = tiny.random_ids(2, 32, seed=3)


def export(model, name: str, out: Path, *, windows=WINDOWS, **settings) -> ProfileExport:
    return export_profile(
        model.folder,
        find_profile(name),
        out,
        ProfileExportConfig(**settings),
        planning_NT=windows,
        measuring_NT=windows,
        device=tiny.CPU,
        origin={},
    )


@pytest.fixture(scope="module")
def exact(plain, tmp_path_factory) -> tuple[ProfileExport, Path]:
    out = tmp_path_factory.mktemp("hf-exact")
    return export(plain, "hf-exact", out), out


# Each of the following starts a process that imports torch and transformers: several seconds, which is the point.
def test_exact_folder_without_online_rotations_reloads_bit_for_bit(exact):
    result, out = exact
    assert result.parity.tolerance == 0
    assert result.parity.largest_difference == 0
    assert result.parity.logits == 2 * 48 * tiny.VOCABULARY
    assert result.parity.standard_deviation > 0.1
    assert result.perplexity == result.perplexity_prefix_kv
    described = json.loads((out / DESCRIPTION).read_text())["export"]
    assert described["measured"]["parity"]["largest_difference"] == 0
    assert described["measured"]["folder_bytes"] == pytest.approx(result.folder_bytes, rel=0.1)


@pytest.mark.parametrize("case", ["blocks", "full"])
def test_exact_folder_with_online_rotations_reloads_after_one_call(case, request, tmp_path):
    result = export(request.getfixturevalue(case), "hf-exact", tmp_path)
    assert result.parity.tolerance == ROTATED_TOLERANCE
    assert result.parity.largest_difference <= ROTATED_TOLERANCE


def test_static_engine_profile_plans_its_exemptions_and_reloads_bit_for_bit(plain, tmp_path):
    result = export(plain, "vllm-w8a8-static", tmp_path)
    assert result.exemptions is not None
    assert result.exempt == result.exemptions.blocks
    assert result.parity.largest_difference == 0
    assert result.exempt == tuple(
        sorted(json.loads((tmp_path / DESCRIPTION).read_text())["export"]["exempt_down_proj"])
    )
    simulation = Simulation(plain, find_profile("vllm-w8a8-static"), tiny.CPU, dtype=torch.float32)
    again = simulation.perplexity(simulation.hidden(WINDOWS, result.exempt), WINDOWS)
    assert result.perplexity == pytest.approx(again)


def test_gate_fails_a_folder_that_computes_something_else(plain, exact, tmp_path):
    out = Path(shutil.copytree(exact[1], tmp_path / "spoilt"))
    tensors = load_file(out / block_file(1))
    tensors["model.layers.1.mlp.up_proj.weight_scale"] *= 1.5
    save_file(tensors, out / block_file(1), metadata={"format": "pt"})
    with pytest.raises(ParityError, match=r"logits differ from the simulation's by up to .*, 0 is allowed"):
        check_parity(plain, find_profile("hf-exact"), out)


def test_gate_fails_a_folder_whose_loading_needs_this_package(plain, exact, tmp_path):
    out = Path(shutil.copytree(exact[1], tmp_path / "leaning"))
    loader = out / LOADER
    loader.write_text("import prefixquant.tasks.errors\n" + loader.read_text())
    with pytest.raises(ParityError, match=r"loading it imported prefixquant.*stock tools must be enough"):
        check_parity(plain, find_profile("hf-exact"), out)


def test_gate_tells_why_a_folder_cannot_be_loaded(plain, exact, tmp_path):
    out = Path(shutil.copytree(exact[1], tmp_path / "broken"))
    (out / block_file(0)).unlink()
    with pytest.raises(ParityError, match=r"cannot be loaded by transformers: .*Error"):
        check_parity(plain, find_profile("hf-exact"), out)


def test_card_and_losses_say_how_to_load_and_what_was_measured(exact):
    result, out = exact
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "pretrained=FOLDER,peft=FOLDER/prefix-adapter,trust_remote_code=True" in card
    assert f"{result.perplexity:.2f}" in card
    assert "| keys and values | `prefix.safetensors`" in card
    assert "nothing is lost" in (out / "LOSSES.md").read_text()


def test_static_profile_without_a_text_asks_for_one_or_for_the_blocks(plain, tmp_path):
    with pytest.raises(ConfigError, match=r"static scales clip; give a text .* \(--text, --exempt\)"):
        export(plain, "vllm-w4a4-static", tmp_path, windows=None)
    result = export(plain, "vllm-w4a4-static", tmp_path, windows=None, exempt=(1,), verify=False)
    assert (result.exempt, result.perplexity, result.parity) == ((1,), None, None)


def test_exemption_of_a_block_that_is_not_there_is_refused(plain, tmp_path):
    with pytest.raises(ConfigError, match="there is no block 2; the model has blocks 0 to 1"):
        export(plain, "vllm-w4a4-static", tmp_path, exempt=(2,))


def test_planner_ranks_blocks_by_measured_ratio_and_takes_no_more_than_help(plain):
    simulation = Simulation(plain, find_profile("vllm-w4a4-static"), tiny.CPU, dtype=torch.float32)
    planned = plan_exemptions(simulation, WINDOWS)
    assert set(planned.perplexity) == {0, 1, 2}
    best = min(planned.perplexity.values())
    chosen = planned.perplexity[len(planned.blocks)]
    assert chosen <= 1.02 * best
    assert all(planned.perplexity[fewer] > 1.02 * best for fewer in range(len(planned.blocks)))
    ranked = sorted(range(2), key=lambda block: -planned.ratios[block])
    assert list(planned.blocks) == ranked[: len(planned.blocks)]


def test_ratio_is_the_largest_prefix_input_over_the_median_token_s(plain):
    """Measured once more by hooks on the whole model in transformers, with weights of the same codes."""
    from transformers import AutoModelForCausalLM

    from prefixquant.tasks.profiles.exemptions import peak_ratios

    profile = find_profile("vllm-w4a16")
    folder = plain.folder.parent / "for-ratios"
    folder.mkdir()
    write_profile(plain, profile, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    simulation = Simulation(plain, profile, tiny.CPU, dtype=torch.float32)
    peaks: list[torch.Tensor] = []
    for layer in loaded.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: peaks.append(args[0].abs().amax(-1)))
    with torch.no_grad():
        loaded(input_ids=simulation.with_prefix(WINDOWS))
    wanted = [float(peak[:, :3].max() / peak[:, 3:].median()) for peak in peaks]
    assert peak_ratios(simulation, WINDOWS) == pytest.approx(wanted, rel=1e-4)
