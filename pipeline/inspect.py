"""What a store holds, for people: runs, artifacts, and cleaning up."""

from datetime import UTC, datetime
from typing import Any

from prefixquant.cluster.gc import collect_garbage
from prefixquant.cluster.store import ArtifactStore
from prefixquant.tasks.errors import ConfigError


def list_run_records(store_url: str) -> list[dict[str, Any]]:
    """Return the store's runs, newest first: run_id, status, updated (UTC), ppl."""
    store = ArtifactStore(store_url)
    found = [(run_id, store.read_ref(run_id)) for run_id in store.run_ids()]
    found.sort(key=lambda pair: -pair[1].get("updated", 0.0))
    return [
        {
            "run_id": run_id,
            "name": record.get("name"),
            "status": record.get("status"),
            "updated": datetime.fromtimestamp(record.get("updated", 0.0), UTC).strftime("%Y-%m-%d %H:%M:%S"),
            "mlflow_run_id": record.get("mlflow_run_id"),
            "ppl": record.get("ppl", []),
        }
        for run_id, record in found
    ]


def describe(store_url: str, key: str) -> dict[str, Any]:
    """Return a run's record, or an artifact's manifest; `key` may be the beginning of an artifact key.

    Raises:
        ConfigError: nothing, or more than one thing, is called so.
    """
    store = ArtifactStore(store_url)
    if key in store.run_ids():
        return {"run_id": key, **store.read_ref(key)}
    matches = [found for found in store.keys() if found.startswith(key)]  # noqa: SIM118, a store is no dict
    if len(matches) != 1:
        raise ConfigError(
            f"show {key}: {len(matches)} artifacts and no run are called so in {store.url}; "
            f"`prefixquant runs` lists the runs, `show RUN` its keys"
        )
    manifest = store.manifest(matches[0])
    files = {name: {"size": file.size, "sha256": file.sha256} for name, file in manifest.files.items()}
    return {"key": manifest.key, "files": files, "meta": manifest.meta}


def collect(store_url: str, forget: list[str], *, min_age_s: float, dry_run: bool) -> dict[str, Any]:
    """Forget runs, then remove what no run refers to; return how much went and stayed.

    Raises:
        ConfigError: a run to forget is not in the store; nothing is removed then.
    """
    store = ArtifactStore(store_url)
    unknown = sorted(set(forget) - set(store.run_ids()))
    if unknown:
        raise ConfigError(f"gc: no run is called {unknown[0]}; `prefixquant runs` lists them")
    if forget and dry_run:
        raise ConfigError("gc: --forget changes the store, --dry-run does not; give one of them")
    for run_id in forget:
        store.delete_ref(run_id)
    report = collect_garbage(store, min_age_s=min_age_s, dry_run=dry_run)
    return {
        "artifacts": len(report.removed_keys),
        "leftovers": len(report.removed_objects),
        "freed_bytes": report.freed_bytes,
        "kept": len(report.kept_keys),
    }
