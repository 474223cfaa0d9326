"""Stock lm-eval on an exported folder gives the numbers of our simulation."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch

from prefixquant.tasks.export import load_quantized
from prefixquant.tasks.profiles.folder import write_profile
from prefixquant.tasks.profiles.prefix import ADAPTER
from prefixquant.tasks.profiles.profile import find_profile

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

QUESTIONS = [
    ("the prefix stands in", [" front", " back", " between"]),
    ("one scale for each", [" tensor", " token", " head"]),
    ("keep it", [" whole", " half"]),
    ("a code times a", [" scale", " shift", " sum", " sign"]),
]


# The command imports lm-eval, datasets and transformers in a process of its own: about 20 s, which no other way shows.
def test_stock_lm_eval_scores_every_choice_as_the_simulation_does(full, tmp_path):
    out = tmp_path / "exact"
    out.mkdir()
    write_profile(full, find_profile("hf-exact"), out)
    lines = [
        json.dumps({"question": question, "choices": choices, "answer": index % len(choices)})
        for index, (question, choices) in enumerate(QUESTIONS)
    ]
    (tmp_path / "choices.jsonl").write_text("\n".join(lines))
    (tmp_path / "choices.yaml").write_text(
        f"""task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "choices.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    arguments = f"pretrained={out},peft={out / ADAPTER},trust_remote_code=True,dtype=float32"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", "local_choices", "--include_path", str(tmp_path), "--batch_size", "2"]
    command += ["--log_samples", "--output_path", str(tmp_path / "results")]
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    found = {each["doc_id"]: [float(answer[0]) for answer in each["filtered_resps"]] for each in logged}

    model, tokenizer = load_quantized(full.folder), tiny.tiny_tokenizer()
    for index, (question, choices) in enumerate(QUESTIONS):
        for choice, given in zip(choices, found[index], strict=True):
            context = tokenizer(question).input_ids
            ids = torch.tensor([context + tokenizer(choice, add_special_tokens=False).input_ids])
            scores = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
            own = scores[0].gather(-1, ids[0, 1:, None])[len(context) - 1 :].sum()
            assert given == pytest.approx(float(own), abs=1e-4)
