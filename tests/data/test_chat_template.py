"""What is trained on is what the chat template renders: the oracle is the tokenizer's own rendering of the whole conversation."""

import json

import datasets
import pytest
from chat_templates import (
    ARGUMENTS,
    AWARE,
    CLOSES,
    CONVERSATIONS,
    DROPS,
    HISTORY,
    OPENS,
    TEMPLATES,
    TOOLS,
    WRITTEN,
    assert_as_rendered,
    call,
    reply,
)
from helpers import CHATML, bpe_tokenizer, elements_of, turn

from tdpo.data.chat_template import end_tokens
from tdpo.data.contract import SFT
from tdpo.utils import UserError


@pytest.mark.parametrize("kind", ["bytes", "first"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_both_conversations_are_trained_as_rendered(template, conversation, kind, tmp_path):
    """With tokenizers that put a space before every text too: no space or token that the text has not."""
    tokenizer = bpe_tokenizer(kind, TEMPLATES[template], eos="</s>" if template == "inst" else "<|im_end|>")
    prompt, *replies = CONVERSATIONS[conversation]
    row = {"prompt": prompt, "chosen": [reply(replies[0])], "rejected": [reply(replies[1])]}
    (element,) = elements_of([row], tmp_path, tokenizer)
    whole = {role: prompt + row[role] for role in ("chosen", "rejected")}
    if template == "closes":  # what follows the end of the reply is not trained
        for role, messages in whole.items():
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
            assert tokenizer.decode(element[f"{role}_input_ids"]) == rendered.removesuffix("\n<|endoftext|>")
    else:
        assert_as_rendered(element, tokenizer, whole)
    assert element["prompt"].endswith(("assistant\n", "assistant\n<think>\n", "[/INST]", "<|im_start|>assistant"))
    assert "2+2?" in element["prompt"] and "2+2?" not in element["chosen_response_only"]
    assert replies[0].split("</think>")[-1].strip() in element["chosen_response_only"]


@pytest.mark.parametrize("template", ["ChatML", "drops", "strips", "closes", "channels", "inst"])
def test_the_prompt_is_what_the_model_is_given_when_it_answers(template, tmp_path):
    """The text before the reply is that which the template renders for generation."""
    tokenizer = bpe_tokenizer(template=TEMPLATES[template], eos="</s>" if template == "inst" else "<|im_end|>")
    row = {"prompt": HISTORY, "chosen": [reply("<think>\nadd\n</think>\n\n4")], "rejected": [reply("5")]}
    (element,) = elements_of([row], tmp_path, tokenizer)
    assert element["prompt"] == tokenizer.apply_chat_template(HISTORY, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "thoughts,header", [(("<think>\na\n</think>4", "<think>\nb\n</think>5"), "<think>\n"), (("<think>\na\n</think>4", "5"), "")]
)
def test_an_opened_thought_is_in_the_prompt_only_if_both_replies_have_it(thoughts, header, tmp_path):
    row = {"prompt": [turn("user", "q")], "chosen": [reply(thoughts[0])], "rejected": [reply(thoughts[1])]}
    (element,) = elements_of([row], tmp_path, bpe_tokenizer(template=OPENS))
    assert element["prompt"] == f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{header}"


@pytest.mark.parametrize("key", ["reasoning", "tool_calls", "name", "weight"])
def test_whatever_the_template_sees_is_a_difference_and_nothing_else(key, tmp_path, capsys):
    """Replies that differ in a key alone make a pair if the template writes it, and are equal if it does not."""
    values = {"tool_calls": [[{"function": {"name": name, "arguments": {}}}] for name in ("f", "g")], "weight": [1, 2]}.get(
        key, ["add", "guess"]
    )
    row = {"prompt": [turn("user", "q")], "chosen": [reply("4", **{key: values[0]})], "rejected": [reply("4", **{key: values[1]})]}
    sees = CHATML.replace("{{ m['content'] }}", f"{{{{ m['{key}'] }}}}{{{{ m['content'] }}}}")
    (element,) = elements_of([row], tmp_path, bpe_tokenizer(template=sees))
    assert element["chosen"] != element["rejected"]
    with pytest.raises(UserError, match="chosen and rejected are equal as the chat template renders them: .*row 1"):
        elements_of([row], tmp_path, bpe_tokenizer())


def test_messages_that_are_rendered_alike_are_shared(tmp_path):
    """Keys that the template does not see, and thoughts that it drops from earlier turns, do not part the conversations."""
    tokenizer = bpe_tokenizer(template=DROPS)
    chosen = [turn("user", "hi") | {"id": 1}, reply("<think>\nx\n</think>\n\nyo"), turn("user", "q"), reply("4")]
    rejected = [turn("user", "hi") | {"id": 2}, reply("<think>\ny\n</think>\n\nyo"), turn("user", "q"), reply("5")]
    (element,) = elements_of([{"chosen": chosen, "rejected": rejected}], tmp_path, tokenizer)
    assert element["prompt"].endswith("q<|im_end|>\n<|im_start|>assistant\n")
    assert_as_rendered(element, tokenizer, {"chosen": chosen, "rejected": rejected})
    with pytest.raises(UserError, match="chosen and rejected have different prompts"):
        elements_of([{"chosen": chosen, "rejected": [turn("user", "ho"), *rejected[1:]]}], tmp_path, tokenizer)


def test_what_the_template_leaves_out_is_said(tmp_path, capsys):
    tokenizer = bpe_tokenizer(template=CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"))
    rows = [
        {"prompt": [turn("user", "q")], "chosen": [reply(f"<think>x</think>{i}", reasoning="why")], "rejected": [reply("n")]}
        for i in range(3)
    ]
    elements_of([*rows, {**rows[0], "chosen": [reply("y")]}], tmp_path, tokenizer)
    assert "the chat template leaves out or changes: content of 3 rows, reasoning of 3 rows" in capsys.readouterr().out


def test_a_prompt_beside_whole_conversations_is_compared_with_them(tmp_path, capsys):
    whole = {"chosen": [turn("user", "q"), reply("a")], "rejected": [turn("user", "q"), reply("b")]}
    elements_of([{**whole, "prompt": "q"}, {**whole, "prompt": [turn("user", "q")]}], tmp_path, bpe_tokenizer())
    assert "not read" not in capsys.readouterr().out
    elements_of([{**whole, "prompt": "Be terse. q"}], tmp_path, bpe_tokenizer())
    assert "conversations without the text in the row's prompt, which is not read" in capsys.readouterr().out


# --- tools and ways of writing the same ---


@pytest.mark.parametrize("given", [{"city": "Rome"}, '{"city": "Rome"}'], ids=["object", "string"])
@pytest.mark.parametrize("template", ARGUMENTS)
def test_arguments_are_written_as_the_template_takes_them(template, given, tmp_path):
    tokenizer = bpe_tokenizer(template=AWARE.replace("ARGUMENTS", ARGUMENTS[template]))
    row = {"prompt": [turn("user", "q")], "chosen": [reply(None, tool_calls=[call(given)])], "rejected": [reply("no")], "tools": TOOLS}
    (element,) = elements_of([row], tmp_path, tokenizer)
    assert element["chosen_response_only"] == f"<call>weather {WRITTEN[template]}</call><|im_end|>"


def test_arguments_that_are_no_json_stay_as_they_are(tmp_path):
    tokenizer = bpe_tokenizer(template=AWARE.replace("ARGUMENTS", ARGUMENTS["plain"]))
    row = {"prompt": [turn("user", "q")], "chosen": [reply(None, tool_calls=[call('{"city": ')])], "rejected": [reply("no")]}
    assert elements_of([row], tmp_path, tokenizer)[0]["chosen_response_only"] == '<call>weather {"city": </call><|im_end|>'


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])], TOOLS[0]], ids=["list", "json", "list of json", "one"])
def test_the_tools_reach_the_template(tools, tmp_path, capsys):
    tokenizer = bpe_tokenizer(template=AWARE)
    row = {"prompt": [turn("user", "q")], "chosen": [reply("yes")], "rejected": [reply("no")], "tools": tools}
    (element,) = elements_of([row], tmp_path, tokenizer)
    assert_as_rendered(element, tokenizer, {"chosen": row["prompt"] + row["chosen"]}, tools=TOOLS)
    assert json.dumps(TOOLS) in element["prompt"] and "leaves out" not in capsys.readouterr().out
    (element,) = elements_of([{**row, "schemas": tools, "tools": None}], tmp_path, tokenizer, columns={"tools": "schemas"})
    assert json.dumps(TOOLS) in element["prompt"]
    elements_of([row], tmp_path, bpe_tokenizer())
    assert "leaves out or changes: tools of 1 row" in capsys.readouterr().out


