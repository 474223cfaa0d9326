"""What a task sees of the store: its inputs, and the artifacts of other nodes that it yields as it goes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from prefixquant.cluster.store import ArtifactCorrupted, ArtifactMissing, ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact, load_record, publish_artifact
from prefixquant.tasks.artifact import Artifact

InputKeys = Mapping[str, str | tuple[str, ...]]


@dataclass(slots=True)
class Traffic:
    """Bytes that one task has moved so far."""

    read: int = 0
    """From the store, and from the model's checkpoint."""

    written: int = 0
    """To the store, byproducts included."""


class LazyArtifacts(Sequence[Artifact]):
    """Artifacts that are loaded, and verified, each time one is taken; none is kept."""

    def __init__(self, store: ArtifactStore, keys: Sequence[str], traffic: Traffic) -> None:
        self._store, self._keys, self._traffic = store, tuple(keys), traffic

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Artifact: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyArtifacts": ...
    def __getitem__(self, index: int | slice) -> "Artifact | LazyArtifacts":
        if isinstance(index, slice):
            return LazyArtifacts(self._store, self._keys[index], self._traffic)
        return _load(self._store, self._keys[index], self._traffic)

    def records(self) -> Iterator[dict[str, Any]]:
        """Give the artifacts' records alone, without reading their tensors."""
        return (load_record(self._store, key) for key in self._keys)


class LazyInputs(Mapping[str, Any]):
    """Argument -> Artifact, or LazyArtifacts where the graph names several producers. Loaded when taken, not kept."""

    def __init__(self, store: ArtifactStore, keys: InputKeys, traffic: Traffic | None = None) -> None:
        """What is loaded is added to `traffic`."""
        self._store, self._keys, self._traffic = store, keys, traffic or Traffic()

    def __getitem__(self, name: str) -> Any:
        key = self._keys[name]
        if isinstance(key, str):
            return _load(self._store, key, self._traffic)
        return LazyArtifacts(self._store, key, self._traffic)

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
        traffic: Traffic | None = None,
    ) -> None:
        """With several processes one `publishes`; to the others `publish` does nothing."""
        self.store, self._byproducts, self._traffic = store, byproducts, traffic or Traffic()
        self._publishes, self._on_published = publishes, on_published
        self._damaged: set[str] = set()

    def key(self, label: str) -> str:
        """Return the key of a byproduct."""
        return self._byproducts[label].key

    def load(self, label: str) -> Artifact | None:
        """Return a byproduct that is in the store, verified; None if it is not there or damaged."""
        try:
            return _load(self.store, self.key(label), self._traffic)
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
        manifest = publish_artifact(self.store, self.key(label), artifact, meta)
        self._traffic.written += manifest.size
        self._on_published(label)

    def stored(self) -> tuple[str, ...]:
        """Return the labels of the byproducts that are in the store."""
        return tuple(label for label, each in self._byproducts.items() if self.store.has(each.key))


def _load(store: ArtifactStore, key: str, traffic: Traffic) -> Artifact:
    artifact = load_artifact(store, key)
    traffic.read += sum(tensor.nbytes for tensor in artifact.tensors.values())
    traffic.read += sum(len(data) for data in artifact.files.values())
    return artifact
