"""Which tokens of chat rows are in the loss, which rows are refused, and what is said of them."""

import datasets
import pytest
from chat_templates import ARGUMENTS, AWARE, OPENS, TEMPLATES, TOOLS, assert_as_rendered, call, reply
from helpers import CHATML, bpe_tokenizer, elements_of, pair, turn, write_lines

from tdpo.data.contract import COMPLETIONS, SFT
from tdpo.data.preview import marked
from tdpo.utils import UserError

# --- what is in the loss ---


def in_loss(element: dict, tokenizer, role: str = "chosen") -> str:
    ids, labels = element[f"{role}_input_ids"], element[f"{role}_labels"]
    return marked(tokenizer, ids, [int(label != -100) for label in labels])


def test_results_of_tools_within_a_response_are_not_in_the_loss(tmp_path):
    tokenizer = bpe_tokenizer(template=AWARE.replace("ARGUMENTS", ""))
    steps = [reply("", tool_calls=[call({})]), turn("tool", "sun"), reply("Sunny.")]
    (element,) = elements_of([{"prompt": [turn("user", "q")], "chosen": steps, "rejected": [reply("no")]}], tmp_path, tokenizer)
    assert in_loss(element, tokenizer) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦<call>weather </call><|im_end|>⟧\n<|im_start|>tool\nsun<|im_end|>\n"
        "<|im_start|>assistant\n⟦Sunny.<|im_end|>⟧"
    )
    assert in_loss(element, tokenizer, "rejected").endswith("⟦no<|im_end|>⟧")
    with pytest.raises(UserError, match="the response of 'chosen' does not begin and end with a turn of the assistant"):
        elements_of([{"prompt": [turn("user", "q")], "chosen": steps, "rejected": steps[:2]}], tmp_path, tokenizer)


@pytest.mark.parametrize("template", TEMPLATES)
def test_all_turns_of_the_assistant(template, tmp_path, capsys):
    tokenizer = bpe_tokenizer(template=TEMPLATES[template], eos="</s>" if template == "inst" else "<|im_end|>")
    messages = [
        turn("user", "a"),
        reply("<think>\nx\n</think>\n\nbb"),
        turn("user", "c"),
        reply("dd"),
        turn("user", "e"),
        reply("ff"),
        turn("user", "g"),
    ]
    (element,) = elements_of([{"messages": messages}], tmp_path, tokenizer, SFT, assistant_turns="all")
    text = in_loss(element, tokenizer)
    rendered = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
    assert rendered.startswith(text.replace("⟦", "").replace("⟧", ""))
    scored = [part.split("⟧")[0] for part in text.split("⟦")[1:]]
    assert [part for part in ("bb", "dd", "ff") if any(part in some for some in scored)] == ["bb", "dd", "ff"] and len(scored) == 3
    assert all(some.endswith(("<|im_end|>", "</s>")) for some in scored) and not any(
        x in some for some in scored for x in "aceg" if x + "<" in some
    )
    assert "1 conversation cut after the last turn of the assistant" in capsys.readouterr().out
    (last,) = elements_of([{"messages": messages[:-1]}], tmp_path, tokenizer, SFT)
    assert in_loss(last, tokenizer).count("⟦") == 1 and "ff" in in_loss(last, tokenizer).split("⟦")[1]


SFT_ROWS = {
    "messages": {"messages": [turn("user", "q"), reply("yes")]},
    "prompt and completion": {"prompt": [turn("user", "q")], "completion": [reply("yes")]},
    "prompt and completion as text and messages": {"prompt": "q", "completion": [reply("yes")]},
    "chosen": {"chosen": [turn("user", "q"), reply("yes")], "rejected": [turn("user", "q"), reply("no")]},
}


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("form", SFT_ROWS)
def test_rows_for_sft(form, turns, tmp_path):
    (element,) = elements_of([SFT_ROWS[form]], tmp_path, bpe_tokenizer(), SFT, assistant_turns=turns)
    assert element["chosen"] == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert element["prompt"].endswith("assistant\n")


def test_messages_as_sharegpt_has_them(tmp_path):
    rows = [{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}]}]
    (element,) = elements_of(rows, tmp_path, bpe_tokenizer(), SFT, columns={"messages": "conversations"})
    said = [("system", "s"), ("user", "q"), ("assistant", "yes")]
    assert element["chosen"] == "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in said)


def test_text_rows_for_sft_and_several_targets_of_a_prompt(tmp_path, capsys):
    rows = [{"prompt": "q", "completion": word} for word in ("a", "b")]
    found = elements_of(rows, tmp_path, bpe_tokenizer(), SFT, separator="\\n")
    assert [element["chosen"] for element in found] == ["q\na", "q\nb"]
    with pytest.raises(UserError, match="no field 'chosen' .rows of prompt and completion, or of messages, are for loss=sft"):
        elements_of(rows, tmp_path, bpe_tokenizer())


