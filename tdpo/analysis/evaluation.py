"""Measures of a trained model on pairs and on its own samples: one value per example, then the mean with its confidence interval.

log-ratio r = log pi(y|x) - log pi_ref(y|x); SeqKL = sum_t KL(pi_ref || pi); both in nats.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional, Union

import numpy as np
import sacrebleu
import scipy.stats
import torch
import tqdm
from torch import nn

from tdpo.data.split import Example, TokenizedSplit
from tdpo.losses import Objective, ResponseScores
from tdpo.microbatches import Packing
from tdpo.scoring.token_statistics import TokenStatistics, token_statistics
from tdpo.utils import batched

RESAMPLES = 1000  # of the bootstrap
LEVEL = 0.95  # of the confidence interval

# Meaning of each measure, in the order of the table.
MEASURES = {
    "accuracy/logratio": "pairs with r(chosen) > r(rejected)",
    "accuracy/reward": "pairs with r + SeqKL greater for chosen: rewards_*/accuracies of TDPO, as published",
    "accuracy/logit": "pairs whose trained logit is above 0",
    "logratio/chosen": "r of chosen, nats; below 0: less likely than by pi_ref",
    "logratio/rejected": "r of rejected, nats",
    "seqkl/chosen": "SeqKL of chosen, nats",
    "seqkl/rejected": "SeqKL of rejected, nats",
    "seqkl/margin": "chosen - rejected, nats",
    "reverse_seqkl/chosen": "sum_t KL(pi || pi_ref) of chosen, nats",
    "reverse_seqkl/rejected": "sum_t KL(pi || pi_ref) of rejected, nats",
    "samples/reward": "reward of the model's own texts",
    "samples/kl": "KL(pi || pi_ref) of whole responses, nats",
    "samples/reference_nll": "-log pi_ref of a token of the model's own texts, nats, mean over tokens; its exponential is a perplexity",
    "samples/entropy": "entropy of pi at a response token, nats, mean over a text's response tokens",
    "samples/entropy_fdpo": "the same, averaged over all tokens of all texts together, prompts included, as in f-DPO's code",
    "samples/tokens": "response tokens of a text",
    "samples/distinct_1": "distinct words of a prompt's texts / all their words",
    "samples/distinct_2": "the same for pairs of consecutive words",
    "samples/self_bleu": "BLEU of a text against the prompt's other texts, 0 to 100; lower is more diverse",
}


class Estimate(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float
    examples: int  # number of prompts

    def as_json(self) -> dict[str, Optional[float]]:
        """Return the fields by name, with None for NaN, which JSON does not have."""
        return {name: None if math.isnan(value) else value for name, value in self._asdict().items()}

    def __str__(self) -> str:
        digits = 1 if abs(self.mean) >= 100 else 2 if abs(self.mean) >= 10 else 3
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def by_prompt(values: np.ndarray, prompts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Average the pairs of each prompt, since pairs of one prompt are not independent examples.

    Args:
        values: one per pair.
        prompts: the prompt of each pair.

    Returns:
        (means, counts), one per prompt; the mean weighted by the counts equals the mean over pairs.
    """
    _, owner = np.unique(prompts, return_inverse=True)
    counts = np.bincount(owner)
    return np.bincount(owner, np.asarray(values, dtype=np.float64)) / counts, counts


