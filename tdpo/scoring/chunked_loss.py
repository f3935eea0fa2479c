"""The language-model head and all that has the vocabulary's size, a few hundred positions at a time, with the gradient by hand.

At a response position with label y let p = pi(.|s), q = pi_ref(.|s). What a loss L needs of it are log p_y, log q_y and the forward
divergence sum_v q_v (log q_v - log p_v). With g = dL/dlog p_y and h = dL/dKL,

    dL/dlogits_v = g (1[v = y] - p_v) + h (p_v - q_v)

g and h are known once a row's responses are whole. Rows are therefore taken a few at a time: the objective is asked for their g and h
while p and q are still there, and both gradients, of hidden states and of the head's weight, are finished in the forward pass. So no
logits are computed twice, and nothing of size (positions, vocabulary) outlives its chunk. Only a row longer than a chunk is computed again.

Shapes: N response tokens, C positions of a chunk, V vocabulary entries, H hidden, B rows, R responses a row.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from tdpo.losses import LossOutput, Objective, ResponseScores
from tdpo.scoring.prefix_sharing import SharedPrefixBatch
from tdpo.utils import full_tensor

# Positions of a chunk, by device: enough to keep its matrix units busy. float32 log-probabilities of 512 over 50,304 entries take 103 MB.
CHUNK = {"cpu": 512, "cuda": 2048}


def chunk_size(device: torch.device) -> int:
    """Positions of a chunk on a device."""
    return CHUNK.get(device.type, CHUNK["cuda"])


@dataclass(frozen=True)
class Head:
    """A model's last layer: softcap * tanh((states @ weight.T + bias) / softcap)."""

    weight: torch.Tensor  # (V, H)
    bias: Optional[torch.Tensor]  # (V,)
    softcap: Optional[float] = None  # nats; None: logits as they are
    compiled: bool = False  # what is done to its logits

    @classmethod
    def of(cls, model: nn.Module, compiled: bool = False) -> "Head":
        """Of a causal language model of Transformers, for which `unsupported_head` is None."""
        layer = model.get_output_embeddings()
        weight, bias = (None if x is None else full_tensor(x) for x in (layer.weight, layer.bias))  # tensor parallelism splits them
        return cls(weight, bias, getattr(model.config.get_text_config(), "final_logit_softcapping", None), compiled)

    def logits(self, states: torch.Tensor, out: Optional[torch.Tensor] = None) -> torch.Tensor:
        """(C, H) to (C, V), in float32 at least; into `out`, where given."""
        if out is not None and out.dtype == states.dtype:
            weight = self.weight.detach().t()
            torch.mm(states, weight, out=out) if self.bias is None else torch.addmm(self.bias.detach(), states, weight, out=out)
        else:  # in half precision the product is rounded first, as a model's own forward pass does
            logits = F.linear(states, self.weight, self.bias)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            out = logits.to(dtype) if out is None else out.copy_(logits)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)


class HeadOnly(nn.Module):
    """What stays of a model whose hidden states are known: its head, whole on every rank."""

    def __init__(self, model: nn.Module):
        super().__init__()
        head = Head.of(model)
        self.config = model.config
        self.register_buffer("weight", head.weight.detach().clone())
        self.register_buffer("bias", None if head.bias is None else head.bias.detach().clone())

    @classmethod
    def instead_of(cls, model: nn.Module) -> "HeadOnly":
        """Frees the model's memory, also where others hold on to it: FSDP knows of all it has ever sharded."""
        head = cls(model)
        for tensor in [*model.parameters(), *model.buffers()]:
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage().resize_(0)
        return head

    def get_output_embeddings(self) -> nn.Module:
        return self


def unsupported_head(model: nn.Module) -> Optional[str]:
    """Why this model's head cannot be computed here; None where nothing is known against it."""
    layer = model.get_output_embeddings()
    return None if isinstance(layer, nn.Linear) else f"its head is a {type(layer).__name__}, no linear layer"


@dataclass(frozen=True)
class ReferenceStates:
    """What the reference has to say about the same rows."""

    states: torch.Tensor  # (N, H)
    head: Head


def _zero_scores(rows: SharedPrefixBatch, objective: Objective, dtype: torch.dtype) -> ResponseScores:
    """Scores of all rows, (B, R), to be summed into; None where the objective needs none."""

    def zeros(needed: bool) -> Optional[torch.Tensor]:
        return torch.zeros(rows.num_tokens.shape, dtype=dtype, device=rows.labels.device) if needed else None

    sums = zeros(True), rows.num_tokens, zeros(objective.needs_reference), zeros(objective.needs_kl)
    return ResponseScores(*sums, rows.annotations, rows.baseline)


@torch.no_grad()
def score_rows(
    states: torch.Tensor, head: Head, reference: Optional[ReferenceStates], rows: SharedPrefixBatch, objective: Objective
) -> ResponseScores:
    """Compute scores alone, (B, R), for evaluation. Arguments as those of `loss_of_rows`."""
    work = _Workspace(head, states, reference, objective.needs_kl)
    scores = _zero_scores(rows, objective, work.dtype)
    for chunk in pieces(0, len(rows.labels), work.size):
        work.compute(chunk, rows).add_to(scores, rows.responses[chunk])
    return scores


