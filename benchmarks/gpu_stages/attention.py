"""Stages "attention" and "flex": PyTorch's attention kernels with the masks of prefix sharing, against float64."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_stages.rows import (
    NEEDS_CUDA,
    Measurement,
    Row,
    Sizes,
    Worst,
    attempted,
    distance,
    judged,
    largest,
    skipped,
    unjudged,
)
from benchmarks.gpu_stages.scorers import drawn
from benchmarks.step import synchronize
from tdpo.scoring.prefix_sharing import SharedPrefixBatch, attention_masks, shared_prefix_batch
from tdpo.scoring.probes import LONG, flex_attention_problem

BACKENDS = {
    "default": None,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
NAMES = ("output", "dq", "dk", "dv")
# Of the relative error of a tensor: bfloat16 has 8 bits, and gradients are sums of products rounded twice.
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 2e-2}
TRIAL = "FlexAttention, trial of train.py, head size 64"  # a check
ERRORS = "attention: error to float64"  # the table of measurements
NEGATIVE = 120.0  # logits of about minus this: exp of their logsumexp underflows, where cuDNN's gradients are NaN (pytorch#196678)


class Case(NamedTuple):
    """Inputs of an attention layer on the CPU, with values that bfloat16 can represent, and the float64 results."""

    where: str
    rows: SharedPrefixBatch
    inputs: tuple[torch.Tensor, ...]  # queries (B, Hq, T, D); keys and values (B, Hkv, T, D)
    incoming: torch.Tensor  # (B, Hq, T, D): the gradient of the output
    expected: tuple[torch.Tensor, ...]  # output, and gradients of queries, keys and values


def rows_of(length: int) -> SharedPrefixBatch:
    """Return a batch of two rows; the longer one has `length` tokens."""
    prompt = length // 4
    first = (length - prompt) // 2
    longer = [5] * prompt, [[6] * (first + 1), [7] * (length - prompt - first + 1)]
    return shared_prefix_batch([longer, ([5] * 3, [[6] * 2, [7] * (length // 2)])])


def attend(inputs: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
    """Compute attention as Transformers does where a mask is given: keys and values are repeated for all heads of queries."""
    query, *others = inputs
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in others)
    return F.scaled_dot_product_attention(query, key, value, mask)


def by_hand(inputs: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
    """Compute the same by its definition."""
    query, *others = inputs
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in others)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def forward_backward(function: Callable, inputs: tuple[torch.Tensor, ...], mask, incoming: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return output and gradients of an attention function."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    output = function(leaves, mask)
    return output.detach(), *torch.autograd.grad(output, leaves, incoming)


def case_of(sizes: Sizes, length: int, size: int, negative: bool = False) -> Case:
    """Draw a case. `negative`: all logits are about -NEGATIVE."""
    generator = torch.Generator().manual_seed(length * size)
    rows, (heads, shared) = rows_of(length), sizes.heads
    shape = len(rows.counts), heads, rows.input_ids.shape[1], size
    query, key, value, incoming = (
        torch.randn(shape[0], n, *shape[2:], generator=generator).bfloat16().float() for n in (heads, shared, shared, heads)
    )
    if negative:
        far = (NEGATIVE / size**0.5) ** 0.5
        query, key = (0.1 * query + far).bfloat16().float(), (0.1 * key - far).bfloat16().float()
    inputs = query, key, value
    wide = tuple(x.double() for x in inputs)
    expected = forward_backward(by_hand, wide, rows.visible()[:, None], incoming.double())
    return Case(f"T {shape[2]}, head size {size}", rows, inputs, incoming, expected)


def on_device(case: Case, device: torch.device, dtype: torch.dtype) -> tuple:
    """Return a case's inputs, mask and incoming gradient on the device."""
    mask = case.rows.to(device).visible()[:, None]
    length = mask.shape[-1]  # a GPU's rows may be longer by some padding
    inputs = tuple(F.pad(x, (0, 0, 0, length - x.shape[2])).to(device, dtype) for x in (*case.inputs, case.incoming))
    return inputs[:3], mask, inputs[3]


def kernel(name: str):
    """Return a context in which that backend is used."""
    return nullcontext() if BACKENDS[name] is None else sdpa_kernel(BACKENDS[name])


def compared(name: str, cases: list[Case], far: list[Case], device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Compare a backend with float64. cuDNN, which the project does not use, is measured and not judged."""
    kind, worst, parts = str(dtype).removeprefix("torch."), Worst(), dict.fromkeys(NAMES, 0.0)
    with kernel(name):
        for case in cases:
            found = forward_backward(attend, *on_device(case, device, dtype))
            for part, value, expected in zip(NAMES, found, case.expected):
                error = distance(value[:, :, : expected.shape[2]], expected)
                worst.add(error, f"{case.where}, {part}")
                parts[part] = largest([parts[part], error])
        finite = [all(x.isfinite().all() for x in forward_backward(attend, *on_device(case, device, dtype))) for case in far]
    bad = [case.where for case, good in zip(far, finite) if not good]
    numbers = {part: f"{error:.1e}" for part, error in parts.items()}
    yield Measurement(ERRORS, {"backend": name, "dtype": kind, **numbers, "not finite, logits -120": len(bad)})
    if name != "cudnn":
        yield worst.check(f"{name}, {kind}, as float64", TOLERANCES[dtype])
        yield judged(f"{name}, {kind}, finite gradients of logits near -120", not bad, "; ".join(bad[:3]) or f"{len(far)} cases")


def plans(name: str, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Time the first and the second pass at lengths that were not seen before: a backend may plan for each of them."""
    times: list[tuple[float, float]] = []
    with kernel(name):
        for length in [sizes.lengths[-1] + i for i in (3, 9, 17)]:
            case = on_device(case_of(sizes, length, sizes.head_sizes[0]), device, torch.bfloat16)
            pair = []
            for _ in range(2):
                synchronize(device)
                started = time.perf_counter()
                forward_backward(attend, *case)
                synchronize(device)
                pair.append(1e3 * (time.perf_counter() - started))
            times.append((pair[0], pair[1]))
    first, second = (statistics.median(column) for column in zip(*times[1:]))  # the first length also loads kernels
    yield Measurement("attention: new length", {"backend": name, "first pass, ms": round(first, 2), "second, ms": round(second, 2)})
    if name == "default" and device.type == "cuda":
        yield judged("default: a new length costs no plan", first - second < 50, f"{first:.1f} ms, then {second:.1f}")


def chosen(case: Case, device: torch.device) -> str:
    """Return the backend that PyTorch takes by default for a bfloat16 case."""
    (query, *others), mask, _ = on_device(case, device, torch.bfloat16)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in others)
    return SDPBackend(torch._fused_sdp_choice(query, key, value, mask)).name.lower()


