"""The jsonl dataset: data rows in one of several forms, text or chat messages, from files or the hub."""

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Optional

import numpy as np

from tdpo.data import chat
from tdpo.data.contract import Contract, Source, add_pair
from tdpo.data.rows import Row, has_split
from tdpo.utils import UserError, plural


def load_jsonl(source: Source) -> Contract:
    """Load rows in one of the forms of JSONL_ROWS, text or chat messages (chat.py), from files or the hub.

    Without an eval split or eval_path, prompts whose hash, a number in [0, 1), is at most `eval_fraction` are the test split. A prompt is
    thus always in the same split, whatever the run's seed, the other rows, or a date that the chat template writes.
    """
    options = source.options
    eval_split = options["eval_split"] or "test"
    read = JSONL_ROWS[options["rows"]]
    if source.split == "test" and options["eval_path"]:
        return read(source, source.rows(eval_split, options["eval_path"]))[0]
    apart = options["eval_path"] or options["eval_split"]  # a requested split must exist
    if apart or has_split(options["path"], eval_split, options["subset"], source.cache_dir):
        return read(source, source.rows(options["train_split"] if source.split == "train" else eval_split))[0]
    return _held_out(source, *read(source, source.rows(options["train_split"])))


def _held_out(source: Source, data: Contract, words: Mapping[str, str]) -> Contract:
    """Return the split's prompts: the test split has those whose hash is at most eval_fraction, and at least one prompt."""
    fraction = source.options["eval_fraction"]
    hashes = {prompt: int.from_bytes(hashlib.sha256(words[prompt].encode()).digest()[:8]) / 2**64 for prompt in data}
    bound = max(fraction, min(hashes.values(), default=0))
    split = {prompt: entry for prompt, entry in data.items() if (hashes[prompt] <= bound) == (source.split == "test")}
    if data and not split:
        raise UserError(f"{plural(len(data), 'prompt')} cannot be split into train and eval: set datasets.jsonl.eval_path or .eval_split")
    source.report.notes.append(f"no eval split: takes {plural(len(split), 'prompt')} of {len(data):,} (eval_fraction={fraction})")
    return split


Words = dict[str, str]  # prompt -> its text without what a chat template adds


def _jsonl_pairs(source: Source, rows: Iterable[Row]) -> tuple[Contract, Words]:
    """Read {prompt, chosen, rejected}, optionally with {chosen_score, rejected_score}; the SFT target is the last chosen response."""
    data: Contract = defaultdict(lambda: {"responses": [], "pairs": [], "scores": []})
    words: Words = {}
    for row in rows:
        found = _texts_of(source, row, "prompt", "chosen", "rejected")
        scores = [row.fields.get(f"{role}_score") for role in ("chosen", "rejected")]
        if found is None:
            continue
        if source.form.rated and scores == [None, None]:
            source.report.refuse(row, "no chosen_score and rejected_score, which this loss needs")
        elif source.form.rated and not _in_order(scores):
            source.report.refuse(row, "chosen_score and rejected_score must be numbers, the first one greater")
        elif source.report.usable_pair(row, *found.contents):
            prompt, *responses = found.texts
            add_pair(data[prompt], *responses)
            data[prompt]["scores"] += scores
            words[prompt] = found.contents[0]
    for entry in data.values():
        if not all(map(_is_number, entry["scores"])):
            del entry["scores"]
    return dict(data), words


def _in_order(scores: Sequence) -> bool:
    return all(map(_is_number, scores)) and scores[0] > scores[1]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _jsonl_labelled(source: Source, rows: Iterable[Row]) -> tuple[Contract, Words]:
    """Read {prompt, completion, label}: single responses; the SFT target is the last desirable one."""
    columns = source.options["columns"]
    data: Contract = defaultdict(lambda: {"responses": [], "pairs": [], "labels": []})
    words: Words = {}
    for row in rows:
        found = _completion_of(source, row)
        label = row.fields.get(columns["label"])
        if not _has_columns(source, row, "prompt", "completion", "label"):
            continue
        if not isinstance(label, (bool, int)) or label not in (0, 1):
            source.report.refuse(row, f"{columns['label']!r} must be true or false")
        elif found is not None and source.report.usable_answers(row, found.contents[0], found.contents[1:]):
            prompt, response = found.texts
            data[prompt]["responses"].append(response)
            data[prompt]["labels"].append(bool(label))
            data[prompt] |= {"sft_target": response} if label else {}
            words[prompt] = found.contents[0]
    return dict(data), words


