"""Truncation, batch elements, the order of the examples, global batches and microbatches."""

import random
import threading

import numpy as np
import pytest
import torch
from helpers import MINI, compose, tokenized

import train
from preference_datasets import default_options, tokenize_batch_element
from tdpo.data.batching import BatchStream, get_collate_fn, prefetched
from tdpo.data.split import TokenizedSplit
from tdpo.data.tokenization import truncate
from tdpo.losses import get_objective
from tdpo.microbatches import cut_into_microbatches
from tdpo.models.tokenizer import embedded_tokenizer
from tdpo.utils import UserError


@pytest.mark.parametrize(
    "prompt,responses,mode,expected",
    [
        (4, (3, 2), "keep_end", (range(4), 3, 2)),  # fits
        (8, (3, 2), "keep_end", (range(4, 8), 3, 2)),  # the prompt is cut to 4
        (8, (3, 2), "keep_start", (range(4), 3, 2)),
        (3, (9, 2), "keep_end", (range(3), 6, 2)),  # a short prompt stays; responses are cut to 10 - 4
        (9, (9, 7), "keep_start", (range(4), 6, 6)),
        (2, (1, 9), "keep_end", (range(2), 1, 6)),  # the rule goes by the longest response; all are cut to 10 - 4
    ],
)
def test_truncation(prompt, responses, mode, expected):
    cut_prompt, cut = truncate(list(range(prompt)), [list(range(n)) for n in responses], mode, 10, 4)
    assert cut_prompt == list(expected[0]) and [len(x) for x in cut] == list(expected[1:])


def test_truncation_keeps_the_beginning_of_sequence():
    assert truncate([99, 0, 1, 2, 3, 4], [[0] * 6], "keep_end", 10, 4, bos_token_id=99)[0] == [99, 2, 3, 4]
    assert truncate([99, 0, 1, 2, 3, 4], [[0] * 9], "keep_end", 10, 1, bos_token_id=99)[0] == [99]


def test_tokenize_batch_element(mini_tokenizer):
    element = tokenize_batch_element("wind help", " boat", " a lake", "keep_end", mini_tokenizer, 64, 32)
    prompt = mini_tokenizer("wind help")["input_ids"]
    chosen = [*mini_tokenizer(" boat")["input_ids"], mini_tokenizer.eos_token_id]
    assert element["chosen_input_ids"] == prompt + chosen and element["chosen_labels"] == [-100] * len(prompt) + chosen
    assert element["rejected_attention_mask"] == [1] * len(element["rejected_input_ids"])
    assert (element["chosen"], element["rejected_response_only"]) == ("wind help boat", " a lake")
    with pytest.raises(ValueError, match="end-of-sequence"):
        tokenize_batch_element("a", " b<|endoftext|>", " c", "keep_end", mini_tokenizer, 64, 32)
    with pytest.raises(ValueError, match="truncation_mode='keep_middle'"):
        tokenize_batch_element("a", " b", " c", "keep_middle", mini_tokenizer, 64, 32)


def test_collate_pads_prompts_on_the_left(mini_tokenizer):
    elements = [tokenize_batch_element(prompt, " b", " c d", "keep_end", mini_tokenizer, 64, 32) for prompt in ("wind", "wind help wide")]
    batch = get_collate_fn(mini_tokenizer)(elements)
    short, long = (len(element["prompt_input_ids"]) for element in elements)
    assert batch["prompt_attention_mask"].tolist()[0] == [0] * (long - short) + [1] * short
    assert batch["prompt_input_ids"][0, : long - short].eq(mini_tokenizer.pad_token_id).all()
    assert batch["chosen_labels"][0, -1] == -100 and batch["chosen_attention_mask"][0, -1] == 0
    assert batch["prompt"] == ["wind", "wind help wide"] and batch["chosen_input_ids"].dtype == torch.long


def contract(n_prompts: int, pairs: int = 1) -> dict:
    return {
        f"p{i}": {"responses": [f" a{i}"] * (2 * pairs), "pairs": [(2 * j, 2 * j + 1) for j in range(pairs)], "sft_target": f" a{i}"}
        for i in range(n_prompts)
    }


def make_split(tokenizer, n_prompts=10, pairs=1, sft_mode=False, **options) -> TokenizedSplit:
    data = (contract(n_prompts, pairs), default_options("jsonl"))
    return tokenized({"jsonl": data}, tokenizer, sft_mode=sft_mode, **options)


