"""What a submission is made of, and what it refuses before anything is sent."""

import shlex

import pytest

from prefixquant.pipeline.submission import SubmitOptions, job_spec
from prefixquant.tasks.errors import ConfigError

STORE = "s3://bucket/store"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe of relative paths, in a folder that is the current one."""
    (tmp_path / "recipe.yaml").write_text(
        "{name: tiny, model: {source: models/tiny}, data: {calibration: texts.jsonl}, evaluate: {texts: [held.txt]}}"
    )
    for name in ("texts.jsonl", "held.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return "recipe.yaml"


ON_CLUSTER = ("model.source=/data/model", "data.calibration=/data/texts.jsonl", "evaluate.texts=[wikitext2]")


def refusal(recipe, *overrides, **options):
    with pytest.raises(ConfigError) as refused:
        job_spec(recipe, overrides, SubmitOptions(**({"store": STORE} | options)))
    return str(refused.value)


def test_a_job_runs_the_recipe_it_brings_on_the_cluster_it_is_on(recipe, tmp_path):
    options = SubmitOptions(store=STORE, out="/models/tiny", tracking="http://mlflow:5000", ranks=2, json=True)
    spec = job_spec(recipe, ON_CLUSTER, options)
    assert shlex.join(spec.command) == (
        f"python -m prefixquant.pipeline run recipe.yaml {shlex.join(ON_CLUSTER)} --store {STORE} --address auto "
        "--out /models/tiny --tracking http://mlflow:5000 --ranks 2 --json"
    )
    assert spec.files == {"recipe.yaml": (tmp_path / "recipe.yaml").read_bytes()}
    assert spec.working_dir is None
    assert (spec.metadata["recipe"], spec.metadata["store"]) == ("tiny", STORE)
    assert spec.job_id.startswith("tiny-")
    assert job_spec(recipe, ON_CLUSTER, options).job_id != spec.job_id  # a second submission is another job


def test_a_shipped_recipe_travels_with_the_package(recipe):
    spec = job_spec("w4a4kv4-static", ON_CLUSTER, SubmitOptions(store=STORE))
    assert spec.command[4] == "w4a4kv4-static"
    assert (spec.files, spec.working_dir) == ({}, None)


def test_paths_of_this_machine_are_refused_and_named(recipe):
    message = refusal(recipe)
    lines = message.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["data.calibration", "texts.jsonl"],
        ["evaluate.texts", "held.txt"],
        ["model.source", "models/tiny"],
    ]
    assert all("--working-dir" in line for line in lines)


def test_a_hub_id_is_no_path_unless_a_folder_has_that_name(recipe):
    job_spec(recipe, [*ON_CLUSTER, "model.source=meta-llama/Llama-3.2-1B"], SubmitOptions(store=STORE))
    assert "model.source models/tiny" in refusal(recipe, *ON_CLUSTER, "model.source=models/tiny")
    assert "model.source tiny.gguf" in refusal(recipe, *ON_CLUSTER, "model.source=tiny.gguf")


def test_a_working_folder_has_to_hold_what_the_recipe_names_and_the_recipe(recipe, tmp_path):
    spec = job_spec(recipe, (), SubmitOptions(store=STORE, working_dir=tmp_path))
    assert (spec.working_dir, spec.files, spec.command[4]) == (tmp_path, {}, "recipe.yaml")
    message = refusal(recipe, "data.calibration=other.jsonl", working_dir=tmp_path)
    assert "other.jsonl is not in --working-dir" in message
    assert "recipe recipe.yaml is not inside" in refusal(recipe, *ON_CLUSTER, working_dir=tmp_path / "models")
    assert "is no folder" in refusal(recipe, working_dir=tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "prefixquant-store"}, "--store prefixquant-store is relative"),
        ({"store": "file://store"}, "--store file://store is relative"),
        ({"store": "memory://store"}, "lives in one process alone"),
        ({"tracking": "sqlite:///mlflow.db"}, "--tracking sqlite:///mlflow.db is relative"),
        ({"tracking": "mlruns"}, "--tracking mlruns is relative"),
        ({"out": "out"}, "--out out would be lost"),
    ],
    ids=["folder", "file", "memory", "sqlite", "mlruns", "out"],
)
def test_places_that_are_not_the_cluster_s_are_refused(recipe, options, message):
    assert message in refusal(recipe, *ON_CLUSTER, **options)


@pytest.mark.parametrize("store", ["/shared/store", "file:///shared/store", "s3://bucket/store", "gs://bucket/store"])
@pytest.mark.parametrize("tracking", [None, "off", "http://mlflow:5000", "sqlite:////shared/mlflow.db", "databricks"])
def test_places_that_the_cluster_may_have_are_taken(recipe, store, tracking):
    assert store in job_spec(recipe, ON_CLUSTER, SubmitOptions(store=store, tracking=tracking)).command


def test_secrets_go_into_the_environment_and_nowhere_else(recipe, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "not asked for")
    spec = job_spec(recipe, ON_CLUSTER, SubmitOptions(store=STORE, env=("AWS_SECRET_ACCESS_KEY",)))
    assert spec.env == {"AWS_SECRET_ACCESS_KEY": "hunter2"}
    assert "hunter2" not in repr((spec.command, spec.metadata, spec.files, spec.job_id))
    for options in ({"store": "s3://key:hunter2@bucket"}, {"tracking": "https://me:hunter2@mlflow"}):
        message = refusal(recipe, *ON_CLUSTER, **options)
        assert "--env" in message
        assert "hunter2" not in message
    assert "takes the name of a variable" in refusal(recipe, *ON_CLUSTER, env=("TOKEN=1",))
    assert "--env ABSENT is not set" in refusal(recipe, *ON_CLUSTER, env=("ABSENT",))