@pytest.mark.parametrize("missing", [{"content": None}, {}, {"content": ""}], ids=["null", "absent", "empty"])
@pytest.mark.parametrize("template", ["aware", "is none", "plain", "fails"])
def test_content_that_is_missing_beside_tool_calls(template, missing, tmp_path):
    """It is null or an empty text, whichever the template understands; never the word None."""
    text = {
        "aware": AWARE.replace("ARGUMENTS", ""),
        "is none": CHATML.replace(
            "{{ m['content'] }}", "{{ '<call>weather </call>' if m['content'] is none or m['content'] == '' else m['content'] }}"
        ),
        "plain": CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{% if m['tool_calls'] %}<call>weather </call>{% endif %}"),
        "fails": CHATML.replace("{{ m['content'] }}", "{{ m['content'].strip() }}{% if m['tool_calls'] %}<call>weather </call>{% endif %}"),
    }[template]
    agent = [turn("user", "q"), {"role": "assistant", **missing, "tool_calls": [call({})]}, turn("tool", "sun")]
    (element,) = elements_of(
        [{"prompt": agent, "chosen": [reply("Sunny.")], "rejected": [reply("Rain.")]}], tmp_path, bpe_tokenizer(template=text)
    )
    assert (
        "<|im_start|>assistant\n<call>weather </call><|im_end|>\n<|im_start|>tool\nsun" in element["prompt"]
        and "None" not in element["prompt"]
    )


