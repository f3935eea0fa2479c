"""Forward passes over microbatches: those of a step or an eval, and those that an objective needs beside them."""

from collections.abc import Iterator
from functools import partial
from typing import Optional

import torch
import tqdm

from tdpo.data.batching import prefetched
from tdpo.data.split import Example
from tdpo.distributed.signals import StopSignals
from tdpo.distributed.world import World
from tdpo.scoring.scorer import Scored, Scorer
from tdpo.training.feeder import Feeder, Microbatch
from tdpo.training.strategies import SingleDevice


class Passes:
    """Scores microbatches, and knows which ones are being scored.

    Args:
        scorer: policy and reference, placed.
        feeder: makes microbatches of examples.
        strategy: that placed the scorer.
        signals: checked between microbatches.
    """

    def __init__(self, scorer: Scorer, feeder: Feeder, strategy: SingleDevice, world: World, signals: StopSignals):
        self.scorer, self.feeder, self.strategy, self.world, self.signals = scorer, feeder, strategy, world, signals
        self.current: Optional[tuple[list[Example], str]] = None  # examples and split under way, for a message about them

    @property
    def hide_progress(self) -> Optional[bool]:
        """tqdm's `disable`: without a terminal, and on all ranks but one."""
        return None if self.world.is_first else True

    def score(self, microbatch: Microbatch, split: str) -> Scored:
        """Score a microbatch; its loss counts the examples, not a placeholder. `split` is train or eval."""
        self._note(microbatch, split)
        return self.scorer(microbatch.batch, len(microbatch.examples))

    def mean_mismatched_ratio(self, microbatches, split: str) -> torch.Tensor:
        """Return the mean log-ratio of the mismatched responses over the examples of all ranks, a scalar in nats, without gradient."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        with torch.no_grad():
            for microbatch in microbatches:
                self._note(microbatch, split)
                (score,) = self.scorer(microbatch.mismatched).scores.values()
                ratios = score.log_ratio[: len(microbatch.examples)]
                sums[0] += ratios.sum(dtype=torch.float64)
                sums[1] += len(ratios)
        total, count = self.strategy.reduce(sums)
        return total / count

    def _note(self, microbatch: Microbatch, split: str) -> None:
        self.world.forward_passes += 1
        self.current = microbatch.examples, split

    def prepared(self, split: str, batches: list[list[Example]], title: str) -> "Prepared":
        """Return microbatches of these batches, to be iterated as often as needed."""
        return Prepared(self, split, batches, title)


class Prepared:
    """Microbatches, each made ready by a thread ahead of its use, with a progress bar; a signal ends the iteration with Stopped."""

    def __init__(self, passes: Passes, split: str, batches: list[list[Example]], title: str):
        self.passes, self.split, self.batches, self.title = passes, split, batches, title

    def __iter__(self) -> Iterator[Microbatch]:
        found = prefetched(partial(self.passes.feeder.as_microbatch, self.split), self.batches)
        for _, microbatch in tqdm.tqdm(found, self.title, len(self.batches), leave=False, disable=self.passes.hide_progress):
            self.passes.signals.check()
            yield microbatch