def _jsonl_scored(source: Source, rows: Iterable[Row]) -> tuple[Contract, Words]:
    """Read {prompt, completion, score}: a prompt's completions become pairs by score; the best one is the SFT target."""
    options = source.options
    column = options["columns"]["score"]
    data: Contract = defaultdict(lambda: {"responses": [], "pairs": [], "scores": []})
    words: Words = {}
    for row in rows:
        found, score = _completion_of(source, row), row.fields.get(column)
        if not _has_columns(source, row, "prompt", "completion", "score"):
            continue
        if not _is_number(score):
            source.report.refuse(row, f"{column!r} must be a number")
        elif found is not None and source.report.usable_answers(row, found.contents[0], found.contents[1:]):
            prompt, response = found.texts
            data[prompt]["responses"].append(response)
            data[prompt]["scores"].append(score)
            words[prompt] = found.contents[0]
    for entry in data.values():
        entry["pairs"] = _pairs_by_score(entry["responses"], entry["scores"], options["pairs_by"], options["min_margin"])
        entry["sft_target"] = entry["responses"][int(np.argmax(entry["scores"]))]
    pairs = sum(len(entry["pairs"]) for entry in data.values())
    kind = "every two" if options["pairs_by"] == "all" else "best and worst"
    source.report.notes.append(
        f"{plural(pairs, 'pair')}: {kind} completions of a prompt whose scores differ by more than {options['min_margin']}"
    )
    return dict(data), words


def _pairs_by_score(responses: Sequence[str], scores: Sequence[float], pairs_by: str, min_margin: float) -> list[tuple[int, int]]:
    """Return (index of the better, index of the worse) of every two responses, or of the best and the worst; equal texts make no pair."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    candidates = itertools.combinations(order, 2) if pairs_by == "all" else [(order[0], order[-1])]
    return [(i, j) for i, j in candidates if scores[i] - scores[j] > min_margin and responses[i] != responses[j]]


def _jsonl_segments(source: Source, rows: Iterable[Row]) -> tuple[Contract, Words]:
    """Read {chosen, rejected}: conversations with a shared beginning; turns marked {"segment": true} are in the loss."""
    data: Contract = defaultdict(lambda: {"responses": [], "pairs": [], "spans": []})
    words: Words = {}
    cut = 0
    _check_escaping(source)
    for row in rows:
        found = chat.render_segments(row, source.report, source.tokenizer, source.options["segments"] == "cut")
        if found is not None and source.report.usable_pair(row, *found.contents):
            prompt, *responses = found.texts
            add_pair(data[prompt], *responses)
            data[prompt]["spans"] += found.spans
            words[prompt] = found.contents[0]
            cut += found.cut
    source.report.notes += [f"{plural(cut, 'pair')} whose segments were cut to the same number of turns"] if cut else []
    return dict(data), words


JSONL_ROWS: dict[str, Callable[[Source, Iterable[Row]], tuple[Contract, Words]]] = {
    "pairs": _jsonl_pairs,
    "labelled": _jsonl_labelled,
    "scored": _jsonl_scored,
    "segments": _jsonl_segments,
}


def _texts_of(source: Source, row: Row, *names: str) -> Optional[chat.Rendered]:
    """Return prompt and responses, plain or rendered by the chat template; None if they have a defect, which is noted."""
    if not chat.has_messages(row, names):
        texts = source.report.texts(row, *names)
        return None if texts is None else chat.Rendered(tuple(texts), tuple(texts))
    _check_escaping(source)
    return chat.render(row, source.report, source.tokenizer, *names)


def _check_escaping(source: Source) -> None:
    if source.options["escape_special_tokens"]:
        raise UserError("escape_special_tokens=true would escape the chat template's own tokens too: set it to false for chat messages")


def _has_columns(source: Source, row: Row, *columns: str) -> bool:
    """Whether the row has the fields that `columns` names; if not, the missing ones and those it has are noted."""
    missing = [f"columns.{name}={field}" for name in columns if (field := source.options["columns"][name]) not in row.fields]
    if missing:
        source.report.refuse(row, f"no such field: {', '.join(missing)} (of datasets.{source.report.name}); it has {', '.join(row.fields)}")
    return not missing


def _completion_of(source: Source, row: Row) -> Optional[chat.Rendered]:
    """Return prompt and one response; plain text gets the separator in front of the response."""
    columns, separator = source.options["columns"], source.options["separator"]
    if not {columns["prompt"], columns["completion"]} <= set(row.fields):
        return None
    found = _texts_of(source, row, columns["prompt"], columns["completion"])
    if found is None or chat.has_messages(row, (columns["prompt"], columns["completion"])):
        return found
    return found._replace(texts=(found.texts[0], separator + found.texts[1]))
