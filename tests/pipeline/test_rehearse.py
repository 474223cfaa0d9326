"""A rehearsal: random weights of a shape through the real graph, in this process and on Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.rehearse import main, rehearse

SMALL = [
    "train.epochs=2", "train.sequences=8", "train.validation_sequences=4", "train.sequence_length=64",
    "data.statistics.sequences=4", "data.statistics.length=64", "data.search.sequences=2", "data.search.length=64",
    "search.coarse_points=3", "search.fine_points=1", "search.weight_points=4",
]  # fmt: skip
STAGES = {"tokens", "rotate", "prefix", "calibrate", "stream", "block", "train", "export", "report"}

WITHOUT = """
import sys
for name in ("ray", "mlflow", "deepspeed", "typer", "s3fs", "datasets"):
    sys.modules[name] = None  # importing it is an error
from prefixquant.pipeline.rehearse import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_rehearsal_needs_neither_ray_nor_mlflow_and_tells_what_every_stage_took(tmp_path):
    command = [sys.executable, "-c", WITHOUT, "--shape", "tiny", "--folder", tmp_path, "--fit", "--json", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    *_, record, last = done.stdout.splitlines()
    stages = {row["stage"]: row for row in json.loads(last)["stages"]}
    assert stages.keys() == STAGES
    assert (stages["rotate"]["tasks"], stages["block"]["tasks"], stages["train"]["tasks"]) == (3, 2, 1)
    for name in STAGES - {"tokens", "report"}:
        assert stages[name]["host_bytes"] > 2**20
        assert stages[name]["written_bytes"] > 0
    shards = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert stages["rotate"]["read_bytes"] == pytest.approx(shards, rel=0.1)  # the headers aside
    assert json.loads(record)["measured"] == "rehearsal of 2 blocks of tiny"


def test_a_rehearsal_on_ray_gives_the_same_artifacts_as_one_in_this_process(tmp_path, ray_session):
    found = {}
    for name, inline in (("here", True), ("ray", False)):
        folder = tmp_path / name
        rehearsal = rehearse("tiny", 2, folder, overrides=[*SMALL, "train=off"], inline=inline)
        assert rehearsal.result.ok
        assert not any(node.task.name == "train" for node in rehearsal.graph.nodes.values())
        store = ArtifactStore(str(folder / "store"))
        blocks = [node for node in rehearsal.graph.order if node.startswith(("block", "rotate"))]
        manifests = [store.manifest(rehearsal.graph.key(node)) for node in blocks]
        found[name] = [sorted((file, each.sha256) for file, each in m.files.items()) for m in manifests]
    assert found["here"] == found["ray"]


def test_a_wrong_override_is_one_message_and_status_2(tmp_path, capsys):
    assert main(["--shape", "tiny", "--inline", "--folder", str(tmp_path), "train.epoch=1"]) == 2
    assert "train.epoch" in capsys.readouterr().err


@pytest.mark.skipif(
    not os.environ.get("PREFIXQUANT_FULL_DEPTH"), reason="80 blocks take minutes; set PREFIXQUANT_FULL_DEPTH=1"
)
def test_a_model_of_80_blocks_goes_through_the_whole_graph_on_ray(tmp_path: Path, ray_session):
    found = rehearse("tiny", 80, tmp_path, overrides=[*SMALL, "train.epochs=1", "train.segments=4"])
    assert found.result.ok
    done = {name for name, state in found.result.states.items() if state == "done"}
    assert {f"trained[{block}]" for block in range(80)} <= done
    store = ArtifactStore(str(tmp_path / "store"))
    streams = [name for name in found.graph.order if found.graph.nodes[name].task.ephemeral]
    assert len(streams) == 80
    assert not any(store.has(found.graph.key(name)) for name in streams)
