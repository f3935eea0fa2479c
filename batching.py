"""Pairs to tokens to global batches: a split tokenized once, its published order, batches of it, and their collation."""

import bisect
import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional, TypeVar, Union

import numpy as np
import torch
import tqdm
from torch.nn.utils.rnn import pad_sequence

from tokenization import batch_element, encode, trim_after_eos, truncate, with_bos, with_eos
from utils import IGNORED, UserError, plural

Dataset = dict[str, dict]  # what a loader returns, see preference_datasets.py
Item, Prepared = TypeVar("Item"), TypeVar("Prepared")


class Example(NamedTuple):
    """Index of a prompt of the split and of its pair (0 for SFT)."""

    prompt: int
    pair: int


class TokenizedSplit:
    """A split of one or several datasets, tokenized once.

    Args:
        datasets: by name, their contract and options.
        tokenizer: of Transformers.
        max_length, max_prompt_length: tokens, see `tokenization.truncate`.
        sft_mode: one example a prompt, its sft_target, under the role chosen.
        add_bos: begin every prompt with the tokenizer's beginning-of-sequence token.
        silent: no progress bar.
    """

    def __init__(
        self,
        datasets: Mapping[str, tuple[Dataset, Mapping]],
        tokenizer,
        max_length: int,
        max_prompt_length: int,
        sft_mode: bool,
        add_bos: bool = False,
        silent: bool = False,
    ):
        self.max_length, self.max_prompt_length, self.sft_mode = max_length, max_prompt_length, sft_mode
        self.bos_token_id = tokenizer.bos_token_id if add_bos else None
        known = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, None}
        self.unknown_token_id = None if tokenizer.unk_token_id in known else tokenizer.unk_token_id
        self.prompts: list[dict] = []
        for name, (data, options) in datasets.items():
            total = sum(1 + len(_texts(entry, sft_mode)) for entry in data.values())
            with tqdm.tqdm(total=total, desc=f"Tokenizing {name}", unit=" texts", disable=True if silent else None) as progress:
                self.prompts += _tokenize(name, data, options, tokenizer, add_bos, sft_mode, progress)
        self.examples_per_prompt = [1 if sft_mode else len(entry["pairs"]) for entry in self.prompts]

    def __len__(self) -> int:
        """Number of examples: pairs, or prompts for SFT."""
        return sum(self.examples_per_prompt)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and pairs, and of the lengths to which they are cut."""
        digest = hashlib.sha256(f"{self.max_length} {self.max_prompt_length} {self.sft_mode} {self.bos_token_id}".encode())
        for entry in self.prompts:
            digest.update(f"{entry['pairs']} {entry['truncation_mode']} {len(entry['prompt_ids'])}".encode())
            for ids in (entry["prompt_ids"], *entry["response_ids"]):
                digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        return digest.hexdigest()

    def epochs(self, seed: int, shuffle: bool = True) -> Iterator[list[Example]]:
        """The examples of each epoch, for ever, in the order of the published TDPO code (its DPO ancestor draws seeds below 2**32)."""
        order = list(range(len(self.prompts)))
        seeds = np.random.RandomState(seed)
        while True:
            if shuffle:
                random.Random(int(seeds.randint(0, 2**31))).shuffle(order)
            yield [Example(prompt, pair) for prompt in order for pair in range(self.examples_per_prompt[prompt])]

    def element(self, example: Example) -> dict:
        """The example in the published form (`tokenization.batch_element`), and `example_id`, '<dataset>:<prompt>.<pair>'."""
        entry = self.prompts[example.prompt]
        indices = self._responses(entry, example)
        roles = ("chosen", "rejected")[: len(indices)]
        prompt_ids, response_ids = self._truncated(entry, indices)
        texts = {role: entry["texts"][i] for role, i in zip(roles, indices)}
        element = batch_element(entry["prompt"], texts, prompt_ids, dict(zip(roles, response_ids)))
        element["example_id"] = f"{entry['dataset']}:{example.prompt}.{example.pair}"
        return element

    def tokens(self, example: Example) -> tuple[list[int], list[list[int]]]:
        """The example's prompt and its responses, chosen first, after truncation."""
        entry = self.prompts[example.prompt]
        return self._truncated(entry, self._responses(entry, example))

    def length(self, example: Example) -> int:
        """Tokens of the example, its prompt counted once."""
        prompt, responses = self.tokens(example)
        return len(prompt) + sum(map(len, responses))

    def _responses(self, entry: dict, example: Example) -> Sequence[int]:
        return (0,) if self.sft_mode else entry["pairs"][example.pair]

    def _truncated(self, entry: dict, indices: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        responses = [entry["response_ids"][i].tolist() for i in indices]
        return truncate(
            entry["prompt_ids"].tolist(), responses, entry["truncation_mode"], self.max_length, self.max_prompt_length, self.bos_token_id
        )

    def describe(self) -> str:
        """'1,536 pairs of 1,500 prompts, 345,678 tokens; 12 prompts and 3 responses truncated; 2 occur more than once'."""
        tokens = unknown = cut_prompts = cut_responses = 0
        seen = set()
        for entry in self.prompts:
            for indices in [(0,)] if self.sft_mode else entry["pairs"]:
                prompt_ids, responses = self._truncated(entry, indices)
                tokens += sum(len(prompt_ids) + len(ids) for ids in responses)
                unknown += sum(prompt_ids.count(self.unknown_token_id) + ids.count(self.unknown_token_id) for ids in responses)
                cut_prompts += len(prompt_ids) < len(entry["prompt_ids"])
                cut_responses += sum(len(ids) < len(entry["response_ids"][i]) for ids, i in zip(responses, indices))
                seen.add(hash((entry["prompt"], *(entry["texts"][i] for i in indices))))
        parts = [f"{plural(len(self), 'example' if self.sft_mode else 'pair')} of {plural(len(self.prompts), 'prompt')}, {tokens:,} tokens"]
        if cut_prompts or cut_responses:
            parts.append(f"{plural(cut_prompts, 'prompt')} and {plural(cut_responses, 'response')} truncated")
        if len(seen) < len(self):
            parts.append(f"{len(self) - len(seen):,} occur more than once")
        if unknown:
            parts.append(f"{unknown:,} tokens are unknown to the tokenizer")
        return "; ".join(parts)


def _texts(entry: dict, sft_mode: bool) -> list[str]:
    return [entry["sft_target"]] if sft_mode else entry["responses"]


def _tokenize(name: str, data: Dataset, options: Mapping, tokenizer, add_bos: bool, sft_mode: bool, progress) -> Iterator[dict]:
    """What TokenizedSplit keeps of each prompt: its texts and their tokens."""
    escape = options.get("escape_special_tokens", False)
    prompts = list(data)
    texts = [[trim_after_eos(text, tokenizer) for text in _texts(entry, sft_mode)] for entry in data.values()]
    all_prompt_ids = encode(prompts, tokenizer, escape, progress)
    flat_ids = iter(encode([text for some in texts for text in some], tokenizer, escape, progress))
    for prompt, prompt_ids, some in zip(prompts, all_prompt_ids, texts):
        if add_bos:
            prompt_ids = with_bos(prompt_ids, tokenizer)
        if not prompt_ids:
            raise UserError(f"{name}: prompt {prompt!r} has no tokens: the first response token would have nothing to be predicted from")
        yield {
            "dataset": name,
            "prompt": prompt,
            "texts": some,
            # Arrays, because a list of Python ints takes nine times the memory.
            "prompt_ids": np.asarray(prompt_ids, dtype=np.int32),
            "response_ids": [np.asarray(with_eos(next(flat_ids), tokenizer), dtype=np.int32) for _ in some],
            "pairs": data[prompt]["pairs"],
            "truncation_mode": options["truncation_mode"],
        }


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
    budgets = range(lengths[order[0]], len(lengths) * lengths[order[0]] + 1)
    # The smallest budget that needs no more parts than wanted: all of them are then about as large as it.
    cuts = cut(budgets[bisect.bisect_left(budgets, -wanted, key=lambda budget: -len(cut(budget)))])
    while len(cuts) < wanted and len(largest := max(cuts, key=cost)) > 1:
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