def test_beginning_of_sequence_is_added_once(chat_tokenizer):
    split = make_split(chat_tokenizer, add_bos=True)
    assert all(entry["prompt_ids"].count(130) == 1 and entry["prompt_ids"][0] == 130 for entry in split.prompts)
    data = {"<|bos|>p": {"responses": [" a", " b"], "pairs": [(0, 1)], "sft_target": " a"}}
    split = tokenized({"jsonl": (data, default_options("jsonl"))}, chat_tokenizer, add_bos=True)
    assert split.prompts[0]["prompt_ids"].count(130) == 1


def test_training_uses_the_models_add_bos(mini_tokenizer):
    """Also for prompts that are cut at their start; loaded as train.py does."""
    options = [f"model.name_or_path={MINI}/model", "datasets=[hh]", f"datasets.hh.path={MINI}/data", "max_length=24", "max_prompt_length=6"]
    for add_bos in (True, False):
        config = compose("exp_name=x", "model=blank_model", *options, f"model.add_bos={add_bos}")
        split = train.load_data(config, "train", mini_tokenizer, get_objective("dpo", beta=0.1), None)
        starts = {split.element(example)["prompt_input_ids"][0] for example in next(split.epochs(0))}
        cut = [split.element(example)["prompt_input_ids"] for example in next(split.epochs(0))]
        assert (starts == {mini_tokenizer.bos_token_id}) == add_bos and min(len(ids) for ids in cut) == 6


# --- batches ---


def test_each_epoch_has_every_example_once_in_a_new_order(mini_tokenizer):
    split = make_split(mini_tokenizer, n_prompts=12, pairs=2)
    batches = list(BatchStream(split, batch_size=8, seed=1, n_epochs=2))
    assert [len(batch) for batch in batches] == [8] * 6 and len(BatchStream(split, 8, 1, n_epochs=2)) == 6
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert set(first) == set(second) and len(set(first)) == 24 and first != second
    assert [x.prompt for x in first[::2]] == [x.prompt for x in first[1::2]]  # a prompt's pairs stay together, as published


