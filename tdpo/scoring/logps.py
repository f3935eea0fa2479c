"""Plain scoring, the readable specification: log-probabilities and SeqKL of responses from full logits, as published.

Most runs train with fast scoring, which computes the same numbers chunk by chunk (chunked_loss.py).

Shapes: B sequences of T tokens, padding included; V vocabulary entries; N response tokens in the loss. Log-probabilities and KL
are in nats. s_t = (x, y_<t) is what precedes response token y_t. Roles are the responses of an example, such as "chosen" and "rejected".
"""

from collections.abc import Mapping

import torch
from torch import nn

from tdpo.utils import IGNORED, pad_to_length, to_device


def stack_roles(batch: Mapping[str, torch.Tensor], roles: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Concatenate the sequences of several roles along the batch dimension, padded on the right to the longest one.

    Args:
        batch: `<role>_{input_ids,attention_mask,labels}`, each (n, t), where t may differ between roles.
        roles: their names, in order: ("chosen", "rejected").

    Returns:
        `concatenated_{input_ids,attention_mask,labels}`, each (B, T): B is the sum of the n, T the largest t. Padding is 0;
            of labels, -100.
    """
    length = max(batch[f"{role}_input_ids"].shape[1] for role in roles)
    stacked = {}
    for kind, pad_value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
        tensors = [pad_to_length(batch[f"{role}_{kind}"], length, pad_value) for role in roles]
        stacked[f"concatenated_{kind}"] = torch.cat(tensors)
    return stacked


def concatenated_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Concatenate the chosen and rejected sequences of n pairs; the published signature of `stack_roles`.

    Args:
        batch: `{chosen,rejected}_{input_ids,attention_mask,labels}`, each (n, t).

    Returns:
        `concatenated_{input_ids,attention_mask,labels}`, each (2n, T), T the longest sequence, chosen first.
    """
    return stack_roles(batch, ("chosen", "rejected"))


def full_logits(model: nn.Module, stacked: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Run a model and return its logits in at least float32.

    A log-softmax over the vocabulary in half precision would lose the small differences that the losses train on.

    Args:
        model: a causal language model of Transformers.
        stacked: `concatenated_input_ids` and `concatenated_attention_mask`, each (B, T), see `stack_roles`.

    Returns:
        (B, T, V), unnormalised. Position t predicts token t + 1.
    """
    logits = model(
        input_ids=stacked["concatenated_input_ids"], attention_mask=stacked["concatenated_attention_mask"], use_cache=False
    ).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _get_batch_logps(logits: torch.Tensor, labels: torch.Tensor, average_log_prob: bool = False) -> torch.Tensor:
    """Sum (or average) log pi(y_t|s_t) over the response tokens of each sequence.

    Args:
        logits: (B, T, V), unnormalised. Position t predicts token t + 1.
        labels: (B, T): the token ids, or -100 for tokens that are not in the loss. Logits that predict such tokens are ignored, even if
            they are NaN; so is the first label, which no logits predict.
        average_log_prob: return the mean per response token instead of the sum; NaN for a response without tokens in the loss.

    Returns:
        (B,), nats, float64 (see `sum_dtype`).

    Raises:
        ValueError: the shapes of logits and labels do not match.
    """
    positions = _ResponsePositions(logits, labels)
    logps = positions.select(logits).log_softmax(-1)
    return positions.reduce(positions.of_label(logps), average_log_prob)


def _tdpo_get_batch_logps(
    logits: torch.Tensor, reference_logits: torch.Tensor, labels: torch.Tensor, average_log_prob: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute what TDPO needs of each response: log-ratio, SeqKL and log-probability, summed (or averaged) over the response tokens.

    Args:
        logits: (B, T, V), the policy's, unnormalised.
        reference_logits: (B, T, V), the reference's, unnormalised.
        labels: (B, T), as in `_get_batch_logps`.
        average_log_prob: return means per response token instead of sums.

    Returns:
        (log-ratio, SeqKL, log-probability), each (B,), nats, float64 (see `sum_dtype`): the sums of log pi(y_t|s_t) - log pi_ref(y_t|s_t),
        of KL(pi_ref(.|s_t) || pi(.|s_t)), and of log pi(y_t|s_t). Gradients flow to both logits.

    Raises:
        ValueError: the shapes of logits, reference_logits and labels do not match.
    """
    if reference_logits.shape != logits.shape:
        raise ValueError(f"reference_logits {tuple(reference_logits.shape)} and logits {tuple(logits.shape)} have different shapes")
    positions = _ResponsePositions(logits, labels)
    logps = positions.select(logits).log_softmax(-1)
    reference_logps = positions.select(reference_logits).log_softmax(-1)
    token_logps = positions.of_label(logps)
    log_ratio = widened(token_logps) - widened(positions.of_label(reference_logps))
    per_position_kl = forward_kl(reference_logps, logps)
    return tuple(positions.reduce(values, average_log_prob) for values in (log_ratio, per_position_kl, token_logps))


def forward_kl(reference_logps: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """Compute KL(pi_ref || pi) of each position.

    The published code takes the log of a softmax, which gives 0 * -inf = NaN if an entry underflows. Here both inputs are log-softmaxes,
    and an entry whose reference probability is 0 contributes its limit, 0, even if both log-probabilities are -inf.

    Args:
        reference_logps: (..., V), normalised log-probabilities of the reference.
        logps: (..., V), normalised log-probabilities of the policy.

    Returns:
        (...), nats, with gradient to both inputs.
    """
    probabilities = reference_logps.exp()
    differences = torch.where(probabilities > 0, reference_logps - logps, 0.0)
    return (probabilities * differences).sum(-1)


class _ResponsePositions:
    """The N positions of a batch whose logits predict a response token.

    They are selected, not multiplied by a mask: NaN at another position then reaches neither the sum nor the gradient, and prompt and
    padding need no log-softmax over the vocabulary.

    Args:
        logits: (B, T, V); only shape and device are used.
        labels: (B, T), -100 for tokens that are not in the loss; on any device.
    """

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor):
        if logits.shape[:-1] != labels.shape:
            raise ValueError(f"logits {tuple(logits.shape)} do not match labels {tuple(labels.shape)}: pass (B, T, V) and (B, T)")
        targets = labels[:, 1:]  # position t predicts token t + 1
        mask = targets != IGNORED
        index = mask.nonzero(as_tuple=True)
        found = mask, targets[index], *index
        self.mask, self.labels, *self.index = (to_device(x, logits.device) for x in found)

    def select(self, logits: torch.Tensor) -> torch.Tensor:
        """Select the N positions.

        Args:
            logits: (B, T, V); returns (N, V).
        """
        return logits[tuple(self.index)]

    def of_label(self, logps: torch.Tensor) -> torch.Tensor:
        """Pick the log-probability of each response token.

        Args:
            logps: (N, V); returns (N,).
        """
        return label_logps(logps, self.labels)

    def reduce(self, values: torch.Tensor, average: bool) -> torch.Tensor:
        """Sum (or average) the values of each sequence, in float64.

        Args:
            values: (N,); returns (B,).
            average: return the mean per response token.
        """
        values = widened(values)
        table = values.new_zeros(self.mask.shape).index_put(tuple(self.index), values)
        return table.sum(-1) / self.mask.sum(-1) if average else table.sum(-1)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over a response: float64, or float32 on a device that lacks it (Apple's).

    A log-ratio is a small difference of two sums of hundreds of nats. In float32 their rounding, which depends on the processor, was more
    than 1e-4 of some rewards.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def widened(values: torch.Tensor) -> torch.Tensor:
    """Return values of tokens in the dtype in which they are summed over a response, see `sum_dtype`."""
    return values.to(torch.promote_types(values.dtype, sum_dtype(values.device)))


def label_logps(logps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Pick the log-probability of each label.

    Args:
        logps: (..., V), log-probabilities.
        labels: (...), token ids; no -100.

    Returns:
        (...), nats.
    """
    return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
