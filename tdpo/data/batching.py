"""From a split's examples to global batches, and from these to microbatches of about equal tokens."""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Optional, TypeVar, Union

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tdpo.data.split import Example, TokenizedSplit, reshuffled
from tdpo.utils import IGNORED, UserError, plural

Item, Prepared = TypeVar("Item"), TypeVar("Prepared")


class BatchStream:
    """Global batches of examples, for n_epochs or until n_examples were given out, whichever comes first.

    Args:
        split: where the examples come from.
        batch_size: examples a batch.
        seed: of the order.
        n_epochs, n_examples: either may be None, not both; the last batch is whole, also where n_examples is no multiple of batch_size.
        drop_last: leave out the examples at the end of an epoch that do not fill a batch.
        shuffle: else the order of the data.

    Raises:
        UserError: no whole batch in the split, or neither n_epochs nor n_examples is given.
    """

    def __init__(
        self,
        split: TokenizedSplit,
        batch_size: int,
        seed: int,
        n_epochs: Optional[int] = None,
        n_examples: Optional[int] = None,
        drop_last: bool = True,
        shuffle: bool = True,
    ):
        if n_epochs is None and n_examples is None:
            raise UserError("n_epochs and n_examples are both null: give one of them")
        self.split, self.batch_size, self.seed, self.shuffle = split, batch_size, seed, shuffle
        self.n_epochs, self.n_examples, self.drop_last = n_epochs, n_examples, drop_last
        self._check_size("the split", len(split))

    def _check_size(self, what: str, size: int) -> None:
        if size < self.batch_size and self.drop_last or size == 0:
            raise UserError(
                f"{what} has {plural(size, 'example')}, fewer than batch_size={self.batch_size}: "
                "use a smaller batch_size, more data, or drop_last=false"
            )

    def _sizes(self) -> Iterator[int]:
        """Examples of each epoch."""
        return itertools.repeat(len(self.split)) if self.n_epochs is None else itertools.repeat(len(self.split), self.n_epochs)

    def _orders(self) -> Iterator[Sequence[Example]]:
        """The examples of each epoch, in order."""
        return self.split.epochs(self.seed, self.shuffle)

    def _bounds(self, n_examples: Optional[int]) -> Iterator[tuple[int, int, int]]:
        """(epoch, start, stop) of each batch, until so many examples were given out."""
        given = 0
        for epoch, size in enumerate(self._sizes()):
            end = size - size % self.batch_size if self.drop_last else size
            for start in range(0, end, self.batch_size):
                if n_examples is not None and given >= n_examples:
                    return
                stop = min(start + self.batch_size, end)
                given += stop - start
                yield epoch, start, stop

    def __len__(self) -> int:
        return sum(1 for _ in self._bounds(self.n_examples))

    def __iter__(self) -> Iterator[list[Example]]:
        return self.after(0)

    def after(self, n_batches: int) -> Iterator[list[Example]]:
        """Yield the batches without the first n_batches, which were given out before."""
        epochs = self._orders()
        current, order = -1, []
        for epoch, start, stop in itertools.islice(self._bounds(self.n_examples), n_batches, None):
            while current < epoch:  # one epoch's order follows from that before
                current, order = current + 1, next(epochs)
            yield order[start:stop]

    @property
    def dropped(self) -> int:
        """Examples left out at the end of each epoch that is trained to its end."""
        per_epoch = len(self.split) // self.batch_size
        return len(self.split) % self.batch_size if self.drop_last and len(self) >= per_epoch else 0