def loss_of_rows(
    states: torch.Tensor, head: Head, reference: Optional[ReferenceStates], rows: SharedPrefixBatch, objective: Objective, counted: int
) -> tuple[torch.Tensor, LossOutput, ResponseScores]:
    """Compute the sum of the losses of the first `counted` rows, with its gradient, and what was computed of all rows.

    Args:
        states: (N, H), the policy's hidden states that `rows.states` names.
        head: the policy's.
        reference: None where the objective needs none.
        rows: tokens and where they belong.
        objective: a loss whose value for a row depends on that row alone.
        counted: rows.

    Returns:
        a scalar in nats that can be differentiated once; the objective's output, (B,), detached; and the scores, (B, R), detached.
    """
    outputs: list[LossOutput] = []
    arguments = head, reference, rows, objective, counted, outputs
    total, logps, reference_logps, kl = _LossOfRows.apply(states, head.weight, head.bias, *arguments)
    scores = ResponseScores(logps, rows.num_tokens, reference_logps, kl, rows.annotations, rows.baseline)
    return total, LossOutput.concatenate(outputs), scores


class _LossOfRows(torch.autograd.Function):
    """Value and gradients together, see above; backward only multiplies by what comes from above, a scalar."""

    @staticmethod
    def forward(ctx, states, weight, bias, head, reference, rows, objective, counted, outputs):
        ctx.set_materialize_grads(False)
        work = _Workspace(head, states, reference, objective.needs_kl)
        scores = _zero_scores(rows, objective, work.dtype)
        gradients = _Gradients(head, states, ctx.needs_input_grad, work.dtype)
        total = torch.zeros((), dtype=work.dtype, device=states.device)
        for group, chunks in _groups(rows.counts, work.size):
            for chunk in chunks:
                distributions = work.compute(chunk, rows)
                distributions.add_to(scores, rows.responses[chunk])
            value, output, *coefficients = _coefficients(scores, objective, group, counted)
            total += value
            outputs.append(output)
            for chunk in chunks:
                if len(chunks) > 1:
                    distributions = work.compute(chunk, rows)
                own = rows.responses[chunk] - group.start * len(objective.roles)
                gradients.add(chunk, distributions.logit_gradient(*(x if x is None else x.flatten()[own] for x in coefficients)))
        ctx.gradients = gradients.states, gradients.weight, gradients.bias
        ctx.mark_non_differentiable(*(x for x in (scores.logps, scores.reference_logps, scores.kl) if x is not None))
        return total, scores.logps, scores.reference_logps, scores.kl

    @staticmethod
    def backward(ctx, factor, *_):
        if ctx.gradients is None:
            raise RuntimeError("the loss of these rows was differentiated already: its gradients are gone")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if x is None else x.mul_(factor) for x in gradients), None, None, None, None, None, None


def _coefficients(scores: ResponseScores, objective: Objective, group: slice, counted: int) -> tuple:
    """Evaluate the objective on some rows: the sum of the counted losses, all output, and derivatives by logps and kl, (rows, R) each."""
    logps, reference_logps, kl = (None if x is None else x[group].clone() for x in (scores.logps, scores.reference_logps, scores.kl))
    inputs = [x.requires_grad_() for x in (logps, kl) if x is not None]
    annotation = None if scores.annotation is None else scores.annotation[group]
    own = ResponseScores(logps, scores.num_tokens[group], reference_logps, kl, annotation, scores.baseline)
    with torch.enable_grad():
        output = objective(own.by_role(objective.roles))
        total = output.losses[: max(0, counted - group.start)].sum()
    g, h = (*torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True), None)[:2]
    return total.detach(), output.detach(), g, h


def pieces(start: int, stop: int, size: int) -> list[slice]:
    """As few slices of at most `size` as there can be."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _groups(counts: Sequence[int], size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows that are scored together, and their positions in chunks: as many rows as fit a chunk, or one row that takes several."""
    row = start = 0
    while row < len(counts):
        first, stop = row, start + counts[row]
        row += 1
        while row < len(counts) and stop + counts[row] - start <= size:
            stop, row = stop + counts[row], row + 1
        yield slice(first, row), pieces(start, stop, size)
        start = stop


