import hashlib
import re
import subprocess
import sys
from typing import get_args

import pytest

from prefixquant.tasks.named_sets import HUB_SETS, Part, hub_fingerprint, read_python_docs, split_topics
from prefixquant.tasks.texts import NAMED_SETS

PARTS: tuple[Part, ...] = get_args(Part)


def paragraphs(documents: list[str]) -> set[str]:
    """Paragraphs long enough to be text rather than a phrase, whatever their indent."""
    cut = (" ".join(paragraph.split()) for document in documents for paragraph in re.split(r"\n\s*\n", document))
    return {paragraph for paragraph in cut if len(paragraph) >= 40}


def test_table_covers_the_named_sets():
    assert {*HUB_SETS, "python-docs"} == set(NAMED_SETS)


@pytest.mark.parametrize("name", HUB_SETS)
def test_parts_of_a_hub_set_share_no_row(name):
    rows = [HUB_SETS[name].parts[part] for part in PARTS]
    for i, one in enumerate(rows):
        for other in rows[i + 1 :]:
            if one.split == other.split and one.files == other.files:
                assert one.rows is not None
                assert other.rows is not None
                assert one.rows[1] <= other.rows[0] or other.rows[1] <= one.rows[0]


def test_hub_fingerprint_changes_with_set_part_and_revision():
    asked = [(name, part, revision) for name in HUB_SETS for part in PARTS for revision in (None, "abc")]
    assert len({hub_fingerprint(*each) for each in asked}) == len(asked)
    assert hub_fingerprint("c4", "evaluation", None) == hub_fingerprint("c4", "evaluation", None)


@pytest.mark.parametrize("name", HUB_SETS)
def test_hub_set_without_hub_is_one_line_naming_the_set_and_a_way_out(name, tmp_path):
    # A process of its own: `datasets` reads the switch once, when it is imported.
    script = f"""
from prefixquant.tasks.errors import DataError
from prefixquant.tasks.named_sets import read_hub_set
try:
    read_hub_set({name!r}, "calibration", "abc")
except DataError as err:
    print(err)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = run.stdout.splitlines()
    assert line.startswith(f"text {name} ({HUB_SETS[name].hub_id} at revision abc) could not be loaded from the")
    assert line.endswith("check the network, or give a local .txt, .jsonl or .parquet file instead")


def test_python_docs_hold_enough_text_for_the_demo():
    num_chars = {part: sum(map(len, read_python_docs(part))) for part in PARTS}
    assert num_chars["calibration"] > 180_000  # 45 k SmolLM2 tokens at four characters each
    assert num_chars["validation"] > 15_000
    assert num_chars["evaluation"] > 80_000


def test_python_docs_parts_share_no_paragraph():
    parts = [paragraphs(read_python_docs(part)) for part in PARTS]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_python_docs_are_the_same_on_every_call():
    assert read_python_docs("evaluation") == read_python_docs("evaluation")


def bucket(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10


def test_topics_go_to_parts_by_name_and_are_sorted():
    topics = {f"topic{i}": f"text {i} {'x' * 50}" for i in reversed(range(60))}
    parts = split_topics(topics)
    for part, buckets in (("calibration", range(6)), ("validation", [6]), ("evaluation", [7, 8, 9])):
        assert parts[part] == [topics[name] for name in sorted(topics) if bucket(name) in buckets]


def test_repeated_paragraph_stays_in_evaluation_only():
    names = [f"topic{i}" for i in range(60)]
    calibration = next(name for name in names if bucket(name) < 6)
    evaluation = next(name for name in names if bucket(name) > 6)
    shared = "a paragraph that a chapter repeats from its section"
    parts = split_topics({calibration: f"own\n\n   {shared}\n\nSee also:", evaluation: f"{shared}\n\nSee also:"})
    assert parts == {"calibration": ["own\n\nSee also:"], "validation": [], "evaluation": [f"{shared}\n\nSee also:"]}
