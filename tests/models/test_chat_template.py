"""The tokenizer's chat template: a file, one of several by name, and values for its variables."""

import pytest
from helpers import CHATML, MINI, bpe_tokenizer, elements_of, turn
from omegaconf import OmegaConf

from tdpo.data.chat_template import end_tokens
from tdpo.models.chat_template import set_chat_template
from tdpo.models.tokenizer import load_tokenizer
from tdpo.utils import UserError

TURN = [turn("user", "q")]
THINKING = "{% if enable_thinking is defined and enable_thinking is false %}no thoughts{% endif %}" + CHATML


def rendered(tokenizer, **values) -> str:
    return tokenizer.apply_chat_template(TURN, tokenize=False, add_generation_prompt=True, **values)


def test_a_file(tmp_path):
    (tmp_path / "t.jinja").write_text("x{{ messages[0]['content'] }}")
    tokenizer = bpe_tokenizer(template=None)
    set_chat_template(tokenizer, str(tmp_path / "t.jinja"), {})
    assert rendered(tokenizer) == "xq"
    for text, message in (("{% if %}", "t.jinja, line 1: "), ("{{ a }", "t.jinja, line 1: ")):
        (tmp_path / "t.jinja").write_text(text)
        with pytest.raises(UserError, match=message):
            set_chat_template(tokenizer, str(tmp_path / "t.jinja"), {})
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}")
    set_chat_template(tokenizer, str(tmp_path / "t.jinja"), {})
    assert rendered(tokenizer) == "q"


def test_one_of_several_templates():
    tokenizer = bpe_tokenizer(template={"default": CHATML, "rag": "rag " + CHATML})
    set_chat_template(tokenizer, None, {})
    assert rendered(tokenizer).startswith("<|im_start|>")
    set_chat_template(tokenizer, "rag", {})
    assert rendered(tokenizer).startswith("rag <|im_start|>")
    with pytest.raises(UserError, match="model.chat_template=tool: neither a file nor .* .default, rag."):
        set_chat_template(bpe_tokenizer(template={"default": CHATML, "rag": CHATML}), "tool", {})
    with pytest.raises(UserError, match="several chat templates: choose one by model.chat_template=... .a, b."):
        set_chat_template(bpe_tokenizer(template={"a": CHATML, "b": CHATML}), None, {})


@pytest.mark.parametrize("value", [False, True, None, 3, 2.5, 'it\'s "x"\n', ["a", None], {"k": [True]}])
def test_values_become_part_of_the_template(value, capsys):
    """Who renders with the template later, such as with an exported model, gets them too, and may still give others."""
    tokenizer = bpe_tokenizer(template="{{ [x] }}")
    expected = rendered(tokenizer, x=value)
    set_chat_template(tokenizer, None, {"x": value})
    assert rendered(tokenizer) == expected and rendered(tokenizer, x="other") == "['other']"
    assert "does not read" not in capsys.readouterr().err
    set_chat_template(tokenizer, None, {"y": value})


@pytest.mark.parametrize("name", ["tools", "documents", "messages", "add_generation_prompt"])
def test_values_that_come_with_each_conversation_are_refused(name):
    with pytest.raises(UserError, match=f"chat_template_kwargs: {name} come with each conversation"):
        set_chat_template(bpe_tokenizer(), None, {name: []})


def test_values_do_not_add_the_white_space_before_a_first_block():
    tokenizer = bpe_tokenizer(template="   {% if true %}\n{{ x }}{% endif %}")
    expected = rendered(tokenizer, x=1)
    set_chat_template(tokenizer, None, {"x": 1})
    assert rendered(tokenizer) == expected


def test_values_that_are_not_read_are_said(capsys):
    set_chat_template(bpe_tokenizer(), None, {"enable_thinking": False})
    printed = capsys.readouterr()
    assert "the chat template does not read enable_thinking" in printed.out + printed.err
    with pytest.raises(UserError, match="model.chat_template_kwargs is given, but the tokenizer has no chat template"):
        set_chat_template(bpe_tokenizer(template=None), None, {"x": 1})


def test_the_config_reaches_data_and_export(tmp_path):
    tokenizer = bpe_tokenizer(template=THINKING)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = {"tokenizer_name_or_path": str(tmp_path / "tokenizer"), "name_or_path": None, "add_bos": False}
    loaded = load_tokenizer(OmegaConf.create({**model, "chat_template": None, "chat_template_kwargs": {"enable_thinking": False}}), None)
    assert rendered(loaded) == rendered(tokenizer, enable_thinking=False) != rendered(tokenizer)
    row = {"prompt": TURN, "chosen": "a", "rejected": "b"}
    (element,) = elements_of([row], tmp_path, loaded)
    assert (
        element["chosen"] == tokenizer.apply_chat_template([*TURN, turn("assistant", "a")], tokenize=False, enable_thinking=False).rstrip()
    )
    assert load_tokenizer(OmegaConf.create(model), None).chat_template == THINKING  # of a run before these keys


def test_a_loaded_tokenizer_of_the_recorded_runs_is_unchanged():
    model = OmegaConf.create({"tokenizer_name_or_path": None, "name_or_path": str(MINI / "model"), "add_bos": False})
    assert load_tokenizer(model, None).chat_template is None


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML,
        CHATML.replace("{{ m['content'] }}", "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"),
    ],
    ids=["needs a system message", "writes parts of contents"],
)
def test_the_end_of_a_reply_is_found_in_templates_that_refuse_plain_conversations(template):
    tokenizer = bpe_tokenizer(template=template, eos="</s>")
    assert end_tokens(tokenizer) == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
