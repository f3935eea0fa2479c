"""From examples to what the scorer takes, on the device: each process's microbatches of a batch, prepared ahead of the step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple, Optional, Union

import torch

from tdpo.data.batching import Example, TokenizedSplit, balanced_parts
from tdpo.scoring.prefix_sharing import PromptRows, prompt_rows
from tdpo.training.reference_cache import ReferenceCache

Batch = Union[PromptRows, Mapping]  # what the scorer takes, on the device


class Microbatch(NamedTuple):
    """Examples that are scored together."""

    examples: list[Example]
    batch: Batch
    mismatched: Optional[Batch] = None  # the same prompts with the responses of other ones

    def with_baseline(self, baseline: torch.Tensor) -> "Microbatch":
        """For an objective that needs one."""
        rows = isinstance(self.batch, PromptRows)
        return self._replace(
            batch=replace(self.batch, baseline=baseline) if rows else MappingProxyType({**self.batch, "baseline": baseline})
        )


class Feeder:
    """What a process scores of each batch.

    Args:
        data: by split (train, eval).
        collate: see batching.get_collate_fn.
        device: where batches go.
        part: (i, n): this process works on part i of n of every batch.
        parts, tokens: of a train batch, see batching.balanced_parts.
        placeholders: by split, an example whose tokens stand in where this process has none: a sharded model needs every process at
            every forward pass.
    """

    def __init__(
        self,
        data: Mapping[str, TokenizedSplit],
        collate: Callable[[list[dict]], dict],
        device: torch.device,
        part: tuple[int, int],
        parts: int,
        tokens: Optional[int],
        placeholders: Mapping[str, Example],
    ):
        self.data, self.collate, self.device = data, collate, device
        self.part, self.parts, self.tokens, self.placeholders = part, parts, tokens, placeholders
        self.fast = True  # rows for fast scoring, else collated batches
        self.mismatched = False  # whether prompts are wanted with the responses of other ones too
        self.reference_caches: Mapping[str, ReferenceCache] = {}  # by split

    def share(self, items: list) -> list:
        """This process's part of them."""
        i, n = self.part
        return items[i::n]

    def train(self, examples: Sequence[Example]) -> list[Microbatch]:
        """This process's part of a batch, in microbatches of about equal tokens; as many on all processes.

        One may be empty where another process's is not: its forward and backward are then needed all the same.
        """
        rank, ranks = self.part
        lengths = self.data["train"].lengths(examples)
        if self.mismatched:  # whichever of its two rows is longer
            others = (self.data["train"].tokens(example, mismatched=True) for example in examples)
            lengths = [max(n, len(prompt) + len(response)) for n, (prompt, (response,)) in zip(lengths, others)]
        rounds = balanced_parts(lengths, ranks, self.parts, self.tokens)
        return [self._microbatch([examples[i] for i in microbatches[rank]], "train") for microbatches in rounds]

    def whole(self, split: str, examples: list[Example]) -> Microbatch:
        """These examples together."""
        return self._microbatch(examples, split)

    def _microbatch(self, examples: list[Example], split: str) -> Microbatch:
        scored = examples or [self.placeholders[split]]
        return Microbatch(examples, self._batch(scored, split), self._batch(scored, split, mismatched=True) if self.mismatched else None)

    def _batch(self, examples: list[Example], split: str, mismatched: bool = False) -> Batch:
        data = self.data[split]
        if not self.fast:
            # A proxy, because FSDP would move a dict's labels to the device too, and finding the response tokens would wait for it.
            return MappingProxyType(self.collated([data.element(example, mismatched) for example in examples]))
        tokens = [data.tokens(example, mismatched) for example in examples]
        masks = [data.masks(example, mismatched) for example in examples] if data.has_masks else None
        annotations = [data.annotations(example) for example in examples]
        rows = prompt_rows(tokens, masks, annotations if all(annotations) else None)
        if split in self.reference_caches:
            rows = self.reference_caches[split].add_to(rows, examples)
        return (rows.pin_memory() if self.device.type == "cuda" else rows).to(self.device)

    def collated(self, elements: list[dict]) -> dict:
        """Token ids and masks on the device; labels stay, so that finding the response tokens does not wait for it."""
        batch = self.collate(elements)
        return {k: v.to(self.device, non_blocking=True) if k.endswith(("_input_ids", "_mask")) else v for k, v in batch.items()}
