"""Fast scoring: the language-model head and the loss, computed chunk by chunk over positions, with a hand-written gradient.

At a response position with label y let p = pi(.|s) and q = pi_ref(.|s). A loss L depends on log p_y, log q_y and the forward divergence
KL = sum_v q_v (log q_v - log p_v). With g = dL/dlog p_y and h = dL/dKL,

    dL/dlogits_v = g (1[v = y] - p_v) + h (p_v - q_v)

g and h are known once all responses of a row are scored. Rows are therefore processed in groups that fit a chunk: while p and q are in
memory, the objective gives g and h, and the gradients of hidden states and head weight are computed within the forward pass. No logits are
computed twice, and no tensor of size (positions, vocabulary) outlives its chunk. Only a row that is longer than a chunk is recomputed.

Shapes: N response tokens, C positions of a chunk, V vocabulary entries, H hidden size, B examples (one per prompt), R responses each.
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
from tdpo.scoring.logps import sum_dtype
from tdpo.scoring.prefix_sharing import SharedPrefixBatch
from tdpo.utils import full_tensor

# Positions per chunk: enough to keep the device busy. float32 log-probabilities of 512 positions and 50,304 entries take 103 MB.
CHUNK = {"cpu": 512, "cuda": 2048}


def chunk_size(device: torch.device) -> int:
    """Return the number of positions per chunk on a device."""
    return CHUNK.get(device.type, CHUNK["cuda"])


@dataclass(frozen=True)
class Head:
    """A model's output layer: logits = softcap * tanh((states @ weight.T + bias) / softcap)."""

    weight: torch.Tensor  # (V, H)
    bias: Optional[torch.Tensor]  # (V,)
    softcap: Optional[float] = None  # bound of the logits; None: no soft cap
    compiled: bool = False  # use torch.compile for the operations on its logits

    @classmethod
    def of(cls, model: nn.Module, compiled: bool = False) -> "Head":
        """Return the head of a causal language model of Transformers, for which `unsupported_head` must return None."""
        layer = model.get_output_embeddings()
        weight, bias = (None if x is None else full_tensor(x) for x in (layer.weight, layer.bias))  # tensor parallelism shards them
        return cls(weight, bias, getattr(model.config.get_text_config(), "final_logit_softcapping", None), compiled)

    def logits(self, states: torch.Tensor, out: Optional[torch.Tensor] = None, product: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Compute logits in at least float32.

        Args:
            states: (C, H).
            out: (C, V), overwritten with the result (only without autograd); None: a new tensor.
            product: (C, V), overwritten with the matrix product if it has the dtype of the states; it may be `out`.

        Returns:
            (C, V), unnormalised.
        """
        if product is not None and product.dtype == states.dtype:
            weight = self.weight.detach().t()
            torch.mm(states, weight, out=product) if self.bias is None else torch.addmm(self.bias.detach(), states, weight, out=product)
        else:
            product = F.linear(states, self.weight, self.bias)
        # In half precision the product is rounded before the cast, as in the model's own forward pass.
        if out is None:
            out = product.to(torch.promote_types(product.dtype, torch.float32))
        elif product is not out:
            out.copy_(product)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)


class HeadOnly(nn.Module):
    """The head of a model whose hidden states are cached, unsharded on every rank. It replaces the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        head = Head.of(model)
        self.config = model.config
        self.register_buffer("weight", head.weight.detach().clone())
        self.register_buffer("bias", None if head.bias is None else head.bias.detach().clone())

    @classmethod
    def instead_of(cls, model: nn.Module) -> "HeadOnly":
        """Copy the model's head and free the model's memory, even if references to it remain, as FSDP keeps them."""
        head = cls(model)
        for tensor in [*model.parameters(), *model.buffers()]:
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage().resize_(0)
        return head

    def get_output_embeddings(self) -> nn.Module:
        return self


def unsupported_head(model: nn.Module) -> Optional[str]:
    """Return why fast scoring does not support this model's head, as a clause; None if it does."""
    layer = model.get_output_embeddings()
    return None if isinstance(layer, nn.Linear) else f"its head is a {type(layer).__name__}, not a linear layer"


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
    states: torch.Tensor, head: Head, reference: Optional[ReferenceStates], rows: SharedPrefixBatch, objective: Objective
) -> ResponseScores:
    """Compute scores without loss and gradient, for evaluation.

    Args:
        states: (N, H), as in `loss_of_rows`.
        head: the policy's.
        reference: None if the objective needs no reference.
        rows: the batch.
        objective: decides which scores are computed.

    Returns:
        scores, (B, R).
    """
    work = _Workspace(head, states, reference, objective.needs_kl)
    scores = _zero_scores(rows, objective)
    for chunk in pieces(0, len(rows.labels), work.size):
        work.compute(chunk, rows).add_to(scores, rows.responses[chunk])
    return scores


