"""Continuations of prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Optional

import numpy as np
import torch
import transformers
from torch import nn


def own_distribution(tokenizer, max_length: int, **others) -> transformers.GenerationConfig:
    """Settings by which a model is sampled as it is: temperature 1, no top-k, no top-p.

    Not the model's own settings: they may bring penalties, or a temperature.

    Args:
        tokenizer: whose end-of-sequence token ends a text.
        max_length: tokens of prompt and continuation.
        others: settings of Transformers that are added, or take the place of these.
    """
    settings = {"max_length": max_length, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return transformers.GenerationConfig(**settings | others)


@contextmanager
def _settings_of(model: nn.Module, settings: transformers.GenerationConfig) -> Iterator[None]:
    """Within it these are the model's own: Transformers fills what is missing in settings that it is given from the model's."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def continuations(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int,
    settings: transformers.GenerationConfig,
    max_new_tokens: Optional[int] = None,
    synced: bool = False,
) -> list[list[list[int]]]:
    """For each prompt n continuations, in tokens, end-of-sequence included where the model wrote it.

    Args:
        model: on its device.
        prompts: tokens, none empty.
        n: of each prompt; with beams the best n.
        settings: how to draw them; its max_length counts the longest prompt.
        max_new_tokens: of a continuation, where that is less.
        synced: other processes generate with the same sharded model: one whose texts have ended takes part until all have.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[settings.pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with _settings_of(model, settings):
        length = min(settings.max_length, longest + (max_new_tokens or settings.max_length))
        options = {"num_return_sequences": n, "max_length": length, "synced_gpus": synced}
        output = model.generate(input_ids=ids, attention_mask=mask, **options)[:, longest:].tolist()
    whole = [ids[: ids.index(settings.eos_token_id) + 1] if settings.eos_token_id in ids else ids for ids in output]
    return [whole[i : i + n] for i in range(0, len(whole), n)]


def sample_batch(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[tuple[str, list[int]]],
    first: int,
    n: int,
    settings: transformers.GenerationConfig,
    seed: int,
    max_new_tokens: Optional[int] = None,
) -> list[dict]:
    """n continuations of each prompt, seeded: {prompt, completion, prompt_ids, completion_ids, index, sample}.

    Args:
        prompts: texts and tokens.
        first: number of the first of them, from which `index` counts.
        n, settings, max_new_tokens: see `continuations`.
        seed: the texts depend on it and the batch alone.
    """
    torch.manual_seed(mixed_seed(seed, first))
    drawn = continuations(model, [ids for _, ids in prompts], n, settings, max_new_tokens)
    return [
        {
            "prompt": text,
            "completion": text_of(tokenizer, prompt_ids, ids),
            "prompt_ids": prompt_ids,
            "completion_ids": ids,
            "index": first + i,
            "sample": j,
        }
        for i, ((text, prompt_ids), some) in enumerate(zip(prompts, drawn))
        for j, ids in enumerate(some)
    ]


def text_of(tokenizer, prompt: Sequence[int], continuation: Sequence[int]) -> str:
    """The continuation's text, as it goes on after the prompt's: with the space between them, where there is one."""
    start, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (list(prompt), [*prompt, *continuation]))
    # Else the prompt ends within a character, or the decoder tidies up.
    return whole.removeprefix(start) if whole.startswith(start) else tokenizer.decode(list(continuation), skip_special_tokens=True)


def interleaved(by_rank: Sequence[list]) -> list:
    """The inverse of dealing items out one by one: [[a, c], [b]] to [a, b, c]."""
    return [own[i] for i in range(max(map(len, by_rank))) for own in by_rank if i < len(own)]


def mixed_seed(*numbers: int) -> int:
    """A seed that differs where any of the numbers does. PyTorch's generator on the CPU heeds the lowest 32 bits of a seed alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
