import os
import shutil

import pytest
import tiny

from prefixquant.pipeline.recipe import ModelConfig
from prefixquant.pipeline.source import resolve_source, source_fingerprint
from prefixquant.tasks.errors import CheckpointError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIXQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def model(tmp_path):
    tiny.write_tiny_model(tmp_path / "model", blocks=1)
    return tmp_path / "model"


def test_a_fingerprint_depends_on_the_files_and_not_on_their_place(model, tmp_path):
    before = source_fingerprint(model)
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("decides nothing")
    (tmp_path / "copy" / "consolidated.safetensors").write_bytes(b"the same weights for another program")
    assert source_fingerprint(tmp_path / "copy") == before
    tiny.edit_config(tmp_path / "copy", rope_theta=5.0)
    assert source_fingerprint(tmp_path / "copy") != before
    assert source_fingerprint(model) == before


def test_a_changed_weight_changes_the_fingerprint(model):
    before = source_fingerprint(model)
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, 1))  # whatever the clock's resolution is
    assert source_fingerprint(model) != before


def test_a_fingerprint_needs_no_cache(model, tmp_path, monkeypatch):
    wanted = source_fingerprint(model)
    (tmp_path / "cache" / "fingerprints.json").write_text("{ half")
    assert source_fingerprint(model) == wanted
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PREFIXQUANT_CACHE", str(tmp_path / "file" / "cache"))
    assert source_fingerprint(model) == wanted


def test_a_folder_without_model_files_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model files"):
        source_fingerprint(tmp_path / "empty")


def test_a_local_source_is_returned_whole(model, monkeypatch):
    assert resolve_source(ModelConfig(source=str(model))) == model
    monkeypatch.chdir(model.parent)
    assert resolve_source(ModelConfig(source="model")) == model


@pytest.mark.parametrize("source", ["./nowhere", "nowhere.gguf", "/no/where/at/all", "nowhere"])
def test_a_source_that_is_not_there_is_named(source):
    with pytest.raises(CheckpointError, match=f"{source}.*does not exist; give"):
        resolve_source(ModelConfig(source=source))


def test_a_hub_id_out_of_reach_is_named_with_the_reason():
    with pytest.raises(CheckpointError, match="'some/model' is no local path and cannot be had from the hub"):
        resolve_source(ModelConfig(source="some/model"))
