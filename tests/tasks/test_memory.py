"""The peak memory of a run does not grow with the number of blocks: only embedding and head are ever held whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny

TESTS = Path(__file__).resolve().parents[1]
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}

RUN = """
import json, sys
from pathlib import Path
from inline import run_inline, small_recipe
from prefixquant.cluster.store import ArtifactStore

folder = Path(sys.argv[1])
search = {"coarse_points": 2, "fine_points": 1, "weight_points": 2}
export = {"profiles": ["hf-exact"], "verify": False}
recipe = small_recipe(folder, folder / "model", search=search, export=export)
_, _, results = run_inline(recipe, ArtifactStore(str(folder / "store")))
print(json.dumps({name: result.peak_host_bytes for name, result in results.items()}))
"""


def start_run(folder: Path, blocks: int) -> tuple[subprocess.Popen[str], int]:
    """Start a run of every stage over a random model, in a process of its own, and return it with a block's bytes."""
    model = tiny.tiny_model(tiny.tiny_config("llama", blocks=blocks, **SIZES))
    model.save_pretrained(folder / "model", max_shard_size="50MB")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    environment = os.environ | {
        "PYTHONPATH": str(TESTS),
        "PREFIXQUANT_CACHE": str(folder / "cache"),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back to the system: what is held is measured
    }
    command = [sys.executable, "-c", RUN, str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, sum(parameter.nbytes for parameter in model.model.layers[0].parameters())


def peaks(process: subprocess.Popen[str]) -> dict[str, int]:
    """Return the largest memory of the process in each stage."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    stages: dict[str, int] = {}
    for name, peak in json.loads(output.splitlines()[-1]).items():
        stage = name.replace("export[", "profile[").split("[")[0]
        stages[stage] = max(peak, stages.get(stage, 0))
    return stages


def test_peak_memory_of_every_stage_does_not_grow_with_the_number_of_blocks(tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    many_blocks, _ = start_run(tmp_path / "many", 16)
    few_blocks, block_bytes = start_run(tmp_path / "few", 4)
    few, many = peaks(few_blocks), peaks(many_blocks)
    assert {"rotate", "prefix", "calibrate", "stream", "block", "evaluate", "export", "profile"} <= few.keys()
    for stage, peak in many.items():
        # The model is twelve blocks larger. One is allowed for the noise of small allocations and mapped shards.
        assert peak - few[stage] < block_bytes, f"{stage}: {few[stage]} bytes with 4 blocks, {peak} with 16"
