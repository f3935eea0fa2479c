"""What losses need besides pairs: ratings, labels, SFT targets, segments of conversations; and which options exclude each other."""

import gzip
import json

import pytest
import torch
from helpers import DATA, HISTORY, MINI, ROOT, SEGMENTS, compose, load, logs_of, pair, run, turn, write_lines
from transformers import AutoModelForCausalLM

from preference_datasets import default_options, load_prompts, load_split
from tdpo.cli.check_config import check_config
from tdpo.data.contract import COMPLETIONS, PAIRS, PAIRS_AND_TARGET, SFT
from tdpo.data.split import Example, with_partners
from tdpo.losses import get_objective
from tdpo.scoring.prefix_sharing import shared_prefix_batch
from tdpo.scoring.scorer import Scorer
from tdpo.training.metrics import MetricSums, Weighted
from tdpo.utils import UserError

RATED = PAIRS._replace(rated=True)
IMDB = ROOT.parent / "shared" / "data" / "imdb-scored" / "completions.jsonl.gz"


def split_of(tmp_path, lines, form, tokenizer, max_length=64, **options):
    path = write_lines(tmp_path / "rows.jsonl", lines)
    values = {**default_options("jsonl"), "path": path, "eval_path": path, **options}
    return load_split({"jsonl": values}, "train", tokenizer, max_length, 16, form, silent=True)


def completion(prompt, text, **more):
    return {"prompt": prompt, "completion": text, **more}


# --- ratings ---


def test_ratings_of_pairs_are_annotations_in_the_order_of_roles(tmp_path, mini_tokenizer):
    rows = [pair("one", " a", " b", chosen_score=3, rejected_score=1.5), pair("one", " c", " d", chosen_score=-1, rejected_score=-2)]
    split = split_of(tmp_path, rows, RATED, mini_tokenizer)
    assert [split.example(Example(0, i)).annotations for i in (0, 1)] == [[3.0, 1.5], [-1.0, -2.0]]
    element = split.element(Example(0, 1))
    assert (element["chosen_annotation"], element["rejected_annotation"]) == (-1.0, -2.0)
    assert split_of(tmp_path, rows, PAIRS, mini_tokenizer).example(Example(0, 0)).annotations == []


@pytest.mark.parametrize(
    "scores", [{}, {"chosen_score": 1}, {"chosen_score": 1, "rejected_score": 1}, {"chosen_score": 1, "rejected_score": 2}]
)
def test_pairs_without_ordered_ratings_are_defects_if_ratings_are_needed(scores, tmp_path, mini_tokenizer):
    rows = [pair("one", chosen_score=2, rejected_score=1), pair("two", **scores)]
    what = "must be numbers, the first one greater" if scores else "which this loss needs"
    with pytest.raises(UserError, match=f"chosen_score and rejected_score,? {what}: .*rows.jsonl row 2"):
        split_of(tmp_path, rows, RATED, mini_tokenizer)
    assert len(split_of(tmp_path, rows, RATED, mini_tokenizer, invalid_rows="skip")) == 1
    assert len(split_of(tmp_path, rows, PAIRS, mini_tokenizer)) == 2


def test_votes_are_ratings_and_ties_are_dropped(tmp_path, mini_tokenizer, capsys):
    answers = [{"text": f"<p>{word}</p>", "pm_score": score} for word, score in (("a", 2), ("b", 5), ("c", 2))]
    write_lines(tmp_path / "train.jsonl", [{"question": "<p>why</p>", "answers": answers}])
    options = {"se": {**default_options("se"), "path": str(tmp_path)}}
    split = load_split(options, "train", mini_tokenizer, 64, 16, RATED)
    assert "1 pair with equal scores dropped" in capsys.readouterr().out
    assert [split.example(Example(0, i)).annotations for i in range(len(split))] == [[5.0, 2.0], [5.0, 2.0]]
    assert len(load_split(options, "train", mini_tokenizer, 64, 16, PAIRS, silent=True)) == 3  # as published


def test_gold_rewards_are_ratings_and_a_dataset_without_ratings_is_an_error(mini_tokenizer):
    reviews = {**default_options("reviews"), "n_train": 4}
    split = load_split({"reviews": reviews}, "train", mini_tokenizer, 64, 16, RATED, silent=True)
    chosen, rejected = split.example(Example(0, 0)).annotations
    assert chosen - rejected >= reviews["min_margin"]
    with pytest.raises(UserError, match="hh has no scores, which this loss needs"):
        load_split({"hh": {**default_options("hh"), "path": str(MINI / "data")}}, "train", mini_tokenizer, 64, 16, RATED, silent=True)


