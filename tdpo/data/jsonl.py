"""The jsonl dataset: data rows in one of several forms, text or chat messages, from files or the hub."""

import decimal
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional, Union

from tdpo.data.chat import Chat, Rendered, has_messages
from tdpo.data.contract import SFT, Contract, Source, add_pair
from tdpo.data.rows import Row
from tdpo.data.sources import has_split, has_splits, known_split, unread_files
from tdpo.data.tokenization import completed
from tdpo.utils import UserError, plural, some_of

# Names of the fields of a row, by what they hold, where the option `columns` gives no other; several: the first that a row has.
FIELDS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("prompt", "chosen", "rejected", "completion", "messages", "score", "label", "tools")},
    "chosen_score": ("chosen_score", "score_chosen", "chosen_rating", "chosen-rating"),
    "rejected_score": ("rejected_score", "score_rejected", "rejected_rating", "rejected-rating"),
    "system": (),
}
OPTIONAL = ("chosen_score", "rejected_score", "system", "tools")  # of these a row may have none, but not all rows, if `columns` names one
# In the option `separator`, because a command line passes a backslash and a letter on as they are.
ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r"}


def load_jsonl(source: Source) -> Contract:
    """Load rows in one of the forms of JSONL_ROWS, text or chat messages (chat.py), from files or the hub.

    Without an eval split or eval_path, prompts whose hash, a number in [0, 1), is at most `eval_fraction` are the test split. A prompt is
    thus always in the same split, whatever the run's seed, the other rows, or a date that the chat template writes.
    """
    options = source.options
    place, train_split = source.place(), known_split(source.place(), options["train_split"])
    if source.split == "test" and options["eval_path"]:
        other = source.place(options["eval_path"])
        split = known_split(other, options["eval_split"] or "test")
        return _read(source, split, options["eval_path"])[0]
    eval_split = options["eval_split"] or known_split(place, "test")
    if options["eval_split"] and not has_splits(place):
        key = f"datasets.{source.report.name}"
        raise UserError(f"'{place.path}' has no splits: leave {key}.eval_split out (eval_fraction is held out), or give {key}.eval_path")
    apart = options["eval_path"] or options["eval_split"]  # a requested split must exist
    if apart or has_split(place, eval_split):
        return _read(source, train_split if source.split == "train" else eval_split)[0]
    return _held_out(source, *_read(source, train_split))


Words = dict[str, str]  # prompt -> its text without what a chat template adds


def _read(source: Source, split: str, path: Optional[str] = None) -> tuple[Contract, Words]:
    """Read a split in the form that the options name; notes say what of it is not read."""
    reader = _Reader(source)
    data, words = JSONL_ROWS[source.options["rows"]](reader, source.rows(split, path))
    notes = source.report.notes
    if split not in (source.options["train_split"], source.options["eval_split"], "test"):  # see known_split
        notes.append(f"split {split}")
    if files := unread_files(source.place(path), split):
        notes.append(f"other files of the split not read: {some_of(files, 4)}")
    reader.check_columns()
    if unread := sorted(source.report.fields - reader.read):
        notes.append(f"fields not read: {some_of(unread)}")
    return data, words


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


