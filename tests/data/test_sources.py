"""Files as they come: folders, shards, lists, saved datasets, hub datasets, and what of them is read."""

import gzip
import json
import shutil

import datasets
import pytest
from helpers import bpe_tokenizer, elements_of, load, pair, write_lines

from tdpo.data import sources
from tdpo.data.contract import Form
from tdpo.data.sources import Place, data_fingerprint, has_split, read_rows
from tdpo.utils import UserError

ROWS = [pair(f"p{i}") for i in range(6)]


def write(path, rows) -> None:
    """Write rows in the format that the path's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif ".jsonl" in path.name:
        write_lines(path, rows)
    else:
        text = json.dumps(rows, indent=1).encode()
        path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".json", ".json.gz"])
@pytest.mark.parametrize(
    "names",
    [
        ["train"],
        ["data/train"],
        ["train-00000-of-00002", "train-00001-of-00002"],
        ["data/train-00000-of-00002", "data/train-00001-of-00002"],
        ["train_0", "train_1"],
        ["train.00", "train.01"],
        ["train/0000", "train/0001"],
        ["data/train/a", "data/train/b"],
    ],
)
def test_a_split_in_a_folder(names, suffix, tmp_path):
    size = len(ROWS) // len(names)
    for i, name in enumerate(names):
        write(tmp_path / (name + suffix), ROWS[i * size : (i + 1) * size])
    for other in ("train_prefs-00000-of-00001", "trainer", "test-00000-of-00001", "mytrain"):
        write(tmp_path / (other + suffix), [pair("another split")])
    place = Place(str(tmp_path))
    assert [row.fields for row in read_rows(place, "train")] == ROWS
    assert has_split(place, "train") and has_split(place, "test") and not has_split(place, "validation")
    before = data_fingerprint(place)
    file = tmp_path / (names[-1] + suffix)
    write(file, [pair("changed")])
    assert data_fingerprint(place) != before


def test_the_splits_that_there_are_are_named(tmp_path):
    for name in ("train_prefs-00000-of-00001", "data/test_prefs"):
        write(tmp_path / f"{name}.jsonl", ROWS)
    with pytest.raises(UserError, match="has no split 'trian_prefs': it has test_prefs, train_prefs.*train_prefs"):
        read_rows(Place(str(tmp_path)), "trian_prefs")


def test_a_json_file_may_hold_a_list_or_a_row_a_line(tmp_path):
    for name, text in {"list": json.dumps(ROWS), "lines": "\n".join(map(json.dumps, ROWS)), "bom": "\ufeff" + json.dumps(ROWS)}.items():
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        assert [row.fields for row in read_rows(Place(str(tmp_path / f"{name}.json")), "train")] == ROWS
    (tmp_path / "bad.json").write_text(json.dumps([ROWS[0], 3, "x"]))
    assert [row.defect for row in read_rows(Place(str(tmp_path / "bad.json")), "train")] == [None, "not a JSON object", "not a JSON object"]
    for content, message in ((b"[{", "is not a readable list of rows"), (b"[\xff]", "not UTF-8"), (b"[]", "no rows")):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_rows(Place(str(tmp_path / "bad.json")), "train")


def test_a_second_format_of_a_split_is_not_read_and_said(tmp_path, capsys):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "train-00000-of-00001.parquet", [pair("other")])
    write(tmp_path / "test.jsonl", ROWS)
    elements = elements_of(str(tmp_path), tmp_path, bpe_tokenizer(template=None))
    assert len(elements) == len(ROWS)
    assert "other files of the split not read: " in (printed := capsys.readouterr().out) and "00001.parquet" in printed


@pytest.mark.parametrize("other", ["train-00000-of-00001.jsonl", "data/train.jsonl", "train/x.jsonl", "data/train-0.jsonl"])
def test_other_files_of_a_split_are_said(other, tmp_path, capsys):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / other, [pair("other")])
    assert len(elements_of(str(tmp_path), tmp_path, bpe_tokenizer(template=None), eval_path=None)) < len(ROWS) + 1
    assert f"other files of the split not read: {tmp_path}/{other}" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["00000-of-00003", "00002-of-00003"], ["00000-of-00001", "00000-of-00002", "00001-of-00002"]])
def test_shards_that_are_missing_or_of_two_versions_are_an_error(names, tmp_path):
    for name in names:
        write(tmp_path / f"train-{name}.jsonl", ROWS)
    with pytest.raises(UserError, match="shards of 'train' in .* are not complete, or of two versions: .*00000-of"):
        read_rows(Place(str(tmp_path)), "train")


def test_ultrafeedback_and_its_like_need_no_options(tmp_path, capsys):
    """Splits train_prefs and test_prefs, whole conversations, ratings of each; saved, or as files of the hub."""
    rows = [
        {
            "prompt": f"q{i}",
            "prompt_id": str(i),
            "chosen": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "right"}],
            "rejected": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "wrong"}],
            "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "right"}],
            "score_chosen": 8.5,
            "score_rejected": 4.0,
        }
        for i in range(4)
    ]
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train_prefs": split, "test_prefs": split.select([0])}).save_to_disk(str(tmp_path / "saved"))
    write(tmp_path / "hub" / "data" / "train_prefs-00000-of-00001.parquet", rows)
    write(tmp_path / "hub" / "data" / "test_prefs-00000-of-00001.parquet", rows[:1])
    for folder in ("saved", "hub"):
        options = {"eval_path": None}
        found = elements_of(str(tmp_path / folder), tmp_path, bpe_tokenizer(), Form(("chosen", "rejected"), rated=True), **options)
        assert [(e["chosen_annotation"], e["rejected_annotation"]) for e in found] == [(8.5, 4.0)] * 4
        assert "split train_prefs; fields not read: messages, prompt_id" in capsys.readouterr().out
        assert len(load("jsonl", "test", path=str(tmp_path / folder), tokenizer=bpe_tokenizer())) == 1


def test_a_single_saved_split_in_a_folder(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "all" / "train"))
    place = Place(str(tmp_path / "all"))
    assert len(read_rows(place, "train")) == len(ROWS) and has_split(place, "train") and not has_split(place, "test")
    before = data_fingerprint(place)
    shutil.rmtree(tmp_path / "all" / "train")
    datasets.Dataset.from_list(ROWS[:2]).save_to_disk(str(tmp_path / "all" / "train"))
    assert data_fingerprint(place) != before


def test_the_revision_of_a_hub_dataset_is_asked_for(monkeypatch):
    asked = []

    def splits(path, subset, revision=None):
        asked.append(revision)
        return ["train", "test"]

    def load_dataset(path, subset, split, revision, cache_dir):
        asked.append(revision)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(sources.datasets, "get_dataset_split_names", splits)
    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    assert len(load("jsonl", path="owner/name", revision="v1.0")) == len(ROWS)
    assert set(asked) == {"v1.0"}
