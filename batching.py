"""Pairs to tokens to global batches: a split tokenized once, its published order, batches of it, and their collation."""

import bisect
import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional, TypeVar, Union

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from token_cache import digest_of, flat
from tokenization import batch_element, truncate, truncated_lengths
from utils import IGNORED, UserError, plural

EVAL_SEED = 0  # of the eval order, whatever the run's seed, so that runs of different seeds see the same eval pairs
Item, Prepared = TypeVar("Item"), TypeVar("Prepared")


class Example(NamedTuple):
    """Index of a prompt of the split and of its pair (0 for SFT)."""

    prompt: int
    pair: int


class TokenizedSplit:
    """A split of one or several datasets, tokenized once.

    Args:
        tables: of token_cache.py, one a dataset.
        tokenizer: of Transformers.
        max_length, max_prompt_length: tokens, see `tokenization.truncate`.
        sft_mode: one example a prompt, its sft_target, under the role chosen.
        add_bos: prompts begin with the tokenizer's beginning-of-sequence token.
    """

    def __init__(
        self, tables: Sequence[datasets.Dataset], tokenizer, max_length: int, max_prompt_length: int, sft_mode: bool, add_bos: bool = False
    ):
        self.max_length, self.max_prompt_length, self.sft_mode = max_length, max_prompt_length, sft_mode
        self.bos_token_id = tokenizer.bos_token_id if add_bos else None
        known = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, None}
        self.unknown_token_id = None if tokenizer.unk_token_id in known else tokenizer.unk_token_id
        self.prompts = datasets.concatenate_datasets(list(tables))  # a row a prompt
        self._ids = self.prompts.select_columns(["prompt_ids", "response_ids", "pairs", "truncation_mode"])
        pairs = flat(self.prompts, "pairs", 0)
        self.examples_per_prompt = np.ones_like(pairs) if sft_mode else pairs
        self._first = np.cumsum(self.examples_per_prompt) - self.examples_per_prompt  # example of each prompt's first pair
        self._lengths = self._truncated_lengths()

    def __len__(self) -> int:
        """Number of examples: pairs, or prompts for SFT."""
        return int(self.examples_per_prompt.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and pairs, and of the lengths to which they are cut."""
        cut = f"{self.max_length} {self.max_prompt_length} {self.sft_mode} {self.bos_token_id}"
        return hashlib.sha256(f"{cut} {digest_of(self.prompts)}".encode()).hexdigest()

    @property
    def files(self) -> list[str]:
        """That are mapped into memory; none where all of it is in memory."""
        return [file["filename"] for file in self.prompts.cache_files]

    def in_memory(self) -> "TokenizedSplit":
        """The same for who does not see the files."""
        copy = object.__new__(TokenizedSplit)
        vars(copy).update(vars(self))
        copy.prompts, copy._ids = (datasets.Dataset(datasets.table.InMemoryTable(x.data.table)) for x in (self.prompts, self._ids))
        return copy

    def epochs(self, seed: int, shuffle: bool = True) -> Iterator[list[Example]]:
        """The examples of each epoch, for ever, in the order of the published TDPO code (its DPO ancestor draws seeds below 2**32)."""
        order = list(range(len(self.prompts)))
        pairs = self.examples_per_prompt.tolist()
        seeds = np.random.RandomState(seed)
        while True:
            if shuffle:
                random.Random(int(seeds.randint(0, 2**31))).shuffle(order)
            yield [Example(prompt, pair) for prompt in order for pair in range(pairs[prompt])]

    def index(self, example: Example) -> int:
        """Its number among the split's examples, whatever the order of an epoch."""
        return int(self._first[example.prompt]) + example.pair

    def element(self, example: Example) -> dict:
        """The example in the published form (`tokenization.batch_element`), and `example_id`, '<dataset>:<prompt>.<pair>'."""
        entry = self.prompts[example.prompt]
        prompt_ids, response_ids = self.tokens(example)
        roles = ("chosen", "rejected")[: len(response_ids)]
        texts = {role: entry["texts"][i] for role, i in zip(roles, self._responses(entry, example))}
        element = batch_element(entry["prompt"], texts, prompt_ids, dict(zip(roles, response_ids)))
        element["example_id"] = f"{entry['dataset']}:{example.prompt}.{example.pair}"
        return element

    def tokens(self, example: Example) -> tuple[list[int], list[list[int]]]:
        """The example's prompt and its responses, chosen first, after truncation."""
        entry = self._ids[example.prompt]
        responses = [entry["response_ids"][i] for i in self._responses(entry, example)]
        lengths = self.max_length, self.max_prompt_length
        return truncate(entry["prompt_ids"], responses, entry["truncation_mode"], *lengths, self.bos_token_id)

    def _responses(self, entry: Mapping, example: Example) -> Sequence[int]:
        return (0,) if self.sft_mode else entry["pairs"][example.pair]

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of each example, its prompt counted once."""
        totals = self._lengths.sum(-1)
        return [int(totals[self.index(example)]) for example in examples]

    def response_tokens(self) -> np.ndarray:
        """(examples,): tokens of each example's responses together, by `index`."""
        return self._lengths[:, 1:].sum(-1)

    def _truncated_lengths(self) -> np.ndarray:
        """(examples, 1 + responses): tokens of prompt and responses after truncation, of all examples at once."""
        prompts = np.repeat(flat(self.prompts, "prompt_ids", 0), self.examples_per_prompt)
        counts = flat(self.prompts, "response_ids", 0)
        starts = np.repeat(np.cumsum(counts) - counts, self.examples_per_prompt)[:, None]
        chosen = np.zeros_like(starts) if self.sft_mode else flat(self.prompts, "pairs", 2).reshape(-1, 2)
        responses = flat(self.prompts, "response_ids", 1)[starts + chosen]
        self._whole_lengths = np.concatenate([prompts[:, None], responses], axis=1)
        return truncated_lengths(self._whole_lengths, self.max_length, self.max_prompt_length)

    def describe(self) -> str:
        """'1,536 pairs of 1,500 prompts, 345,678 tokens; 12 prompts and 3 responses truncated; 2 occur more than once'."""
        cut = self._lengths < self._whole_lengths
        tokens = int((self._lengths[:, :1] + self._lengths[:, 1:]).sum())
        parts = [f"{plural(len(self), 'example' if self.sft_mode else 'pair')} of {plural(len(self.prompts), 'prompt')}, {tokens:,} tokens"]
        if cut.any():
            parts.append(f"{plural(int(cut[:, 0].sum()), 'prompt')} and {plural(int(cut[:, 1:].sum()), 'response')} truncated")
        if (repeated := len(self) - len(np.unique(flat(self.prompts, "hashes", 1)))) > 0:
            parts.append(f"{repeated:,} occur more than once")
        if self.unknown_token_id is not None:
            unknown = sum(
                int((flat(self.prompts, *place) == self.unknown_token_id).sum()) for place in (("prompt_ids", 1), ("response_ids", 2))
            )
            parts += [f"{unknown:,} tokens are unknown to the tokenizer"] if unknown else []
        return "; ".join(parts)


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
        if len(split) < batch_size and drop_last:
            raise UserError(
                f"the split has {plural(len(split), 'example')}, fewer than batch_size={batch_size}: "
                "use a smaller batch_size, more data, or drop_last=false"
            )
        self.split, self.batch_size, self.seed, self.shuffle = split, batch_size, seed, shuffle
        self.n_epochs, self.n_examples, self.drop_last = n_epochs, n_examples, drop_last

    def _bounds(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, start, stop) of each batch."""
        epoch = given = 0
        size = len(self.split)
        end = size - size % self.batch_size if self.drop_last else size
        while self.n_epochs is None or epoch < self.n_epochs:
            for start in range(0, end, self.batch_size):
                if self.n_examples is not None and given >= self.n_examples:
                    return
                stop = min(start + self.batch_size, end)
                given += stop - start
                yield epoch, start, stop
            epoch += 1

    def __len__(self) -> int:
        return sum(1 for _ in self._bounds())

    def __iter__(self) -> Iterator[list[Example]]:
        return self.after(0)

    def after(self, n_batches: int) -> Iterator[list[Example]]:
        """The batches without the first n_batches, which were given out before."""
        epochs = self.split.epochs(self.seed, self.shuffle)
        current, order = -1, []
        for epoch, start, stop in itertools.islice(self._bounds(), n_batches, None):
            while current < epoch:  # the order of an epoch is that of the one before, shuffled
                current, order = current + 1, next(epochs)
            yield order[start:stop]

    @property
    def dropped(self) -> int:
        """Examples left out at the end of each epoch that is trained to its end."""
        per_epoch = len(self.split) // self.batch_size
        return len(self.split) % self.batch_size if self.drop_last and len(self) >= per_epoch else 0


def balanced_parts(lengths: Sequence[int], ranks: int, parts: int, tokens: Optional[int] = None) -> list[list[list[int]]]:
    """How to cut a batch: rounds of microbatches, one a rank, which are lists of indices into `lengths`.

    Examples of like length go together, and microbatches are of about equal cost: their number of examples times the longest. How a batch
    is cut changes no gradient: that is the sum over its examples, divided by their number.

    Args:
        lengths: tokens of each example.
        ranks: processes that take a microbatch each in every round.
        parts: rounds, where `tokens` is None; fewer where there are not as many examples.
        tokens: the largest cost of a microbatch, but for one of a single longer example.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def cut(budget: int) -> list[list[int]]:
        cuts: list[list[int]] = [[]]
        for i in order:
            if cuts[-1] and (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] > budget:
                cuts.append([])
            cuts[-1].append(i)
        return cuts

    def cost(part: list[int]) -> int:
        return len(part) * lengths[part[0]]

    wanted = ranks * (parts if tokens is None else -(-len(cut(tokens)) // ranks))
    budgets = range(1, (tokens or len(lengths) * lengths[order[0]]) + 1)
    # The smallest budget that needs no more parts than wanted: all of them are then about as large as it.
    cuts = cut(budgets[bisect.bisect_left(budgets, -wanted, key=lambda budget: -len(cut(budget)))])
    while len(cuts) < min(wanted, len(lengths)):
        largest = max((part for part in cuts if len(part) > 1), key=cost)
        cuts.remove(largest)
        cuts += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    cuts.sort(key=cost, reverse=True)
    cuts += [[]] * (-len(cuts) % ranks)
    return [cuts[i : i + ranks] for i in range(0, len(cuts), ranks)]


def ahead(prepare: Callable[[Item], Prepared], items: Iterable[Item]) -> Iterator[tuple[Item, Prepared]]:
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
