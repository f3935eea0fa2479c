"""Hooks: what an objective or an option adds to the training loop."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig

from tdpo.checkpointing.training_state import Progress
from tdpo.data.batching import BatchStream, StagedBatchStream
from tdpo.data.split import Example, TokenizedSplit
from tdpo.losses import Objective
from tdpo.models.adapters import OwnReference
from tdpo.scoring.head import HeadOnly
from tdpo.scoring.scorer import Scorer
from tdpo.training.feeder import Microbatch
from tdpo.training.passes import Passes
from tdpo.training.reference_cache import ReferenceCache, config_fingerprint
from tdpo.utils import UserError, batched, get_local_dir, get_logger

log = get_logger(__name__)


class Hook:
    """An addition to the training loop. Each method does nothing unless a subclass overrides it."""

    moves_reference = False  # whether the hook changes the reference's weights; checkpoints must then hold them

    def before_training(self) -> None:
        """Prepare. Called once before the first batch; in a resumed run after `restore`."""

    def before_scoring(self, microbatches: Iterable[Microbatch], split: str) -> Iterable[Microbatch]:
        """Return the microbatches to score.

        Args:
            microbatches: all of a train step or of an eval. A hook that is the first to change them may iterate over them more than once.
            split: train or eval.

        Returns:
            an iterable, which may be iterable only once.
        """
        return microbatches

    def after_step(self, progress: Progress, took_step: bool) -> None:
        """Act after a train step.

        Args:
            progress: the counters, this step included.
            took_step: false if the step was skipped.
        """

    def after_eval(self, progress: Progress) -> None:
        """Act after an eval, whose metrics are in `progress`."""

    def wants_checkpoint(self, progress: Progress) -> bool:
        """Whether the weights as they are now, just evaluated, are to be saved."""
        return False

    def reason_to_stop(self, progress: Progress) -> str:
        """Return why the run ends before its last batch; '' if it goes on."""
        return ""

    def state(self) -> dict[str, Any]:
        """Return what resuming needs, as a JSON-serializable dict."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned. Not called if that was empty."""


class KtoBaseline(Hook):
    """Attaches KTO's z0 to the microbatches.

    z0 = max(0, mean log-ratio of mismatched responses): each prompt with the next prompt's response. It is a mean over the whole global
    batch, or over all eval examples, so it depends neither on the number of ranks nor on the microbatches. It must therefore be computed
    before the first microbatch is scored.
    """

    def __init__(self, passes: Passes):
        self.passes = passes

    def before_scoring(self, microbatches: Iterable[Microbatch], split: str) -> Iterable[Microbatch]:
        baseline = self.passes.mean_mismatched_ratio(microbatches, split).clamp(min=0)
        return (microbatch.with_baseline(baseline) for microbatch in microbatches)


class MovingReference(Hook):
    """Moves the reference towards the policy at regular intervals: TR-DPO, https://arxiv.org/abs/2404.09656.

    Args:
        scorer: holds policy and reference.
        every: optimizer steps between two moves.
        mixup: the policy's weight in the moved reference, called alpha in the paper; 1 makes the reference a copy of the policy.
    """

    moves_reference = True

    def __init__(self, scorer: Scorer, every: int, mixup: float):
        self.scorer, self.every, self.mixup = scorer, every, mixup

    def after_step(self, progress: Progress, took_step: bool) -> None:
        if took_step and progress.updates % self.every == 0:
            move_reference(self.scorer, self.mixup)


@torch.no_grad()
def move_reference(scorer: Scorer, mixup: float) -> None:
    """Set theta_ref <- mixup theta + (1 - mixup) theta_ref for every parameter of the reference, in place; buffers stay.

    Args:
        scorer: has policy and reference.
        mixup: weight of the policy, above 0 and at most 1; 1 if the policy has adapters.
    """
    if isinstance(scorer.reference, OwnReference):
        scorer.reference.follow()
        return
    for of_reference, of_policy in zip(scorer.reference.parameters(), scorer.policy.parameters(), strict=True):
        of_reference.lerp_(of_policy.to(of_reference.dtype), mixup)


