"""Fast scoring: the language-model head and the loss, computed chunk by chunk over positions, with a hand-written gradient.

At a response position with label y let p = pi(.|s) and q = pi_ref(.|s). A loss L depends on log p_y, log q_y and the forward divergence
KL = sum_v q_v (log q_v - log p_v). With g = dL/dlog p_y and h = dL/dKL,

    dL/dlogits_v = g (1[v = y] - p_v) + h (p_v - q_v)

g and h are known once all responses of a row are scored. Rows are therefore processed in groups that fit a chunk: while p and q are in
memory, the objective gives g and h, and the gradients of hidden states and head weight are computed within the forward pass. No logits are
computed twice, and no tensor of size (positions, vocabulary) outlives its chunk. Only a row that is longer than a chunk is recomputed.

Shapes: N response tokens, C positions of a chunk, V vocabulary entries, H hidden size, B examples (one per prompt), R responses each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from tdpo.losses import LossOutput, Objective, ResponseScores
from tdpo.scoring.distributions import Distributions, Tables, Workspace, pieces
from tdpo.scoring.head import Head
from tdpo.scoring.logps import sum_dtype
from tdpo.scoring.prefix_sharing import SharedPrefixBatch


@dataclass(frozen=True)
class ReferenceStates:
    """The reference's hidden states for a batch, and its head."""

    states: torch.Tensor  # (N, H)
    head: Head


def _zero_scores(rows: SharedPrefixBatch, objective: Objective) -> ResponseScores:
    """Return scores (B, R) of zeros, to be summed into in float64; reference_logps and kl are None if the objective does not need them."""
    dtype = sum_dtype(rows.labels.device)

    def zeros(needed: bool) -> Optional[torch.Tensor]:
        return torch.zeros(rows.num_tokens.shape, dtype=dtype, device=rows.labels.device) if needed else None

    sums = zeros(True), rows.num_tokens, zeros(objective.needs_reference), zeros(objective.needs_kl)
    return ResponseScores(*sums, rows.annotations, rows.baseline)


@torch.no_grad()
def score_rows(
    states: torch.Tensor,
    head: Head,
    reference: Optional[ReferenceStates],
    rows: SharedPrefixBatch,
    objective: Objective,
    tables: Optional[Tables] = None,
) -> ResponseScores:
    """Compute scores without loss and gradient, for evaluation.

    Args:
        states: (N, H), as in `loss_of_rows`.
        head: the policy's.
        reference: None if the objective needs no reference.
        rows: the batch.
        objective: decides which scores are computed.
        tables: memory of earlier calls to use again; None: new memory.

    Returns:
        scores, (B, R).
    """
    chunks = _Chunks(states, head, reference, rows, objective, tables)
    scores = _zero_scores(rows, objective)
    for chunk in pieces(0, len(rows.labels), chunks.work.size):
        chunks.compute(chunk).add_to(scores, rows.responses[chunk])
    return scores


def loss_of_rows(
    states: torch.Tensor,
    head: Head,
    reference: Optional[ReferenceStates],
    rows: SharedPrefixBatch,
    objective: Objective,
    counted: int,
    tables: Optional[Tables] = None,
) -> tuple[torch.Tensor, LossOutput, ResponseScores]:
    """Compute the summed loss of the first `counted` rows, with its gradient, and the output and scores of all rows.

    Args:
        states: (N, H), the policy's hidden states at the positions `rows.states`.
        head: the policy's.
        reference: None if the objective needs no reference.
        rows: the batch.
        objective: a loss whose value for a row depends only on that row.
        counted: number of rows in the loss; the others enter only output and scores.
        tables: memory of earlier calls to use again; None: new memory.

    Returns:
        (loss, output, scores): the sum of the losses, a float64 scalar in nats that can be differentiated once, with gradient to states,
        weight and bias; the objective's output, (B,), detached; the scores, (B, R), without gradient.
    """
    outputs: list[LossOutput] = []
    chunks = _Chunks(states, head, reference, rows, objective, tables)
    arguments = chunks, rows, objective, counted, outputs
    total, logps, reference_logps, kl = _LossOfRows.apply(states, head.weight, head.bias, *arguments)
    scores = ResponseScores(logps, rows.num_tokens, reference_logps, kl, rows.annotations, rows.baseline)
    return total, LossOutput.concatenate(outputs), scores


