"""The embedded task: its reward is the documented function, and its data are seeded, with disjoint splits."""

import math

import pytest

from tdpo.data import reviews
from tdpo.models.tokenizer import embedded_tokenizer


def logistic(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    "text,logit",
    [
        ("this french drama", 0.0),
        ("this drama was good .", 0.6),
        ("this drama was not good .", -0.6),
        ("i never really liked it", -0.6),  # a negation reaches two words
        ("not a very good plot", 0.6 * 1.5),  # and no further
        ("it was very dull and rather charming", -0.8 * 1.5 + 0.8 * 0.7),
        ("i would avoid it . i hated the plot", -1.0 - 1.2),
        ("Not Bad!", 0.9),  # any text has a reward
        ("", 0.0),
    ],
)
def test_gold_reward(text, logit):
    assert reviews.gold_reward(text) == pytest.approx(logistic(logit), rel=1e-12)


def test_pairs():
    pairs = list(reviews.review_pairs("train", 500, seed=0, min_margin=0.3))
    for pair in pairs:
        rewards = tuple(reviews.gold_reward(pair.prompt + text) for text in (pair.chosen, pair.rejected))
        assert rewards == pair.rewards and rewards[0] - rewards[1] >= 0.3
        assert reviews.gold_reward(pair.prompt) == 0.5 and pair.sft_target in (pair.chosen, pair.rejected)
        assert pair.chosen.startswith(" ") and pair.chosen.endswith(" .") and "  " not in pair.chosen
    assert pairs == list(reviews.review_pairs("train", 500, seed=0, min_margin=0.3))
    assert pairs != list(reviews.review_pairs("train", 500, seed=1, min_margin=0.3))
    # SFT targets are no more often chosen than rejected, so SFT does not learn the preference.
    assert 0.45 < sum(pair.sft_target == pair.chosen for pair in pairs) / len(pairs) < 0.55


def test_splits_share_no_prompt():
    train, test = (reviews.prompts_of(split, seed=0) for split in ("train", "test"))
    assert (len(train), len(test)) == (2856, 408)  # the figures of config/datasets/reviews.yaml
    assert len(set(train) | set(test)) == len(train) + len(test)
    assert set(reviews.prompts_of("test", seed=5)) == set(test)  # whatever the seed
    with pytest.raises(ValueError, match="408 test prompts"):
        next(reviews.review_pairs("test", 409, seed=0, min_margin=0.3))


def test_the_tokenizer_has_every_word():
    tokenizer = embedded_tokenizer()
    texts = [pair.prompt + text for pair in reviews.review_pairs("train", 1000, 0, 0.3) for text in (pair.chosen, pair.rejected)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer.batch_decode(ids) == texts
    assert max(map(len, ids)) < 64  # config/model/tiny.yaml
