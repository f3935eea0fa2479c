"""Data rows of a preference dataset: where they come from, and what is wrong with them.

All defects of a source are collected and reported together, with file and row number, before any model is loaded.
"""

import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Optional

import datasets
import pyarrow
import pyarrow.parquet

from tdpo.files import reason_of
from tdpo.utils import UserError, looks_local, nearest, plural, some_of

LOCAL_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
LONGEST_ROW = 2**24  # bytes: millions of tokens; a longer row takes tens of times its size in memory on its way to tokens


class Row:
    """One data row. `number` counts from 1 within `source` (in JSON lines, the line number); an unreadable row has no `fields`."""

    def __init__(self, source: str, number: int, fields: Optional[Mapping[str, Any]], defect: Optional[str] = None):
        self.source, self.number, self.fields, self.defect = source, number, fields, defect


def read_rows(path: str, split: str, subset: Optional[str], cache_dir: Optional[str]) -> Sequence[Row]:
    """Return the rows of a split.

    Args:
        path: a file (.jsonl, .jsonl.gz, .parquet), a folder with <split>.jsonl[.gz] or <split>[-*].parquet, a folder written by
            `save_to_disk` of the datasets library, or a dataset on the Hugging Face hub.
        split: name of the split; ignored if path has no splits (a file, or a single saved dataset).
        subset: configuration of a hub dataset, or None.
        cache_dir: folder for hub datasets.

    Raises:
        UserError: the dataset, split or file does not exist, has no rows, or cannot be read at all.
    """
    if not looks_local(path):
        return _HubRows(path, split, subset, cache_dir)
    if not os.path.exists(path):
        raise UserError(f"data path '{path}' does not exist (a hub dataset is named owner/name)")
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        return _saved_rows(path, split)
    if os.path.isfile(os.path.join(path, "state.json")):  # one dataset without splits
        return _DatasetRows(_from_disk(path), path)
    files = [path] if os.path.isfile(path) else _files_of_split(path, split)
    if not files:
        raise UserError(f"'{path}' has no split {split!r}: looked for {split}.jsonl, {split}.jsonl.gz and {split}[-*].parquet")
    rows = [row for file in files for row in (_parquet_rows(file) if file.endswith(".parquet") else _json_lines(file))]
    if not rows:
        raise UserError(f"{some_of(files)}: no rows")
    return rows


def has_split(path: str, split: str, subset: Optional[str], cache_dir: Optional[str]) -> bool:
    """Whether `read_rows` would find that split in a folder or on the hub; false for a file, which has no splits."""
    if not looks_local(path):
        return split in _hub_splits(path, subset)
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        return os.path.isdir(os.path.join(path, split))
    return os.path.isdir(path) and bool(_files_of_split(path, split))


def data_fingerprint(path: str, subset: Optional[str], cache_dir: Optional[str]) -> list:
    """Return what identifies the data at a path, without parsing rows: hashes of its files, or of a hub dataset's splits.

    Args:
        path, subset, cache_dir: as for `read_rows`.
    """
    if not looks_local(path):
        return [
            (split, datasets.load_dataset(path, subset, split=split, cache_dir=cache_dir)._fingerprint)
            for split in _hub_splits(path, subset)
        ]
    escaped = glob.escape(path)
    if os.path.isfile(path):
        files = [path]
    elif _is_saved(path):
        files = glob.glob(os.path.join(escaped, "**"), recursive=True)
    else:
        files = [file for place in (escaped, os.path.join(escaped, "data")) for file in glob.glob(os.path.join(place, "*"))]
    hashes = []
    for file in sorted(files):
        if os.path.isfile(file) and (_is_saved(path) or file.endswith(LOCAL_SUFFIXES)):
            with open(file, "rb") as handle:
                hashes.append((os.path.relpath(file, path), hashlib.file_digest(handle, "sha256").hexdigest()))
    return hashes


def _is_saved(path: str) -> bool:
    """Whether the folder was written by `save_to_disk` of the datasets library."""
    return any(os.path.isfile(os.path.join(path, file)) for file in ("dataset_dict.json", "state.json"))


def _files_of_split(folder: str, split: str) -> list[str]:
    for suffix in LOCAL_SUFFIXES:
        file = os.path.join(folder, split + suffix)
        if os.path.isfile(file):
            return [file]
    escaped = glob.escape(folder)
    return sorted(
        file for place in (escaped, os.path.join(escaped, "data")) for file in glob.glob(os.path.join(place, f"{split}-*.parquet"))
    )


