"""What a run must not do with what it is given: tell secrets, run code of a model folder or a recipe."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tiny
from nodes import ENVIRONMENT
from processes import MARK, end_marked
from s3 import environment, make_bucket, s3_server, use

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.evaluation import evaluate_model
from prefixquant.pipeline.recipe import load_recipe
from prefixquant.pipeline.tracking import Tracker
from prefixquant.tasks.errors import CheckpointError, ConfigError, UnsupportedModelError
from prefixquant.tasks.load import load_model

CANARY = "canary5ecret"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}-key",
    "AWS_SESSION_TOKEN": f"{CANARY}-token",
    "MLFLOW_TRACKING_PASSWORD": f"{CANARY}-mlflow",
    "HF_TOKEN": f"hf_{CANARY}",
}


def files_with(text: str, *folders: Path) -> list[str]:
    """Return the files below the folders that hold the text; sockets and what has gone meanwhile aside."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            if text.encode() in path.read_bytes():
                found.append(str(path))
    return found


def test_no_secret_of_the_environment_is_written_anywhere(world, tmp_path, monkeypatch):
    """The store on S3, whose keys are among them, MLflow, the output folder, Ray's logs and what is printed."""
    mark, scratch = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="pq-", dir="/tmp"))  # short: Ray makes sockets in it
    with s3_server() as endpoint:
        bucket = make_bucket(endpoint, "secrets")
        variables = environment(endpoint) | SECRETS | {"RAY_TMPDIR": str(scratch), MARK: mark}
        command = [
            Path(sys.executable).with_name("prefixquant"),
            "run",
            world.recipe_file(),
            "--store",
            f"{bucket}/store",
        ]
        command += ["--out", tmp_path / "out", "--cpus", "1", "--tracking", f"sqlite:///{tmp_path}/mlflow.db"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [str(part) for part in command], env=clean | ENVIRONMENT | variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert CANARY not in done.stdout + done.stderr
        written = [tmp_path / "out", tmp_path / "mlflow.db", tmp_path / "cache", scratch]
        assert all(path.exists() for path in written)
        assert files_with("evaluate", scratch)  # Ray's logs are among what is searched
        assert files_with(CANARY, tmp_path, scratch) == []
        use(endpoint, monkeypatch)
        store = ArtifactStore(f"{bucket}/store")
        stored = store.fs.find(store.root)
        assert len(stored) > 20
        assert [path for path in stored if CANARY in path or CANARY.encode() in store.fs.cat_file(path)] == []
        connection = HTTPConnection(urlsplit(endpoint).netloc)
        connection.request("GET", "/moto-api/data.json")  # names, tags and metadata of everything on the server
        assert CANARY.encode() not in connection.getresponse().read()
    end_marked(mark)
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("model.source", f"s3://key:{CANARY}@bucket/model"),
        ("data.calibration", f"s3://bucket/texts.jsonl?X-Amz-Signature={CANARY}&of=.jsonl"),
        ("evaluate.texts", f"https://me:{CANARY}@host/texts.jsonl"),
    ],
)
def test_a_secret_in_a_url_of_a_recipe_is_refused_and_not_repeated(world, key, url):
    value = json.dumps([url]) if key == "evaluate.texts" else url
    with pytest.raises(ConfigError, match=rf"{key} .*give credentials by the environment") as refused:
        world.recipe(f"{key}={value}")
    assert CANARY not in str(refused.value)


def test_a_password_in_the_address_of_mlflow_does_not_show_in_what_could_not_be_logged():
    tracker = Tracker.start(
        uri=f"http://me:{CANARY}@127.0.0.1:1", experiment="x", run_name="x", run_id=None, params={}, tags={}
    )
    (failure,) = tracker.failures
    assert "127.0.0.1:1" in failure
    assert CANARY not in failure


EVIL = """
from pathlib import Path
Path({path!r}).write_text("run")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""


@pytest.fixture
def trap(tmp_path):
    """A model folder with code that leaves a file if it is run, and that file."""
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    tiny.write_tiny_model(folder, blocks=1)
    (folder / "evil.py").write_text(EVIL.format(path=str(sprung)))
    return folder, sprung


def refer(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def asked(monkeypatch):
    """What was asked on the terminal; every answer is yes."""
    prompts = []
    monkeypatch.setattr("builtins.input", lambda prompt="": prompts.append(prompt) or "y")
    return prompts


def test_code_that_a_model_s_config_refers_to_is_not_run(trap, asked):
    folder, sprung = trap
    refer(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert load_model(str(folder)).num_blocks == 1  # the family is known, so nothing of it is needed
    (folder.parent / "text.txt").write_text("some words and more of them " * 20)
    assert evaluate_model(str(folder), str(folder.parent / "text.txt"), window=16, device="cpu")["ppl"] > 1
    assert (sprung.exists(), asked) == (False, [])


def test_a_tokenizer_that_is_code_is_refused_without_a_question(trap, asked):
    folder, sprung = trap
    refer(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]}, tokenizer_class="Evil"
    )
    with pytest.raises(CheckpointError, match=r"custom code.*never run"):
        load_model(str(folder))
    assert (sprung.exists(), asked) == (False, [])


def test_an_unknown_model_that_is_code_is_refused(trap, asked):
    folder, sprung = trap
    refer(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(UnsupportedModelError, match="evil"):
        load_model(str(folder))
    assert (sprung.exists(), asked) == (False, [])


def test_a_recipe_cannot_make_objects(tmp_path):
    sprung = tmp_path / "sprung"
    recipe = tmp_path / "recipe.yaml"
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system"):
        recipe.write_text(f"name: {tag} ['touch {sprung}']\n")
        with pytest.raises(ConfigError, match="could not determine a constructor"):
            load_recipe(recipe)
    assert not sprung.exists()
