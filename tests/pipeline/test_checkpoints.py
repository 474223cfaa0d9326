"""The state of a block under training in the store, with another worker at it."""

import pytest
import torch

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.checkpoints import StoredCheckpoints
from prefixquant.tasks.steps import SingleRank

OF = "ab" * 32


def checkpoints(store, epochs=9):
    return StoredCheckpoints(store, OF, epochs=epochs, seconds=0.0, ranks=SingleRank(), device=torch.device("cpu"))


def save(kept, epoch):
    kept.save({"weight": torch.full((3,), float(epoch))}, {"epochs": [{"loss": 1.0}] * epoch})


def test_the_newest_state_comes_back_and_is_the_only_one_kept(tmp_path):
    store = ArtifactStore(str(tmp_path))
    kept = checkpoints(store)
    assert kept.load() is None
    for epoch in (1, 2):
        save(kept, epoch)
    tensors, record = checkpoints(store).load()
    assert tensors["weight"].tolist() == [2.0, 2.0, 2.0]
    assert len(record["epochs"]) == 2
    assert len(store.keys()) == 1
    kept.clear()
    assert store.keys() == []


@pytest.mark.parametrize("read", ["manifest", "local_path"])
def test_a_state_replaced_while_it_is_read_is_read_as_its_successor(tmp_path, monkeypatch, read):
    """So does a worker whose driver was killed and that lives on for an epoch."""
    store = ArtifactStore(str(tmp_path))
    outlived = checkpoints(store)
    save(outlived, 3)
    whole = getattr(ArtifactStore, read)

    def overtaken(self, *arguments):
        found = whole(self, *arguments)
        monkeypatch.undo()
        save(outlived, 4)
        return found

    reader = checkpoints(store)
    there = reader._there
    # The states are listed in peace; then the read that is meant is overtaken.
    monkeypatch.setattr(reader, "_there", lambda: (there(), monkeypatch.setattr(ArtifactStore, read, overtaken))[0])
    tensors, record = reader.load()
    assert tensors["weight"].tolist() == [4.0, 4.0, 4.0]
    assert len(record["epochs"]) == 4


def test_a_broken_state_is_none_and_the_block_starts_over(tmp_path):
    store = ArtifactStore(str(tmp_path))
    save(checkpoints(store), 2)
    path = store.local_path(store.keys()[0], "tensors.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    kept = checkpoints(store)
    assert kept.load() is None
    save(kept, 2)
    assert checkpoints(store).load() is not None