class StagedBatchStream(BatchStream):
    """Batches of consecutive stages of the split: a stage's examples are given out for n_epochs before the next stage begins.

    Args:
        stages: number of stages, of about equal size.
        others: as for BatchStream; n_epochs is required.

    Raises:
        UserError: a stage has no whole batch.
    """

    def __init__(self, stages: int, split: TokenizedSplit, batch_size: int, seed: int, n_epochs: int, *others, **more):
        super().__init__(split, batch_size, seed, n_epochs, *others, **more)
        examples = next(split.epochs(seed, shuffle=False))
        self.stages = [examples[len(examples) * i // stages : len(examples) * (i + 1) // stages] for i in range(stages)]
        self._check_size("a stage", min(map(len, self.stages)))

    def reorder(self, indices: Sequence[int]) -> None:
        """Fill the stages from the split's examples in this order, given by their indices."""
        examples = next(self.split.epochs(self.seed, shuffle=False))
        ordered = iter([examples[i] for i in indices])
        self.stages = [list(itertools.islice(ordered, len(stage))) for stage in self.stages]

    def _sizes(self) -> Iterator[int]:
        return (len(stage) for stage in self.stages for _ in range(self.n_epochs))

    def _orders(self) -> Iterator[Sequence[Example]]:
        seeds = np.random.RandomState(self.seed)
        return (order for stage in self.stages for order in itertools.islice(reshuffled(stage, seeds, self.shuffle), self.n_epochs))

    def ends_stage(self, n_batches: int) -> bool:
        """Whether a stage, other than the last one, ends with the n-th batch."""
        return n_batches in self._stage_ends

    @functools.cached_property
    def _stage_ends(self) -> set[int]:
        # The stage of each batch, without regard to n_examples: a run that ends with a stage may be extended.
        stage_of = [epoch // self.n_epochs for epoch, *_ in self._bounds(None)]
        return {i for i, (stage, following) in enumerate(itertools.pairwise(stage_of), 1) if stage != following}

    @property
    def dropped(self) -> int:
        return sum(len(stage) % self.batch_size for stage in self.stages) if self.drop_last else 0


def cut_into_microbatches(lengths: Sequence[int], ranks: int, microbatches: int, budget: Optional[int] = None) -> list[list[list[int]]]:
    """Cut a batch into rounds of microbatches, one for each rank, which are lists of indices into `lengths`.

    Examples of like length go together, and microbatches are of about equal cost: their number of examples times the longest. How a batch
    is cut changes no gradient: that is the sum over its examples, divided by their number.

    Args:
        lengths: tokens of each example.
        ranks: processes that take a microbatch each in every round.
        microbatches: rounds, where `budget` is None; fewer where there are not as many examples.
        budget: the largest cost of a microbatch, in tokens; one of a single longer example may exceed it.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def cut(limit: int) -> list[list[int]]:
        cuts: list[list[int]] = [[]]
        for i in order:
            if cuts[-1] and (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] > limit:
                cuts.append([])
            cuts[-1].append(i)
        return cuts

    def cost(part: list[int]) -> int:
        return len(part) * lengths[part[0]]

    wanted = ranks * (microbatches if budget is None else -(-len(cut(budget)) // ranks))
    limits = range(1, (budget or len(lengths) * lengths[order[0]]) + 1)
    # The smallest limit that needs no more microbatches than wanted: all of them are then about as large as it.
    cuts = cut(limits[bisect.bisect_left(limits, -wanted, key=lambda limit: -len(cut(limit)))])
    while len(cuts) < min(wanted, len(lengths)):
        largest = max((part for part in cuts if len(part) > 1), key=cost)
        cuts.remove(largest)
        cuts += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    cuts.sort(key=cost, reverse=True)
    cuts += [[]] * (-len(cuts) % ranks)
    return [cuts[i : i + ranks] for i in range(0, len(cuts), ranks)]


def prefetched(prepare: Callable[[Item], Prepared], items: Iterable[Item]) -> Iterator[tuple[Item, Prepared]]:
    """(item, prepare(item)) of each item; the next one is prepared by a thread while the caller works with this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        waiting = None
        for item in items:
            ready, waiting = waiting, (item, pool.submit(prepare, item))
            if ready is not None:
                yield ready[0], ready[1].result()
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def get_collate_fn(tokenizer) -> Callable[[list[dict]], dict[str, Union[list, torch.Tensor]]]:
    """A function from batch elements to a batch: token lists padded to the longest, prompts on the left; other values as lists."""

    def collate_fn(elements: list[dict]) -> dict[str, Union[list, torch.Tensor]]:
        batch = {}
        for key in elements[0]:
            values = [element[key] for element in elements]
            if key.endswith(("_input_ids", "_attention_mask", "_labels")):
                padding = IGNORED if key.endswith("_labels") else 0 if key.endswith("_attention_mask") else tokenizer.pad_token_id
                side = "left" if key.startswith("prompt") else "right"
                tensors = [torch.tensor(value, dtype=torch.long) for value in values]
                values = pad_sequence(tensors, batch_first=True, padding_value=padding, padding_side=side)
            batch[key] = values
        return batch

    return collate_fn
