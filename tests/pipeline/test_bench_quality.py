import json
import subprocess
import sys

import pytest
import tiny
from inline import TEXT, small_recipe

from prefixquant.pipeline.bench_quality import SETTINGS, main, recipe_of
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.export import load_quantized

INPUTS = ("model.source=m.gguf", "data.calibration=a.txt", "evaluate.texts=[b.txt]")
SMALL = (
    "data.statistics.sequences=3",
    "data.statistics.length=32",
    "data.search.sequences=3",
    "data.search.length=32",
    "search.coarse_points=3",
    "search.fine_points=2",
    "search.weight_points=4",
    "evaluate.window=32",
    "evaluate.max_windows=3",
)
SMALL_TRAINING = (
    "train.sequences=4",
    "train.validation_sequences=4",
    "train.sequence_length=16",
    "train.epochs=1",
)


@pytest.fixture
def arguments(tmp_path):
    tiny.write_tiny_model(tmp_path / "model", blocks=2)
    small_recipe(tmp_path, tmp_path / "model")  # writes the texts
    (tmp_path / "long.txt").write_text("\n\n".join([TEXT] * 3))
    texts = ["--calibration", str(tmp_path / "long.txt"), "--text", str(tmp_path / "evaluation.txt")]
    where = ["--device", "cpu", "--store", str(tmp_path / "store")]
    return ["--model", str(tmp_path / "model"), *texts, *where, *changes(SMALL)]


def changes(overrides):
    return [part for each in overrides for part in ("--set", each)]


def measured(capsys):
    out = capsys.readouterr().out.splitlines()
    return out[:-1], json.loads(out[-1])


WITHOUT = """
import importlib.machinery, importlib.metadata, sys
missing = {"ray", "mlflow", "deepspeed", "lm_eval", "s3fs"}
find, named = importlib.machinery.PathFinder.find_spec, importlib.metadata.Distribution.from_name

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in missing else find(name, path, target)

def from_name(name):
    if name in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return named(name)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
importlib.metadata.Distribution.from_name = from_name
from prefixquant.pipeline.bench_quality import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_measures_where_neither_ray_nor_mlflow_deepspeed_and_lm_eval_are_installed(arguments):
    changed = changes(["train.sequences=4", *SMALL_TRAINING])
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, "w4a4", "w4a4-128x5", *arguments, *changed], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout.splitlines()[-1])["settings"]) == 2


def test_every_named_setting_is_a_shipped_recipe_with_changes_it_takes():
    for name in SETTINGS:
        assert (recipe_of(name, INPUTS, ()).train is not None) == ("x" in name)


def test_a_setting_takes_changes_of_its_own_and_those_for_all_that_have_the_group():
    recipe = recipe_of("w4a4-128x5 train.epochs=2", INPUTS, ("train.sequences=8", "seed=3"))
    assert recipe.train is not None
    assert (recipe.train.epochs, recipe.train.sequences, recipe.seed) == (2, 8, 3)
    assert recipe_of("w4a4", INPUTS, ("train.sequences=8",)).train is None


def test_an_unknown_setting_is_refused():
    with pytest.raises(ConfigError, match="neither a file nor a shipped recipe"):
        recipe_of("w4a4-128x7", INPUTS, ())


def test_bench_measures_settings_in_one_process_and_exports_the_last(arguments, capsys, tmp_path):
    out = tmp_path / "out"
    assert (
        main(["w4a4", "w4a4-128x5-polish train.segments=2", "--export", str(out), *arguments, *changes(SMALL_TRAINING)])
        == 0
    )
    lines, found = measured(capsys)
    assert [line.split(":")[0] for line in lines] == ["setting", "w4a4", "w4a4-128x5-polish train.segments=2"]
    plain, trained = found["settings"]
    assert trained["ppl_untrained"] == plain["ppl"] != trained["ppl"]
    assert plain["ppl_full_precision"] == trained["ppl_full_precision"]
    assert plain["preparing_seconds"] == trained["preparing_seconds"] > 0  # computed once
    assert trained["training_seconds"] > trained["epoch_seconds"] > 0
    assert {"train[0]", "train[1]", "polish"} <= trained["seconds"].keys()
    ids = tiny.random_ids(1, 8)
    assert load_quantized(out)(input_ids=ids).logits.isfinite().all()


def test_a_second_bench_on_the_same_store_computes_nothing(arguments, capsys):
    main(["w4a4", *arguments])
    first = measured(capsys)
    main(["w4a4", *arguments])
    assert measured(capsys) == first


def test_a_change_that_no_setting_takes_is_refused(arguments, capsys):
    assert main(["w4a4", *arguments, "--set", "gptq.act_order=true"]) == 2
    assert "--set gptq.act_order=true: no setting has the group gptq" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(arguments, capsys):
    index = arguments.index("cpu")
    assert main(["w4a4", *arguments[:index], "cuda:99", *arguments[index + 1 :]]) == 2
    assert "--device cuda:99 cannot be used" in capsys.readouterr().err
