"""From a model and a batch of tokens to ResponseScores and losses: with chunked_head.py the only place that touches logits.

`Scorer` computes in one of two ways, equal to rounding. Of a collated batch *plain*, the readable specification, as published: chosen and
rejected padded into one batch, full logits of policy and reference. Of PromptRows *fast*: each prompt once, the head on response positions
alone, nothing of the vocabulary's size for longer than a chunk.
Shapes: B sequences, T tokens, V vocabulary entries, N response tokens of the batch, H hidden.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Optional, Union

import torch
from torch import nn

from tdpo.losses import LossOutput, Objective, ResponseScores
from tdpo.scoring import chunked_loss as chunked_head
from tdpo.scoring import prefix_sharing as shared_prompt
from tdpo.scoring.chunked_loss import Head, Reference, loss_of_rows, score_rows
from tdpo.scoring.prefix_sharing import PromptRows, attention_masks, prompt_rows
from tdpo.utils import IGNORED, pad_to_length

PROBED = 24  # tokens of a response that are compared when fast scoring is tried


class Scored(NamedTuple):
    """What a Scorer returns."""

    loss: torch.Tensor  # sum of the counted examples' losses, a scalar, nats; the only one through which gradients flow
    output: LossOutput  # of all examples, detached
    scores: dict[str, ResponseScores]  # by role, detached


class Probe(NamedTuple):
    """Random tokens, by which fast scoring of a model is tried."""

    prompt: torch.Tensor  # (P,)
    responses: torch.Tensor  # (R, n), of equal length, so that nothing is padded


class ReferenceOnly(NamedTuple):
    """Asks a Scorer for the reference's hidden states alone, (N, H)."""

    rows: PromptRows


class Scorer(nn.Module):
    """Policy and, where the objective needs one, the reference: a module that returns scores and the loss.

    The loss is computed in here, because the fast way needs its derivatives while it still has the distributions.

    Args:
        policy: a causal language model of Transformers.
        reference: the same, frozen here; None where `objective.needs_reference` is false.
        objective: says which roles, and whether SeqKL, are needed.
        compiled: compile what fast scoring does to logits.
    """

    def __init__(self, policy: nn.Module, reference: Optional[nn.Module], objective: Objective, compiled: bool = False):
        super().__init__()
        self.policy, self.reference, self.objective, self.compiled = policy, reference, objective, compiled
        if reference is not None:
            reference.eval().requires_grad_(False)

    def forward(self, batch: Union[PromptRows, Mapping[str, torch.Tensor]], counted: Optional[int] = None) -> Scored:
        """Scores and loss of a batch, all (B,) but for the loss.

        Args:
            batch: PromptRows, a row a pair (SFT: an example), or what the collate function returns,
                `<role>_{input_ids,attention_mask,labels}` and, where the objective needs them, `<role>_annotation` and `baseline`. Labels
                may stay on the CPU: where the response tokens lie is then known without waiting for the device.
            counted: examples, from the first, whose losses are summed; None: all.
        """
        if isinstance(batch, Probe):
            return self._both_ways(batch)
        if isinstance(batch, ReferenceOnly):
            with _gathered(self.reference):
                return self._reference(batch.rows, attention_masks(batch.rows, self.policy.config)).states
        return (self._fast if isinstance(batch, PromptRows) else self._plain)(batch, counted)

    def _plain(self, batch: Mapping[str, torch.Tensor], counted: Optional[int]) -> Scored:
        scores = plain_scores(self.policy, self.reference, self.objective, batch)
        output = self.objective(scores)
        loss = output.losses[:counted].sum()
        return Scored(loss, replace(output, losses=output.losses.detach()), {role: score.detach() for role, score in scores.items()})

    def _fast(self, rows: PromptRows, counted: Optional[int]) -> Scored:
        masks = attention_masks(rows, self.policy.config)
        states, head = _hidden_states(self.policy, rows, masks), Head.of(self.policy, self.compiled)
        with _gathered(self.reference):
            reference = self._reference(rows, masks) if self.objective.needs_reference else None
            if torch.is_grad_enabled():
                counted = len(rows.counts) if counted is None else counted
                loss, table = loss_of_rows(states, head, reference, rows, self.objective, counted)
            else:
                loss, table = None, score_rows(states, head, reference, rows, self.objective)
        scores = table.by_role(rows, self.objective)
        output = self.objective(scores)
        return Scored(output.losses[:counted].sum() if loss is None else loss, output, scores)

    def _reference(self, rows: PromptRows, masks) -> Reference:
        # FSDP's gathered parameters cannot be inference tensors.
        with torch.no_grad() if hasattr(self.reference, "unshard") else torch.inference_mode():
            known = rows.reference_states
            return Reference(_hidden_states(self.reference, rows, masks) if known is None else known, Head.of(self.reference))

    def _both_ways(self, probe: Probe) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
        """The policy's log-probability of each response's last tokens, fast and as the model itself computes it, (R, n) twice, nats; and
        the dtype in which it computes."""
        prompt, responses = probe
        rows = prompt_rows([(prompt.tolist(), responses.tolist())]).to(responses.device)
        states = _hidden_states(self.policy, rows, attention_masks(rows, self.policy.config))
        ids = torch.cat([prompt.expand(len(responses), -1), responses], dim=1)
        n = min(PROBED, responses.shape[1])
        fast = Head.of(self.policy).logits(states.view(*responses.shape, -1)[:, -n:])
        responses = responses[:, -n:]
        last = {"logits_to_keep": n + 1} if "logits_to_keep" in inspect.signature(self.policy.forward).parameters else {}
        logits = self.policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **last).logits[:, -n - 1 : -1]
        return _of_label(fast.log_softmax(-1), responses), _of_label(logits.to(fast.dtype).log_softmax(-1), responses), states.dtype


