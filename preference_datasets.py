"""Preference data: from rows to prompts with responses and pairs. To train on your own pairs, see README, "Your own data".

A loader returns the published contract, a dict from prompt to
    responses: list of texts; pairs: list of (index of chosen, index of rejected); sft_target: the text that SFT trains on
and may add `scores`, one a response; `spans`, the parts of each response that are scored, in characters ([]: all of it); and, instead of
pairs, `labels`, one a response, true for a desirable one. Prompt and response are concatenated as they are: a response brings its own
leading space.
"""

import functools
import hashlib
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Optional, Union

import numpy as np
from omegaconf import OmegaConf

from tdpo.data import chat, reviews
from tdpo.data.batching import BatchStream, TokenizedSplit, get_collate_fn
from tdpo.data.rows import Row, RowReport, has_split, read_rows
from tdpo.data.token_cache import COMPLETIONS, PAIRS, SFT, TEXTS_A_CORE, Form, TokenCache, cache_key, count_texts, tokenize
from tdpo.data.tokenization import encode, special_token_strings, tokenize_batch_element, truncate, with_bos
from tdpo.utils import CONFIG_DIR, UserError, nearest, plural, some_of

__all__ = ["get_dataset", "get_collate_fn", "get_batch_iterator", "tokenize_batch_element", "load_split"]

ASSISTANT = "\n\nAssistant:"
Dataset = dict[str, dict]  # the contract above


class Source(NamedTuple):
    """What a loader is given."""

    split: str  # train or test
    options: Mapping  # config/datasets/<name>.yaml
    report: RowReport
    cache_dir: Optional[str]
    tokenizer: object  # for chat templates; None where a caller has none
    form: Form  # of the examples that are wanted

    def rows(self, split: Optional[str] = None, path: Optional[str] = None) -> Iterator[Row]:
        rows = read_rows(path or self.options["path"], split or self.split, self.options.get("subset"), self.cache_dir)
        return self.report.rows(rows)


def load_hh(source: Source) -> Dataset:
    """Anthropic helpful-harmless: rows {chosen, rejected}, whole dialogues `\\n\\nHuman: ...\\n\\nAssistant: ...` with a shared prompt.

    As published, the prompt is taken from chosen, and rejected is cut by its length; a rejected with another prompt is a row defect.
    The SFT target is the last chosen response of a prompt.
    """
    data: Dataset = defaultdict(lambda: {"responses": [], "pairs": []})
    for row in source.rows():
        texts = source.report.texts(row, "chosen", "rejected")
        if texts is None:
            continue
        end = texts[0].rfind(ASSISTANT)
        if end < 0:
            source.report.refuse(row, f"no {ASSISTANT!r} in 'chosen'")
            continue
        prompt = texts[0][: end + len(ASSISTANT)]
        chosen, rejected = (text[len(prompt) :] for text in texts)
        if source.report.usable_pair(row, prompt, chosen, rejected, same_prompt=texts[1].startswith(prompt)):
            _add_pair(data[prompt], chosen, rejected)
    return dict(data)


def load_shp(source: Source) -> Dataset:
    """Stanford Human Preferences: pairs whose score ratio is at least 2; the SFT target is the response with the highest score."""
    data: Dataset = defaultdict(lambda: {"responses": [], "pairs": [], "scores": []})
    ties = 0
    for row in source.rows():
        texts = source.report.texts(row, "history", "human_ref_A", "human_ref_B")
        if texts is None:
            continue
        scores = [row.fields.get(name) for name in ("score_A", "score_B")]
        if not all(isinstance(score, (int, float)) and score > 0 for score in scores) or row.fields.get("labels") not in (0, 1):
            source.report.refuse(row, "score_A and score_B must be numbers above 0, labels 0 or 1")
            continue
        if max(scores[0] / scores[1], scores[1] / scores[0]) < 2:
            ties += scores[0] == scores[1]
            continue
        prompt = "\n\nHuman: " + texts[0] + ASSISTANT
        order = (0, 1) if row.fields["labels"] == 1 else (1, 0)  # labels 1: A is preferred
        if source.form.scored and not scores[order[0]] > scores[order[1]]:
            source.report.refuse(row, "the preferred response has the lower score")
            continue
        if source.report.usable_pair(row, prompt, *(" " + texts[1 + i] for i in order)):
            entry = data[prompt]
            first = len(entry["responses"])
            entry["pairs"].append((first + order[0], first + order[1]))
            entry["responses"] += [" " + text for text in texts[1:]]
            entry["scores"] += scores
    for entry in data.values():
        entry["sft_target"] = entry["responses"][int(np.argmax(entry["scores"]))]
    source.report.notes += [f"{plural(ties, 'pair')} of equal scores left out"] if ties and source.form.scored else []
    return dict(data)