def estimate(values: np.ndarray, weights: Optional[np.ndarray] = None, seed: int = 0) -> Estimate:
    """Return the mean with its percentile bootstrap interval; the interval of a single value is NaN.

    Args:
        values: one per prompt.
        weights: weight of each value in the mean; None: all equal.
        seed: seed of the bootstrap.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)

    def mean(v: np.ndarray, w: np.ndarray, axis: int = -1) -> np.ndarray:
        return (v * w).sum(axis) / w.sum(axis)

    whole = float(mean(values, weights))
    if len(values) < 2:
        return Estimate(whole, math.nan, math.nan, len(values))
    interval = scipy.stats.bootstrap(
        (values, weights), mean, paired=True, n_resamples=RESAMPLES, batch=50, confidence_level=LEVEL, method="percentile", rng=seed
    ).confidence_interval
    return Estimate(whole, float(interval.low), float(interval.high), len(values))


def of_responses(statistics: TokenStatistics, counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Sum the statistics over the tokens of each response, in float64.

    Args:
        statistics: of N tokens, each (N,), nats.
        counts: number of tokens of each response; their sum is N.

    Returns:
        statistic -> (number of responses,).
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    return {
        name: np.bincount(owner, values.double().cpu().numpy(), minlength=len(counts))
        for name, values in statistics._asdict().items()
        if values is not None
    }


def measure_pairs(
    policy: nn.Module,
    reference: nn.Module,
    objective: Optional[Objective],
    split: TokenizedSplit,
    examples: Sequence[Example],
    fast: Union[bool, Packing],
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Compute accuracies and divergences on pairs.

    Args:
        policy, reference: models on the same device.
        objective: the loss that the policy was trained with; None if unknown or not a loss on pairs: accuracy/logit is then left out.
        split: the tokenized data.
        examples: pairs of it.
        fast: score the responses of a prompt in one row, see `token_statistics`.
        batch_size: pairs at a time.

    Returns:
        measure -> one value per pair.
    """
    found: list[dict[str, np.ndarray]] = []
    for _, some in tqdm.tqdm(batched(examples, batch_size), "Scoring pairs", leave=False, disable=None):
        tokens = [split.example(example) for example in some]
        counts = [n for example in tokens for n in example.counts()]
        sums = of_responses(token_statistics(policy, reference, tokens, fast), counts)
        found.append({name: values.reshape(-1, 2) for name, values in {**sums, "tokens": np.array(counts)}.items()})
    table = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    ratio = table["logps"] - table["reference_logps"]
    with_kl = ratio + table["kl"]
    measures = {
        "accuracy/logratio": ratio[:, 0] > ratio[:, 1],
        "accuracy/reward": with_kl[:, 0] > with_kl[:, 1],
        "logratio/chosen": ratio[:, 0],
        "logratio/rejected": ratio[:, 1],
        "seqkl/chosen": table["kl"][:, 0],
        "seqkl/rejected": table["kl"][:, 1],
        "seqkl/margin": table["kl"][:, 0] - table["kl"][:, 1],
        "reverse_seqkl/chosen": table["reverse_kl"][:, 0],
        "reverse_seqkl/rejected": table["reverse_kl"][:, 1],
    }
    if objective is not None:
        columns = [torch.from_numpy(table[name]) for name in ("logps", "tokens", "reference_logps", "kl")]
        scores = {role: ResponseScores(*(column[:, i] for column in columns)) for i, role in enumerate(("chosen", "rejected"))}
        measures["accuracy/logit"] = (objective(scores).logits > 0).numpy()
    return measures


def score_samples(
    policy: nn.Module, reference: Optional[nn.Module], rows: Sequence[Mapping], fast: Union[bool, Packing], batch_size: int
) -> dict[str, np.ndarray]:
    """Sum the statistics over the response tokens of each of the policy's samples.

    Args:
        policy: the model that wrote the texts.
        reference: None: no statistics that need a reference.
        rows: output of sampling.sample_batch, drawn from the policy's own distribution, equally many per prompt.
        fast: score the texts of a prompt in one row, see `token_statistics`.
        batch_size: prompts at a time.

    Returns:
        statistic, see TokenStatistics -> (prompts, texts of a prompt), nats; "tokens": the number of response tokens.
    """
    n = texts_of_a_prompt(rows)
    prompts = [texts for _, texts in batched(rows, n)]
    found: list[dict[str, np.ndarray]] = []
    for _, some in tqdm.tqdm(batched(prompts, batch_size), "Scoring samples", leave=False, disable=None):
        tokens = [(texts[0]["prompt_ids"], [text["completion_ids"] for text in texts]) for texts in some]
        counts = np.array([len(response) for _, responses in tokens for response in responses])
        found.append({**of_responses(token_statistics(policy, reference, tokens, fast), counts), "tokens": counts})
    return {name: np.concatenate([part[name] for part in found]).reshape(-1, n) for name in found[0]}