class _Reader:
    """Reads the fields of rows; the option `columns` names them.

    Args:
        source: of the rows.
    """

    def __init__(self, source: Source):
        self.source, self.report, self.options = source, source.report, source.options
        self.named = {key: name for key, name in (self.options.get("columns") or {}).items() if name is not None}
        self.read: set[str] = set()  # names of fields that were looked for
        separator = self.options.get("separator", "")
        for written, meant in ESCAPES.items():
            separator = separator.replace(written, meant)
        self.separator = separator
        escape = self.options.get("escape_special_tokens", False)
        system = self.named.get("system")
        self.read |= {system} if system else set()
        self.chat = Chat(source.tokenizer, self.report, escape, self.named.get("tools", "tools"), system)

    def name(self, key: str, row: Optional[Row] = None) -> str:
        """Return the name of a field; where it may have several, the one that the row has."""
        names = (self.named[key],) if key in self.named else FIELDS[key]
        given = [name for name in names if row is not None and row.fields.get(name) is not None]
        self.read.update(names if len(names) == 1 else given)
        return (given or names)[0]

    def has(self, row: Row, *keys: str) -> bool:
        """Whether the row has these fields; one with null counts as absent, as Parquet has it for rows of other forms."""
        return all(row.fields.get(self.name(key, row)) is not None for key in keys)

    def require(self, row: Row, *keys: str) -> bool:
        """Whether the row has these fields; if not, the missing ones and those it has are noted."""
        missing = [f"columns.{key}={self.name(key, row)}" for key in keys if self.name(key, row) not in row.fields]
        if missing:
            fields = ", ".join(row.fields)
            self.report.refuse(row, f"no such field: {', '.join(missing)} (of datasets.{self.report.name}); it has {fields}")
        return not missing

    def check_columns(self) -> None:
        """Raise UserError if no row has an optional field that `columns` names."""
        for key in OPTIONAL:
            name = self.named.get(key, "tools")
            if name != "tools" and self.report.fields and name not in self.report.fields:
                found = some_of(sorted(self.report.fields))
                raise UserError(f"datasets.{self.report.name}.columns.{key}={name}: no row has such a field; they have {found}")

    def texts(self, row: Row, prompt: str, *keys: str, separator: str = "") -> Optional[Rendered]:
        """Return prompt and responses, plain or rendered by the chat template; None if they have a defect, which is noted.

        Args:
            row: the row.
            prompt, keys: of its fields, see FIELDS.
            separator: comes before a response of plain text.
        """
        names = [self.name(key, row) for key in (prompt, *keys)]
        if has_messages(row, names):
            self._check_chat(row)
            return self.chat.responses(row, *names)
        texts = self.report.texts(row, *names)
        if texts is None or (texts := self._after_system(row, texts)) is None:
            return None
        texts[1:] = [separator + text for text in texts[1:]]
        if not self.options.get("rendered"):
            return Rendered(tuple(texts), tuple(texts), complete=False)
        return Rendered((texts[0], *(completed(text, self.source.tokenizer) for text in texts[1:])), tuple(texts))

    def _after_system(self, row: Row, texts: list[str]) -> Optional[list[str]]:
        """Put the row's system text, if it has one, before a prompt of plain text, with an empty line between."""
        name = self.named.get("system")
        system = row.fields.get(name) if name else None
        if not system:
            return texts
        return [f"{system}\n\n{texts[0]}", *texts[1:]] if self.report.is_text(row, name, system) else None

    def conversation(self, row: Row, key: str, prompt: Optional[str] = None) -> Optional[Rendered]:
        """Return a conversation with the replies on which SFT trains, see Chat.conversation."""
        self._check_chat(row)
        all_turns = self.options.get("assistant_turns") == "all"
        return self.chat.conversation(row, self.name(key, row), all_turns, prompt and self.name(prompt, row))

    def segments(self, row: Row) -> Optional[Rendered]:
        """Return the conversations of a row whose marked turns are in the loss, see Chat.segments."""
        self._check_chat(row)
        names = (self.name("chosen", row), self.name("rejected", row))
        return self.chat.segments(row, self.name("prompt", row), names, self.options["segments"] == "cut")

    def _check_chat(self, row: Row) -> None:
        self.name("tools", row)
        if self.options.get("rendered"):
            raise UserError(
                f"datasets.{self.report.name}.rendered=true is for text that is rendered already, but {row.source} row {row.number} holds "
                "chat messages: set it to false"
            )


def _entry(data: Contract, found: Rendered) -> dict:
    """Return the entry of a prompt, to which responses are added."""
    entry = data.setdefault(found.texts[0], {"responses": [], "pairs": []})
    if found.complete:
        entry["rendered"] = True
    return entry


def _add_spans(entry: dict, found: Rendered) -> None:
    """Add the spans of the responses that were added last, if any response of the prompt has some."""
    spans = list(found.spans) or [[]] * (len(found.texts) - 1)
    if any(spans) or "spans" in entry:
        entry.setdefault("spans", [[]] * (len(entry["responses"]) - len(spans))).extend(spans)


