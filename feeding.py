"""From examples to what the scorer takes, on the device: each process's microbatches of a batch, prepared ahead of the step."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Optional, Union

import torch

from batching import Example, TokenizedSplit, balanced_parts
from reference_cache import ReferenceCache
from shared_prompt import PromptRows, prompt_rows


class Microbatch(NamedTuple):
    """Examples that are scored together; `batch` is what the scorer takes, on the device."""

    examples: list[Example]
    batch: Union[PromptRows, Mapping]


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
        rounds = balanced_parts(self.data["train"].lengths(examples), ranks, self.parts, self.tokens)
        return [self._microbatch([examples[i] for i in microbatches[rank]], "train") for microbatches in rounds]

    def eval(self, examples: list[Example]) -> Microbatch:
        """These examples together."""
        return self._microbatch(examples, "eval")

    def _microbatch(self, examples: list[Example], split: str) -> Microbatch:
        data, scored = self.data[split], examples or [self.placeholders[split]]
        if not self.fast:
            # A proxy, because FSDP would move a dict's labels to the device too, and finding the response tokens would wait for it.
            return Microbatch(examples, MappingProxyType(self.collated([data.element(example) for example in scored])))
        rows = prompt_rows([data.tokens(example) for example in scored])
        if split in self.reference_caches:
            rows = self.reference_caches[split].add_to(rows, scored)
        return Microbatch(examples, (rows.pin_memory() if self.device.type == "cuda" else rows).to(self.device))

    def collated(self, elements: list[dict]) -> dict:
        """Token ids and masks on the device; labels stay, so that finding the response tokens does not wait for it."""
        batch = self.collate(elements)
        return {k: v.to(self.device, non_blocking=True) if k.endswith(("_input_ids", "_mask")) else v for k, v in batch.items()}