def test_scored_completions_become_pairs_by_score(tmp_path, mini_tokenizer):
    rows = [completion("p", f" {word}", score=score) for word, score in (("a", 0.1), ("b", 0.9), ("c", 0.5), ("b", 0.2))]
    rows.append(completion("q", " lone", score=1))
    data = load("jsonl", path=write_lines(tmp_path / "a.jsonl", rows), eval_path="x", rows="scored", min_margin=0.2)
    better = {(1, 0): 0.8, (1, 2): 0.4, (2, 0): 0.4, (2, 3): 0.3}  # not (1, 3): equal texts; not (3, 0): its margin is 0.1
    assert sorted(data["p"]["pairs"]) == sorted(better) and data["q"]["pairs"] == []
    assert data["p"]["sft_target"] == " b"
    data = load("jsonl", path=str(tmp_path / "a.jsonl"), eval_path="x", rows="scored", pairs_by="extremes")
    assert data["p"]["pairs"] == [(1, 0)]
    split = split_of(tmp_path, rows, RATED, mini_tokenizer, rows="scored", min_margin=0.7)
    assert len(split) == 1 and split.example(Example(0, 0)).annotations == [0.9, 0.1]
    with pytest.raises(UserError, match=r"no such field: columns.score=score \(of datasets.jsonl\); it has prompt, completion: .* row 1"):
        split_of(tmp_path, [completion("p", " x")], RATED, mini_tokenizer, rows="scored")
    with pytest.raises(UserError, match="'score' must be a number: .*rows.jsonl row 2"):
        split_of(tmp_path, [rows[0], completion("p", " x", score="2")], RATED, mini_tokenizer, rows="scored")


@pytest.mark.skipif(not IMDB.exists(), reason="needs shared/data/imdb-scored beside the clone")
def test_scored_completions_of_imdb(mini_tokenizer):
    with gzip.open(IMDB) as file:
        rows = [json.loads(line) for line in file]
    columns = {"prompt": "prompt", "completion": "text", "score": "reward", "label": "label"}
    options = {
        **default_options("jsonl"),
        "path": str(IMDB),
        "rows": "scored",
        "columns": columns,
        "separator": " ",
        "invalid_rows": "skip",
        "pairs_by": "extremes",
    }
    split = load_split({"jsonl": {**options, "eval_path": str(IMDB)}}, "train", mini_tokenizer, 512, 64, RATED, silent=True)
    first = [row for row in rows if row["prompt"] == rows[0]["prompt"]]
    best = max(first, key=lambda row: row["reward"])
    assert len(split) == len({row["prompt"] for row in rows})
    assert split.element(Example(0, 0))["chosen"] == rows[0]["prompt"] + " " + best["text"]
    assert split.example(Example(0, 0)).annotations == [best["reward"], min(row["reward"] for row in first)]


# --- labels ---


def test_labelled_completions(tmp_path, mini_tokenizer):
    rows = [completion("p", " good", label=True), completion("p", " bad", label=False), completion("q", " worse", label=False)]
    split = split_of(tmp_path, rows, COMPLETIONS, mini_tokenizer, rows="labelled")
    assert len(split) == 3 and [split.example(Example(*at)).annotations for at in ((0, 0), (0, 1), (1, 0))] == [[1.0], [0.0], [0.0]]
    assert split.element(Example(0, 1))["completion"] == "p bad"
    assert len(split_of(tmp_path, rows, SFT, mini_tokenizer, rows="labelled")) == 1  # q has nothing desirable
    with pytest.raises(UserError, match="'label' must be true or false: .*row 1"):
        split_of(tmp_path, [completion("p", " x", label="yes")], COMPLETIONS, mini_tokenizer, rows="labelled")
    with pytest.raises(UserError, match="single responses with labels, but this loss needs pairs: use loss=kto"):
        split_of(tmp_path, rows, PAIRS, mini_tokenizer, rows="labelled")


def test_labelled_chat_rows(tmp_path, chat_tokenizer):
    """TRL's conversational form."""
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yes"}], "label": True}
    split = split_of(tmp_path, [row], COMPLETIONS, chat_tokenizer, rows="labelled")
    assert split.element(Example(0, 0, (0, 0)))["completion"] == "<|start|>user\nhi<|end|>\n<|start|>assistant\nyes<|end|>"