def _jsonl_pairs(reader: _Reader, rows: Iterable[Row]) -> tuple[Contract, Words]:
    """Read {prompt, chosen, rejected}, optionally with ratings; the SFT target is the last chosen response.

    For SFT a row may also be {messages} or {prompt, completion}.
    """
    data: Contract = {}
    words: Words = {}
    report, rated = reader.report, reader.source.form.rated
    single = _Single(reader, data, words)
    for row in rows:
        if reader.source.form.roles == SFT.roles and single.add(row):
            continue
        if not reader.has(row, "chosen") and (reader.has(row, "messages") or reader.has(row, "completion")):
            report.refuse(row, f"no field {reader.name('chosen')!r} (rows of prompt and completion, or of messages, are for loss=sft)")
            continue
        found = reader.texts(row, "prompt", "chosen", "rejected")
        given = [row.fields.get(reader.name(f"{role}_score", row)) for role in ("chosen", "rejected")]
        ratings = list(map(number_of, given))
        if found is None:
            continue
        if rated and given == [None, None]:
            report.refuse(row, "no chosen_score and rejected_score, which this loss needs")
        elif rated and not (None not in ratings and ratings[0] > ratings[1]):
            report.refuse(row, "chosen_score and rejected_score must be numbers, the first one greater")
        elif report.usable_pair(row, *found.contents, equal=found.texts[1] == found.texts[2] if found.complete else None):
            entry = _entry(data, found)
            add_pair(entry, *found.texts[1:])
            _add_spans(entry, found)
            entry.setdefault("scores", []).extend(ratings)
            words[found.texts[0]] = found.contents[0]
    for entry in data.values():
        if None in entry.get("scores", [None]):
            entry.pop("scores", None)
    single.note()
    return data, words


class _Single:
    """Reads rows that SFT alone can use: {messages}, {prompt, completion}, and, to train on all turns, the conversation in chosen.

    Args:
        reader: of the rows.
        data, words: to which their examples are added.
    """

    def __init__(self, reader: _Reader, data: Contract, words: Words):
        self.reader, self.data, self.words = reader, data, words
        self.cut = 0  # conversations of which turns after the last reply are left out

    def add(self, row: Row) -> bool:
        """Read the row if it is of such a form, and return whether it is."""
        reader = self.reader
        every = reader.options.get("assistant_turns") == "all"
        if not reader.has(row, "chosen") and reader.has(row, "messages"):
            found = reader.conversation(row, "messages")
        elif not reader.has(row, "chosen") and reader.has(row, "completion"):
            names = (reader.name("prompt", row), reader.name("completion", row))
            chat = every and has_messages(row, names)
            found = (
                reader.conversation(row, "completion", "prompt")
                if chat
                else reader.texts(row, "prompt", "completion", separator=reader.separator)
            )
        elif every and has_messages(row, [reader.name("chosen", row)]):
            reader.name("rejected", row)
            found = reader.conversation(row, "chosen", "prompt")
        else:
            return False
        if found is not None and reader.report.usable_answers(row, found.contents[0], found.contents[1:]):
            entry = _add_completion(self.data, self.words, found)
            entry.setdefault("targets", []).append(len(entry["responses"]) - 1)
            self.cut += found.cut
        return True

    def note(self) -> None:
        """Note how many conversations were cut."""
        if self.cut:
            self.reader.report.notes.append(f"{plural(self.cut, 'conversation')} cut after the last turn of the assistant")


def number_of(value: Any) -> Optional[Union[int, float]]:
    """Return a number as files and databases hold it: an integer, a float, or a decimal; None for anything else, and outside float64."""
    if isinstance(value, bool) or not isinstance(value, (int, float, decimal.Decimal)):
        return None
    if isinstance(value, decimal.Decimal):
        if not value.is_finite():
            return None
        value = int(value) if value == value.to_integral_value() else float(value)
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def _label_of(value: Any) -> Optional[bool]:
    """Return a label, given as true or false, or as the numbers 1 and 0; None for anything else."""
    number = int(value) if isinstance(value, bool) else number_of(value)
    return bool(number) if number in (0, 1) else None