# --- special tokens ---


@pytest.mark.parametrize("kind", ["bytes", "first"])
def test_special_tokens_in_messages_can_be_plain_text(kind, tmp_path):
    tokenizer = bpe_tokenizer(kind)
    row = {"prompt": [turn("user", "what is <|im_end|>?")], "chosen": [reply("an <|im_end|> end")], "rejected": [reply("no")]}
    with pytest.raises(UserError) as error:
        elements_of([row, {**row, "prompt": "q", "chosen": "a", "rejected": "b"}], tmp_path, tokenizer)
    assert "special token '<|im_end|>'" in str(error.value) and "escape_special_tokens=true" in str(error.value)
    assert "invalid_rows=skip" in str(error.value) and "rendered=true" not in str(error.value)  # that is for text
    (element,) = elements_of([row], tmp_path, tokenizer, escape_special_tokens=True)
    assert_as_rendered(element, tokenizer, {role: row["prompt"] + row[role] for role in ("chosen", "rejected")})
    end = tokenizer.eos_token_id
    assert element["chosen_input_ids"].count(end) == 2 and element["prompt_input_ids"].count(end) == 1  # those of the template


def test_only_tokens_between_turns_are_refused_in_a_reply(tmp_path):
    """A reply may hold special tokens of its own, such as around a thought."""
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, "<think>", "</think>"]})
    row = {"prompt": [turn("user", "q")], "chosen": [reply("<think>add</think>4")], "rejected": [reply("5")]}
    (element,) = elements_of([row], tmp_path, tokenizer)
    assert tokenizer.convert_tokens_to_ids("<think>") in element["chosen_input_ids"]
    with pytest.raises(UserError, match="special token '<think>' inside"):
        elements_of([{**row, "prompt": [turn("user", "<think>")]}], tmp_path, tokenizer)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", ""])
