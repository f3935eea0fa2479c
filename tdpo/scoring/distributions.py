"""The distributions of policy and reference over the vocabulary at the positions of a chunk: log-probabilities, KL, gradient of logits.

Shapes: C positions of a chunk, V vocabulary entries (under tensor parallelism those of this rank).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from tdpo.losses import ResponseScores
from tdpo.scoring.head import Head, VocabularyPart

# Positions per chunk: enough to keep the device busy. float32 log-probabilities of 512 positions and 50,304 entries take 103 MB.
CHUNK = {"cpu": 512, "cuda": 2048}
# Numbers of a table on which a CPU works at a time: what one operation has written is in its caches for the next one.
BLOCK = 2**22


def chunk_size(device: torch.device) -> int:
    """Return the number of positions per chunk on a device."""
    return CHUNK.get(device.type, CHUNK["cuda"])


def pieces(start: int, stop: int, size: int) -> list[slice]:
    """Cut range(start, stop) into slices of `size`; the last may be smaller."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def needs_alignment(vocabulary: int, device: torch.device) -> bool:
    """Whether rows of logits that follow each other without a gap are slow in matrix products: cuBLAS multiplies rows that begin at odd
    addresses several times slower, and GPT-2 has 50,257 entries."""
    return device.type != "cpu" and vocabulary % 64 != 0


