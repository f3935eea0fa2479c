"""Rewards of texts: the gold reward of a dataset, the probability that a classifier gives, or the sentiment by VADER's word list."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Optional

import torch
import transformers

from tdpo.data import reviews
from tdpo.data.sources import Place, read_rows
from tdpo.utils import UserError

GOLD = {"reviews": reviews.gold_reward}  # dataset name -> reward of one text
BATCH = 64  # texts per forward pass of the classifier
VADER = "vader"  # the name of VADER's reward


class Reward(NamedTuple):
    """A reward, and what it is computed from."""

    function: Callable[[Sequence[str]], list[float]]  # texts -> one reward per text
    of_completion: bool = False  # it sees the completion alone; otherwise prompt and completion

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return self.function(texts)

    def of(self, rows: Sequence[Mapping]) -> list[float]:
        """Return the reward of each row.

        Args:
            rows: with prompt and completion, as of sampling.sample_batch.
        """
        return self.function([row["completion"] if self.of_completion else row["prompt"] + row["completion"] for row in rows])


def gold_reward_of(datasets: Sequence[str]) -> Optional[Reward]:
    """Return the gold reward that the datasets share; None if one has no gold reward, or they have different ones."""
    functions = {GOLD.get(name) for name in datasets}
    function = functions.pop() if len(functions) == 1 else None
    return None if function is None else Reward(lambda texts: [function(text) for text in texts])


def reward_model(name: str, device: torch.device, cache_dir: Optional[str]) -> Reward:
    """Return a reward by name: a classifier's P(positive), or VADER's sentiment.

    Args:
        name: a sequence classifier with two labels on the Hugging Face hub or in a folder; or logistic:<data>, a logistic regression on
            words and word pairs, fitted to the train rows {text, label} of a file, a folder or a dataset on the hub; or vader.
        device: where the classifier runs.
        cache_dir: where downloads are kept.

    Raises:
        UserError: the classifier cannot be loaded or fitted, or VADER is not installed.
    """
    if name == VADER:
        return _vader()
    if name.startswith("logistic:"):
        return _logistic(name.removeprefix("logistic:"), cache_dir)
    try:
        options = {"top_k": None, "truncation": True, "trust_remote_code": False, "model_kwargs": {"cache_dir": cache_dir}}
        classify = transformers.pipeline("text-classification", name, device=device, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"reward={name} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    labels = classify.model.config.id2label
    if len(labels) != 2:
        raise UserError(f"reward={name} has {len(labels)} labels: give a classifier with two, negative and positive")
    positive = next((label for label in labels.values() if "POS" in label.upper()), labels[1])  # by convention label 1, if no name tells

    def rewards(texts: Sequence[str]) -> list[float]:
        scored = classify(list(texts), batch_size=BATCH)
        return [next(entry["score"] for entry in entries if entry["label"] == positive) for entries in scored]

    return Reward(rewards)


def _vader() -> Reward:
    """Return VADER's compound sentiment (Hutto and Gilbert, 2014), mapped from [-1, 1] to [0, 1]; 0.5 is neutral.

    It sees the completion alone: the words of a request to write a review are not the review's.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # here, because it is an extra; its word list comes with it
    except ImportError:
        raise UserError("reward=vader needs the package vaderSentiment: pip install vaderSentiment") from None
    analyzer = SentimentIntensityAnalyzer()
    return Reward(lambda texts: [(1 + analyzer.polarity_scores(text)["compound"]) / 2 for text in texts], of_completion=True)


def _logistic(path: str, cache_dir: Optional[str]) -> Reward:
    from sklearn.feature_extraction.text import TfidfVectorizer  # here, because importing it takes seconds
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = [row.fields or {} for row in read_rows(Place(path, cache_dir=cache_dir), "train")]
    examples = [(row["text"], row["label"]) for row in rows if isinstance(row.get("text"), str) and row.get("label") in (0, 1)]
    if len({label for _, label in examples}) < 2:
        raise UserError(f"reward=logistic:{path} lacks examples of both labels: it needs rows {{text, label}} with labels 0 and 1")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000))
    try:
        model.fit(*zip(*examples))
    except ValueError as error:
        raise UserError(f"reward=logistic:{path} cannot be fitted: {error}") from None
    return Reward(lambda texts: model.predict_proba(list(texts))[:, 1].tolist())