def load_se(source: Source) -> Dataset:
    """StackExchange: answers without HTML except code, every two answers a pair ordered by score; 1 % of the rows are the test split.

    The rows come as one split `train` and are shuffled with seed 42, as published.
    """
    rows = read_rows(source.options["path"], "train", source.options.get("subset"), source.cache_dir)
    order = np.random.default_rng(42).permutation(len(rows))  # what datasets.Dataset.shuffle(seed=42) does
    n_test = int(len(rows) * 0.01)
    order = order[:n_test] if source.split == "test" else order[n_test:]
    data: Dataset = {}
    ties = 0
    for row in source.report.rows(rows[int(i)] for i in order):
        answers = row.fields.get("answers")
        question = source.report.texts(row, "question")
        if question is None:
            continue
        if not isinstance(answers, list) or not all(_is_answer(answer) for answer in answers) or len(answers) < 2:
            source.report.refuse(row, "answers must be two or more of {text, pm_score}")
            continue
        texts = [" " + strip_html_tags(answer["text"]) for answer in answers]
        if not all(source.report.is_text(row, "answers", text) for text in texts):
            continue
        prompt = "\n\nHuman: " + strip_html_tags(question[0]) + ASSISTANT
        if not source.report.usable_answers(row, prompt, texts):
            continue
        scores = [answer["pm_score"] for answer in answers]
        indices = range(len(answers))
        pairs = [(i, j) if scores[i] > scores[j] else (j, i) for i in indices for j in indices if i < j]
        if source.form.scored:  # published, the second of equal ones is chosen
            untied = [(i, j) for i, j in pairs if scores[i] > scores[j]]
            ties, pairs = ties + len(pairs) - len(untied), untied
        data[prompt] = {"responses": texts, "pairs": pairs, "scores": scores, "sft_target": texts[int(np.argmax(scores))]}
    source.report.notes += [f"{plural(ties, 'pair')} of equal scores left out"] if ties else []
    return data


def _is_answer(answer) -> bool:
    return isinstance(answer, Mapping) and isinstance(answer.get("text"), str) and isinstance(answer.get("pm_score"), (int, float))


def strip_html_tags(html: str) -> str:
    """The text of paragraphs, and of code within <code>...</code>; as published, what stands in a tag within a paragraph is left out."""
    parts = []
    import bs4  # here, because importing it takes a third of a second

    for element in bs4.BeautifulSoup(html, "html.parser").children:
        if not isinstance(element, bs4.Tag):
            continue
        if element.name == "p":
            parts.append("".join(str(child) for child in element.children if type(child) is bs4.NavigableString))
        elif element.name == "pre":
            parts += [f"<code>{code.get_text()}</code>" for code in element.find_all("code")]
        elif element.name == "code":
            parts.append(f"<code>{element.get_text()}</code>")
    return "\n\n".join(parts)


def load_jsonl(source: Source) -> Dataset:
    """Rows of one of the forms in JSONL_ROWS, text or chat messages (chat.py), from files or the hub.

    Without an eval split or eval_path, `eval_fraction` of the prompts are the test split: those whose hash is below it, so that a prompt is
    always on the same side, whatever the seed of the run, the rows beside it, or a date that the chat template writes.
    """
    options = source.options
    eval_split = options["eval_split"] or "test"
    read = JSONL_ROWS[options["rows"]]
    if source.split == "test" and options["eval_path"]:
        return read(source, source.rows(eval_split, options["eval_path"]))[0]
    apart = options["eval_path"] or options["eval_split"]  # a split that was asked for must be there
    if apart or has_split(options["path"], eval_split, options["subset"], source.cache_dir):
        return read(source, source.rows(options["train_split"] if source.split == "train" else eval_split))[0]
    return _held_out(source, *read(source, source.rows(options["train_split"])))


