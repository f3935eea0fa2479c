"""Turns examples into this rank's microbatches: batches on the device, in the form that the scorer takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple, Optional, Union

import torch

from tdpo.data.split import Example, TokenizedSplit
from tdpo.microbatches import Packing, cut_into_microbatches, cut_into_rows, pack
from tdpo.scoring.prefix_sharing import SharedPrefixBatch, row_multiple, shared_prefix_batch
from tdpo.training.reference_cache import ReferenceCache
from tdpo.utils import to_device

Batch = Union[SharedPrefixBatch, Mapping]  # what Scorer.forward takes, on the device


class Microbatch(NamedTuple):
    """Examples that are scored together in one forward pass."""

    examples: list[Example]  # [] if a placeholder stands in, because this rank has none
    batch: Batch  # their tokens, or the placeholder's
    mismatched: Optional[Batch] = None  # KTO: the same prompts with responses to other prompts

    def with_baseline(self, baseline: torch.Tensor) -> "Microbatch":
        """Return a copy with KTO's z0.

        Args:
            baseline: z0, a scalar tensor, nats.
        """
        rows = isinstance(self.batch, SharedPrefixBatch)
        return self._replace(
            batch=replace(self.batch, baseline=baseline) if rows else MappingProxyType({**self.batch, "baseline": baseline})
        )


class Feeder:
    """Makes the microbatches that this rank scores.

    Args:
        data: by split (train, eval).
        collate: see batching.get_collate_fn.
        device: where batches are put.
        data_rank: (i, n): this rank works on the i-th of n shards of every batch.
        microbatches, budget: how a train batch is cut, see microbatches.cut_into_microbatches.
        placeholders: by split, an example that is scored, but not counted, where this rank has none: sharded models need every rank in
            every forward pass.
        fast: make batches for fast scoring (SharedPrefixBatch); else collated ones.
        packing: fill rows for fast scoring with several examples; None: one a row.
        mismatched: also pair each prompt with a response to another prompt.
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
        packing: Optional[Packing],
        mismatched: bool,
    ):
        self.data, self.collate, self.device, self.data_rank = data, collate, device, data_rank
        self.microbatches, self.budget, self.placeholders = microbatches, budget, placeholders
        self.fast, self.packing, self.mismatched = fast, packing if fast else None, mismatched
        self.reference_caches: dict[str, ReferenceCache] = {}  # by split, once they are filled

    def shard(self, items: list) -> list:
        """Return this rank's shard of the items."""
        i, n = self.data_rank
        return items[i::n]

    def batches(self, split: str, examples: Sequence[Example], size: int) -> list[list[Example]]:
        """Return this rank's shards of batches of `size` examples, sorted by length to save padding."""
        data = self.data[split]
        ordered = sorted(examples, key=lambda example: data.lengths([example]))
        return [self.shard(ordered[start : start + size]) for start in range(0, len(ordered), size)]

    def train_microbatches(self, examples: Sequence[Example]) -> list[Microbatch]:
        """Return this rank's microbatches of a global train batch, of about equal tokens; every rank gets the same number of them.

        A rank may get an empty one; it must still run forward and backward, because FSDP's collectives involve every rank.
        """
        rank, ranks = self.data_rank
        lengths = self._lengths(examples, "train")
        if self.packing is None:
            rounds = cut_into_microbatches(lengths, ranks, self.microbatches, self.budget)
            own = [[[i] for i in microbatches[rank]] for microbatches in rounds]
        else:
            own = [round[rank] for round in cut_into_rows(lengths, ranks, self.microbatches, self.packing, self.budget)]
        return [self._in_rows([[examples[i] for i in row] for row in rows], "train") for rows in own]

    def as_microbatch(self, split: str, examples: list[Example]) -> Microbatch:
        """Return these examples as one microbatch, in which they may be in another order; the split's placeholder stands in if there are
        none."""
        rows = [[i] for i in range(len(examples))]
        if self.packing is not None and examples:
            rows = pack(self._lengths(examples, split), self.packing)
        return self._in_rows([[examples[i] for i in row] for row in rows], split)

    def _lengths(self, examples: Sequence[Example], split: str) -> list[int]:
        """Return the tokens of each example."""
        lengths = self.data[split].lengths(examples)
        if self.mismatched:  # an example is in two batches: the longer one counts
            lengths = list(map(max, lengths, self.data[split].lengths([example._replace(mismatched=True) for example in examples])))
        return lengths

    def _in_rows(self, rows: list[list[Example]], split: str) -> Microbatch:
        """Return a microbatch of these rows; the split's placeholder stands in if there are none."""
        examples = [example for row in rows for example in row]
        scored, per_row = (examples, [len(row) for row in rows]) if rows else ([self.placeholders[split]], [1])
        others = self._batch([example._replace(mismatched=True) for example in scored], per_row, split) if self.mismatched else None
        return Microbatch(examples, self._batch(scored, per_row, split), others)

    def _batch(self, examples: list[Example], per_row: list[int], split: str) -> Batch:
        data = self.data[split]
        if not self.fast:
            batch = self.collate([data.element(example) for example in examples])
            # Labels stay on the CPU: finding the response tokens then does not wait for the device. FSDP moves all tensors of a dict to
            # the device, but not those of a proxy.
            moved = {k: to_device(v, self.device) for k, v in batch.items() if k.endswith(("_input_ids", "_mask"))}
            return MappingProxyType({**batch, **moved})
        rows = shared_prefix_batch([data.example(example) for example in examples], row_multiple(self.device), per_row)
        if split in self.reference_caches:
            rows = self.reference_caches[split].add_to(rows, examples)
        return (rows.pin_memory() if self.device.type == "cuda" else rows).to(self.device)
