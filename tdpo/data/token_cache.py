"""Tokenization with a cache: on all cores, into an Arrow table that is memory-mapped and that the next run finds again.

A table row is a prompt: {dataset, prompt, texts, prompt_ids, response_ids, masks, examples, annotations, hashes, truncation_mode}.
`examples` holds indices into texts and response_ids, one per role; `annotations` their ratings or labels, if any; `masks` the loss mask
of each response, [] if all its tokens are in the loss; `hashes` tell which examples are equal. Tokens are whole: each run truncates them.
"""

import glob
import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Optional

import datasets
import numpy as np

from tdpo.data.contract import Examples, Form, Take
from tdpo.data.sources import data_fingerprint, place_of
from tdpo.data.tokenization import ESCAPE, encode, encode_rendered, trim_after_eos, with_bos, with_eos
from tdpo.files import entries_of, own_name, reason_of, remove, remove_left_behind
from tdpo.utils import UserError, cores, get_logger, try_lock

log = get_logger(__name__)

TEXTS_A_CORE = 10_000  # texts per core: for fewer, another process takes longer to start than it saves; for fewer in all, so does a cache
SLICE = 20_000  # prompts per slice
# Columns of what is tokenized that are not in the table.
GIVEN = {"spans": datasets.List(datasets.List(datasets.List(datasets.Value("int32")))), "rendered": datasets.Value("bool")}
IDS = datasets.List(datasets.Value("int32"))
FEATURES = datasets.Features(
    {
        "dataset": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "texts": datasets.List(datasets.Value("string")),
        "prompt_ids": IDS,
        "response_ids": datasets.List(IDS),
        "masks": datasets.List(datasets.List(datasets.Value("int8"))),
        "examples": datasets.List(IDS),
        "annotations": datasets.List(datasets.List(datasets.Value("float64"))),
        "hashes": datasets.List(datasets.Value("int64")),
        "truncation_mode": datasets.Value("string"),
    }
)


def count_texts(examples: Iterable[Examples]) -> int:
    """Return the number of prompts and responses."""
    return sum(1 + len(some.texts) for some in examples)


