"""sample.py for public benchmarks: the judges' files, dialogues of several turns, and vLLM, of which a stand-in is called."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from helpers import DATA, ROOT, bpe_tokenizer, compose, run, write_lines

import sample
from preference_datasets import chat_prompts
from tdpo.utils import UserError

ALPACA = [
    {"instruction": "Name a colour.", "output": "Red.", "generator": "text_davinci_003", "dataset": "helpful_base"},
    {"instruction": "What does <|im_end|> mean?", "output": "An end.", "generator": "text_davinci_003", "dataset": "koala"},
    {"instruction": "Name a colour.", "output": "Red.", "generator": "text_davinci_003", "dataset": "vicuna"},
]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now another one."]},
    {"question_id": 101, "category": "reasoning", "turns": ["Who is second?", "And last?"], "reference": ["You are.", "Unknown."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "Twice that?"], "reference": ["2", "4"]},
    {"question_id": 141, "category": "stem", "turns": ["Why?", "Is that all?"]},
    {"question_id": 142, "category": "stem", "turns": ["How?", "Why not?"]},
]
ARENA_V2 = [
    {"uid": "0225", "category": "hard_prompt", "subcategory": "coding", "prompt": "Sort a list."},
    {"uid": "0226", "category": "creative_writing", "prompt": "A poem."},
]
ARENA_V01 = [{"question_id": "328c", "category": "arena-hard-v0.1", "cluster": "Sorting", "turns": [{"content": "Sort a list."}]}]
CLOCK = "tstamp"  # the only entry of a judge's file that differs between two runs


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A Hugging Face folder of a small chat model."""
    folder, tokenizer = tmp_path_factory.mktemp("chat") / "model", bpe_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=3, eos_token_id=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answered(model, form, rows, out, *overrides):
    """Answer the questions in `rows`, written as the benchmark's file, and return what the judge's file holds, without the times."""
    questions = out.parent / f"question{'.json' if form == 'alpaca_eval' else '.jsonl'}"
    if form == "alpaca_eval":
        questions.write_text(json.dumps(rows, indent=4))
    else:
        write_lines(questions, rows)
    options = [f"run={model}", f"form={form}", f"prompts={questions}", f"out={out}", "max_new_tokens=8", "max_length=256", "batch_size=2"]
    sample.run(compose(*options, *overrides, name="sample"))
    return read(out, form)


def read(out, form) -> list[dict]:
    text = out.read_text()
    rows = json.loads(text) if form == "alpaca_eval" else [json.loads(line) for line in text.splitlines()]
    assert all(row.pop(CLOCK) > 1.7e9 for row in rows if form != "alpaca_eval")
    return rows


def rows_of(out) -> list[dict]:
    return lines_of(f"{out}.rows")


def lines_of(path) -> list[dict]:
    with open(path) as file:
        return [json.loads(line) for line in file]


def test_alpaca_eval(chat, tmp_path):
    """A list of {instruction, output, generator, dataset}, in the order of the benchmark's file, in which instructions may repeat."""
    found = answered(chat, "alpaca_eval", ALPACA, tmp_path / "mine.json")
    assert [list(row) for row in found] == [["instruction", "output", "generator", "dataset"]] * 3
    assert [(row["instruction"], row["dataset"]) for row in found] == [(row["instruction"], row["dataset"]) for row in ALPACA]
    assert {row["generator"] for row in found} == {"mine"}
    rows = rows_of(tmp_path / "mine.json")
    assert [row["output"] for row in found] == [row["completion"].strip() for row in rows]
    assert rows[0]["prompt"] == "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
    ends = [row["prompt_ids"].count(5) for row in rows]  # the token <|im_end|>, which as a word of the question is plain text
    assert ends == [1, 1, 1] and rows[1]["prompt"].count("<|im_end|>") == 2


def test_mt_bench(chat, tmp_path):
    """What FastChat's readers take: an answer by question_id, choices[0].turns[0 and 1]; the second turn follows the first answer."""
    found = answered(chat, "mt_bench", MT_BENCH, tmp_path / "mine.jsonl")
    assert [row["question_id"] for row in found] == [81, 101, 111, 141, 142] and {row["model_id"] for row in found} == {"mine"}
    assert all(list(row) == ["question_id", "answer_id", "model_id", "choices"] for row in found)  # and the time
    assert len({row["answer_id"] for row in found}) == 5
    rows, tokenizer = rows_of(tmp_path / "mine.jsonl"), transformers.AutoTokenizer.from_pretrained(chat)
    for i, (question, row) in enumerate(zip(MT_BENCH, found)):
        first, second = (next(r for r in rows if (r["index"], r["turn"]) == (i, turn)) for turn in (0, 1))
        assert row["choices"] == [{"index": 0, "turns": [first["completion"].strip(), second["completion"].strip()]}]
        said = [{"role": "user", "content": question["turns"][0]}, {"role": "assistant", "content": row["choices"][0]["turns"][0]}]
        said.append({"role": "user", "content": question["turns"][1]})
        assert second["prompt"] == tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"mine.jsonl", "question.jsonl"}  # FastChat reads all of a folder


