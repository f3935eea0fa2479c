"""Metrics: sums that stay on the device, and where a log goes (console, metrics.jsonl, wandb). Names are the published ones."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional, Protocol, Union

import torch
import tqdm
from omegaconf import DictConfig, OmegaConf

from tdpo.losses import LossOutput, ResponseScores
from tdpo.utils import formatted_dict, get_logger

log = get_logger(__name__)


class Weighted(NamedTuple):
    """Values of which some do not count, (B,) each."""

    values: torch.Tensor
    counts: torch.Tensor  # whether a value does


def example_metrics(scores: Mapping[str, ResponseScores], output: LossOutput, split: str) -> dict[str, Union[torch.Tensor, Weighted]]:
    """What is logged of each example, (B,) a name, detached; `split` is train or eval.

    loss/<split>, logps_<split>/<role>; for pairs also rewards_<split>/{chosen,rejected,accuracies,margins} as published, for TDPO
    kl_<split>/{chosen,rejected,margin} (SeqKL), and two that the published code lacks: logits_<split>/{margins,accuracies}, the margin that
    is trained, and logratio_<split>/accuracies, by D alone, which compares across losses (without a reference by log pi(w) - log pi(l)).
    Of single responses with labels (kto), chosen and rejected stand for the desirable and the undesirable ones of the batch, logits are
    positive where a response is on its label's side of z0, and kl_<split>/baseline is z0.
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
    """How far policy and reference are apart by a log of the start, where they should be the same model.

    Args:
        metrics: of the first train step, or of an eval before it; `split` says which.
        reward_scale: divide rewards by it, which makes them nats; None or 0: as they are.

    Returns:
        the largest |reward| and SeqKL, or None if the log has none; infinity if one is not finite.
    """
    roles = ("chosen", "rejected")
    rewards = [metrics[name] for role in roles if (name := f"rewards_{split}/{role}") in metrics]
    divergences = [metrics[name] for role in roles if (name := f"kl_{split}/{role}") in metrics]
    if None in rewards + divergences:  # as JSON has what is not finite
        return math.inf
    return max([abs(x) / (reward_scale or 1.0) for x in rewards] + list(map(abs, divergences)), default=None)


class MetricSums:
    """Sums over examples, kept on the device: adding does not wait for it, `means` reads everything at once."""

    def __init__(self):
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, Any] = defaultdict(int)  # of Weighted a tensor

    def add(self, metrics: Mapping[str, Union[torch.Tensor, Weighted]], counted: Optional[int] = None) -> None:
        """`counted`: examples, from the first, that are; None: all."""
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
        return self._sums[name]

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums) -> dict[str, float]:
        """The means by name, without those of which nothing counted. `reduce` sums a tensor over the processes that had other examples; all
        of them have the same names."""
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
    """Where logs go."""

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None: ...

    def samples(self, rows: list[dict], examples: int) -> None: ...

    def close(self) -> None: ...


class ConsoleSink:
    """Lines on standard output, as the published code prints them, above the progress bar."""

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None:
        what = "train stats" if split == "train" else "eval"
        tqdm.tqdm.write(f"{what} after {examples} examples: {formatted_dict(dict(metrics))}")

    def samples(self, rows: list[dict], examples: int) -> None:
        for row in rows[:3]:
            tqdm.tqdm.write(f"sample after {examples} examples: {json.dumps(row, ensure_ascii=False)}")

    def close(self) -> None:
        pass


class JsonlSink:
    """metrics.jsonl, one object a log, the record of truth; samples.jsonl, one object a sampled prompt."""

    def __init__(self, run_dir: str):
        self.run_dir = run_dir

    def _append(self, file: str, rows: list[dict]) -> None:
        with open(os.path.join(self.run_dir, file), "a") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in rows)

    @staticmethod
    def _finite(metrics: Mapping[str, float]) -> dict:
        """JSON has no infinity: null."""
        return {name: value if math.isfinite(value) else None for name, value in metrics.items()}

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None:
        self._append("metrics.jsonl", [{"split": split, "counters/examples": examples, **self._finite(metrics)}])

    def samples(self, rows: list[dict], examples: int) -> None:
        self._append("samples.jsonl", [{"counters/examples": examples, **row} for row in rows])

    def close(self) -> None:
        pass


class WandbSink:
    """Weights & Biases. Neither a missing key nor a missing network stops or delays a run: it then logs offline and says so."""

    def __init__(self, run_dir: str, config: DictConfig, run_id: Optional[str]):
        import wandb  # here, because a run goes on without it

        self.wandb = wandb
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
        """By which a run that is resumed goes on as the same one."""
        return self.run.id

    def _start_online(self, arguments: Mapping) -> Optional[str]:
        """Start the run, or say why that is not possible."""
        try:
            if not self.wandb.login(prompt=False):
                return "no API key (wandb login)"
            self.run = self.wandb.init(mode="online", **arguments)
        except Exception as error:  # a dozen types for: no network, no such entity, no permission
            return (str(error).splitlines() or [type(error).__name__])[0]
        return None

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None:
        self.run.log(dict(metrics), step=examples)

    def samples(self, rows: list[dict], examples: int) -> None:
        for column in ("policy", "reference"):
            texts = [(examples, row["prompt"], row[column]) for row in rows if column in row]
            if texts:
                self.run.log({f"{column}_samples": self.wandb.Table(columns=["step", "prompt", "sample"], data=texts)}, step=examples)

    def close(self) -> None:
        self.run.finish()


def open_sinks(run_dir: str, config: DictConfig, wandb_id: Optional[str] = None) -> list[Sink]:
    """Console and metrics.jsonl, and wandb where it is enabled and installed; `wandb_id` of the run that goes on."""
    sinks: list[Sink] = [ConsoleSink(), JsonlSink(run_dir)]
    if config.wandb.enabled and not config.debug:
        try:
            sinks.append(WandbSink(run_dir, config, wandb_id))
        except ImportError:
            log.info("wandb is not installed: metrics go to metrics.jsonl alone")
        except Exception as error:  # wandb refuses its settings: a project's name, WANDB_MODE
            log.info(f"wandb: {' '.join(str(error).split())[:200]}; metrics go to metrics.jsonl alone")
    return sinks