def _jsonl_labelled(reader: _Reader, rows: Iterable[Row]) -> tuple[Contract, Words]:
    """Read {prompt, completion, label}: single responses; the SFT target is the last desirable one."""
    data: Contract = {}
    words: Words = {}
    for found, label in _completions(reader, rows, "label", _label_of, "true or false"):
        entry = _add_completion(data, words, found)
        entry.setdefault("labels", []).append(label)
        entry |= {"sft_target": found.texts[1]} if label else {}
    return data, words


def _jsonl_scored(reader: _Reader, rows: Iterable[Row]) -> tuple[Contract, Words]:
    """Read {prompt, completion, score}: a prompt's completions become pairs by score; the best one is the SFT target."""
    options = reader.options
    data: Contract = {}
    words: Words = {}
    for found, score in _completions(reader, rows, "score", number_of, "a number"):
        _add_completion(data, words, found).setdefault("scores", []).append(score)
    for entry in data.values():
        entry["pairs"] = _pairs_by_score(entry["responses"], entry["scores"], options["pairs_by"], options["min_margin"])
        entry["sft_target"] = entry["responses"][entry["scores"].index(max(entry["scores"]))]
    pairs = sum(len(entry["pairs"]) for entry in data.values())
    kind = "every two" if options["pairs_by"] == "all" else "best and worst"
    reader.report.notes.append(
        f"{plural(pairs, 'pair')}: {kind} completions of a prompt whose scores differ by more than {options['min_margin']}"
    )
    return data, words


def _completions(reader: _Reader, rows: Iterable[Row], key: str, read: Callable[[Any], Any], what: str) -> Iterator[tuple[Rendered, Any]]:
    """Yield the texts of the rows that have prompt, completion and a usable value in the field of `key`, with that value.

    Args:
        reader, rows: the rows, and what reads them.
        key: of a field, see FIELDS.
        read: returns the field's value, or None if it is not usable.
        what: what a usable value is, for the report.
    """
    for row in rows:
        if not reader.require(row, "prompt", "completion", key):
            continue
        found = reader.texts(row, "prompt", "completion", separator=reader.separator)
        name = reader.name(key, row)
        if (value := read(row.fields[name])) is None:
            reader.report.refuse(row, f"{name!r} must be {what}")
        elif found is not None and reader.report.usable_answers(row, found.contents[0], found.contents[1:]):
            yield found, value


def _add_completion(data: Contract, words: Words, found: Rendered) -> dict:
    """Add a response to its prompt's entry, which is returned."""
    entry = _entry(data, found)
    entry["responses"].append(found.texts[1])
    _add_spans(entry, found)
    words[found.texts[0]] = found.contents[0]
    return entry


def _pairs_by_score(responses: Sequence[str], scores: Sequence[float], pairs_by: str, min_margin: float) -> list[tuple[int, int]]:
    """Return (index of the better, index of the worse) of every two responses, or of the best and the worst; equal texts make no pair."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    candidates = itertools.combinations(order, 2) if pairs_by == "all" else [(order[0], order[-1])]
    return [(i, j) for i, j in candidates if scores[i] - scores[j] > min_margin and responses[i] != responses[j]]


def _jsonl_segments(reader: _Reader, rows: Iterable[Row]) -> tuple[Contract, Words]:
    """Read {chosen, rejected}: conversations with a shared beginning; turns marked {"segment": true} are in the loss."""
    data: Contract = {}
    words: Words = {}
    cut = 0
    for row in rows:
        found = reader.segments(row)
        if found is not None and reader.report.usable_pair(row, *found.contents, equal=found.texts[1] == found.texts[2]):
            entry = _entry(data, found)
            add_pair(entry, *found.texts[1:])
            _add_spans(entry, found)
            words[found.texts[0]] = found.contents[0]
            cut += found.cut
    reader.report.notes += [f"{plural(cut, 'pair')} whose segments were cut to the same number of turns"] if cut else []
    return data, words


JSONL_ROWS: dict[str, Callable[[_Reader, Iterable[Row]], tuple[Contract, Words]]] = {
    "pairs": _jsonl_pairs,
    "labelled": _jsonl_labelled,
    "scored": _jsonl_scored,
    "segments": _jsonl_segments,
}
