"""Runs of a store side by side: what was asked for, what it gave, what it cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefixquant.cluster.errors import ArtifactMissing
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import RECORD, TENSORS, load_record
from prefixquant.tasks.errors import ConfigError

Row = tuple[str, list[str]]
"""What it is, and the value of each run; empty where a run has none."""


def compare_runs(store_url: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a record for each run; a name is a run, the beginning of one, or that of a recipe, whose last run it is.

    `run_id`, `status`, `model`, `bits` (of weights, activations, keys and values; None for unquantized), `modes`
    (static or dynamic), `trained`, `gptq`, `prefix` (tokens as text; None before it is known), `perplexity` and `tasks`
    (as in the report), `seconds` (of all stored tasks together), `export_bytes` (of the model to load; None before it
    is there).

    Raises:
        ConfigError: no run, or more than one, is called so.
    """
    store = ArtifactStore(store_url)
    refs = {run_id: store.read_ref(run_id) for run_id in store.run_ids()}
    return [_record(store, run_id, refs[run_id]) for run_id in (_find(name, refs, store.url) for name in names)]


def _find(name: str, refs: Mapping[str, Mapping[str, Any]], store: str) -> str:
    if name in refs:
        return name
    of_recipe = [run_id for run_id, ref in refs.items() if ref.get("name") == name]
    if of_recipe:
        return max(of_recipe, key=lambda run_id: refs[run_id].get("updated", 0.0))
    begun = sorted(run_id for run_id in refs if run_id.startswith(name))
    if len(begun) == 1:
        return begun[0]
    found = f"{len(begun)} runs begin so: {', '.join(begun[:3])}" if begun else "no run or recipe is called so"
    raise ConfigError(f"compare {name}: {found} in {store}; `prefixquant runs` lists them")


def _record(store: ArtifactStore, run_id: str, ref: Mapping[str, Any]) -> dict[str, Any]:
    recipe, keys = ref["recipe"], ref["keys"]
    report = _record_of(store, keys.get("report"))
    quantize = recipe["quantize"]
    return {
        "run_id": run_id,
        "status": ref["status"],
        "model": recipe["model"]["source"],
        "bits": {name: spec and spec["bits"] for name, spec in quantize.items()},
        "modes": {name: spec and spec.get("mode") for name, spec in quantize.items()},
        "trained": recipe["train"] is not None,
        "gptq": recipe["gptq"] is not None,
        "prefix": None if report is None else report["prefix"]["tokens"],
        "perplexity": [] if report is None else report["perplexity"],
        "tasks": [] if report is None else report.get("tasks", []),
        "seconds": _seconds(store, keys.values()),
        "export_bytes": _export_bytes(store, keys.get("export")),
    }


def _record_of(store: ArtifactStore, key: str | None) -> dict[str, Any] | None:
    if key is None or not store.has(key):
        return None
    return load_record(store, key)


def _seconds(store: ArtifactStore, keys: Any) -> float:
    """Return the seconds of the tasks whose artifacts are still there; streams and parts are not."""
    total = 0.0
    for key in set(keys):
        try:
            total += store.manifest(key).meta.get("seconds", 0.0)
        except ArtifactMissing:
            continue
    return total


def _export_bytes(store: ArtifactStore, key: str | None) -> int | None:
    """Return the size of the folder that a run writes: the export's small files, and the tensors that it names."""
    if key is None or not store.has(key):
        return None
    manifest = store.manifest(key)
    total = sum(file.size for name, file in manifest.files.items() if name != RECORD)
    inputs = manifest.meta["inputs"]
    try:
        for part in (inputs["ends"], inputs["prefix"], *inputs["blocks"]):
            files = store.manifest(part).files
            total += files[TENSORS].size if TENSORS in files else 0
    except ArtifactMissing:
        return None
    return total


def comparison(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the runs as rows of a table, best numbers unmarked: runs on different texts share no row of theirs."""
    rows: list[Row] = [
        ("model", [str(each["model"]) for each in records]),
        ("bits", [_bits(each) for each in records]),
        ("training", [_training(each) for each in records]),
        ("prefix", [_prefix(each["prefix"]) for each in records]),
    ]
    ppl = {("perplexity", each["text"], each["model"]) for record in records for each in record["perplexity"]}
    for _, text, model in sorted(ppl, key=_subject_then_model):
        found = [_ppl(record, text, model) for record in records]
        rows.append((f"ppl {text}, {model}", found))
    tasks = {
        (each["task"], metric, each["model"])
        for record in records
        for each in record["tasks"]
        for metric in each["metrics"]
    }
    for task, metric, model in sorted(tasks, key=_subject_then_model):
        rows.append((f"{task} {metric}, {model}", [_task(record, task, metric, model) for record in records]))
    rows += [
        ("seconds of tasks", [f"{each['seconds']:.0f}" for each in records]),
        ("size", ["" if each["export_bytes"] is None else f"{each['export_bytes'] / 1e6:.1f} MB" for each in records]),
        ("status", [str(each["status"]) for each in records]),
    ]
    return rows


def _subject_then_model(row: tuple[str, str, str]) -> tuple[str, str, bool, str]:
    return row[0], row[1], row[2] != "full precision", row[2]


def _bits(record: Mapping[str, Any]) -> str:
    names = {"weights": "W", "activations": "A", "keys": "K", "values": "V"}
    bits = " ".join(f"{letter}{record['bits'][name] or '16'}" for name, letter in names.items())
    mode = record["modes"]["activations"]
    return f"{bits} {mode}" if mode else bits


def _training(record: Mapping[str, Any]) -> str:
    done = [name for name in ("trained", "gptq") if record[name]]
    return " and ".join(done).replace("gptq", "GPTQ") or "none"


def _prefix(tokens: Sequence[str] | None) -> str:
    if tokens is None:
        return ""
    return ", ".join(repr(token) for token in tokens) or "none"


def _ppl(record: Mapping[str, Any], text: str, model: str) -> str:
    found = [each["ppl"] for each in record["perplexity"] if (each["text"], each["model"]) == (text, model)]
    return f"{found[0]:.2f}" if found else ""


def _task(record: Mapping[str, Any], task: str, metric: str, model: str) -> str:
    for each in record["tasks"]:
        if (each["task"], each["model"]) == (task, model) and metric in each["metrics"]:
            error = each["stderr"][metric]
            return f"{each['metrics'][metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
    return ""
