"""Every objective: a pure function from response scores to one loss per example. Imports torch alone.

    import losses
    objective = losses.get_objective("tdpo2", beta=0.1, alpha=0.5)
    output = objective({"chosen": chosen_scores, "rejected": rejected_scores})
    output.losses.mean().backward()

Notation, as in the papers: r(y) = log pi(y|x) - log pi_ref(y|x), summed over the tokens of the response y; D = r(y_w) - r(y_l) for
chosen y_w and rejected y_l; K(y) = SeqKL = sum over positions t of KL(pi_ref(.|s_t) || pi(.|s_t)), the forward divergence.
All log-probabilities and divergences are in nats. B is the number of examples (pairs, or responses for SFT).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Optional

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ResponseScores:
    """What scoring computes for one role (chosen, rejected) of a batch. Every tensor has shape (B,)."""

    logps: torch.Tensor  # sum over the response's tokens of log pi(y_t | s_t), nats
    num_tokens: torch.Tensor  # |y|, the number of response tokens, end-of-sequence included
    reference_logps: Optional[torch.Tensor] = None  # the same sum under the reference, without gradient, nats
    kl: Optional[torch.Tensor] = None  # SeqKL K(y), nats

    @property
    def log_ratio(self) -> torch.Tensor:
        """r(y), shape (B,), nats."""
        return self.logps - self.reference_logps

    def detach(self) -> "ResponseScores":
        return ResponseScores(*(None if x is None else x.detach() for x in vars(self).values()))


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns."""

    losses: torch.Tensor  # (B,), one loss an example; the training loss is their mean over the global batch
    rewards: Mapping[str, torch.Tensor] = field(default_factory=dict)  # role -> (B,), detached: what rewards_*/ curves show
    logits: Optional[torch.Tensor] = None  # (B,), detached: the margin that is trained, positive where the pair is ranked right


Scores = Mapping[str, ResponseScores]


def sft(scores: Scores, average_log_prob: bool = False) -> LossOutput:
    """Negative log-likelihood of the target response: -sum_t log pi(y_t|s_t).

    Args:
        scores: one role, "chosen", which holds the SFT target.
        average_log_prob: divide by the number of response tokens (the published code sums).
    """
    target = scores["chosen"]
    return LossOutput(losses=-_per_response(target.logps, target, average_log_prob))


def dpo(scores: Scores, beta: float, label_smoothing: float = 0.0, reference_free: bool = False) -> LossOutput:
    """DPO, -log sigmoid(beta D): eq. 7 of https://arxiv.org/abs/2305.18290.

    Args:
        scores: roles "chosen" and "rejected", with reference_logps.
        beta: strength of the implicit KL penalty, > 0; 0.1 to 0.5 is usual.
        label_smoothing: e of conservative DPO, -(1-e) log sigmoid(beta D) - e log sigmoid(-beta D): eq. 3 of
            https://ericmitchell.ai/cdpo.pdf; the fraction of labels thought to be flipped, 0 <= e < 0.5.
        reference_free: leave the reference out of D (a uniform reference). Rewards still use it, as published.
    """
    chosen, rejected = scores["chosen"], scores["rejected"]
    margin = chosen.logps - rejected.logps
    if not reference_free:
        margin = margin - (chosen.reference_logps - rejected.reference_logps)
    logits = beta * margin
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return LossOutput(losses, _log_ratio_rewards(scores, beta), logits.detach())


def ipo(scores: Scores, beta: float, average_log_prob: bool = False) -> LossOutput:
    """IPO, (D - 1/(2 beta))^2: eq. 17 of https://arxiv.org/abs/2310.12036, where beta is called tau.

    Args:
        scores: roles "chosen" and "rejected", with reference_logps.
        beta: strength of the regularisation, > 0.
        average_log_prob: take D of per-token means, as IPO's authors do (the published DPO code sums).
    """
    ratios = {role: _per_response(score.log_ratio, score, average_log_prob) for role, score in scores.items()}
    margin = ratios["chosen"] - ratios["rejected"]
    rewards = {role: beta * ratio.detach() for role, ratio in ratios.items()}
    return LossOutput((margin - 1 / (2 * beta)) ** 2, rewards, beta * margin.detach())


def tdpo1(scores: Scores, beta: float) -> LossOutput:
    """TDPO1, -log sigmoid(beta [D - (K(y_l) - K(y_w))]): https://arxiv.org/abs/2404.11999.

    Args:
        scores: roles "chosen" and "rejected", with reference_logps and kl.
        beta: as in DPO.
    """
    chosen, rejected = scores["chosen"], scores["rejected"]
    return _tdpo_output(scores, beta, rejected.kl - chosen.kl)


def tdpo2(scores: Scores, beta: float, alpha: float = 0.5) -> LossOutput:
    """TDPO2, -log sigmoid(beta [D - alpha (K(y_l) - sg K(y_w))]), sg the stop-gradient: https://arxiv.org/abs/2404.11999.

    Args:
        scores: roles "chosen" and "rejected", with reference_logps and kl.
        beta: as in DPO.
        alpha: weight of the difference of SeqKL, >= 0; 0 gives DPO.
    """
    chosen, rejected = scores["chosen"], scores["rejected"]
    return _tdpo_output(scores, beta, alpha * (rejected.kl - chosen.kl.detach()))