@dataclass
class _Distributions:
    """Of the C positions of a chunk. The (C, V) tensors are a workspace's: the next chunk overwrites them."""

    compiled: bool
    labels: torch.Tensor  # (C,)
    values: tuple  # log p_y, log q_y, KL: (C,) each or None
    logps: torch.Tensor  # (C, V), log p
    reference: Optional[torch.Tensor]  # (C, V), q; None where no KL is asked for
    slope: Optional[torch.Tensor]  # (C, V), derivative of soft-capped logits by uncapped ones

    def add_to(self, scores: ResponseScores, responses: torch.Tensor) -> None:
        """Sums over each response's positions; `responses` (C,) says whose they are."""
        for table, values in zip((scores.logps, scores.reference_logps, scores.kl), self.values):
            if table is not None:
                table.view(-1).index_add_(0, responses, values)

    def logit_gradient(self, g: torch.Tensor, h: Optional[torch.Tensor]) -> torch.Tensor:
        """(C, V), in place of log p; g and h are (C,)."""
        gradient = _kernel(_logit_gradient, self.compiled)(self.logps, self.reference, self.labels, g, h)
        return gradient if self.slope is None else gradient.mul_(self.slope)


class _Workspace:
    """(C, V) tensors that all chunks of a pass use in turn: on a CPU fresh memory of that size costs as much as the arithmetic on it."""

    def __init__(self, head: Head, states: torch.Tensor, reference: Optional[ReferenceStates], needs_kl: bool):
        self.head, self.states, self.reference, self.needs_kl = head, states.detach(), reference, needs_kl
        self.dtype = torch.promote_types(states.dtype, torch.float32)
        self.size = chunk_size(states.device)
        shape = min(self.size, len(states)), head.weight.shape[0]
        self.buffers = [torch.empty(shape, dtype=self.dtype, device=states.device) for _ in range(3 if needs_kl else 1)]

    def compute(self, chunk: slice, rows: SharedPrefixBatch) -> _Distributions:
        labels = rows.labels[chunk]
        reference_logps = kl = q = slope = None
        buffers = [buffer[: len(labels)] for buffer in self.buffers]
        compiled = self.head.compiled
        label_logps = _kernel(_label_logps, compiled)
        if self.reference is not None:  # first, because without KL the policy's log-probabilities take its place
            log_q, reference_logps = label_logps(self.reference.head.logits(self.reference.states[chunk], out=buffers[-1]), labels)
        logits = self.head.logits(self.states[chunk], out=buffers[0])
        if self.head.softcap is not None:
            slope = 1 - (logits / self.head.softcap) ** 2
        log_p, logps = label_logps(logits, labels)
        if self.needs_kl:
            q, kl = _kernel(_forward_kl_in_place, compiled)(log_q, log_p, buffers[1])
        return _Distributions(compiled, labels, (logps, reference_logps, kl), log_p, q, slope)


class _Gradients:
    """Of hidden states, weight and bias, summed over chunks; None where not asked for."""

    def __init__(self, head: Head, states: torch.Tensor, wanted: Sequence[bool], dtype: torch.dtype):
        self.head, self.inputs = head, states.detach()
        self.states = torch.empty_like(states) if wanted[0] else None
        self.weight = torch.zeros(head.weight.shape, dtype=dtype, device=states.device) if wanted[1] else None
        self.bias = torch.zeros(head.bias.shape, dtype=dtype, device=states.device) if head.bias is not None and wanted[2] else None

    def add(self, chunk: slice, logits: torch.Tensor) -> None:
        """`logits`: gradient of the chunk's logits, (C, V)."""
        if self.bias is not None:
            self.bias += logits.sum(0)
        logits = logits.to(self.inputs.dtype)
        if self.states is not None:
            torch.mm(logits, self.head.weight.detach(), out=self.states[chunk])
        if self.weight is None:
            return
        if logits.dtype == self.weight.dtype:
            self.weight.addmm_(logits.t(), self.inputs[chunk])
        else:
            self.weight += logits.t() @ self.inputs[chunk]


# What is done to logits. All three work in place, because on a CPU new memory is dear; compiled, each is one pass.


def _label_logps(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (C, V), in place, and those of the labels (C,)."""
    # Not promised to work in place elsewhere; a copy onto itself is none.
    logps = logits.copy_(torch.log_softmax(logits, -1, out=logits if logits.device.type == "cpu" else None))
    return logps, logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _forward_kl_in_place(log_q: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q (C, V), written into that tensor, and KL(q || p) of each position (C,), in nats: logps.forward_kl, in place of log q."""
    torch.exp(log_q, out=q)
    # Where q is 0 the product may be 0 * inf; its limit is 0. A NaN of a model shows in its logps.
    return q, log_q.sub_(log_p).mul_(q).nansum(-1)


def _logit_gradient(
    log_p: torch.Tensor, q: Optional[torch.Tensor], labels: torch.Tensor, g: torch.Tensor, h: Optional[torch.Tensor]
) -> torch.Tensor:
    """g (1[v = y] - p_v) + h (p_v - q_v), (C, V), in place of log p."""
    gradient = log_p.exp_()
    if h is None:
        gradient.mul_(-g[:, None])
    else:
        gradient.mul_((h - g)[:, None]).addcmul_(q, h[:, None], value=-1)
    gradient[torch.arange(len(g), device=g.device), labels] += g
    return gradient


@functools.cache
def _kernel(function, compiled: bool):
    return torch.compile(function, dynamic=True) if compiled else function
