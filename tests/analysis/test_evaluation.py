"""Measures compared with calculations by hand, and with an exact enumeration of all texts of a model."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from tdpo.analysis.evaluation import (
    distinct,
    estimate,
    measure_diversity,
    measure_pairs,
    measure_samples,
    measure_whole_texts,
    of_responses,
    score_samples,
    self_bleu,
)
from tdpo.analysis.rewards import gold_reward_of, reward_model
from tdpo.data.reviews import gold_reward
from tdpo.data.split import TokenizedExample
from tdpo.losses import get_objective
from tdpo.microbatches import Packing
from tdpo.scoring.token_statistics import token_statistics
from tdpo.utils import UserError, disable_dropout


class Fixed(torch.nn.Module):
    """A model that predicts the same next-token distribution at every position."""

    def __init__(self, *probabilities: float):
        super().__init__()
        self.logits = torch.tensor(probabilities, dtype=torch.float64).log()
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, use_cache):
        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, -1))


P, Q = (0.5, 0.25, 0.25), (0.8, 0.1, 0.1)
KL = sum(q * math.log(q / p) for p, q in zip(P, Q))  # KL(reference || policy), as in SeqKL
REVERSE = sum(p * math.log(p / q) for p, q in zip(P, Q))
ENTROPY = -sum(p * math.log(p) for p in P)


def test_statistics_of_a_token_by_hand():
    statistics = token_statistics(Fixed(*P), Fixed(*Q), [([0, 1], [[0, 1], [2]])], fast=False)
    expected = {
        "logps": [math.log(0.5), math.log(0.25), math.log(0.25)],
        "entropy": [ENTROPY] * 3,
        "reference_logps": [math.log(0.8), math.log(0.1), math.log(0.1)],
        "kl": [KL] * 3,
        "reverse_kl": [REVERSE] * 3,
    }
    assert statistics._asdict() == {name: pytest.approx(values) for name, values in expected.items()}
    alone = token_statistics(Fixed(*P), None, [([0], [[0]])], fast=False)
    assert alone.kl is None and alone.entropy.item() == pytest.approx(ENTROPY)


def rows(*prompts_and_texts) -> list[dict]:
    return [
        {"prompt": "p", "completion": text, "prompt_ids": prompt, "completion_ids": ids, "index": i, "sample": j}
        for i, (prompt, texts) in enumerate(prompts_and_texts)
        for j, (text, ids) in enumerate(texts)
    ]


def test_measures_of_samples_by_hand():
    """Two prompts (2 tokens and 1 token) with two texts each (1 and 3 tokens; 2 and 2 tokens)."""
    texts = rows(([0, 1], [(" good", [0]), (" bad", [1, 1, 1])]), ([2], [(" good", [0, 2]), (" good", [2, 2])]))
    table = score_samples(Fixed(*P), Fixed(*Q), texts, False, 16)
    measures = measure_samples(table, [float(row["completion"] == " good") for row in texts])
    means = {name: values for name, (values, _) in measures.items()}
    assert means["samples/reward"] == pytest.approx([0.5, 1.0])
    assert means["samples/tokens"] == pytest.approx([2.0, 2.0])
    assert means["samples/kl"] == pytest.approx([2 * REVERSE, 2 * REVERSE])
    assert means["samples/entropy"] == pytest.approx([ENTROPY] * 2)
    assert means["samples/reference_nll"] == pytest.approx([-(math.log(0.8) + 3 * math.log(0.1)) / 4] * 2)
    assert measures["samples/reference_nll"][1].tolist() == [1 + 3, 2 + 2]
    values, tokens = measure_whole_texts(Fixed(*P), texts, table, False, 16)["samples/entropy_fdpo"]
    assert tokens.tolist() == [2 + 4, 2 + 2]  # every token except the first of each text
    assert values == pytest.approx([ENTROPY] * 2)


class ByToken(Fixed):
    """A model whose next-token distribution depends on the last token: one row of the table per token."""

    def __init__(self, *table: tuple[float, ...]):
        super().__init__(*table[0])
        self.table = torch.tensor(table, dtype=torch.float64).log()

    def forward(self, input_ids, attention_mask, use_cache):
        return CausalLMOutput(logits=self.table[input_ids])


def test_measures_of_pairs_by_hand():
    """Two pairs with prompt [0]. The policy predicts P after token 0, otherwise Q; the reference predicts Q after token 0, otherwise P."""
    policy, reference = ByToken(P, Q, Q), ByToken(Q, P, P)
    pairs = {"a": TokenizedExample([0], [[1, 1], [0]], None, []), "b": TokenizedExample([0], [[0], [1, 1]], None, [])}
    split = SimpleNamespace(example=pairs.__getitem__)
    objective = get_objective("tdpo2", beta=0.5, alpha=0.5)
    found = measure_pairs(policy, reference, objective, split, ["a", "b"], False, 1)
    # Response [1, 1]: log-ratios log(P1/Q1) and log(Q1/P1), sum 0; its two KL terms are in both directions. Response [0]: log(P0/Q0) < 0.
    one = math.log(0.5 / 0.8)
    two_tokens = KL + REVERSE
    assert found["logratio/chosen"] == pytest.approx([0, one]) and found["logratio/rejected"] == pytest.approx([one, 0])
    assert found["seqkl/chosen"] == pytest.approx([two_tokens, KL]) and found["seqkl/rejected"] == pytest.approx([KL, two_tokens])
    assert found["seqkl/margin"] == pytest.approx([REVERSE, -REVERSE])
    assert found["reverse_seqkl/chosen"] == pytest.approx([two_tokens, REVERSE])
    assert found["reverse_seqkl/rejected"] == pytest.approx([REVERSE, two_tokens])
    assert found["accuracy/logratio"].tolist() == [True, False]
    assert found["accuracy/reward"].tolist() == [two_tokens > one + KL, one + KL > two_tokens] == [True, False]
    trained = [-one - 0.5 * (KL - two_tokens), one - 0.5 * (two_tokens - KL)]
    assert found["accuracy/logit"].tolist() == [value > 0 for value in trained]
    assert "accuracy/logit" not in measure_pairs(policy, reference, None, split, ["a"], False, 1)


def test_entropy_is_averaged_per_text_then_over_texts():
    """Each text counts equally, whatever its length; f-DPO's entropy averages over all tokens together."""

    class Doubling(Fixed):
        """A model with entropy 0 after token 0, and a uniform distribution over three tokens after any other."""

        def forward(self, input_ids, attention_mask, use_cache):
            sure, unsure = torch.tensor([0.0, -math.inf, -math.inf]).double(), torch.zeros(3).double()
            return CausalLMOutput(logits=torch.where((input_ids == 0).unsqueeze(-1), sure, unsure))

    texts = rows(([1], [("a", [0, 0, 0, 0]), ("b", [1, 1])]))
    table = score_samples(Doubling(*P), None, texts, False, 16)
    measures = measure_samples(table, None)
    assert measures["samples/entropy"][0] == pytest.approx([(math.log(3) / 4 + math.log(3)) / 2])
    values, weights = measure_whole_texts(Doubling(*P), texts, table, False, 16)["samples/entropy_fdpo"]
    assert values == pytest.approx([3 * math.log(3) / 6]) and weights.tolist() == [6]
    assert set(measures) == {"samples/entropy", "samples/tokens"}