def test_unpair_makes_two_examples_of_a_pair(tmp_path, mini_tokenizer):
    rows = [pair("p", " a", " b"), pair("p", " c", " a"), pair("q", " d", " e")]
    split = split_of(tmp_path, rows, COMPLETIONS, mini_tokenizer, unpair=True)
    found = [(split.element(example)["completion"], split.example(example).annotations) for example in next(split.epochs(0, shuffle=False))]
    assert found == [("p a", [1]), ("p b", [0]), ("p c", [1]), ("p a", [0]), ("q d", [1]), ("q e", [0])]
    with pytest.raises(UserError, match=r"jsonl has pairs, but this loss takes single responses: datasets.jsonl.unpair=true"):
        split_of(tmp_path, rows, COMPLETIONS, mini_tokenizer)


def test_partners_are_the_next_examples_with_another_prompt():
    order = [Example(0, 0), Example(0, 1), Example(1, 0), Example(2, 0), Example(2, 1)]
    assert [example.partner for example in with_partners(order)] == [(1, 0), (1, 0), (2, 0), (0, 0), (0, 0)]


def test_z0_of_a_batch_needs_a_second_prompt(tmp_path):
    rows = [pair("p", " a", " b"), pair("p", " c", " d")]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    data = [
        *(x for x in DATA if not x.startswith("datasets")),
        "datasets=[jsonl]",
        f"datasets.jsonl.path={path}",
        "datasets.jsonl.unpair=true",
    ]
    options = [*data, f"datasets.jsonl.eval_path={path}", "loss=kto", "batch_size=4", f"local_run_dir={tmp_path}/run"]
    with pytest.raises(UserError, match="the train split has only one prompt, but loss.z0=batch needs several"):
        run(*options)
    assert logs_of(run(*options, "loss.z0=0"), "train")[0]["loss/train"] == pytest.approx(0.5)
    write_lines(tmp_path / "rows.jsonl", [*rows, pair("q", " a", " b")])
    with pytest.raises(
        UserError, match="an epoch takes 4 train examples, which may be of one prompt, but loss.z0=batch needs several: take"
    ):
        run(*options, "datasets.jsonl.n_examples=4", f"local_run_dir={tmp_path}/part")


def test_mismatched_tokens_are_the_prompt_with_the_partners_response(tmp_path, mini_tokenizer):
    split = split_of(tmp_path, [pair("a b", " c", " d"), pair("e", " f g", " h")], COMPLETIONS, mini_tokenizer, unpair=True)
    example = next(split.epochs(0, shuffle=False))[1]
    mismatched = example._replace(mismatched=True)
    (prompt, *_), (mine, (other,), *_) = split.example(example), split.example(mismatched)
    assert mine == prompt and other == split.example(Example(1, 0, (0, 0))).responses[0]
    assert split.element(mismatched)["completion_input_ids"] == prompt + other


# --- prompts ---


def test_prompts_of_a_file_may_be_messages(tmp_path, chat_tokenizer):
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": [turn("user", "hi")]}, {"prompt": "plain"}])
    prompts = load_prompts({}, "train", chat_tokenizer, 64, path=path)
    assert [prompt.text for prompt in prompts] == ["<|start|>user\nhi<|end|>\n<|start|>assistant\n", "plain"]
    with pytest.raises(UserError, match="a message of 'prompt' has no role: .*row 1"):
        load_prompts({}, "train", chat_tokenizer, 64, path=write_lines(tmp_path / "bad.jsonl", [{"prompt": [{"content": "hi"}]}]))


# --- pairs with the SFT target ---


def test_pairs_with_their_target(tmp_path, mini_tokenizer):
    rows = [pair("p", " a", " b"), pair("p", " c", " d")]
    split = split_of(tmp_path, rows, PAIRS_AND_TARGET, mini_tokenizer)
    responses = [split.element(Example(0, i)) for i in (0, 1)]
    assert [(e["chosen"], e["rejected"], e["target"]) for e in responses] == [("p a", "p b", "p c"), ("p c", "p d", "p c")]
    assert len(split.example(Example(0, 0)).responses) == 3


# --- segments ---


