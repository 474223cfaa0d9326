"""A folder of lm-eval tasks with local data: multiple choice, generation and whole texts."""

import json
import random
from pathlib import Path

_WORDS = ("the", "prefix", "carries", "what", "one", "static", "scale", "cannot", "so", "keep", "it", "in", "front")

_CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: choices.jsonl, validation: examples.jsonl}}}}
test_split: test
fewshot_split: validation
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""

_GENERATION = """\
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""

_ROLLING = """\
task: whole
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""

_GROUP = """\
group: both
task: [choice, bare]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""


def write_tasks(folder: Path, *, documents: int = 40, seed: int = 0) -> Path:
    """Write the tasks `choice`, `bare` (choices without a question), `continue` and `whole`, and `both`, a group.

    Returns the folder.
    """
    folder.mkdir()
    rng = random.Random(seed)

    def document() -> str:
        question = " ".join(rng.choices(_WORDS, k=rng.randint(2, 12)))
        choices = [" " + " ".join(rng.choices(_WORDS, k=rng.randint(1, 4))) for _ in range(3)]
        return json.dumps({"question": question, "choices": choices, "answer": rng.randrange(3)})

    (folder / "choices.jsonl").write_text("\n".join(document() for _ in range(documents)))
    (folder / "examples.jsonl").write_text("\n".join(document() for _ in range(5)))
    (folder / "choice.yaml").write_text(_CHOICE.format(name="choice", text="{{question}}"))
    (folder / "bare.yaml").write_text(_CHOICE.format(name="bare", text=""))
    (folder / "continue.yaml").write_text(_GENERATION)
    (folder / "whole.yaml").write_text(_ROLLING)
    (folder / "both.yaml").write_text(_GROUP)
    return folder
