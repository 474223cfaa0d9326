"""`prefixquant plan` for a cluster, for several numbers of GPUs, and against a finished run."""

import json
import sys

import pytest

from prefixquant.pipeline.cli import main

LARGE = ("llama-3-70b-w4a4kv4-trained", "--shape", "llama-3-70b", "--machine", "H100")


@pytest.fixture
def plan(monkeypatch, capsys):
    """Run `prefixquant plan ARGUMENTS` in this process; return exit status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "240")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prefixquant", "plan", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as done:
            status = done.code or 0
        return (status, *capsys.readouterr())

    return call


def test_a_cluster_that_is_large_enough_gets_time_and_gpu_hours(plan, tmp_path):
    status, out, _ = plan(*LARGE, "--store", tmp_path, "--nodes", 2, "--gpus-per-node", 8, "--host-memory", 2000)
    assert status == 0
    last = out.splitlines()[-1]
    assert last.startswith("on 2 x 8 NVIDIA H100: ")
    assert "GPU-hours" in last
    assert "GB moved" in out
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_too_small_is_refused_with_what_would_do(plan, tmp_path):
    status, out, err = plan(*LARGE, "--store", tmp_path, "--gpu-memory", 16, "--host-memory", 16)
    assert (status, out) == (2, "")
    assert "of GPU memory, there are 15.3 GB; what would do: " in err
    assert "of host memory, there are 16.0 GB; what would do: train.offload_to_disk=true" in err


def test_scaling_is_a_table_with_a_row_for_each_choice(plan, tmp_path):
    status, out, _ = plan(*LARGE, "--store", tmp_path, "--gpus", "1,8", "--json")
    assert status == 0
    found = json.loads(out.splitlines()[-1])
    assert found["machine"] == "NVIDIA H100"
    rows = {(row["gpus"], row["segments"]): row for row in found["scaling"]}
    assert rows.keys() == {(1, 1), (8, 1), (8, 2), (8, 4), (8, 8)}
    assert rows[8, 8]["seconds"] < rows[8, 1]["seconds"] < rows[1, 1]["seconds"]
    assert rows[1, 1]["gpu_hours"] == pytest.approx(rows[1, 1]["seconds"] / 3600)
    assert sum(rows[8, 8]["critical"].values()) == pytest.approx(rows[8, 8]["critical_seconds"])
    _, out, _ = plan(*LARGE, "--store", tmp_path, "--gpus", "1,8")
    assert sum(line.startswith("| 8 |") for line in out.splitlines()) == 4


def test_check_compares_with_the_stored_tasks_of_the_recipe(plan, done):
    status, out, _ = plan(done.recipe_file(), "--store", done.store_path, "--check", "--json")
    assert status == 0
    found = json.loads(out.splitlines()[-1])
    assert found["device"] == "cpu"
    stages = {row["stage"]: row for row in found["stages"]}
    assert {"rotate", "prefix", "calibrate", "block", "evaluate", "report"} <= stages.keys()
    assert all(row["seconds_ratio"] > 0 for row in stages.values())
    _, out, _ = plan(done.recipe_file(), "--store", done.store_path, "--check")
    assert "ran on cpu, against the figures of cpu core" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check"], "nothing of this recipe is in"),
        (["--check", "--gpus", "1"], "give one of them"),
        (["--gpus", "1,two"], "numbers with commas between them"),
        (["--gpus", "12"], "12 GPUs are no whole nodes of 8"),
        (["--machine", "abacus"], "no figures for a machine called 'abacus'"),
        (["--shape", "cube"], "--shape cube is not known; choose one of tiny, "),
        (["--machine", "cpu", "--gpus", "1"], "none is planned with; add --machine"),
        (["--machine", "cpu", "--gpu-memory", "80"], "--gpu-memory is of a GPU"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(plan, tmp_path, arguments, message):
    status, out, err = plan(*LARGE, "--store", tmp_path, *arguments)
    assert (status, out) == (2, "")
    assert message in err