def measure_samples(
    table: Mapping[str, np.ndarray], rewards: Optional[Sequence[float]]
) -> dict[str, tuple[np.ndarray, Optional[np.ndarray]]]:
    """Compute entropy, length, KL, the reference's likelihood and the reward of the policy's samples, averaged over each prompt's texts.

    Args:
        table: output of `score_samples`; without a reference samples/kl and samples/reference_nll are left out.
        rewards: one per row of the samples; None: samples/reward is left out.

    Returns:
        measure -> (one value per prompt, weights of the prompts or None for equal weights).
    """
    counts = table["tokens"]
    measures = {
        "samples/entropy": ((table["entropy"] / counts).mean(1), None),
        "samples/tokens": (counts.mean(1), None),
    }
    if "reference_logps" in table:
        measures["samples/kl"] = (table["reverse_kl"].mean(1), None)
        measures["samples/reference_nll"] = (-table["reference_logps"].sum(1) / counts.sum(1), counts.sum(1))
    if rewards is not None:
        measures["samples/reward"] = (np.array(rewards).reshape(counts.shape).mean(1), None)
    return measures


def measure_whole_texts(
    policy: nn.Module, rows: Sequence[Mapping], table: Mapping[str, np.ndarray], fast: Union[bool, Packing], batch_size: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Compute the entropy as f-DPO's code (its metrics/imdb) averages it: over all tokens of all texts together, prompts included.

    Only the prompts are scored here, each once for all its texts.

    Args:
        policy, rows, fast, batch_size: as for `score_samples`.
        table: its output.

    Returns:
        measure -> (one value per prompt, number of its tokens as weight).
    """
    n = texts_of_a_prompt(rows)
    prompts = [texts[0]["prompt_ids"] for _, texts in batched(rows, n)]
    predicted = np.array([len(ids) - 1 for ids in prompts])  # the first token of a text is not
    found = [np.zeros(0)]
    for _, some in batched([ids for ids in prompts if len(ids) > 1], batch_size):
        statistics = token_statistics(policy, None, [(ids[:1], [ids[1:]]) for ids in some], fast)
        found.append(of_responses(statistics, [len(ids) - 1 for ids in some])["entropy"])
    of_prompts = np.zeros(len(prompts))
    of_prompts[predicted > 0] = np.concatenate(found)
    tokens = n * predicted + table["tokens"].sum(1)
    return {"samples/entropy_fdpo": ((n * of_prompts + table["entropy"].sum(1)) / tokens, tokens)}


def measure_diversity(rows: Sequence[Mapping]) -> dict[str, tuple[np.ndarray, None]]:
    """Compute how much the texts of each prompt differ: distinct-1, distinct-2 and, for two or more texts, self-BLEU.

    Args:
        rows: as for `score_samples`.

    Returns:
        measure -> (one value per prompt, None).
    """
    n = texts_of_a_prompt(rows)
    prompts = [[row["completion"] for row in some] for _, some in batched(rows, n)]
    words = [[text.split() for text in texts] for texts in prompts]
    measures = {f"samples/distinct_{k}": (np.array([distinct(texts, k) for texts in words]), None) for k in (1, 2)}
    if n > 1:
        measures["samples/self_bleu"] = (np.array([self_bleu(texts) for texts in prompts]), None)
    return measures


def texts_of_a_prompt(rows: Sequence[Mapping]) -> int:
    """Return the number of texts per prompt."""
    return sum(row["index"] == rows[0]["index"] for row in rows)


def distinct(texts: Sequence[Sequence[str]], k: int) -> float:
    """Return distinct-k (Li et al. 2016): distinct k-grams of words / all k-grams of the texts; 1 if there are none."""
    grams = [gram for words in texts for gram in zip(*(words[i:] for i in range(k)))]
    return len(set(grams)) / len(grams) if grams else 1.0


def self_bleu(texts: Sequence[str]) -> float:
    """Return self-BLEU (Zhu et al. 2018): the mean sentence BLEU of each text against the others, 0 to 100."""
    bleu = sacrebleu.BLEU(effective_order=True)
    return float(np.mean([bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]))


def table_of(results: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Format results as a Markdown table with one column per model, followed by the meaning of each row.

    Args:
        results: model name -> measure -> estimate.
    """
    rows = [name for name in MEASURES if any(name in measures for measures in results.values())]
    lines = [f"| | {' | '.join(results)} |", "|---|" + "---:|" * len(results)]
    lines += [f"| {row} | {' | '.join(str(measures.get(row, '-')) for measures in results.values())} |" for row in rows]
    return "\n".join([*lines, "", *(f"{row}: {MEASURES[row]}" for row in rows)])
