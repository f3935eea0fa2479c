"""Metrics of examples, summed on the device. Their names are the published ones."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch

from tdpo.losses import LossOutput, ResponseScores


class Weighted(NamedTuple):
    """Values of examples, of which only some enter the mean; (B,) each."""

    values: torch.Tensor
    counts: torch.Tensor  # bool: whether the value enters the mean


def example_metrics(scores: Mapping[str, ResponseScores], output: LossOutput, split: str) -> dict[str, Union[torch.Tensor, Weighted]]:
    """Return the metrics of each example, (B,) by name, detached.

    Names are loss/<split> and logps_<split>/<role>; for pairs also rewards_<split>/{chosen,rejected,accuracies,margins} as published and,
    where SeqKL was computed, kl_<split>/{chosen,rejected,margin}. Two are new: logits_<split>/{margins,accuracies}, the margin that is
    trained, and logratio_<split>/accuracies, by D alone (without a reference by log pi(w) - log pi(l)), which compares across losses.
    For single responses with labels (kto), chosen and rejected are the desirable and the undesirable responses, logits are positive if a
    response is on its label's side of z0, and kl_<split>/baseline is z0.

    Args:
        scores: by role, tensors (B,).
        output: what the objective returned for these scores, tensors (B,).
        split: train or eval.
    """
    metrics: dict[str, Union[torch.Tensor, Weighted]] = {f"loss/{split}": output.losses}
    if "completion" in scores:
        metrics |= _by_label(scores["completion"], output, split)
        return {name: _detached(values) for name, values in metrics.items()}
    for role, score in scores.items():
        metrics[f"logps_{split}/{role}"] = score.logps
    if output.rewards:
        chosen, rejected = output.rewards["chosen"], output.rewards["rejected"]
        metrics[f"rewards_{split}/chosen"] = chosen
        metrics[f"rewards_{split}/rejected"] = rejected
        metrics[f"rewards_{split}/accuracies"] = chosen > rejected
        metrics[f"rewards_{split}/margins"] = chosen - rejected
        metrics[f"logits_{split}/margins"] = output.logits
        metrics[f"logits_{split}/accuracies"] = output.logits > 0
        chosen, rejected = (
            scores[role].logps if scores[role].reference_logps is None else scores[role].log_ratio for role in ("chosen", "rejected")
        )
        metrics[f"logratio_{split}/accuracies"] = chosen > rejected
    divergences = {role: scores[role].kl for role in ("chosen", "rejected") if role in scores and scores[role].kl is not None}
    for role, kl in divergences.items():
        metrics[f"kl_{split}/{role}"] = kl
    if len(divergences) == 2:
        metrics[f"kl_{split}/margin"] = divergences["chosen"] - divergences["rejected"]
    return {name: _detached(values) for name, values in metrics.items()}


def metrics_of_datasets(
    scores: Mapping[str, ResponseScores], output: LossOutput, split: str, names: Sequence[str], own: Sequence[int]
) -> dict[str, Weighted]:
    """Return the metrics of each dataset, where there are several: as example_metrics with the split <split>_<dataset>.

    Args:
        scores, output, split: as for example_metrics.
        names: of all datasets.
        own: the dataset of each example that counts, as index into names.
    """
    if len(names) < 2:
        return {}
    found, dataset = {}, torch.as_tensor(own, device=output.losses.device)
    for i, name in enumerate(names):
        for key, values in example_metrics(scores, output, f"{split}_{name}").items():
            values, counts = values if isinstance(values, Weighted) else (values, torch.ones_like(values, dtype=torch.bool))
            found[key] = Weighted(values[: len(own)], counts[: len(own)] & (dataset == i))
    return found


def _by_label(score: ResponseScores, output: LossOutput, split: str) -> dict[str, Union[torch.Tensor, Weighted]]:
    desirable = score.annotation > 0.5
    of_each = {"logps": score.logps, "rewards": output.rewards["completion"], "kl": score.kl}
    metrics = {
        f"{name}_{split}/{role}": Weighted(values, counts)
        for name, values in of_each.items()
        if values is not None
        for role, counts in (("chosen", desirable), ("rejected", ~desirable))
    }
    metrics[f"logits_{split}/margins"] = output.logits
    metrics[f"logits_{split}/accuracies"] = output.logits > 0
    if score.baseline is not None:
        metrics[f"kl_{split}/baseline"] = score.baseline.expand_as(score.logps)
    return metrics


def _detached(values: Union[torch.Tensor, Weighted]) -> Union[torch.Tensor, Weighted]:
    return Weighted(*(x.detach() for x in values)) if isinstance(values, Weighted) else values.detach()


def start_difference(metrics: Mapping[str, Optional[float]], split: str, reward_scale: Optional[float] = None) -> Optional[float]:
    """Return how much policy and reference differ in the first log, where they should be the same model.

    Args:
        metrics: means of the first train step, or of an eval before it.
        split: train or eval accordingly.
        reward_scale: rewards are divided by it, which makes them nats; None or 0: not divided.

    Returns:
        the largest absolute reward or SeqKL; None if the log has neither; infinity if one is not finite.
    """
    roles = ("chosen", "rejected")
    rewards = [metrics[name] for role in roles if (name := f"rewards_{split}/{role}") in metrics]
    divergences = [metrics[name] for role in roles if (name := f"kl_{split}/{role}") in metrics]
    if None in rewards + divergences:  # in metrics.jsonl, for a value that is not finite
        return math.inf
    return max([abs(x) / (reward_scale or 1.0) for x in rewards] + list(map(abs, divergences)), default=None)


class MetricSums:
    """Sums of metrics over examples, kept on the device. `add` does not wait for the device; `means` reads all sums at once."""

    def __init__(self):
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, Any] = defaultdict(int)  # int, or a tensor for Weighted values

    def add(self, metrics: Mapping[str, Union[torch.Tensor, Weighted]], counted: Optional[int] = None) -> None:
        """Add the metrics of a microbatch.

        Args:
            metrics: (B,) by name, see example_metrics.
            counted: only the first `counted` examples are added (the rest are placeholders); None adds all.
        """
        for name, values in metrics.items():
            counts: Any = None
            if isinstance(values, Weighted):
                values, counts = values.values[:counted], values.counts[:counted]
                values = torch.where(counts, values, 0)
            else:
                values = values[:counted]
            self._sums[name] = self._sums[name] + values.sum(dtype=torch.float64)
            self._counts[name] = self._counts[name] + (values.numel() if counts is None else counts.sum())

    def sum(self, name: str) -> torch.Tensor:
        """Return the sum of a metric so far, a scalar on the device."""
        return self._sums[name]

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums) -> dict[str, float]:
        """Return the mean of each metric; a metric without any counted value is left out.

        Args:
            reduce: sums a tensor, here (2, metrics), over the ranks that had other examples; all ranks must have the same metric names.
        """
        names = list(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])
        known = {name: count for name, count in self._counts.items() if isinstance(count, int)}
        counts = torch.tensor([known.get(name, 0) for name in names], dtype=sums.dtype, device=sums.device)
        if others := [i for i, name in enumerate(names) if name not in known]:
            counts[others] = torch.stack([self._counts[names[i]] for i in others]).to(sums.dtype)
        pairs = zip(names, *reduce(torch.stack([sums, counts])).tolist())
        return {name: total / count for name, total, count in pairs if count}
