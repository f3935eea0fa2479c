"""Where data rows come from: files of several formats, folders, and the Hugging Face hub."""

import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Optional

import datasets
import pyarrow
import pyarrow.parquet

from tdpo.data.rows import Row
from tdpo.files import reason_of
from tdpo.utils import UserError, looks_local, nearest, some_of

LINES, LISTS, PARQUET = (".jsonl", ".jsonl.gz"), (".json", ".json.gz"), (".parquet",)
LOCAL_SUFFIXES = (*LINES, *PARQUET, *LISTS)  # in this order, if a folder has a split in several formats
LONGEST_ROW = 2**24  # bytes: millions of tokens; a longer row takes tens of times its size in memory on its way to tokens
OTHER_NAMES = {"train": ("train_prefs",), "test": ("test_prefs",)}  # of splits: UltraFeedback's and those of datasets made like it


class Place(NamedTuple):
    """Where the rows of a dataset are."""

    path: str  # a file, a folder, a folder written by `save_to_disk` of the datasets library, or a dataset on the Hugging Face hub
    subset: Optional[str] = None  # configuration of a hub dataset
    revision: Optional[str] = None  # branch, tag or commit of a hub dataset
    cache_dir: Optional[str] = None  # folder for hub datasets

    @property
    def on_hub(self) -> bool:
        return not looks_local(self.path)

    def hub_splits(self) -> list[str]:
        """Return the names of the splits of a hub dataset."""
        try:
            return datasets.get_dataset_split_names(self.path, self.subset, revision=self.revision)
        except Exception as error:  # the hub's client raises a dozen types: not found, no access, no network
            reason = _first_line(error)
            raise UserError(f"dataset {self.path} is neither a local path nor an accessible dataset on the hub: {reason}") from None

    def load(self, split: str) -> datasets.Dataset:
        """Return a split of a hub dataset."""
        return datasets.load_dataset(self.path, self.subset, split=split, revision=self.revision, cache_dir=self.cache_dir)


def place_of(options: Mapping, path: Optional[str], cache_dir: Optional[str]) -> Place:
    """Return where a dataset's rows are, given its options; `path` in place of the options' own."""
    return Place(path or options["path"], options.get("subset"), options.get("revision"), cache_dir)


def read_rows(place: Place, split: str) -> Sequence[Row]:
    """Return the rows of a split.

    In a folder, or its folder data/, a split is <split>.<suffix>, the shards <split>-00000-of-00002.<suffix> and the like, or the files
    of a folder <split>/. Suffixes are .jsonl, .jsonl.gz, .parquet and .json, a list of rows.

    Args:
        place: where the dataset is.
        split: name of the split; ignored if there are no splits (a file, or a single saved dataset).

    Raises:
        UserError: the dataset, split or file does not exist, has no rows, or cannot be read at all.
    """
    if place.on_hub:
        return _HubRows(place, split)
    path = place.path
    if not os.path.exists(path):
        raise UserError(f"data path '{path}' does not exist (a hub dataset is named owner/name)")
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        return _saved_rows(path, split)
    if os.path.isfile(os.path.join(path, "state.json")):  # one dataset without splits
        return _DatasetRows(_from_disk(path), path)
    if os.path.isfile(os.path.join(path, split, "state.json")):
        return _DatasetRows(_from_disk(os.path.join(path, split)), f"{path}/{split}")
    files = [path] if os.path.isfile(path) else _files_of_split(path, split)
    if not files:
        suffixes, names = ", ".join(LOCAL_SUFFIXES), _splits_in(path)
        looked = f"looked there and in data/ for {split} or {split}-00000-of-00001 with {suffixes}"
        found = f"it has {some_of(names)}{nearest(split, names)}; " if names else ""
        raise UserError(f"'{path}' has no split {split!r}: {found}{looked}")
    rows = [row for file in files for row in _rows_of_file(file)]
    if not rows:
        raise UserError(f"{some_of(files)}: no rows")
    return rows


def has_split(place: Place, split: str) -> bool:
    """Whether `read_rows` would find that split in a folder or on the hub; false for a file, which has no splits."""
    if place.on_hub:
        return split in place.hub_splits()
    if os.path.isfile(os.path.join(place.path, "dataset_dict.json")):
        return os.path.isdir(os.path.join(place.path, split))
    if os.path.isfile(os.path.join(place.path, split, "state.json")):
        return True
    return os.path.isdir(place.path) and bool(_files_of_split(place.path, split))


def has_splits(place: Place) -> bool:
    """Whether a place has splits; a file and a single saved dataset have none."""
    return place.on_hub or not (os.path.isfile(place.path) or os.path.isfile(os.path.join(place.path, "state.json")))


def known_split(place: Place, split: str) -> str:
    """Return the split's name, or, if there is none of that name, another one that it has in published datasets (OTHER_NAMES)."""
    others = OTHER_NAMES.get(split, ())
    if not others or not (place.on_hub or os.path.isdir(place.path)) or has_split(place, split):
        return split
    return next((name for name in others if has_split(place, name)), split)