class Stages(Hook):
    """Replaces the reference by the policy after each stage of the train data except the last: sDPO, https://arxiv.org/abs/2403.19270.

    Args:
        passes: scores the examples that are to be ordered.
        batches: the train data in stages.
        easiest_first: before training, order the train examples by log pi(chosen) - log pi(rejected), largest first.
        batch_size: examples per forward pass (over all ranks) while ordering.
    """

    moves_reference = True

    def __init__(self, passes: Passes, batches: StagedBatchStream, easiest_first: bool, batch_size: int):
        self.passes, self.batches, self.easiest_first, self.batch_size = passes, batches, easiest_first, batch_size
        self.order: list[int] | None = None  # indices of the train examples; None: in the order of the data

    def before_training(self) -> None:
        if self.easiest_first:
            self.order = self.order or self._easiest_first()
            self.batches.reorder(self.order)

    @torch.no_grad()
    def _easiest_first(self) -> list[int]:
        """Return the indices of the train examples, sorted by the current policy's margin, largest first; the same on all ranks."""
        passes, data = self.passes, self.batches.split
        examples = [example for stage in self.batches.stages for example in stage]
        shards = passes.feeder.batches("train", examples, self.batch_size)
        found = []
        passes.scorer.policy.eval()
        with passes.strategy.forward_context():
            for microbatch in passes.prepared("train", shards, "Ordering"):
                scores = passes.score(microbatch, "train").scores
                margins = (scores["chosen"].logps - scores["rejected"].logps).tolist()
                found += zip(margins, map(data.index, microbatch.examples))  # zip drops a placeholder's margin
        by_rank = passes.world.gather(found)[: passes.strategy.data_rank[1]]
        return [index for _, index in sorted((pair for some in by_rank for pair in some), key=lambda pair: (-pair[0], pair[1]))]

    def after_step(self, progress: Progress, took_step: bool) -> None:
        if self.batches.ends_stage(progress.batches):
            move_reference(self.passes.scorer, 1.0)

    def state(self) -> dict[str, Any]:
        return {"order": self.order}

    def restore(self, state: dict[str, Any]) -> None:
        self.order = state["order"]


class CachedReference(Hook):
    """Stores the reference's hidden states on disk before training, if they are not there yet. Then only its head stays in memory.

    The states are computed in the microbatches of the first epoch and of an eval. With the same seed and the same microbatches they equal
    those of the live reference exactly.

    Args:
        config: a checked config.
        passes: gives access to scorer, feeder and ranks.
        batches: the train data.
        eval_examples: the examples of every eval.
        fingerprint: hash of the reference's weights; rank 0's is used.

    Raises:
        UserError: by before_training: the model does not support fast scoring, or the states cannot be written to disk.
    """

    def __init__(self, config: DictConfig, passes: Passes, batches: BatchStream, eval_examples: list[Example], fingerprint: str):
        self.config, self.passes, self.batches, self.eval_examples, self.fingerprint = config, passes, batches, eval_examples, fingerprint

    def before_training(self) -> None:
        config, passes, world, feeder = self.config, self.passes, self.passes.world, self.passes.feeder
        if not feeder.fast:
            raise UserError("reference_cache=true needs fast scoring, which this model does not support; set reference_cache=false")
        reference = passes.scorer.reference
        data, model = feeder.data, reference.config.get_text_config()
        stream = self._train_batches(data["train"])
        examples = {"train": [example for batch in stream for example in batch], "eval": self.eval_examples}
        identity = world.from_first(lambda: {"weights": self.fingerprint, "config": config_fingerprint(reference.config)})
        folder = world.from_first(lambda: os.path.abspath(get_local_dir(config.local_dirs)))
        caches = {
            split: ReferenceCache(folder, data[split], some, model.hidden_size, reference.dtype, identity)
            for split, some in examples.items()
        }
        microbatches = {
            "train": (microbatch for batch in stream for microbatch in feeder.train_microbatches(batch)),
            "eval": (feeder.as_microbatch("eval", batch) for batch in feeder.batches("eval", self.eval_examples, config.eval_batch_size)),
        }
        for split, cache in caches.items():
            there = world.from_first(cache.is_there)
            log.info(f"reference cache, {split}: {cache.plan()}; {'found' if there else 'computing it'}")
            if not there:
                cache.fill(microbatches[split], passes.scorer, world, passes.signals.check, passes.hide_progress)
            with world.agreed():
                cache.open()
        feeder.reference_caches |= caches
        if not hasattr(reference, "is_policy"):
            log.info("reference cache: only the reference's head stays in memory; samples are drawn from the policy only")
            passes.scorer.reference = HeadOnly.instead_of(reference)

    def _train_batches(self, split: TokenizedSplit) -> Iterable[list[Example]]:
        """Return the batches in which the states are computed: of all train examples, or of those that the run trains on, each once."""
        size, n_examples = self.config.batch_size, self.config.n_examples
        if not split.is_mixed and (n_examples is None or n_examples >= len(split)):
            return BatchStream(split, size, self.batches.seed, 1, drop_last=False)
        once = {split.index(example): example for batch in self.batches for example in batch}
        return [some for _, some in batched(list(once.values()), size)]


def make_hooks(
    config: DictConfig, objective: Objective, passes: Passes, batches: BatchStream, eval_examples: list[Example], fingerprint: str
) -> list[Hook]:
    """Return the hooks that the objective declares and the config asks for. See the hooks for the arguments."""
    hooks: list[Hook] = []
    if objective.needs_kl_baseline:
        hooks.append(KtoBaseline(passes))
    if config.reference.update_every is not None:
        hooks.append(MovingReference(passes.scorer, config.reference.update_every, config.reference.mixup))
    if isinstance(batches, StagedBatchStream):
        hooks.append(Stages(passes, batches, objective.easiest_first, config.eval_batch_size))
    if config.reference_cache and objective.needs_reference:
        hooks.append(CachedReference(config, passes, batches, eval_examples, fingerprint))
    return hooks
