"""The embedded task: short film reviews from a small grammar, with a known reward. It needs no network.

It stands in for the controlled-sentiment experiment of the DPO and TDPO papers (IMDb reviews and a sentiment classifier). A review
begins with a neutral prompt and continues with a few clauses that praise or blame. Its gold reward is P(positive), a logistic function
of its sentiment words, so every text has an exact reward, also one sampled from a model.
"""

import math
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

# Sentiment words and their weights, in units of the logit of P(positive).
POSITIVE = {
    "decent": 0.4, "solid": 0.5, "pleasant": 0.5, "good": 0.6, "warm": 0.6, "fresh": 0.6, "clever": 0.7, "charming": 0.8, "moving": 0.8,
    "great": 0.9, "gripping": 0.9, "lovely": 0.9, "wonderful": 1.1, "superb": 1.2, "brilliant": 1.3, "masterful": 1.4,
    "liked": 0.6, "enjoyed": 0.8, "admired": 0.8, "loved": 1.2, "recommend": 1.0, "laughed": 0.5, "smiled": 0.5,
}  # fmt: skip
NEGATIVE = {
    "slow": -0.4, "plain": -0.4, "uneven": -0.5, "bland": -0.6, "weak": -0.6, "clumsy": -0.7, "stale": -0.7, "dull": -0.8, "messy": -0.8,
    "bad": -0.9, "boring": -0.9, "lazy": -0.9, "painful": -1.1, "terrible": -1.2, "dreadful": -1.3, "awful": -1.4,
    "disliked": -0.6, "regretted": -0.8, "endured": -0.8, "hated": -1.2, "avoid": -1.0, "yawned": -0.5, "sighed": -0.5,
}  # fmt: skip
LEXICON = {**POSITIVE, **NEGATIVE}
NEGATIONS = ("not", "never", "hardly")  # flip the sign of a sentiment word within the next two words
INTENSIFIERS = {"very": 1.5, "truly": 1.5, "rather": 0.7}  # scale the sentiment word right after them

GENRES = "drama comedy thriller western musical romance mystery documentary".split()
SETTINGS = "sea city farm school prison island theatre desert hospital village kitchen circus".split()
ORIGINS = "french korean danish indian mexican british italian polish".split()
COMPANIONS = "brother sister friend father mother neighbour teacher class".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
ASPECTS = "plot script acting music pacing ending dialogue camera cast story humour editing".split()
OPENERS = (
    "this {origin} {genre} about a {setting}",
    "on {day} i saw the {origin} {genre}",
    "my {companion} chose a {genre} set in a {setting}",
    "the {genre} that my {companion} lent me on {day}",
    "a {origin} {genre} from the {setting} festival",
    "i watched this {genre} with my {companion}",
)
ADJECTIVES = {sign: [w for w in words if not w.endswith("ed") and w not in ("recommend", "avoid")] for sign, words in
              (("positive", POSITIVE), ("negative", NEGATIVE))}  # fmt: skip
VERBS = {"positive": ("liked", "enjoyed", "admired", "loved"), "negative": ("disliked", "regretted", "endured", "hated")}
REACTIONS = {"positive": ("laughed", "smiled"), "negative": ("yawned", "sighed")}
VERDICTS = {"positive": "recommend", "negative": "avoid"}
OPPOSITE = {"positive": "negative", "negative": "positive"}
AGREEMENT = 0.75  # probability that a clause has the review's own sentiment
PUNCTUATION = (".", ",", "and", "but")


class ReviewPair(NamedTuple):
    """Two reviews with the same prompt. Rewards are P(positive) of prompt + response, the chosen one's first."""

    prompt: str
    chosen: str
    rejected: str
    sft_target: str  # the response that was written first, so SFT learns the grammar but not the reward
    rewards: tuple[float, float]


def gold_reward(text: str) -> float:
    """Return P(positive) of a review, in (0, 1): the logistic function of the sum of its sentiment words' weights.

    A negation up to two words before a sentiment word flips its sign; an intensifier right before it scales it. Unknown words count 0, so
    any text has a reward; without sentiment words it is 0.5.
    """
    words = re.findall(r"[a-z]+", text.lower())
    score = 0.0
    for i, word in enumerate(words):
        weight = LEXICON.get(word, 0.0)
        if i and words[i - 1] in INTENSIFIERS:
            weight *= INTENSIFIERS[words[i - 1]]
        if any(w in NEGATIONS for w in words[max(0, i - 2) : i]):
            weight = -weight
        score += weight
    return 1 / (1 + math.exp(-score))


