"""The command line as a user meets it: what goes to stdout, what to stderr, and the exit status."""

import json
import math
import sys
from dataclasses import dataclass

import pytest
import tiny
from lm_eval_tasks import write_tasks

from prefixquant.pipeline.cli import main


@dataclass(frozen=True)
class Answer:
    status: int
    stdout: str
    stderr: str

    @property
    def json(self):
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `prefixquant ARGUMENTS` in this process."""
    monkeypatch.setenv("COLUMNS", "240")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prefixquant", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as done:
            status = done.code or 0
        return Answer(status, *capsys.readouterr())

    return run


@pytest.fixture
def run(command, done):
    """Run `prefixquant run` of the recipe that has run already, changed or not, with no tracking."""

    def call(*arguments):
        return command("run", done.recipe_file(), "--store", done.store_path, "--tracking", "off", *arguments)

    return call


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def only_line(text):
    (line,) = text.splitlines()
    return line


def test_run_json_is_the_last_line_of_stdout(run, done):
    out = done.folder / "out"
    answer = run("quantize.activations.bits=8", "--json", "--out", out)
    assert (answer.status, answer.stderr) == (0, "")
    summary = answer.json
    assert summary["run_id"].startswith("tiny-")
    assert summary["out"] == str(out)
    assert summary["prefix_token_ids"] == [tiny.BOS]
    assert math.isfinite(summary["ppl"])
    assert math.isfinite(summary["ppl_full_precision"])
    assert summary["tasks_run"] == 7
    assert summary["tasks_cached"] > 0
    assert summary["seconds"] > 0
    again = run("quantize.activations.bits=8", "--json").json
    assert again["tasks_run"] == 0
    assert {name: again[name] for name in ("run_id", "ppl")} == {name: summary[name] for name in ("run_id", "ppl")}


def test_run_shows_results_on_stdout_and_progress_lines_on_stderr(run):
    answer = run("quantize.activations.bits=7")
    assert answer.status == 0
    assert "'<s>' (0)" in answer.stdout
    assert "full precision" in answer.stdout
    assert "7 tasks run" in answer.stdout
    lines = answer.stderr.splitlines()
    assert any("block 2/2: block[1] done" in line or "block 2/2: block[0] done" in line for line in lines)
    assert all(line.startswith("[") and "\x1b" not in line for line in lines)


def test_run_quiet_has_no_progress(run):
    answer = run("quantize.activations.bits=6", "--quiet")
    assert (answer.status, answer.stderr) == (0, "")
    assert "full precision" in answer.stdout


def test_wrong_input_that_a_task_finds_is_status_2(run):
    answer = run("evaluate.window=100000", "--quiet")
    assert answer.status == 2
    assert "tokens[evaluation.jsonl] failed" in answer.stderr
    assert "evaluate.window" in answer.stderr
    assert answer.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "dmeo"), "did you mean demo?"),
        (("run", "demo", "quantize.activation.bits=8"), "quantize.activations"),
        (("run", "demo", "quantize.activations.bit=8"), "quantize.activations.bits"),
        (("run", "demo", "quantize.activations.bits=9"), "2 to 8"),
        (("run", "demo", "bits"), "bits"),
        (("run", "demo", "model.source=./nowhere"), "./nowhere"),
        (("run", "demo", "--store", "memory://x"), "memory://x"),
        (("run", "demo", "--colour"), "--colour"),
        (("run", "demo", "--cpus", "many"), "--cpus"),
        (("run",), "RECIPE"),
        (("fly",), "fly"),
        (("eval", "nowhere.gguf", "--set", "python-docs"), "nowhere.gguf"),
        (("eval", "somewhere"), "--text"),
        (("eval", "somewhere", "--set", "python-docs", "--limit", "3"), "--limit is for tasks"),
        (("eval", "somewhere", "--tasks", "a", "--include-path", "./nowhere"), "--include-path"),
        (("eval", "somewhere", "--set", "python-docs", "--shards", "0"), "--shards must be at least 1"),
        (("eval", "somewhere", "--set", "python-docs", "--gpus", "9", "--device", "cpu"), "--gpus 9"),
        (("compare", "nobody"), "nobody"),
        (("show", "nothing"), "nothing"),
        (("gc", "--forget", "nobody"), "nobody"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_status_2_and_one_line_that_names_it(command, world, monkeypatch, arguments, message):
    monkeypatch.chdir(world.folder)
    answer = command(*arguments)
    assert answer.status == 2
    line = only_line(answer.stderr)
    assert line.startswith("error: ")
    assert message.lower() in line.lower()
    assert answer.stdout == ""


def test_help_is_status_0_and_lists_the_commands(command):
    answer = command("--help")
    assert answer.status == 0
    assert all(name in answer.stdout for name in ("run", "plan", "eval", "runs", "show", "gc"))


def test_plan_of_a_first_run_runs_everything_and_writes_nothing(command, world):
    recipe = world.recipe_file()
    before = files(world.folder)
    answer = command("plan", recipe, "--store", world.store_path, "--json")
    assert answer.status == 0
    tasks = answer.json["tasks"]
    assert {task["state"] for task in tasks} == {"run"}
    assert {task["reason"] for task in tasks if not task["task"].startswith("stream")} == {"never built"}
    assert all(task["seconds"] > 0 and task["host_bytes"] > 0 and len(task["key"]) == 64 for task in tasks)
    assert answer.json["total"]["seconds"] == pytest.approx(sum(task["seconds"] for task in tasks))
    assert not world.store_path.exists()
    assert files(world.folder).keys() - before.keys() <= set(files(world.folder / "cache")) | {world.folder / "cache"}


def test_plan_says_what_is_cached_and_which_key_changed(command, done):
    before = files(done.store_path)
    arguments = ("plan", done.recipe_file(), "--store", done.store_path)
    states = {task["state"] for task in command(*arguments, "--json").json["tasks"]}
    assert states == {"cached", "unneeded"}
    tasks = {task["task"]: task for task in command(*arguments, "quantize.activations.bits=8", "--json").json["tasks"]}
    assert tasks["block[0]"]["state"] == "run"
    assert "quantize.activations.bits 4 -> 8" in tasks["block[0]"]["reason"]
    assert "input block[0]" in tasks["report"]["reason"]
    assert "no longer stored" in tasks["stream[1]"]["reason"] or "needed by block[1]" in tasks["stream[1]"]["reason"]
    assert tasks["calibrate"]["state"] == "cached"
    shown = command(*arguments, "seed=3").stdout
    assert "rotate.seed 0 -> 3" in shown
    assert "to run" in shown
    assert files(done.store_path) == before


def test_eval_measures_the_original_and_what_a_run_saved(command, run, done):
    out = done.folder / "out"
    summary = run("--json", "--out", out).json
    options = ("--text", done.text, "--window", 32, "--windows", 4)
    for model, wanted in ((out, summary["ppl"]), (done.model, summary["ppl_full_precision"])):
        answer = command("eval", model, *options, "--json")
        assert answer.status == 0
        assert answer.json["ppl"] == pytest.approx(wanted, rel=1e-4)
        assert (answer.json["tokens"], answer.json["windows"]) == (4 * 31, 4)
    assert f"perplexity {summary['ppl']:.1f}" in command("eval", out, *options).stdout


def test_eval_measures_tasks_in_one_process_and_in_two_alike(command, run, done):
    out, folder = done.folder / "out", write_tasks(done.folder / "tasks", documents=40)
    settings = ("evaluate.tasks=[choice]", f"evaluate.task_folder={folder}", "evaluate.full_precision=false")
    summary = run("--json", "--out", out, *settings, "evaluate.max_windows=null").json
    options = ("--text", done.text, "--window", 32, "--tasks", "choice,whole", "--include-path", folder)
    alone, shared = (command("eval", out, *options, "--shards", shards, "--json") for shards in (1, 2))
    assert (alone.status, shared.status) == (0, 0)
    assert shared.json == alone.json
    assert alone.json["ppl"] == pytest.approx(summary["ppl"], rel=1e-4)
    (choice, whole) = alone.json["tasks"]
    (of_run,) = summary["tasks"]
    assert choice == {name: value for name, value in of_run.items() if name != "model"}
    assert whole["metrics"]["word_perplexity"] > 1
    shown = command("eval", out, "--tasks", "choice", "--include-path", folder, "--limit", 4).stdout
    assert "acc_norm" in shown


def test_compare_prints_runs_and_their_numbers(command, run, done):
    first = run("--json").json["run_id"]
    second = run("quantize.activations.bits=8", "--json").json["run_id"]
    store = ("--store", done.store_path)
    shown = command("compare", first, second, *store).stdout
    assert all(text in shown for text in (first, second, "W4 A8 K4 V4 static", "ppl evaluation.jsonl, quantized"))
    records = command("compare", first, second, *store, "--json").json["runs"]
    assert [record["run_id"] for record in records] == [first, second]


def test_runs_show_and_gc_speak_of_the_store(command, run, done):
    store = ("--store", done.store_path)
    (record,) = command("runs", *store, "--json").json["runs"]
    assert (record["name"], record["status"]) == ("tiny", "finished")
    shown = command("runs", *store).stdout
    assert record["run_id"] in shown
    assert "finished" in shown
    described = json.loads(command("show", record["run_id"], *store).stdout)
    key = described["keys"]["block[0]"]
    artifact = json.loads(command("show", key[:12], *store).stdout)
    assert (artifact["key"], artifact["meta"]["node"]) == (key, "block[0]")
    assert command("gc", *store, "--min-age", 0, "--dry-run", "--json").json["artifacts"] == 0
    assert "removed 0 artifacts" in command("gc", *store, "--min-age", 0).stdout
