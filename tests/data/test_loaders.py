"""Loaders: what each makes of its rows."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers import MINI, load, pair, write_lines

from preference_datasets import default_options, get_dataset, load_split, strip_html_tags
from tdpo.utils import UserError


def test_hh(tmp_path):
    first = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    rows = [
        {"chosen": first + " yes", "rejected": first + " no"},
        {"chosen": first + " sure", "rejected": first + " nah"},
        {"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: z\n\nAssistant: long reply"},
    ]
    write_lines(tmp_path / "train.jsonl.gz", rows)
    data = load("hh", path=str(tmp_path))
    assert data[first] == {"responses": [" yes", " no", " sure", " nah"], "pairs": [(0, 1), (2, 3)], "sft_target": " sure"}
    # As published, the length of chosen's prompt is cut from rejected, without a check.
    assert data["\n\nHuman: x\n\nAssistant:"]["responses"] == [" y", " long reply"]
    assert list(load("hh", path=str(tmp_path), invalid_rows="skip")) == [first]
    with pytest.raises(UserError, match=r"chosen and rejected have different prompts: .*train.jsonl.gz row 3"):
        load("hh", path=str(tmp_path), invalid_rows="error")


def test_shp_keeps_pairs_with_a_score_ratio_of_2(tmp_path):
    def row(a, b, score_a, score_b, history="h"):
        return {
            "history": history,
            "human_ref_A": a,
            "human_ref_B": b,
            "score_A": score_a,
            "score_B": score_b,
            "labels": int(score_a > score_b),
        }

    write_lines(tmp_path / "train.jsonl", [row("a", "b", 10, 5), row("c", "d", 3, 20), row("e", "f", 9, 5), row("g", "i", 1, 3, "other")])
    data = load("shp", path=str(tmp_path))
    assert data["\n\nHuman: h\n\nAssistant:"] == {
        "responses": [" a", " b", " c", " d"],
        "pairs": [(0, 1), (3, 2)],
        "scores": [10, 5, 3, 20],
        "sft_target": " d",
    }
    assert data["\n\nHuman: other\n\nAssistant:"]["pairs"] == [(1, 0)]


def test_se_pairs_by_score_and_splits_off_1_percent(tmp_path):
    def row(i):
        answers = [{"text": f"<p>{c}</p>", "pm_score": s} for c, s in (("x", 1), ("y", 5), ("z", 1))]
        return {"question": f"<p>q{i}</p>", "answers": answers}

    write_lines(tmp_path / "train.jsonl", [row(i) for i in range(300)])
    train, test = (load("se", split, path=str(tmp_path)) for split in ("train", "test"))
    assert (len(train), len(test)) == (297, 3) and not set(train) & set(test)
    shuffled = datasets.Dataset.from_dict({"i": list(range(300))}).shuffle(seed=42)["i"]  # what the published code calls
    assert list(test) == [f"\n\nHuman: q{i}\n\nAssistant:" for i in shuffled[:3]]
    entry = train[f"\n\nHuman: q{shuffled[3]}\n\nAssistant:"]
    assert entry["responses"] == [" x", " y", " z"] and entry["sft_target"] == " y"
    assert entry["pairs"] == [(1, 0), (2, 0), (1, 2)]  # in a tie the second is chosen, as published


def test_strip_html_keeps_code():
    html = "<p>one <b>bold</b>two</p><ul><li>gone</li></ul><pre><code>x = 1\n</code></pre><code>y</code>loose"
    assert strip_html_tags(html) == "one two\n\n<code>x = 1\n</code>\n\n<code>y</code>"


def test_jsonl_from_every_kind_of_file(tmp_path):
    rows = [pair(f"p{i}") for i in range(40)]
    plain, zipped = write_lines(tmp_path / "a.jsonl", rows), write_lines(tmp_path / "b.jsonl.gz", rows)
    table = str(tmp_path / "c.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    loaded = [load("jsonl", path=path) for path in (plain, zipped, table)]
    assert loaded[0] == loaded[1] == loaded[2] and loaded[0]["p3"] == {"responses": [" a", " b"], "pairs": [(0, 1)], "sft_target": " a"}
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "train.jsonl", rows[:30])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[30:]), folder / "test-00000.parquet")
    assert (len(load("jsonl", "train", path=str(folder))), len(load("jsonl", "test", path=str(folder)))) == (30, 10)
    assert list(load("jsonl", "test", path=plain, eval_path=str(folder))) == [f"p{i}" for i in range(30, 40)]
    assert len(load("jsonl", "train", path=plain, eval_path=str(folder))) == 40
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(saved)
    assert len(load("jsonl", path=str(saved), eval_path=plain)) == 40
    single = tmp_path / "single"
    datasets.Dataset.from_list(rows).save_to_disk(single)
    assert len(load("jsonl", path=str(single), eval_path=plain)) == 40


def test_eval_fraction_is_by_prompt_and_stable(tmp_path):
    """By a hash of the prompt, so neither other rows nor their order move a prompt to the other split."""
    rows = [pair(f"p{i % 100}", f" a{i}") for i in range(200)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    train, test = (load("jsonl", split, path=path, eval_fraction=0.1) for split in ("train", "test"))
    assert len(train) + len(test) == 100 and 5 <= len(test) <= 15 and not set(train) & set(test)
    assert all(len(entry["pairs"]) == 2 for entry in (*train.values(), *test.values()))
    assert list(test) != sorted(train.keys() | test.keys())[: len(test)]
    more = write_lines(tmp_path / "b.jsonl", [*rows[::-1], *(pair(f"q{i}") for i in range(300))])
    assert {prompt for prompt in load("jsonl", "test", path=more, eval_fraction=0.1) if prompt[0] == "p"} == set(test)
    assert len(load("jsonl", "test", path=write_lines(tmp_path / "c.jsonl", rows[:3]), eval_fraction=0.001)) == 1


def test_a_requested_eval_split_must_exist(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [pair(f"p{i}") for i in range(30)])
    write_lines(folder / "validation.jsonl", [pair("v")])
    with pytest.raises(UserError, match="no split 'valid'"):
        load("jsonl", "test", path=str(folder), eval_split="valid")
    assert list(load("jsonl", "test", path=str(folder), eval_split="validation")) == ["v"]
    options = {**default_options("jsonl"), "path": str(folder)}
    get_dataset("jsonl", "test", options=options)
    assert "no eval split: " in capsys.readouterr().out  # and how many prompts are taken instead
    with pytest.raises(UserError, match="1 prompt cannot be split into train and eval"):
        load("jsonl", "train", path=write_lines(tmp_path / "one.jsonl", [pair()]))


def test_unknown_datasets():
    with pytest.raises(UserError, match="unknown dataset 'revews'.*did you mean reviews"):
        get_dataset("revews", "train")
    with pytest.raises(UserError, match="neither a local path nor an accessible dataset on the hub"):
        load("jsonl", path="nobody/nothing")


def test_mini_data_is_what_the_golden_runs_read():
    data = load("hh", path=str(MINI / "data"))
    assert sum(len(entry["pairs"]) for entry in data.values()) == 96


def test_imdb_prompts_are_the_first_words(tmp_path, capsys):
    texts = ["one two three four five", "one two three and more", "a b", "x y z  w"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text, "label": 1}) + "\n" for text in texts))
    options = {**default_options("imdb"), "path": str(tmp_path), "prefix_words": 3}
    data = get_dataset("imdb", "train", options=options)
    assert {prompt: entry["sft_target"] for prompt, entry in data.items()} == {"one two three": " and more", "a": " b", "x y z": " w"}
    assert "4 rows read, 4 kept; 1 review dropped: later ones begin with the same words" in capsys.readouterr().out
    with pytest.raises(UserError, match="imdb has no pairs: use it with loss=sft"):
        load_split({"imdb": options}, "train", None, 64, 32, silent=True)
