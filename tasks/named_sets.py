"""The texts known by name: a table of hub datasets, and the prose of CPython's own documentation."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from prefixquant.tasks.errors import DataError

Part = Literal["calibration", "validation", "evaluation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HubRows:
    """Rows of a hub dataset that make one part of a named set."""

    split: str
    """Split on the hub; with `files` and no split of that name, the one the files are loaded into."""

    files: tuple[str, ...] = ()
    """Files of the repository to read; empty: all files of the split."""

    rows: tuple[int, int] | None = None
    """First row and the row after the last; None: every row."""

    @property
    def slice(self) -> str:
        """The split with its rows, as `datasets` writes it: `train[0:100]`."""
        return self.split if self.rows is None else f"{self.split}[{self.rows[0]}:{self.rows[1]}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSet:
    """A dataset of the Hugging Face hub and the rows that each part takes. Parts never share a row."""

    hub_id: str
    parts: Mapping[Part, HubRows]
    config_name: str | None = None

    builder: str | None = None
    """Format of `files`, for a repository with a loading script, which `datasets` no longer runs: only the files are
    fetched. None: the repository is loaded as it is."""

    text_column: str = "text"


_C4_TRAIN = ("en/c4-train.00000-of-01024.json.gz",)
_C4_VALIDATION = ("en/c4-validation.00000-of-00008.json.gz",)
_REDPAJAMA = ("cc_2023-06_sample.jsonl",)  # Common Crawl: two thirds of RedPajama, one schema

# Rows are bounded where a split is far larger than any calibration needs: a text is tokenized in one piece.
HUB_SETS: dict[str, HubSet] = {
    "pile": HubSet(
        hub_id="mit-han-lab/pile-val-backup",  # the one split that this mirror holds, cut by rows
        parts={
            "calibration": HubRows(split="validation", rows=(0, 2000)),
            "validation": HubRows(split="validation", rows=(2000, 2200)),
            "evaluation": HubRows(split="validation", rows=(2200, 2700)),
        },
    ),
    "wikitext2": HubSet(  # every row, the empty ones too: joined by "\n\n" this is the text of published perplexities
        hub_id="Salesforce/wikitext",
        config_name="wikitext-2-raw-v1",
        parts={
            "calibration": HubRows(split="train"),
            "validation": HubRows(split="validation"),
            "evaluation": HubRows(split="test"),
        },
    ),
    "c4": HubSet(
        hub_id="allenai/c4",
        parts={
            "calibration": HubRows(split="train", files=_C4_TRAIN, rows=(0, 8000)),
            "validation": HubRows(split="train", files=_C4_TRAIN, rows=(8000, 8400)),
            "evaluation": HubRows(split="validation", files=_C4_VALIDATION, rows=(0, 1100)),
        },
    ),
    "redpajama": HubSet(
        hub_id="togethercomputer/RedPajama-Data-1T-Sample",
        builder="json",
        parts={
            "calibration": HubRows(split="train", files=_REDPAJAMA, rows=(0, 3000)),
            "validation": HubRows(split="train", files=_REDPAJAMA, rows=(3000, 3300)),
            "evaluation": HubRows(split="train", files=_REDPAJAMA, rows=(3300, 4000)),
        },
    ),
}


def read_hub_set(name: str, part: Part, revision: str | None) -> list[str]:
    """Return one document a row of a set of `HUB_SETS`, from the local cache of `datasets` or the hub.

    Raises:
        DataError: the hub cannot be reached, or does not hold the set at this revision.
    """
    import datasets  # slow to import, and only these sets need it
    from huggingface_hub import hf_hub_download

    hub_set = HUB_SETS[name]
    rows = hub_set.parts[part]
    try:
        if hub_set.builder is None:
            table = datasets.load_dataset(
                hub_set.hub_id,
                hub_set.config_name,
                split=rows.slice,
                data_files={rows.split: list(rows.files)} if rows.files else None,
                revision=revision,
                # The sizes on record are those of the whole dataset, not of a few of its files.
                verification_mode="no_checks" if rows.files else "basic_checks",
            )
        else:
            paths = [
                hf_hub_download(hub_set.hub_id, file, repo_type="dataset", revision=revision) for file in rows.files
            ]
            table = datasets.load_dataset(hub_set.builder, data_files={rows.split: paths}, split=rows.slice)
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as err:
        # ValueError: offline with another part of the set cached; ImportError: a decompressor is missing.
        at_revision = f" at revision {revision}" if revision else ""
        reason = " ".join(str(err).split()) or "no reason given"
        raise DataError(
            f"text {name} ({hub_set.hub_id}{at_revision}) could not be loaded from the Hugging Face hub "
            f"({type(err).__name__}: {reason}); "
            "check the network, or give a local .txt, .jsonl or .parquet file instead"
        ) from err
    return [text for text in table[hub_set.text_column] if text is not None]


def hub_fingerprint(name: str, part: Part, revision: str | None) -> str:
    """Return the SHA-256 (hex) of what is asked of the hub; nothing is downloaded. No revision stands for `main`."""
    hub_set = HUB_SETS[name]
    rows = hub_set.parts[part]
    asked = [hub_set.hub_id, hub_set.config_name, rows.slice, rows.files, hub_set.text_column, revision]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


_MIN_SHARED_CHARS = 40
"""Shorter paragraphs ("See also:", "Note:") are phrases that many topics use, not text repeated from another topic."""


def read_python_docs(part: Part) -> list[str]:
    """Return the language topics of the running CPython that belong to `part`, one document a topic, sorted by name.

    No download. A hash of its name puts a topic into a part, so the parts stay the same when a Python version adds or
    rewrites topics. Chapters repeat the text of their sections (`compound` holds most of `try`): a repeated paragraph
    is kept once, by evaluation before validation before calibration, so that the parts share no text.

    Raises:
        DataError: this Python was installed without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as err:
        raise DataError(
            "text python-docs is the documentation inside CPython (pydoc_data.topics), which this Python was installed "
            "without; install the full standard library, or give a local .txt, .jsonl or .parquet file instead"
        ) from err
    return split_topics(topics)[part]


def split_topics(topics: Mapping[str, str]) -> dict[Part, list[str]]:
    """Return the topics (name to text) as documents of three parts that share no paragraph; see `read_python_docs`."""
    parts: dict[Part, list[str]] = {"evaluation": [], "validation": [], "calibration": []}
    seen: set[str] = set()
    for part, documents in parts.items():
        for name in sorted(topics):
            if _part_of(name) != part:
                continue
            kept = []
            for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
                words = " ".join(paragraph.split())  # a section is indented differently inside its chapter
                if len(words) >= _MIN_SHARED_CHARS:
                    if words in seen:
                        continue
                    seen.add(words)
                kept.append(paragraph)
            if kept:
                documents.append("\n\n".join(kept))
    return parts


def _part_of(topic: str) -> Part:
    """Return the part of a topic: of ten hash values six calibrate, one validates, three evaluate."""
    bucket = int(hashlib.sha256(topic.encode()).hexdigest(), 16) % 10
    return "calibration" if bucket < 6 else "validation" if bucket == 6 else "evaluation"