def _json_lines(file: str) -> Iterator[Row]:
    if not file.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"'{file}' has an unknown suffix: expected one of {', '.join(LOCAL_SUFFIXES)}")
    number = 0
    opener = gzip.open if file.endswith(".gz") else open
    try:
        with opener(file, "rb") as handle:
            for number, line in enumerate(_bounded_lines(handle), 1):
                if line is None:
                    yield Row(file, number, None, f"longer than {LONGEST_ROW // 2**20} MiB")
                elif line.strip():
                    yield _json_row(file, number, line)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        yield Row(file, number + 1, None, "the compressed file is truncated or corrupt here")
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {reason_of(error)}") from None


def _bounded_lines(handle: BinaryIO) -> Iterator[Optional[bytes]]:
    """Yield the lines of a file, None for one of more than LONGEST_ROW bytes, which is never in memory as a whole."""
    while line := handle.readline(LONGEST_ROW + 1):
        if len(line) <= LONGEST_ROW:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = handle.readline(LONGEST_ROW)
        yield None


def _json_row(file: str, number: int, line: bytes) -> Row:
    try:
        fields = json.loads(line)
    except UnicodeDecodeError:
        return Row(file, number, None, "not UTF-8 text")
    except ValueError:
        return Row(file, number, None, "truncated or malformed JSON")
    except RecursionError:
        return Row(file, number, None, "JSON nested too deeply")
    return Row(file, number, fields) if isinstance(fields, dict) else Row(file, number, None, "not a JSON object")


def _parquet_rows(file: str) -> Iterator[Row]:
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield _checked_row(file, number, fields)
    except (pyarrow.ArrowException, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"'{file}' is not a readable parquet file: {_first_line(error)}") from None


def _checked_row(source: str, number: int, fields: Mapping[str, Any]) -> Row:
    """Return the row, or, if its texts are too long in all, a row with that defect."""
    waiting, length = [fields], 0
    while waiting and length <= LONGEST_ROW:
        value = waiting.pop()
        if isinstance(value, (str, bytes)):
            length += len(value)
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
    defect = f"longer than {LONGEST_ROW // 2**20} MiB" if length > LONGEST_ROW else None
    return Row(source, number, None if defect else fields, defect)


def _from_disk(path: str) -> Any:
    """Return what `save_to_disk` of the datasets library has written."""
    try:
        return datasets.load_from_disk(path)
    except Exception as error:  # a damaged file can make the library raise anything
        raise UserError(f"'{path}' cannot be read as a folder of save_to_disk: {_first_line(error)}") from None


def _saved_rows(path: str, split: str) -> Sequence[Row]:
    saved = _from_disk(path)
    if split not in saved:
        raise UserError(f"'{path}' has no split {split!r}; it has {some_of(sorted(saved))}")
    return _DatasetRows(saved[split], f"{path}/{split}")


class _DatasetRows(Sequence):
    """Rows of an Arrow dataset, read on access."""

    def __init__(self, dataset: datasets.Dataset, source: str):
        self.dataset, self.source = dataset, source

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self.dataset):
            raise IndexError(index)
        try:
            return _checked_row(self.source, int(index) + 1, self.dataset[int(index)])
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{self.source} row {index + 1} cannot be read: {_first_line(error)}") from None


class _HubRows(_DatasetRows):
    def __init__(self, path: str, split: str, subset: Optional[str], cache_dir: Optional[str]):
        splits = _hub_splits(path, subset)
        if split not in splits:
            raise UserError(f"dataset {path} has no split {split!r}; it has {some_of(splits)}{nearest(split, splits)}")
        super().__init__(datasets.load_dataset(path, subset, split=split, cache_dir=cache_dir), f"{path}/{split}")


