"""Whatever is wrong gives one message and an exit status, loses nothing, and is over once it is put right."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from prefixquant.pipeline.artifacts import TENSORS
from prefixquant.pipeline.cli import main

WEIGHTS = "model.safetensors"
UNMEASURED = "evaluate.texts=[]"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def cli(world, capsys, monkeypatch) -> Callable[..., SimpleNamespace]:
    """Run the command line in this process: `cli(*overrides)` for `run`; gives status, message and stdout's JSON."""

    def run(*overrides: str, store: Path | None = None, out: Path | None = None) -> SimpleNamespace:
        arguments = ["run", str(world.recipe_file()), *overrides, "--store", str(store or world.store_path)]
        arguments += ["--out", str(out)] if out else []
        monkeypatch.setattr(sys, "argv", ["prefixquant", *arguments, "--tracking", "off", "--json"])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as done:
            status = int(done.code or 0)
        stdout, message = capsys.readouterr()
        assert "Traceback" not in message
        assert message.count("error: ") == (status != 0)
        return SimpleNamespace(
            status=status, message=message, summary=json.loads(stdout.splitlines()[-1]) if stdout else None
        )

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Where the store of a finished run is kept for the tests of this file."""
    return tmp_path_factory.mktemp("finished") / "store"


@pytest.fixture
def stored(cli, world, finished) -> dict:
    """A finished run in the store, as the command line reported it."""
    if finished.exists():
        shutil.copytree(finished, world.store_path)
    found = cli()
    assert found.status == 0, found.message
    if not finished.exists():
        shutil.copytree(world.store_path, finished)
    return found.summary


def says(found: SimpleNamespace, status: int, *parts: str) -> None:
    assert found.status == status, found.message
    for part in parts:
        assert part in found.message


def nothing_was_lost(cli: Callable[..., SimpleNamespace], stored: dict) -> None:
    """What was wrong is right again: the same run is complete without any work."""
    again = cli()
    assert again.status == 0, again.message
    assert again.summary["tasks_run"] == 0
    assert again.summary["ppl"] == stored["ppl"]


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# The model


def test_missing_shard_is_named_and_once_back_nothing_was_lost(world, cli):
    shutil.rmtree(world.model)
    tiny.write_tiny_model(world.model, blocks=2, sharded=True)
    stored = cli().summary
    shard = sorted(world.model.glob("model-*.safetensors"))[1]
    moved = shard.rename(world.folder / "away")
    says(cli(), 2, "load failed", str(shard), "is missing", "download the shard again")
    moved.rename(shard)
    nothing_was_lost(cli, stored)


def test_truncated_shard_is_named_and_once_whole_nothing_was_lost(world, cli, stored):
    whole = (world.model / WEIGHTS).read_bytes()
    (world.model / WEIGHTS).write_bytes(whole[:-1000])
    says(cli(), 2, WEIGHTS, "truncated", f"needs {len(whole)} bytes, it has {len(whole) - 1000}", "download it again")
    (world.model / WEIGHTS).write_bytes(whole)
    nothing_was_lost(cli, stored)


def test_wrong_tensor_shape_is_named_with_both_shapes(world, cli, stored):
    whole = (world.model / WEIGHTS).read_bytes()
    edit_weights(world.model, lambda w: w.update({DOWN: torch.zeros(48, 90)}))
    says(cli(), 2, DOWN, "[48, 90]", "[48, 96]", "config")
    (world.model / WEIGHTS).write_bytes(whole)
    nothing_was_lost(cli, stored)


def test_unknown_architecture_is_refused_with_the_known_ones(world, cli, stored):
    tiny.edit_config(world.model, model_type="gpt2")
    says(cli(), 2, "'gpt2' is not supported", "llama, mistral, qwen2, qwen3", "families.py")
    tiny.edit_config(world.model, model_type="llama")
    tiny.edit_config(world.model, architectures=["LlamaForSequenceClassification"])
    says(cli(), 2, "LlamaForSequenceClassification", "LlamaForCausalLM")


def test_nan_weight_is_named_with_its_block_and_the_other_blocks_are_kept(world, cli, stored):
    whole = (world.model / WEIGHTS).read_bytes()

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[DOWN][3, 4] = float("nan")

    edit_weights(world.model, spoil)
    found = cli("evaluate.full_precision=false")
    says(found, 1, "rotate[1] failed", "block 1: mlp.down_proj.weight holds 1 NaN or infinite values of 4608")
    states = {entry.node.name: entry.state for entry in world.plan("evaluate.full_precision=false").entries}
    assert states["rotate[0]"] == states["rotate[ends]"] == "cached"
    (world.model / WEIGHTS).write_bytes(whole)
    nothing_was_lost(cli, stored)


def test_infinite_activation_is_named_with_its_block_and_finished_work_is_kept(world, cli):
    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights[DOWN] *= 3e4  # finite in float16, the block's output is not

    edit_weights(world.model, enlarge)
    options = ("model.dtype=float16", "evaluate.full_precision=false")
    found = cli(*options)
    says(found, 1, "prefix failed", "block 1", "NaN or infinite")
    states = {entry.node.name: entry.state for entry in world.plan(*options).entries}
    assert states["rotate[1]"] == states["tokens[statistics]"] == "cached"
    found = cli("model.dtype=float32", "evaluate.full_precision=false")
    assert found.status == 0, found.message
    assert found.summary["tasks_cached"] > 3  # load and the texts


def test_weight_beyond_the_chosen_type_is_named_with_its_block(world, cli):
    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights[DOWN] *= 1e7

    edit_weights(world.model, enlarge)
    found = cli("model.dtype=float16", "evaluate.full_precision=false")
    says(found, 1, "rotate[1] failed", "block 1: mlp.down_proj.weight", "float16", "model.dtype")


# The tokenizer


def without_bos(folder: Path) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny.tiny_tokenizer().backend_tokenizer, eos_token="</s>")
    plain.save_pretrained(folder)


def test_llama_tokenizer_without_bos_is_refused_with_the_way_out_that_works(world, cli):
    without_bos(world.model)
    says(cli(), 2, "no BOS token", "prefix.tokens=[...]")
    found = cli("prefix.tokens=[5, 1]", UNMEASURED)
    assert found.status == 0, found.message
    assert found.summary["prefix_token_ids"] == [5, 1]


def test_qwen2_tokenizer_without_bos_uses_the_end_of_text_token(world, cli):
    shutil.rmtree(world.model)
    tiny.write_tiny_model(world.model, "qwen2", blocks=2, bos_token_id=None)
    without_bos(world.model)
    found = cli(UNMEASURED)
    assert found.status == 0, found.message
    assert found.summary["prefix_token_ids"][-1] == tiny.EOS


def test_missing_tokenizer_is_named(world, cli):
    for file in world.model.glob("tokenizer*"):
        file.unlink()
    says(cli(), 2, str(world.model), "tokenizer cannot be loaded", "tokenizer.json")


# Where the model is


def test_hub_id_out_of_reach_is_one_line(world, cli):
    recipe = world.recipe_file("model.source=nobody/nothing")
    done = subprocess.run(
        [sys.executable, "-c", "from prefixquant.pipeline.cli import main; main()", "run", str(recipe)],
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(world.folder / "hub")},
        cwd=world.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "nobody/nothing" in done.stderr
    assert "local folder" in done.stderr


def test_missing_gguf_file_is_named(world, cli):
    says(cli(f"model.source={world.folder / 'no.gguf'}"), 2, str(world.folder / "no.gguf"), "does not exist")


def test_truncated_gguf_file_is_named(world, cli):
    path = world.folder / "part.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("output_norm.weight", torch.ones(48).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:-64])
    says(cli(f"model.source={path}"), 2, str(path), "truncated or no GGUF file", "download it again")


# The texts


def test_empty_calibration_text_is_named_and_once_filled_the_run_goes_on(world, cli):
    full = world.calibration.read_text()
    world.calibration.write_text("\n\n")
    says(cli(UNMEASURED), 2, str(world.calibration), "holds no text", "give a")
    world.calibration.write_text(full)
    found = cli(UNMEASURED)
    assert found.status == 0, found.message
    assert found.summary["tasks_cached"] >= 4  # load and the rotations


def test_short_calibration_text_is_told_with_both_lengths_and_the_key(world, cli):
    world.calibration.write_text(json.dumps({"text": "twenty letters only."}))
    found = cli(UNMEASURED)
    says(found, 2, "holds 20 tokens", "windows of 32", "smaller data.statistics.length")
    assert cli("data.statistics.length=20", "data.search.length=20", UNMEASURED).status == 0


def test_missing_text_is_named_before_anything_runs(world, cli):
    says(cli("data.calibration=/nowhere/text.jsonl"), 2, "/nowhere/text.jsonl", "cannot be read")


# The recipe


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("quantize.weights.bits=9", ("quantize.weights.bits", "2 to 8", "got 9")),
        ("quantize.activations.granularity=token", ("quantize.activations", "'token' contradicts mode 'static'")),
        ("quantize.keys.group_size=8", ("quantize.keys.group_size", "granularity 'group'")),
        ("quantize.keys.before_rope=true", ("quantize.keys.before_rope contradicts rotate.r3", "rotate.r3=off")),
        ("quantize.wieghts=off", ("unknown key quantize.wieghts", "did you mean quantize.weights?")),
        ("search.max_ratio=0.1", ("0 < min_ratio < max_ratio",)),
        ("prefix.tokens=[999]", ("prefix.tokens", "999", "258")),
        ("rotate.r2=hadamar", ("rotate.r2", "did you mean hadamard?")),
    ],
    ids=["bits", "granularity", "group", "r3", "unknown", "range", "vocabulary", "choice"],
)
def test_contradiction_in_the_recipe_is_told_with_its_key(cli, override, parts):
    says(cli(override), 2, *parts)


def test_group_size_that_does_not_divide_the_model_is_told_with_both_numbers(cli):
    found = cli("quantize.weights.granularity=group", "quantize.weights.group_size=40")
    says(found, 2, "quantize.weights.group_size 40 does not divide", "48")


# Store and output folder


def test_store_below_a_file_is_unwritable(world, cli):
    (world.folder / "file").write_text("")
    says(cli(store=world.folder / "file" / "store"), 2, str(world.folder / "file" / "store"), "choose another store")


def test_output_folder_with_other_files_is_refused_before_anything_runs(world, cli):
    (world.folder / "thesis").mkdir()
    (world.folder / "thesis" / "draft.tex").write_text("years of work")
    says(cli(out=world.folder / "thesis"), 2, "holds other files", "give a new or empty folder")
    assert (world.folder / "thesis" / "draft.tex").read_text() == "years of work"
    assert not world.store_path.exists()


def flip(world, node: str, name: str = TENSORS) -> Path:
    """Change one byte of a stored object, its size staying the same."""
    path = world.store.local_path(world.keys()[node], name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_corrupted_artifact_is_built_again_when_a_task_reads_it(world, cli, stored):
    flip(world, "block[0]")
    found = cli("evaluate.max_windows=3")
    assert found.status == 0, found.message
    assert found.summary["tasks_run"] <= 8  # the new windows and evaluations, what gives block 0, the report
    nothing_was_lost(cli, stored)


@pytest.mark.parametrize("node", ["block[1]", "rotate[ends]"])
def test_corrupted_artifact_is_built_again_when_only_the_output_folder_needs_it(world, cli, stored, node):
    flip(world, node)
    found = cli(out=world.folder / "out")
    assert found.status == 0, found.message
    assert found.summary["ppl"] == stored["ppl"]
    nothing_was_lost(cli, stored)


@pytest.mark.parametrize(("node", "name"), [("load", "config.json"), ("report", "record.json")])
def test_corrupted_record_is_built_again_when_the_driver_reads_it(world, cli, stored, node, name):
    flip(world, node, name)
    found = cli()
    assert found.status == 0, found.message
    assert found.summary["ppl"] == stored["ppl"]
    nothing_was_lost(cli, stored)


def test_truncated_artifact_is_built_again(world, cli, stored):
    path = world.store.local_path(world.keys()["block[0]"], TENSORS)
    path.write_bytes(path.read_bytes()[:100])
    found = cli()
    assert found.status == 0, found.message
    assert found.summary["ppl"] == stored["ppl"]
    nothing_was_lost(cli, stored)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, too small for a run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"mounting is not permitted here: {err}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_ends_the_run_and_after_making_room_it_goes_on(cli, small_disk):
    store = small_disk / "store"
    says(cli(store=store), 1, "no space left", "Make room or choose another store", "what is finished is stored")
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    found = cli(store=store)
    assert found.status == 0, found.message
    assert found.summary["tasks_cached"] >= 3
