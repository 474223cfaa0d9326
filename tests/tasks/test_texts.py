import json
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from prefixquant.tasks.errors import DataError
from prefixquant.tasks.texts import (
    NAMED_SETS,
    TextConfig,
    WindowsConfig,
    cut_windows,
    documents_fingerprint,
    draw_windows,
    read_documents,
    source_fingerprint,
    tokenize,
)

SPLITS = ("calibration", "validation", "evaluation")


def read(path: Path, split: str = "evaluation") -> list[str]:
    return read_documents(TextConfig(source=str(path), split=split))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_jsonl(path: Path, documents: list[str]) -> Path:
    return write(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))


def write_parquet(path: Path, columns: dict[str, list[str | int | None]]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w9, a BOS in front by default, a short context and truncation switched on in the file."""
    vocab = {"<unk>": 0, "<s>": 1, **{f"w{i}": i + 2 for i in range(10)}}
    words = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.enable_truncation(4)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", model_max_length=4)


def test_txt_is_one_document_for_evaluation_and_paragraphs_for_calibration(tmp_path):
    text = " first\nline\n\n\n  second \n \nthird\n"
    path = write(tmp_path / "a.txt", text)
    assert read(path) == [text]
    assert read(path, "calibration") == [" first\nline", "  second "]
    assert read(path, "validation") == ["third"]


def test_txt_drops_a_byte_order_mark_and_reads_windows_line_ends(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\n\r\nb")) == ["a\n\nb"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_local_documents_come_back_in_order_without_empty_ones(kind, tmp_path):
    documents = ["one\n\nstill one\n", "zwei \u2028 \x85 zwei", "  ", "", "drei"]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, documents)
    else:
        write_parquet(path, {"id": [0, 1, 2, 3, 4, 5], "text": [*documents, None]})
    assert read(path) == [documents[0], documents[1], documents[4]]


@pytest.mark.parametrize("num_documents", [2, 9, 10, 25])
def test_calibration_and_validation_share_the_documents_nine_to_one(num_documents, tmp_path):
    documents = [f"document {i}" for i in range(num_documents)]
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    calibration, validation, evaluation = (read(path, split) for split in SPLITS)
    assert calibration + validation == evaluation == documents
    assert len(calibration) == num_documents * 9 // 10


def test_single_document_calibrates_and_leaves_no_validation(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["alone"])
    assert read(path, "calibration") == ["alone"]
    with pytest.raises(DataError, match="holds one document, calibration takes it and validation is empty"):
        read(path, "validation")


def test_jsonl_without_text_field_takes_its_only_string_field(tmp_path):
    assert read(write(tmp_path / "a.jsonl", '{"content": "hello", "id": 3}\n\n')) == ["hello"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "b"', r"Expecting ',' delimiter at column 13 of '\{"),
        ('"b"', "found '\"b\"'"),
        ('{"text": 3, "title": "b"}', r"the fields: text \(int\), title \(str\); name the text's field `text`"),
        ('{"title": "b", "body": "c"}', r"the fields: title \(str\), body \(str\)"),
        ("{}", "the fields: none"),
        (r'{"text": "b\ud83d"}', "half of a surrogate pair at character 1"),
    ],
)
def test_bad_jsonl_line_is_named_with_what_it_holds(line, found, tmp_path):
    path = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(DataError, match=found) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 3: wanted a JSON object")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "is not UTF-8 text .* at byte 3.; convert it to UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8 text .* at byte 13"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.parquet", b"PAR1 and then nothing", "is truncated or no Parquet file"),
        ("a.pdf", b"x", "unknown ending '.pdf'"),
    ],
)
def test_unusable_file_is_a_data_error(name, content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_missing_file_is_a_data_error_with_its_path(ending, tmp_path):
    path = tmp_path / f"missing.{ending}"
    for use in (read_documents, source_fingerprint):
        with pytest.raises(DataError, match=r"missing\.\w+ cannot be read .*; correct the path, or name another text"):
            use(TextConfig(source=str(path)))


@pytest.mark.parametrize("columns", [{"body": ["a"]}, {"text": [1]}], ids=["no-text", "text-is-int"])
def test_parquet_without_a_string_column_text_lists_its_columns(columns, tmp_path):
    with pytest.raises(DataError, match=r"wants a string column `text`, found the columns: \w+ \(\w+\)"):
        read(write_parquet(tmp_path / "a.parquet", columns))


def test_documents_fingerprint_sees_borders_order_and_text():
    texts = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["abc", ""], ["é"]]
    assert len({documents_fingerprint(documents) for documents in texts}) == len(texts)
    assert documents_fingerprint(["ab", "c"]) == documents_fingerprint(("ab", "c"))


def test_source_fingerprint_of_a_file_follows_bytes_and_split_but_not_the_path(tmp_path):
    def fingerprint(path: Path, split: str = "evaluation") -> str:
        return source_fingerprint(TextConfig(source=str(path), split=split))

    first, copy = (write(tmp_path / name, "hello") for name in ("a.txt", "b.txt"))
    assert fingerprint(first) == fingerprint(copy)
    different = {fingerprint(first), fingerprint(first, "calibration"), fingerprint(write(tmp_path / "c.txt", "hallo"))}
    assert len(different) == 3


def test_source_fingerprint_of_named_sets_needs_no_download():
    configs = [TextConfig(source=source, split=split) for source in NAMED_SETS for split in SPLITS]
    assert len({source_fingerprint(config) for config in configs}) == len(configs)


def test_python_docs_read_as_a_text():
    documents = read_documents(TextConfig(source="python-docs", split="evaluation"))
    assert any("compound statement" in document for document in documents)


def test_tokenize_joins_documents_without_bos_truncation_or_warning(tokenizer, capfd):
    tokens = tokenize(tokenizer, ["w0 w1 w2", "w3 w4", "w5"])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [2, 3, 4, 5, 6, 7]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("documents", [[], ["", " \n"]], ids=["none", "blank"])
def test_tokenize_of_nothing_is_a_data_error(documents, tokenizer):
    with pytest.raises(DataError, match=f"a text of {len(documents)} documents gives no token"):
        tokenize(tokenizer, documents)


def test_drawn_windows_are_pieces_of_the_text_and_repeat_with_the_seed():
    tokens = torch.arange(100)
    config = WindowsConfig(count=50, length=7, seed=3)
    windows = draw_windows(tokens, config)
    assert windows.shape == (50, 7)
    assert torch.equal(windows, windows[:, :1] + torch.arange(7))
    assert torch.equal(windows, draw_windows(tokens, config))
    assert not torch.equal(windows, draw_windows(tokens, WindowsConfig(count=50, length=7, seed=4)))


def test_drawn_windows_reach_both_ends_of_the_text():
    starts = draw_windows(torch.arange(10), WindowsConfig(count=200, length=8))[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}
    assert draw_windows(torch.arange(8), WindowsConfig(count=2, length=8)).tolist() == [list(range(8))] * 2


def test_text_shorter_than_a_drawn_window_names_both_numbers_and_the_key():
    message = (
        "calibration text holds 300 tokens, windows of 512 are asked; "
        "give a longer text or a smaller data.search.length"
    )
    with pytest.raises(DataError, match=message):
        draw_windows(torch.arange(300), WindowsConfig(count=1, length=512), where="data.search.length")


@pytest.mark.parametrize(("max_windows", "count"), [(None, 3), (2, 2), (9, 3)])
def test_cut_windows_follow_one_another_and_drop_the_remainder(max_windows, count):
    windows = cut_windows(torch.arange(11), 3, max_windows)
    assert torch.equal(windows, torch.arange(3 * count).view(count, 3))


def test_text_shorter_than_a_cut_window_is_a_data_error():
    with pytest.raises(DataError, match=r"evaluation text holds 2 tokens, windows of 3 .* smaller evaluate\.window"):
        cut_windows(torch.arange(2), 3)