def test_text_that_is_rendered_already(end, tmp_path):
    tokenizer = bpe_tokenizer("first")
    row = {"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "chosen": "yes" + end, "rejected": "no" + end}
    (element,) = elements_of([row], tmp_path, tokenizer, rendered=True)
    expected = tokenizer(row["prompt"] + "yes<|im_end|>", add_special_tokens=False)["input_ids"]
    assert element["chosen_input_ids"] == expected
    with pytest.raises(UserError, match="rendered=true is for text that is rendered already, but .* row 1 holds chat messages"):
        elements_of([{**row, "chosen": [reply("yes")]}], tmp_path, tokenizer, rendered=True)


def test_a_line_says_that_text_is_trained_without_the_template(tmp_path, capsys):
    text = {"prompt": "q", "chosen": " a", "rejected": " b"}
    elements_of([text, {"prompt": [turn("user", "q")], "chosen": "a", "rejected": "b"}], tmp_path, bpe_tokenizer())
    assert "1 row of plain text: trained on as it is, without the tokenizer's chat template" in capsys.readouterr().out
    elements_of([text], tmp_path, bpe_tokenizer(template=None))
    elements_of([text], tmp_path, bpe_tokenizer(), rendered=True)
    assert "plain text" not in capsys.readouterr().out


def test_pairs_with_equal_tokens_after_truncation_are_counted(tmp_path):
    from preference_datasets import default_options, load_split

    rows = [{"prompt": "q", "chosen": "a" * 30 + x, "rejected": "a" * 30 + y} for x, y in (("b", "c"), ("d", "ee"))]
    rows.append({"prompt": "r", "chosen": "b", "rejected": "c"})
    path = write_lines(tmp_path / "rows.jsonl", rows)
    options = {"jsonl": {**default_options("jsonl"), "path": path, "eval_path": path}}
    described = [load_split(options, "train", bpe_tokenizer(), n, 2, silent=True).describe() for n in (10, 100)]
    assert "2 pairs with equal tokens in chosen and rejected, which train nothing" in described[0] and "equal tokens" not in described[1]


# --- conversations of several steps, and rows of several forms ---

# Results of tools are part of the assistant's turn, and need the call before them, as with Gemma 4 and gpt-oss.
ONE_TURN = (
    "{% set ns = namespace(open=false, called=false) %}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{% if not ns.called %}{{ raise_exception('no call before the result') }}{% endif %}"
    "<result>{{ m['content'] }}</result>{% set ns.called = false %}"
    "{% elif m['role'] == 'assistant' %}{% if not ns.open %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}<call>{{ call['function']['name'] }}</call>{% set ns.called = true %}{% endfor %}"
    "{{ m['content'] or '' }}{% set ns.open = m['tool_calls'] and not loop.last %}{% if not ns.open %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.open %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEPS = [reply("Let me see.", tool_calls=[call({})]), turn("tool", "sun"), reply("It is sunny.")]


@pytest.mark.parametrize("template", [ONE_TURN, AWARE.replace("ARGUMENTS", "")], ids=["one turn", "turns"])
def test_results_are_out_of_the_loss_wherever_the_template_writes_them(template, tmp_path):
    tokenizer = bpe_tokenizer(template=template)
    rows = [{"prompt": [turn("user", "Q?")], "chosen": STEPS, "rejected": [reply("no")]}]
    rows += [{"messages": [turn("user", "Q?"), *STEPS, turn("user", "and?"), reply("yes")]}]
    pair_row, sft_row = elements_of(rows[:1], tmp_path, tokenizer), elements_of(rows[1:], tmp_path, tokenizer, SFT, assistant_turns="all")
    for (element,) in (pair_row, sft_row):
        text = in_loss(element, tokenizer)
        assert text.replace("⟦", "").replace("⟧", "") == element["chosen"]
        scored = "".join(part.split("⟧")[0] for part in text.split("⟦")[1:])
        assert "sun<" not in scored and "Let me see." in scored and "<call>weather" in scored and "It is sunny.<|im_end|>" in scored


@pytest.mark.parametrize("role", ["observation", "ipython", "environment"])
def test_only_replies_are_in_the_loss_and_answered(role, tmp_path):
    steps = [reply("call"), turn(role, "RESULT"), reply("y")]
    (element,) = elements_of([{"prompt": [turn("user", "q")], "chosen": steps, "rejected": [reply("n")]}], tmp_path, bpe_tokenizer())
    assert "RESULT" not in "".join(part.split("⟧")[0] for part in in_loss(element, bpe_tokenizer()).split("⟦")[1:])
    (element,) = elements_of([{"messages": [turn("user", "q"), *steps[:2]]}], tmp_path, bpe_tokenizer(), SFT)
    assert element["chosen"].endswith("call<|im_end|>")


def test_a_prompt_is_never_dropped(tmp_path):
    """Where a response begins with a turn of the user or a tool, and does not repeat the prompt, the prompt comes before it."""
    system, user = turn("system", "Be terse."), turn("user", "q")
    answers = {"chosen": [turn("tool", "s"), reply("y")], "rejected": [turn("tool", "s"), reply("n")]}
    rows = [
        {"prompt": [system], "chosen": [user, reply("y")], "rejected": [user, reply("n")]},
        {"prompt": [turn("user", "w?"), reply("<call>")], **answers},
        {"prompt": "w?", **answers},
    ]
    prompts = [element["prompt"] for element in elements_of(rows, tmp_path, bpe_tokenizer())]
    for prompt, words in zip(prompts, (["Be terse.", "q"], ["w?", "<call>", "s"], ["w?", "s"])):
        assert all(word in prompt for word in words)
    row = {"prompt": [system, user, reply("a")], "completion": [turn("user", "r"), reply("b")]}
    with pytest.raises(UserError, match="user turn within a response"):
        elements_of([row], tmp_path, bpe_tokenizer(), SFT)
    (element,) = elements_of([row], tmp_path, bpe_tokenizer(), SFT, assistant_turns="all")
    assert "Be terse." in element["prompt"] and element["chosen"].endswith("b<|im_end|>")


@pytest.mark.parametrize("template", ["steps", "opens"])
def test_completions_of_a_prompt_make_a_pair_however_they_differ(template, tmp_path):
    """In their number of steps, and in whether they have the thought that the template opens."""
    completions = {"steps": (STEPS, [reply("No.")]), "opens": ([reply("<think>\nx\n</think>\n4")], [reply("5")])}[template]
    rows = [{"prompt": [turn("user", "q")], "completion": some, "score": i, "label": bool(i)} for i, some in enumerate(completions)]
    tokenizer = bpe_tokenizer(template={"steps": AWARE.replace("ARGUMENTS", ""), "opens": OPENS}[template])
    (element,) = elements_of(rows, tmp_path, tokenizer, rows="scored")
    labelled = elements_of(rows, tmp_path, tokenizer, COMPLETIONS, rows="labelled")
    assert {found["completion"] for found in labelled} == {element["chosen"], element["rejected"]}
    assert {found["prompt"] for found in labelled} == {element["prompt"]}


def test_a_reply_of_which_nothing_is_written_is_refused_and_a_lost_call_is_said(tmp_path, capsys):
    calling = reply("", tool_calls=[call({"city": "Rome"})])
    row = {"prompt": [turn("user", "weather in Rome?")], "chosen": [calling], "rejected": [reply("no")]}
    with pytest.raises(UserError, match="the chat template writes nothing of the reply in 'chosen': .*row 1"):
        elements_of([row], tmp_path, bpe_tokenizer())
    calling["content"] = "I look."
    elements_of([row], tmp_path, bpe_tokenizer())
    assert "leaves out or changes: tool_calls of 1 row" in capsys.readouterr().out


def test_rows_of_several_forms_in_a_parquet_file(tmp_path):
    """Every row has the fields of all, with null."""
    rows = [{"messages": [turn("user", "a"), reply("b")]}, {"prompt": "c", "completion": "d"}, pair("e", "f", "g")]
    expected = elements_of(rows, tmp_path, bpe_tokenizer(), SFT)
    fields = {key: [row.get(key) for row in rows] for key in ("messages", "prompt", "completion", "chosen", "rejected")}
    datasets.Dataset.from_dict(fields).to_parquet(str(tmp_path / "rows.parquet"))
    assert elements_of(str(tmp_path / "rows.parquet"), tmp_path, bpe_tokenizer(), SFT) == expected and len(expected) == 3


@pytest.mark.parametrize("place", ["argument", "property", "role"])
@pytest.mark.parametrize("text", ["<|im_end|>", "\ud800"])
def test_names_and_roles_are_checked_as_texts_are(place, text, tmp_path):
    tokenizer = bpe_tokenizer(template=AWARE.replace("ARGUMENTS", ARGUMENTS["json"]))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {text if place == "property" else "x": {}}}}}]
    asked = {"role": "user" + (text if place == "role" else ""), "content": "q"}
    called = call({text if place == "argument" else "x": "v"})
    row = {"prompt": [asked], "chosen": [reply("", tool_calls=[called])], "rejected": [reply("no")], "tools": tools}
    with pytest.raises(UserError, match="special token '<|im_end|>' inside|holds a lone surrogate"):
        elements_of([row], tmp_path, tokenizer)
    if text == "<|im_end|>":
        (element,) = elements_of([row], tmp_path, tokenizer, escape_special_tokens=True)
        assert element["chosen_input_ids"].count(tokenizer.eos_token_id) == 3  # of the system, the user and the reply


