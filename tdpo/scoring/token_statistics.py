"""Statistics of every response token for evaluation: log-probabilities, entropy and both KL divergences."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional, Union

import torch
from torch import nn

from tdpo.microbatches import Packing, pack
from tdpo.scoring.distributions import chunk_size, pieces
from tdpo.scoring.head import Head
from tdpo.scoring.logps import forward_kl, full_logits, label_logps
from tdpo.scoring.prefix_sharing import SharedPrefixBatch, attention_masks, row_multiple, shared_prefix_batch
from tdpo.scoring.scorer import hidden_states


class TokenStatistics(NamedTuple):
    """Statistics at N response positions, ordered by row, then by response: (N,) each, nats.

    reference_logps, kl and reverse_kl are None without a reference.
    """

    logps: torch.Tensor  # log pi(y_t|s_t)
    entropy: torch.Tensor  # of pi(.|s_t), over the whole vocabulary
    reference_logps: Optional[torch.Tensor]
    kl: Optional[torch.Tensor]  # KL(pi_ref || pi), whose sum over a response is SeqKL
    reverse_kl: Optional[torch.Tensor]  # KL(pi || pi_ref), whose sum over a response drawn from pi estimates the KL of whole responses


@torch.inference_mode()
def token_statistics(
    policy: nn.Module,
    reference: Optional[nn.Module],
    examples: Sequence[tuple],
    fast: Union[bool, Packing],
) -> TokenStatistics:
    """Compute the statistics of every response token, without gradient.

    Args:
        policy: a causal language model of Transformers, on its device.
        reference: likewise; None: no statistics that need a reference.
        examples: prompts with their responses, as for `shared_prefix_batch`.
        fast: True: put the responses of a prompt into one row, which requires that fast_scoring_problem returned None; a Packing: put
            several prompts into a row, which requires that packing_problem did too; False: score each response separately.
    """
    if not fast:
        examples = [alone for example in examples for alone in _one_by_one(*example)]
    lengths = [len(prompt) + sum(len(response) - 1 for response in responses) for prompt, responses, *_ in examples]
    in_rows = pack(lengths, fast) if isinstance(fast, Packing) else [[i] for i in range(len(examples))]
    order, per_row = [i for row in in_rows for i in row], list(map(len, in_rows))
    rows = shared_prefix_batch([examples[i] for i in order], row_multiple(policy.device), per_row).to(policy.device)
    logits_of = [_logits_at(model, rows, fast) for model in (policy, reference) if model is not None]
    parts = []
    for chunk in pieces(0, len(rows.labels), chunk_size(policy.device)):
        labels = rows.labels[chunk]
        log_p, *rest = (logits(chunk).log_softmax(-1) for logits in logits_of)
        log_q = rest[0] if rest else None
        others = (None, None, None) if log_q is None else (label_logps(log_q, labels), forward_kl(log_q, log_p), forward_kl(log_p, log_q))
        parts.append((label_logps(log_p, labels), torch.special.entr(log_p.exp()).sum(-1), *others))
    as_given = sorted(range(len(order)), key=order.__getitem__)  # the place of each example in the batch
    found = (None if values[0] is None else torch.cat(values).split(list(rows.counts)) for values in zip(*parts))
    return TokenStatistics(*(None if each is None else torch.cat([each[place] for place in as_given]) for each in found))


def _one_by_one(prompt, responses, masks=None, _=()) -> list[tuple]:
    """Split an example into one example per response."""
    return [(prompt, [response], masks and [masks[i]]) for i, response in enumerate(responses)]


def _logits_at(model: nn.Module, rows: SharedPrefixBatch, fast: bool) -> Callable[[slice], torch.Tensor]:
    """Return a function from a slice of `rows.states` to the logits at these positions, (C, V), in at least float32."""
    if fast:
        states, head = hidden_states(model, rows, attention_masks(rows, model.config)), Head.of(model)
        return lambda chunk: head.logits(states[chunk])
    stacked = {"concatenated_input_ids": rows.input_ids, "concatenated_attention_mask": (rows.segments >= 0).long()}
    logits = full_logits(model, stacked).flatten(0, 1)
    return lambda chunk: logits[rows.states[chunk]]
