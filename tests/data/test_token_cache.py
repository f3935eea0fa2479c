"""Texts are tokenized once, by several processes, and the next run finds the tokens."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from helpers import MINI, compose, tokenized
from transformers import AutoTokenizer

import preference_datasets
import train
from preference_datasets import default_options, get_dataset, load_split
from tdpo.data import token_cache
from tdpo.data.contract import PAIRS, PAIRS_AND_TARGET, SFT
from tdpo.data.split import Example
from tdpo.data.tokenization import truncate
from tdpo.distributed.world import World
from tdpo.losses import get_objective
from tdpo.utils import UserError


@pytest.fixture
def data(tmp_path):
    """A folder of HH-like rows that the test may change."""
    return shutil.copytree(MINI / "data", tmp_path / "data")


@pytest.fixture
def load(data, tmp_path, mini_tokenizer, monkeypatch):
    """load_split of that folder; its few rows are cached too."""
    monkeypatch.setattr(preference_datasets, "TEXTS_A_CORE", 1)

    def call(tokenizer=mini_tokenizer, form=PAIRS, split="train", name="hh", add_bos=False, cache_dir=str(tmp_path / "cache"), **options):
        options = {name: {**default_options("hh"), "path": str(data), **options}}
        return load_split(options, split, tokenizer, 64, 32, form, add_bos, cache_dir=cache_dir)

    return call


def all_tokens(split) -> list:
    return [split.example(example)[:2] for example in next(split.epochs(0, shuffle=False))]


@pytest.fixture
def no_reading(monkeypatch):
    def refuse(_):
        raise AssertionError("rows are read again")

    return lambda: monkeypatch.setattr(preference_datasets.Source, "rows", refuse)


def test_the_second_run_neither_reads_nor_tokenizes(load, no_reading, capsys):
    first = load()
    said = capsys.readouterr().out
    no_reading()
    second = load()
    assert second.files and all_tokens(second) == all_tokens(first) and second.fingerprint == first.fingerprint
    assert capsys.readouterr().out == said and "96 rows read" in said
    assert second.describe() == first.describe() and second.element(Example(3, 0)) == first.element(Example(3, 0))


def test_cached_tokens_equal_those_made_in_memory(load):
    kept, fresh = load(), load(cache_dir=None)
    assert not fresh.files and all_tokens(kept) == all_tokens(fresh) and kept.fingerprint == fresh.fingerprint
    moved = kept.in_memory()
    assert not moved.files and all_tokens(moved) == all_tokens(fresh) and moved.fingerprint == fresh.fingerprint


@pytest.mark.parametrize("change", ["rows", "split", "options", "name", "tokenizer", "template", "sft", "bos", "code"])
def test_the_key_has_all_that_tokens_depend_on(change, load, no_reading, data, tmp_path, mini_tokenizer, monkeypatch):
    load()
    no_reading()
    arguments = {}
    if change == "rows":
        (data / "train.jsonl.gz").unlink()
        (data / "train.jsonl").write_text(
            json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"})
        )
    elif change == "options":
        arguments["truncation_mode"] = "keep_start"
    elif change == "tokenizer":
        arguments["tokenizer"] = AutoTokenizer.from_pretrained(MINI / "model")
        arguments["tokenizer"].add_tokens(["wind"])
    elif change == "template":
        arguments["tokenizer"] = AutoTokenizer.from_pretrained(MINI / "model")
        arguments["tokenizer"].chat_template = "{{ messages }}"
    elif change in ("sft", "split", "name", "bos"):
        arguments |= {"sft": {"form": SFT}, "split": {"split": "test"}, "name": {"name": "helpful"}, "bos": {"add_bos": True}}[change]
    else:
        source = tmp_path / "loader.py"
        source.write_text("# another version of the loader")
        monkeypatch.setattr(token_cache.inspect, "getsourcefile", lambda _: str(source))
    with pytest.raises(AssertionError, match="read again"):
        load(**arguments)


def test_rows_in_another_folder_are_found(load, no_reading, data, tmp_path):
    load()
    no_reading()
    assert load(path=str(shutil.copytree(data, tmp_path / "elsewhere"))).files


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = {
    "no table": lambda folder: shutil.rmtree(folder / "table"),
    "no contents": lambda folder: (folder / "contents.json").unlink(),
    "contents of another kind": lambda folder: (folder / "contents.json").write_text('{"files": [], "lines": 3}'),
    "contents without files": lambda folder: (folder / "contents.json").write_text('{"files": {}, "lines": []}'),
    "a word of the lines": lambda folder: (folder / "contents.json").write_text(
        (folder / "contents.json").read_text().replace("96 rows", "95 rows")
    ),
    "contents nested deeply": lambda folder: (folder / "contents.json").write_text("[" * 99_999),
    "contents not UTF-8": lambda folder: (folder / "contents.json").write_bytes(b"\xff\xfe"),
    "state of another kind": lambda folder: (folder / "table" / "state.json").write_text("[]"),
    "folder for a file": lambda folder: replaced_by_a_folder(folder / "table" / "dataset_info.json"),
    "a bit of the table": lambda folder: flip_a_bit(next((folder / "table").glob("*.arrow"))),
    "cut table": lambda folder: os.truncate(next((folder / "table").glob("*.arrow")), 40),
    "zeros at the end": lambda folder: os.truncate(next((folder / "table").glob("*.arrow")), 10**6),
    "a file for the folder": lambda folder: (shutil.rmtree(folder), folder.touch()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(damage, load, tmp_path, capsys):
    expected = all_tokens(load())
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    DAMAGES[damage](folder)
    capsys.readouterr()
    again = load()
    assert again.files and all_tokens(again) == expected
    assert f"warning: the cached tokens in {folder} are damaged" in capsys.readouterr().out
    load()
    assert "damaged" not in capsys.readouterr().out and [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_a_killed_run_left_is_removed(load, tmp_path):
    left = tmp_path / "cache" / "tokens" / f"new-{socket.gethostname()}-{2**22 + 1}"
    (left / "whole" / "table").mkdir(parents=True)
    load()
    assert not left.exists()


def test_a_cache_that_cannot_be_written(load, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    split = load(cache_dir=str(tmp_path / "file"))
    assert "tokens are not cached for the next run" in capsys.readouterr().out and not split.files and len(split) == 96


def test_few_rows_are_not_cached(tmp_path, mini_tokenizer):
    load_split(
        {"hh": {**default_options("hh"), "path": str(MINI / "data")}}, "train", mini_tokenizer, 64, 32, PAIRS, cache_dir=str(tmp_path)
    )
    assert not list(tmp_path.iterdir())


def test_several_processes_make_the_same_tokens(mini_tokenizer, monkeypatch):
    contract = get_dataset("hh", "train", silent=True, options={**default_options("hh"), "path": str(MINI / "data")})
    alone = tokenized({"hh": (contract, default_options("hh"))}, mini_tokenizer)
    monkeypatch.setattr(token_cache, "TEXTS_A_CORE", 40)
    monkeypatch.setattr(token_cache, "cores", lambda: 3)
    monkeypatch.setattr(token_cache, "SLICE", 50)
    together = tokenized({"hh": (contract, default_options("hh"))}, mini_tokenizer)
    assert len(together.prompts.data.column("prompt_ids").chunks) >= 3
    assert all_tokens(together) == all_tokens(alone) and together.fingerprint == alone.fingerprint


def test_an_error_in_a_worker_process_is_raised(chat_tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "TEXTS_A_CORE", 2)
    monkeypatch.setattr(token_cache, "cores", lambda: 2)
    entry = {"responses": [" a", " b"], "pairs": [(0, 1)], "sft_target": " a"}
    with pytest.raises(UserError, match="has no tokens"):
        tokenized({"hh": ({"p": entry, "": entry}, default_options("hh"))}, chat_tokenizer)


def test_ranks_that_cannot_read_the_files_are_sent_the_tokens(data, tmp_path, monkeypatch):
    monkeypatch.setattr(preference_datasets, "TEXTS_A_CORE", 1)
    options = [
        "model=blank_model",
        f"model.name_or_path={MINI}/model",
        "datasets=[hh]",
        f"datasets.hh.path={data}",
        "max_length=64",
        "max_prompt_length=32",
    ]
    config = compose("exp_name=x", *options, f"local_dirs=[{tmp_path}]")

    def read():
        plan = train.prepare(config, get_objective("dpo", beta=0.1), World(), str(tmp_path), None)
        return train.shared_data(World(), plan)["train"]

    mapped = read()
    monkeypatch.setattr(World, "gather", lambda self, value: [value, False])
    sent = read()
    assert mapped.files and not sent.files and all_tokens(sent) == all_tokens(mapped)


def test_lengths_are_those_of_the_tokens(load):
    for form in (PAIRS, SFT, PAIRS_AND_TARGET):
        split = load(form=form)
        examples = next(split.epochs(0))
        tokens = [split.example(example)[:2] for example in examples]
        assert split.lengths(examples) == [len(prompt) + sum(map(len, responses)) for prompt, responses in tokens]
        assert sorted(map(split.index, examples)) == list(range(len(split)))
        row = split.prompts[examples[0].prompt]
        whole = [row["response_ids"][i] for i in row["examples"][examples[0].pair]]
        assert tokens[0] == truncate(row["prompt_ids"], whole, "keep_end", 64, 32)
