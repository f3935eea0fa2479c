"""Pairs to tokens to global batches: a split tokenized once, its published order, batches of it, and their collation."""

import bisect
import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional, TypeVar, Union

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tdpo.data.token_cache import COMPLETIONS, Form, digest_of, flat
from tdpo.data.tokenization import batch_element, truncate, truncated_lengths
from tdpo.utils import IGNORED, UserError, plural, some_of

EVAL_SEED = 0  # of the eval order, whatever the run's seed, so that runs of different seeds see the same eval pairs
Item, Prepared = TypeVar("Item"), TypeVar("Prepared")


class Example(NamedTuple):
    """Index of a prompt of the split and of its pair (for SFT 0, of unpaired data its completion)."""

    prompt: int
    pair: int
    partner: Optional[tuple[int, int]] = None  # of unpaired data: the next example of the epoch that has another prompt


class TokenizedSplit:
    """A split of one or several datasets, tokenized once.

    Args:
        tables: of token_cache.py, one a dataset.
        tokenizer: of Transformers.
        max_length, max_prompt_length: tokens, see `tokenization.truncate`.
        form: of its examples.
        add_bos: prompts begin with the tokenizer's beginning-of-sequence token.
    """

    def __init__(
        self, tables: Sequence[datasets.Dataset], tokenizer, max_length: int, max_prompt_length: int, form: Form, add_bos: bool = False
    ):
        self.max_length, self.max_prompt_length, self.form = max_length, max_prompt_length, form
        self.bos_token_id = tokenizer.bos_token_id if add_bos else None
        known = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, None}
        self.unknown_token_id = None if tokenizer.unk_token_id in known else tokenizer.unk_token_id
        self.prompts = datasets.concatenate_datasets(list(tables))  # a row a prompt
        self._ids = self.prompts.select_columns(["prompt_ids", "response_ids", "masks", "examples", "annotations", "truncation_mode"])
        self.examples_per_prompt = flat(self.prompts, "examples", 0)
        self._first = np.cumsum(self.examples_per_prompt) - self.examples_per_prompt  # example of each prompt's first pair
        self.has_masks = bool(flat(self.prompts, "masks", 1).any())  # whether some tokens of some responses are not scored
        self._lengths = self._truncated_lengths()
        if self.has_masks:
            self._check_masks()

    def __len__(self) -> int:
        """Number of examples: pairs, completions, or prompts for SFT."""
        return int(self.examples_per_prompt.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and pairs, and of the lengths to which they are cut."""
        cut = f"{self.max_length} {self.max_prompt_length} {self.form} {self.bos_token_id}"
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
            examples = [Example(prompt, pair) for prompt in order for pair in range(pairs[prompt])]
            yield with_partners(examples) if self.form.roles == COMPLETIONS.roles and len(pairs) > 1 else examples

    def index(self, example: Example) -> int:
        """Its number among the split's examples, whatever the order of an epoch."""
        return int(self._first[example.prompt]) + example.pair

    def element(self, example: Example, mismatched: bool = False) -> dict:
        """The example in the published form (`tokenization.batch_element`), and `example_id`, '<dataset>:<prompt>.<pair>'; where the data
        says something of its responses, also `<role>_annotation`. `mismatched` as in `tokens`."""
        entry = self.prompts[example.prompt]
        prompt_ids, response_ids = self.tokens(example, mismatched)
        texts = dict(zip(self.form.roles, (entry["texts"][i] for i in entry["examples"][example.pair])))
        masks = self.masks(example, mismatched)
        element = batch_element(
            entry["prompt"],
            texts,
            prompt_ids,
            dict(zip(self.form.roles, response_ids)),
            None if masks is None else dict(zip(self.form.roles, masks)),
        )
        element["example_id"] = f"{entry['dataset']}:{example.prompt}.{example.pair}"
        return element | {f"{role}_annotation": value for role, value in zip(self.form.roles, self.annotations(example))}

    def tokens(self, example: Example, mismatched: bool = False) -> tuple[list[int], list[list[int]]]:
        """The example's prompt and its responses in the order of their roles, after truncation; `mismatched`: its partner's response."""
        entry = self._ids[example.prompt]
        if mismatched:
            other = self._ids[example.partner[0]]
            responses = [other["response_ids"][i] for i in other["examples"][example.partner[1]]]
        else:
            responses = [entry["response_ids"][i] for i in entry["examples"][example.pair]]
        lengths = self.max_length, self.max_prompt_length
        return truncate(entry["prompt_ids"], responses, entry["truncation_mode"], *lengths, self.bos_token_id)

    def masks(self, example: Example, mismatched: bool = False) -> Optional[list[list[int]]]:
        """Of each of its responses after truncation, 1 for the tokens that are scored; None where all are, of all examples. `mismatched` as
        in `tokens`."""
        if not self.has_masks:
            return None
        prompt, pair = example.partner if mismatched else example[:2]
        entry = self._ids[prompt]
        masks = [entry["masks"][i] for i in entry["examples"][pair]]
        return [mask[: len(ids)] if mask else [1] * len(ids) for mask, ids in zip(masks, self.tokens(example, mismatched)[1])]

    def _check_masks(self) -> None:
        """No scored token may be cut away: segments would no longer have equal turns."""
        lost = []
        for i, example in enumerate(next(self.epochs(0, shuffle=False))):
            entry = self._ids[example.prompt]
            whole = [sum(entry["masks"][k]) for k in entry["examples"][example.pair]]  # 0 of a response that is scored as a whole
            lost += [i] if any(sum(mask) < n for mask, n in zip(self.masks(example), whole)) else []
        if lost:
            raise UserError(
                f"{plural(len(lost), 'example')} ({some_of(lost)}) of {len(self):,} have turns to be scored beyond "
                f"max_length={self.max_length}: raise it, or leave them out"
            )

    def annotations(self, example: Example) -> list[float]:
        """What the data says of each of its responses: scores, or a completion's label (1 desirable); [] for nothing."""
        return self._ids[example.prompt]["annotations"][example.pair]

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of each example, its prompt counted once."""
        totals = self._lengths.sum(-1)
        return [int(totals[self.index(example)]) for example in examples]

    def response_tokens(self) -> np.ndarray:
        """(examples,): scored tokens of each example's responses together, by `index`."""
        if self.has_masks:
            examples = next(self.epochs(0, shuffle=False))
            return np.array([sum(map(sum, self.masks(example))) for example in examples])
        return self._lengths[:, 1:].sum(-1)

    def _truncated_lengths(self) -> np.ndarray:
        """(examples, 1 + responses): tokens of prompt and responses after truncation, of all examples at once."""
        prompts = np.repeat(flat(self.prompts, "prompt_ids", 0), self.examples_per_prompt)
        counts = flat(self.prompts, "response_ids", 0)
        starts = np.repeat(np.cumsum(counts) - counts, self.examples_per_prompt)[:, None]
        indices = flat(self.prompts, "examples", 2).reshape(-1, len(self.form.roles))
        responses = flat(self.prompts, "response_ids", 1)[starts + indices]
        self._whole_lengths = np.concatenate([prompts[:, None], responses], axis=1)
        return truncated_lengths(self._whole_lengths, self.max_length, self.max_prompt_length)

    def describe(self) -> str:
        """'1,536 pairs of 1,500 prompts, 345,678 tokens; 12 prompts and 3 responses truncated; 2 occur more than once'."""
        cut = self._lengths < self._whole_lengths
        tokens = int((self._lengths[:, :1] + self._lengths[:, 1:]).sum())
        kind = "example" if len(self.form.roles) == 1 else "pair"
        parts = [f"{plural(len(self), kind)} of {plural(len(self.prompts), 'prompt')}, {tokens:,} tokens"]
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


def with_partners(examples: Sequence[Example]) -> list[Example]:
    """Each with the next one that has another prompt, of two prompts at least; after the last comes the first."""
    found: list[Example] = []
    partner = None
    for example, following in zip(reversed([*examples, *examples]), reversed([*examples, *examples, *examples[:1]][1:])):
        if following.prompt != example.prompt:
            partner = following[:2]
        found.append(example._replace(partner=partner))
    return found[: len(examples) - 1 : -1]


class BatchStream:
    """Global batches of examples, for n_epochs or until n_examples were given out, whichever comes first.

    Args:
        split: where the examples come from.
        batch_size: examples a batch.
        seed: of the order.
        n_epochs, n_examples: either may be None, not both; the last batch is whole, also where n_examples is no multiple of batch_size.
        drop_last: leave out the examples at the end of an epoch that do not fill a batch.
        shuffle: else the order of the data.
        parts: of the split's examples, each of which is given out for n_epochs before the next one; None: all together.

    Raises:
        UserError: no whole batch in the split or a part, or neither n_epochs nor n_examples is given.
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
        parts: Optional[Sequence[Sequence[Example]]] = None,
    ):
        if n_epochs is None and n_examples is None:
            raise UserError("n_epochs and n_examples are both null: give one of them")
        self.parts = parts
        smallest = min(map(len, parts)) if parts else len(split)
        if smallest < batch_size and drop_last or smallest == 0:
            raise UserError(
                f"{'a part' if parts else 'the split'} has {plural(smallest, 'example')}, fewer than batch_size={batch_size}: "
                "use a smaller batch_size, more data, or drop_last=false"
            )
        self.split, self.batch_size, self.seed, self.shuffle = split, batch_size, seed, shuffle
        self.n_epochs, self.n_examples, self.drop_last = n_epochs, n_examples, drop_last

    def _epochs(self) -> Iterator[tuple[int, int]]:
        """(part, examples) of each epoch."""
        for part, size in enumerate(map(len, self.parts) if self.parts else [len(self.split)]):
            for _ in itertools.count() if self.n_epochs is None else range(self.n_epochs):
                yield part, size

    def _bounds(self, n_examples: Optional[int]) -> Iterator[tuple[int, int, int, int]]:
        """(part, epoch, start, stop) of each batch, until so many examples were given out."""
        given = 0
        for epoch, (part, size) in enumerate(self._epochs()):
            end = size - size % self.batch_size if self.drop_last else size
            for start in range(0, end, self.batch_size):
                if n_examples is not None and given >= n_examples:
                    return
                stop = min(start + self.batch_size, end)
                given += stop - start
                yield part, epoch, start, stop

    def _orders(self) -> Iterator[Sequence[Example]]:
        """The examples of each epoch; within a part it is that of the one before, shuffled."""
        if self.parts is None:
            yield from self.split.epochs(self.seed, self.shuffle)
            return
        seeds = np.random.RandomState(self.seed)
        for part in self.parts:
            order = list(part)
            for _ in range(self.n_epochs):
                if self.shuffle:
                    random.Random(int(seeds.randint(0, 2**31))).shuffle(order)
                yield list(order)

    def ends_part(self, n_batches: int) -> bool:
        """Whether a part, which is not the last one, ends with the n-th batch."""
        return self.parts is not None and n_batches in self._part_ends

    @functools.cached_property
    def _part_ends(self) -> set[int]:
        parts = [part for part, *_ in self._bounds(None)]  # a run that ends with a part may be gone on with
        return {i for i, (part, following) in enumerate(zip(parts, parts[1:]), 1) if part != following}

    def __len__(self) -> int:
        return sum(1 for _ in self._bounds(self.n_examples))

    def __iter__(self) -> Iterator[list[Example]]:
        return self.after(0)

    def after(self, n_batches: int) -> Iterator[list[Example]]:
        """The batches without the first n_batches, which were given out before."""
        epochs = self._orders()
        current, order = -1, []
        for _, epoch, start, stop in itertools.islice(self._bounds(self.n_examples), n_batches, None):
            while current < epoch:  # one epoch's order follows from that before
                current, order = current + 1, next(epochs)
            yield order[start:stop]

    @property
    def dropped(self) -> int:
        """Examples left out at the end of each epoch, or of an epoch of each part, that is trained to its end."""
        if self.parts:
            return sum(len(part) % self.batch_size for part in self.parts) if self.drop_last else 0
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