def same_without_grad(case: Case, device: torch.device) -> bool:
    """Whether the default backend's output has the same bits with and without gradient, as policy and reference compute it."""
    inputs, mask, incoming = on_device(case, device, torch.bfloat16)
    with torch.inference_mode():
        alone = attend(inputs, mask)
    return torch.equal(alone, forward_backward(attend, inputs, mask, incoming)[0])


def usable(name: str, dtype: torch.dtype, device: torch.device) -> Optional[str]:
    """Return why a backend is not tried, or None."""
    if device.type != "cuda" and name not in ("default", "math"):
        return NEEDS_CUDA
    return "takes half precision alone" if name == "cudnn" and dtype == torch.float32 else None


def stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Compare every backend with float64 at all lengths and head sizes, and time what the default does at a new length."""
    cases = [case_of(sizes, length, size) for length in sizes.lengths for size in sizes.head_sizes]
    far = [case_of(sizes, length, size, negative=True) for length in sizes.lengths for size in sizes.head_sizes[:2]]
    takes = sorted({chosen(case, device) for case in cases})
    yield judged("default is not cuDNN's", "cudnn_attention" not in takes, ", ".join(takes))
    different = [case.where for case in cases if not same_without_grad(case, device)]
    yield judged("default has the same bits with and without gradient", not different, "; ".join(different[:3]) or f"{len(cases)} cases")
    for name in BACKENDS:
        if name == "cudnn":  # it plans for every shape: 7 and 5 take few cases, of all head sizes and of lengths of both kinds
            yield from unjudged(ERRORS, "backend", backend_rows(name, cases[::7], far[::5], sizes, device))
        else:
            yield from backend_rows(name, cases, far, sizes, device)


def backend_rows(name: str, cases: list[Case], far: list[Case], sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Compare a backend in every dtype, and time it at new lengths."""
    for dtype in TOLERANCES:
        label = f"{name}, {str(dtype).removeprefix('torch.')}"
        if reason := usable(name, dtype, device):
            yield skipped(label, reason)
        else:
            yield from attempted(label, partial(compared, name, cases, far, device, dtype))
    if not usable(name, torch.bfloat16, device):
        yield from attempted(f"{name}, new lengths", partial(plans, name, sizes, device))


def flex_stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Compare FlexAttention under the project's block mask with float64: output, and on a GPU gradients; and make the trial of train.py."""
    from torch.nn.attention.flex_attention import flex_attention  # here, because that takes a second

    cuda = device.type == "cuda"
    compiled = torch.compile(flex_attention, dynamic=True) if cuda else flex_attention  # without the compiler it has no gradient
    config = transformers.GPTNeoXConfig(attn_implementation="flex_attention")
    dtype = torch.bfloat16 if cuda else torch.float32

    def attend_blocks(inputs: tuple[torch.Tensor, ...], mask) -> torch.Tensor:
        return compiled(*inputs, block_mask=mask, enable_gqa=True)

    def rows(size: int) -> Iterator[Row]:
        if cuda:
            torch._dynamo.reset()  # else the sizes of heads count towards one limit of compiled forms
        worst = Worst()
        for length in sizes.flex_lengths:
            case = case_of(sizes, length, size)
            inputs, _, incoming = on_device(case, device, dtype)
            mask = attention_masks(case.rows.to(device), config)
            with torch.set_grad_enabled(cuda):
                found = forward_backward(attend_blocks, inputs, mask, incoming) if cuda else (attend_blocks(inputs, mask),)
            for part, value, expected in zip(NAMES, found, case.expected):
                worst.add(distance(value[:, :, : expected.shape[2]], expected), f"{case.where}, {part}")
        yield worst.check(f"FlexAttention, head size {size}, as float64", TOLERANCES[dtype])

    for size in sizes.flex_head_sizes:
        yield from attempted(f"FlexAttention, head size {size}", lambda size=size: rows(size))
    if cuda:
        yield from attempted(TRIAL, lambda: trial(device))
    else:
        yield from map(skipped, ("FlexAttention, gradients", TRIAL))


def trial(device: torch.device) -> Iterator[Row]:
    """Test the kernel as train.py does before it chooses FlexAttention: with the heads of the model, in the dtype of its weights."""
    torch._dynamo.reset()
    torch.backends.cuda.matmul.allow_tf32 = True  # as in train.py
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    scorer = drawn(transformers.LlamaConfig(vocab_size=61, max_position_embeddings=LONG, **sizes)).to(device, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        problem = flex_attention_problem(scorer, LONG, dtype)
        yield judged(f"{TRIAL}, {dtype}", problem is None, problem or "")