@pytest.mark.parametrize("fast", [False, True])
def test_estimates_against_enumeration(fast):
    """All texts of at most three tokens with a vocabulary of five. The expected sum of the KL (entropy) over positions equals the KL
    (entropy) of whole texts, and means over samples lie within four standard errors of the exact values."""

    def model(seed):
        torch.manual_seed(seed)
        config = AutoConfig.for_model("gpt_neox", **{**FAMILIES["gpt_neox"], "vocab_size": 5, "bos_token_id": 0, "eos_token_id": 0})
        built = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        disable_dropout(built)
        return built.eval()

    policy, reference = model(0), model(1)
    every = [[*start, 0] for n in range(3) for start in itertools.product(range(1, 5), repeat=n)]  # ended by token 0
    every += [list(text) for text in itertools.product(range(1, 5), repeat=3)]  # or by the length
    table = of_responses(token_statistics(policy, reference, [([3, 1], [text]) for text in every], fast), list(map(len, every)))
    p = np.exp(table["logps"])
    assert p.sum() == pytest.approx(1, abs=1e-6)
    exact_kl = (p * (table["logps"] - table["reference_logps"])).sum()
    exact_entropy = -(p * table["logps"]).sum()
    assert (p * table["reverse_kl"]).sum() == pytest.approx(exact_kl, rel=1e-5) and exact_kl > 0.1
    assert (p * table["entropy"]).sum() == pytest.approx(exact_entropy, rel=1e-5)

    drawn = np.random.default_rng(0).choice(len(every), size=2000, p=p / p.sum())
    texts = rows(*(([3, 1], [("", every[i])]) for i in drawn))
    measures = measure_samples(score_samples(policy, reference, texts, fast, 500), None)
    kl = measures["samples/kl"][0]
    assert abs(kl.mean() - exact_kl) < 4 * kl.std() / len(kl) ** 0.5
    per_token = (p * table["entropy"] / np.array(list(map(len, every)))).sum()
    entropy = measures["samples/entropy"][0]
    assert abs(entropy.mean() - per_token) < 4 * entropy.std() / len(entropy) ** 0.5