def test_the_order_is_a_function_of_the_seed(mini_tokenizer):
    split = make_split(mini_tokenizer)
    orders = [next(split.epochs(seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    unshuffled = next(split.epochs(0, shuffle=False))
    assert [example.prompt for example in unshuffled] == list(range(10))


@pytest.mark.parametrize(
    "options,sizes",
    [
        ({"n_epochs": 2}, [4, 4, 4, 4]),
        ({"n_epochs": 2, "drop_last": False}, [4, 4, 2, 4, 4, 2]),
        ({"n_examples": 9}, [4, 4, 4]),  # the last batch is whole
        ({"n_examples": 9, "n_epochs": 1}, [4, 4]),
        ({"n_examples": 11, "drop_last": False}, [4, 4, 2, 4]),
    ],
)
def test_batch_sizes(options, sizes, mini_tokenizer):
    stream = BatchStream(make_split(mini_tokenizer), batch_size=4, seed=0, **options)
    assert [len(batch) for batch in stream] == sizes and len(stream) == len(sizes)
    assert stream.dropped == (0 if options.get("drop_last") is False else 2)
    assert BatchStream(make_split(mini_tokenizer), batch_size=4, seed=0, n_examples=4).dropped == 0  # no epoch ends


def test_a_split_smaller_than_a_batch_is_an_error(mini_tokenizer):
    with pytest.raises(UserError, match="fewer than batch_size=16"):
        BatchStream(make_split(mini_tokenizer), 16, seed=0, n_examples=100)
    with pytest.raises(UserError, match="both null"):
        BatchStream(make_split(mini_tokenizer), 4, seed=0)


def test_sft_has_one_example_per_prompt(mini_tokenizer):
    split = make_split(mini_tokenizer, pairs=3, sft_mode=True)
    element = split.element(next(split.epochs(0))[0])
    assert len(split) == 10 and not any("rejected" in key for key in element)


def test_describe_counts_examples_and_truncations(mini_tokenizer):
    data = contract(2)
    data["wind " * 60] = {"responses": [" b " * 60, " c"], "pairs": [(0, 1)], "sft_target": " c"}
    split = tokenized({"jsonl": (data, default_options("jsonl"))}, mini_tokenizer)
    element = split.element([x for x in next(split.epochs(0)) if x.prompt == 2][0])
    assert len(element["chosen_input_ids"]) == 64 and len(element["prompt_input_ids"]) == 32
    assert "3 pairs of 3 prompts" in split.describe() and "1 prompt and 1 response truncated" in split.describe()


def test_unknown_words_are_counted():
    """Hundreds of unknown words mean that the tokenizer belongs to another task."""
    tokenizer = embedded_tokenizer()
    data = {"this drama": {"responses": [" was splendiferous", " was good"], "pairs": [(0, 1)], "sft_target": " was good"}}
    split = tokenized({"jsonl": (data, default_options("jsonl"))}, tokenizer)
    assert split.describe().endswith("1 tokens are unknown to the tokenizer")


def test_the_order_is_the_published_one(mini_tokenizer):
    """A draw of NumPy's legacy generator below 2**31 seeds each epoch's shuffle of the order before."""
    split = make_split(mini_tokenizer, n_prompts=20)
    seeds = np.random.RandomState(3).randint(0, 2**31, size=1_000_000)
    expected = list(range(20))
    for epoch, seed in zip(split.epochs(3), seeds[:3]):
        random.Random(int(seed)).shuffle(expected)
        assert [example.prompt for example in epoch] == expected


# --- microbatches ---


def lengths(n: int) -> list[int]:
    """Return n example lengths with a long tail, as dialogues have."""
    return np.random.RandomState(n).geometric(0.01, n).clip(4, 600).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("n", [64, 61])
def test_microbatches_of_about_equal_cost(n, parts, ranks):
    """Every example once, equally many microbatches per rank, and the largest cost is the least that cutting the sorted examples allows."""
    sizes = lengths(n)
    rounds = cut_into_microbatches(sizes, ranks, parts)
    assert len(rounds) == parts and all(len(some) == ranks for some in rounds)
    assert sorted(i for some in rounds for part in some for i in part) == list(range(n))
    descending = sorted(sizes, reverse=True)
    least = [0.0] + [float("inf")] * n  # least[i]: the largest cost when the first i examples are cut into the parts so far
    for _ in range(parts * ranks):
        least = [0.0] + [min(max(least[j], (i - j) * descending[j]) for j in range(i)) for i in range(1, n + 1)]
    assert max(len(part) * max(sizes[i] for i in part) for some in rounds for part in some) == least[n]


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("tokens", [1, 300, 2000, 10**6])
def test_microbatches_within_a_token_budget(tokens, ranks):
    sizes = lengths(64)
    rounds = cut_into_microbatches(sizes, ranks, microbatches=3, budget=tokens)  # microbatches is ignored
    assert all(len(some) == ranks for some in rounds)
    assert sorted(i for some in rounds for part in some for i in part) == list(range(64))
    for part in (part for some in rounds for part in some):
        assert len(part) <= 1 or len(part) * max(sizes[i] for i in part) <= tokens
    if tokens == 10**6:
        assert len(rounds) == 1
    if tokens == 1:
        assert len(rounds) == 64 // ranks


def test_fewer_examples_than_microbatches():
    """A rank without an example gets an empty microbatch; a round without any example is omitted."""
    assert cut_into_microbatches([5, 9, 7], ranks=2, microbatches=4) == [[[1], [2]], [[0], []]]
    assert cut_into_microbatches([5], ranks=2, microbatches=1) == [[[0], []]]


def test_the_next_item_is_prepared_while_this_one_is_used():
    started, used = [], threading.Event()

    def prepare(item):
        started.append(item)
        if item == 2:
            assert used.wait(10)  # the caller uses item 1 meanwhile
        return item * 10

    results = []
    for item, prepared in prefetched(prepare, iter([1, 2, 3])):
        results.append((item, prepared))
        used.set()
    assert results == [(1, 10), (2, 20), (3, 30)] and started == [1, 2, 3]
    assert list(prefetched(prepare, [])) == []
    with pytest.raises(ZeroDivisionError):  # raised when the item is used
        list(prefetched(lambda item: 1 / item, [1, 0]))


def test_the_thread_that_prepares_uses_the_gpu_of_its_process(monkeypatch):
    """PyTorch gives every new thread GPU 0, where a batch of another rank would make a context of its own."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [value for _, value in prefetched(lambda item: (item, list(chosen)), [1, 2])] == [(1, [3]), (2, [3])]
