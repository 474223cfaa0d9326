"""The state of a block under training, kept in the store until the trained block is there."""

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from prefixquant.cluster.store import ArtifactCorrupted, ArtifactMissing, ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact, publish_artifact
from prefixquant.pipeline.keys import node_key
from prefixquant.tasks.artifact import Artifact
from prefixquant.tasks.parallel import Ranks

_LOOKS = 3
"""How often a state that goes while it is read is looked for again."""


class StoredCheckpoints:
    """Checkpoints of one block, at most one a number of seconds. Satisfies `train_block.Checkpoints`.

    All ranks call every method; rank 0 alone writes and decides when.
    """

    def __init__(
        self, store: ArtifactStore, of: str, *, epochs: int, seconds: float, ranks: Ranks, device: torch.device
    ) -> None:
        """`of`: key of the trained block. `epochs`: most that it is trained for. `seconds`: between two checkpoints."""
        self._store, self._of, self._epochs, self._seconds = store, of, epochs, seconds
        self._ranks, self._device = ranks, device
        self._last = time.monotonic()
        self._kept: set[int] = set()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest state, tensors and record, or None; the same on every rank."""
        newest, artifact = self._newest()
        seen = torch.tensor([newest, newest**2], dtype=torch.float64, device=self._device)
        mean, square = self._ranks.mean(seen).tolist() if self._ranks.size > 1 else seen.tolist()
        if artifact is None or mean**2 != square:  # all ranks go on from the same state or none does
            return None
        return artifact.tensors, json.loads(artifact.record["state"])

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace the state."""
        self._last = time.monotonic()
        epoch = len(record["epochs"])
        if self._ranks.rank == 0:
            key = self._key(epoch)
            self._store.discard(key)  # of an attempt that diverged
            # As text, since a gradient norm may be infinite, for which JSON records have no word.
            artifact = Artifact(tensors=dict(tensors), record={"state": json.dumps(record)})
            publish_artifact(self._store, key, artifact, {"task": "checkpoint", "of": self._of, "epoch": epoch})
            for older in self._kept - {epoch}:
                self._store.discard(self._key(older))
        self._kept = {epoch}

    def due(self) -> bool:
        """Return whether it is time for another one; the same on every rank."""
        due = time.monotonic() - self._last >= self._seconds
        if self._ranks.size == 1:
            return due
        vote = torch.tensor(float(due and self._ranks.rank == 0), device=self._device)
        return bool(self._ranks.mean(vote) > 0)

    def clear(self) -> None:
        """Remove what is kept: the trained block is stored."""
        if self._ranks.rank == 0:
            for epoch in self._kept:
                self._store.discard(self._key(epoch))
        self._kept = set()

    def _newest(self) -> tuple[int, Artifact | None]:
        """Return the newest state and its epoch; 0 and None without one, and the block starts over.

        A worker whose driver was killed lives on for a moment and replaces its state while it is read here.
        """
        for _ in range(_LOOKS):
            self._kept = self._there()
            newest = max(self._kept, default=0)
            if newest == 0:
                break
            try:
                return newest, load_artifact(self._store, self._key(newest))
            except (ArtifactMissing, ArtifactCorrupted):
                continue
        return 0, None

    def _there(self) -> set[int]:
        epochs = range(1, self._epochs + 1)
        with ThreadPoolExecutor(16) as pool:  # one round trip each on a remote store
            there = list(pool.map(self._store.has, map(self._key, epochs)))
        return {epoch for epoch, found in zip(epochs, there, strict=True) if found}

    def _key(self, epoch: int) -> str:
        return node_key("checkpoint", 1, {"of": self._of, "epoch": epoch}, {})