@pytest.mark.parametrize("fast", [False, True, Packing(1e-6, 1000)])
def test_the_entropy_of_whole_texts_scores_each_prompt_once(fast):
    """It is that of every token of every text, from the logits of the texts one by one; prompts of one token have none of their own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **FAMILIES["llama"])
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    texts = rows(([3, 4, 5, 9], [("", [6, 7]), ("", [8])]), ([9], [("", [10]), ("", [11, 12])]), ([7, 2], [("", [1, 1, 1]), ("", [4])]))
    values, tokens = measure_whole_texts(policy, texts, score_samples(policy, None, texts, fast, 2), fast, 2)["samples/entropy_fdpo"]
    with torch.no_grad():
        of_texts = [policy(torch.tensor([row["prompt_ids"] + row["completion_ids"]])).logits[0, :-1] for row in texts]
    entropies = [torch.distributions.Categorical(logits=torch.cat(of_texts[i : i + 2])).entropy() for i in (0, 2, 4)]
    assert tokens.tolist() == [5 + 4, 1 + 2, 4 + 2] == [len(each) for each in entropies]
    assert values == pytest.approx([each.mean().item() for each in entropies], rel=1e-5)
    assert np.ptp(values) > 0.01


def test_fast_and_plain_statistics_agree():
    torch.manual_seed(0)
    models = [AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **FAMILIES["llama"])).eval() for _ in range(2)]
    examples = [([3, 4, 5], [[6, 7], [8]]), ([9], [[10], [11, 12, 13, 14]])]
    fast, packed, plain = (token_statistics(*models, examples, fast=x) for x in (True, Packing(1e-6, 1000), False))
    for ours, rows, theirs in zip(fast, packed, plain):
        assert torch.allclose(ours, theirs, atol=1e-5) and torch.allclose(rows, theirs, atol=1e-5)


def test_intervals():
    """The bootstrap interval is close to the normal one, weights are used, and a single example has no interval."""
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = estimate(values)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean()) and found.examples == 400
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert estimate(np.array([1.0, 4.0]), np.array([3.0, 1.0])).mean == pytest.approx(1.75)
    assert math.isnan(estimate(np.array([1.0])).low)


def test_diversity_by_hand():
    assert distinct([["a", "b", "a"], ["a", "b"]], 1) == 2 / 5 and distinct([["a", "b", "a"], ["a", "b"]], 2) == 2 / 3
    assert distinct([["a"]], 2) == 1.0
    assert self_bleu(["the same four words"] * 3) == pytest.approx(100) and self_bleu(["one two three", "four five six"]) == 0
    texts = rows(([0], [("a b", [1]), ("a b", [1])]), ([0], [("c", [1]), ("d", [1])]))
    measures = {name: values.tolist() for name, (values, _) in measure_diversity(texts).items()}
    assert measures["samples/distinct_1"] == [0.5, 1.0] and measures["samples/self_bleu"][1] == 0


def test_rewards(tmp_path):
    text = "this drama was very good ."
    assert gold_reward_of(["reviews"])([text]) == [gold_reward(text)]
    assert gold_reward_of(["hh"]) is None and gold_reward_of(["reviews", "hh"]) is None
    data = tmp_path / "train.jsonl"
    words = {1: ["good", "great", "lovely"], 0: ["bad", "awful", "dull"]}
    data.write_text("".join(json.dumps({"text": f"a {word} film", "label": label}) + "\n" for label in (0, 1) for word in words[label] * 3))
    good, bad = reward_model(f"logistic:{data}", torch.device("cpu"), None)(["a great film", "an awful film"])
    assert good > 0.8 and bad < 0.2
    with pytest.raises(UserError, match="rows {text, label} with labels 0 and 1"):
        data.write_text(json.dumps({"text": "x", "label": 1}) + "\n")
        reward_model(f"logistic:{data}", torch.device("cpu"), None)
