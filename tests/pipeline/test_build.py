"""The graph that a recipe and a model give, and what it is expected to cost."""

import shutil

import pytest
import tiny

from prefixquant.pipeline.build import Source, build_graph, targets, text_labels
from prefixquant.pipeline.source import source_fingerprint
from prefixquant.tasks.errors import ConfigError, DataError, UnsupportedModelError
from prefixquant.tasks.load import load_model


@pytest.fixture
def build(world):
    """Return the graph of a recipe; `blocks` replaces the model."""

    def call(*overrides, blocks=None):
        if blocks is not None:
            tiny.write_tiny_model(world.model, blocks=blocks)
        source = Source(path=world.model, fingerprint=source_fingerprint(world.model))
        return build_graph(world.recipe(*overrides), source, load_model(str(world.model)))

    return call


def test_a_graph_has_as_many_blocks_as_the_model(build):
    for blocks in (1, 5):
        graph = build(blocks=blocks)
        assert sum(name.startswith("block[") for name in graph.order) == blocks
        assert f"rotate[{blocks - 1}]" in graph.nodes
        assert {"report", "export"} <= set(targets(graph))


def test_quantizing_without_the_prefix_shares_all_that_comes_before_it(build):
    names = build("evaluate.without_prefix=true").nodes.keys() - build().nodes.keys()
    assert names == {
        f"{name}/without_prefix"
        for name in (
            "prefix",
            "calibrate",
            "stream[0]",
            "stream[1]",
            "block[0]",
            "block[1]",
            "evaluate[quantized,evaluation.jsonl]",
        )
    }


def test_keys_change_with_what_a_task_reads_and_with_nothing_else(build, world):
    before = build()

    def changed(*overrides):
        after = build(*overrides)
        return {name.partition("[")[0] for name in after.order if after.key(name) != before.key(name)}

    last = {"block", "export", "evaluate", "report"}
    assert changed("quantize.values.bits=8") == last
    assert changed("search.coarse_points=4") == last
    assert changed("data.statistics.ema=0.5") == last | {"calibrate"}
    assert changed("prefix.tokens=[5]") == last | {"prefix", "calibrate", "stream"}
    assert changed("evaluate.window=16") == {"tokens", "evaluate", "report"}
    assert changed("quantize.keys.before_rope=true", "rotate.r3=off") >= last | {"calibrate"}
    assert changed("name=other") == {"report"}
    assert changed("seed=1") >= last | {"rotate", "tokens", "prefix", "calibrate", "stream"}
    (world.folder / "elsewhere").mkdir()
    moved = shutil.copy(world.text, world.folder / "elsewhere")
    assert changed(f"evaluate.texts=[{moved}]") == set()


def test_every_task_says_what_it_will_cost_and_more_work_costs_more(build):
    graph, larger = (
        build(),
        build("data.search.sequences=64", "evaluate.max_windows=64", "data.statistics.sequences=64"),
    )
    for name in graph.order:
        small, large = graph.nodes[name].estimate, larger.nodes[name].estimate
        assert small.seconds > 0
        assert small.host_bytes > 0
        assert large.seconds >= small.seconds
        assert large.host_bytes >= small.host_bytes
    grown = {"block[0]", "stream[1]", "calibrate", "evaluate[quantized,evaluation.jsonl]"}
    assert all(larger.nodes[name].estimate.seconds > graph.nodes[name].estimate.seconds for name in grown)
    assert all(larger.nodes[name].estimate.host_bytes > graph.nodes[name].estimate.host_bytes for name in grown)


def test_fewer_bits_are_estimated_to_store_less(build):
    four, eight = build(), build("quantize.weights.bits=8")
    assert four.nodes["block[0]"].estimate.stored_bytes < eight.nodes["block[0]"].estimate.stored_bytes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantize.weights={granularity: group, group_size: 12}"], "group_size 12 does not divide the model's 64"),
        (["quantize.activations={granularity: group, group_size: 32}"], "group_size 32 does not divide the model's 48"),
        (["quantize.keys={granularity: group, group_size: 5}"], "quantize.keys.group_size 5"),
        (["quantize.values={granularity: group, group_size: 32}"], "quantize.values.group_size 32"),
        (["prefix.tokens=[258]"], "token 258 is outside the vocabulary of 258"),
    ],
    ids=["weights", "activations", "keys", "values", "prefix"],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused_before_anything_runs(build, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(*overrides)


def test_a_tokenizer_without_bos_needs_a_given_prefix(build, world):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = world.model / name
        if path.exists():
            path.write_text(path.read_text().replace('"bos_token"', '"other_token"'))
    tiny.edit_config(world.model, bos_token_id=None)
    with pytest.raises(UnsupportedModelError, match=r"no BOS token.*prefix\.tokens"):
        build()
    assert "prefix" in build("prefix.tokens=[3]").nodes


def test_a_missing_text_is_refused_before_anything_runs(build, world):
    world.text.unlink()
    with pytest.raises(DataError, match=r"evaluation\.jsonl"):
        build()


def test_texts_of_one_name_get_labels_of_their_own():
    assert text_labels(["a/x.txt", "b/x.txt", "c4"]) == ("x.txt#1", "x.txt#2", "c4")
