"""The datasets: loaders that turn data rows into prompts with responses and pairs. To train on your own rows, see docs/data.md.

A loader returns the data contract (tdpo/data/contract.py). Add a new one to LOADERS, with its options in config/datasets/<name>.yaml.
"""

import functools
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Optional, Union

import numpy as np
from omegaconf import OmegaConf

from tdpo.data import reviews
from tdpo.data.batching import BatchStream, get_collate_fn
from tdpo.data.chat import Chat, has_messages
from tdpo.data.contract import PAIRS, SFT, Contract, Form, Source, Take, add_pair, examples_in_form
from tdpo.data.jsonl import load_jsonl
from tdpo.data.rows import Row, RowReport
from tdpo.data.sources import Place, read_rows
from tdpo.data.split import TokenizedSplit
from tdpo.data.token_cache import TEXTS_A_CORE, TokenCache, cache_key, count_texts, tokenize
from tdpo.data.tokenization import ESCAPE, encode, encode_rendered, special_token_strings, tokenize_batch_element, truncate, with_bos
from tdpo.utils import CONFIG_DIR, UserError, get_logger, nearest, plural, some_of

log = get_logger(__name__)

# The published names, which forks import from here, and `load_split` with what it takes.
__all__ = [
    "get_dataset",
    "get_hh",
    "get_shp",
    "get_se",
    "get_collate_fn",
    "get_batch_iterator",
    "tokenize_batch_element",
    "extract_anthropic_prompt",
    "strip_html_tags",
    "strings_match_up_to_spaces",
    "load_split",
    "default_options",
    "PAIRS",
    "SFT",
]

ASSISTANT = "\n\nAssistant:"


def load_hh(source: Source) -> Contract:
    """Load Anthropic helpful-harmless: rows {chosen, rejected} of dialogues `\\n\\nHuman: ...\\n\\nAssistant: ...` with a shared prompt.

    The prompt is taken from chosen, and its length is cut from the start of rejected, as published. A rejected dialogue with another
    prompt is a defect of the row. The SFT target is the chosen response of a prompt's last pair.
    """
    data: Contract = defaultdict(lambda: {"responses": [], "pairs": []})
    for row in source.rows():
        texts = source.report.texts(row, "chosen", "rejected")
        if texts is None:
            continue
        if ASSISTANT not in texts[0]:
            source.report.refuse(row, f"no {ASSISTANT!r} in 'chosen'")
            continue
        prompt = extract_anthropic_prompt(texts[0])
        chosen, rejected = (text[len(prompt) :] for text in texts)
        if source.report.usable_pair(row, prompt, chosen, rejected, same_prompt=texts[1].startswith(prompt)):
            add_pair(data[prompt], chosen, rejected)
    return dict(data)


def extract_anthropic_prompt(prompt_and_response: str) -> str:
    """Return a dialogue up to and including its last '\\n\\nAssistant:'.

    Raises:
        ValueError: the dialogue has none.
    """
    return prompt_and_response[: prompt_and_response.rindex(ASSISTANT) + len(ASSISTANT)]


def load_shp(source: Source) -> Contract:
    """Load Stanford Human Preferences: pairs whose score ratio is at least 2. The SFT target is the response with the highest score."""
    data: Contract = defaultdict(lambda: {"responses": [], "pairs": [], "scores": []})
    ties = 0
    for row in source.rows():
        texts = source.report.texts(row, "history", "human_ref_A", "human_ref_B")
        if texts is None:
            continue
        scores = [row.fields.get(name) for name in ("score_A", "score_B")]
        if not all(isinstance(score, (int, float)) and score > 0 for score in scores) or row.fields.get("labels") not in (0, 1):
            source.report.refuse(row, "score_A and score_B must be numbers above 0, and labels 0 or 1")
            continue
        if max(scores[0] / scores[1], scores[1] / scores[0]) < 2:
            ties += scores[0] == scores[1]
            continue
        prompt = "\n\nHuman: " + texts[0] + ASSISTANT
        order = (0, 1) if row.fields["labels"] == 1 else (1, 0)  # label 1: A is preferred
        if source.form.rated and not scores[order[0]] > scores[order[1]]:
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
    source.report.notes += [f"{plural(ties, 'pair')} with equal scores dropped"] if ties and source.form.rated else []
    return dict(data)


def load_se(source: Source) -> Contract:
    """Load StackExchange: answers without HTML except code; every two answers to a question form a pair, ordered by score.

    The rows come as one split, `train`, and are shuffled with seed 42, as published. The first 1 % of them are the test split.
    """
    rows = read_rows(source.place(), "train")
    order = np.random.default_rng(42).permutation(len(rows))  # what datasets.Dataset.shuffle(seed=42) does
    n_test = int(len(rows) * 0.01)
    order = order[:n_test] if source.split == "test" else order[n_test:]
    data: Contract = {}
    ties = 0
    for row in source.report.rows(rows[int(i)] for i in order):
        answers = row.fields.get("answers")
        question = source.report.texts(row, "question")
        if question is None:
            continue
        if not isinstance(answers, list) or not all(_is_answer(answer) for answer in answers) or len(answers) < 2:
            source.report.refuse(row, "'answers' must be a list of two or more {text, pm_score}")
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
        if source.form.rated:  # otherwise the second of two equal answers is chosen, as published
            untied = [(i, j) for i, j in pairs if scores[i] > scores[j]]
            ties, pairs = ties + len(pairs) - len(untied), untied
        data[prompt] = {"responses": texts, "pairs": pairs, "scores": scores, "sft_target": texts[int(np.argmax(scores))]}
    source.report.notes += [f"{plural(ties, 'pair')} with equal scores dropped"] if ties else []
    return data


