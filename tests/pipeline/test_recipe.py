import json
import re
from dataclasses import MISSING
from pathlib import Path

import pytest

from prefixquant.pipeline.overrides import apply_overrides
from prefixquant.pipeline.recipe import Recipe, load_recipe, parse_recipe, recipe_schema, shipped_recipes
from prefixquant.tasks.calibrate import CalibrateConfig
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.evaluate import PerplexityConfig
from prefixquant.tasks.model.spec import ActivationSpec, QuantizeConfig
from prefixquant.tasks.rotate import RotateConfig
from prefixquant.tasks.search import SearchConfig
from prefixquant.tasks.texts import TextConfig, WindowsConfig
from prefixquant.tasks.train_config import TrainConfig

SMALL = {"name": "small", "model": {"source": "models/tiny"}, "data": {"calibration": "pile"}}
DOCS = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
ORIGINAL_FLAGS = re.findall(
    r"\w+",
    """
    model_path model_name cache_dir output_dir save_quant_dir real_quant resume_quant wbits w_group_size w_asym
    input_bits input_group_size input_mode input_asym k_bits v_bits kv_group_size k_pre_rope kv_mode kv_asym
    mse_init asym_mse_init skip_qk_weight_init block_qk_weight_init mse_init_size fp_mse_init pre_rotate
    rotate_mode down_online_had qk_online_had set_prefixed_tokens outlier_threshold activation_clipping quant_lr
    weight_lr min_lr_factor clip_grad wd off_load_to_disk use_fp32 early_stop constant_wlr train_size val_size
    training_seqlen epochs calib_dataset batch_size loss_type training_target ppl_seqlen seed eval_ppl eval_tasks
    eval_batch_size max_memory set_outlier_zero ablate_prefix_number
    """,
)


def small(*overrides: str) -> Recipe:
    return parse_recipe(apply_overrides(SMALL, overrides))


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        small(*overrides)
    return str(caught.value).splitlines()


def section(title: str) -> str:
    return DOCS.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_smallest_recipe_takes_every_stage_default():
    recipe = small()
    assert recipe.rotate == RotateConfig()
    assert recipe.quantize == QuantizeConfig()
    assert recipe.search == SearchConfig()
    assert recipe.train is None
    assert recipe.calibrate == CalibrateConfig()
    assert recipe.perplexity == PerplexityConfig()
    assert recipe.statistics_windows == WindowsConfig(count=64, length=512)
    assert recipe.search_windows == WindowsConfig(count=8, length=1024)
    assert recipe.calibration_text == TextConfig(source="pile", split="calibration")
    assert recipe.evaluation_texts == (TextConfig(source="wikitext2", split="evaluation"),)


def test_one_seed_reaches_rotations_and_windows():
    recipe = small("seed=7")
    assert (recipe.rotate.seed, recipe.statistics_windows.seed, recipe.search_windows.seed) == (7, 7, 7)


def test_partial_groups_keep_the_other_defaults():
    assert small("quantize.activations.bits=8").quantize == QuantizeConfig(activations=ActivationSpec(bits=8))


def test_off_turns_groups_and_choices_off():
    recipe = small("quantize.activations=off", "search=off", "rotate.r1=off", "rotate.r3=off", "train=off")
    assert recipe.quantize.activations is None
    assert recipe.search is None
    assert recipe.rotate == RotateConfig(r1=None, r3=False)
    assert recipe.train is None


def test_an_override_inside_a_group_that_is_off_turns_it_on():
    assert small("train.epochs=5").train == TrainConfig(epochs=5)
    assert small("search=off", "search.weights=false").search == SearchConfig(weights=False)


def test_data_groups_reach_their_stages():
    recipe = small(
        "data={calibration: a.jsonl, statistics: {sequences: 4, length: 32, ema: 0}, search: {length: 16}}",
        "evaluate={texts: [c4, b.txt], window: 64, max_windows: 3}",
    )
    assert recipe.statistics_windows == WindowsConfig(count=4, length=32)
    assert recipe.search_windows == WindowsConfig(count=8, length=16)
    assert recipe.calibrate == CalibrateConfig(ema=0.0)
    assert recipe.perplexity == PerplexityConfig(window=64, max_windows=3)
    assert [text.source for text in recipe.evaluation_texts] == ["c4", "b.txt"]