class Tables:
    """Memory for (C, V) tensors. On a CPU it is kept: the system clears new memory page by page, which costs a tenth of a small model's
    step. A GPU's memory is PyTorch's own to reuse."""

    def __init__(self):
        self._kept: dict[tuple, torch.Tensor] = {}

    def take(self, key: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an uninitialised (rows, columns).

        Args:
            key: on a CPU, the same memory is given for the same key, so that the tensor given before must no longer be used.
        """
        if device.type != "cpu":
            return torch.empty(rows, columns, dtype=dtype, device=device)
        kept = self._kept.get((key, dtype))
        if kept is None or kept.numel() < rows * columns:
            with torch.inference_mode(False):  # memory first taken in inference mode could not be written outside it
                self._kept[key, dtype] = kept = torch.empty(rows * columns, dtype=dtype)
        return kept[: rows * columns].view(rows, columns)


@dataclass
class Distributions:
    """The distributions at the C positions of a chunk. The (C, V) tensors belong to a workspace; the next chunk overwrites them."""

    work: "Workspace"
    places: torch.Tensor  # (C,), of the labels in the rows below
    held: Optional[torch.Tensor]  # (C,), whether this rank holds the label's logit; None: it holds all logits
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
        at_label = g if self.held is None else g * self.held
        kernel = self.work.kernel(_logit_gradient)
        for block in self.work.blocks(len(g)):
            own = (None if x is None else x[block] for x in (self.logps, self.reference, self.places, g, h, at_label))
            kernel(*own)
        return self.logps if self.slope is None else self.logps.mul_(self.slope)


class Workspace:
    """(C, V) tensors that all chunks of a pass reuse: on a CPU, allocating that much memory costs as much as the arithmetic on it.

    There is one for each model with SeqKL, else one for both, and one for intermediate results: on a CPU for those of a block, on a GPU,
    where log_softmax needs an output of its own, for logits. `product` is one more, for matrix products: where heads compute in half
    precision, and on a GPU for rows that would begin at odd addresses.

    Args:
        head: the policy's.
        states: (N, H), the policy's hidden states.
        reference: its head, as the policy's split over ranks; None: no reference.
        needs_kl: compute KL and the reference's probabilities.
        tables: memory for the tensors.
    """

    def __init__(self, head: Head, states: torch.Tensor, reference: Optional[Head], needs_kl: bool, tables: Tables):
        self.head, self.reference, self.needs_kl = head, reference, needs_kl
        device, vocabulary = states.device, head.weight.shape[0]
        self.dtype = torch.promote_types(states.dtype, torch.float32)
        self.size = chunk_size(device)
        self.on_cpu = device.type == "cpu"
        rows = min(self.size, len(states))
        self.block = max(1, BLOCK // vocabulary) if self.on_cpu and not head.compiled else self.size
        take = functools.partial(tables.take, device=device)
        self.tables = [take(f"model {i}", rows, vocabulary, self.dtype) for i in range(1 + needs_kl)]
        scratch = min(self.block, rows) if self.on_cpu else rows
        self.scratch = take("scratch", scratch, vocabulary, self.dtype) if needs_kl or not self.on_cpu else None
        self.product = None
        if states.dtype != self.dtype or needs_alignment(vocabulary, device):
            width = -(-vocabulary // 64) * 64 if needs_alignment(vocabulary, device) else vocabulary
            self.product = take("product", rows, width, states.dtype)[:, :vocabulary]

    def compute(self, states: torch.Tensor, reference_states: Optional[torch.Tensor], labels: torch.Tensor) -> Distributions:
        """Compute the distributions of a chunk.

        Args:
            states, reference_states: (C, H).
            labels: (C,).
        """
        part, tables = self.head.part, [table[: len(labels)] for table in self.tables]
        places, held = (labels, None) if part is None else part.places(labels)
        reference_logps = kl = log_q = slope = None
        if reference_states is not None:  # first, because without KL the policy's log-probabilities overwrite its table
            log_q, reference_logps = self._log_softmax(self._logits(self.reference, reference_states, tables[-1]), tables[-1], places)
        logits = self._logits(self.head, states, tables[0])
        if self.head.softcap is not None:
            slope = 1 - (logits / self.head.softcap) ** 2
        log_p, logps = self._log_softmax(logits, tables[0], places)
        if self.needs_kl:
            kl = self._forward_kl(log_q, log_p)
        values = logps, reference_logps, kl
        if part is not None:
            values = self._summed(part, held, values)
        return Distributions(self, places, held, values, log_p, log_q if self.needs_kl else None, slope)

    def blocks(self, positions: int) -> list[slice]:
        """Return the parts of a chunk to work on one after another."""
        return pieces(0, positions, self.block)

    def kernel(self, function):
        """Return an operation on logits, compiled if the head asks for it."""
        return _compiled(function) if self.head.compiled else function

    def _logits(self, head: Head, states: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Compute logits, (C, V), in the tensor where their log-probabilities will be, or in the one that is free."""
        out = place if self.on_cpu else self.scratch[: len(states)]
        return head.logits(states, out, out if self.product is None else self.product[: len(states)])

    def _log_softmax(self, logits: torch.Tensor, out: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities (C, V), written into `out`, and those of the labels (C,)."""
        if self.head.part is not None:
            logps = torch.sub(logits, self.head.part.logsumexp(logits)[:, None], out=out)
            return logps, logps.gather(-1, places.unsqueeze(-1)).squeeze(-1)
        kernel = self.kernel(_label_logps)
        return out, _joined([kernel(logits[block], places[block], out[block]) for block in self.blocks(len(places))])

    def _forward_kl(self, log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """Return KL(q || p), (C,), in nats, and overwrite log q by q."""
        kernel, blocks = self.kernel(_forward_kl_in_place), self.blocks(len(log_q))
        return _joined([kernel(log_q[block], log_p[block], self.scratch[: block.stop - block.start]) for block in blocks])

    @staticmethod
    def _summed(part: VocabularyPart, held: torch.Tensor, values: Sequence[Optional[torch.Tensor]]) -> tuple:
        """Return log-probabilities of labels and KL of the whole vocabulary, from those of its parts."""
        *of_labels, kl = values
        own = [None if x is None else torch.where(held, x, 0.0) for x in of_labels] + [kl]
        sums = iter(part.sum(torch.stack([x for x in own if x is not None])))
        return tuple(None if x is None else next(sums) for x in own)


def _joined(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else torch.cat(values)


# Operations on logits. All three work in place, because allocation dominates on CPUs; torch.compile fuses each of them into one pass.


def _label_logps(logits: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the labels (C,), and write all of them into `out`, which on a CPU may be the logits themselves."""
    return torch.log_softmax(logits, -1, out=out).gather(-1, places.unsqueeze(-1)).squeeze(-1)


def _forward_kl_in_place(log_q: torch.Tensor, log_p: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Return KL(q || p) (C,) in nats, as logps.forward_kl, and overwrite log q by q."""
    differences = torch.sub(log_q, log_p, out=scratch)
    # Where q is 0 the product may be NaN (0 * inf), with limit 0: nansum drops it. A model's NaN still shows in its logps.
    return differences.mul_(log_q.exp_()).nansum(-1)


def _logit_gradient(
    log_p: torch.Tensor, q: Optional[torch.Tensor], places: torch.Tensor, g: torch.Tensor, h: Optional[torch.Tensor], at_label: torch.Tensor
) -> None:
    """Compute g (1[v = y] - p_v) + h (p_v - q_v), (C, V), in place of log p. `at_label` is g, or 0 where the label's logit is elsewhere."""
    gradient = log_p.exp_()
    if h is None:
        gradient.mul_(-g[:, None])
    else:
        gradient.mul_((h - g)[:, None]).addcmul_(q, h[:, None], value=-1)
    gradient[torch.arange(len(g), device=g.device), places] += at_label


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=True)
