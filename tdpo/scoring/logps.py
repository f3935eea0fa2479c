"""Plain scoring, the specification: log-probabilities and SeqKL of responses from full logits, as published.

Fast scoring, by which most runs train, computes the same numbers chunk by chunk in chunked_loss.py.

Shapes: B sequences, T tokens, V vocabulary entries, N response tokens of the batch.
"""

from collections.abc import Mapping

import torch
from torch import nn

from tdpo.utils import IGNORED, pad_to_length


def stack_roles(batch: Mapping[str, torch.Tensor], roles: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The roles' tensors below each other, padded to the longest, as concatenated_{input_ids,attention_mask,labels}."""
    length = max(batch[f"{role}_input_ids"].shape[1] for role in roles)
    stacked = {}
    for kind, pad_value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
        tensors = [pad_to_length(batch[f"{role}_{kind}"], length, pad_value) for role in roles]
        stacked[f"concatenated_{kind}"] = torch.cat(tensors)
    return stacked


def concatenated_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Chosen and rejected inputs below each other, (2B, T), under keys `concatenated_*`: the published signature."""
    return stack_roles(batch, ("chosen", "rejected"))


def full_logits(model: nn.Module, stacked: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, V), in float32 at least: log-softmax over a vocabulary in half precision loses the small differences we train on."""
    logits = model(
        input_ids=stacked["concatenated_input_ids"], attention_mask=stacked["concatenated_attention_mask"], use_cache=False
    ).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _get_batch_logps(logits: torch.Tensor, labels: torch.Tensor, average_log_prob: bool = False) -> torch.Tensor:
    """Sum (or mean) over each sequence's response tokens of log pi(y_t|s_t), nats.

    Args:
        logits: (B, T, V), unnormalised; position t predicts token t + 1.
        labels: (B, T); tokens labelled -100 are no response tokens, and what the logits hold there does not matter.
        average_log_prob: mean per response token.

    Returns:
        (B,)
    """
    positions = _ResponsePositions(logits, labels)
    logps = positions.select(logits).log_softmax(-1)
    return positions.reduce(positions.of_label(logps), average_log_prob)


def _tdpo_get_batch_logps(
    logits: torch.Tensor, reference_logits: torch.Tensor, labels: torch.Tensor, average_log_prob: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What TDPO needs of each response: log-ratio, SeqKL and log-probability, summed (or averaged) over its tokens, nats.

    Args:
        logits: the policy's, (B, T, V).
        reference_logits: (B, T, V).
        labels: (B, T), as in _get_batch_logps.
        average_log_prob: means per response token.

    Returns:
        (log-ratio, SeqKL, log-probability), each (B,)
    """
    positions = _ResponsePositions(logits, labels)
    logps = positions.select(logits).log_softmax(-1)
    reference_logps = positions.select(reference_logits).log_softmax(-1)
    token_logps = positions.of_label(logps)
    margin = token_logps - positions.of_label(reference_logps)
    per_position_kl = forward_kl(reference_logps, logps)
    return tuple(positions.reduce(values, average_log_prob) for values in (margin, per_position_kl, token_logps))


def forward_kl(reference_logps: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """KL(pi_ref || pi) of each position, nats: (..., V) log-probabilities to (...).

    The published code takes the log of a softmax, which is 0 * -inf = NaN for an entry that underflows. Here both are log-softmaxes,
    and an entry whose reference probability is 0 contributes its limit, 0, also where both log-probabilities are -inf.
    """
    probabilities = reference_logps.exp()
    differences = torch.where(probabilities > 0, reference_logps - logps, 0.0)
    return (probabilities * differences).sum(-1)


class _ResponsePositions:
    """The positions of a batch whose logits predict a response token.

    Selecting them, instead of multiplying by a mask, keeps a NaN of another position out of the sum and out of the gradient, and
    makes nothing of the vocabulary's size for prompt and padding.
    """

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor):
        if logits.shape[:-1] != labels.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not belong together")
        targets = labels[:, 1:]  # position t predicts token t + 1
        self.mask = (targets != IGNORED).to(logits.device)
        rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
        self.labels = targets[rows, columns].to(logits.device)  # (N,)
        self.index = rows.to(logits.device), columns.to(logits.device)

    def select(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, T, V) to (N, V)."""
        return logits[self.index]

    def of_label(self, logps: torch.Tensor) -> torch.Tensor:
        """(N, V) to (N,): the log-probability of each response token."""
        return label_logps(logps, self.labels)

    def reduce(self, values: torch.Tensor, average: bool) -> torch.Tensor:
        """(N,) to (B,): the sum, or the mean, of each row's values."""
        table = values.new_zeros(self.mask.shape).index_put(self.index, values)
        return table.sum(-1) / self.mask.sum(-1) if average else table.sum(-1)


def label_logps(logps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(..., V) to (...): the log-probability of each label."""
    return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