def fast_scoring_problem(scorer: nn.Module, max_length: int) -> Optional[str]:
    """Why the policy must be scored plain; None where fast scoring gives what the model itself does. Called by all ranks, without gradient.

    A model may compute more than its config says: scale its logits, take no notice of a mask, have a window of its own. So both ways are
    compared, on a pair of random tokens that fills max_length with each of its responses: a shorter one would not show a window that is
    missing, or counted by places of the row.

    Args:
        scorer: a Scorer on its device.
        max_length: tokens of a prompt with a response.
    """
    config = scorer.policy.config
    if problem := shared_prompt.problem_with(config) or chunked_head.problem_with(scorer.policy):
        return problem
    prompt = max(1, max_length // 8)
    response = max_length - prompt
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (prompt + 2 * response,), generator=generator).to(scorer.policy.device)
    try:
        fast, plain, dtype = scorer(Probe(tokens[:prompt], tokens[prompt:].view(2, response)))
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # whatever a model makes of a mask that it does not know
        return f"it cannot compute rows of several responses: {' '.join(str(error).split())[:120]}"
    # Log-probabilities of random tokens differ from each other by far more than by rounding; half precision rounds more.
    difference, spread = (fast - plain).square().mean().sqrt().item(), plain.std().item()
    rounding = 2**-10 if dtype == torch.float32 and torch.cuda.is_available() else torch.finfo(dtype).eps  # TF32 on a GPU
    tolerance = max(1e-3, 16 * rounding) * spread + 1e-6
    return None if difference <= tolerance else f"its log-probabilities would differ by {difference:.2g} nats a token"


def plain_scores(
    policy: nn.Module, reference: Optional[nn.Module], objective: Objective, batch: Mapping[str, torch.Tensor]
) -> dict[str, ResponseScores]:
    """Scores by role, each (B,), with gradient. `batch` as in `Scorer.forward`."""
    stacked = _stack_roles(batch, objective.roles)
    labels = stacked["concatenated_labels"]
    logits = _logits(policy, stacked)
    reference_logps = kl = None
    if objective.needs_reference:
        with torch.no_grad():
            reference_logits = _logits(reference, stacked)
        reference_logps = _get_batch_logps(reference_logits, labels)
    if objective.needs_kl:
        _, kl, logps = _tdpo_get_batch_logps(logits, reference_logits, labels)
    else:
        logps = _get_batch_logps(logits, labels)
    num_tokens = (labels[:, 1:] != IGNORED).sum(-1).to(logps.device)
    annotations = {role: batch.get(f"{role}_annotation") for role in objective.roles}
    return {
        role: ResponseScores(
            *(None if x is None else x[part] for x in (logps, num_tokens, reference_logps, kl)),
            None if annotations[role] is None else torch.tensor(annotations[role], dtype=torch.float64, device=logps.device),
            batch.get("baseline"),
        )
        for role, part in _parts(batch, objective.roles)
    }


class TokenStatistics(NamedTuple):
    """Of N response positions, row by row, response by response, (N,) each, nats. None without a reference."""

    logps: torch.Tensor  # log pi(y_t|s_t)
    entropy: torch.Tensor  # of pi(.|s_t), over the whole vocabulary
    reference_logps: Optional[torch.Tensor]
    kl: Optional[torch.Tensor]  # KL(pi_ref || pi), whose sum over a response is SeqKL
    reverse_kl: Optional[torch.Tensor]  # KL(pi || pi_ref), whose sum over a response drawn from pi estimates that of whole responses


