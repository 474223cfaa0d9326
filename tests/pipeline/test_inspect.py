"""What people see of a store, and what is cleaned out of it."""

import json

import pytest

from prefixquant.pipeline.inspect import collect, describe, list_run_records
from prefixquant.tasks.errors import ConfigError


def test_runs_are_listed_newest_first_with_their_perplexities(done):
    second = done.run("quantize.activations.bits=8")
    records = list_run_records(str(done.store_path))
    assert records[0]["run_id"] == second.run_id
    assert [record["status"] for record in records] == ["finished", "finished"]
    assert records[0]["ppl"] == second.record["perplexity"]
    assert records[0]["updated"] >= records[1]["updated"]


def test_an_artifact_is_described_by_the_beginning_of_its_key(done):
    key = done.keys()["prefix"]
    found = describe(str(done.store_path), key[:10])
    assert found["key"] == key
    assert found["meta"]["task"] == "prefix"
    assert set(found["files"]) == {"tensors.safetensors", "record.json"}
    assert all(file["size"] > 0 and len(file["sha256"]) == 64 for file in found["files"].values())


@pytest.mark.parametrize("name", ["", "zz"], ids=["ambiguous", "unknown"])
def test_a_name_of_none_or_several_is_refused(done, name):
    with pytest.raises(ConfigError, match=r"\d+ artifacts and no run"):
        describe(str(done.store_path), name)


def test_gc_removes_what_only_a_forgotten_run_refers_to(done):
    change = "quantize.activations.bits=8"
    (first,) = done.store.run_ids()
    done.run(change)
    keys, others = set(done.keys().values()), set(done.keys(change).values())
    stored = set(done.store.keys())
    store = str(done.store_path)
    assert collect(store, [], min_age_s=0, dry_run=False)["artifacts"] == 0
    young = collect(store, [first], min_age_s=3600, dry_run=False)
    assert (young["artifacts"], young["leftovers"]) == (0, 0)
    report = collect(store, [], min_age_s=0, dry_run=False)
    assert report["artifacts"] == len((keys - others) & stored) > 0
    assert report["freed_bytes"] > 0
    assert set(done.store.keys()) == stored - (keys - others)
    assert done.run(change).tasks_run == 0
    assert "block[0]" in done.plan().names("run")


def test_gc_leaves_young_leftovers_and_takes_old_ones(done):
    key = done.keys()["block[0]"]
    leftover = done.store_path / "artifacts" / key[:2] / key / ("0" * 32) / "tensors.safetensors"
    leftover.parent.mkdir()
    leftover.write_bytes(b"of a run that was killed")
    store = str(done.store_path)
    assert collect(store, [], min_age_s=3600, dry_run=False)["leftovers"] == 0
    assert leftover.exists()
    assert collect(store, [], min_age_s=0, dry_run=True)["leftovers"] == 1
    assert leftover.exists()
    assert collect(store, [], min_age_s=0, dry_run=False)["leftovers"] == 1
    assert not leftover.exists()
    assert done.run().tasks_run == 0


def test_gc_that_cannot_do_what_is_asked_changes_nothing(done):
    store, (run_id,) = str(done.store_path), done.store.run_ids()
    with pytest.raises(ConfigError, match="no run is called nobody"):
        collect(store, [run_id, "nobody"], min_age_s=0, dry_run=False)
    with pytest.raises(ConfigError, match="--dry-run"):
        collect(store, [run_id], min_age_s=0, dry_run=True)
    assert done.store.run_ids() == [run_id]
    assert json.loads((done.store_path / "refs" / "runs" / f"{run_id}.json").read_text())["status"] == "finished"
