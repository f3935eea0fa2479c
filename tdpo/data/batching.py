"""Global batches of a split's examples, prepared ahead of their use, and collated."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Optional, TypeVar, Union

import numpy as np
import torch
from omegaconf import DictConfig
from torch.nn.utils.rnn import pad_sequence

from tdpo.data.split import Example, TokenizedSplit, reshuffled
from tdpo.utils import IGNORED, UserError, plural

Item, Prepared = TypeVar("Item"), TypeVar("Prepared")


class BatchStream:
    """Global batches of examples, for n_epochs or until n_examples have been yielded, whichever comes first.

    Args:
        split: where the examples come from.
        batch_size: examples per batch.
        seed: random seed of the examples' order.
        n_epochs: passes over the split; None: n_examples alone decides.
        n_examples: stop after the batch that reaches this number, which is not cut; None: n_epochs alone decides.
        drop_last: drop the examples at the end of an epoch that do not fill a batch.
        shuffle: shuffle every epoch; False keeps the order of the data.

    Raises:
        UserError: the split has no batch, or n_epochs and n_examples are both None.
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
        self._check_size("the split", split.epoch_size)

    def _check_size(self, what: str, size: int) -> None:
        if size < self.batch_size and self.drop_last or size == 0:
            raise UserError(
                f"{what} has {plural(size, 'example')}, fewer than batch_size={self.batch_size}: "
                "use a smaller batch_size, more data, or drop_last=false"
            )

    def _sizes(self, n_epochs: Optional[int]) -> Iterator[int]:
        """Yield the number of examples of each of n_epochs, None for without end."""
        size = self.split.epoch_size
        return itertools.repeat(size) if n_epochs is None else itertools.repeat(size, n_epochs)

    def _orders(self) -> Iterator[Sequence[Example]]:
        """Yield the examples of each epoch, in order."""
        return self.split.train_epochs(self.seed, self.shuffle)

    def _bounds(self, n_epochs: Optional[int], n_examples: Optional[int]) -> Iterator[tuple[int, int, int]]:
        """Yield (epoch, start, stop) of each batch of n_epochs, until n_examples have been yielded."""
        given = 0
        for epoch, size in enumerate(self._sizes(n_epochs)):
            end = size - size % self.batch_size if self.drop_last else size
            for start in range(0, end, self.batch_size):
                if n_examples is not None and given >= n_examples:
                    return
                stop = min(start + self.batch_size, end)
                given += stop - start
                yield epoch, start, stop

    def __len__(self) -> int:
        return self.count(self.n_epochs, self.n_examples)

    def count(self, n_epochs: Optional[int], n_examples: Optional[int]) -> int:
        """Return the number of batches that the stream would have with this end."""
        return sum(1 for _ in self._bounds(n_epochs, n_examples))

    def __iter__(self) -> Iterator[list[Example]]:
        return self.after(0)

    def after(self, n_batches: int) -> Iterator[list[Example]]:
        """Yield the batches after the first n_batches, to resume a run."""
        epochs = self._orders()
        current, order = -1, []
        for epoch, start, stop in itertools.islice(self._bounds(self.n_epochs, self.n_examples), n_batches, None):
            while current < epoch:  # an epoch's order depends on the one before
                current, order = current + 1, next(epochs)
            yield order[start:stop]

    @property
    def dropped(self) -> int:
        """The number of examples dropped at the end of each epoch; 0 if the stream ends before the first epoch does."""
        per_epoch = self.split.epoch_size // self.batch_size
        return self.split.epoch_size % self.batch_size if self.drop_last and len(self) >= per_epoch else 0


class StagedBatchStream(BatchStream):
    """Batches of consecutive stages of the split: a stage's examples are yielded for n_epochs, then the next stage begins.

    Args:
        stages: number of stages, of about equal size.
        others, more: the further arguments of BatchStream; n_epochs is required.

    Raises:
        UserError: a stage has no batch.
    """

    def __init__(self, stages: int, split: TokenizedSplit, batch_size: int, seed: int, n_epochs: int, *others, **more):
        super().__init__(split, batch_size, seed, n_epochs, *others, **more)
        examples = next(split.train_epochs(seed, shuffle=False))
        self.stages = [examples[len(examples) * i // stages : len(examples) * (i + 1) // stages] for i in range(stages)]
        self._check_size("a stage", min(map(len, self.stages)))

    def reorder(self, indices: Sequence[int]) -> None:
        """Fill the stages with the split's examples in another order.

        Args:
            indices: the indices of all examples (`TokenizedSplit.index`) in the new order.
        """
        examples = {self.split.index(example): example for stage in self.stages for example in stage}
        ordered = iter([examples[i] for i in indices])
        self.stages = [list(itertools.islice(ordered, len(stage))) for stage in self.stages]

    def _sizes(self, n_epochs: Optional[int]) -> Iterator[int]:
        return (len(stage) for stage in self.stages for _ in range(n_epochs))

    def _orders(self) -> Iterator[Sequence[Example]]:
        seeds = np.random.RandomState(self.seed)
        return (order for stage in self.stages for order in itertools.islice(reshuffled(stage, seeds, self.shuffle), self.n_epochs))

    def ends_stage(self, n_batches: int) -> bool:
        """Whether a stage ends with the n_batches-th batch and another stage follows."""
        return n_batches in self._stage_ends

    @functools.cached_property
    def _stage_ends(self) -> set[int]:
        # Ignores n_examples: a later run may raise it and continue with the next stage.
        stage_of = [epoch // self.n_epochs for epoch, *_ in self._bounds(self.n_epochs, None)]
        return {i for i, (stage, following) in enumerate(itertools.pairwise(stage_of), 1) if stage != following}

    @property
    def dropped(self) -> int:
        """Examples dropped at the end of each epoch, summed over the stages."""
        return sum(len(stage) % self.batch_size for stage in self.stages) if self.drop_last else 0


def prefetched(prepare: Callable[[Item], Prepared], items: Iterable[Item]) -> Iterator[tuple[Item, Prepared]]:
    """Yield (item, prepare(item)) of each item; a thread prepares the next item while the caller uses this one."""
    # A thread begins on the first GPU, whichever its process uses.
    device = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)} if torch.cuda.is_initialized() else {}
    with ThreadPoolExecutor(1, thread_name_prefix="ahead", **device) as pool:
        waiting = None
        for item in items:
            ready, waiting = waiting, (item, pool.submit(prepare, item))
            if ready is not None:
                yield ready[0], ready[1].result()
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def get_collate_fn(tokenizer) -> Callable[[list[dict]], dict[str, Union[list, torch.Tensor]]]:
    """Return a function that collates batch elements (tokenization.batch_element).

    Args:
        tokenizer: provides the padding token.

    Returns:
        A function from B elements to a batch. Token lists become int64 tensors (B, longest), with padding on the left for prompts and on
        the right otherwise; other values become lists.
    """

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


def batches_of(config: DictConfig, stages: int, split: TokenizedSplit) -> BatchStream:
    """Return the batches of a run.

    Args:
        config: a checked config.
        stages: of the objective.
        split: the train data.
    """
    schedule = config.batch_size, config.seed, config.n_epochs, config.n_examples, config.drop_last
    return StagedBatchStream(stages, split, *schedule) if stages > 1 else BatchStream(split, *schedule)
