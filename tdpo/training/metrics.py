"""Metrics, summed on the device, and the sinks that log them (console, metrics.jsonl, wandb). Metric names are the published ones."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional, Protocol, Union

import torch
import tqdm
from omegaconf import DictConfig, OmegaConf

from tdpo.files import append_lines, reason_of
from tdpo.losses import LossOutput, ResponseScores
from tdpo.utils import RunError, formatted_dict, get_logger

log = get_logger(__name__)


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


class Sink(Protocol):
    """A destination of metrics and samples; `examples` is the number of train examples so far."""

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None: ...

    def samples(self, rows: list[dict], examples: int) -> None: ...

    def close(self) -> None: ...


class ConsoleSink:
    """Prints metrics as the published code does, and at most three samples, above the progress bar."""

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None:
        what = "train stats" if split == "train" else "eval"
        tqdm.tqdm.write(f"{what} after {examples} examples: {formatted_dict(dict(metrics))}")

    def samples(self, rows: list[dict], examples: int) -> None:
        for row in rows[:3]:
            tqdm.tqdm.write(f"sample after {examples} examples: {json.dumps(row, ensure_ascii=False)}")

    def close(self) -> None:
        pass


class JsonlSink:
    """Writes metrics.jsonl, one object per log and the authoritative record of a run, and samples.jsonl, one object per sampled prompt."""

    def __init__(self, run_dir: str):
        self.run_dir = run_dir

    def _append(self, file: str, rows: list[dict]) -> None:
        path = os.path.join(self.run_dir, file)
        try:
            append_lines(path, rows)
        except OSError as error:
            reason = f"{path} cannot be written ({reason_of(error)})"
            raise RunError(f"{reason}; saved checkpoints are kept; to continue: resume={self.run_dir}") from None

    @staticmethod
    def _finite(metrics: Mapping[str, float]) -> dict:
        """Replace values that are not finite by None (null), because JSON has no infinity or NaN."""
        return {name: value if math.isfinite(value) else None for name, value in metrics.items()}

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None:
        self._append("metrics.jsonl", [{"split": split, "counters/examples": examples, **self._finite(metrics)}])

    def samples(self, rows: list[dict], examples: int) -> None:
        self._append("samples.jsonl", [{"counters/examples": examples, **row} for row in rows])

    def close(self) -> None:
        pass


class WandbSink:
    """Logs to Weights & Biases. Without an API key or a network it logs offline, with a line on the console; the run continues.

    Args:
        run_dir: the run's folder, in which wandb keeps its files.
        config: the run's config.
        run_id: the wandb run to continue; None: a new one.
    """

    def __init__(self, run_dir: str, config: DictConfig, run_id: Optional[str]):
        import wandb  # here, because wandb is optional

        self.wandb, self.failed = wandb, False
        arguments = {
            "entity": config.wandb.entity,
            "project": config.wandb.project,
            "name": config.exp_name,
            "config": OmegaConf.to_container(config),
            "dir": run_dir,
            **({"id": run_id, "resume": "allow"} if run_id else {}),
            "settings": wandb.Settings(init_timeout=20, finish_timeout=30, silent=True),
        }
        mode = os.environ.get("WANDB_MODE", "online")  # wandb's own switch
        if mode == "online":
            problem = self._start_online(arguments)
            if problem is None:
                log.info(f"wandb: {self.run.url}")
                return
            log.info(f"wandb: {problem}; logging offline to {run_dir}/wandb (wandb sync uploads it)")
            mode = "offline"
        self.run = wandb.init(mode=mode, **arguments)

    @property
    def run_id(self) -> str:
        """The wandb run's id, by which a resumed run continues it."""
        return self.run.id

    def _start_online(self, arguments: Mapping) -> Optional[str]:
        """Start the wandb run online; return None, or the reason why that is not possible."""
        try:
            if not self.wandb.login(prompt=False):
                return "no API key (wandb login)"
            self.run = self.wandb.init(mode="online", **arguments)
        except Exception as error:  # wandb has a dozen types: no network, no such entity, no permission
            return (str(error).splitlines() or [type(error).__name__])[0]
        return None

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None:
        self._tried(lambda: self.run.log(dict(metrics), step=examples))

    def samples(self, rows: list[dict], examples: int) -> None:
        self._tried(lambda: self._log_tables(rows, examples))

    def _log_tables(self, rows: list[dict], examples: int) -> None:
        for column in ("policy", "reference"):
            texts = [(examples, row["prompt"], row[column]) for row in rows if column in row]
            if texts:
                self.run.log({f"{column}_samples": self.wandb.Table(columns=["step", "prompt", "sample"], data=texts)}, step=examples)

    def close(self) -> None:
        self._tried(self.run.finish)

    def _tried(self, action: Callable[[], None]) -> None:
        """Do what wandb is asked for. A failure, for which it has a dozen types, ends logging to wandb with a warning, not the run."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            log.warning(f"wandb: {(str(error).splitlines() or [type(error).__name__])[0]}; from now on metrics are in metrics.jsonl only")


def open_sinks(run_dir: str, config: DictConfig, wandb_id: Optional[str] = None) -> list[Sink]:
    """Open the sinks of a run: console, metrics.jsonl and, if it is enabled and installed, wandb.

    Args:
        run_dir: the run's folder.
        config: a checked config.
        wandb_id: the wandb run to continue; None: a new one.
    """
    sinks: list[Sink] = [ConsoleSink(), JsonlSink(run_dir)]
    if config.wandb.enabled and not config.debug:
        try:
            sinks.append(WandbSink(run_dir, config, wandb_id))
        except ImportError:
            log.info("wandb is not installed: metrics are written to metrics.jsonl only")
        except Exception as error:  # wandb refuses a setting, such as the project's name or WANDB_MODE
            log.info(f"wandb: {' '.join(str(error).split())[:200]}; metrics are written to metrics.jsonl only")
    return sinks