def loss_of_rows(
    states: torch.Tensor, head: Head, reference: Optional[ReferenceStates], rows: SharedPrefixBatch, objective: Objective, counted: int
) -> tuple[torch.Tensor, LossOutput, ResponseScores]:
    """Compute the summed loss of the first `counted` rows, with its gradient, and the output and scores of all rows.

    Args:
        states: (N, H), the policy's hidden states at the positions `rows.states`.
        head: the policy's.
        reference: None if the objective needs no reference.
        rows: the batch.
        objective: a loss whose value for a row depends only on that row.
        counted: number of rows in the loss; the others enter only output and scores.

    Returns:
        (loss, output, scores): the sum of the losses, a float64 scalar in nats that can be differentiated once, with gradient to states,
        weight and bias; the objective's output, (B,), detached; the scores, (B, R), without gradient.
    """
    outputs: list[LossOutput] = []
    arguments = head, reference, rows, objective, counted, outputs
    total, logps, reference_logps, kl = _LossOfRows.apply(states, head.weight, head.bias, *arguments)
    scores = ResponseScores(logps, rows.num_tokens, reference_logps, kl, rows.annotations, rows.baseline)
    return total, LossOutput.concatenate(outputs), scores


class _LossOfRows(torch.autograd.Function):
    """The loss of rows. Forward computes loss and gradients together; backward multiplies the gradients by the incoming scalar."""

    @staticmethod
    def forward(ctx, states, weight, bias, head, reference, rows, objective, counted, outputs):
        ctx.set_materialize_grads(False)
        work = _Workspace(head, states, reference, objective.needs_kl)
        scores = _zero_scores(rows, objective)
        gradients = _Gradients(head, states, ctx.needs_input_grad, work)
        total = torch.zeros((), dtype=scores.logps.dtype, device=states.device)
        for group, chunks in _groups(rows.counts, work.size):
            for chunk in chunks:
                distributions = work.compute(chunk, rows)
                distributions.add_to(scores, rows.responses[chunk])
            value, output, *coefficients = _coefficients(scores, objective, group, counted, work.dtype)
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
            raise RuntimeError("this loss was differentiated already and its gradients are freed; call loss_of_rows again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if x is None else x.mul_(factor) for x in gradients), None, None, None, None, None, None


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


def pieces(start: int, stop: int, size: int) -> list[slice]:
    """Cut range(start, stop) into slices of `size`; the last may be smaller."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


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


@dataclass
class _Distributions:
    """The distributions at the C positions of a chunk. The (C, V) tensors belong to a workspace; the next chunk overwrites them."""

    compiled: bool
    labels: torch.Tensor  # (C,)
    values: tuple  # log p_y, log q_y, KL: (C,) each or None
    logps: torch.Tensor  # (C, V), log p
    reference: Optional[torch.Tensor]  # (C, V), q; None if KL is not needed
    slope: Optional[torch.Tensor]  # (C, V), derivative of the soft-capped logits with respect to the uncapped ones

    def add_to(self, scores: ResponseScores, responses: torch.Tensor) -> None:
        """Add the values of the positions to the scores of their responses, in place.

        Args:
            scores: (B, R), float64.
            responses: (C,), index b * R + r of each position's response.
        """
        for table, values in zip((scores.logps, scores.reference_logps, scores.kl), self.values):
            if table is not None:
                # Not index_add_, which on a GPU adds in any order: equal values would get different sums.
                table.view(-1).index_put_((responses,), values.to(table.dtype), accumulate=True)

    def logit_gradient(self, g: torch.Tensor, h: Optional[torch.Tensor]) -> torch.Tensor:
        """Compute the gradient of the chunk's logits, (C, V), in place of log p.

        Args:
            g: (C,), dL/dlog p_y.
            h: (C,), dL/dKL; None if KL is not needed.
        """
        gradient = _kernel(_logit_gradient, self.compiled)(self.logps, self.reference, self.labels, g, h)
        return gradient if self.slope is None else gradient.mul_(self.slope)


class _Workspace:
    """(C, V) tensors that all chunks of a pass reuse: on a CPU, allocating that much memory costs as much as the arithmetic on it.

    There are three with SeqKL, for log p, log q and q, else one for both models. On a GPU log_softmax needs an output of its own: logits
    are in the tensor into which q is written later, or, without SeqKL, in a second one. `product` is one more, for matrix products: where
    heads compute in half precision, and on a GPU for rows that would begin at odd addresses.
    """

    def __init__(self, head: Head, states: torch.Tensor, reference: Optional[ReferenceStates], needs_kl: bool):
        self.head, self.states, self.reference, self.needs_kl = head, states.detach(), reference, needs_kl
        self.dtype = torch.promote_types(states.dtype, torch.float32)
        self.size = chunk_size(states.device)
        shape = min(self.size, len(states)), head.weight.shape[0]
        self.in_place = states.device.type == "cpu"
        count = 3 if needs_kl else 1 if self.in_place else 2
        self.tables = [torch.empty(shape, dtype=self.dtype, device=states.device) for _ in range(count)]
        own = states.dtype != self.dtype or needs_alignment(shape[1], states.device)
        self.product = _aligned(*shape, states.dtype, states.device) if own else None

    def compute(self, chunk: slice, rows: SharedPrefixBatch) -> _Distributions:
        labels = rows.labels[chunk]
        reference_logps = kl = q = slope = None
        tables = [table[: len(labels)] for table in self.tables]
        compiled = self.head.compiled
        label_logps = _kernel(_label_logps, compiled)
        if self.reference is not None:  # first, because without KL the policy's log-probabilities overwrite its table
            logits = self._logits(self.reference.head, self.reference.states[chunk], tables, tables[-1 if self.needs_kl else 0])
            log_q, reference_logps = label_logps(logits, labels, tables[-1 if self.needs_kl else 0])
        logits = self._logits(self.head, self.states[chunk], tables, tables[0])
        if self.head.softcap is not None:
            slope = 1 - (logits / self.head.softcap) ** 2
        log_p, logps = label_logps(logits, labels, tables[0])
        if self.needs_kl:
            q, kl = _kernel(_forward_kl_in_place, compiled)(log_q, log_p, tables[1])
        return _Distributions(compiled, labels, (logps, reference_logps, kl), log_p, q, slope)

    def _logits(self, head: Head, states: torch.Tensor, tables: Sequence[torch.Tensor], place: torch.Tensor) -> torch.Tensor:
        """Compute logits, (C, V), in the tensor where their log-probabilities will be, or in the one that is free."""
        out = place if self.in_place else tables[1]
        return head.logits(states, out, out if self.product is None else self.product[: len(states)])


def needs_alignment(vocabulary: int, device: torch.device) -> bool:
    """Whether rows of logits that follow each other without a gap are slow in matrix products: cuBLAS multiplies rows that begin at odd
    addresses several times slower, and GPT-2 has 50,257 entries."""
    return device.type != "cpu" and vocabulary % 64 != 0


def _aligned(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised (rows, vocabulary); see `needs_alignment`."""
    width = -(-vocabulary // 64) * 64 if needs_alignment(vocabulary, device) else vocabulary
    return torch.empty(rows, width, dtype=dtype, device=device)[:, :vocabulary]


class _Gradients:
    """The gradients of hidden states, head weight and bias, filled chunk by chunk; None for those that are not needed."""

    def __init__(self, head: Head, states: torch.Tensor, wanted: Sequence[bool], work: _Workspace):
        self.head, self.inputs, self.product, dtype = head, states.detach(), work.product, work.dtype
        self.states = torch.empty_like(states) if wanted[0] else None
        self.weight = torch.zeros(head.weight.shape, dtype=dtype, device=states.device) if wanted[1] else None
        self.bias = torch.zeros(head.bias.shape, dtype=dtype, device=states.device) if head.bias is not None and wanted[2] else None

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


# Operations on logits. All three work in place, because allocation dominates on CPUs; torch.compile fuses each of them into one pass.


def _label_logps(logits: torch.Tensor, labels: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities (C, V), written into `out`, and those of the labels (C,). On a CPU `out` may be the logits themselves."""
    logps = torch.log_softmax(logits, -1, out=out)
    return logps, logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _forward_kl_in_place(log_q: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q (C, V), written into that tensor, and KL(q || p) (C,) in nats: logps.forward_kl in place, overwriting log q."""
    torch.exp(log_q, out=q)
    # Where q is 0 the product may be NaN (0 * inf), with limit 0: nansum drops it. A model's NaN still shows in its logps.
    return q, log_q.sub_(log_p).mul_(q).nansum(-1)


def _logit_gradient(
    log_p: torch.Tensor, q: Optional[torch.Tensor], labels: torch.Tensor, g: torch.Tensor, h: Optional[torch.Tensor]
) -> torch.Tensor:
    """Return g (1[v = y] - p_v) + h (p_v - q_v), (C, V), computed in place of log p."""
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
