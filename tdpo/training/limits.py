"""The best eval of a run, and when a run has enough: keep_best and stop_when."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Optional

import torch
from omegaconf import DictConfig, OmegaConf

from tdpo.checkpointing.training_state import Progress
from tdpo.losses import Objective, ResponseScores
from tdpo.training.hooks import Hook
from tdpo.training.metrics import example_metrics
from tdpo.training.saver import Saver
from tdpo.utils import UserError, get_logger, nearest

log = get_logger(__name__)

PATIENCE = "patience"  # the key of stop_when that is no metric


@dataclass
class Best:
    """The best of the evals after the first step, by one metric; an equal one later is no better."""

    metric: str
    mode: str  # min or max
    value: Optional[float] = None  # None before the first eval
    examples: int = -1  # train examples at that eval
    evals_since: int = 0  # that were no better

    @classmethod
    def of(cls, config: Mapping) -> Optional["Best"]:
        """Return the best of a run that has had no eval yet; None if the config (a checked one, or a saved run's) asks for none."""
        keep = config.get("keep_best") or {}
        return cls(keep["metric"], keep["mode"] or usual_mode(keep["metric"])) if keep.get("metric") else None

    def see(self, metrics: Mapping[str, float], examples: int) -> None:
        """Take note of an eval after `examples` train examples; one that has no finite value counts as no better."""
        value = metrics.get(self.metric)
        if value is not None and math.isfinite(value) and (self.value is None or self._better(value)):
            self.value, self.examples, self.evals_since = value, examples, 0
        else:
            self.evals_since += 1

    def _better(self, value: float) -> bool:
        return value < self.value if self.mode == "min" else value > self.value


def usual_mode(metric: str) -> Optional[str]:
    """Return whether a metric is better small (losses, SeqKL) or large (accuracies, margins of rewards); None where it is not known."""
    if metric.startswith(("loss/", "kl_")):
        return "min"
    return "max" if metric.endswith("/accuracies") or metric.startswith(("rewards_", "logits_")) and metric.endswith("/margins") else None


class Limit(NamedTuple):
    """A value of a metric at which a run ends."""

    metric: str
    value: float
    from_above: bool  # whether it ends at this value or less, not at this value or more

    @classmethod
    def of(cls, metric: str, given: Any) -> Optional["Limit"]:
        """Read 20, '>20' or '<0.5'; None if it is none of them."""
        found = re.fullmatch(r"\s*([<>]?)=?\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*", str(given))
        try:
            return cls(metric, float(found[2]), found[1] == "<") if found and not isinstance(given, bool) else None
        except ValueError:
            return None

    def reached(self, metrics: Mapping[str, float]) -> str:
        """Return 'kl_eval/chosen is 20.31, at least 20' if an eval has reached the value, else ''."""
        value = metrics.get(self.metric)
        if value is None or not (value <= self.value if self.from_above else value >= self.value):
            return ""
        return f"{self.metric} is {value:.4g}, at {'most' if self.from_above else 'least'} {self.value:g}"


def reason_to_stop(stop_when: Mapping[str, Any], metrics: Mapping[str, float], best: Optional[Best]) -> str:
    """Return why a run ends with this eval; '' if it goes on.

    Args:
        stop_when: of the config.
        metrics: of the eval.
        best: up to this eval; needed for a patience.
    """
    limits = [Limit.of(name, given) for name, given in stop_when.items() if name != PATIENCE]
    reasons = [limit.reached(metrics) for limit in limits if limit is not None]
    patience = stop_when.get(PATIENCE)
    if best is not None and best.value is not None and isinstance(patience, int) and best.evals_since >= patience:
        reasons.append(f"{best.metric} has not improved on {best.value:.4g}, after {best.examples:,} examples, in {best.evals_since} evals")
    return "; ".join(filter(None, reasons))


def check_limits(config: DictConfig, objective: Objective) -> None:
    """Check keep_best and stop_when.

    Raises:
        UserError: names all metrics that no eval of this run has, and values that are none.
    """
    known = eval_metrics(objective, list(config.datasets))
    problems, keep, stop_when = [], config.keep_best, OmegaConf.to_container(config.stop_when)
    named = {"keep_best.metric": keep.metric} if keep.metric is not None else {}
    named |= {f"stop_when[{name}]": name for name in stop_when if name != PATIENCE}
    for key, name in named.items():
        if name not in known:
            value = f"={name}" if key == "keep_best.metric" else ""
            problems.append(f"{key}{value}: no metric of this run's evals{nearest(name, known)}; there are {', '.join(known)}")
    if keep.metric in known and not (keep.mode or usual_mode(keep.metric)):
        problems.append(f"keep_best.metric={keep.metric}: set keep_best.mode to min or max, whichever is better")
    if keep.metric is None and keep.mode is not None:
        problems.append(f"keep_best.mode={keep.mode} needs keep_best.metric")
    for name, given in stop_when.items():
        if name != PATIENCE and Limit.of(name, given) is None:
            problems.append(f"stop_when[{name}]={given}: must be a number that ends the run when reached from below, or '<0.5' from above")
    patience = stop_when.get(PATIENCE, 1)
    if type(patience) is not int or patience < 1:
        problems.append(f"stop_when[{PATIENCE}]={patience}: must be a number of evals, 1 or more")
    if PATIENCE in stop_when and keep.metric is None:
        problems.append(f"stop_when[{PATIENCE}] needs keep_best.metric, the metric that is to improve")
    if problems:
        raise UserError("\n".join(problems))


def eval_metrics(objective: Objective, datasets: list[str]) -> list[str]:
    """Return the names of the metrics of an eval, as one with invented scores has them."""
    one, rated = torch.ones(2), {"chosen": torch.tensor([2.0, 2.0]), "completion": torch.tensor([1.0, 0.0])}
    scores = {
        role: ResponseScores(
            -one,
            one,
            -one if objective.needs_reference else None,
            0 * one if objective.needs_kl else None,
            rated.get(role, one),
            torch.tensor(0.0) if objective.needs_kl_baseline else None,
        )
        for role in objective.roles
    }
    output = objective(scores)
    splits = ["eval", *(f"eval_{name}" for name in datasets if len(datasets) > 1)]
    return [name for split in splits for name in example_metrics(scores, output, split)]


class Limits(Hook):
    """Keeps the best checkpoint under the link BEST, and says when the run has enough.

    Args:
        config: a checked config.
        saver: keeps the checkpoints.
    """

    def __init__(self, config: DictConfig, saver: Saver):
        self.config, self.saver, self.best = config, saver, Best.of(config)
        self.stop_when = OmegaConf.to_container(config.stop_when)

    def before_training(self) -> None:
        if self.best is None:
            return
        if not self.saver.point_best(self.best.examples):
            log.warning(f"the best checkpoint, after {self.best.examples:,} examples, is gone: BEST is the best from now on")
            self.best = Best.of(self.config)
        self.saver.best_at = self.best.examples

    def after_eval(self, progress: Progress) -> None:
        if self.best is not None and progress.examples > 0:  # before the first step there is no checkpoint
            self.best.see(progress.eval_metrics, progress.examples)
            self.saver.best_at = self.best.examples

    def wants_checkpoint(self, progress: Progress) -> bool:
        return self.best is not None and self.best.examples == progress.examples

    def reason_to_stop(self, progress: Progress) -> str:
        """Return why the run ends now; '' if it goes on. Only an eval gives a reason. Called on all ranks."""
        if progress.evaluated_at != progress.examples or not self.stop_when:
            return ""
        return self.saver.world.from_first(lambda: reason_to_stop(self.stop_when, progress.eval_metrics, self.best))

    def state(self) -> dict[str, Any]:
        return {} if self.best is None else asdict(self.best)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the saved best, unless another metric or mode counts now."""
        saved = Best(**state)
        if self.best is None:
            return
        if (saved.metric, saved.mode) == (self.best.metric, self.best.mode):
            self.best = saved
        else:
            log.warning(f"keep_best was {saved.metric} ({saved.mode}) and is {self.best.metric} ({self.best.mode}): BEST is chosen anew")