def test_prefix_tokens_tell_none_given_from_search():
    assert small().prefix.tokens is None
    assert small("prefix.tokens=null").prefix.tokens is None
    assert small("prefix.tokens=[]").prefix.tokens == ()
    assert small("prefix.tokens=[260, 216, 1]").prefix.tokens == (260, 216, 1)


def test_the_home_folder_is_expanded_in_paths_and_nothing_else_is(monkeypatch):
    monkeypatch.setenv("HOME", "/users/someone")
    recipe = small("model.source=~/m", "data.calibration=~/c.txt", "evaluate.texts=[~/e.txt, $HOME/f.txt]")
    assert recipe.model.source == "/users/someone/m"
    assert recipe.data.calibration == "/users/someone/c.txt"
    assert recipe.evaluate.texts == ("/users/someone/e.txt", "$HOME/f.txt")


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_loads_and_its_resolved_form_reads_back_as_itself(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(f"{name}.yaml") == recipe
    assert parse_recipe(json.loads(json.dumps(recipe.resolved()))) == recipe


def test_the_resolved_recipe_writes_out_every_key_of_the_schema_and_no_other():
    def leaves(value, path=""):
        if not isinstance(value, dict):
            return {path}
        return set().union(*(leaves(inner, f"{path}.{name}".lstrip(".")) for name, inner in value.items()))

    assert leaves(small("train={}", "gptq={}").resolved()) == {
        path for path, key in recipe_schema().items() if not key.is_group
    }


def test_shipped_recipes_hold_the_settings_they_are_named_for():
    assert load_recipe("w4a4kv4-static").quantize == QuantizeConfig()
    trained = load_recipe("w4a4kv4-static-trained").train
    assert trained is not None
    assert (trained.epochs, trained.sequences, trained.validation_sequences, trained.sequence_length) == (
        5,
        512,
        64,
        1024,
    )
    assert (trained.relative_learning_rates, trained.lookahead) == (True, 2)
    eight = load_recipe("w4a8kv4-static-trained")
    assert eight.train is not None
    assert eight.train.epochs == 10
    assert (
        eight.quantize == load_recipe("w4a8kv4-static").quantize == QuantizeConfig(activations=ActivationSpec(bits=8))
    )
    large = load_recipe("llama-3-70b-w4a4kv4-trained").train
    assert large == TrainConfig(scale_learning_rate=2e-5, weight_learning_rate=2e-6)
    assert load_recipe("llama-2-70b-w4a4kv4-trained").train == TrainConfig(loss="skip_mse")


def test_a_recipe_file_loads_with_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmodel: {source: m}\ndata: {calibration: c4}\nquantize: {keys: off}\n")
    recipe = load_recipe(path, ["quantize.keys.bits=8", "train.weight_learning_rate=2e-5"])
    assert recipe.quantize.keys is not None
    assert recipe.quantize.keys.bits == 8
    assert recipe.train == TrainConfig(weight_learning_rate=2e-5)


def test_a_file_comes_before_a_shipped_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(json.dumps(SMALL))
    assert load_recipe("demo.yaml").name == "small"
    assert load_recipe("demo").name == "demo"


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="neither a file nor a shipped recipe; did you mean w4a4kv4-static"):
        load_recipe("w4a4kv4-statc")


