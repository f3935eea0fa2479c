"""Data rows: defects are found, named and counted; damaged files are named."""

import gzip
import io

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers import load, pair, tokenized, write_lines

from preference_datasets import default_options, get_dataset
from tdpo.data.sources import LONGEST_ROW, Place, _bounded_lines, read_rows
from tdpo.utils import UserError

BAD_ROWS = [
    (pair(prompt=" "), "empty prompt"),
    (pair(chosen=""), "empty chosen"),
    (pair(rejected=" \n"), "empty rejected"),
    (pair(chosen=" x", rejected=" x"), "chosen and rejected are equal"),
    ({"prompt": "p", "chosen": "c"}, "no field 'rejected' (it has prompt, chosen; datasets.jsonl.columns gives other names)"),
    (pair(chosen=3), "'chosen' is int, not text"),
    (pair(chosen=None), "'chosen' is null, not text"),
    (pair(prompt="a<|endoftext|>b"), "special token '<|endoftext|>' inside 'prompt'"),
    ('{"prompt": "a", "chos', "truncated or malformed JSON"),
    ("[1, 2]", "not a JSON object"),
    ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "'prompt' holds a lone surrogate"),
]


KEPT = 4  # the first ones of BAD_ROWS, on which the published code trains


def test_all_bad_rows_are_reported_together(tmp_path, mini_tokenizer):
    rows = [pair("good"), *(row for row, _ in BAD_ROWS), "", pair("good too")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as error:
        load("jsonl", path=path, eval_path=path, tokenizer=mini_tokenizer)
    for number, (_, defect) in enumerate(BAD_ROWS, 2):
        assert f"{defect}: {path} row {number}" in str(error.value)
    assert "datasets.jsonl.invalid_rows=skip" in str(error.value) and "good" not in str(error.value)


def test_skip_drops_and_counts_bad_rows(tmp_path, mini_tokenizer, capsys):
    path = write_lines(tmp_path / "a.jsonl", [pair("good"), *(row for row, _ in BAD_ROWS)])
    options = {**default_options("jsonl"), "path": path, "eval_path": path, "invalid_rows": "skip"}
    assert list(get_dataset("jsonl", "train", options=options, tokenizer=mini_tokenizer)) == ["good"]
    printed = capsys.readouterr().out
    assert f"{len(BAD_ROWS) + 1} rows read, 1 kept" in printed and "dropped" in printed and "empty chosen" in printed


def test_keep_keeps_what_the_published_code_trains_on_and_refuses_the_rest(tmp_path, mini_tokenizer, capsys):
    path = write_lines(tmp_path / "a.jsonl", [row for row, _ in BAD_ROWS[:KEPT]])
    options = {**default_options("jsonl"), "path": path, "eval_path": path, "invalid_rows": "keep"}
    data = get_dataset("jsonl", "train", options=options, tokenizer=mini_tokenizer)
    assert sum(len(entry["pairs"]) for entry in data.values()) == KEPT
    assert "4 rows read, 4 kept" in (printed := capsys.readouterr().out) and "empty rejected" in printed
    for row, defect in BAD_ROWS[KEPT:]:
        bad = write_lines(tmp_path / "b.jsonl", [pair(), row])
        with pytest.raises(UserError) as error:
            load("jsonl", path=bad, eval_path=bad, invalid_rows="keep", tokenizer=mini_tokenizer)
        assert defect in str(error.value)


def test_special_tokens_can_be_escaped(tmp_path, mini_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [pair(prompt="a<|endoftext|>b")])
    options = {**default_options("jsonl"), "path": path, "eval_path": path, "escape_special_tokens": True}
    data = get_dataset("jsonl", "train", silent=True, options=options, tokenizer=mini_tokenizer)
    split = tokenized({"jsonl": (data, options)}, mini_tokenizer)
    ids = split.prompts[0]["prompt_ids"]
    assert mini_tokenizer.eos_token_id not in ids and mini_tokenizer.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "no rows"),
        (b"\n\n", "no rows"),
        (gzip.compress(b'{"prompt": "a"}\n' * 400, mtime=0)[:30], "truncated or corrupt"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8 text"),
    ],
)
def test_files_without_valid_rows(content, message, tmp_path):
    file = tmp_path / ("a.jsonl.gz" if content[:2] == b"\x1f\x8b" else "a.jsonl")
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load("jsonl", path=str(file), eval_path=str(file))


@pytest.mark.parametrize(
    "path,message",
    [
        ("missing.jsonl", "does not exist"),
        ("folder", "no split 'train'"),
        ("a.csv", "expected one of"),
        ("b.parquet", "is not a readable parquet file"),
    ],
)
def test_paths_without_data(path, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "b.parquet").write_text("x")
    with pytest.raises(UserError, match=message):
        read_rows(Place(str(tmp_path / path)), "train")


@pytest.mark.parametrize(
    "line,defect",
    [
        ('{"prompt": "P", "chosen": ' + "[" * 50_000 + "]" * 50_000 + "}", "JSON nested too deeply"),
        ("[" * 50_000, "JSON nested too deeply"),
        ('{"prompt": ' + "1" * 5000 + "}", "truncated or malformed JSON"),
        ('{"prompt": "' + "x" * LONGEST_ROW + '"}', "longer than 16 MiB"),
    ],
    ids=["deep", "deep and cut", "long number", "long"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_rows_that_would_exhaust_the_reader_are_defects(line, defect, suffix, tmp_path, capsys):
    path = write_lines(tmp_path / f"a{suffix}", [pair("A"), line, pair("B")])
    with pytest.raises(UserError, match=rf"{defect}: .*a{suffix} row 2"):
        load("jsonl", path=path, eval_path=path)
    assert list(load("jsonl", path=path, eval_path=path, invalid_rows="skip")) == ["A", "B"]


def test_a_long_line_is_never_in_memory_as_a_whole(tmp_path):
    class Endless(io.RawIOBase):
        """Yields 3 GB without an end of line."""

        def __init__(self):
            self.left, self.largest = 3 * 2**30, 0

        def readline(self, size=-1):
            assert 0 < size <= LONGEST_ROW + 1
            taken = min(size, self.left)
            self.left -= taken
            return b"x" * taken

    assert list(_bounded_lines(Endless())) == [None]


def test_long_rows_of_a_parquet_file_are_defects(tmp_path, capsys):
    rows = [pair("A"), pair("B", chosen="x" * LONGEST_ROW), pair("C")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="longer than 16 MiB: .*a.parquet row 2"):
        load("jsonl", path=path, eval_path=path)
    assert list(load("jsonl", path=path, eval_path=path, invalid_rows="skip")) == ["A", "C"]


@pytest.mark.parametrize("damage", ["cut", "zeroed", "empty", "text"])
def test_a_damaged_parquet_file_is_named(damage, tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([pair(str(i)) for i in range(99)]), path)
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes({"cut": content[:half], "zeroed": bytes(half) + content[half:], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(UserError, match=f"'{path}' is not a readable parquet file"):
        load("jsonl", path=str(path), eval_path=str(path))


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe"])
def test_a_damaged_folder_of_save_to_disk_is_named(file, content, tmp_path):
    datasets.Dataset.from_list([pair(str(i)) for i in range(9)]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / file).write_bytes(content)
    with pytest.raises(UserError, match="saved.* cannot be read"):
        load("jsonl", path=str(tmp_path / "saved"), eval_path=str(tmp_path / "saved"))