def _is_answer(answer) -> bool:
    return isinstance(answer, Mapping) and isinstance(answer.get("text"), str) and isinstance(answer.get("pm_score"), (int, float))


def strip_html_tags(html: str) -> str:
    """Return the text of paragraphs, and code as <code>...</code>. All else is dropped, also tags within a paragraph, as published."""
    parts = []
    import bs4  # imported here, because it takes a third of a second

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


def load_imdb(source: Source) -> Contract:
    """Load IMDb reviews {text, label} for SFT: the first words are the prompt, the rest is the SFT target. There are no pairs."""
    data: Contract = {}
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
        source.report.notes.append(f"{plural(count - len(data), 'review')} dropped: later ones begin with the same words")
    return data


def load_reviews(source: Source) -> Contract:
    """Load the embedded film reviews (tdpo/data/reviews.py)."""
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


LOADERS: dict[str, Callable[[Source], Contract]] = {
    "hh": load_hh,
    "shp": load_shp,
    "se": load_se,
    "imdb": load_imdb,
    "jsonl": load_jsonl,
    "reviews": load_reviews,
}


def default_options(name: str) -> Mapping:
    """Return the options in config/datasets/<name>.yaml.

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
) -> Contract:
    """Load a dataset by name.

    Args:
        name: of a file in config/datasets.
        split: train or test.
        silent: log no counts.
        cache_dir: folder for hub datasets.
        options: used in place of those in the file.
        tokenizer: finds special tokens in texts and renders chat messages. With None, special tokens are not looked for, and chat messages
            are an error.

    Returns:
        The data contract, see tdpo/data/contract.py.

    Raises:
        UserError: there is no such dataset, path or split, or there are rows that cannot be used.
    """
    data, lines = _load(name, split, default_options(name) if options is None else options, cache_dir, tokenizer, PAIRS)
    if not silent:
        log.info("\n".join(lines))
    return data


def get_hh(split: str, silent: bool = False, cache_dir: Optional[str] = None) -> Contract:
    """Load Anthropic helpful-harmless with its default options: see load_hh, and get_dataset for the arguments."""
    return get_dataset("hh", split, silent, cache_dir)


def get_shp(split: str, silent: bool = False, cache_dir: Optional[str] = None) -> Contract:
    """Load the Stanford Human Preferences with their default options: see load_shp, and get_dataset for the arguments."""
    return get_dataset("shp", split, silent, cache_dir)


def get_se(split: str, silent: bool = False, cache_dir: Optional[str] = None) -> Contract:
    """Load the StackExchange preferences with their default options: see load_se, and get_dataset for the arguments."""
    return get_dataset("se", split, silent, cache_dir)


def strings_match_up_to_spaces(str_a: str, str_b: str) -> bool:
    """Whether two texts are equal apart from spaces. (The published function does not compare the ends of the texts.)"""
    return str_a.replace(" ", "") == str_b.replace(" ", "")


def _load(name: str, split: str, options: Mapping, cache_dir: Optional[str], tokenizer, form: Form) -> tuple[Contract, list[str]]:
    """Return the dataset, and the lines to log about its rows."""
    plain = options.get("escape_special_tokens", False) or options.get("rendered", False)
    special_tokens = special_token_strings(tokenizer) if tokenizer is not None and not plain else ()
    report = RowReport(name, split, options["invalid_rows"], special_tokens, takes_rendered="rendered" in options)
    data = LOADERS[options["loader"]](Source(split, options, report, cache_dir, tokenizer, form))
    lines = report.finish()
    texts = report.kept - report.rendered
    if texts > 0 and getattr(tokenizer, "chat_template", None) and not options.get("rendered"):
        lines.append(f"  {plural(texts, 'row')} of plain text: trained on as it is, without the tokenizer's chat template")
    if not data:
        raise UserError(f"{name}: the {split} split has no rows")
    return data, lines


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
    """Load a split of one or several datasets, tokenized.

    With `cache_dir`, the tokens of large datasets are kept there. The next run with the same rows, options and tokenizer finds them, and
    neither parses rows nor tokenizes.

    Args:
        options: dataset name -> options, the config's `datasets`.
        split: train or test.
        tokenizer: of Transformers.
        max_length, max_prompt_length: tokens, see tokenization.truncate.
        form: of the examples.
        add_bos: begin each prompt with the beginning-of-sequence token.
        silent: log no counts, show no progress bar.
        cache_dir: folder for hub datasets and tokens; None keeps no tokens.

    Raises:
        UserError: as `get_dataset`; or the data lack what `form` needs.
    """
    tables = []
    for name, node in options.items():
        loader = LOADERS[node["loader"]]
        cache = TokenCache(cache_dir, cache_key(name, node, split, tokenizer, add_bos, form, cache_dir, loader)) if cache_dir else None
        cached = cache.load() if cache else None
        if cached is None:
            data, lines = _load(name, split, node, cache_dir, tokenizer, form)
            examples, notes = examples_in_form(name, data, form, node.get("unpair", False))
            lines += notes
            make = functools.partial(tokenize, name, examples, node, tokenizer, add_bos, silent)
            worth_it = cache is not None and count_texts(examples.values()) >= TEXTS_A_CORE
            cached = cache.build(make, lines) if worth_it else make(), lines
        if not silent:
            log.info("\n".join(cached[1]))
        tables.append(cached[0])
    takes = [Take(*map(node.get, Take._fields)) if split == "train" else Take() for node in options.values()]
    return TokenizedSplit(tables, tokenizer, max_length, max_prompt_length, form, add_bos, takes)


class Prompt(NamedTuple):
    """A prompt to continue."""

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
    """Load prompts to continue, in the order of the data: every prompt of a split once, or the prompts of a file.

    Args:
        options, split, tokenizer, add_bos, cache_dir: as for `load_split`.
        max_prompt_length: tokens. Longer prompts are cut by their dataset's truncation_mode, those of `path` at their start.
        path: rows {prompt}, text or chat messages, which replace the datasets.

    Raises:
        UserError: as `get_dataset`; or a prompt has no tokens.
    """
    if path is not None:
        report = RowReport("prompts", split, "error", special_token_strings(tokenizer))
        template = Chat(tokenizer, report)
        found = (_prompt_of(row, report, template) for row in report.rows(read_rows(Place(path, cache_dir=cache_dir), split)))
        texts = [text for text in found if text is not None]
        report.kept = len(texts)
        if unread := sorted(report.fields - {"prompt", "tools"}):
            report.notes.append(f"fields not read: {some_of(unread)}")
        lines = report.finish(remedy="fix or remove them")
        log.info("\n".join(lines))
        ids = encode(texts, tokenizer)
        found = zip(texts, [with_bos(some, tokenizer) for some in ids] if add_bos else ids, itertools.repeat("keep_end"))
    else:
        table = load_split(options, split, tokenizer, max_prompt_length + 1, max_prompt_length, SFT, add_bos, cache_dir=cache_dir).prompts
        found = zip(*(table[column] for column in ("prompt", "prompt_ids", "truncation_mode")))
    bos = tokenizer.bos_token_id if add_bos else None
    found = list(found)
    if empty := [i for i, (_, ids, _) in enumerate(found, 1) if not ids]:
        raise UserError(f"no tokens in prompt {some_of(empty)} (numbers count from 1): there is nothing to continue")
    return [Prompt(text, truncate(ids, [[]], mode, max_prompt_length, max_prompt_length, bos)[0]) for text, ids, mode in found]


def _prompt_of(row: Row, report: RowReport, template: Chat) -> Optional[str]:
    if has_messages(row, ("prompt",)):
        return template.prompt(row, "prompt")
    texts = report.texts(row, "prompt")
    return texts and texts[0]


def chat_prompts(chats: Sequence[Sequence[Mapping]], tokenizer, add_bos: bool = False) -> list[Prompt]:
    """Render conversations up to where a reply begins; none is cut, and strings of special tokens inside them are plain text.

    Args:
        chats: the messages {role, content} of each conversation.
        tokenizer: with a chat template.
        add_bos: begin each prompt with the beginning-of-sequence token.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses a conversation.
    """
    report = RowReport("conversations", "to answer", "error")
    template = Chat(tokenizer, report, escape=True)
    rows = report.rows(Row("questions", number, {"prompt": chat}) for number, chat in enumerate(chats, 1))
    texts = [text for text in (template.prompt(row, "prompt") for row in rows) if text is not None]
    report.kept = len(texts)
    report.finish(remedy="")
    ids = encode_rendered(texts, tokenizer, continues=False)
    return [Prompt(text.replace(ESCAPE, ""), with_bos(some, tokenizer) if add_bos else some) for text, some in zip(texts, ids)]


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
    """Yield collated global batches: the published signature, on top of the pipeline that training uses.

    Args:
        names: names of files in config/datasets, or a mapping from names to options.
        others: as published; see `load_split` and `BatchStream`.
    """
    options = names if isinstance(names, Mapping) else {name: default_options(name) for name in names}
    data = load_split(
        options, split, tokenizer, max_length, max_prompt_length, SFT if sft_mode else PAIRS, silent=silent, cache_dir=cache_dir
    )
    collate_fn = get_collate_fn(tokenizer)
    for examples in BatchStream(data, batch_size, seed, n_epochs, n_examples, shuffle=shuffle):
        yield collate_fn([data.element(example) for example in examples])
