"""Stages "scorers" and "compile": small models of every family, scored fast and plain, against float64 on the CPU, and compiled."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple, Optional

import torch
import transformers
from torch import nn

from benchmarks.gpu_stages.rows import Measurement, Row, Sizes, Worst, attempted, distance, judged, limit_graphs
from benchmarks.step import Pair, collated, width_of
from tdpo.distributed.sharding import find_blocks
from tdpo.losses import get_objective
from tdpo.scoring.mixed_precision import cast_parameters
from tdpo.scoring.prefix_sharing import row_multiple, shared_prefix_batch
from tdpo.scoring.probes import check_predictions, fast_scoring_problem, packing_problem
from tdpo.scoring.scorer import Scorer
from tdpo.utils import disable_dropout

VOCABULARY = 61
LENGTHS = ((5, 6, 3), (1, 1, 7), (9, 1, 1), (3, 14, 8), (2, 40, 31))  # of prompt, chosen and rejected
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 128}
SHARED = {**SIZES, "num_key_value_heads": 2}
OLDER = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
FAMILIES = {
    "gpt2": OLDER,
    "gptj": {**OLDER, "rotary_dim": 8},
    "gpt_neox": SIZES,
    "llama": SHARED,
    "mistral": {**SHARED, "sliding_window": 4},
    "qwen3": {**SHARED, "head_dim": 16},
    "gemma2": {**SHARED, "head_dim": 16, "sliding_window": 4},
}
COMPILED = "gpt_neox"  # the family whose blocks are compiled


class Step(NamedTuple):
    """Loss and gradients of a batch."""

    loss: torch.Tensor
    gradient: torch.Tensor  # of all parameters, in one vector


def config_of(family: str, **more) -> transformers.PreTrainedConfig:
    """Return a small config of a model type."""
    return transformers.AutoConfig.for_model(family, vocab_size=VOCABULARY, **FAMILIES[family], **more)


def drawn(config: transformers.PreTrainedConfig) -> Scorer:
    """Return a scorer of TDPO2 on the CPU in float64, with random weights; the reference is the policy plus noise."""
    torch.manual_seed(0)
    policy = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    disable_dropout(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # logits that differ, as of a trained model
        reference = copy.deepcopy(policy)
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return Scorer(policy, reference, get_objective("tdpo2", beta=0.1, alpha=0.5))


def drawn_pairs(lengths=LENGTHS) -> list[Pair]:
    """Return pairs of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [tuple_of([torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in row]) for row in lengths]


def tuple_of(parts: list[list[int]]) -> Pair:
    return parts[0], parts[1:]


def step_of(scorer: Scorer, pairs: list[Pair], device: torch.device, way: str, dtype: Optional[torch.dtype] = None) -> Step:
    """Compute loss and gradients of pairs.

    Args:
        way: fast (one pair a row), packed (all pairs in two rows) or plain.
        dtype: in which the policy computes, if not in its own.
    """
    scorer.zero_grad(set_to_none=True)
    if way != "plain":
        half = len(pairs) // 2
        batch = shared_prefix_batch(pairs, row_multiple(device), [half, len(pairs) - half] if way == "packed" else None).to(device)
    else:
        batch = {k: v if k.endswith("_labels") else v.to(device) for k, v in collated(pairs, width_of(pairs)).items()}
    with nullcontext() if dtype is None else cast_parameters(scorer.policy, dtype):
        scored = scorer(batch)
        scored.loss.backward()
    return Step(scored.loss.detach(), torch.cat([p.grad.flatten() for p in scorer.policy.parameters() if p.grad is not None]))


def compared(family: str, device: torch.device) -> Iterator[Row]:
    """Compare a family's fast and plain scoring, in float32 and bfloat16, with plain scoring in float64 on the CPU; in float32 if the
    family has attention of its own ("eager"), which adds the lowest float64 to masked scores and takes their softmax in float32: NaN."""
    wide, pairs, ways = drawn(config_of(family)), drawn_pairs(), ("fast", "packed", "plain")
    if wide.policy.config._attn_implementation == "eager":
        wide.to(torch.float32)
    exact = str(wide.policy.dtype).removeprefix("torch.")
    expected = step_of(wide, pairs, torch.device("cpu"), "plain")
    scorer = copy.deepcopy(wide).to(device, torch.float32)
    worst = Worst()
    for way in ways:
        found = step_of(scorer, pairs, device, way)
        for part, value, correct in zip(Step._fields, found, expected):
            worst.add(distance(value, correct), f"{way}, {part}")
    yield worst.check(f"{family}: float32 as {exact} on the CPU", 1e-4)
    with torch.no_grad():
        problem = fast_scoring_problem(scorer, 64)
        problem = problem or packing_problem(scorer, 64)
        check_predictions(scorer, 64)
    yield judged(f"{family}: the trials accept fast scoring and packed rows", problem is None, problem or "")
    scorer.reference.to(torch.bfloat16)
    worst = Worst()
    for way in ways:
        found = step_of(scorer, pairs, device, way, torch.bfloat16)
        for part, value, correct in zip(Step._fields, found, expected):
            worst.add(distance(value, correct), f"{way}, {part}")
    yield worst.check(f"{family}: bfloat16 as {exact} on the CPU", 5e-2)  # of differences of two sums of rounded log-probabilities


def stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Compare all families."""
    for family in sizes.families:
        yield from attempted(family, lambda family=family: compared(family, device))


def checkpointed(policy: nn.Module) -> None:
    """Recompute the blocks' activations in the backward pass, as `activation_checkpointing=true` does."""
    enable = getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)  # Transformers 5.23's name
    enable({"use_reentrant": False})
    for module in policy.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # of this module alone, because only training modules are checkpointed


def compiled(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Compare compiled, checkpointed blocks with others: one and several rows, lengths of both kinds modulo 8, in training and in eval."""
    backend = "inductor" if device.type == "cuda" else "eager"  # the compiler for CPUs takes minutes
    shapes = LENGTHS, LENGTHS[:1], ((8, 5, 5), (8, 5, 5)), ((8, 5, 5),), LENGTHS[1:4]
    batches = [drawn_pairs(lengths) for lengths in shapes[: sizes.shapes]]
    eager = drawn(config_of(COMPILED)).to(device, torch.float32)
    scorer = copy.deepcopy(eager)
    checkpointed(scorer.policy)
    limit_graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in [block for model in (scorer.policy, scorer.reference) for block in find_blocks(model, None)]:
        block.compile(dynamic=True, backend=backend)
    worst = Worst()
    for i, pairs in enumerate(batches):
        for part, value, correct in zip(Step._fields, *(step_of(each, pairs, device, "fast") for each in (scorer, eager))):
            worst.add(distance(value, correct), f"batch {i}, {part}")
        with torch.no_grad():
            rows = shared_prefix_batch(pairs, row_multiple(device)).to(device)
            worst.add(distance(scorer(rows).loss, eager(rows).loss), f"batch {i}, eval")
    name = f"compiled by {backend}, checkpointed"
    yield worst.check(f"{name}: as eager", 1e-3 if device.type == "cuda" else 1e-5)
    counters = torch._dynamo.utils.counters
    values = {"graphs": counters["stats"]["unique_graphs"], "graph breaks": sum(counters["graph_break"].values())}
    yield Measurement("compiled graphs", {"what": name, **values})
    yield judged(f"{name}: no graph breaks", not values["graph breaks"], "; ".join(counters["graph_break"])[:100])


def compile_stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Compile a model's blocks, with activation checkpointing, and count graphs. A fallback to eager fails."""
    yield from attempted("compiled, checkpointed", lambda: compiled(sizes, device))
