"""Profiles as nodes of a run, and exported later from a run or from its folder."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from inline import run_inline, small_recipe
from safetensors.torch import load_file

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact
from prefixquant.pipeline.build import targets
from prefixquant.pipeline.cli import main
from prefixquant.pipeline.exporting import export
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.materialize import OutputError, materialize
from prefixquant.pipeline.recipe import parse_recipe
from prefixquant.tasks.errors import CheckpointError, ConfigError
from prefixquant.tasks.export import DESCRIPTION
from prefixquant.tasks.profiles.export import ProfileExportConfig
from prefixquant.tasks.profiles.profile import find_profile

PROFILES = ["hf-exact", "vllm-w8a8-static"]
SETTINGS = {
    "prefix": {"tokens": [5, 7, tiny.BOS]},
    "rotate": {"r3": False, "r4_block": 16},
    "export": {"profiles": PROFILES, "verify": False},
}


class Quantized:
    """A run in this process whose recipe names profiles, and the folder it gives."""

    def __init__(self, folder: Path) -> None:
        tiny.write_tiny_model(folder / "model", blocks=2)
        self.store = ArtifactStore(str(folder / "store"))
        recipe = parse_recipe(small_recipe(folder, folder / "model", **SETTINGS))
        self.graph: Graph
        self.graph, model, self.results = run_inline(recipe, self.store)
        self.folder = folder / "out"
        materialize(self.graph, self.store, self.folder, model.num_blocks)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Quantized:
    return Quantized(tmp_path_factory.mktemp("quantized"))


def contents(folder: Path) -> dict[str, bytes]:
    """Return what describes codes and config; cards and descriptions tell of the way they were made as well."""
    told = ("README.md", DESCRIPTION)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in told
    }


def test_profiles_of_a_recipe_are_targets_and_lie_in_the_folder(quantized):
    assert {f"export[{profile}]" for profile in PROFILES} <= set(targets(quantized.graph))
    for profile in PROFILES:
        described = json.loads((quantized.folder / profile / DESCRIPTION).read_text())["export"]
        assert described["profile"] == profile
    assert (quantized.folder / "hf-exact" / "prefix-adapter" / "adapter_config.json").is_file()
    assert (quantized.folder / DESCRIPTION).is_file()


def test_profile_node_reports_what_it_measured(quantized):
    metrics = quantized.results["export[vllm-w8a8-static]"].metrics
    assert metrics["folder_bytes"] > 0
    record = load_artifact(quantized.store, quantized.graph.key("export[vllm-w8a8-static]")).record
    assert record["perplexity"] == pytest.approx(metrics["ppl"])
    assert set(record["exemptions"]["perplexity"]) == {"0", "1", "2"}
    exact = quantized.results["export[hf-exact]"].metrics
    measured = quantized.results["evaluate[quantized,evaluation.txt]"].metrics
    assert exact["ppl"] == pytest.approx(measured["ppl"], rel=1e-5)


def test_key_of_a_profile_is_that_of_its_settings_alone(quantized, tmp_path):
    key = quantized.graph.key("export[hf-exact]")
    recipe = small_recipe(tmp_path, quantized.folder.parent / "model", **SETTINGS)
    recipe["name"] = "another"
    from prefixquant.pipeline.build import Source, build_graph
    from prefixquant.pipeline.source import source_fingerprint
    from prefixquant.tasks.load import load_model

    path = quantized.folder.parent / "model"
    source = Source(path=path, fingerprint=source_fingerprint(path))
    assert build_graph(parse_recipe(recipe), source, load_model(str(path))).key("export[hf-exact]") == key


def test_folder_exported_later_is_the_same(quantized, tmp_path):
    result = export(
        str(quantized.folder),
        find_profile("hf-exact"),
        tmp_path / "later",
        ProfileExportConfig(verify=False),
        store_url="nowhere",
        text=str(quantized.folder.parent / "evaluation.txt"),
        window=32,
        windows=3,
        device="cpu",
    )
    assert contents(tmp_path / "later") == contents(quantized.folder / "hf-exact")
    assert result.perplexity == pytest.approx(quantized.results["export[hf-exact]"].metrics["ppl"])


def failing(source: str, message: str, error: type[Exception], out: Path, **settings) -> None:
    with pytest.raises(error, match=message):
        export(source, find_profile("hf-exact"), out, ProfileExportConfig(**settings), store_url=settings_store(out))
    assert not [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]


def settings_store(out: Path) -> str:
    return str(out.parent / "store")


def test_what_cannot_be_exported_is_named_and_nothing_is_left(quantized, tmp_path):
    (tmp_path / "other").mkdir()
    failing("nothing", "nothing is neither a folder nor a run in", ConfigError, tmp_path / "out")
    failing(str(tmp_path / "other"), "is no folder of ours; give a run", CheckpointError, tmp_path / "out")
    profile = str(quantized.folder / "hf-exact")
    failing(profile, "is the export profile hf-exact; give a run", ConfigError, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "other" / "file").write_text("mine")
    failing(str(quantized.folder), "holds other files", OutputError, tmp_path / "other")
    assert (tmp_path / "other" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"export": {"profiles": ["vllm"]}}, "there is no export profile 'vllm'; known are hf-exact"),
        ({"export": {"profiles": ["vllm-w4a16"]}}, r"vllm-w4a16 cannot hold .* set rotate\.r4_block=128"),
        ({"export": {"profiles": ["hf-exact", "hf-exact"]}}, "names a profile twice: hf-exact, hf-exact"),
        (
            {"export": {"profiles": ["vllm-w4a4-static"], "gpu": "sm90"}, "rotate": {"r4": False}},
            r"on sm90 runs int8 activations .*export\.allow_downgrade=true",
        ),
    ],
    ids=["unknown", "incompatible", "twice", "downgraded"],
)
def test_recipe_that_a_profile_cannot_hold_is_refused_before_anything_runs(groups, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        parse_recipe(small_recipe(tmp_path, tmp_path / "model", **groups))


def test_command_exports_a_run_and_prints_what_it_measured(done, monkeypatch, capsys):
    run_id = done.store.run_ids()[0]
    out = done.folder / "exact"
    arguments = [run_id, "--store", done.store_path, "--profile", "hf-exact", "--out", out, "--no-verify", "--json"]
    monkeypatch.setattr(sys, "argv", ["prefixquant", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["profile"] == "hf-exact"
    assert printed["perplexity"] == pytest.approx(done.store.read_ref(run_id)["ppl"][-1]["ppl"], rel=1e-5)
    card = (out / "README.md").read_text()
    assert "quantized: perplexity" in card
    assert "name: tiny" in card
    assert torch.is_tensor(load_file(out / "model-block-00000.safetensors")["model.layers.0.self_attn.k_scale"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "vllm"], "there is no export profile 'vllm'"),
        (["--profile", "hf-exact", "--gpu", "h100"], "--gpu h100 is not known; use sm80"),
        (["--profile", "hf-exact", "--exempt", "a"], "--exempt takes block numbers such as 3,7"),
        (["--profile", "hf-exact", "--text", "a", "--set", "c4"], "takes --text FILE or --set NAME, not both"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prefixquant", "export", "run", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