@pytest.mark.parametrize("template", [AWARE, CHATML], ids=["reads lists", "reads text"])
def test_text_parts_are_a_text(template, tmp_path):
    parts = [{"type": "text", "text": "2+2"}, {"type": "text", "text": "?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": [reply([{"type": "text", "text": "4"}])], "rejected": [reply("5")]}
    (element,) = elements_of([row], tmp_path, bpe_tokenizer(template=template))
    assert element["chosen"] == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    row["prompt"][0]["content"] = [{"type": "image_url", "image_url": "x"}]
    with pytest.raises(UserError, match="content of 'prompt' has a part of type 'image_url', not text: .*row 1"):
        elements_of([row], tmp_path, bpe_tokenizer(template=template))


@pytest.mark.parametrize("content", [3, True, 2.5, {"a": 1}])
def test_content_that_is_no_text_is_named(content, tmp_path):
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [reply(content)], "rejected": [reply("5")]}
    with pytest.raises(UserError, match=f"content of 'chosen' is {type(content).__name__}, not text: .*row 1"):
        elements_of([row], tmp_path, bpe_tokenizer())


def test_rows_mean_the_same_from_json_and_from_parquet(tmp_path):
    """Arrow gives every message, call and schema the keys of all others, with null."""
    tokenizer = bpe_tokenizer(template=AWARE.replace("ARGUMENTS", "{{ call | tojson }}{{ 'tool_calls' in m }}{{ m.keys() | list }}"))
    tools = [*TOOLS, {"type": "function", "function": {"name": "time", "strict": True}}]
    agent = [
        turn("user", "q"),
        {"role": "assistant", "tool_calls": [call({"city": "Rome"})]},
        {"role": "tool", "name": "weather", "content": "sun"},
    ]
    rows = [
        {"prompt": agent, "chosen": [reply("Sunny.", reasoning="it said so")], "rejected": [reply("Rain.")], "tools": tools},
        {
            "prompt": [turn("user", "r")],
            "chosen": [reply("", tool_calls=[call({"day": 1})])],
            "rejected": [reply("no")],
            "tools": tools[:1],
        },
        {"prompt": [turn("user", "s")], "chosen": [reply("a")], "rejected": [reply("b")], "tools": []},
    ]
    expected = elements_of(rows, tmp_path, tokenizer)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for path in ("rows.parquet", "saved"):
        assert elements_of(str(tmp_path / path), tmp_path, tokenizer) == expected
    assert "null" not in expected[0]["chosen"] and '"city": "Rome"' in expected[0]["prompt"]


