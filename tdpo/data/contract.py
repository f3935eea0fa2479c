"""The data contract: what a loader is given, what it returns, and the examples that a loss takes from that.

A loader returns a dict from prompt to a dict with

    responses    list of texts
    pairs        list of (index of the chosen response, index of the rejected response)
    sft_target   the text that SFT trains on
    scores       optional: the rating of each response
    labels       optional, instead of pairs: for each response, whether it is desirable
    spans        optional: for each response, the (start, stop) character ranges that are in the loss; [] means the whole response
    targets      optional, instead of sft_target: the indices of the responses that SFT trains on
    rendered     optional: true if the texts hold all their special tokens, end-of-sequence included, as after a chat template

Prompt and response are concatenated as they are, so a response must bring its own leading space.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Optional

from tdpo.data.rows import Row, RowReport
from tdpo.data.sources import Place, place_of, read_rows
from tdpo.utils import UserError, plural

Contract = dict[str, dict]  # see above


class Form(NamedTuple):
    """What an example consists of."""

    roles: tuple[str, ...]  # names of its responses
    rated: bool = False  # whether the data must rate each response of a pair
    segments: bool = False  # whether the data must mark the turns that are in the loss


SFT, PAIRS, PAIRS_AND_TARGET, COMPLETIONS = (
    Form(("chosen",)),
    Form(("chosen", "rejected")),
    Form(("chosen", "rejected", "target")),
    Form(("completion",)),
)


class Take(NamedTuple):
    """How many examples of a dataset an epoch of training takes: a share, or a number; with neither all."""

    share: Optional[float] = None
    n_examples: Optional[int] = None

    def of(self, name: str, size: int) -> int:
        """Return the number for a dataset of this size; a share is rounded, and takes at least one.

        Raises:
            UserError: the dataset is smaller than n_examples.
        """
        if self.n_examples is not None and self.n_examples > size:
            raise UserError(
                f"datasets.{name}.n_examples={self.n_examples}: it has {plural(size, 'train example')}; use at most that number"
            )
        if self.n_examples is not None:
            return self.n_examples
        return size if self.share is None else max(1, round(self.share * size))


class Source(NamedTuple):
    """What a loader is given."""

    split: str  # train or test
    options: Mapping  # config/datasets/<name>.yaml
    report: RowReport
    cache_dir: Optional[str]
    tokenizer: object  # for chat templates; None if the caller has none
    form: Form  # of the examples to make

    def rows(self, split: Optional[str] = None, path: Optional[str] = None) -> Iterator[Row]:
        """Yield the readable rows; the others are noted in the report.

        Args:
            split, path: None takes this source's own.
        """
        return self.report.rows(read_rows(self.place(path), split or self.split))

    def place(self, path: Optional[str] = None) -> Place:
        """Return where the rows are; `path` in place of this source's own."""
        return place_of(self.options, path, self.cache_dir)


def add_pair(entry: dict, chosen: str, rejected: str) -> None:
    """Add a pair to a prompt's entry, in place; its chosen response becomes the SFT target."""
    first = len(entry["responses"])
    entry["pairs"].append((first, first + 1))
    entry["responses"] += [chosen, rejected]
    entry["sft_target"] = chosen


class Examples(NamedTuple):
    """The examples of one prompt."""

    texts: list[str]
    spans: list[list[tuple[int, int]]]  # of each text: (start, stop) of what is in the loss, in characters; [] for all of it
    indices: list[tuple[int, ...]]  # of each example: the index of its text for each role
    annotations: list[list[float]]  # of each example: a rating or label for each role, or []
    rendered: bool = False  # whether the texts hold their special tokens


def examples_in_form(name: str, data: Contract, form: Form, unpair: bool = False) -> tuple[dict[str, Examples], list[str]]:
    """Return the examples of each prompt, and lines to log about how they were made.

    Args:
        name: of the dataset.
        data: what its loader returned.
        form: of the examples.
        unpair: make two single responses of each pair, if the form is single responses.

    Raises:
        UserError: the dataset has no examples of this form.
    """
    if form.roles == SFT.roles:
        return _targets(name, data)
    labelled = any("labels" in entry for entry in data.values())
    if labelled and form.roles == COMPLETIONS.roles:
        return _completions(data), []
    _check_paired(name, data, labelled)
    if form.roles == COMPLETIONS.roles:
        return _unpaired(name, data, unpair)
    notes = [f"{name}: unpair=true has no effect with this loss; it is for loss=kto"] if unpair else []
    return _pairs(name, data, form), notes


