"""Token ids and labels of texts: special tokens, truncation, and the published batch element."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from tdpo.utils import IGNORED

ESCAPE = "\ufdd0"  # within the string of a special token in a chat row, which is then plain text; Unicode keeps it out of texts
GUARDS = ("\n", ";", "a", "0", "|", "\n\n", "~", "x")  # texts to put in front of one that continues another, see _encode_continuations


def special_token_strings(tokenizer) -> list[str]:
    """Return the strings that the tokenizer turns into special tokens wherever they occur in a text, longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted(set(added) | set(tokenizer.all_special_tokens), key=len, reverse=True)


def encode(texts: Sequence[str], tokenizer, escape_special_tokens: bool = False) -> list[list[int]]:
    """Return the token ids of each text, without special tokens around it.

    Args:
        texts: to be tokenized.
        tokenizer: of Transformers.
        escape_special_tokens: read a special token's string inside a text as plain text.
    """
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=escape_special_tokens,
        verbose=False,  # no warning: texts too long for the model are truncated later, and counted
    )["input_ids"]


def encode_rendered(texts: Sequence[str], tokenizer, continues: bool) -> list[list[int]]:
    """Return the token ids of texts that hold their special tokens, save those that `with_escapes` has marked.

    Args:
        texts: to be tokenized.
        tokenizer: of Transformers.
        continues: the texts continue others, so a tokenizer that begins every text with a space must not add one.
    """
    escaped = re.compile(f"({'|'.join(re.escape(_escaped(token)) for token in special_token_strings(tokenizer)) or '(?!)'})")
    pieces = [escaped.split(text) if ESCAPE in text else [text] for text in texts]  # at odd places: the strings of special tokens
    first = encode([some[0] for some in pieces], tokenizer) if not continues else _encode_continuations([x[0] for x in pieces], tokenizer)
    if max(map(len, pieces), default=1) == 1:
        return first
    return [
        sum((_encode_continuations([piece.replace(ESCAPE, "")], tokenizer, i % 2 == 1)[0] for i, piece in enumerate(some) if i), ids)
        for some, ids in zip(pieces, first)
    ]


def _encode_continuations(texts: Sequence[str], tokenizer, escape: bool = False) -> list[list[int]]:
    """Return the token ids of texts as they continue another one: without the space that some tokenizers put in front of every text.

    Such a tokenizer puts it in front of a guard instead, if none of the guard's tokens is merged with those of the text.
    """
    found = encode(texts, tokenizer, escape)
    if not _adds_space(tokenizer):
        return found
    waiting = list(range(len(texts)))
    for guard in GUARDS:
        (before,) = encode([guard], tokenizer)
        merged = []
        for i, ids in zip(waiting, encode([guard + texts[i] for i in waiting], tokenizer, escape) if waiting else []):
            if ids[: len(before)] == before:
                found[i] = ids[len(before) :]
            else:
                merged.append(i)
        waiting = merged
    return found


def _adds_space(tokenizer) -> bool:
    """Whether the tokens of a text that continue those of another one decode with a space in between."""
    first, second = encode(["a", "a"], tokenizer)
    return tokenizer.decode(first + second) == "a a"


def with_escapes(value: Any, special: re.Pattern) -> Any:
    """Return a value with the strings of special tokens in all its texts marked as plain text.

    Args:
        value: a text, or messages.
        special: finds the strings.
    """
    if isinstance(value, str):
        return special.sub(lambda found: _escaped(found[0]), value)
    if isinstance(value, Mapping):
        return {with_escapes(key, special): with_escapes(entry, special) for key, entry in value.items()}
    return [with_escapes(entry, special) for entry in value] if isinstance(value, (list, tuple)) else value


def _escaped(token: str) -> str:
    return token[0] + ESCAPE + token[1:]


def with_eos(ids: list[int], tokenizer) -> list[int]:
    """Append end-of-sequence to a response's tokens, unless they end with it already (some chat templates write it)."""
    return ids if ids and ids[-1] == tokenizer.eos_token_id else ids + [tokenizer.eos_token_id]


def trim_after_eos(text: str, tokenizer) -> str:
    """Strip the white space that some chat templates write after end-of-sequence."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(tokenizer.eos_token) else text


def completed(text: str, tokenizer) -> str:
    """Return a rendered response without white space after its last special token, and with end-of-sequence if it does not end with one."""
    if tokenizer is None:
        return text
    stripped = text.rstrip()
    return stripped if stripped.endswith(tuple(special_token_strings(tokenizer))) else text + tokenizer.eos_token


def with_bos(ids: list[int], tokenizer) -> list[int]:
    """Prepend beginning-of-sequence to a prompt's tokens, unless they begin with it already (some chat templates write it)."""
    return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id] + ids