def tokenize(
    name: str,
    examples: Mapping[str, Examples],
    options: Mapping,
    tokenizer,
    add_bos: bool,
    silent: bool = False,
    file: Optional[str] = None,
) -> datasets.Dataset:
    """Tokenize a dataset into a table.

    Args:
        name: of the dataset.
        examples: by prompt, see contract.examples_in_form.
        options: of the dataset.
        tokenizer: of Transformers.
        add_bos: begin every prompt with the beginning-of-sequence token.
        silent: show no progress bar.
        file: path of the table's file; None keeps it in memory.

    Raises:
        UserError: a prompt has no tokens.
    """
    found = list(examples.values())
    columns = {
        "prompt": list(examples),
        "texts": [list(some.texts) if some.rendered else [trim_after_eos(text, tokenizer) for text in some.texts] for some in found],
        "rendered": [some.rendered for some in found],
        "spans": [some.spans for some in found],
        "examples": [some.indices for some in found],
        "annotations": [some.annotations for some in found],
    }
    features = datasets.Features({column: FEATURES.get(column) or GIVEN[column] for column in columns})
    processes = min(cores(), count_texts(found) // TEXTS_A_CORE)
    settings = {
        "name": name,
        "tokenizer": tokenizer,
        "escape": options.get("escape_special_tokens", False),
        "add_bos": add_bos,
        "truncation_mode": options["truncation_mode"],
    }
    with _progress_bars(shown=not silent):
        # In slices, because Arrow takes at most 2 GB of text at a time.
        starts = range(0, len(found), SLICE)
        slices = [{column: values[i : i + SLICE] for column, values in columns.items()} for i in starts]
        return datasets.concatenate_datasets([datasets.Dataset.from_dict(piece, features=features) for piece in slices]).map(
            _tokenize_rows,
            batched=True,
            fn_kwargs=settings,
            features=FEATURES,
            remove_columns=list(GIVEN),
            num_proc=processes if processes > 1 else None,
            desc=f"Tokenizing {name}",
            keep_in_memory=file is None,
            cache_file_name=file,
            new_fingerprint="tokens",  # otherwise the tokenizer would be hashed
        )


def _tokenize_rows(columns: Mapping[str, list], name: str, tokenizer, escape: bool, add_bos: bool, truncation_mode: str) -> dict[str, list]:
    prompts, texts, rendered = columns["prompt"], columns["texts"], columns["rendered"]
    prompt_ids = _encode_in_kind(prompts, rendered, tokenizer, escape, False)
    if add_bos:
        prompt_ids = [with_bos(ids, tokenizer) for ids in prompt_ids]
    for prompt, ids in zip(prompts, prompt_ids):
        if not ids:
            raise UserError(f"{name}: prompt {prompt!r} has no tokens, so the first response token cannot be predicted: remove it")
    responses = _encode_responses(texts, columns["spans"], rendered, tokenizer, escape)
    prompts, texts = [_unmarked(prompt) for prompt in prompts], [[_unmarked(text) for text in some] for some in texts]
    return {
        "dataset": [name] * len(prompts),
        "prompt": prompts,
        "texts": texts,
        "prompt_ids": prompt_ids,
        "response_ids": [[ids for ids, _ in some] for some in responses],
        "masks": [[mask for _, mask in some] for some in responses],
        "examples": columns["examples"],
        "annotations": columns["annotations"],
        "hashes": [
            [_hash([prompt, *(some[i] for i in indices)]) for indices in examples]
            for prompt, some, examples in zip(prompts, texts, columns["examples"])
        ],
        "truncation_mode": [truncation_mode] * len(prompts),
    }


def _encode_in_kind(texts: Sequence[str], rendered: Sequence[bool], tokenizer, escape: bool, continues: bool) -> list[list[int]]:
    """Return the token ids of texts, of which some are rendered (see contract.py); for `continues` see `encode_rendered`."""
    ids: list[list[int]] = [[]] * len(texts)
    for kind in (False, True):
        places = [i for i, some in enumerate(rendered) if some == kind]
        if places:
            some = [texts[i] for i in places]
            found = encode_rendered(some, tokenizer, continues) if kind else encode(some, tokenizer, escape)
            for i, own in zip(places, found):
                ids[i] = own
    return ids


def _unmarked(text: str) -> str:
    return text.replace(ESCAPE, "") if ESCAPE in text else text


def _encode_responses(
    texts: Sequence[Sequence[str]], spans: Sequence, rendered: Sequence[bool], tokenizer, escape: bool
) -> list[list[tuple[list[int], list[int]]]]:
    """Return (token ids, loss mask) of each response. A text with spans is cut at their ends, and the pieces are tokenized separately."""
    cut = [[_pieces(text, some) for text, some in zip(*both)] for both in zip(texts, spans)]
    kinds = [kind for some, kind in zip(cut, rendered) for pieces in some for _ in pieces]
    encoded = iter(_encode_in_kind([piece for some in cut for pieces in some for piece, _ in pieces], kinds, tokenizer, escape, True))

    def joined(pieces: list[tuple[str, bool]], kind: bool) -> tuple[list[int], list[int]]:
        tokens = [(next(encoded), in_loss) for _, in_loss in pieces]
        ids = [token for some, _ in tokens for token in some]
        ids = ids if kind else with_eos(ids, tokenizer)
        if len(pieces) == 1 and pieces[0][1]:
            return ids, []
        mask = [int(in_loss) for some, in_loss in tokens for _ in some]
        return ids, mask + [int(tokens[-1][1])] * (len(ids) - len(mask))

    return [[joined(pieces, kind) for pieces in some] for some, kind in zip(cut, rendered)]


def _pieces(text: str, spans: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """Return the consecutive pieces of a text, each with whether it is in the loss."""
    if not spans:
        return [(text, True)]
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]]


def _hash(texts: Sequence[str]) -> int:
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@contextmanager
def _progress_bars(shown: bool):
    """Show the progress bars of the datasets library within the block only if `shown` and on a terminal."""
    disabled = datasets.utils.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown and sys.stderr.isatty() else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if disabled else datasets.enable_progress_bars)()


def _digest(files: Mapping[str, Mapping], lines: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([files, lines], sort_keys=True).encode()).hexdigest()