def review_pairs(split: str, n_pairs: int, seed: int, min_margin: float) -> Iterator[ReviewPair]:
    """Yield seeded pairs whose rewards differ by at least min_margin. Each prompt occurs once, and the splits share no prompt.

    Args:
        split: train or test.
        n_pairs: number of pairs, at most `len(prompts_of(split, seed))`.
        seed: of prompts and reviews.
        min_margin: least difference of the two rewards, in (0, 1).

    Raises:
        ValueError: n_pairs exceeds the number of prompts.
    """
    prompts = prompts_of(split, seed)
    if n_pairs > len(prompts):
        raise ValueError(f"n_pairs={n_pairs} exceeds the {len(prompts)} {split} prompts of the grammar")
    rng = random.Random(f"{seed}/{split}")
    for prompt in prompts[:n_pairs]:
        first = _response(rng)
        reward = gold_reward(prompt + first)
        while True:
            second = _response(rng)
            other = gold_reward(prompt + second)
            if abs(reward - other) >= min_margin:
                break
        chosen, rejected = (first, second) if reward > other else (second, first)
        yield ReviewPair(prompt, chosen, rejected, first, (max(reward, other), min(reward, other)))


def prompts_of(split: str, seed: int) -> list[str]:
    """Return the prompts of a split, in seeded order. One prompt in eight is a test prompt, whatever the seed."""
    every = [prompt for opener in OPENERS for prompt in _expand(opener)]
    random.Random("split").shuffle(every)
    n_test = len(every) // 8
    prompts = every[:n_test] if split == "test" else every[n_test:]
    random.Random(f"{seed}/prompts").shuffle(prompts)
    return prompts


def vocabulary() -> list[str]:
    """Return every word that the grammar can write, sorted."""
    words = set(LEXICON) | set(NEGATIONS) | set(INTENSIFIERS) | set(PUNCTUATION) | set(ASPECTS)
    words |= {word for opener in OPENERS for prompt in _expand(opener) for word in prompt.split()}
    words |= set("was the it i felt at end would".split())
    return sorted(words)


def _expand(opener: str) -> Iterator[str]:
    slots = {"origin": ORIGINS, "genre": GENRES, "setting": SETTINGS, "day": DAYS, "companion": COMPANIONS}
    texts = [opener]
    for slot, words in slots.items():
        if "{" + slot + "}" in opener:
            texts = [text.replace("{" + slot + "}", word) for text in texts for word in words]
    return iter(texts)


def _response(rng: random.Random) -> str:
    """Write two to five clauses, mostly of one sentiment: ' was dull . i yawned , but the cast was rather good .'."""
    sentiment = rng.choice(("positive", "negative"))
    clauses = [f"was {_judgement(rng, _mostly(rng, sentiment))}"]
    for _ in range(rng.randint(1, 4)):
        clauses.append(rng.choice((".", ".", ", and", ", but")))  # words and punctuation are separated by spaces
        clauses.append(_clause(rng, _mostly(rng, sentiment)))
    return " " + " ".join(clauses) + " ."


def _mostly(rng: random.Random, sentiment: str) -> str:
    return sentiment if rng.random() < AGREEMENT else OPPOSITE[sentiment]


def _judgement(rng: random.Random, sentiment: str) -> str:
    """Write an adjective phrase of that sentiment: 'very good', 'not dull', 'weak'."""
    draw = rng.random()
    if draw < 0.15:
        return f"{rng.choice(NEGATIONS)} {rng.choice(ADJECTIVES[OPPOSITE[sentiment]])}"
    intensifier = f"{rng.choice(sorted(INTENSIFIERS))} " if draw < 0.4 else ""
    return intensifier + rng.choice(ADJECTIVES[sentiment])


def _clause(rng: random.Random, sentiment: str) -> str:
    draw = rng.random()
    aspect = rng.choice(ASPECTS)
    if draw < 0.55:
        return f"the {aspect} {rng.choice(('was', 'felt'))} {_judgement(rng, sentiment)}"
    if draw < 0.75:
        return f"i {rng.choice(VERBS[sentiment])} the {aspect}"
    if draw < 0.9:
        return f"i {rng.choice(REACTIONS[sentiment])} at the end"
    return f"i would {VERDICTS[sentiment]} it"
