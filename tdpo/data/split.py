"""A tokenized split of one or several datasets: its examples, and their order in each epoch."""

import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Optional, TypeVar

import datasets
import numpy as np

from tdpo.data.contract import COMPLETIONS, PAIRS, Form, Take
from tdpo.data.token_cache import digest_of, flat
from tdpo.data.tokenization import batch_element, truncate, truncated_lengths
from tdpo.utils import UserError, plural, some_of

EVAL_SEED = 0  # of the eval order; fixed, so that runs with different seeds see the same eval pairs
MANY_UNKNOWN = 0.1  # fraction of unknown tokens above which a warning is given: a tokenizer of a real language model knows all
Item = TypeVar("Item")


class Example(NamedTuple):
    """An example, as index of a prompt in the split and index of its pair (SFT: 0; unpaired data: index of its completion)."""

    prompt: int
    pair: int
    partner: Optional[tuple[int, int]] = None  # unpaired data: (prompt, pair) of the epoch's next example with another prompt
    mismatched: bool = False  # stands for this prompt with the partner's response


class TokenizedExample(NamedTuple):
    """An example after truncation; responses, masks and annotations are in the order of the form's roles."""

    prompt: list[int]
    responses: list[list[int]]
    masks: Optional[list[list[int]]]  # loss mask of each response, 1 = in the loss; None if no response of the split has one
    annotations: list[float]  # of each response: its rating, or its label (1 desirable, 0 not); [] if the form has neither

    def counts(self) -> list[int]:
        """Return the number of tokens in the loss for each response."""
        return list(map(len, self.responses)) if self.masks is None else list(map(sum, self.masks))