def test_only_the_turns_of_a_segment_are_in_the_loss(tmp_path, chat_tokenizer):
    split = split_of(tmp_path, [SEGMENTS], PAIRS, chat_tokenizer, 200, rows="segments")
    example = Example(0, 0)
    prompt, responses, masks, _ = split.example(example)
    decoded = chat_tokenizer.convert_ids_to_tokens
    assert "".join(decoded(prompt)).endswith("<|start|>user\na<|end|>\n<|start|>assistant\n")
    scored = [[t for t, m in zip(decoded(ids), mask) if m] for ids, mask in zip(responses, masks)]
    assert scored == [["b", "c", "<|end|>", "e", "<|end|>"], ["f", "<|end|>", "i", "j", "<|end|>"]]
    assert "".join(decoded(responses[0])) == "bc<|end|>\n<|start|>user\nd<|end|>\n<|start|>assistant\ne<|end|>"  # nothing after this
    element = split.element(example)
    assert [x for x in element["chosen_labels"] if x != -100] == [i for i, m in zip(responses[0], masks[0]) if m]
    assert split.response_tokens().tolist() == [10]


def test_a_segments_score_is_the_sum_over_its_turns(tmp_path, chat_tokenizer):
    """Plain and fast scoring, against the model's log-probability of each turn after its history."""
    split = split_of(tmp_path, [SEGMENTS], PAIRS, chat_tokenizer, 200, rows="segments")
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(MINI / "model").config
    config.vocab_size, config.max_position_embeddings = len(chat_tokenizer), 256
    model = AutoModelForCausalLM.from_config(config).double().eval()
    scorer, example = Scorer(model, None, get_objective("simpo", beta=1.0, gamma=0.0)), Example(0, 0)
    rows = shared_prefix_batch([split.example(example)])
    from tdpo.data.batching import get_collate_fn

    plain = scorer(get_collate_fn(chat_tokenizer)([split.element(example)])).scores
    with torch.no_grad():
        fast = scorer(rows).scores
    for role, messages in SEGMENTS.items():
        expected = 0.0
        for i, message in enumerate(messages):
            if message.get("segment"):
                history = chat_tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
                reply = chat_tokenizer(message["content"] + "<|end|>", add_special_tokens=False)["input_ids"]
                logps = model(torch.tensor([history + reply])).logits[0].log_softmax(-1)
                expected += sum(logps[len(history) - 1 + j, token].item() for j, token in enumerate(reply))
        assert plain[role].logps.item() == pytest.approx(expected, rel=1e-10)
        assert fast[role].logps.item() == pytest.approx(expected, rel=1e-10)
        assert plain[role].num_tokens.item() == fast[role].num_tokens.item() == 5


@pytest.mark.parametrize("after", [[], [turn("user", "x")]])
def test_segments_of_one_turn(after, tmp_path, chat_tokenizer):
    row = {role: [turn("user", "q"), turn("assistant", text, True), *after] for role, text in (("chosen", "y"), ("rejected", "n"))}
    split = split_of(tmp_path, [row], PAIRS._replace(segments=True), chat_tokenizer, 200, rows="segments")
    assert split.example(Example(0, 0)).counts() == [2, 2] and split.element(Example(0, 0))["chosen_response_only"] == "y<|end|>"
    renamed = {"question": [turn("user", "q")], **{role: messages[1:] for role, messages in row.items()}}
    columns = {"prompt": "question"}
    split = split_of(tmp_path, [renamed], PAIRS._replace(segments=True), chat_tokenizer, 200, rows="segments", columns=columns)
    assert "q<|end|>" in split.element(Example(0, 0))["prompt"]


def test_segments_of_unequal_length(tmp_path, chat_tokenizer, capsys):
    short = {**SEGMENTS, "rejected": SEGMENTS["rejected"][:4]}
    with pytest.raises(UserError, match=r"segments of 2 and 1 turns \(datasets.jsonl.segments=cut makes them equal\): .*row 1"):
        split_of(tmp_path, [short], PAIRS, chat_tokenizer, 200, rows="segments")
    split = split_of(tmp_path, [short], PAIRS, chat_tokenizer, 200, rows="segments", segments="cut")
    decoded = chat_tokenizer.convert_ids_to_tokens
    assert ["".join(decoded(ids)) for ids in split.example(Example(0, 0)).responses] == ["bc<|end|>", "f<|end|>"]
    with pytest.raises(UserError, match=r'need assistant turns marked \{"segment": true\}'):
        split_of(tmp_path, [{**SEGMENTS, "rejected": HISTORY}], PAIRS, chat_tokenizer, 200, rows="segments")
    for length in (30, 40):  # truncation leaves no turn of the segment, or one of two
        with pytest.raises(UserError, match=rf"1 example \(0\) of 1 have turns that are in the loss beyond max_length={length}"):
            split_of(tmp_path, [SEGMENTS], PAIRS._replace(segments=True), chat_tokenizer, length, rows="segments")