def test_temperatures_of_mt_bench(chat, tmp_path):
    """Greedy for reasoning and math, so that the seed does not matter; `temperature` replaces all of them."""
    first, second = (answered(chat, "mt_bench", MT_BENCH, tmp_path / f"{seed}.jsonl", f"seed={seed}") for seed in (0, 1))
    equal = [a["choices"] == b["choices"] for a, b in zip(first, second)]
    assert equal[1:3] == [True, True] and not equal[0]
    hot, again = (answered(chat, "mt_bench", MT_BENCH, tmp_path / f"h{seed}.jsonl", f"seed={seed}", "temperature=2") for seed in (0, 1))
    assert not any(a["choices"] == b["choices"] for a, b in zip(hot, again))


def test_arena_hard(chat, tmp_path):
    """{uid, model, messages}, whose last content is {answer}, and, for questions of the first version, choices of {content}."""
    found = answered(chat, "arena_hard", ARENA_V2, tmp_path / "mine.jsonl")
    for question, row, drawn in zip(ARENA_V2, found, rows_of(tmp_path / "mine.jsonl"), strict=True):
        assert list(row) == ["uid", "ans_id", "model", "messages"] and (row["uid"], row["model"]) == (question["uid"], "mine")
        assert row["messages"][0] == {"role": "user", "content": question["prompt"]}
        assert row["messages"][1:] == [{"role": "assistant", "content": {"answer": drawn["completion"].strip()}}]
    (row,) = answered(chat, "arena_hard", ARENA_V01, tmp_path / "first.jsonl")
    assert (row["question_id"], row["model_id"]) == ("328c", "first")
    assert row["choices"] == [{"index": 0, "turns": [{"content": rows_of(tmp_path / "first.jsonl")[0]["completion"].strip()}]}]


