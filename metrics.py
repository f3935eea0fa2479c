"""Metrics: sums that stay on the device, and where a log goes (console, metrics.jsonl, wandb). Names are the published ones."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Optional, Protocol

import torch
import tqdm
from omegaconf import DictConfig, OmegaConf

from losses import LossOutput, ResponseScores
from utils import formatted_dict


def example_metrics(scores: Mapping[str, ResponseScores], output: LossOutput, split: str) -> dict[str, torch.Tensor]:
    """What is logged of each example, (B,) a name, detached; `split` is train or eval.

    loss/<split>, logps_<split>/<role>; for pairs also rewards_<split>/{chosen,rejected,accuracies,margins} as published, for TDPO
    kl_<split>/{chosen,rejected,margin} (SeqKL), and two that the published code lacks: logits_<split>/{margins,accuracies}, the margin that
    is trained, and logratio_<split>/accuracies, by D alone, which compares across losses.
    """
    metrics = {f"loss/{split}": output.losses}
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
        metrics[f"logratio_{split}/accuracies"] = scores["chosen"].log_ratio > scores["rejected"].log_ratio
    if scores["chosen"].kl is not None:
        chosen, rejected = scores["chosen"].kl, scores["rejected"].kl
        metrics[f"kl_{split}/chosen"] = chosen
        metrics[f"kl_{split}/rejected"] = rejected
        metrics[f"kl_{split}/margin"] = chosen - rejected
    return {name: values.detach() for name, values in metrics.items()}


class MetricSums:
    """Sums over examples, kept on the device: adding does not wait for it, `means` reads everything at once."""

    def __init__(self):
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, metrics: Mapping[str, torch.Tensor]) -> None:
        for name, values in metrics.items():
            self._sums[name] = self._sums[name] + values.sum(dtype=torch.float64)
            self._counts[name] += values.numel()

    def sum(self, name: str) -> torch.Tensor:
        return self._sums[name]

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums) -> dict[str, float]:
        """The means by name. `reduce` sums a tensor over the processes that had other examples; all of them have the same names."""
        names = list(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])
        counts = torch.tensor([self._counts[name] for name in names], dtype=sums.dtype, device=sums.device)
        return {name: total / count for name, total, count in zip(names, *reduce(torch.stack([sums, counts])).tolist())}


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
                print(f"wandb: {self.run.url}")
                return
            print(f"wandb: {problem}; logging offline to {run_dir}/wandb (wandb sync uploads it)")
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
            print("wandb is not installed: metrics go to metrics.jsonl alone")
        except Exception as error:  # wandb refuses its settings: a project's name, WANDB_MODE
            print(f"wandb: {' '.join(str(error).split())[:200]}; metrics go to metrics.jsonl alone")
    return sinks
