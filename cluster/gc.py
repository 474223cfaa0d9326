"""Garbage collection: remove what no run stands on and what no manifest names, and nothing younger than asked."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from prefixquant.cluster.errors import ArtifactCorrupted, ArtifactMissing
from prefixquant.cluster.store import MANIFEST, ArtifactStore


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a collection removed, or would remove when it was a dry run."""

    removed_keys: tuple[str, ...]
    """Artifacts no run refers to, sorted."""

    removed_objects: tuple[str, ...]
    """Paths of orphans: data objects no manifest names, and temporary files."""

    freed_bytes: int
    """Bytes of both."""

    kept_keys: tuple[str, ...]
    """Artifacts that stay, sorted."""


def collect_garbage(store: ArtifactStore, *, min_age_s: float, dry_run: bool) -> GcReport:
    """Remove unreferenced artifacts, orphaned attempts and temporary files; return what went and what stays.

    Args:
        store: where to collect.
        min_age_s: seconds. Nothing written more recently is touched, which is what protects a writer at work: choose
            it longer than the slowest publish. A run protects older artifacts by writing its record first.
        dry_run: only report.
    Raises:
        ArtifactCorrupted: a run's record is unreadable, so nothing can be called garbage; nothing was removed.
        StoreUnwritable: the store refuses to remove files.
    """
    newest = time.time() - min_age_s
    with store.reading("list its files"):
        sizes = {path: int(info["size"]) for path, info in store.fs.find(store.root, detail=True).items()}
    folders = _by_artifact_and_attempt(store, sizes)
    live = _live_keys(store)  # read after the scan: a run that started meanwhile protects its artifacts
    removed_keys: list[str] = []
    kept_keys: list[str] = []
    orphans: list[str] = []
    freed = 0

    for key, attempts in sorted(folders.items()):
        manifest_paths = attempts.pop(MANIFEST, [])
        named = store.attempts(key)
        if manifest_paths and (key in live or not _all_older(store, manifest_paths, newest)):
            kept_keys.append(key)
            if named is None:
                continue  # an unreadable manifest names nothing; what is still good is for the next run to decide
        elif manifest_paths:
            if not dry_run and key in _live_keys(store):  # a run has begun to rely on it since
                kept_keys.append(key)
                continue
            removed_keys.append(key)
            freed += sum(sizes[path] for attempt in named or () for path in attempts.get(attempt, ()))
            freed += sum(sizes[path] for path in manifest_paths)
            if not dry_run:
                store.discard(key)
        for attempt, paths in attempts.items():
            if attempt not in (named or ()) and _all_older(store, paths, newest):
                orphans += paths

    temporary = [path for path in sizes if path.startswith(f"{store.root}/tmp/")]
    orphans += [path for path in temporary if _all_older(store, [path], newest)]
    if not dry_run:
        for path in orphans:
            store.remove_path(path)
    freed += sum(sizes[path] for path in orphans)
    return GcReport(tuple(removed_keys), tuple(orphans), freed, tuple(kept_keys))


def _by_artifact_and_attempt(store: ArtifactStore, paths: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Return the files below `artifacts/` by key and attempt; the manifest is an attempt called `manifest.json`."""
    prefix = f"{store.root}/artifacts/"
    folders: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        if path.startswith(prefix) and path.count("/", len(prefix)) >= 2:
            _, key, attempt = path[len(prefix) :].split("/")[:3]
            folders[key][attempt].append(path)
    return folders


def _live_keys(store: ArtifactStore) -> set[str]:
    live: set[str] = set()
    for run_id in store.run_ids():
        try:
            keys = store.read_ref(run_id).get("keys", {})
        except ArtifactMissing:
            continue  # deleted since it was listed
        if not isinstance(keys, dict):
            raise ArtifactCorrupted(f"run {run_id} in {store.url}: `keys` must map node names to keys, got {keys!r}")
        live.update(keys.values())
    return live


def _all_older(store: ArtifactStore, paths: Iterable[str], newest: float) -> bool:
    """Return whether all were last written at `newest` (seconds since the epoch) or before; a vanished one was not."""
    try:
        with store.reading("look at its files"):
            return all(store.fs.modified(path).timestamp() <= newest for path in paths)
    except FileNotFoundError:
        return False
