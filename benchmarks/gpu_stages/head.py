"""Stage "head": the chunked head and loss against float64 on the CPU, and the zeros and equalities that training relies on."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.gpu_stages.rows import Row, Sizes, Worst, attempted, distance, judged, skipped
from tdpo.losses import get_objective, tdpo_loss
from tdpo.scoring.chunked_loss import ReferenceStates, loss_of_rows, score_rows
from tdpo.scoring.distributions import chunk_size
from tdpo.scoring.head import Head
from tdpo.scoring.prefix_sharing import SharedPrefixBatch, shared_prefix_batch

BETA, ALPHA = 0.1, 0.5
# By way: dtype, whether TF32 is on, tolerance of each relative error. A bfloat16 logit has 8 bits, a TF32 one 11.
WAYS = {
    "float64": (torch.float64, False, 1e-9),
    "float32": (torch.float32, False, 1e-5),
    "float32 with TF32": (torch.float32, True, 5e-3),
    "bfloat16": (torch.bfloat16, False, 4e-2),
}


class Inputs(NamedTuple):
    """Hidden states and weights of policy and reference on the CPU, in float64, with values that bfloat16 can represent."""

    rows: SharedPrefixBatch
    states: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    reference_states: torch.Tensor
    reference_weight: torch.Tensor


class Found(NamedTuple):
    """What is compared."""

    loss: torch.Tensor
    logps: torch.Tensor  # (B, 2)
    kl: torch.Tensor  # (B, 2)
    states: torch.Tensor  # gradients
    weight: torch.Tensor


def inputs_of(sizes: Sizes, vocabulary: int) -> Inputs:
    """Draw inputs for a vocabulary."""
    generator = torch.Generator().manual_seed(vocabulary)

    def tokens(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    rows = shared_prefix_batch([(tokens(4), [tokens(a), tokens(b)]) for a, b in sizes.responses])
    drawn = [torch.randn(n, sizes.hidden, generator=generator) for n in (len(rows.labels), vocabulary) * 2]
    scales = 1.0, sizes.hidden**-0.5, 0.3, 0.3 * sizes.hidden**-0.5
    states, weight, more_states, more_weight = (x * scale for x, scale in zip(drawn, scales))
    return Inputs(rows, *(x.bfloat16().double() for x in (states, weight, states + more_states, weight + more_weight)))


def by_definition(inputs: Inputs) -> Found:
    """Compute TDPO2 from whole tables of log-probabilities, row by row because of their size."""
    weight = inputs.weight.clone().requires_grad_()
    states = inputs.states.clone().requires_grad_()
    total, sums, start = torch.zeros((), dtype=torch.float64), [], 0
    for row, count in enumerate(inputs.rows.counts):
        own = slice(start, start + count)
        start += count
        logps = F.log_softmax(states[own] @ weight.t(), -1)
        reference = F.log_softmax(inputs.reference_states[own] @ inputs.reference_weight.t(), -1)
        kl = (reference.exp() * (reference - logps)).sum(-1)
        labels = inputs.rows.labels[own, None]
        label_logps, reference_label_logps = logps.gather(1, labels)[:, 0], reference.gather(1, labels)[:, 0]
        sides = [inputs.rows.responses[own] == 2 * row + i for i in range(2)]
        margins, kls = zip(*(((label_logps - reference_label_logps)[side].sum()[None], kl[side].sum()[None]) for side in sides))
        loss = tdpo_loss(*margins, *kls, beta=BETA, alpha=ALPHA)[0].sum()
        loss.backward()  # frees this row's tables
        total += loss.detach()
        sums.append([torch.stack([x[side].sum().detach() for side in sides]) for x in (label_logps, kl)])
    return Found(total, *(torch.stack(column) for column in zip(*sums)), states.grad, weight.grad)


def poison(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> None:
    """Fill memory that will be reused with NaN, which shows in the result where a buffer is read before it is written."""
    shape = min(chunk_size(device), len(inputs.states)), len(inputs.weight)
    tables = [torch.full(shape, torch.nan, device=device, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(3)]
    del tables


def by_chunks(inputs: Inputs, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> Found:
    """Compute the same with `loss_of_rows`."""
    states, weight, *others = (x.to(device, dtype) for x in inputs[1:])
    states, weight = (x.detach().requires_grad_() for x in (states, weight))  # detached, because float64 on the CPU is no copy
    poison(inputs, device, dtype)
    reference = ReferenceStates(others[0], Head(others[1], None, compiled=compiled))
    rows, objective = inputs.rows.to(device), get_objective("tdpo2", beta=BETA, alpha=ALPHA)
    loss, _, scores = loss_of_rows(states, Head(weight, None, compiled=compiled), reference, rows, objective, len(rows.counts))
    loss.backward()
    return Found(loss.detach(), scores.logps, scores.kl, states.grad, weight.grad)


def scores_alone(inputs: Inputs, device: torch.device, dtype: torch.dtype, own_reference: bool = False):
    """Compute the scores with `score_rows`; `own_reference`: the policy is also the reference."""
    states, weight, *others = (x.to(device, dtype) for x in inputs[1:])
    reference = ReferenceStates(states, Head(weight, None)) if own_reference else ReferenceStates(others[0], Head(others[1], None))
    return score_rows(states, Head(weight, None), reference, inputs.rows.to(device), get_objective("tdpo2", beta=BETA, alpha=ALPHA))


def compared(name: str, inputs: Inputs, expected: Found, device: torch.device) -> Iterator[Row]:
    """Compare one way of computing with float64, with itself, and policy with an equal reference."""
    dtype, tf32, tolerance = WAYS[name]
    torch.backends.cuda.matmul.allow_tf32 = tf32
    label, worst, found = f"V {len(inputs.weight):,}, {name}", Worst(), by_chunks(inputs, device, dtype)
    for part, value, correct in zip(Found._fields, found, expected):
        worst.add(distance(value, correct), part)
    scores = scores_alone(inputs, device, dtype)
    worst.add(distance(scores.logps, expected.logps), "logps of score_rows")
    worst.add(distance(scores.kl, expected.kl), "kl of score_rows")
    yield worst.check(f"{label}: as float64", tolerance)
    again = [by_chunks(inputs, device, dtype) for _ in range(4)]
    changed = {part for run in again for part, a, b in zip(Found._fields, found, run) if not torch.equal(a, b)}
    yield judged(f"{label}: five runs are equal", not changed, ", ".join(sorted(changed)))
    same = scores_alone(inputs, device, dtype, own_reference=True)
    apart = (same.logps - same.reference_logps).abs().max().item(), same.kl.abs().max().item()
    yield judged(f"{label}: 0 for an equal reference", apart == (0, 0), f"log-ratio {apart[0]:.1e}, KL {apart[1]:.1e}")


def compiled_rows(inputs: Inputs, device: torch.device) -> Iterator[Row]:
    """Compare the compiled operations on logits with the others."""
    worst = Worst()
    for name in ("float32", "bfloat16"):
        eager, compiled = (by_chunks(inputs, device, WAYS[name][0], compiled=each) for each in (False, True))
        for part, value, correct in zip(Found._fields, compiled, eager):
            worst.add(distance(value, correct), f"{name}, {part}")
    yield worst.check(f"V {len(inputs.weight):,}: compiled as eager", 5e-3)


def rows_of(vocabulary: int, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Compare all ways at one vocabulary."""
    inputs = inputs_of(sizes, vocabulary)
    expected = by_definition(inputs)
    for name, (_, tf32, _) in WAYS.items():
        if tf32 and device.type != "cuda":
            yield skipped(f"V {vocabulary:,}, {name}")
        else:
            yield from attempted(f"V {vocabulary:,}, {name}", partial(compared, name, inputs, expected, device))
    if vocabulary == sizes.vocabularies[-1]:
        name = f"V {vocabulary:,}: compiled"
        yield from attempted(name, partial(compiled_rows, inputs, device)) if device.type == "cuda" else [skipped(name)]


def stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Compare all ways at all vocabularies."""
    for vocabulary in sizes.vocabularies:
        yield from rows_of(vocabulary, sizes, device)
