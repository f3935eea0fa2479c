"""Forward passes over microbatches: those of a step or an eval, and additional ones that an objective needs."""

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
    """Scores microbatches, and records which one is being scored.

    Args:
        scorer: policy and reference, placed on the device.
        feeder: makes microbatches of examples.
        strategy: the strategy that placed the scorer.
        world: the run's ranks.
        signals: checked between the microbatches of `prepared`.
    """

    def __init__(self, scorer: Scorer, feeder: Feeder, strategy: SingleDevice, world: World, signals: StopSignals):
        self.scorer, self.feeder, self.strategy, self.world, self.signals = scorer, feeder, strategy, world, signals
        self.current: Optional[tuple[list[Example], str]] = None  # examples and split that are being scored, for error messages

    @property
    def hide_progress(self) -> Optional[bool]:
        """Value for tqdm's `disable`: None (hide without a terminal) on rank 0, True on the others."""
        return None if self.world.is_first else True

    def score(self, microbatch: Microbatch, split: str) -> Scored:
        """Score a microbatch; a placeholder does not enter the loss. `split` is train or eval."""
        self._note(microbatch, split)
        return self.scorer(microbatch.batch, len(microbatch.examples))

    def mean_mismatched_ratio(self, microbatches, split: str) -> torch.Tensor:
        """Return the mean log-ratio of the mismatched responses over the examples of all ranks: a scalar in nats, without gradient."""
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
        """Return this rank's batches as microbatches that can be iterated more than once, under a progress bar with this title."""
        return Prepared(self, split, batches, title)


class Prepared:
    """An iterable of microbatches, each prepared by a thread ahead of its use. A signal ends the iteration with Stopped."""

    def __init__(self, passes: Passes, split: str, batches: list[list[Example]], title: str):
        self.passes, self.split, self.batches, self.title = passes, split, batches, title

    def __iter__(self) -> Iterator[Microbatch]:
        found = prefetched(partial(self.passes.feeder.as_microbatch, self.split), self.batches)
        for _, microbatch in tqdm.tqdm(found, self.title, len(self.batches), leave=False, disable=self.passes.hide_progress):
            self.passes.signals.check()
            yield microbatch