class TokenizedSplit:
    """A split of one or several datasets, tokenized.

    Args:
        tables: one per dataset, see token_cache.tokenize.
        tokenizer: of Transformers.
        max_length, max_prompt_length: tokens, see tokenization.truncate.
        form: of the examples.
        add_bos: whether prompts begin with the tokenizer's beginning-of-sequence token.
        takes: how many examples of each table an epoch of training takes; None: all.

    Raises:
        UserError: a table has fewer examples than are to be taken; truncation would cut off tokens of a segment, or leave a response
            without tokens, in the loss.
    """

    def __init__(
        self,
        tables: Sequence[datasets.Dataset],
        tokenizer,
        max_length: int,
        max_prompt_length: int,
        form: Form,
        add_bos: bool = False,
        takes: Optional[Sequence[Take]] = None,
    ):
        self.max_length, self.max_prompt_length, self.form = max_length, max_prompt_length, form
        self.bos_token_id = tokenizer.bos_token_id if add_bos else None
        known = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, None}
        self.unknown_token_id = None if tokenizer.unk_token_id in known else tokenizer.unk_token_id
        self.prompts = datasets.concatenate_datasets(list(tables))  # one row per prompt
        self._ids = self.prompts.select_columns(["prompt_ids", "response_ids", "masks", "examples", "annotations", "truncation_mode"])
        self.examples_per_prompt = flat(self.prompts, "examples", 0)
        self._first = np.cumsum(self.examples_per_prompt) - self.examples_per_prompt  # index of each prompt's first example
        self.names = [table.select_columns(["dataset"])[0]["dataset"] for table in tables]
        ends = np.cumsum([0, *map(len, tables)])
        self._bounds = np.append(self._first, len(self))[ends]  # of the tables, in indices of examples
        self.sizes = np.diff(self._bounds).tolist()  # examples of each table
        self.takes = [take.of(name, size) for take, name, size in zip(takes or [Take()] * len(tables), self.names, self.sizes, strict=True)]
        self.has_masks = bool(flat(self.prompts, "masks", 1).any())  # whether some response tokens are not in the loss
        self._lengths = self._truncated_lengths()
        if self.has_masks:
            self._check_masks()

    def __len__(self) -> int:
        """Return the number of examples: pairs, completions, or prompts for SFT."""
        return int(self.examples_per_prompt.sum())

    @property
    def epoch_size(self) -> int:
        """The number of examples of an epoch of training: all, unless only a part of a dataset is taken."""
        return sum(self.takes)

    @property
    def is_mixed(self) -> bool:
        """Whether an epoch of training takes only a part of a dataset."""
        return self.takes != self.sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        """The hash of all tokens and pairs, and of the lengths to which they are cut."""
        form = f"Form(roles={self.form.roles}, scored={self.form.rated}, segments={self.form.segments})"  # as hashed in older checkpoints
        cut = f"{self.max_length} {self.max_prompt_length} {form} {self.bos_token_id}"
        return hashlib.sha256(f"{cut} {digest_of(self.prompts)}".encode()).hexdigest()

    @property
    def files(self) -> list[str]:
        """The files that are mapped into memory; [] if the tables are held in memory."""
        return [file["filename"] for file in self.prompts.cache_files]

    def in_memory(self) -> "TokenizedSplit":
        """Return a copy held in memory, for ranks that cannot read the files."""
        copy = object.__new__(TokenizedSplit)
        vars(copy).update(vars(self))
        copy.prompts, copy._ids = (datasets.Dataset(datasets.table.InMemoryTable(x.data.table)) for x in (self.prompts, self._ids))
        return copy

    def epochs(self, seed: int, shuffle: bool = True) -> Iterator[list[Example]]:
        """Yield the examples of each epoch, without end, in the order of the published TDPO code (the DPO code draws seeds below 2**32).

        Args:
            seed: of the orders.
            shuffle: False keeps the order of the data in every epoch.
        """
        return self._epochs(seed, shuffle, lambda epoch, examples: examples)

    def train_epochs(self, seed: int, shuffle: bool = True) -> Iterator[list[Example]]:
        """Yield as `epochs`, but of each dataset only the examples that an epoch takes, drawn anew for every epoch by the seed."""
        return self._epochs(seed, shuffle, functools.partial(self._taken, seed) if self.is_mixed else lambda epoch, examples: examples)

    def _epochs(self, seed: int, shuffle: bool, choose: Callable[[int, list[Example]], list[Example]]) -> Iterator[list[Example]]:
        pairs = self.examples_per_prompt.tolist()
        for epoch, order in enumerate(reshuffled(range(len(self.prompts)), np.random.RandomState(seed), shuffle)):
            examples = choose(epoch, [Example(prompt, pair) for prompt in order for pair in range(pairs[prompt])])
            yield with_partners(examples) if self.form.roles == COMPLETIONS.roles and len(pairs) > 1 else examples

    def _taken(self, seed: int, epoch: int, examples: list[Example]) -> list[Example]:
        """Return the examples that an epoch takes, in their order."""
        taken = np.zeros(len(self), dtype=bool)
        for i, (start, size, take) in enumerate(zip(self._bounds, self.sizes, self.takes)):
            taken[start + np.random.RandomState([seed, epoch, i]).permutation(size)[:take]] = True
        return [example for example in examples if taken[self.index(example)]]

    def dataset_of(self, examples: Sequence[Example]) -> np.ndarray:
        """Return the dataset of each example, as index into `names`."""
        return np.searchsorted(self._bounds, [self.index(example) for example in examples], side="right") - 1

    def index(self, example: Example) -> int:
        """Return an example's index in the split, which does not depend on an epoch's order."""
        return int(self._first[example.prompt]) + example.pair

    def example(self, example: Example) -> TokenizedExample:
        """Return an example's tokens, truncated; a mismatched example has its partner's response."""
        return self._tokenized(self._ids[example.prompt], example)

    def _tokenized(self, entry: Mapping, example: Example) -> TokenizedExample:
        """Return an example's tokens, given its prompt's table row."""
        source, pair = (self._ids[example.partner[0]], example.partner[1]) if example.mismatched else (entry, example.pair)
        indices = source["examples"][pair]
        whole = [source["response_ids"][i] for i in indices]
        lengths = self.max_length, self.max_prompt_length
        prompt, responses = truncate(entry["prompt_ids"], whole, entry["truncation_mode"], *lengths, self.bos_token_id)
        masks = None
        if self.has_masks:
            masks = [source["masks"][i][: len(ids)] or [1] * len(ids) for i, ids in zip(indices, responses)]
        return TokenizedExample(prompt, responses, masks, entry["annotations"][example.pair])

    def element(self, example: Example) -> dict:
        """Return an example in the published form (tokenization.batch_element), with `example_id`, '<dataset>:<prompt>.<pair>', and
        `<role>_annotation` if the form has ratings or labels."""
        entry, roles = self.prompts[example.prompt], self.form.roles
        texts = dict(zip(roles, (entry["texts"][i] for i in entry["examples"][example.pair])))
        prompt, responses, masks, annotations = self._tokenized(entry, example)
        by_role = dict(zip(roles, responses)), None if masks is None else dict(zip(roles, masks))
        element = batch_element(entry["prompt"], texts, prompt, *by_role)
        element["example_id"] = f"{entry['dataset']}:{example.prompt}.{example.pair}"
        return element | {f"{role}_annotation": value for role, value in zip(roles, annotations)}

    def _check_masks(self) -> None:
        """Raise UserError if truncation leaves a response without tokens in the loss, or segments with unequal numbers of turns."""
        lost = []
        for i, example in enumerate(next(self.epochs(0, shuffle=False))):
            entry = self._ids[example.prompt]
            whole = [sum(entry["masks"][k]) for k in entry["examples"][example.pair]]  # 0 for a response without a mask
            left = list(map(sum, self.example(example).masks))
            lost += [i] if any(m < n and (self.form.segments or m == 0) for m, n in zip(left, whole)) else []
        if lost:
            raise UserError(
                f"{plural(len(lost), 'example')} ({some_of(lost)}) of {len(self):,} have turns that are in the loss beyond "
                f"max_length={self.max_length}: raise it, or remove these examples"
            )

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return each example's number of tokens after truncation, with its prompt counted once."""
        return self.parts(examples).sum(-1).tolist()

    def parts(self, examples: Sequence[Example]) -> np.ndarray:
        """Return the lengths of prompt and responses after truncation, (examples, 1 + responses), in tokens."""
        if not examples or not examples[0].mismatched:
            return self._lengths[[self.index(example) for example in examples]]
        prompts = self._whole_lengths[[self.index(example) for example in examples], :1]
        responses = self._whole_lengths[[self.index(Example(*example.partner)) for example in examples], 1:]
        return truncated_lengths(np.concatenate([prompts, responses], axis=1), self.max_length, self.max_prompt_length)

    def response_tokens(self) -> np.ndarray:
        """Return each example's number of response tokens in the loss, over all its responses: (examples,), by `index`."""
        if self.has_masks:
            examples = next(self.epochs(0, shuffle=False))
            return np.array([sum(self.example(example).counts()) for example in examples])
        return self._lengths[:, 1:].sum(-1)

    def _truncated_lengths(self) -> np.ndarray:
        """Return the lengths of all examples as `parts`; those before truncation are kept in `_whole_lengths`."""
        prompts = np.repeat(flat(self.prompts, "prompt_ids", 0), self.examples_per_prompt)
        counts = flat(self.prompts, "response_ids", 0)
        starts = np.repeat(np.cumsum(counts) - counts, self.examples_per_prompt)[:, None]
        indices = flat(self.prompts, "examples", 2).reshape(-1, len(self.form.roles))
        responses = flat(self.prompts, "response_ids", 1)[starts + indices]
        self._whole_lengths = np.concatenate([prompts[:, None], responses], axis=1)
        return truncated_lengths(self._whole_lengths, self.max_length, self.max_prompt_length)

    def _equal_pairs(self) -> int:
        """Return the number of pairs whose chosen and rejected responses have the same tokens after truncation."""
        if self.form.roles[:2] != PAIRS.roles:
            return 0
        counts = flat(self.prompts, "response_ids", 0)
        whole = flat(self.prompts, "response_ids", 1)
        ids, starts = flat(self.prompts, "response_ids", 2), np.cumsum(whole) - whole  # of each response's first token
        first = np.repeat(np.cumsum(counts) - counts, self.examples_per_prompt)
        indices = flat(self.prompts, "examples", 2).reshape(-1, len(self.form.roles)) + first[:, None]
        lengths = self._lengths[:, 1:]
        alike = np.flatnonzero(lengths[:, 0] == lengths[:, 1])
        return sum(np.array_equal(*(ids[starts[i] : starts[i] + n] for i in two)) for two, n in zip(indices[alike, :2], lengths[alike, 0]))

    def describe(self) -> str:
        """Return '1,536 pairs of 1,500 prompts, 345,678 tokens; 12 prompts and 3 responses truncated; 2 occur more than once'."""
        cut = self._lengths < self._whole_lengths
        tokens = int((self._lengths[:, :1] + self._lengths[:, 1:]).sum())
        kind = "example" if len(self.form.roles) == 1 else "pair"
        parts = [f"{plural(len(self), kind)} of {plural(len(self.prompts), 'prompt')}, {tokens:,} tokens"]
        if cut.any():
            parts.append(f"{plural(int(cut[:, 0].sum()), 'prompt')} and {plural(int(cut[:, 1:].sum()), 'response')} truncated")
        if (equal := self._equal_pairs()) > 0:
            parts.append(f"{plural(equal, 'pair')} with equal tokens in chosen and rejected, which train nothing")
        if (repeated := len(self) - len(np.unique(flat(self.prompts, "hashes", 1)))) > 0:
            parts.append(f"{repeated:,} occur more than once")
        if self.unknown_token_id is not None:
            unknown = sum(
                int((flat(self.prompts, *place) == self.unknown_token_id).sum()) for place in (("prompt_ids", 1), ("response_ids", 2))
            )
            many = " (many: is it the model's own, and the model the right one for these data?)" if unknown > MANY_UNKNOWN * tokens else ""
            parts += [f"{unknown:,} tokens are unknown to the tokenizer{many}"] if unknown else []
        taken = [
            f"an epoch takes {take:,} of {name}'s {plural(size, kind)}"
            for name, take, size in zip(self.names, self.takes, self.sizes)
            if take < size
        ]
        return "; ".join([*parts, *taken])


def with_partners(examples: Sequence[Example]) -> list[Example]:
    """Set each example's partner: the next example (cyclically) with a different prompt. Needs at least two prompts."""
    n = len(examples)
    partners: list[Optional[tuple[int, int]]] = [None] * n
    partner = None
    for i in reversed(range(2 * n)):  # two rounds, so that the last examples see the first ones
        following = examples[(i + 1) % n]
        if following.prompt != examples[i % n].prompt:
            partner = following[:2]
        partners[i % n] = partner
    return [example._replace(partner=found) for example, found in zip(examples, partners)]


def reshuffled(items: Sequence[Item], seeds: np.random.RandomState, shuffle: bool = True) -> Iterator[list[Item]]:
    """Yield the items without end, one list per epoch.

    Args:
        items: in their original order.
        seeds: draws one seed per epoch, which shuffles the order of the epoch before.
        shuffle: False keeps the original order.
    """
    order = list(items)
    while True:
        if shuffle:
            random.Random(int(seeds.randint(0, 2**31))).shuffle(order)
        yield list(order)
