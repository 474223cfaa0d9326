"""Models read from, and written to, a real S3 server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from s3 import behind_proxy, make_bucket, s3_server, truncate, use

from prefixquant.cluster.remote_folder import RemoteFolder
from prefixquant.pipeline.evaluation import evaluate_model
from prefixquant.pipeline.materialize import OutputError
from prefixquant.pipeline.remote_model import RemoteCheckpoint
from prefixquant.pipeline.run import RunOptions, run_recipe
from prefixquant.pipeline.source import source_fingerprint
from prefixquant.tasks.errors import CheckpointError
from prefixquant.tasks.load import cached_checkpoint
from prefixquant.tasks.model.block import block_shapes


@pytest.fixture(scope="module")
def backend():
    with s3_server() as endpoint:
        make_bucket(endpoint, "models")
        yield endpoint


@pytest.fixture
def s3(backend, monkeypatch, tmp_path):
    with behind_proxy(backend, monkeypatch, tmp_path / "cache") as proxy:
        yield proxy


def upload(path, url):
    folder = RemoteFolder(url)
    for file in path.iterdir():
        folder.write(file.name, file)
    return url


@pytest.fixture
def model(s3, tmp_path):
    """A sharded model, local and at a URL."""
    tiny.write_tiny_model(tmp_path / "model", blocks=4, sharded=True)
    return tmp_path / "model", upload(tmp_path / "model", f"s3://models/{tmp_path.name}")


def test_a_model_at_a_url_has_the_tensors_and_the_fingerprint_of_its_local_twin(model):
    path, url = model
    remote, local = RemoteCheckpoint(url), cached_checkpoint(str(path))
    assert remote.tensors == local.tensors
    assert remote.default_dtype == local.default_dtype
    for name in local.tensors:
        torch.testing.assert_close(remote.read(name), local.read(name), rtol=0, atol=0)
    assert source_fingerprint(url) == source_fingerprint(path)
    assert [file.suffix for file in remote.path.iterdir()].count(".safetensors") == 0


def test_a_block_is_read_by_ranges_and_nothing_else_is(s3, model):
    path, url = model
    remote = RemoteCheckpoint(url)
    family, config = tiny.FAMILIES["llama"], remote.config()
    before = len(s3.requests)
    block = remote.read_block(family, 2, block_shapes(config, 2))
    asked = s3.requests[before:]
    assert all(each.method == "GET" and each.headers["Range"].startswith("bytes=") for each in asked)
    spans = [each.headers["Range"].removeprefix("bytes=").split("-") for each in asked]
    assert sum(int(last) - int(first) + 1 for first, last in spans) == sum(each.nbytes for each in block.values())
    assert len(asked) < len(block)  # neighbours come together
    local = cached_checkpoint(str(path)).read_block(family, 2, block)
    assert all(torch.equal(block[name], local[name]) for name in local)


def test_a_range_that_is_cut_on_its_way_is_read_again(s3, model):
    path, url = model
    remote = RemoteCheckpoint(url)
    left = [truncate, truncate]
    s3.fault = lambda request: left.pop() if request.method == "GET" and left else None
    name = next(iter(remote.tensors))
    assert torch.equal(remote.read(name), cached_checkpoint(str(path)).read(name))
    assert left == []


def test_what_is_no_model_is_named_by_its_url(s3, model):
    path, url = model
    with pytest.raises(CheckpointError, match=r"s3://models/nowhere has no config\.json"):
        RemoteCheckpoint("s3://models/nowhere")
    shard = sorted(path.glob("*.safetensors"))[1]
    RemoteFolder(url).write(shard.name, shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{url}/{shard.name} is truncated"):
        RemoteCheckpoint(url)


def test_a_run_from_s3_to_s3_equals_a_local_one_and_can_be_measured_where_it_lies(
    s3, backend, world, tmp_path, monkeypatch
):
    use(backend, monkeypatch)  # past the proxy: nothing is to go wrong here
    url = upload(world.model, f"s3://models/{tmp_path.name}")
    store, out = f"s3://models/{tmp_path.name}-store", f"s3://models/{tmp_path.name}-out"
    command = ["run", world.recipe_file(f"model.source={url}"), "--store", store, "--out", out, "--tracking", "off"]
    program = Path(sys.executable).with_name("prefixquant")  # a Ray of its own, whose workers know the server
    done = subprocess.run(
        [str(each) for each in (program, *command, "--cpus", "1", "--json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    local = world.run(out=tmp_path / "out")
    assert (summary["run_id"], summary["out"]) == (local.run_id, out)
    folder = RemoteFolder(out)
    files = sorted((tmp_path / "out").iterdir())
    assert sorted(folder.files()) == [file.name for file in files]
    assert [file.name for file in files if folder.read(file.name) != file.read_bytes()] == []
    found = evaluate_model(out, str(world.text), window=32, max_windows=4, device="cpu")
    assert found["ppl"] == pytest.approx(summary["ppl"], rel=1e-4)

    folder.write("stale.safetensors", b"of an earlier export")
    again = run_recipe(world.recipe(f"model.source={url}"), RunOptions(store=store, tracking="off", out=out))
    assert again.tasks_run == 0
    assert sorted(folder.files()) == [file.name for file in files]
    with pytest.raises(OutputError, match="holds other files"):
        run_recipe(world.recipe(), RunOptions(store=store, tracking="off", out=url))