def unread_files(place: Place, split: str) -> list[str]:
    """Return the files in a folder that have a split's name but are not read, because it is in others, or in another format, too."""
    if place.on_hub or not os.path.isdir(place.path) or _is_saved(place.path):
        return []
    read = _files_of_split(place.path, split)
    found = [file for suffix in LOCAL_SUFFIXES for group in _groups_of_files(place.path, split, suffix) for file in group]
    return sorted(set(found) - set(read))


def data_fingerprint(place: Place) -> list:
    """Return what identifies the data of a place, without parsing rows: hashes of its files, or of a hub dataset's splits."""
    if place.on_hub:
        return [(split, place.load(split)._fingerprint) for split in place.hub_splits()]
    path = place.path
    if os.path.isfile(path):
        files = [path]
    elif _is_saved(path):
        files = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
    else:
        files = [file for depth in ("*", "*/*", "data/*/*") for file in glob.glob(os.path.join(glob.escape(path), depth))]
    hashes = []
    for file in sorted(files):
        if os.path.isfile(file) and (_is_saved(path) or file.endswith((*LOCAL_SUFFIXES, ".arrow", "state.json"))):
            with open(file, "rb") as handle:
                hashes.append((os.path.relpath(file, path), hashlib.file_digest(handle, "sha256").hexdigest()))
    return hashes


def _is_saved(path: str) -> bool:
    """Whether the folder was written by `save_to_disk` of the datasets library."""
    return any(os.path.isfile(os.path.join(path, file)) for file in ("dataset_dict.json", "state.json"))


def _files_of_split(folder: str, split: str) -> list[str]:
    """Return the files of a split, all of the same format."""
    return next((files for suffix in LOCAL_SUFFIXES if (files := _files_with(folder, split, suffix))), [])


def _files_with(folder: str, split: str, suffix: str) -> list[str]:
    """Return the files of a split with a suffix, see `_groups_of_files`.

    Raises:
        UserError: shards are missing, or are of two versions.
    """
    files = next(filter(None, _groups_of_files(folder, split, suffix)), [])
    shards = [re.search(r"-(\d+)-of-(\d+)\.", os.path.basename(file)) for file in files]
    counted = [(int(shard[1]), int(shard[2])) for shard in shards if shard]
    if counted and sorted(counted) != [(i, len(files)) for i in range(len(files))]:
        raise UserError(f"the shards of {split!r} in '{folder}' are not complete, or of two versions: {some_of(sorted(files))}")
    return files


def _groups_of_files(folder: str, split: str, suffix: str) -> list[list[str]]:
    """Return the files that a split with a suffix may be in, the group that is read first: a single file, its shards, in the folder and in
    data/, then those in <split>/."""
    name = re.compile(rf"{re.escape(split)}[-_.]\d[^/]*{re.escape(suffix)}")
    groups = []
    for place in (folder, os.path.join(folder, "data")):
        found = sorted(glob.glob(os.path.join(glob.escape(place), "*" + suffix)))
        groups.append([file for file in found if os.path.basename(file) == split + suffix])
        groups.append([file for file in found if name.fullmatch(os.path.basename(file))])
    for place in (os.path.join(folder, split), os.path.join(folder, "data", split)):
        groups.append(sorted(glob.glob(os.path.join(glob.escape(place), "*" + suffix))))
    return groups


def _splits_in(folder: str) -> list[str]:
    """Return the names of the splits in a folder, judged by its files and those in data/."""
    files = [file for place in (folder, os.path.join(folder, "data")) if os.path.isdir(place) for file in os.listdir(place)]
    stems = [file.removesuffix(suffix) for file in files for suffix in LOCAL_SUFFIXES if file.endswith(suffix)]
    return sorted({re.sub(r"[-_.]\d.*$", "", stem) for stem in stems})


def _rows_of_file(file: str) -> Iterator[Row]:
    if file.endswith(PARQUET):
        return _parquet_rows(file)
    if file.endswith(LINES) or file.endswith(LISTS) and not _is_list(file):
        return _json_lines(file)
    if file.endswith(LISTS):
        return _list_rows(file)
    raise UserError(f"'{file}' has an unknown suffix: expected one of {', '.join(LOCAL_SUFFIXES)}")


def _opened(file: str) -> BinaryIO:
    return (gzip.open if file.endswith(".gz") else open)(file, "rb")


def _is_list(file: str) -> bool:
    """Whether a .json file holds one list, and not a row a line, as such files often do."""
    try:
        with _opened(file) as handle:
            return handle.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except (OSError, EOFError, zlib.error):
        return False  # reported where its lines are read


def _list_rows(file: str) -> Iterator[Row]:
    try:
        with _opened(file) as handle:
            rows = json.loads(handle.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"'{file}' is not UTF-8 text: convert it") from None
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"'{file}' is not a readable list of rows: {_first_line(error)}") from None
    for number, fields in enumerate(rows, 1):
        yield _checked_row(file, number, fields) if isinstance(fields, dict) else Row(file, number, None, "not a JSON object")


def _json_lines(file: str) -> Iterator[Row]:
    number = 0
    try:
        with _opened(file) as handle:
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
    def __init__(self, place: Place, split: str):
        splits = place.hub_splits()
        if split not in splits:
            raise UserError(f"dataset {place.path} has no split {split!r}; it has {some_of(splits)}{nearest(split, splits)}")
        super().__init__(place.load(split), f"{place.path}/{split}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