def _held_out(source: Source, data: Dataset, words: Mapping[str, str]) -> Dataset:
    """The prompts of the split: those whose words' hash is below eval_fraction are the test split, one prompt at least."""
    fraction = source.options["eval_fraction"]
    hashes = {prompt: int.from_bytes(hashlib.sha256(words[prompt].encode()).digest()[:8]) / 2**64 for prompt in data}
    bound = max(fraction, min(hashes.values(), default=0))
    split = {prompt: entry for prompt, entry in data.items() if (hashes[prompt] <= bound) == (source.split == "test")}
    if data and not split:
        raise UserError(f"{plural(len(data), 'prompt')} cannot be parted into train and eval: give eval_path or eval_split, or more data")
    source.report.notes.append(f"no eval split: {plural(len(split), 'prompt')} of {len(data):,} (eval_fraction={fraction})")
    return split


Words = dict[str, str]  # of each prompt, without what a chat template adds


def _jsonl_pairs(source: Source, rows: Iterable[Row]) -> tuple[Dataset, Words]:
    """{prompt, chosen, rejected}, and {chosen_score, rejected_score} where there are any; the SFT target is the last chosen one."""
    data: Dataset = defaultdict(lambda: {"responses": [], "pairs": [], "scores": []})
    words: Words = {}
    for row in rows:
        found = _texts_of(source, row, "prompt", "chosen", "rejected")
        scores = [row.fields.get(f"{role}_score") for role in ("chosen", "rejected")]
        if found is None:
            continue
        if source.form.scored and scores == [None, None]:
            source.report.refuse(row, "no chosen_score and rejected_score, which this loss needs")
        elif source.form.scored and not _in_order(scores):
            source.report.refuse(row, "chosen_score and rejected_score must be numbers, the first one greater")
        elif source.report.usable_pair(row, *found.contents):
            prompt, *responses = found.texts
            _add_pair(data[prompt], *responses)
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


def _jsonl_labelled(source: Source, rows: Iterable[Row]) -> tuple[Dataset, Words]:
    """{prompt, completion, label}, unpaired; the SFT target is the last desirable one."""
    columns = source.options["columns"]
    data: Dataset = defaultdict(lambda: {"responses": [], "pairs": [], "labels": []})
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


