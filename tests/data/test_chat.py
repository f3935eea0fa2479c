"""Chat rows: rendered by the tokenizer's template, or a defect of their row."""

import copy
import signal

import pytest
from helpers import CHAT_TEMPLATE, load, tokenized, turn, write_lines

from preference_datasets import default_options
from tdpo.data import chat
from tdpo.models.tokenizer import embedded_tokenizer
from tdpo.utils import UserError


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
            "responses": ["yes<|end|>", "no<|end|>"],
            "pairs": [(0, 1)],
            "sft_target": "yes<|end|>",
            "rendered": True,
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
        "content of 'chosen' is null": 7,
        "'rejected' is not a list of messages": 8,
        "user turn within a response": 9,
    }.items():
        assert defect.replace('"', "") in message.replace('"', "") and f"row {row}" in message
    with pytest.raises(UserError, match="no chat template"):
        load("jsonl", path=path, eval_path=path, tokenizer=embedded_tokenizer())


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
    with pytest.raises(UserError, match="for 3 rows, the last of them row 3: set model.chat_template"):
        load("jsonl", path=path, eval_path=path, tokenizer=looping, invalid_rows="skip")
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
