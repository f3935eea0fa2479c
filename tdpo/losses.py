"""The objectives: pure functions from response scores to one loss per example. This file imports only torch.

    from tdpo import losses
    objective = losses.get_objective("tdpo2", beta=0.1, alpha=0.5)
    output = objective({"chosen": chosen_scores, "rejected": rejected_scores})
    output.losses.mean().backward()

Notation, as in the papers: r(y) = log pi(y|x) - log pi_ref(y|x), summed over the tokens of the response y; D = r(y_w) - r(y_l) for
chosen y_w and rejected y_l; K(y) = SeqKL = sum over positions t of KL(pi_ref(.|s_t) || pi(.|s_t)), the forward divergence.
All log-probabilities and divergences are in nats. B is the number of examples (pairs, or responses for SFT).
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Optional

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ResponseScores:
    """Scores of a batch: tensors of shape (B,) for one role (such as chosen), or (B, R) for all R roles together."""

    logps: torch.Tensor  # sum over the response's tokens of log pi(y_t | s_t), nats
    num_tokens: torch.Tensor  # |y|, the number of response tokens in the loss, end-of-sequence included
    reference_logps: Optional[torch.Tensor] = None  # the same sum under the reference, without gradient, nats
    kl: Optional[torch.Tensor] = None  # SeqKL K(y), nats
    annotation: Optional[torch.Tensor] = None  # float64, from the data. odpo: the rating of y; kto: 1 desirable, 0 undesirable
    baseline: Optional[torch.Tensor] = None  # z0 of kto, a scalar, nats

    @property
    def log_ratio(self) -> torch.Tensor:
        """r(y), in the shape of logps, nats; needs reference_logps."""
        return self.logps - self.reference_logps

    def detach(self) -> "ResponseScores":
        return ResponseScores(*(None if x is None else x.detach() for x in vars(self).values()))

    def by_role(self, roles: Sequence[str]) -> dict[str, "ResponseScores"]:
        """Split (B, R) scores into one ResponseScores of (B,) for each of the R roles."""
        tables = {name: value for name, value in vars(self).items() if name != "baseline"}
        return {
            role: ResponseScores(**{name: None if x is None else x[:, r] for name, x in tables.items()}, baseline=self.baseline)
            for r, role in enumerate(roles)
        }


@dataclass(frozen=True)
class LossOutput:
    """The output of an objective."""

    losses: torch.Tensor  # (B,), one loss per example; the training loss is their mean over the global batch
    rewards: Mapping[str, torch.Tensor] = field(default_factory=dict)  # role -> (B,), detached; logged as rewards_*
    logits: Optional[torch.Tensor] = None  # (B,), detached: what the loss trains, > 0 where the example is ranked as the data say

    def detach(self) -> "LossOutput":
        rewards = {role: reward.detach() for role, reward in self.rewards.items()}
        return LossOutput(self.losses.detach(), rewards, None if self.logits is None else self.logits.detach())

    @staticmethod
    def concatenate(outputs: Sequence["LossOutput"]) -> "LossOutput":
        """Join the outputs of consecutive parts of a batch."""
        first = outputs[0]
        return LossOutput(
            torch.cat([output.losses for output in outputs]),
            {role: torch.cat([output.rewards[role] for output in outputs]) for role in first.rewards},
            None if first.logits is None else torch.cat([output.logits for output in outputs]),
        )


Scores = Mapping[str, ResponseScores]

STEEPEST = 30.0  # exponent, nats, up to which f_dpo's gradient is exact: the square of a norm of such gradients still fits into float32


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
    """Compute TDPO1 or TDPO2, which differ only in kl_difference: shape (B,), nats."""
    logits = beta * (_difference_of_log_ratios(scores) - kl_difference)
    # Rewards as published: beta (r + K), whatever alpha is. The margin that the loss trains is `logits`.
    rewards = {role: beta * (score.log_ratio + score.kl).detach() for role, score in scores.items()}
    return LossOutput(-F.logsigmoid(logits), rewards, logits.detach())


def rdpo(scores: Scores, beta: float, label_smoothing: float = 0.1) -> LossOutput:
    """Robust DPO, [-(1-e) log sigmoid(beta D) + e log sigmoid(-beta D)] / (1-2e): https://arxiv.org/abs/2403.00409.

    The second term has the opposite sign of conservative DPO's. The loss is therefore unbiased if a fraction e of the labels is flipped.

    Args:
        scores: roles "chosen" and "rejected", with reference_logps.
        beta: as in DPO.
        label_smoothing: e, the fraction of labels that are flipped, 0 <= e < 0.5; 0 is DPO.
    """
    logits = beta * _difference_of_log_ratios(scores)
    losses = (label_smoothing * F.logsigmoid(-logits) - (1 - label_smoothing) * F.logsigmoid(logits)) / (1 - 2 * label_smoothing)
    return LossOutput(losses, _log_ratio_rewards(scores, beta), logits.detach())


def dpop(scores: Scores, beta: float, dpop_lambda: float = 50.0) -> LossOutput:
    """DPO-Positive, -log sigmoid(beta [D - lambda max(0, -r(y_w))]): eq. 3 of https://arxiv.org/abs/2402.13228 (July 2024).

    The penalty is inside the bracket that beta multiplies, as in the paper. Some implementations put it outside.

    Args:
        scores: roles "chosen" and "rejected", with reference_logps.
        beta: as in DPO.
        dpop_lambda: weight of the penalty if the chosen response is less likely than under the reference, >= 0; 0 is DPO.
    """
    penalty = F.relu(-scores["chosen"].log_ratio)
    logits = beta * (_difference_of_log_ratios(scores) - dpop_lambda * penalty)
    return LossOutput(-F.logsigmoid(logits), _log_ratio_rewards(scores, beta), logits.detach())


def simpo(scores: Scores, beta: float = 2.0, gamma: float = 0.5) -> LossOutput:
    """SimPO, -log sigmoid(beta [log pi(y_w)/|y_w| - log pi(y_l)/|y_l|] - gamma): eq. 6 of https://arxiv.org/abs/2405.14734. No reference.

    Args:
        scores: roles "chosen" and "rejected".
        beta: scale of the reward beta log pi(y)/|y|, > 0; 2 to 10 in the paper.
        gamma: target difference of the two rewards, >= 0.
    """
    rewards = {role: beta * scores[role].logps / scores[role].num_tokens for role in ("chosen", "rejected")}
    logits = rewards["chosen"] - rewards["rejected"] - gamma
    return LossOutput(-F.logsigmoid(logits), {role: reward.detach() for role, reward in rewards.items()}, logits.detach())


def odpo(scores: Scores, beta: float, alpha: float = 1.0, kl_weight: float = 0.0) -> LossOutput:
    """DPO with an offset, -log sigmoid(beta D - alpha log(s_w - s_l)): https://arxiv.org/abs/2402.10571, s the data's ratings.

    Args:
        scores: roles "chosen" and "rejected", with reference_logps, annotation (the ratings, s_w > s_l) and, if kl_weight is not 0, kl.
        beta: as in DPO.
        alpha: weight of the offset, >= 0; 0 is DPO.
        kl_weight: >= 0; kl_weight times the mean SeqKL of the two responses (forward KL) is added to the loss, not scaled by beta.
    """
    chosen, rejected = scores["chosen"], scores["rejected"]
    difference = _difference_of_log_ratios(scores)
    offset = (chosen.annotation - rejected.annotation).log()  # in float64: ratings may differ by less than float32 resolves
    logits = beta * difference - alpha * offset.to(difference.dtype)
    losses = -F.logsigmoid(logits)
    if kl_weight:
        losses = losses + kl_weight * (chosen.kl + rejected.kl) / 2
    return LossOutput(losses, _log_ratio_rewards(scores, beta), logits.detach())


def slic(scores: Scores, delta: float = 1.0, sft_weight: float = 0.1) -> LossOutput:
    """SLiC-HF, max(0, delta - log pi(y_w) + log pi(y_l)) - lambda log pi(y_ref): https://arxiv.org/abs/2305.10425. No reference model.

    Args:
        scores: roles "chosen", "rejected" and "target" (y_ref in the formula: the prompt's SFT target).
        delta: margin, nats, > 0.
        sft_weight: lambda, weight of the SFT target's log-likelihood, >= 0.
    """
    margin = scores["chosen"].logps - scores["rejected"].logps
    losses = F.relu(delta - margin) - sft_weight * scores["target"].logps
    # SLiC has no implicit reward. It ranks responses by their log-probability.
    return LossOutput(losses, {role: scores[role].logps.detach() for role in ("chosen", "rejected")}, margin.detach())


def kto(scores: Scores, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, z0: object = "batch") -> LossOutput:
    """KTO, a loss of single responses: eq. 7 of https://arxiv.org/abs/2402.01306.

    Desirable: w_D (1 - sigmoid(beta (r - z0))); undesirable: w_U (1 - sigmoid(beta (z0 - r))).

    Args:
        scores: role "completion", with reference_logps, annotation (1 desirable, 0 undesirable) and, if z0 is "batch", baseline:
            max(0, mean of r over mismatched responses), without gradient.
        beta: as in DPO.
        desirable_weight, undesirable_weight: w_D and w_U, >= 0.
        z0: "batch", or 0 for no baseline. It is not used here: it tells Objective whether the training loop computes the baseline.
    """
    score = scores["completion"]
    desirable = score.annotation > 0.5
    ratio = score.log_ratio if score.baseline is None else score.log_ratio - score.baseline
    logits = beta * torch.where(desirable, ratio, -ratio)
    weights = torch.where(desirable, torch.full_like(logits, desirable_weight), torch.full_like(logits, undesirable_weight))
    return LossOutput(weights * torch.sigmoid(-logits), _log_ratio_rewards(scores, beta), logits.detach())


def sdpo_stepwise(scores: Scores, beta: float, parts: int = 3, order: str = "given") -> LossOutput:
    """sDPO, stepwise DPO: each stage of the data has the policy after the previous stage as reference. https://arxiv.org/abs/2403.19270.

    Args:
        scores: as in DPO, whose loss this is. The stages are made by the training loop, see `stages` of Objective.
        beta: as in DPO.
        parts: number of stages.
        order: "given", or "easy_to_hard" to sort the train examples first, see `easiest_first` of Objective.
    """
    return dpo(scores, beta)


def sdpo_segment(scores: Scores, beta: float) -> LossOutput:
    """SDPO, -log sigmoid(sum over the turns t of a segment of beta [r(w_t|h_t^w) - r(l_t|h_t^l)]): https://arxiv.org/abs/2501.01821.

    Args:
        scores: as in DPO, but summed over the tokens of the segment's turns only; w_t and l_t are turns of chosen and rejected, h_t what
            precedes them. Other turns are only context.
        beta: as in DPO.
    """
    return dpo(scores, beta)


def f_dpo(scores: Scores, beta: float, divergence: str = "forward_kl", alpha: float = 0.5) -> LossOutput:
    """f-DPO, -log sigmoid(beta [f'(u_w) - f'(u_l)]), u = pi/pi_ref of the whole response: https://arxiv.org/abs/2309.16240.

    The divergence that the policy's distance from the reference is measured by takes the place of DPO's reverse KL. f' is less its value at
    u = 1, which does not change the loss, so that rewards beta f' start at 0.

    Args:
        scores: roles "chosen" and "rejected", with reference_logps.
        beta: as in DPO.
        divergence: "reverse_kl" (DPO), "forward_kl", "jensen_shannon" or "alpha".
        alpha: of the alpha-divergence, between 0 and 1: near 0 it is reverse KL, near 1 forward KL. The others do not use it.
    """
    slopes = {role: _divergence_slope(score.log_ratio, divergence, alpha) for role, score in scores.items()}
    logits = beta * (slopes["chosen"] - slopes["rejected"])
    return LossOutput(-F.logsigmoid(logits), {role: beta * slope.detach() for role, slope in slopes.items()}, logits.detach())


def _divergence_slope(log_ratio: torch.Tensor, divergence: str, alpha: float) -> torch.Tensor:
    """Return f'(u) - f'(1) for u = exp(log_ratio), without computing u, which overflows. Shape: (B,)"""
    if divergence == "reverse_kl":  # f' = log u + 1
        return log_ratio
    if divergence == "jensen_shannon":  # f' = log(2 u / (1 + u))
        return F.logsigmoid(log_ratio) + math.log(2)
    power = 1.0 if divergence == "forward_kl" else alpha  # f' = -1/u, or (1 - u^-alpha) / alpha
    return -_expm1(-power * log_ratio) / power


def _expm1(exponent: torch.Tensor) -> torch.Tensor:
    """Return exp(exponent) - 1, finite for every finite exponent, with a derivative of at most exp(STEEPEST).

    The derivative of exp at 100 is beyond float32, in which gradients of weights are computed: one response that the policy has all but
    given up would end the run. Steps are clipped by max_grad_norm, so a bounded derivative has the same effect.
    """
    largest = 0.9 * math.log(torch.finfo(exponent.dtype).max)
    bounded = torch.expm1(exponent.clamp(max=STEEPEST)) + math.exp(STEEPEST) * (exponent - STEEPEST).clamp(min=0)
    exact = torch.expm1(exponent.detach().clamp(max=largest))
    return torch.where(exponent > STEEPEST, bounded + (exact - bounded).detach(), bounded)


def _difference_of_log_ratios(scores: Scores) -> torch.Tensor:
    """Return D, shape (B,), nats."""
    return scores["chosen"].log_ratio - scores["rejected"].log_ratio


def _per_response(values: torch.Tensor, score: ResponseScores, average: bool) -> torch.Tensor:
    return values / score.num_tokens if average else values


def _target_loss(scores: Scores) -> torch.Tensor:
    """Return -log pi(y)/|y| of the response to imitate, the chosen one or a desirable completion; 0 for an undesirable one. Shape: (B,)"""
    if "completion" not in scores:
        return -_per_response(scores["chosen"].logps, scores["chosen"], average=True)
    score = scores["completion"]
    return -torch.where(score.annotation > 0.5, _per_response(score.logps, score, average=True), 0.0)


def _log_ratio_rewards(scores: Scores, beta: float) -> Mapping[str, torch.Tensor]:
    return {role: beta * score.log_ratio.detach() for role, score in scores.items()}


@dataclass(frozen=True)
class Objective:
    """A loss with its hyperparameters, and what it needs from data, scoring and the training loop. Call it with scores.

    Other code decides by these fields, never by the loss's name or its hyperparameters.
    """

    name: str
    function: Callable[..., LossOutput]
    roles: tuple[str, ...] = ("chosen", "rejected")  # the responses of an example
    needs_reference: bool = True
    needs_kl: bool = False
    needs_ratings: bool = False  # the data must rate both responses of a pair
    needs_kl_baseline: bool = False  # z0, computed over the global batch
    needs_segments: bool = False  # the data must mark the turns that are in the loss
    stages: int = 1  # of the train data; the policy replaces the reference after each stage but the last
    easiest_first: bool = False  # before training, sort the train examples by the policy's margin, largest first
    adds_sft_loss: bool = True  # takes the hyperparameter sft_weight, see __call__
    implicit_rewards: bool = True  # rewards compare the policy with the reference, so they start at 0
    fields_from: Callable[..., Mapping[str, object]] = lambda **_: {}  # returns the fields that depend on the hyperparameters
    ignored: tuple[str, ...] = ()  # keys of the config's `loss` that this loss does not use
    notes: tuple[str, ...] = ()  # lines to print about the chosen hyperparameters
    hyperparameters: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, scores: Scores) -> LossOutput:
        """Evaluate the loss: the function's, plus sft_weight times -log pi(y_w)/|y_w|, which RPO (https://arxiv.org/abs/2404.19733) and
        Llama 3 (https://arxiv.org/abs/2407.21783) add to DPO; with single responses y_w is a desirable one.

        Args:
            scores: by role, tensors of shape (B,).
        """
        values = dict(self.hyperparameters)
        weight = values.pop("sft_weight", 0.0) if self.adds_sft_loss else 0.0
        output = self.function(scores, **values)
        return replace(output, losses=output.losses + weight * _target_loss(scores)) if weight else output

    @property
    def parameters(self) -> list[str]:
        """The names of the hyperparameters that the loss takes."""
        return [*list(inspect.signature(self.function).parameters)[1:], *(["sft_weight"] if self.adds_sft_loss else [])]

    @property
    def reward_scale(self) -> Optional[float]:
        """beta, the factor from nats to rewards; None for a loss without beta."""
        parameter = inspect.signature(self.function).parameters.get("beta")
        default = None if parameter is None or parameter.default is parameter.empty else parameter.default
        return self.hyperparameters.get("beta", default)


# By name. A new objective also needs config/loss/<name>.yaml, and its hyperparameters' ranges in HYPERPARAMETERS of tdpo/cli/schema.py.
OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("sft", sft, roles=("chosen",), needs_reference=False, adds_sft_loss=False, implicit_rewards=False),
        Objective("dpo", dpo),
        Objective("ipo", ipo),
        Objective("tdpo1", tdpo1, needs_kl=True),
        Objective(
            "tdpo2",
            tdpo2,
            needs_kl=True,
            fields_from=lambda alpha=0.5, **_: {"notes": ("loss=tdpo2 with loss.alpha=0 is DPO",)} if alpha == 0 else {},
        ),
        Objective("rdpo", rdpo),
        Objective("dpop", dpop),
        Objective("simpo", simpo, needs_reference=False, implicit_rewards=False),
        Objective("odpo", odpo, needs_ratings=True, fields_from=lambda kl_weight=0.0, **_: {"needs_kl": kl_weight > 0}),
        Objective("slic", slic, roles=("chosen", "rejected", "target"), needs_reference=False, adds_sft_loss=False, implicit_rewards=False),
        Objective("kto", kto, roles=("completion",), fields_from=lambda z0="batch", **_: {"needs_kl_baseline": z0 == "batch"}),
        Objective(
            "sdpo_stepwise",
            sdpo_stepwise,
            fields_from=lambda parts=3, order="given", **_: {"stages": parts, "easiest_first": order == "easy_to_hard"},
        ),
        Objective("sdpo_segment", sdpo_segment, needs_segments=True),
        Objective(
            "f_dpo",
            f_dpo,
            fields_from=lambda divergence="forward_kl", alpha=0.5, **_: (
                {"notes": (f"loss.divergence={divergence}: loss.alpha has no effect",)} if divergence != "alpha" and alpha != 0.5 else {}
            ),
        ),
    )
}


def resolve(name: str, hyperparameters: Mapping) -> tuple[str, dict, tuple[str, ...]]:
    """Resolve a `loss` config to a name in OBJECTIVES, hyperparameters and ignored keys.

    The published name `tdpo` means TDPO2, or TDPO1 if `if_tdpo2` is false. TDPO1 ignores alpha. Both need the reference, so the
    published key `reference_free` must be false.

    Raises:
        KeyError: no objective has that name.
        ValueError: reference_free is set for TDPO.
    """
    values, ignored = dict(hyperparameters), ()
    if name == "tdpo":
        if values.pop("reference_free", False):
            raise ValueError("loss.reference_free=true: TDPO's SeqKL needs the reference; use loss=dpo")
        name = "tdpo2" if values.pop("if_tdpo2", True) else "tdpo1"
        if name == "tdpo1" and "alpha" in values:
            del values["alpha"]
            ignored = ("alpha",)
    if name not in OBJECTIVES:
        raise KeyError(name)
    return name, values, ignored


def get_objective(name: str, *, log_kl: bool = False, **hyperparameters) -> Objective:
    """Return an objective with its hyperparameters bound. Raises the errors of `resolve`.

    Args:
        name: a name in OBJECTIVES, or "tdpo", see `resolve`.
        log_kl: compute SeqKL, which needs the reference, even if the loss does not need it.
        hyperparameters: keyword arguments of the loss function, and sft_weight, see Objective.
    """
    name, values, ignored = resolve(name, hyperparameters)
    known = OBJECTIVES[name]
    bound = replace(known, **known.fields_from(**values), hyperparameters=values, ignored=ignored)
    return replace(bound, needs_reference=bound.needs_reference or log_kl, needs_kl=bound.needs_kl or log_kl)


def objective_of(loss: Mapping, log_kl: bool = False) -> Objective:
    """Return the objective of a config's `loss`, a mapping of `name` and hyperparameters."""
    values = dict(loss)
    return get_objective(values.pop("name"), log_kl=log_kl, **values)


# The published signatures, for forks that call them. The objectives above do the work.


def tdpo_loss(
    chosen_logps_margin: torch.Tensor,
    rejected_logps_margin: torch.Tensor,
    chosen_position_kl: torch.Tensor,
    rejected_position_kl: torch.Tensor,
    beta: float,
    alpha: float = 0.5,
    if_tdpo2: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the TDPO loss of a batch of pairs: https://arxiv.org/abs/2404.11999.

    Args:
        chosen_logps_margin: log-ratios r of the chosen responses, log pi - log pi_ref summed over tokens, nats. Shape: (B,)
        rejected_logps_margin: the same for the rejected responses. Shape: (B,)
        chosen_position_kl: SeqKL of the chosen responses, KL(pi_ref || pi) summed over positions, nats. Shape: (B,)
        rejected_position_kl: the same for the rejected responses. Shape: (B,)
        beta: strength of the implicit KL penalty, > 0; 0.1 to 0.5 is usual.
        alpha: weight of the difference of SeqKL in TDPO2, >= 0; TDPO1 ignores it.
        if_tdpo2: TDPO2 if true, else TDPO1.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each of shape (B,). Losses in nats; rewards are beta (r + SeqKL), detached.
    """
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
    """Compute the DPO, conservative DPO or IPO loss of a batch of pairs: see `dpo` and `ipo` for the papers.

    Args:
        policy_chosen_logps: log pi of the chosen responses, summed over tokens, nats. Shape: (B,)
        policy_rejected_logps: log pi of the rejected responses. Shape: (B,)
        reference_chosen_logps: log pi_ref of the chosen responses. Shape: (B,)
        reference_rejected_logps: log pi_ref of the rejected responses. Shape: (B,)
        beta: strength of the implicit KL penalty, > 0; tau of IPO.
        label_smoothing: of conservative DPO, the fraction of labels thought to be flipped, 0 <= e < 0.5; IPO ignores it.
        ipo: IPO if true, else DPO.
        reference_free: leave the reference out of the loss (a uniform reference); rewards still use it.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each of shape (B,). Rewards are beta (log pi - log pi_ref), detached.

    Raises:
        ValueError: both ipo and reference_free are true.
    """
    ones = torch.ones_like(policy_chosen_logps)
    scores = {
        "chosen": ResponseScores(policy_chosen_logps, ones, reference_chosen_logps),
        "rejected": ResponseScores(policy_rejected_logps, ones, reference_rejected_logps),
    }
    if ipo and reference_free:
        raise ValueError("ipo=True with reference_free=True: IPO needs the reference; use reference_free=False")
    if ipo:
        return _published_tuple(get_objective("ipo", beta=beta)(scores))
    return _published_tuple(dpo(scores, beta, label_smoothing, reference_free))


def _scores_of_ratio(log_ratio: torch.Tensor, kl: torch.Tensor) -> ResponseScores:
    return ResponseScores(log_ratio, torch.ones_like(log_ratio), torch.zeros_like(log_ratio), kl)


def _published_tuple(output: LossOutput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return output.losses, output.rewards["chosen"], output.rewards["rejected"]