def test_losses_that_need_segments_and_other_losses_on_segments(tmp_path, chat_tokenizer, mini_tokenizer):
    with pytest.raises(UserError, match="jsonl has no segments, which this loss needs"):
        split_of(tmp_path, [pair()], PAIRS._replace(segments=True), mini_tokenizer)
    split = split_of(tmp_path, [SEGMENTS], SFT, chat_tokenizer, 200, rows="segments")
    assert sum(split.example(Example(0, 0)).masks[0]) == 5
    unpaired = split_of(
        tmp_path,
        [SEGMENTS, {r: [turn("user", "x"), *m[1:]] for r, m in SEGMENTS.items()}],
        COMPLETIONS,
        chat_tokenizer,
        200,
        rows="segments",
        unpair=True,
    )
    for example in next(unpaired.epochs(0)):
        assert unpaired.example(example._replace(mismatched=True)).masks == unpaired.example(Example(*example.partner)).masks


def test_data_without_targets_or_pairs(tmp_path, mini_tokenizer):
    with pytest.raises(UserError, match="jsonl has no SFT target: none of its responses is labelled desirable"):
        split_of(tmp_path, [completion("p", " a", label=False)], SFT, mini_tokenizer, rows="labelled")
    with pytest.raises(UserError, match="ratings of a prompt.s responses are equal, or differ by too little .min_margin."):
        rows = [completion("p", " a", score=1), completion("p", " b", score=2)]
        split_of(tmp_path, rows, PAIRS, mini_tokenizer, rows="scored", min_margin=5)


def test_votes_against_the_label_are_defects_if_ratings_are_needed(tmp_path, mini_tokenizer, capsys):
    texts = {"history": "h", "human_ref_A": "a", "human_ref_B": "b"}
    rows = [{**texts, "score_A": 10, "score_B": 2, "labels": 1}, {**texts, "score_A": 3, "score_B": 3, "labels": 1}]
    options = {"shp": {**default_options("shp"), "path": str(tmp_path)}}
    write_lines(tmp_path / "train.jsonl", rows)
    assert load_split(options, "train", mini_tokenizer, 64, 16, RATED).example(Example(0, 0)).annotations == [10, 2]
    assert "1 pair with equal scores dropped" in capsys.readouterr().out
    write_lines(tmp_path / "train.jsonl", [*rows, {**texts, "score_A": 10, "score_B": 2, "labels": 0}])
    with pytest.raises(UserError, match="the preferred response has the lower score: .*row 3"):
        load_split(options, "train", mini_tokenizer, 64, 16, RATED, silent=True)


def test_metrics_that_some_examples_do_not_have():
    """Means are over the first `counted` examples with a nonzero weight; a metric without any has no mean."""
    sums = MetricSums()
    sums.add({"x": Weighted(torch.tensor([1.0, 7.0, 5.0, 9.0]), torch.tensor([True, False, True, True]))}, counted=3)
    sums.add({"x": Weighted(torch.tensor([6.0]), torch.tensor([True])), "y": Weighted(torch.ones(2), torch.zeros(2, dtype=torch.bool))})
    assert sums.means() == {"x": 4.0}


# --- options that exclude each other ---


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["loss=kto", "batch_size=1"], "batch_size=1: loss=kto computes z0 from the batch's other examples"),
        (["loss=kto", "reference_cache=true"], "loss=kto needs the reference for mismatched responses too"),
        (["loss=simpo", "reference.update_every=2"], "reference.update_every=2: loss=simpo has no reference"),
        (["loss=dpo", "reference.update_every=2", "reference_cache=true"], "reference_cache=true needs a fixed reference"),
        (["loss=sdpo_stepwise", "n_epochs=null", "n_examples=8"], "loss=sdpo_stepwise replaces the reference after n_epochs of each stage"),
        (["loss=rdpo", "loss.label_smoothing=0.5"], "loss.label_smoothing=0.5: must be less than 0.5"),
        (["loss=kto", "loss.z0=1"], "loss.z0=1: must be"),
        (["reference.mixup=0"], "reference.mixup=0: must be greater than 0"),
        (["loss=sdpo_stepwise", "loss.parts=1"], "loss.parts=1: must be greater than or equal to 2"),
    ],
)
def test_options_that_exclude_each_other(overrides, message):
    with pytest.raises(UserError, match=message):
        check_config(compose("exp_name=x", *overrides))


def test_tdpo2_with_alpha_0_is_reported_as_dpo():
    assert "loss=tdpo2 with loss.alpha=0 is DPO" in check_config(compose("exp_name=x", "loss=tdpo2", "loss.alpha=0")).notes
