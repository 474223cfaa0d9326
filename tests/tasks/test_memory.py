"""The peak memory of a run does not grow with the number of blocks: nothing but the ends is ever held whole."""

import json
import subprocess
import sys
from pathlib import Path

from tiny import tiny_config, tiny_model, tiny_tokenizer

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
recipe = small_recipe(folder, folder / "model", prefix={"tokens": [0, 5]} if sys.argv[2] == "given" else {})
_, _, results = run_inline(recipe, ArtifactStore(str(folder / "store")))
print(json.dumps({name: result.peak_host_bytes for name, result in results.items()}))
"""


def peaks(folder: Path, blocks: int) -> tuple[dict[str, int], int]:
    """Return the peak memory of each stage of a run in a process of its own, and the bytes of one block."""
    model = tiny_model(tiny_config("llama", blocks=blocks, **SIZES))
    block_bytes = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    model.save_pretrained(folder / "model", max_shard_size="50MB")
    tiny_tokenizer().save_pretrained(folder / "model")
    del model
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), "search"],
        env={"PYTHONPATH": str(TESTS), "PATH": "", "HOME": str(folder), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stages: dict[str, int] = {}
    for name, peak in json.loads(done.stdout.splitlines()[-1]).items():
        stage = name.split("[")[0]
        stages[stage] = max(peak, stages.get(stage, 0))
    return stages, block_bytes


def test_peak_memory_of_every_stage_is_that_of_a_model_with_a_quarter_of_the_blocks(tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    few, block_bytes = peaks(tmp_path / "few", 4)
    many, _ = peaks(tmp_path / "many", 16)
    print({stage: (few[stage] / 2**20, many[stage] / 2**20) for stage in few}, block_bytes / 2**20)
    assert {"rotate", "prefix", "calibrate", "stream", "block", "evaluate", "export"} <= few.keys()
    # The model is twelve blocks larger. One block is allowed for what the allocator keeps from stage to stage.
    for stage, peak in many.items():
        assert peak - few[stage] < block_bytes, f"{stage}: {few[stage]} bytes with 4 blocks, {peak} with 16"