def _hub_splits(path: str, subset: Optional[str]) -> list[str]:
    try:
        return datasets.get_dataset_split_names(path, subset)
    except Exception as error:  # the hub's client raises a dozen types: not found, no access, no network
        raise UserError(f"dataset {path} is neither a local path nor an accessible dataset on the hub: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class RowReport:
    """Collects the defects of a dataset's rows, applies `invalid_rows` to them, and reports them at the end.

    error: any defect ends the run, and all are listed. skip: rows with a defect are dropped and counted. keep: rows with an empty text,
    different prompts or equal responses are trained on, as in the published code, and counted; a row that cannot be trained on (a field
    or marker is missing, a value is not text, broken JSON, special tokens in text) is still an error.

    Args:
        name, split: of the dataset.
        invalid_rows: error, skip or keep.
        special_tokens: strings that the tokenizer would turn into special tokens; a text that holds one is a defect.
    """

    def __init__(self, name: str, split: str, invalid_rows: str, special_tokens: Sequence[str] = ()):
        self.name, self.source, self.invalid_rows = name, f"{name} {split}", invalid_rows
        self.read = self.kept = 0
        self.notes: list[str] = []  # logged with the counts
        self._defects: dict[str, list[Row]] = defaultdict(list)
        self._kept_defects: dict[str, list[Row]] = defaultdict(list)
        self._special = re.compile("|".join(re.escape(x) for x in special_tokens if x)) if any(special_tokens) else None

    def rows(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the readable rows; the others are noted as defects."""
        for row in rows:
            self.read += 1
            if row.fields is None:
                self.refuse(row, row.defect)
            else:
                yield row

    def times(self, defect: str) -> int:
        """Return how many rows have this defect so far."""
        return len(self._defects.get(defect, ()))

    def refuse(self, row: Row, defect: str) -> None:
        """Note a defect that makes a row unusable."""
        if row not in self._defects[defect][-1:]:
            self._defects[defect].append(row)

    def texts(self, row: Row, *names: str) -> Optional[list[str]]:
        """Return the named fields if all of them are usable text, else None; defects are noted."""
        values = []
        for name in names:
            if name not in row.fields:
                self.refuse(row, f"no field {name!r}")
            elif self.is_text(row, name, row.fields[name]):
                values.append(row.fields[name])
        return values if len(values) == len(names) else None

    def is_text(self, row: Row, name: str, value: Any) -> bool:
        """Whether a value is a string that the tokenizer reads as plain text; if not, the defect is noted."""
        if not isinstance(value, str):
            self.refuse(row, f"{name!r} is {'null' if value is None else type(value).__name__}, not text")
        elif not _encodable(value):
            self.refuse(row, f"{name!r} holds a lone surrogate")
        elif self._special is not None and (found := self._special.search(value)):
            self.refuse(row, f"special token {found.group()!r} inside {name!r}")
        else:
            return True
        return False

    def usable_pair(self, row: Row, prompt: str, chosen: str, rejected: str, same_prompt: bool = True) -> bool:
        """Whether to train on this pair; notes its defects, and counts its row if it is kept.

        Args:
            row: where the pair is from.
            prompt, chosen, rejected: texts for which `is_text` holds.
            same_prompt: whether rejected has the prompt of chosen.
        """
        defects = _empty(prompt=prompt, chosen=chosen, rejected=rejected)
        if not same_prompt:
            defects.append("chosen and rejected have different prompts")
        elif chosen == rejected and not defects:
            defects.append("chosen and rejected are equal")
        return self._keep(row, defects)

    def usable_answers(self, row: Row, prompt: str, answers: Sequence[str]) -> bool:
        """Whether to train on a row with one or more answers; otherwise as `usable_pair`."""
        return self._keep(row, _empty(prompt=prompt, answer=min(answers, key=lambda text: len(text.strip()))))

    def _keep(self, row: Row, defects: list[str]) -> bool:
        for defect in defects:
            (self._kept_defects if self.invalid_rows == "keep" else self._defects)[defect].append(row)
        keep = not defects or self.invalid_rows == "keep"
        self.kept += keep
        return keep

    def remedy(self) -> str:
        """Return the overrides that accept or drop the defective rows."""
        special = any(defect.startswith("special token") for defect in self._defects)
        escape = f"; datasets.{self.name}.escape_special_tokens=true makes special tokens plain text" if special else ""
        return f"datasets.{self.name}.invalid_rows=skip drops such rows{escape}"

    def finish(self, remedy: Optional[str] = None) -> list[str]:
        """Return the counts and notes, as lines to log.

        Args:
            remedy: last line of the error message; None names the config keys that help.

        Raises:
            UserError: there are rows that cannot be used, all of which are listed, or no rows are left.
        """
        if self._defects and self.invalid_rows != "skip":
            raise UserError(f"{self.source}: rows that cannot be used{self._describe(self._defects)}\n  {remedy or self.remedy()}")
        if self.read == 0:
            raise UserError(f"{self.source}: no rows")
        if self.kept == 0:
            raise UserError(f"{self.source}: none of {plural(self.read, 'row')} can be used{self._describe(self._defects)}")
        lines = ["; ".join([f"{self.source}: {plural(self.read, 'row')} read, {self.kept:,} kept", *self.notes])]
        for verb, defects in (("dropped", self._defects), ("kept, as in the published code, despite", self._kept_defects)):
            if defects:
                lines.append(f"  {verb}{self._describe(defects)}")
        return lines

    @staticmethod
    def _describe(defects: Mapping[str, list[Row]]) -> str:
        """Return a line per defect, '  empty chosen: train.jsonl rows 3, 7', with at most a dozen row numbers."""
        parts = []
        for defect, rows in defects.items():
            by_source: dict[str, list[int]] = defaultdict(list)
            for row in rows:
                by_source[row.source].append(row.number)
            places = ", ".join(f"{source} row{'s' if len(n) > 1 else ''} {some_of(n)}" for source, n in by_source.items())
            parts.append(f"\n  {defect}: {places}")
        return "".join(parts)


def _empty(**texts: str) -> list[str]:
    return [f"empty {name}" for name, text in texts.items() if not text.strip()]


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
