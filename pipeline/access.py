"""What a task sees of the store: its inputs, and the artifacts of other nodes that it yields as it goes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from prefixquant.cluster.store import ArtifactCorrupted, ArtifactMissing, ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact, load_record, publish_artifact
from prefixquant.tasks.artifact import Artifact

InputKeys = Mapping[str, str | tuple[str, ...]]


class LazyArtifacts(Sequence[Artifact]):
    """Artifacts that are loaded, and verified, each time one is taken; none is kept."""

    def __init__(self, store: ArtifactStore, keys: Sequence[str]) -> None:
        self._store, self._keys = store, tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Artifact: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyArtifacts": ...
    def __getitem__(self, index: int | slice) -> "Artifact | LazyArtifacts":
        if isinstance(index, slice):
            return LazyArtifacts(self._store, self._keys[index])
        return load_artifact(self._store, self._keys[index])

    def records(self) -> Iterator[dict[str, Any]]:
        """Give the artifacts' records alone, without reading their tensors."""
        return (load_record(self._store, key) for key in self._keys)


class LazyInputs(Mapping[str, Any]):
    """Argument -> Artifact, or LazyArtifacts where the graph names several producers. Loaded when taken, not kept."""

    def __init__(self, store: ArtifactStore, keys: InputKeys) -> None:
        self._store, self._keys = store, keys

    def __getitem__(self, name: str) -> Any:
        key = self._keys[name]
        return load_artifact(self._store, key) if isinstance(key, str) else LazyArtifacts(self._store, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True, kw_only=True, slots=True)
class Byproduct:
    """The artifact of another node that a run yields as well."""

    key: str

    meta: Mapping[str, Any]
    """What its manifest remembers of its node: task, version, config, name."""

    wanted: bool = True
    """Whether somebody will read it and it is not there."""


class Products:
    """The byproducts of a run, which may be published while it is under way and found by the next attempt at it."""

    def __init__(
        self,
        store: ArtifactStore,
        byproducts: Mapping[str, Byproduct],
        *,
        publishes: bool = True,
        on_published: Callable[[str], None] = lambda label: None,
    ) -> None:
        """With several processes one `publishes`; to the others `publish` does nothing."""
        self.store, self._byproducts = store, byproducts
        self._publishes, self._on_published = publishes, on_published
        self._damaged: set[str] = set()

    def key(self, label: str) -> str:
        """Return the key of a byproduct."""
        return self._byproducts[label].key

    def load(self, label: str) -> Artifact | None:
        """Return a byproduct that is in the store, verified; None if it is not there or damaged."""
        try:
            return load_artifact(self.store, self.key(label))
        except ArtifactMissing:
            return None
        except ArtifactCorrupted:
            self._damaged.add(label)
            return None

    def publish(self, label: str, artifact: Artifact, metrics: Mapping[str, float]) -> None:
        """Store a byproduct; one that `load` found damaged is replaced. `metrics`: kept in its manifest."""
        if not self._publishes:
            return
        if label in self._damaged:
            self.store.discard(self.key(label))
            self._damaged.discard(label)
        meta = {**self._byproducts[label].meta, "metrics": dict(metrics)}
        publish_artifact(self.store, self.key(label), artifact, meta)
        self._on_published(label)

    def stored(self) -> tuple[str, ...]:
        """Return the labels of the byproducts that are in the store."""
        return tuple(label for label, each in self._byproducts.items() if self.store.has(each.key))