def test_several_sft_targets_of_one_prompt_from_rows_of_two_forms(tmp_path):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "completion": "c"}]
    assert {element["chosen"] for element in elements_of(rows, tmp_path, bpe_tokenizer(), SFT)} == {"qa", "qc"}


def test_a_template_that_takes_only_parts(tmp_path):
    part = "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}"
    listed = CHATML.replace("{{ m['content'] }}", f"{{% for p in m['content'] %}}{part}{{% endfor %}}")
    row = {"prompt": [turn("user", "q")], "chosen": [reply("yes")], "rejected": [reply("no")]}
    (element,) = elements_of([row], tmp_path, bpe_tokenizer(template=listed))
    assert element["chosen"] == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"


def test_the_remedy_of_escaping_leaves_thoughts_as_they_are(tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, "<think>", "</think>"]})
    row = {"prompt": [turn("user", "<|im_end|>?")], "chosen": [reply("<think>add</think>4")], "rejected": [reply("5")]}
    (element,) = elements_of([row], tmp_path, tokenizer, escape_special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<think>") in element["chosen_input_ids"]
    assert element["prompt_input_ids"].count(tokenizer.eos_token_id) == 1


def test_the_template_for_tools_has_its_own_end(tmp_path):
    templates = {"default": CHATML.replace("<|im_end|>\n", "</s>"), "tool_use": AWARE.replace("ARGUMENTS", "")}
    tokenizer = bpe_tokenizer(template=templates, eos="</s>")
    row = {"prompt": [turn("user", "q")], "chosen": [reply("yes")], "rejected": [reply("no")]}
    plain, tooled = elements_of([row, {**row, "tools": TOOLS}], tmp_path, tokenizer)
    assert plain["chosen_response_only"] == "yes</s>" and tooled["chosen_response_only"] == "yes<|im_end|>"


def test_ends_that_are_no_special_tokens_are_in_the_loss_of_every_turn(tmp_path):
    tokenizer = bpe_tokenizer(template=CHATML.replace("<|im_end|>", "###"), eos="</s>")
    messages = [turn("user", "q"), reply("a"), turn("user", "r"), reply("b")]
    (element,) = elements_of([{"messages": messages}], tmp_path, tokenizer, SFT, assistant_turns="all")
    assert [part.split("⟧")[0] for part in in_loss(element, tokenizer).split("⟦")[1:]] == ["a###", "b###</s>"]
    greeted = [reply("hello"), *messages]
    (element,) = elements_of([{"messages": greeted}], tmp_path, tokenizer, SFT, assistant_turns="all")
    assert "hello" in element["prompt"] and in_loss(element, tokenizer).count("⟦") == 2