@torch.inference_mode()
def token_statistics(
    policy: nn.Module,
    reference: Optional[nn.Module],
    examples: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    fast: bool,
    masks: Optional[Sequence[Sequence[Sequence[int]]]] = None,
) -> TokenStatistics:
    """What can be said of every response token; for evaluation.

    Args:
        policy, reference: on their device.
        examples, masks: (prompt, responses) in tokens, and which of these are scored, as for `prompt_rows`.
        fast: rows of several responses, which fast_scoring_problem must have found right for the model; else each response by itself.
    """
    if not fast:
        examples = [(prompt, [response]) for prompt, responses in examples for response in responses]
        masks = None if masks is None else [[mask] for some in masks for mask in some]
    rows = prompt_rows(examples, masks).to(policy.device)
    logits_of = [_logits_at(model, rows, fast) for model in (policy, reference) if model is not None]
    parts = []
    for chunk in chunked_head.pieces(0, len(rows.labels), chunked_head.CHUNK.get(policy.device.type, chunked_head.CHUNK["cuda"])):
        labels = rows.labels[chunk]
        log_p, *rest = (logits(chunk).log_softmax(-1) for logits in logits_of)
        log_q = rest[0] if rest else None
        others = (None, None, None) if log_q is None else (_of_label(log_q, labels), forward_kl(log_q, log_p), forward_kl(log_p, log_q))
        parts.append((_of_label(log_p, labels), torch.special.entr(log_p.exp()).sum(-1), *others))
    return TokenStatistics(*(None if values[0] is None else torch.cat(values) for values in zip(*parts)))


def _logits_at(model: nn.Module, rows: PromptRows, fast: bool) -> Callable[[slice], torch.Tensor]:
    """A function from a slice of `rows.states` to logits, in float32 at least."""
    if fast:
        states, head = _hidden_states(model, rows, attention_masks(rows, model.config)), Head.of(model)
        return lambda chunk: head.logits(states[chunk])
    stacked = {"concatenated_input_ids": rows.input_ids, "concatenated_attention_mask": (rows.segments >= 0).long()}
    logits = _logits(model, stacked).flatten(0, 1)
    return lambda chunk: logits[rows.states[chunk]]


def _hidden_states(model: nn.Module, rows: PromptRows, masks) -> torch.Tensor:
    """(N, H): the last layer's, after the final norm, at the positions that predict a response token."""
    states = model.base_model(
        input_ids=rows.input_ids, attention_mask=masks, position_ids=rows.position_ids, use_cache=False
    ).last_hidden_state
    return states.flatten(0, 1)[rows.states]


@contextmanager
def _gathered(model: Optional[nn.Module]) -> Iterator[None]:
    """Within it a sharded model's own unit (embeddings, norm, head) is whole, for who calls a part of the model."""
    if not hasattr(model, "unshard"):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def _of_label(logps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(..., V) to (...): the log-probability of each label."""
    return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _parts(batch: Mapping[str, torch.Tensor], roles: tuple[str, ...]) -> Iterator[tuple[str, slice]]:
    """Where each role's sequences lie in the stacked batch."""
    start = 0
    for role in roles:
        stop = start + batch[f"{role}_input_ids"].shape[0]
        yield role, slice(start, stop)
        start = stop


def _stack_roles(batch: Mapping[str, torch.Tensor], roles: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The roles' tensors below each other, padded to the longest, as concatenated_{input_ids,attention_mask,labels}."""
    length = max(batch[f"{role}_input_ids"].shape[1] for role in roles)
    stacked = {}
    for kind, pad_value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
        tensors = [pad_to_length(batch[f"{role}_{kind}"], length, pad_value) for role in roles]
        stacked[f"concatenated_{kind}"] = torch.cat(tensors)
    return stacked


def concatenated_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Chosen and rejected inputs below each other, (2B, T), under keys `concatenated_*`: the published signature."""
    return _stack_roles(batch, ("chosen", "rejected"))


def _logits(model: nn.Module, stacked: Mapping[str, torch.Tensor]) -> torch.Tensor:
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
        return _of_label(logps, self.labels)

    def reduce(self, values: torch.Tensor, average: bool) -> torch.Tensor:
        """(N,) to (B,): the sum, or the mean, of each row's values."""
        table = values.new_zeros(self.mask.shape).index_put(self.index, values)
        return table.sum(-1) / self.mask.sum(-1) if average else table.sum(-1)


@contextmanager
def cast_parameters(module: nn.Module, dtype: Optional[torch.dtype]) -> Iterator[None]:
    """Within the block the module computes with copies of its parameters in `dtype`; their gradients reach the originals.

    This is what FSDP's MixedPrecisionPolicy does: weights, gradients and optimizer state keep the parameters' own dtype. Autocast would
    round other things than the reference does, so that log-ratio and KL would not start at 0. Buffers keep their dtype. None: nothing.
    """
    if dtype is None:
        yield
        return
    owners = [(owner, name, p) for owner in module.modules() for name, p in owner.named_parameters(recurse=False)]
    copies = {id(p): _cast(p, dtype) for _, _, p in owners}  # one copy of a tied parameter
    for owner, name, parameter in owners:
        delattr(owner, name)
        setattr(owner, name, copies[id(parameter)])
    try:
        yield
    finally:
        for owner, name, parameter in owners:
            delattr(owner, name)
            owner.register_parameter(name, parameter)


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """A copy through which gradients flow; where none are wanted, a parameter, by which `generate` tells the module's dtype and device."""
    copy = parameter.to(dtype) if parameter.is_floating_point() else parameter
    return copy if torch.is_grad_enabled() else nn.Parameter(copy, requires_grad=False)