def _tdpo_output(scores: Scores, beta: float, kl_difference: torch.Tensor) -> LossOutput:
    """Both TDPO variants differ only in kl_difference, shape (B,), nats."""
    logits = beta * (scores["chosen"].log_ratio - scores["rejected"].log_ratio - kl_difference)
    # The published rewards are beta (r + K) whatever alpha is. Kept under their name; `logits` is what is trained.
    rewards = {role: beta * (score.log_ratio + score.kl).detach() for role, score in scores.items()}
    return LossOutput(-F.logsigmoid(logits), rewards, logits.detach())


def _per_response(values: torch.Tensor, score: ResponseScores, average: bool) -> torch.Tensor:
    return values / score.num_tokens if average else values


def _log_ratio_rewards(scores: Scores, beta: float) -> Mapping[str, torch.Tensor]:
    return {role: beta * score.log_ratio.detach() for role, score in scores.items()}


@dataclass(frozen=True)
class Objective:
    """A loss and what scoring must compute for it. Call it with scores."""

    name: str
    function: Callable[..., LossOutput]
    roles: tuple[str, ...] = ("chosen", "rejected")
    needs_reference: bool = True
    needs_kl: bool = False
    hyperparameters: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, scores: Scores) -> LossOutput:
        return self.function(scores, **self.hyperparameters)


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("sft", sft, roles=("chosen",), needs_reference=False),
        Objective("dpo", dpo),
        Objective("ipo", ipo),
        Objective("tdpo1", tdpo1, needs_kl=True),
        Objective("tdpo2", tdpo2, needs_kl=True),
    )
}


def resolve(name: str, hyperparameters: Mapping) -> tuple[str, dict]:
    """The name in OBJECTIVES and the hyperparameters that a `loss` config stands for.

    The published name `tdpo` is TDPO2, or TDPO1 where `if_tdpo2` is false; TDPO1 has no alpha, and neither can do without a
    reference, so that the published key `reference_free` must be false.

    Raises:
        KeyError: no objective has that name.
        ValueError: reference_free is set for TDPO.
    """
    values = dict(hyperparameters)
    if name == "tdpo":
        if values.pop("reference_free", False):
            raise ValueError("loss.reference_free=true: TDPO's SeqKL needs the reference; use loss=dpo")
        name = "tdpo2" if values.pop("if_tdpo2", True) else "tdpo1"
        if name == "tdpo1":
            values.pop("alpha", None)
    if name not in OBJECTIVES:
        raise KeyError(name)
    return name, values


def get_objective(name: str, **hyperparameters) -> Objective:
    """The objective of that name with its hyperparameters bound; `tdpo` as in `resolve`, whose errors it raises."""
    name, values = resolve(name, hyperparameters)
    known = OBJECTIVES[name]
    return Objective(known.name, known.function, known.roles, known.needs_reference, known.needs_kl, values)


# The published signatures, for forks that call them. They are thin: the objectives above do the work.


def tdpo_loss(
    chosen_logps_margin: torch.Tensor,
    rejected_logps_margin: torch.Tensor,
    chosen_position_kl: torch.Tensor,
    rejected_position_kl: torch.Tensor,
    beta: float,
    alpha: float = 0.5,
    if_tdpo2: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses, chosen_rewards, rejected_rewards), each (B,), from log-ratios r and SeqKLs K, each (B,), nats."""
    objective = get_objective("tdpo", beta=beta, alpha=alpha, if_tdpo2=if_tdpo2)
    chosen = _scores_of_ratio(chosen_logps_margin, chosen_position_kl)
    rejected = _scores_of_ratio(rejected_logps_margin, rejected_position_kl)
    return _published_tuple(objective({"chosen": chosen, "rejected": rejected}))


def preference_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses, chosen_rewards, rejected_rewards) of DPO, conservative DPO or IPO, each (B,), from summed log-probabilities, each (B,)."""
    ones = torch.ones_like(policy_chosen_logps)
    scores = {
        "chosen": ResponseScores(policy_chosen_logps, ones, reference_chosen_logps),
        "rejected": ResponseScores(policy_rejected_logps, ones, reference_rejected_logps),
    }
    if ipo and reference_free:
        raise ValueError("IPO compares with a reference: ipo=True and reference_free=True exclude each other")
    if ipo:
        return _published_tuple(get_objective("ipo", beta=beta)(scores))
    return _published_tuple(dpo(scores, beta, label_smoothing, reference_free))


def _scores_of_ratio(log_ratio: torch.Tensor, kl: torch.Tensor) -> ResponseScores:
    return ResponseScores(log_ratio, torch.ones_like(log_ratio), torch.zeros_like(log_ratio), kl)


def _published_tuple(output: LossOutput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return output.losses, output.rewards["chosen"], output.rewards["rejected"]
