"""Loaders, chat templates, and invalid rows."""

import copy
import gzip
import io
import json
import signal

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers import CHAT_TEMPLATE, MINI, load, pair, tokenized, turn, write_lines

from preference_datasets import default_options, get_dataset, load_split, strip_html_tags
from tdpo.data import chat
from tdpo.data.rows import LONGEST_ROW, _bounded_lines, read_rows
from tdpo.models.build import embedded_tokenizer
from tdpo.utils import UserError

# --- loaders ---


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


def test_the_eval_split_of_chat_rows_does_not_depend_on_what_the_template_adds(tmp_path, chat_tokenizer):
    """Some templates write the date: SFT today and TDPO tomorrow must hold out the same prompts."""
    rows = [{"prompt": [{"role": "user", "content": f"p{i}"}], "chosen": "yes", "rejected": "no"} for i in range(60)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    tests = []
    for date in ("monday", "tuesday"):
        dated = copy.copy(chat_tokenizer)
        dated.chat_template = date + CHAT_TEMPLATE
        data = load("jsonl", "test", path=path, eval_fraction=0.2, tokenizer=dated)
        tests.append({prompt.removeprefix(date) for prompt in data})
    assert tests[0] == tests[1] and 3 < len(tests[0]) < 25


CHAT_FORMS = {
    "prompt and responses as messages": {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "prompt text, responses as messages": {
        "prompt": "hi",
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "prompt as messages, responses text": {"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes", "rejected": "no"},
    "whole conversations": {
        "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
    },
    "whole conversations with a prompt field": {
        "prompt": "hi",
        "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
    },
}


@pytest.mark.parametrize("form", CHAT_FORMS)
def test_chat_rows_are_rendered_by_the_template(form, tmp_path, chat_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [CHAT_FORMS[form]])
    data = load("jsonl", path=path, eval_path=path, tokenizer=chat_tokenizer)
    assert data == {
        "<|start|>user\nhi<|end|>\n<|start|>assistant\n": {
            "responses": ["yes<|end|>\n", "no<|end|>\n"],
            "pairs": [(0, 1)],
            "sft_target": "yes<|end|>\n",
        }
    }
    split = tokenized({"jsonl": (data, default_options("jsonl"))}, chat_tokenizer)
    element = split.element(next(split.epochs(0))[0])
    response = [i for i, label in zip(element["chosen_input_ids"], element["chosen_labels"]) if label != -100]
    # One end-of-sequence, the template's own, and nothing after it.
    assert chat_tokenizer.convert_ids_to_tokens(response) == ["y", "e", "s", "<|end|>"]
    assert element["prompt_input_ids"][0] == 128 and element["prompt_input_ids"].count(129) == 1


def test_a_template_that_refuses_a_row_is_a_defect_of_the_row(tmp_path, chat_tokenizer):
    strict = copy.copy(chat_tokenizer)
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    path = write_lines(tmp_path / "a.jsonl", [CHAT_FORMS["whole conversations"]])
    with pytest.raises(UserError, match=r"the chat template refuses it \(System role not supported\): .*a.jsonl row 1"):
        load("jsonl", path=path, eval_path=path, tokenizer=strict)


def test_multi_turn_conversations_share_their_beginning(tmp_path, chat_tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"chosen": [*turns, {"role": "assistant", "content": "d"}], "rejected": [*turns, {"role": "assistant", "content": "e"}]}
    path = write_lines(tmp_path / "a.jsonl", [row])
    (prompt,) = load("jsonl", path=path, eval_path=path, tokenizer=chat_tokenizer)
    assert prompt.endswith("c<|end|>\n<|start|>assistant\n") and "b<|end|>" in prompt


def test_invalid_chat_rows(tmp_path, chat_tokenizer):
    user, reply = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    rows = [
        {"chosen": [user, reply], "rejected": [{"role": "user", "content": "ho"}, reply]},
        {"chosen": [user, reply], "rejected": [user, {"role": "assistant", "content": " "}]},
        {"chosen": [user, reply], "rejected": [user, {"role": "assistant", "content": "a<|end|>b"}]},
        {"chosen": [reply], "rejected": [reply]},
        {"chosen": [user, {"content": "x"}], "rejected": [user, reply]},
        {"chosen": [user, reply], "rejected": [user, reply]},
        {"chosen": [user, {"role": "assistant", "content": None}], "rejected": [user, reply]},
        {"chosen": [user, reply], "rejected": []},
        {"chosen": [user, reply, user, reply], "rejected": [user, {"role": "assistant", "content": "no"}, user, reply]},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as error:
        load("jsonl", path=path, eval_path=path, tokenizer=chat_tokenizer)
    message = str(error.value)
    for defect, row in {
        "chosen and rejected have different prompts": 1,
        "empty rejected": 2,
        "special token '<|end|>' inside \"content of 'rejected'\"": 3,
        "no field 'prompt'": 4,
        "a message of 'chosen' has no role": 5,
        "chosen and rejected are equal": 6,
        "content of 'chosen'\" is null": 7,
        "'rejected' is not a list of messages": 8,
        "user turn within a response": 9,
    }.items():
        assert defect.replace('"', "") in message.replace('"', "") and f"row {row}" in message
    with pytest.raises(UserError, match="escape_special_tokens=true would escape the chat template's own"):
        load("jsonl", path=path, eval_path=path, tokenizer=chat_tokenizer, escape_special_tokens=True)
    with pytest.raises(UserError, match="no chat template"):
        load("jsonl", path=path, eval_path=path, tokenizer=embedded_tokenizer())


# --- invalid rows ---

BAD_ROWS = [
    (pair(prompt=" "), "empty prompt"),
    (pair(chosen=""), "empty chosen"),
    (pair(rejected=" \n"), "empty rejected"),
    (pair(chosen=" x", rejected=" x"), "chosen and rejected are equal"),
    ({"prompt": "p", "chosen": "c"}, "no field 'rejected'"),
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
        read_rows(str(tmp_path / path), "train", None, None)


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


TEMPLATES = {
    "type": "{{ 1 + 'a' }}",
    "division": "{{ 1 / 0 }}",
    "key": "{{ {}['a'] | length }}{{ [][3].b.c }}",
    "value": "{{ 'a' | int('x') }}{{ range(3, 1, 0) }}",
    "overflow": "{{ 'a' * (10 ** 30) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "memory": "{{ 'a' * (10 ** 16) }}",
    "attribute": "{{ messages.nothing() }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_whatever_a_template_raises_is_a_defect_of_the_row(kind, tmp_path, chat_tokenizer):
    broken = copy.deepcopy(chat_tokenizer)
    broken.chat_template = TEMPLATES[kind]
    path = write_lines(tmp_path / "a.jsonl", [CHAT_FORMS["whole conversations"]])
    with pytest.raises(UserError, match=r"the chat template refuses it \(.+\): .*a.jsonl row 1"):
        load("jsonl", path=path, eval_path=path, tokenizer=broken)


def test_a_template_that_never_ends_is_stopped(tmp_path, chat_tokenizer, monkeypatch):
    """It loops for one row, which is dropped; or for all, which ends the run after three."""
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
    looping = copy.deepcopy(chat_tokenizer)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    looping.chat_template = "{% if messages[0]['content'] == 'loop' %}" + loop + "{% endif %}" + CHAT_TEMPLATE
    good, bad = ({"prompt": [turn("user", text)], "chosen": "a", "rejected": "b"} for text in ("hi", "loop"))
    path = write_lines(tmp_path / "a.jsonl", [good, bad])
    assert len(load("jsonl", path=path, eval_path=path, tokenizer=looping, invalid_rows="skip")) == 1
    with pytest.raises(UserError, match="has not ended after 0 seconds: .*row 2"):
        load("jsonl", path=path, eval_path=path, tokenizer=looping)
    path = write_lines(tmp_path / "b.jsonl", [bad] * 5)
    with pytest.raises(UserError, match="for 3 rows, the last of them row 3: set model.tokenizer_name_or_path"):
        load("jsonl", path=path, eval_path=path, tokenizer=looping, invalid_rows="skip")
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