@pytest.mark.parametrize("form,questions,ending", [("alpaca_eval", ALPACA, "json"), ("mt_bench", MT_BENCH, "jsonl")])
def test_an_interrupted_run_is_resumed(form, questions, ending, chat, tmp_path):
    """Whether it ended while it sampled, in the middle of a line, or before it wrote the judge's file; nothing written is written again."""
    out = tmp_path / f"mine.{ending}"
    whole = answered(chat, form, questions, out)
    rows, written = (tmp_path / f"{out.name}.rows").read_text(), out.read_text()
    assert answered(chat, form, questions, out) == whole and out.read_text() == written
    for share in (0.0, 0.4, 0.99, 1.0):
        out.unlink()
        (tmp_path / f"{out.name}.rows").write_text(rows[: int(share * len(rows))])
        assert answered(chat, form, questions, out) == whole
        assert (tmp_path / f"{out.name}.rows").read_text() == rows
    (tmp_path / f"{out.name}.rows").write_text(rows[: len(rows) // 2])
    with pytest.raises(UserError, match=f"out=.*mine.{ending} exists, and its rows in '.*' are not complete: give out="):
        answered(chat, form, questions, out)
    out.unlink()
    (tmp_path / f"{out.name}.rows").write_text(rows)
    with pytest.raises(UserError, match=r"was started with different settings \(prompts"):
        answered(chat, form, questions[:2], out)


def test_a_judges_file_that_is_there_is_kept(chat, tmp_path):
    (tmp_path / "mine.json").write_text("[]")
    with pytest.raises(UserError, match="out=.*mine.json exists"):
        answered(chat, "alpaca_eval", ALPACA, tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "[]"


def test_several_processes_write_the_same_answers(ranks, chat, tmp_path):
    alone = answered(chat, "mt_bench", MT_BENCH, tmp_path / "mine.jsonl")
    options = [f"run={chat}", "form=mt_bench", f"prompts={tmp_path}/question.jsonl", "max_new_tokens=8", "max_length=256", "batch_size=2"]
    (tmp_path / "both").mkdir()
    ranks(2).call("sample", *options, f"out={tmp_path}/both/mine.jsonl")
    assert read(tmp_path / "both" / "mine.jsonl", "mt_bench") == alone


@pytest.mark.parametrize(
    "form,rows,message",
    [
        (
            "alpaca_eval",
            MT_BENCH,
            r"is not of form=alpaca_eval, a JSON array of \{instruction, ...\}: row 1 has 'question_id', 'category', 't",
        ),
        ("mt_bench", [MT_BENCH[0], {**MT_BENCH[1], "turns": []}], "is not of form=mt_bench, JSON lines .*: row 2 has "),
        ("mt_bench", [{key: value for key, value in MT_BENCH[0].items() if key != "category"}], "is not of form=mt_bench"),
        ("mt_bench", ["{"], "is not of form=mt_bench, .*: row 1 is truncated or malformed JSON"),
        ("mt_bench", [MT_BENCH[0]] * 2, "has several questions with the id 81"),
        ("arena_hard", [{"uid": "1", "turns": ["a"]}], "is not of form=arena_hard"),
        ("arena_hard", MT_BENCH, "is not of form=arena_hard"),
    ],
)
def test_a_file_of_another_form_is_one_line(form, rows, message, chat, tmp_path, monkeypatch):
    """Before a model is loaded."""
    monkeypatch.setattr("tdpo.analysis.trained_models._built", None)
    with pytest.raises(UserError, match=message) as raised:
        answered(chat, form, rows, tmp_path / "out.jsonl")
    assert "\n" not in str(raised.value) and sorted(path.name for path in tmp_path.iterdir()) in (["question.json"], ["question.jsonl"])


def test_what_does_not_go_with_a_form(chat, tmp_path, monkeypatch):
    monkeypatch.setattr("tdpo.analysis.trained_models._built", None)
    out = tmp_path / "out.jsonl"
    for keys, message in (
        (["n=2"], "form=mt_bench holds one answer to each question: give n=1"),
        (["prompts=null"], "form=mt_bench needs prompts=<the benchmark's file of questions>"),
        (["max_new_tokens=null"], "form=mt_bench needs max_new_tokens="),
        ([f"prompts={tmp_path}/none.jsonl"], "none.jsonl: no such file; form=mt_bench takes the benchmark's own file, JSON lines"),
    ):
        with pytest.raises(UserError, match=message):
            answered(chat, "mt_bench", MT_BENCH, out, *keys)
    with pytest.raises(UserError, match=r"max_length=50 is too small: .* may take (\d+) tokens: give max_length=\1") as raised:
        answered(chat, "mt_bench", MT_BENCH, out, "max_length=50")
    monkeypatch.undo()
    needed = int(str(raised.value).split("max_length=")[-1].split(",")[0])
    answered(chat, "mt_bench", MT_BENCH, out, f"max_length={needed}")  # the remedy works
    assert all(row["prompt"].startswith("<|im_start|>user\nW") for row in rows_of(out)[:2])


def test_a_model_without_a_chat_template(chat, tmp_path):
    shutil.copytree(chat, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template: train with model.chat_template=<file>, or put a chat_template.jinja"):
        answered(tmp_path / "plain", "alpaca_eval", ALPACA, tmp_path / "out.json")
    shutil.copy(chat / "chat_template.jinja", tmp_path / "plain")
    answered(tmp_path / "plain", "alpaca_eval", ALPACA, tmp_path / "out.json")


def test_an_answer_that_holds_a_special_tokens_text_is_plain_text(chat):
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|>c"}, {"role": "user", "content": "d"}]
    ((text, ids),) = chat_prompts([said], tokenizer)
    assert "b<|im_end|>c" in text and ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3 and tokenizer.decode(ids) == text


# --- greedy ---


def test_temperature_0_is_greedy(chat, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "ab"}])
    options = [f"run={chat}", f"prompts={prompts}", "temperature=0", "max_new_tokens=6"]
    (row,), again = (lines_of(sample.run(compose(*options, f"out={tmp_path}/{seed}", f"seed={seed}", name="sample"))) for seed in (0, 1))
    assert again == [row]
    model = transformers.AutoModelForCausalLM.from_pretrained(chat)
    logits = model(torch.tensor([row["prompt_ids"] + row["completion_ids"]])).logits[0]
    assert logits.argmax(-1)[len(row["prompt_ids"]) - 1 : -1].tolist() == row["completion_ids"]
    with pytest.raises(UserError, match="temperature=0 takes the most likely token each time, so all n=2 texts would be equal: give n=1"):
        sample.run(compose(*options, f"out={tmp_path}/x", "n=2", name="sample"))


# --- vLLM ---


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in, as an installed package."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "stand_ins")
    import vllm

    yield vllm
    del sys.modules["vllm"]


def test_vllm_is_not_installed(chat, tmp_path):
    with pytest.raises(UserError, match="engine=vllm needs vllm: pip install vllm, or leave engine=transformers"):
        answered(chat, "alpaca_eval", ALPACA, tmp_path / "out.json", "engine=vllm")


def test_vllm_writes_the_rows_of_transformers(chat, tmp_path, vllm):
    """Greedily, apart from rounding, it is the same computation; the end token is part of the row."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("a", "quest", "The answer:", "or no", "yes")])
    options = [f"run={chat}", f"prompts={prompts}", "temperature=0", "max_new_tokens=40", "batch_size=2"]
    rows = {}
    for engine in ("transformers", "vllm"):
        rows[engine] = lines_of(sample.run(compose(*options, f"engine={engine}", f"out={tmp_path}/{engine}.jsonl", name="sample")))
    assert rows["vllm"] == rows["transformers"] and len(rows["vllm"]) == 5
    (made,) = vllm.MADE
    assert made == {"model": str(chat), "max_model_len": 512}
    with pytest.raises(UserError, match=r"was started with different settings \((device, )?engine(, weights)*\): give out="):
        sample.run(compose(*options, "engine=vllm", f"out={tmp_path}/transformers.jsonl", name="sample"))


def test_what_vllm_is_asked(chat, tmp_path, vllm):
    """Its top_k for all tokens is -1; max_tokens leaves room within max_length; each prompt has a seed of its own."""
    lengths = {}
    for keys in (["n=3"], ["n=3", "top_k=7", "top_p=0.5", "temperature=0.3", "seed=1"]):
        prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "ab ab"}, {"prompt": "ab ab"}, {"prompt": "question"}])
        options = [
            f"run={chat}",
            f"prompts={prompts}",
            "max_length=20",
            "max_prompt_length=10",
            "engine=vllm",
            f"out={tmp_path}/{len(keys)}",
        ]
        rows = lines_of(sample.run(compose(*options, *keys, name="sample")))
        lengths = {row["index"]: len(row["prompt_ids"]) for row in rows}
        assert [(row["index"], row["sample"]) for row in rows] == [(i, j) for i in range(3) for j in range(3)]
    plain, others = vllm.ASKED[:3], vllm.ASKED[3:]
    assert {(x.n, x.temperature, x.top_p, x.top_k) for x in plain} == {(3, 1.0, 1.0, -1)}
    assert {(x.n, x.temperature, x.top_p, x.top_k) for x in others} == {(3, 0.3, 0.5, 7)}
    assert [x.max_tokens for x in plain] == [20 - lengths[i] for i in range(3)] and len({x.seed for x in vllm.ASKED}) == 6
    assert all(x.stop_token_ids == [2, 5] for x in vllm.ASKED)  # of the model's settings, and of the tokenizer


def test_vllm_answers_a_benchmark_and_resumes(chat, tmp_path, vllm):
    out = tmp_path / "mine.jsonl"
    whole = answered(chat, "mt_bench", MT_BENCH, out, "engine=vllm", "temperature=0")
    (tmp_path / "t").mkdir()
    assert whole == answered(chat, "mt_bench", MT_BENCH, tmp_path / "t" / "mine.jsonl", "temperature=0")
    rows = (tmp_path / "mine.jsonl.rows").read_text()
    out.unlink()
    (tmp_path / "mine.jsonl.rows").write_text(rows[: len(rows) // 2])
    assert answered(chat, "mt_bench", MT_BENCH, out, "engine=vllm", "temperature=0") == whole


def test_what_vllm_does_not_serve(chat, tmp_path, vllm):
    done = run(*DATA, "n_examples=16", "do_first_eval=false", "save_every=8", f"local_run_dir={tmp_path}/run")
    common = ["engine=vllm", "n_prompts=2", "max_new_tokens=2", f"out={tmp_path}/out.jsonl"]
    sample.run(compose(f"run={done}", *common, name="sample"))
    assert vllm.MADE[-1]["model"] == str((done / "LATEST").resolve() / "hf")
    for model, keys, message in (
        (
            done / "step-8",
            [],
            r"'.*step-8' has no folder hf/, which engine=vllm serves: python export.py run='.*step-8' out=<folder>, then",
        ),
        (done, ["num_beams=2"], "engine=vllm has no beam search here: leave num_beams=1"),
        (chat, ["max_length=1024", f"prompts={tmp_path}/p.jsonl"], "vLLM cannot load '.*' with max_length=1024: max_model_len"),
    ):
        write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}])
        with pytest.raises(UserError, match=message) as raised:
            sample.run(compose(f"run={model}", *common, f"out={tmp_path}/x.jsonl", *keys, name="sample"))
        assert "\n" not in str(raised.value)


def test_vllm_in_several_processes(vllm):
    from tdpo.models.vllm_engine import check_vllm

    with pytest.raises(UserError, match="engine=vllm runs in one process, not in 2: start sample.py with python"):
        check_vllm("runs/x", "", 2)
    with pytest.raises(UserError, match="not a GGUF file"):
        check_vllm("x.gguf", "", 1)