def _targets(name: str, data: Contract) -> tuple[dict[str, Examples], list[str]]:
    """Return one example per SFT target: one of each prompt, unless the loader gives several."""
    found = {}
    for prompt, entry in data.items():
        texts, spans = _texts_of(entry)
        targets = [texts[i] for i in entry.get("targets", ())]
        targets += [entry[key] for key in ("sft_target",) if key in entry and entry[key] not in targets]
        if targets:
            own = [spans[texts.index(target)] if target in texts else [] for target in targets]
            found[prompt] = Examples(targets, own, [(i,) for i in range(len(targets))], [[]] * len(targets), _is_rendered(entry))
    if not found:
        raise UserError(f"{name} has no SFT target: none of its responses is labelled desirable")
    left_out = len(data) - len(found)
    return found, [f"{name}: {plural(left_out, 'prompt')} without a desirable response dropped"] if left_out else []


def _completions(data: Contract) -> dict[str, Examples]:
    """Return one example per response, annotated with its label."""
    return {
        prompt: Examples(
            *_texts_of(entry),
            [(i,) for i in range(len(entry["responses"]))],
            [[float(label)] for label in entry["labels"]],
            _is_rendered(entry),
        )
        for prompt, entry in data.items()
    }


def _check_paired(name: str, data: Contract, labelled: bool) -> None:
    if labelled:
        raise UserError(f"{name} has single responses with labels, but this loss needs pairs: use loss=kto, or a dataset of pairs")
    if any(entry["pairs"] for entry in data.values()):
        return
    if any("scores" in entry for entry in data.values()):
        raise UserError(f"{name} has no pairs: the ratings of a prompt's responses are equal, or differ by too little (min_margin)")
    raise UserError(f"{name} has no pairs: use it with loss=sft, or complete its prompts with sample.py (see experiments/frontier)")


def _unpaired(name: str, data: Contract, unpair: bool) -> tuple[dict[str, Examples], list[str]]:
    """Return two examples per pair: its chosen response, desirable, and its rejected one, undesirable."""
    if not unpair:
        raise UserError(f"{name} has pairs, but this loss takes single responses: datasets.{name}.unpair=true makes two of each pair")
    single = {}
    for prompt, entry in data.items():
        if entry["pairs"]:
            texts, spans = _texts_of(entry)
            indices = [i for pair in entry["pairs"] for i in pair]
            labels = [True, False] * len(entry["pairs"])
            single[prompt] = {"responses": [texts[i] for i in indices], "spans": [spans[i] for i in indices], "labels": labels}
            single[prompt]["rendered"] = _is_rendered(entry)
    count = sum(len(entry["pairs"]) for entry in data.values())
    note = f"{name}: {plural(count, 'pair')} split into {2 * count:,} single responses, the chosen ones desirable (unpair=true)"
    return _completions(single), [note]


def _pairs(name: str, data: Contract, form: Form) -> dict[str, Examples]:
    """Return one example per pair, with the SFT target and the ratings if the form has them."""
    if form.rated and not all("scores" in entry for entry in data.values()):
        raise UserError(f"{name} has no scores, which this loss needs: use datasets=[shp], [se], [reviews], or [jsonl] with scores")
    if form.segments and not all(all(entry.get("spans") or [[]]) for entry in data.values()):
        raise UserError(f"{name} has no segments, which this loss needs: use datasets=[jsonl] datasets.jsonl.rows=segments")
    found = {}
    for prompt, entry in data.items():
        texts, spans = _texts_of(entry)
        indices = [tuple(pair) for pair in entry["pairs"]]
        annotations = [[float(entry["scores"][i]) for i in pair] if form.rated else [] for pair in indices]
        if "target" in form.roles:
            if (target := entry["sft_target"]) not in texts:
                texts, spans = [*texts, target], [*spans, []]
            indices = [(*pair, texts.index(target)) for pair in indices]
        found[prompt] = Examples(texts, spans, indices, annotations, _is_rendered(entry))
    return found


def _texts_of(entry: Mapping) -> tuple[list[str], list]:
    """Return the responses of an entry and their spans."""
    texts = list(entry["responses"])
    return texts, list(entry.get("spans") or [[]] * len(texts))


def _is_rendered(entry: Mapping) -> bool:
    return bool(entry.get("rendered"))
