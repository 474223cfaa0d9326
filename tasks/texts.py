"""Read calibration and evaluation texts and cut them into token windows."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from prefixquant.tasks.errors import ConfigError, DataError
from prefixquant.tasks.named_sets import HUB_SETS, hub_fingerprint, read_hub_set, read_python_docs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # slow to import, and every recipe imports this file

NAMED_SETS = ("pile", "wikitext2", "c4", "redpajama", "python-docs")


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowsConfig:
    """Token windows drawn at random from a text."""

    count: int
    """Number of windows."""

    length: int
    """Tokens of a window."""

    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.length < 2:
            raise ConfigError(f"token windows need count >= 1 and length >= 2, got {self.count} and {self.length}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """A text: a named set or a local file."""

    source: str
    """One of `NAMED_SETS`, or the path of a .txt, .jsonl or .parquet file (one document a line or row)."""

    split: Literal["calibration", "validation", "evaluation"] = "evaluation"
    """Part of a named set. A local file given for calibration: its first 90 % of documents calibrate, the rest
    validate; given for evaluation: all of it."""

    revision: str | None = None
    """Dataset revision of a named set; part of the artifact key."""


_SEPARATOR = "\n\n"
_BLANK_LINES = re.compile(r"\n\s*\n")
_ADVICE = "give a .txt, .jsonl or .parquet file with text in it"


def read_documents(config: TextConfig) -> list[str]:
    """Return the documents of a text, at least one, in their order.

    A local file: a .jsonl line or .parquet row is a document, empty ones are left out. A .txt file is one document for
    evaluation, where every character counts; for calibration and validation its paragraphs (between blank lines) are
    the documents. Calibration takes the first 90 %, at least one; validation the rest; evaluation all.

    Raises:
        DataError: the file or hub set cannot be read, or holds no text.
    """
    if config.source == "python-docs":
        return read_python_docs(config.split)
    if config.source in HUB_SETS:
        return read_hub_set(config.source, config.split, config.revision)
    path = Path(config.source)
    match path.suffix:
        case ".txt":
            text = _read_text(path)
            documents = [text] if config.split == "evaluation" else _BLANK_LINES.split(text.strip("\n"))
        case ".jsonl":
            # Not splitlines: a JSON string may hold U+2028 and other separators that Python takes for line ends.
            lines = enumerate(_read_text(path).split("\n"), start=1)
            documents = [_document(path, number, line) for number, line in lines if line.strip()]
        case ".parquet":
            documents = _read_parquet(path)
        case other:
            raise DataError(f"{path} has the unknown ending {other!r}; {_ADVICE}")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"{path} holds no text; {_ADVICE}")
    return _split(path, documents, config.split)


def _split(path: Path, documents: list[str], split: str) -> list[str]:
    if split == "evaluation":
        return documents
    num_calibration = max(1, len(documents) * 9 // 10)
    if split == "calibration":
        return documents[:num_calibration]
    if len(documents) == 1:
        raise DataError(f"{path} holds one document, calibration takes it and validation is empty; give at least two")
    return documents[num_calibration:]


def _unreadable(path: Path, err: OSError) -> DataError:
    return DataError(f"{path} cannot be read ({err.strerror or err}); correct the path, or name another text")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is not text
    except OSError as err:
        raise _unreadable(path, err) from err
    except UnicodeDecodeError as err:
        raise DataError(f"{path} is not UTF-8 text ({err.reason} at byte {err.start}); convert it to UTF-8") from err


def _document(path: Path, number: int, line: str) -> str:
    """Return the text of one .jsonl line: its field `text`, else its only string field."""
    where = f"{path}, line {number}: wanted a JSON object with the text in a string field `text`"
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as err:
        found = f"{err.msg} at column {err.colno} of {_shortened(line)}"
        raise DataError(f"{where}, found {found}; correct or remove the line") from err
    if not isinstance(record, dict):
        raise DataError(f"{where}, found {_shortened(line)}; correct or remove the line")
    strings = [name for name, value in record.items() if isinstance(value, str)]
    name = "text" if "text" in record or len(strings) != 1 else strings[0]
    if name not in strings:
        fields = ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items()) or "none"
        raise DataError(f"{where}, found the fields: {fields}; name the text's field `text`")
    text = str(record[name])
    try:
        text.encode()
    except UnicodeEncodeError as err:
        found = f"half of a surrogate pair at character {err.start}"
        raise DataError(f"{where}, found {found}; correct or remove the line") from err
    return text


def _shortened(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")


def _read_parquet(path: Path) -> list[str]:
    import pyarrow  # slow to import, and only these files need it
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        is_text = [pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type) for field in schema]
        if "text" not in {name for name, ok in zip(schema.names, is_text, strict=True) if ok}:
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
            raise DataError(f"{path} wants a string column `text`, found the columns: {columns}; rename the text's")
        return [text for text in file.read(columns=["text"]).column("text").to_pylist() if text is not None]
    except OSError as err:
        raise _unreadable(path, err) from err
    except (pyarrow.ArrowException, UnicodeDecodeError) as err:
        reason = " ".join(str(err).split())
        raise DataError(f"{path} is truncated or no Parquet file ({reason}); write it again") from err


def documents_fingerprint(documents: Sequence[str]) -> str:
    """Return the SHA-256 (hex) of the documents: their lengths in bytes, so that borders count, and their UTF-8."""
    digest = hashlib.sha256()
    for document in documents:
        encoded = document.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def source_fingerprint(config: TextConfig) -> str:
    """Return a SHA-256 (hex) that stands for `read_documents(config)` in an artifact key, without a download.

    Of a local file its bytes, ending and split count, not its path; of a hub set what is asked of the hub.

    Raises:
        DataError: the local file cannot be read.
    """
    if config.source == "python-docs":
        return documents_fingerprint(read_python_docs(config.split))
    if config.source in HUB_SETS:
        return hub_fingerprint(config.source, config.split, config.revision)
    path = Path(config.source)
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise _unreadable(path, err) from err
    return hashlib.sha256(f"{path.suffix} {config.split} {content}".encode()).hexdigest()


def tokenize(tokenizer: "PreTrainedTokenizerBase", documents: Sequence[str]) -> Tensor:
    """Return the token ids [tokens] int64 of the documents joined by an empty line, tokenized once, without BOS.

    Raises:
        DataError: there are no documents, or they give no token.
    """
    # Truncation off: a tokenizer file may switch it on. Not verbose: the text is longer than the model's context.
    encoded = tokenizer(_SEPARATOR.join(documents), add_special_tokens=False, truncation=False, verbose=False)
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if tokens.numel() == 0:
        raise DataError(f"a text of {len(documents)} documents gives no token; {_ADVICE}")
    return tokens


def draw_windows(tokens: Tensor, config: WindowsConfig, *, where: str = "data.statistics.length") -> Tensor:
    """Return windows [count, length] of `tokens` [tokens] at random starts, the same ones for the same seed.

    Args:
        tokens: [tokens] token ids.
        config: how many windows, how long, and the seed.
        where: recipe key that sets the length; for the error.

    Raises:
        DataError: the text is shorter than one window.
    """
    num_starts = len(tokens) - config.length + 1
    if num_starts < 1:
        raise DataError(
            f"calibration text holds {len(tokens)} tokens, windows of {config.length} are asked; "
            f"give a longer text or a smaller {where}"
        )
    generator = torch.Generator().manual_seed(config.seed)
    starts = torch.randint(num_starts, (config.count,), generator=generator)
    return tokens.unfold(0, config.length, 1)[starts]


def cut_windows(
    tokens: Tensor, window: int, max_windows: int | None = None, *, where: str = "evaluate.window"
) -> Tensor:
    """Return consecutive windows [N, window] of `tokens` [tokens], the remainder dropped; at most `max_windows`.

    Args:
        tokens: [tokens] token ids.
        window: tokens of a window.
        max_windows: the first so many windows; None keeps all.
        where: recipe key that sets the window; for the error.

    Raises:
        DataError: the text is shorter than one window.
    """
    num_windows = len(tokens) // window
    if num_windows < 1:
        raise DataError(
            f"evaluation text holds {len(tokens)} tokens, windows of {window} are asked; "
            f"give a longer text or a smaller {where}"
        )
    if max_windows is not None:
        num_windows = min(num_windows, max_windows)
    return tokens[: num_windows * window].view(num_windows, window)
