"""Sampling of continuations of prompts."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Optional, Union

import numpy as np
import torch
import transformers
from torch import nn

from tdpo.data.chat_template import end_tokens

# From prompts (token ids), a temperature and numbers that the random numbers depend on to the continuations of each prompt (token ids).
Draw = Callable[[Sequence[list[int]], float, Sequence[int]], list[list[list[int]]]]


def own_distribution(tokenizer, max_length: int, **others) -> transformers.GenerationConfig:
    """Return generation settings that sample from the model's own distribution: temperature 1, no top-k, no top-p.

    A model's own generation settings are not used, because they may contain penalties or a temperature.

    Args:
        tokenizer: its end-of-sequence token, and the token with which its chat template ends a reply, end a text.
        max_length: tokens of prompt and continuation.
        others: generation settings of Transformers that are added to, or replace, those above.
    """
    settings = {"max_length": max_length, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": end_tokens(tokenizer)}
    return transformers.GenerationConfig(**settings | others)


@contextmanager
def _settings_of(model: nn.Module, settings: transformers.GenerationConfig) -> Iterator[list[int]]:
    """Within the block, replace the model's generation settings, apart from the tokens that end a text, which are yielded.

    They are replaced because Transformers would fill gaps in settings passed to it from the model's.
    """
    own = model.generation_config
    ends = sorted({*_ids(settings.eos_token_id), *_ids(own.eos_token_id)})
    model.generation_config = copy.copy(settings)
    model.generation_config.eos_token_id = ends
    try:
        yield ends
    finally:
        model.generation_config = own


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Within the block, let a model with FlexAttention use another: FlexAttention would be compiled for the lengths of the cache."""
    model = getattr(model, "policy", model)  # a reference that is the policy without its adapters
    if model.config._attn_implementation != "flex_attention":
        yield
        return
    model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation("flex_attention")


def _ids(ids: Union[int, Sequence[int], None]) -> list[int]:
    listed = [] if ids is None else [ids] if isinstance(ids, (int, str)) else list(ids)
    return [end for end in listed if isinstance(end, int)]


def continuations(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int,
    settings: transformers.GenerationConfig,
    max_new_tokens: Optional[int] = None,
    synced: bool = False,
) -> list[list[list[int]]]:
    """Sample n continuations of each prompt.

    Args:
        model: a causal language model of Transformers, on its device.
        prompts: token ids, none empty; shorter ones are padded on the left.
        n: continuations per prompt; with beam search the best n.
        settings: how to generate; its max_length limits the tokens of the longest prompt and its continuation.
        max_new_tokens: limit for a continuation, if lower; None: no other limit.
        synced: other ranks generate with the same sharded model, so a rank that is done keeps running forward passes until all are.

    Returns:
        per prompt n lists of token ids, with the token that ends the text if the model generated one.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[settings.pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with _settings_of(model, settings) as ends, _plain_attention(model):
        length = min(settings.max_length, longest + (max_new_tokens or settings.max_length))
        options = {"num_return_sequences": n, "max_length": length, "synced_gpus": synced}
        output = model.generate(input_ids=ids, attention_mask=mask, **options)[:, longest:].tolist()
    whole = [up_to_end(ids, ends) for ids in output]
    return [whole[i : i + n] for i in range(0, len(whole), n)]


def up_to_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return token ids up to the first that ends a text, with that one."""
    return list(ids)[: next((i + 1 for i, token in enumerate(ids) if token in ends), None)]


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
    """Sample n continuations of each prompt, seeded.

    Args:
        model: see `continuations`.
        tokenizer: decodes the continuations.
        prompts: (text, token ids) each.
        first: index of the first prompt.
        n, settings, max_new_tokens: see `continuations`.
        seed: the random numbers depend only on seed and `first`.

    Returns:
        See `rows_of`.
    """
    torch.manual_seed(mixed_seed(seed, first))
    drawn = continuations(model, [ids for _, ids in prompts], n, settings, max_new_tokens)
    return rows_of(tokenizer, prompts, drawn, range(first, first + len(prompts)))


def rows_of(tokenizer, prompts: Sequence[tuple[str, list[int]]], drawn: Sequence[list[list[int]]], indices: Sequence[int]) -> list[dict]:
    """Return one dict per continuation: {prompt, completion, prompt_ids, completion_ids, index (of the prompt), sample (0 ... n - 1)}.

    Args:
        tokenizer: decodes the continuations.
        prompts: (text, token ids) each.
        drawn: the continuations of each prompt, token ids.
        indices: of the prompts.
    """
    return [
        {
            "prompt": text,
            "completion": text_of(tokenizer, prompt_ids, ids),
            "prompt_ids": prompt_ids,
            "completion_ids": ids,
            "index": index,
            "sample": j,
        }
        for index, (text, prompt_ids), some in zip(indices, prompts, drawn)
        for j, ids in enumerate(some)
    ]


def text_of(tokenizer, prompt: Sequence[int], continuation: Sequence[int]) -> str:
    """Decode a continuation as it follows the prompt, with the space between them if there is one."""
    start, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (list(prompt), [*prompt, *continuation]))
    # Otherwise the prompt ends within a character, or the decoder cleans up spaces across the boundary.
    return whole.removeprefix(start) if whole.startswith(start) else tokenizer.decode(list(continuation), skip_special_tokens=True)


def interleaved(by_rank: Sequence[list]) -> list:
    """Merge the items of all ranks in round-robin order: [[a, c], [b]] to [a, b, c]."""
    return [own[i] for i in range(max(map(len, by_rank))) for own in by_rank if i < len(own)]


def mixed_seed(*numbers: int) -> int:
    """Hash numbers to a 32-bit seed, because PyTorch's CPU generator uses only the lowest 32 bits of a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