@pytest.mark.parametrize(
    "content", [b"", b"- a\n", b"\xff\xfe\x00", b"a: [1\n"], ids=["empty", "list", "binary", "broken"]
)
def test_a_file_that_holds_no_recipe_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^recipe .*bad\.yaml[^\n]+$"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.activation.bits=8", "unknown key quantize.activation; did you mean quantize.activations?"),
        ("rotate.seed=3", "unknown key rotate.seed; did you mean seed?"),
        ("quantize.values.before_rope=true", "unknown key quantize.values.before_rope; did you mean quantize.keys"),
        ("quantize.weights.bits='4'", 'quantize.weights.bits must be a whole number, got "4"'),
        ("quantize.keys.bits=16", "quantize.keys.bits must be 2 to 8, got 16; write `quantize.keys: off`"),
        ("quantize.values.bits=1", "quantize.values.bits must be 2 to 8, got 1;"),
        (
            "quantize.activations.mode=dynamic",
            "quantize.activations: granularity 'tensor' contradicts mode 'dynamic'; use",
        ),
        ("quantize.weights.group_size=128", "quantize.weights.group_size goes with granularity 'group'"),
        ("quantize.keys.before_rope=true", "quantize.keys.before_rope contradicts rotate.r3"),
        ("prefix={tokens: [1], max_tokens: 2}", "prefix.tokens and prefix.max_tokens contradict each other"),
        ("seed=-1", "seed must not be negative, got -1"),
        ("name=''", "name must be 1 to 100 letters"),
        ("data.calibration=piel", "data.calibration takes a named set (pile, wikitext2, c4, redpajama, python-docs)"),
        ("data={calibration: a.txt, revision: main}", "data.revision is for downloaded sets, 'a.txt' is none"),
        ("data.statistics.sequences=0", "data.statistics needs sequences >= 1 and length >= 2, got 0 and 512"),
        ("data.statistics.ema=1", "data.statistics.ema must lie in [0, 1), got 1.0"),
        ("data.search.length=1", "data.search needs sequences >= 1 and length >= 2, got 8 and 1"),
        ("model={source: a.gguf, revision: main}", "model.revision is for hub ids; 'a.gguf' is a local path"),
        ("model.source=''", "model.source is empty"),
        ("evaluate.texts=[c4, c4]", "evaluate.texts names a text twice: c4, c4"),
        ("evaluate.texts=[a.pdf]", "evaluate.texts takes a named set"),
        ("evaluate={texts: [], without_prefix: true}", "evaluate.without_prefix has nothing to measure"),
        ("evaluate.window=1", "evaluate.window must be at least 2, got 1"),
        ("train={early_stop_epochs: 2, validation_sequences: 0}", "train.early_stop_epochs needs validation sequences"),
        ("train={scale_learning_rate: 0, weight_learning_rate: 0}", "train.scale_learning_rate and train.weight"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(override, message):
    (line,) = problems(override)
    assert line.startswith(message)


def test_training_without_quantization_is_refused():
    off = [f"quantize.{group}=off" for group in ("weights", "activations", "keys", "values")]
    assert small(*off).train is None
    (line,) = problems("train={}", *off)
    assert line.startswith("train has nothing to do: every group of quantize is off")


def test_a_prefixless_comparison_of_a_prefixless_run_is_refused():
    assert small("evaluate.without_prefix=true").evaluate.without_prefix
    (line,) = problems("evaluate.without_prefix=true", "prefix.tokens=[]")
    assert line.startswith("evaluate.without_prefix contradicts prefix.tokens=[]")


def test_several_problems_come_together_one_line_each():
    assert len(problems("quantize.keys.bits=16", "quantize.values.bits=16", "modle.source=x", "rotate.r1=hadamrd")) == 4


def test_before_rope_is_accepted_without_r3():
    keys = small("quantize.keys.before_rope=true", "rotate.r3=off").quantize.keys
    assert keys is not None
    assert keys.before_rope


def test_the_reference_lists_every_key_with_its_type_and_default():
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| .+ \|$", section("Reference"), flags=re.MULTILINE)
    expected = {
        path: (key.expected, in_table(key)) for path, key in recipe_schema().items() if not key.is_group or key.optional
    }
    assert {path: (kind, default) for path, kind, default in rows} == expected
    assert len(rows) == len(expected)


def in_table(key) -> str:
    if key.default is MISSING:
        return "required"
    if key.default is None:
        return "`null`" if key.expected.endswith("null") else "`off`"
    if key.is_group:
        return "on"
    if isinstance(key.default, tuple):
        return f"`[{', '.join(key.default)}]`"
    return f"`{str(key.default).lower() if isinstance(key.default, bool) else key.default}`"


def test_the_docs_map_each_flag_of_the_original_once_to_keys_that_exist():
    rows = re.findall(
        r"^\| `(\w+)` \| (.+?) \| (.*?) ?\|$", section("Coming from the original PrefixQuant"), re.MULTILINE
    )
    assert [flag for flag, _, _ in rows] == ORIGINAL_FLAGS
    keys = [key for _, here, _ in rows for key in re.findall(r"`([\w.]+)`", here)]
    assert set(keys) <= set(recipe_schema())


def test_the_docs_list_the_shipped_recipes():
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", section("Shipped recipes"), re.MULTILINE)) == list(shipped_recipes())


@pytest.mark.parametrize("name", ["", "Llama 3 8B", ".hidden", "a/b", "x" * 101])
def test_a_name_that_cannot_begin_a_run_id_is_refused(name):
    with pytest.raises(ConfigError, match="name must be 1 to 100 letters"):
        parse_recipe({"name": name, "model": {"source": "m"}, "data": {"calibration": "python-docs"}})
