"""From examples to what the scorer takes, on the device: each process's microbatches of a batch, prepared ahead of the step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple, Optional, Union

import torch

from tdpo.data.batching import cut_into_microbatches
from tdpo.data.split import Example, TokenizedSplit
from tdpo.scoring.prefix_sharing import SharedPrefixBatch, shared_prefix_batch
from tdpo.training.reference_cache import ReferenceCache

Batch = Union[SharedPrefixBatch, Mapping]  # what the scorer takes, on the device


class Microbatch(NamedTuple):
    """Examples that are scored together."""

    examples: list[Example]
    batch: Batch
    mismatched: Optional[Batch] = None  # the same prompts with the responses of other ones

    def with_baseline(self, baseline: torch.Tensor) -> "Microbatch":
        """Attach KTO's z0, a scalar in nats."""
        rows = isinstance(self.batch, SharedPrefixBatch)
        return self._replace(
            batch=replace(self.batch, baseline=baseline) if rows else MappingProxyType({**self.batch, "baseline": baseline})
        )


class Feeder:
    """What a process scores of each batch.

    Args:
        data: by split (train, eval).
        collate: see batching.get_collate_fn.
        device: where batches go.
        data_rank: (i, n): this process works on the i-th of n shards of every batch.
        microbatches, budget: of a train batch, see batching.cut_into_microbatches.
        placeholders: by split, an example whose tokens stand in where this process has none: a sharded model needs every process at
            every forward pass.
        fast: make rows for fast scoring, else collated batches.
        mismatched: pair each prompt with another one's response too.
    """

    def __init__(
        self,
        data: Mapping[str, TokenizedSplit],
        collate: Callable[[list[dict]], dict],
        device: torch.device,
        data_rank: tuple[int, int],
        *,
        microbatches: int,
        budget: Optional[int],
        placeholders: Mapping[str, Example],
        fast: bool,
        mismatched: bool,
    ):
        self.data, self.collate, self.device, self.data_rank = data, collate, device, data_rank
        self.microbatches, self.budget, self.placeholders = microbatches, budget, placeholders
        self.fast, self.mismatched = fast, mismatched
        self.reference_caches: dict[str, ReferenceCache] = {}  # by split, once they are filled

    def shard(self, items: list) -> list:
        """Return this process's shard of them."""
        i, n = self.data_rank
        return items[i::n]

    def batches(self, split: str, examples: Sequence[Example], size: int) -> list[list[Example]]:
        """Return this process's shards of batches of `size` examples; those of like length together, so that little is padded."""
        data = self.data[split]
        ordered = sorted(examples, key=lambda example: data.lengths([example]))
        return [self.shard(ordered[start : start + size]) for start in range(0, len(ordered), size)]

    def train_microbatches(self, examples: Sequence[Example]) -> list[Microbatch]:
        """Return this process's shard of a train batch, in microbatches of about equal tokens; every rank gets the same number of them.

        A rank may get an empty one; it must still run forward and backward, because FSDP's collectives involve every rank.
        """
        rank, ranks = self.data_rank
        data = self.data["train"]
        lengths = data.lengths(examples)
        if self.mismatched:  # whichever of its two rows is longer
            lengths = list(map(max, lengths, data.lengths([example._replace(mismatched=True) for example in examples])))
        rounds = cut_into_microbatches(lengths, ranks, self.microbatches, self.budget)
        return [self.as_microbatch("train", [examples[i] for i in microbatches[rank]]) for microbatches in rounds]

    def as_microbatch(self, split: str, examples: list[Example]) -> Microbatch:
        """Return these examples as one microbatch."""
        scored = examples or [self.placeholders[split]]
        others = self._batch([example._replace(mismatched=True) for example in scored], split) if self.mismatched else None
        return Microbatch(examples, self._batch(scored, split), others)

    def _batch(self, examples: list[Example], split: str) -> Batch:
        data = self.data[split]
        if not self.fast:
            batch = self.collate([data.element(example) for example in examples])
            # Labels stay on the CPU, so that finding the response tokens does not wait for the device. A proxy, because FSDP would move a
            # dict's labels too.
            moved = {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if k.endswith(("_input_ids", "_mask"))}
            return MappingProxyType({**batch, **moved})
        rows = shared_prefix_batch([data.example(example) for example in examples])
        if split in self.reference_caches:
            rows = self.reference_caches[split].add_to(rows, examples)
        return (rows.pin_memory() if self.device.type == "cuda" else rows).to(self.device)
