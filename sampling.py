"""Continuations of prompts."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import transformers
from torch import nn


def own_distribution(tokenizer, max_length: int) -> transformers.GenerationConfig:
    """Settings by which a model is sampled as it is: temperature 1, no top-k, no top-p.

    Not the model's own settings: they may bring penalties, or a temperature.

    Args:
        tokenizer: whose end-of-sequence token ends a text.
        max_length: tokens of prompt and continuation.
    """
    return transformers.GenerationConfig(
        max_length=max_length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def generate(
    model: nn.Module, batch: Mapping[str, torch.Tensor], settings: transformers.GenerationConfig, tokenizer, synced: bool
) -> list[str]:
    """Whole texts, prompt included, of `batch`'s prompts (padded on the left).

    `synced`: other processes generate with the same sharded model: one whose texts have ended takes part until all have.
    """
    own, model.generation_config = model.generation_config, settings
    try:
        output = model.generate(input_ids=batch["prompt_input_ids"], attention_mask=batch["prompt_attention_mask"], synced_gpus=synced)
    finally:
        model.generation_config = own
    return tokenizer.batch_decode(output, skip_special_tokens=True)


def interleaved(parts: Sequence[list]) -> list:
    """The inverse of dealing items out one by one: [[a, c], [b]] to [a, b, c]."""
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def mixed_seed(*numbers: int) -> int:
    """A seed that differs where any of the numbers does. PyTorch's generator on the CPU heeds the lowest 32 bits of a seed alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