class TokenCache:
    """The cache folder of one dataset's split with one tokenizer: its table, and the lines that were logged about its rows.

    Args:
        cache_dir: the user's cache folder.
        key: all that the tokens depend on, see `cache_key`.
    """

    def __init__(self, cache_dir: str, key: Mapping):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = os.path.join(cache_dir, "tokens", digest[:32])

    def load(self) -> Optional[tuple[datasets.Dataset, list[str]]]:
        """Return the table, memory-mapped, and the lines; None if they do not exist or are damaged, which is logged. Reads all files."""
        contents = os.path.join(self.folder, "contents.json")
        if not os.path.lexists(self.folder):
            return None
        try:
            with open(contents) as file:
                whole = json.load(file)
            files, lines = whole["files"], whole["lines"]
            if whole["sha256"] != _digest(files, lines) or entries_of(self.folder, files, "Checking the tokens") != files:
                raise ValueError("another content than was written")
            return datasets.load_from_disk(os.path.join(self.folder, "table")), lines
        except Exception as error:  # a damaged file can make the library raise anything
            log.warning(f"the cached tokens in {self.folder} are damaged ({reason_of(error)}): the data are tokenized again")
            return None

    def build(self, make, lines: Sequence[str]) -> datasets.Dataset:
        """Make the table and keep it for the next run; if it cannot be written, log why and make it in memory.

        Args:
            make: returns the table, given its file, or None for memory.
            lines: logged about the rows, kept with the table.
        """
        try:
            with self._new_folder() as new:
                table = make(os.path.join(new, "rows.arrow"))
                whole = os.path.join(new, "whole")
                with _progress_bars(shown=False):
                    table.save_to_disk(os.path.join(whole, "table"))
                files = [os.path.relpath(file, whole) for file in glob.glob(os.path.join(glob.escape(whole), "table", "*"))]
                content = entries_of(whole, files, "Hashing the tokens"), list(lines)
                with open(os.path.join(whole, "contents.json"), "w") as file:
                    json.dump({"files": content[0], "lines": content[1], "sha256": _digest(*content)}, file)
                if self.load() is None:  # otherwise another run was faster
                    if os.path.lexists(self.folder):
                        os.rename(self.folder, os.path.join(new, "damaged"))
                    os.rename(whole, self.folder)  # atomic
                return datasets.load_from_disk(os.path.join(self.folder, "table"))
        except OSError as error:
            log.info(f"tokens are not cached for the next run: {reason_of(error)}")
        return make(None)

    @contextmanager
    def _new_folder(self) -> Iterator[str]:
        """Yield an empty folder beside the cache's, which is removed at the end; remove those that killed runs have left."""
        parent = os.path.dirname(self.folder)
        os.makedirs(parent, exist_ok=True)
        prefix = os.path.join(parent, "new-")
        remove_left_behind(prefix, "")
        new = prefix + own_name()
        if os.path.lexists(new):
            remove(new)
        os.mkdir(new)
        handle = os.open(new, os.O_RDONLY)
        try:
            try_lock(handle)
            yield new
        finally:
            os.close(handle)
            shutil.rmtree(new, ignore_errors=True)


def cache_key(
    name: str, options: Mapping, split: str, tokenizer, add_bos: bool, form: Form, cache_dir: Optional[str], loader: Callable
) -> dict:
    """Return all that a split's tokens depend on. Data files count by their content, not by their path.

    Args:
        name, options: of the dataset.
        split, tokenizer, add_bos, form: as for `load_split` of preference_datasets.py.
        cache_dir: folder for hub datasets.
        loader: function that reads the rows. The code of its file and of this package is part of the key.
    """
    sources = {k: data_fingerprint(place_of(options, options[k], cache_dir)) for k in ("path", "eval_path") if options.get(k)}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "code": _code_digest(loader),
        "versions": [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "datasets", "jinja2", "beautifulsoup4")],
        "name": name,
        "options": {key: value for key, value in options.items() if key not in {*sources, *Take._fields}},
        "sources": sources,
        "split": split,
        "tokenizer": backend.to_str() if backend is not None else [sorted(tokenizer.get_vocab().items()), repr(tokenizer)],
        "special": [tokenizer.special_tokens_map, tokenizer.chat_template],
        "add_bos": add_bos,
        "form": form,
    }


def _code_digest(loader: Callable) -> str:
    """Return a hash of the source files of this package and of the loader."""
    files = {inspect.getsourcefile(loader), *glob.glob(os.path.join(os.path.dirname(__file__), "*.py"))}
    digest = hashlib.sha256()
    for file in sorted(map(os.path.realpath, files), key=os.path.basename):
        with open(file, "rb") as handle:
            digest.update(handle.read())
    return digest.hexdigest()


def flat(table: datasets.Dataset, column: str, depth: int) -> np.ndarray:
    """Return the values `depth` lists deep in a column of nested lists, concatenated; if they are still lists, their lengths."""
    arrays = list(table.data.column(column).chunks)
    for _ in range(depth):
        arrays = [array.flatten() for array in arrays]
    arrays = [array.value_lengths() if hasattr(array, "value_lengths") else array for array in arrays]
    return np.concatenate([array.to_numpy(zero_copy_only=False) for array in arrays])


def digest_of(table: datasets.Dataset) -> str:
    """Return a hash of all tokens, masks, pairs and annotations, which does not depend on how the table is chunked."""
    digest = hashlib.sha256()
    for column, deep in (("prompt_ids", 1), ("response_ids", 2), ("masks", 2), ("examples", 2), ("annotations", 2)):
        for depth in range(deep + 1):
            values = flat(table, column, depth)
            digest.update(values.astype(np.float64 if values.dtype == np.float64 else np.int32).tobytes())
    digest.update(repr(sorted(table.unique("truncation_mode"))).encode())
    return digest.hexdigest()
