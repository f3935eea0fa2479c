"""What a run will cost, before its weights are loaded: memory of a device, tokens of a step, disk of a checkpoint."""

import bisect
import os
from collections.abc import Callable
from typing import Optional

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tdpo.data.batching import batches_of
from tdpo.data.split import TokenizedSplit
from tdpo.losses import Objective
from tdpo.microbatches import Packing, cut_into_microbatches, cut_into_rows
from tdpo.models.build import compute_dtype
from tdpo.models.memory import ModelShape, device_memory
from tdpo.optimizers import bytes_per_weight, copies_in_step
from tdpo.scoring.distributions import chunk_size
from tdpo.scoring.prefix_sharing import unsupported_attention
from tdpo.scoring.probes import packing_of
from tdpo.training.saver import policy_saved
from tdpo.utils import DTYPES

FILLED = 0.9  # of a device's memory: what the estimate may fill when it proposes tokens_per_microbatch
EXAMPLES = 10_000  # of the first batches, from which tokens are counted


def costs(
    config: DictConfig,
    objective: Objective,
    model: nn.Module,
    data: TokenizedSplit,
    ranks: int,
    device: torch.device,
    own_base: bool = False,
) -> list[str]:
    """Return lines about memory, tokens and disk of a run.

    Args:
        config: a checked config.
        objective: the loss.
        model: the policy, with adapters if the run has them, on the meta device.
        data: the train split.
        ranks: of the run, on all nodes.
        device: of this rank.
        own_base: whether the run writes base/, the model below its adapters.
    """
    shape = ModelShape.of_model(model)
    plain = config.scoring == "plain" or bool(unsupported_attention(model.config))
    sharded = config.trainer == "FSDPTrainer"
    packing = None if plain else packing_of(shape.hidden, config.max_length)
    tokens, responses, computed = _tokens(config, objective, data, ranks if sharded else 1, packing)
    dtype, options = DTYPES[config.model.policy_dtype], OmegaConf.to_container(config.optimizer_options)
    sizes = {"weight_bytes": dtype.itemsize, "compute_bytes": compute_dtype(config.model).itemsize}
    states = bytes_per_weight(config.optimizer, options, dtype) / dtype.itemsize

    def memory_of(tokens: int, responses: int, several: bool) -> dict[str, int]:
        memory = device_memory(
            shape,
            tokens=tokens,
            response_tokens=responses,
            shards={"FSDPTrainer": ranks // config.parallel.replicas, "TensorParallelTrainer": ranks}.get(config.trainer, 1),
            needs_reference=objective.needs_reference,
            needs_kl=objective.needs_kl,
            optimizer_states=states,
            optimizer_copies=copies_in_step(config.optimizer, options, config.trainer != "BasicTrainer", device.type == "cuda"),
            activation_checkpointing=config.activation_checkpointing,
            accumulates_whole=sharded and config.parallel.reduce_once_a_step and several,
            plain=plain,
            chunk=chunk_size(device),
            **sizes,
        )
        if config.reference_cache and memory["reference"]:
            memory["reference"] = sizes["compute_bytes"] * shape.vocabulary * shape.hidden  # its head
        return memory

    several = config.gradient_accumulation_steps > 1 or config.tokens_per_microbatch is not None
    memory, has = memory_of(tokens, responses, several), device_total(device)
    needed = sum(memory.values())
    parts = ", ".join(f"{name} {gigabytes(part)}" for name, part in memory.items() if part >= 0.005 * needed)
    kind = "GPU" if device.type == "cuda" else "machine" if ranks == 1 else f"process of {ranks}"
    lines = [f"memory: about {gigabytes(needed)} GB per {kind} at the peak ({parts}); this one has {gigabytes(has)} GB"]
    if needed > has:
        # Scored plain, the key counts otherwise; with mismatched responses (kto) the longest row is not known here.
        longest = tokens if plain or objective.needs_kl_baseline else max(data.lengths(next(data.epochs(0))))
        fitting = _most_tokens(lambda n: sum(memory_of(n, responses * n // tokens, True).values()), longest, tokens, FILLED * has)
        smaller = "adapter.rank=16" if not shape.adapter else "model.quantize=nf4" if not shape.quantized else "a smaller max_length"
        more = f"{smaller}, activation_checkpointing=true, or more devices"
        remedy = f"set tokens_per_microbatch={fitting}, which would fit, or try {more}" if fitting else f"try {more}"
        lines.append(f"warning: that is more than there is; {remedy}")
    lines.append(f"tokens: about {computed:,.0f} computed a step, padding included; at most {tokens:,} in a microbatch")
    trained = sizes["weight_bytes"] * shape.trained
    frozen = sizes["compute_bytes"] * shape.parameters if shape.adapter else trained
    state = trained * (1 + states + (1 if shape.adapter else 0))  # adapter/ has the adapters once more
    policy = policy_saved(config)
    usual, last = state + frozen * (policy == "always"), state + frozen * (policy != "never") + frozen
    base = f", and {gigabytes(frozen)} GB base/, once" if own_base else ""
    lines.append(f"disk: about {gigabytes(usual)} GB a checkpoint, {gigabytes(last)} GB the last one{base}")
    return lines


def _most_tokens(memory_of: Callable[[int], int], longest: int, tokens: int, limit: float) -> Optional[int]:
    """Return the most tokens of a microbatch, in hundreds, that fit; None if one example, or all the microbatch's tokens, do not decide it.

    Args:
        memory_of: returns the bytes that a device needs with so many tokens.
        longest: tokens of the longest example, which a microbatch must hold.
        tokens: of the largest microbatch, which does not fit.
        limit: bytes that may be used.
    """
    candidates = range(-(-longest // 100) * 100, tokens, 100)
    fitting = bisect.bisect_right(candidates, limit, key=memory_of)
    return candidates[fitting - 1] if fitting else None


def gigabytes(size: float) -> str:
    """Return a number of bytes in GB (10^9), with three digits."""
    value = size / 1e9
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def device_total(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, or of this machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _tokens(
    config: DictConfig, objective: Objective, data: TokenizedSplit, ranks: int, packing: Optional[Packing]
) -> tuple[int, int, float]:
    """Return, of the train batches: most tokens of a microbatch, most response tokens of one, and the mean tokens of a batch.

    Padding counts; a prompt counts once, or, scored plain (packing is None), once per response.
    """
    most, responses, computed, batches = 0, 0, 0, 0
    for batch, examples in zip(range(-(-EXAMPLES // config.batch_size)), batches_of(config, objective.stages, data)):
        batches, parts = batch + 1, data.parts(examples)
        lengths, counts = parts.sum(-1), parts[:, 1:].sum(-1)  # some may not be in the loss
        longest = (parts[:, :1] + parts[:, 1:]).max(-1)
        cut = config.gradient_accumulation_steps
        if packing is None:
            rounds = cut_into_microbatches(lengths.tolist(), ranks, cut, config.tokens_per_microbatch)
        else:
            rounds = cut_into_rows(lengths.tolist(), ranks, cut, packing, config.tokens_per_microbatch)
        for microbatch in (m for microbatches in rounds for m in microbatches if m):
            if packing is None:
                examples, tokens = microbatch, len(microbatch) * int(np.max(longest[microbatch])) * (parts.shape[1] - 1)
            else:
                examples = [i for row in microbatch for i in row]
                tokens = len(microbatch) * max(int(lengths[row].sum()) for row in microbatch)
            most, responses = max(most, tokens), max(responses, int(counts[examples].sum()))
            computed += tokens
    return most, responses, computed / max(1, batches)
