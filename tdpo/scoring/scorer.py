"""Scoring: from policy, reference and a batch of tokens to ResponseScores and the loss.

`Scorer` computes them in one of two ways, with the same results up to rounding:

- plain, for a collated batch: the readable specification (logps.py). The roles are padded into one batch; policy and reference compute
  full logits.
- fast, for a SharedPrefixBatch (prefix_sharing.py, chunked_loss.py): each prompt is computed once, the head only at response positions, and
  no tensor of size (positions, vocabulary) outlives its chunk.

Shapes: B examples, R roles, T tokens, V vocabulary entries, N response tokens of the batch, H hidden size.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Optional, Union

import torch
from torch import nn

from tdpo.losses import LossOutput, Objective, ResponseScores
from tdpo.scoring.chunked_loss import ReferenceStates, loss_of_rows, score_rows
from tdpo.scoring.distributions import Tables
from tdpo.scoring.head import Head
from tdpo.scoring.logps import _get_batch_logps, _tdpo_get_batch_logps, full_logits, label_logps, stack_roles
from tdpo.scoring.prefix_sharing import SharedPrefixBatch, attention_masks, row_multiple, shared_prefix_batch
from tdpo.utils import IGNORED, to_device


class Scored(NamedTuple):
    """The output of a Scorer."""

    loss: torch.Tensor  # sum of the counted examples' losses, a scalar, nats; the only field with gradient
    output: LossOutput  # of all examples, detached
    scores: dict[str, ResponseScores]  # by role, detached


class Scorer(nn.Module):
    """Policy and reference in one module, which returns scores and the loss of a batch.

    The loss is computed here because fast scoring needs its derivatives while the distributions are still in memory.

    Args:
        policy: a causal language model of Transformers.
        reference: likewise; it is frozen here. None if `objective.needs_reference` is false.
        objective: the loss, which decides which roles and scores are computed.
        compiled: use torch.compile for fast scoring's operations on logits.
    """

    def __init__(self, policy: nn.Module, reference: Optional[nn.Module], objective: Objective, compiled: bool = False):
        super().__init__()
        self.policy, self.reference, self.objective, self.compiled = policy, reference, objective, compiled
        self.tables = Tables()
        if reference is not None:
            reference.eval().requires_grad_(False)

    def forward(self, batch: Union[SharedPrefixBatch, Mapping[str, torch.Tensor]], counted: Optional[int] = None) -> Scored:
        """Compute scores and loss of a batch.

        Args:
            batch: for fast scoring a SharedPrefixBatch. For plain scoring the collate function's output:
                `<role>_{input_ids,attention_mask,labels}`, each (B, T), and, if the objective needs them, `<role>_annotation` (a list of B
                numbers) and `baseline` (a scalar). Labels may stay on the CPU: finding the response tokens then does not wait for the
                device.
            counted: only the losses of the first `counted` examples are summed; None: all.

        Returns:
            Scored: loss a scalar; output and scores (B,) per role.
        """
        return (self._fast if isinstance(batch, SharedPrefixBatch) else self._plain)(batch, counted)

    def _plain(self, batch: Mapping[str, torch.Tensor], counted: Optional[int]) -> Scored:
        scores = plain_scores(self.policy, self.reference, self.objective, batch)
        output = self.objective(scores)
        return Scored(output.losses[:counted].sum(), output.detach(), {role: score.detach() for role, score in scores.items()})

    def _fast(self, rows: SharedPrefixBatch, counted: Optional[int]) -> Scored:
        masks = attention_masks(rows, self.policy.config)
        with _gathered(self.reference):
            # Before the policy, whose activations are not in memory yet.
            reference = self._reference(rows, masks) if self.objective.needs_reference else None
            states, head = hidden_states(self.policy, rows, masks), Head.of(self.policy, self.compiled, split=True)
            if torch.is_grad_enabled():
                counted = len(rows.counts) if counted is None else counted
                loss, output, table = loss_of_rows(states, head, reference, rows, self.objective, counted, self.tables)
                return Scored(loss, output, table.by_role(self.objective.roles))
            scores = score_rows(states, head, reference, rows, self.objective, self.tables).by_role(self.objective.roles)
        output = self.objective(scores)
        return Scored(output.losses[:counted].sum(), output, scores)

    def _reference(self, rows: SharedPrefixBatch, masks) -> ReferenceStates:
        # FSDP's gathered parameters, which a policy with its adapters off has too, cannot be inference tensors.
        kept = hasattr(self.reference, "unshard") or hasattr(self.reference, "is_policy")
        with torch.no_grad() if kept else torch.inference_mode():
            known = rows.reference_states
            states = hidden_states(self.reference, rows, masks) if known is None else known
            return ReferenceStates(states, Head.of(self.reference, split=True))

    # The methods below are forward passes too: distributed/sharding.py registers them, so that FSDP gathers the weights.

    def reference_states(self, rows: SharedPrefixBatch) -> torch.Tensor:
        """Compute the reference's hidden states at the positions `rows.states`, which predict the response tokens. Returns (N, H)."""
        with _gathered(self.reference):
            return self._reference(rows, attention_masks(rows, self.policy.config)).states

    def logits_of_all(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute the policy's own logits.

        Args:
            ids: (B, T), token ids, nothing padded.

        Returns:
            (B, T, V), in the dtype in which the policy computes.
        """
        return self.policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    def both_ways(
        self, prompt: torch.Tensor, responses: torch.Tensor, last: int, packed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
        """Score the last tokens of each response by fast scoring, and by the model's own forward pass.

        Args:
            prompt: (P,), token ids.
            responses: (R, n), token ids; equal lengths, so that nothing is padded.
            last: tokens of each response to compare.
            packed: put another prompt with its responses before them, into the same row.

        Returns:
            (fast, plain, dtype): the policy's log-probabilities of the last min(n, last) tokens of each response, (R, min(n, last)),
            nats; and the dtype in which the policy computes.
        """
        device = responses.device
        examples = [(prompt.flip(0).tolist(), responses.flip(1).tolist())] * packed + [(prompt.tolist(), responses.tolist())]
        rows = shared_prefix_batch(examples, row_multiple(device), [len(examples)]).to(device)
        states = hidden_states(self.policy, rows, attention_masks(rows, self.policy.config))[-responses.numel() :]
        ids = torch.cat([prompt.expand(len(responses), -1), responses], dim=1)
        n = min(last, responses.shape[1])
        fast = Head.of(self.policy).logits(states.view(*responses.shape, -1)[:, -n:])
        responses = responses[:, -n:]
        keep = {"logits_to_keep": n + 1} if "logits_to_keep" in inspect.signature(self.policy.forward).parameters else {}
        logits = self.policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep).logits[:, -n - 1 : -1]
        return label_logps(fast.log_softmax(-1), responses), label_logps(logits.to(fast.dtype).log_softmax(-1), responses), states.dtype


def plain_scores(
    policy: nn.Module, reference: Optional[nn.Module], objective: Objective, batch: Mapping[str, torch.Tensor]
) -> dict[str, ResponseScores]:
    """Score a collated batch from full logits.

    Args:
        policy: a causal language model.
        reference: likewise; None if the objective needs no reference.
        objective: decides which roles and scores are computed.
        batch: `<role>_{input_ids,attention_mask,labels}`, each (B, T), and more, see `Scorer.forward`.

    Returns:
        scores by role, each (B,), with gradient to the policy.
    """
    stacked = stack_roles(batch, objective.roles)
    labels = stacked["concatenated_labels"]
    logits = full_logits(policy, stacked)
    reference_logps = kl = None
    if objective.needs_reference:
        with torch.no_grad():
            reference_logits = full_logits(reference, stacked)
        reference_logps = _get_batch_logps(reference_logits, labels)
    if objective.needs_kl:
        _, kl, logps = _tdpo_get_batch_logps(logits, reference_logits, labels)
    else:
        logps = _get_batch_logps(logits, labels)
    num_tokens = to_device((labels[:, 1:] != IGNORED).sum(-1), logps.device)
    given = {role: batch.get(f"{role}_annotation") for role in objective.roles}
    annotations = {
        role: None if values is None else to_device(torch.tensor(values, dtype=torch.float64), logps.device)
        for role, values in given.items()
    }
    return {
        role: ResponseScores(
            *(None if x is None else x[own] for x in (logps, num_tokens, reference_logps, kl)),
            annotations[role],
            batch.get("baseline"),
        )
        for role, own in _slices_by_role(batch, objective.roles)
    }


def hidden_states(model: nn.Module, rows: SharedPrefixBatch, masks) -> torch.Tensor:
    """Compute the hidden states of the last layer, after the final norm, at the positions that predict a response token.

    Args:
        model: a causal language model of Transformers.
        rows: the batch.
        masks: see `attention_masks`.

    Returns:
        (N, H)
    """
    states = model.base_model(
        input_ids=rows.input_ids, attention_mask=masks, position_ids=rows.position_ids, use_cache=False
    ).last_hidden_state
    return states.flatten(0, 1)[rows.states]


@contextmanager
def _gathered(model: Optional[nn.Module]) -> Iterator[None]:
    """Within the block, gather a sharded model's root unit (embeddings, norm, head), because its parts are called directly."""
    if not hasattr(model, "unshard"):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def _slices_by_role(batch: Mapping[str, torch.Tensor], roles: tuple[str, ...]) -> Iterator[tuple[str, slice]]:
    """Yield each role with the slice of its sequences in the stacked batch."""
    start = 0
    for role in roles:
        stop = start + batch[f"{role}_input_ids"].shape[0]
        yield role, slice(start, stop)
        start = stop