def _jsonl_scored(source: Source, rows: Iterable[Row]) -> tuple[Dataset, Words]:
    """{prompt, completion, score}: a prompt's completions become pairs by score; its best one is the SFT target."""
    options = source.options
    column = options["columns"]["score"]
    data: Dataset = defaultdict(lambda: {"responses": [], "pairs": [], "scores": []})
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
    """(index of the better, index of the worse): of every two, or of the best and the worst; none of equal texts."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    candidates = itertools.combinations(order, 2) if pairs_by == "all" else [(order[0], order[-1])]
    return [(i, j) for i, j in candidates if scores[i] - scores[j] > min_margin and responses[i] != responses[j]]


def _jsonl_segments(source: Source, rows: Iterable[Row]) -> tuple[Dataset, Words]:
    """{chosen, rejected}, conversations with a shared beginning, whose turns to be scored are marked {"segment": true}."""
    data: Dataset = defaultdict(lambda: {"responses": [], "pairs": [], "spans": []})
    words: Words = {}
    cut = 0
    _check_escaping(source)
    for row in rows:
        found = chat.render_segments(row, source.report, source.tokenizer, source.options["segments"] == "cut")
        if found is not None and source.report.usable_pair(row, *found.contents):
            prompt, *responses = found.texts
            _add_pair(data[prompt], *responses)
            data[prompt]["spans"] += found.spans
            words[prompt] = found.contents[0]
            cut += found.cut
    source.report.notes += [f"{plural(cut, 'pair')} whose segments were cut to equal length"] if cut else []
    return dict(data), words


JSONL_ROWS: dict[str, Callable[[Source, Iterable[Row]], tuple[Dataset, Words]]] = {
    "pairs": _jsonl_pairs,
    "labelled": _jsonl_labelled,
    "scored": _jsonl_scored,
    "segments": _jsonl_segments,
}


def _texts_of(source: Source, row: Row, *names: str) -> Optional[chat.Rendered]:
    """A prompt and responses, of fields of those names, plain or through the chat template; None where they are not usable, noted."""
    if not chat.has_messages(row, names):
        texts = source.report.texts(row, *names)
        return None if texts is None else chat.Rendered(tuple(texts), tuple(texts))
    _check_escaping(source)
    return chat.render(row, source.report, source.tokenizer, *names)


def _check_escaping(source: Source) -> None:
    if source.options["escape_special_tokens"]:
        raise UserError("escape_special_tokens=true would escape the chat template's own tokens too: it is for plain text alone")


def _has_columns(source: Source, row: Row, *columns: str) -> bool:
    """Whether the row has the fields that `columns` names; noted where not, with those that it has."""
    missing = [f"columns.{name}={field}" for name in columns if (field := source.options["columns"][name]) not in row.fields]
    if missing:
        source.report.refuse(row, f"no such field: {', '.join(missing)} (of datasets.{source.report.name}); it has {', '.join(row.fields)}")
    return not missing


def _completion_of(source: Source, row: Row) -> Optional[chat.Rendered]:
    """A prompt and one response, with the separator in front, where it is plain text."""
    columns, separator = source.options["columns"], source.options["separator"]
    if not {columns["prompt"], columns["completion"]} <= set(row.fields):
        return None
    found = _texts_of(source, row, columns["prompt"], columns["completion"])
    if found is None or chat.has_messages(row, (columns["prompt"], columns["completion"])):
        return found
    return found._replace(texts=(found.texts[0], separator + found.texts[1]))


def load_imdb(source: Source) -> Dataset:
    """IMDb reviews {text, label}: the first words are the prompt, the rest is the SFT target; no pairs."""
    data: Dataset = {}
    count = 0
    for row in source.rows():
        texts = source.report.texts(row, "text")
        if texts is None:
            continue
        words = texts[0].split(maxsplit=source.options["prefix_words"])
        prompt, rest = " ".join(words[:-1]), f" {words[-1].strip()}" if words else ""
        if source.report.usable_answers(row, prompt, [rest]):
            count += 1
            data[prompt] = {"responses": [], "pairs": [], "sft_target": rest}
    if count > len(data):
        source.report.notes.append(f"{plural(count - len(data), 'review')} left out, because others begin with the same words")
    return data


def load_reviews(source: Source) -> Dataset:
    """The embedded film reviews (reviews.py)."""
    options = source.options
    count = options["n_train" if source.split == "train" else "n_test"]
    data = {}
    for pair in reviews.review_pairs(source.split, count, options["seed"], options["min_margin"]):
        data[pair.prompt] = {
            "responses": [pair.chosen, pair.rejected],
            "pairs": [(0, 1)],
            "sft_target": pair.sft_target,
            "scores": list(pair.rewards),
        }
    source.report.read = source.report.kept = len(data)
    return data


LOADERS: dict[str, Callable[[Source], Dataset]] = {
    "hh": load_hh,
    "shp": load_shp,
    "se": load_se,
    "imdb": load_imdb,
    "jsonl": load_jsonl,
    "reviews": load_reviews,
}


def _add_pair(entry: dict, chosen: str, rejected: str) -> None:
    first = len(entry["responses"])
    entry["pairs"].append((first, first + 1))
    entry["responses"] += [chosen, rejected]
    entry["sft_target"] = chosen


def default_options(name: str) -> Mapping:
    """The options of config/datasets/<name>.yaml.

    Raises:
        UserError: there is no such file.
    """
    folder = os.path.join(CONFIG_DIR, "datasets")
    known = [file.removesuffix(".yaml") for file in sorted(os.listdir(folder))]
    if name not in known:
        raise UserError(f"unknown dataset {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return OmegaConf.to_container(OmegaConf.load(os.path.join(folder, name + ".yaml")))


def get_dataset(
    name: str,
    split: str,
    silent: bool = False,
    cache_dir: Optional[str] = None,
    options: Optional[Mapping] = None,
    tokenizer=None,
) -> Dataset:
    """Load a dataset by name.

    Args:
        name: a file of config/datasets.
        split: train or test.
        silent: print no counts.
        cache_dir: where hub datasets are kept.
        options: in place of that file's.
        tokenizer: where given, texts that hold its special tokens are found, and chat messages are rendered.

    Raises:
        UserError: no such dataset, path or split, or rows that must not be there.
    """
    data, lines = _load(name, split, default_options(name) if options is None else options, cache_dir, tokenizer, PAIRS)
    if not silent:
        print("\n".join(lines))
    return data


def _load(name: str, split: str, options: Mapping, cache_dir: Optional[str], tokenizer, form: Form) -> tuple[Dataset, list[str]]:
    """The dataset, and what to print about its rows."""
    escaped = options.get("escape_special_tokens", False)
    special_tokens = special_token_strings(tokenizer) if tokenizer is not None and not escaped else ()
    report = RowReport(name, split, options["invalid_rows"], special_tokens)
    data = LOADERS[options["loader"]](Source(split, options, report, cache_dir, tokenizer, form))
    lines = report.finish()
    if not data:
        raise UserError(f"{name}: the {split} split has no rows")
    return data, lines


def _in_form(name: str, data: Dataset, form: Form, unpair: bool, lines: list[str]) -> Dataset:
    """The prompts that have examples of that form; says in `lines` what was made of the data.

    Raises:
        UserError: the dataset has none.
    """
    paired = any(entry["pairs"] for entry in data.values())
    labelled = any("labels" in entry for entry in data.values())
    if form.roles == SFT.roles:
        targeted = {prompt: entry for prompt, entry in data.items() if "sft_target" in entry}
        if not targeted:
            raise UserError(f"{name} has no SFT target: none of its responses is labelled desirable")
        if len(targeted) < len(data):
            lines.append(f"{name}: {plural(len(data) - len(targeted), 'prompt')} without a desirable response left out")
        return targeted
    if form.roles == COMPLETIONS.roles and labelled:
        return data
    if labelled:
        raise UserError(f"{name} has single responses with labels, which are for loss=kto; pairs are needed here")
    if not paired and any("scores" in entry for entry in data.values()):
        raise UserError(f"{name} has no pairs: no scores differ by more than datasets.{name}.min_margin")
    if not paired:
        raise UserError(f"{name} has no pairs: it is for loss=sft, and its prompts are for sample.py (see experiments/frontier)")
    if form.roles == COMPLETIONS.roles:
        if not unpair:
            raise UserError(f"{name} has pairs, this loss takes single responses: datasets.{name}.unpair=true makes two of each pair")
        count = sum(len(entry["pairs"]) for entry in data.values())
        lines.append(f"{name}: {plural(count, 'pair')} taken as {2 * count:,} single responses, the chosen ones desirable (unpair)")
        return {prompt: _unpaired(entry) for prompt, entry in data.items() if entry["pairs"]}
    if unpair:
        lines.append(f"{name}: unpair=true is for loss=kto; here its pairs are taken as they are")
    if form.scored and not all("scores" in entry for entry in data.values()):
        raise UserError(f"{name} has no scores, which this loss needs: datasets=[shp], [se], [reviews], or [jsonl] with scores")
    if form.segments and not all("spans" in entry for entry in data.values()):
        raise UserError(f"{name} has no segments, which this loss needs: datasets=[jsonl] datasets.jsonl.rows=segments")
    return data


def _unpaired(entry: Mapping) -> dict:
    """Of each pair the chosen response, desirable, and the rejected one, undesirable."""
    indices = [i for pair in entry["pairs"] for i in pair]
    spans = {"spans": [entry["spans"][i] for i in indices]} if "spans" in entry else {}
    return {"responses": [entry["responses"][i] for i in indices], "pairs": [], "labels": [True, False] * len(entry["pairs"]), **spans}


def load_split(
    options: Mapping[str, Mapping],
    split: str,
    tokenizer,
    max_length: int,
    max_prompt_length: int,
    form: Form = PAIRS,
    add_bos: bool = False,
    silent: bool = False,
    cache_dir: Optional[str] = None,
) -> TokenizedSplit:
    """A split of the datasets of `options` (name -> options, the config's `datasets`), tokenized; errors as `get_dataset`.

    Where `cache_dir` is given, the tokens of large datasets are kept under it, and found there by the next run with the same rows, options
    and tokenizer, which then neither reads nor tokenizes.
    """
    tables = []
    for name, node in options.items():
        loader = LOADERS[node["loader"]]
        cache = TokenCache(cache_dir, cache_key(name, node, split, tokenizer, add_bos, form, cache_dir, loader)) if cache_dir else None
        cached = cache.load() if cache else None
        if cached is None:
            data, lines = _load(name, split, node, cache_dir, tokenizer, form)
            data = _in_form(name, data, form, node.get("unpair", False), lines)
            make = functools.partial(tokenize, name, data, node, tokenizer, add_bos, form, silent)
            worth_it = cache is not None and count_texts(data, form) >= TEXTS_A_CORE
            cached = cache.build(make, lines) if worth_it else make(), lines
        if not silent:
            print("\n".join(cached[1]))
        tables.append(cached[0])
    return TokenizedSplit(tables, tokenizer, max_length, max_prompt_length, form, add_bos)


class Prompt(NamedTuple):
    """To be continued."""

    text: str
    ids: list[int]  # cut to max_prompt_length


def load_prompts(
    options: Mapping[str, Mapping],
    split: str,
    tokenizer,
    max_prompt_length: int,
    add_bos: bool = False,
    cache_dir: Optional[str] = None,
    path: Optional[str] = None,
) -> list[Prompt]:
    """The prompts of a split, each once, or of a file, in the order of the data.

    Args:
        options, split, tokenizer, add_bos, cache_dir: as for `load_split`.
        max_prompt_length: tokens; longer prompts are cut as their dataset says, those of `path` at their start.
        path: rows {prompt}, text or chat messages, in place of datasets.

    Raises:
        UserError: as `get_dataset`.
    """
    if path is not None:
        report = RowReport("prompts", split, "error", special_token_strings(tokenizer))
        found = (_prompt_of(row, report, tokenizer) for row in report.rows(read_rows(path, split, None, cache_dir)))
        texts = [text for text in found if text is not None]
        report.kept = len(texts)
        lines = report.finish(remedy="mend or remove them")
        print("\n".join(lines))
        ids = encode(texts, tokenizer)
        found = zip(texts, [with_bos(some, tokenizer) for some in ids] if add_bos else ids, itertools.repeat("keep_end"))
    else:
        table = load_split(options, split, tokenizer, max_prompt_length + 1, max_prompt_length, SFT, add_bos, cache_dir=cache_dir).prompts
        found = zip(*(table[column] for column in ("prompt", "prompt_ids", "truncation_mode")))
    bos = tokenizer.bos_token_id if add_bos else None
    found = list(found)
    if empty := [i for i, (_, ids, _) in enumerate(found, 1) if not ids]:
        raise UserError(f"prompts {some_of(empty)} have no tokens: there is nothing to continue")
    return [Prompt(text, truncate(ids, [[]], mode, max_prompt_length, max_prompt_length, bos)[0]) for text, ids, mode in found]


def _prompt_of(row: Row, report: RowReport, tokenizer) -> Optional[str]:
    if chat.has_messages(row, ("prompt",)):
        return chat.render_prompt(row, report, tokenizer, "prompt")
    texts = report.texts(row, "prompt")
    return texts and texts[0]


def get_batch_iterator(
    names: Union[Sequence[str], Mapping[str, Mapping]],
    tokenizer,
    split: str = "train",
    batch_size: int = 1,
    shuffle: bool = True,
    max_length: int = 512,
    max_prompt_length: int = 128,
    sft_mode: bool = False,
    n_epochs: Optional[int] = None,
    n_examples: Optional[int] = None,
    seed: int = 0,
    silent: bool = False,
    cache_dir: Optional[str] = None,
) -> Iterator[dict]:
    """Collated global batches: the published signature, over the pipeline that training uses.

    Args:
        names: names of config/datasets, or a mapping of names to options.
        others: as published; see TokenizedSplit and BatchStream.
    """
    options = names if isinstance(names, Mapping) else {name: default_options(name) for name in names}
    data = load_split(
        options, split, tokenizer, max_length, max_prompt_length, SFT if sft_mode else PAIRS, silent=silent, cache_dir=cache_dir
    )
    collate_fn = get_collate_fn(tokenizer)
    for examples in BatchStream(data, batch_size, seed, n_epochs, n_examples, shuffle=shuffle):
        yield collate_fn([data.element(example) for example in examples])