# --- ends ---


@pytest.mark.parametrize("kind", ["bytes", "first", "always"])
@pytest.mark.parametrize(
    "template,eos,end",
    [
        (CHATML, "<|im_end|>", "<|im_end|>"),
        (CHATML, "<|endoftext|>", "<|im_end|>"),  # the template ends a reply with another token, after which nothing is trained
        (CLOSES.replace("<|im_end|>\n", "<|im_end|>"), "<|endoftext|>", "<|im_end|><|endoftext|>"),
        (CHATML.replace("<|im_end|>\n", "\n"), "</s>", "</s>"),  # it writes no end
        (CHATML.replace("<|im_end|>\n", "###\n"), "</s>", "###</s>"),
    ],
)
def test_a_reply_ends_as_the_template_ends_it(template, eos, end, kind, tmp_path):
    tokenizer = bpe_tokenizer(kind, template, eos)
    row = {"prompt": [turn("user", "q")], "chosen": [reply("yes ")], "rejected": [reply("no")]}
    (element,) = elements_of([row], tmp_path, tokenizer)
    assert element["chosen_response_only"] == "yes " + end
    response = element["chosen_input_ids"][len(element["prompt_input_ids"]) :]
    assert "".join(tokenizer.convert_ids_to_tokens(response)).replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n") == "yes " + end
    assert set(tokenizer(end, add_special_tokens=False)["input_ids"]) & set(end_tokens(tokenizer))


@pytest.mark.parametrize("kind", ["bytes", "first", "always"])
def test_no_space_is_added_at_cuts_between_turns(kind, tmp_path):
    """Nor where the tokens of a reply's first characters would be merged with those before it."""
    tokenizer = bpe_tokenizer(kind, CHATML.replace("\n", ""))
    messages = [turn("user", "q"), reply("{a"), turn("user", "yes"), reply(" no"), turn("user", "q"), reply('{"name": 1}')]
    (element,) = elements_of([{"messages": messages}], tmp_path, tokenizer, SFT, assistant_turns="all")
    scored = [i for i, label in zip(element["chosen_input_ids"], element["chosen_labels"]) if label != -100]
    tokens = "".join(tokenizer.convert_ids_to_tokens(scored)).replace("▁", " ").replace("Ġ", " ")
    assert tokens == '{a<|im_end|> no<|im_end|>{"name": 1}<|im_end|>'


@pytest.mark.parametrize("kind", ["first", "always"])
def test_text_rows_are_tokenized_as_published(kind, tmp_path):
    tokenizer = bpe_tokenizer(kind)
    (element,) = elements_of([{"prompt": "a question?", "chosen": " yes", "rejected": "no"}], tmp_path, tokenizer)
    for role, text in (("chosen", " yes"), ("rejected", "no")):
        ids = [tokenizer(some, add_special_tokens=False)["input_ids"] for some in ("a question?", text)]
        assert element[f"{role}_input_ids"] == [*ids[0], *ids[1], tokenizer.eos_token_id]
