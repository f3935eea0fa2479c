"""The learning rate as a function of the step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union

from omegaconf import DictConfig, OmegaConf

from tdpo.data.batching import BatchStream
from tdpo.utils import plural

# What a schedule follows from, with the data.
KEYS = ("lr", "lr_schedule", "min_lr", "warmup_steps", "decay_steps", "n_epochs", "n_examples")


@dataclass(frozen=True)
class Schedule:
    """A learning rate for every step of a run: linear warm-up, as published, then constant or a decay to min_lr.

    Called with the number of optimizer steps taken, which a resumed run continues to count; it has no other state. After the warm-up, p is
    the share of the remaining steps that have been taken:

        constant   lr
        linear     min_lr + (lr - min_lr) (1 - p)
        cosine     min_lr + (lr - min_lr) (1 + cos(pi p)) / 2       https://arxiv.org/abs/1608.03983
        wsd        lr until the last decay_steps, then linear       https://arxiv.org/abs/2404.06395

    p is 0 at the first step after the warm-up and would be 1 at the step after the last, as in Transformers.
    """

    kind: str
    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int  # of wsd
    steps: int  # of the run

    @classmethod
    def of(cls, config: DictConfig, steps: int) -> "Schedule":
        """Return the schedule of a run.

        Args:
            config: a checked config.
            steps: of the run; shares are shares of it, rounded up.
        """
        counts = [steps_of(config.warmup_steps, steps), steps_of(config.decay_steps, steps)]
        return cls(config.lr_schedule, config.lr, config.min_lr, *counts, steps)

    def __call__(self, updates: int) -> float:
        """Return the learning rate of the step after `updates` optimizer steps."""
        if updates < self.warmup_steps:
            return self.lr * (updates + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.lr
        begin = self.steps - self.decay_steps if self.kind == "wsd" else self.warmup_steps
        begin = max(begin, self.warmup_steps)
        p = min(1.0, max(0.0, (updates - begin) / max(1, self.steps - begin)))
        left = (1 + math.cos(math.pi * p)) / 2 if self.kind == "cosine" else 1 - p
        return self.min_lr + (self.lr - self.min_lr) * left

    def describe(self) -> str:
        """Return 'lr 5e-07 after 10 steps of warm-up, then cosine decay to 0'."""
        decay = {"constant": "", "wsd": f", in the last {self.decay_steps} decaying to {self.min_lr:g}"}
        after = decay.get(self.kind, f", then {self.kind} decay to {self.min_lr:g}")
        return f"lr {self.lr:g} after {plural(self.warmup_steps, 'step')} of warm-up{after}"


def steps_of(value: Union[int, float], steps: int) -> int:
    """Return a number of steps that the config gives as a number, or below 1 as a share of all steps, rounded up."""
    return math.ceil(value * steps - 1e-9) if 0 < value < 1 else int(value)


def change_of_schedule(now: Schedule, saved: Mapping[str, Any], batches: BatchStream, updates: int) -> list[str]:
    """Return a line if a resumed run follows another schedule than it did, as after a change of n_epochs; else an empty list.

    Args:
        now: the schedule with which the run goes on.
        saved: the config with which it ran.
        batches: of the run.
        updates: optimizer steps taken.
    """
    config = OmegaConf.create(
        {"lr_schedule": "constant", "min_lr": 0.0, "decay_steps": 0.1, **{key: saved[key] for key in KEYS if key in saved}}
    )
    before = Schedule.of(config, batches.count(config.n_epochs, config.n_examples))
    if now(updates) == before(updates) and (now.steps == before.steps or "constant" == now.kind == before.kind):
        return []
    return [
        f"learning rate: the schedule now ends at step {now.steps:,} ({now.describe()}), before at step {before.steps:,} "
        f"({before.describe()}): the next step has {now(updates):.3g}, it would have had {before(updates):.3g}"
    ]