def truncate(
    prompt: list[int],
    responses: Sequence[list[int]],
    truncation_mode: str,
    max_length: int,
    max_prompt_length: int,
    bos_token_id: Optional[int] = None,
) -> tuple[list[int], list[list[int]]]:
    """Truncate a prompt and its responses by the published rule.

    If the prompt and the longest response exceed max_length, the prompt is cut to max_prompt_length. If they still exceed it, every
    response is cut to max_length - max_prompt_length; a response that is cut loses its end-of-sequence.

    Args:
        prompt, responses: token ids.
        truncation_mode: which end of the prompt is kept, keep_start or keep_end.
        max_length: of prompt and response together, tokens.
        max_prompt_length: tokens.
        bos_token_id: stays at the start of a prompt that begins with it.
    """
    ((length, *cut),) = truncated_lengths(np.array([[len(prompt), *map(len, responses)]]), max_length, max_prompt_length).tolist()
    if length < len(prompt):
        if truncation_mode == "keep_start":
            prompt = prompt[:length]
        elif bos_token_id is not None and prompt[0] == bos_token_id:
            prompt = [bos_token_id] + prompt[len(prompt) - length + 1 :]
        else:
            prompt = prompt[-length:]
    return prompt, [response[:n] for response, n in zip(responses, cut)]


def truncated_lengths(lengths: np.ndarray, max_length: int, max_prompt_length: int) -> np.ndarray:
    """Return the lengths that `truncate` leaves.

    Args:
        lengths: (examples, 1 + responses), tokens of prompt and responses.
        max_length, max_prompt_length: as for `truncate`.

    Returns:
        The same table after truncation.
    """
    prompts, responses = lengths[:, :1], lengths[:, 1:]
    longest = responses.max(-1, keepdims=True)
    prompts = np.where(prompts + longest > max_length, np.minimum(prompts, max_prompt_length), prompts)
    cut = np.where(prompts + longest > max_length, np.minimum(responses, max_length - max_prompt_length), responses)
    return np.concatenate([prompts, cut], axis=1)


def batch_element(
    prompt: str,
    responses: dict[str, str],
    prompt_ids: list[int],
    response_ids: dict[str, list[int]],
    masks: Optional[dict[str, list[int]]] = None,
) -> dict:
    """Return an example in the published form: texts, and `<role>_{input_ids,attention_mask,labels}` of prompt + response.

    Args:
        prompt: text.
        responses: text by role (chosen, rejected).
        prompt_ids, response_ids: tokens after truncation, of the responses by role.
        masks: loss mask of each response by role, 1 = in the loss; None: all response tokens are.
    """
    element: dict = {"prompt": prompt}
    for role, text in responses.items():
        element[role] = prompt + text
        element[f"{role}_response_only"] = text
    for role, ids in response_ids.items():
        element[f"{role}_input_ids"] = prompt_ids + ids
        element[f"{role}_attention_mask"] = [1] * (len(prompt_ids) + len(ids))
        labels = ids if masks is None else [token if scored else IGNORED for token, scored in zip(ids, masks[role])]
        element[f"{role}_labels"] = [IGNORED] * len(prompt_ids) + labels
    element["prompt_input_ids"] = prompt_ids
    element["prompt_attention_mask"] = [1] * len(prompt_ids)
    return element


def tokenize_batch_element(
    prompt: str, chosen: str, rejected: str, truncation_mode: str, tokenizer, max_length: int, max_prompt_length: int
) -> dict:
    """Return a pair as a batch element: the published signature, on top of the pipeline's functions.

    Args:
        prompt, chosen, rejected: texts.
        truncation_mode, max_length, max_prompt_length: as for `truncate`.
        tokenizer: of Transformers.

    Raises:
        ValueError: a text holds end-of-sequence, or truncation_mode is neither keep_start nor keep_end.
    """
    if truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode={truncation_mode!r}: must be 'keep_start' or 'keep_end'")
    prompt_ids, *response_ids = encode([prompt, chosen, rejected], tokenizer)
    for ids, text in zip((prompt_ids, *response_ids), (prompt, chosen, rejected)):
        if tokenizer.eos_token_id in ids:
            raise ValueError(f"text contains the end-of-sequence token: {text}")
    ended = [with_eos(ids, tokenizer) for ids in response_ids]
    prompt_ids, cut = truncate(prompt_ids, ended, truncation_mode, max_length, max_prompt_length)
    return batch_element(prompt, {"chosen": chosen, "rejected": rejected}, prompt_ids, dict(zip(("chosen", "rejected"), cut)))