class _LossOfRows(torch.autograd.Function):
    """The loss of rows. Forward computes loss and gradients together; backward multiplies the gradients by the incoming scalar."""

    @staticmethod
    def forward(ctx, states, weight, bias, chunks, rows, objective, counted, outputs):
        ctx.set_materialize_grads(False)
        scores = _zero_scores(rows, objective)
        gradients = _Gradients(chunks, ctx.needs_input_grad)
        total = torch.zeros((), dtype=scores.logps.dtype, device=states.device)
        for group, positions in _groups(rows.counts, chunks.work.size):
            for chunk in positions:
                distributions = chunks.compute(chunk)
                distributions.add_to(scores, rows.responses[chunk])
            value, output, *coefficients = _coefficients(scores, objective, group, counted, chunks.work.dtype)
            total += value
            outputs.append(output)
            for chunk in positions:
                if len(positions) > 1:
                    distributions = chunks.compute(chunk)
                own = rows.responses[chunk] - group.start * len(objective.roles)
                gradients.add(chunk, distributions.logit_gradient(*(x if x is None else x.flatten()[own] for x in coefficients)))
        ctx.gradients = gradients.whole()
        ctx.mark_non_differentiable(*(x for x in (scores.logps, scores.reference_logps, scores.kl) if x is not None))
        return total, scores.logps, scores.reference_logps, scores.kl

    @staticmethod
    def backward(ctx, factor, *_):
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated already and its gradients are freed; call loss_of_rows again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if x is None else x.mul_(factor) for x in gradients), None, None, None, None, None


def _coefficients(scores: ResponseScores, objective: Objective, group: slice, counted: int, dtype: torch.dtype) -> tuple:
    """Evaluate the objective on a group of rows. Returns (sum of the counted losses, output, dL/dlogps, dL/dkl), derivatives (rows, R) of
    that dtype."""
    logps, reference_logps, kl = (None if x is None else x[group].clone() for x in (scores.logps, scores.reference_logps, scores.kl))
    inputs = [x.requires_grad_() for x in (logps, kl) if x is not None]
    annotation = None if scores.annotation is None else scores.annotation[group]
    own = ResponseScores(logps, scores.num_tokens[group], reference_logps, kl, annotation, scores.baseline)
    with torch.enable_grad():
        output = objective(own.by_role(objective.roles))
        total = output.losses[: max(0, counted - group.start)].sum()
    derivatives = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    g, h = (*(x.to(dtype) for x in derivatives), None)[:2]
    return total.detach(), output.detach(), g, h


def _groups(counts: Sequence[int], size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield groups of rows with the chunks of their positions: as many rows as fit one chunk, or one row that needs several chunks."""
    row = start = 0
    while row < len(counts):
        first, stop = row, start + counts[row]
        row += 1
        while row < len(counts) and stop + counts[row] - start <= size:
            stop, row = stop + counts[row], row + 1
        yield slice(first, row), pieces(start, stop, size)
        start = stop


class _Chunks:
    """The chunks of a batch, with the memory for one of them. For the arguments see `loss_of_rows`."""

    def __init__(
        self,
        states: torch.Tensor,
        head: Head,
        reference: Optional[ReferenceStates],
        rows: SharedPrefixBatch,
        objective: Objective,
        tables: Optional[Tables],
    ):
        self.states, self.head, self.reference, self.labels = states.detach(), head, reference, rows.labels
        reference_head = None if reference is None else reference.head.split_as(head)
        self.work = Workspace(head, states, reference_head, objective.needs_kl, tables or Tables())

    def compute(self, chunk: slice) -> Distributions:
        return self.work.compute(self.states[chunk], None if self.reference is None else self.reference.states[chunk], self.labels[chunk])


class _Gradients:
    """The gradients of hidden states, head weight and bias, filled chunk by chunk; None for those that are not needed."""

    def __init__(self, chunks: _Chunks, wanted: Sequence[bool]):
        self.head, self.inputs, self.product, dtype = chunks.head, chunks.states, chunks.work.product, chunks.work.dtype
        weight, bias = self.head.weight, self.head.bias
        self.states = torch.empty_like(self.inputs) if wanted[0] else None
        self.weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wanted[1] else None
        self.bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if bias is not None and wanted[2] else None

    def whole(self) -> tuple[Optional[torch.Tensor], ...]:
        """Return the gradients of states, weight and bias. Those of the states are summed over the parts of the vocabulary."""
        if self.states is not None and self.head.part is not None:
            self.head.part.sum(self.states)
        return self.states, self.weight, self.bias

    def add(self, chunk: slice, logits: torch.Tensor) -> None:
        """Add the contribution of a chunk.

        Args:
            chunk: its positions.
            logits: (C, V), the gradient of its logits.
        """
        if self.bias is not None:
            self.bias += logits.sum(0)
        if self.product is not None:
            logits = self.product[: len(logits)].copy_(logits)
        if self.states is not None:
            torch.mm(logits, self.head.weight.detach(), out=self.states[chunk])
        if self.weight is None:
            return
        if logits.dtype == self.weight.dtype:
            self.weight.addmm_(logits.t(), self.inputs[chunk])
        else:
            self.weight += logits.t() @ self.inputs[chunk]
