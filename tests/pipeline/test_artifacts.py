import pytest
import torch

from prefixquant.cluster.store import ArtifactCorrupted, ArtifactStore
from prefixquant.pipeline import artifacts
from prefixquant.pipeline.artifacts import ArtifactFormatError, encode, load_artifact, publish_artifact
from prefixquant.tasks.artifact import Artifact

KEY = "ab" * 32


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path))


def awkward():
    """Return an artifact whose tensors safetensors refuses as they are: transposed, tied, overlapping, with grad."""
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "plain": base,
        "transposed": base.T,
        "tied": base,
        "slice": base[1:],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "codes": torch.tensor([-8, 7], dtype=torch.int8),
        "empty": torch.empty(0, 5),
        "empty too": torch.empty(0),
    }
    return Artifact(tensors=tensors, record={"ids": [1, 2], "ratio": 0.5}, files={"tokenizer/vocab.json": b"{}"})


@pytest.mark.parametrize("large_bytes", [0, 2**20], ids=["through-a-file", "in-memory"])
def test_an_artifact_comes_back_as_it_was(store, monkeypatch, large_bytes):
    monkeypatch.setattr(artifacts, "_LARGE_BYTES", large_bytes)
    wanted = awkward()
    publish_artifact(store, KEY, wanted, {"task": "toy"})
    got = load_artifact(store, KEY)
    assert got.record == wanted.record
    assert got.files == wanted.files
    assert got.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor.detach(), rtol=0, atol=0)
        assert got.tensors[name].dtype == tensor.dtype


def test_encoding_is_deterministic():
    assert encode(awkward()) == encode(awkward())


def test_an_artifact_without_tensors_has_no_tensor_file():
    assert encode(Artifact(record={"a": 1})).keys() == {"record.json"}


@pytest.mark.parametrize(
    "artifact",
    [
        Artifact(record={"loss": float("nan")}),
        Artifact(record={"tensor": torch.ones(1)}),
        Artifact(files={"record.json": b""}),
    ],
    ids=["nan", "tensor-in-record", "reserved-name"],
)
def test_what_cannot_be_stored_is_refused(artifact):
    with pytest.raises(ArtifactFormatError):
        encode(artifact)


def test_a_flipped_bit_is_noticed_on_loading(store):
    publish_artifact(store, KEY, awkward(), {})
    path = store.local_path(KEY, "tensors.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ArtifactCorrupted) as caught:
        load_artifact(store, KEY)
    assert (caught.value.key, caught.value.name) == (KEY, "tensors.safetensors")
