"""What a run's own numbers say to the questions that are asked most of preference training, in words."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

from tdpo.training.metrics import start_difference

# Where a finding begins; the sentences state them.
SANE = 1e-3  # nats, at the first step
FALL = 1.0  # nats that the log-probability of chosen falls
PART = 0.05  # accuracy lost since its best, while the margin grew
RUNAWAY = 1.5  # SeqKL at the end over that at three quarters of the run
HIGH_KL = 10.0  # nats a response, below which growth is no concern


class Finding(NamedTuple):
    """One answer."""

    concern: bool  # whether to look at it; else all is as it should be
    text: str


class Curve(NamedTuple):
    """Of one metric."""

    examples: list[int]
    values: list[float]

    def at(self, examples: float) -> float:
        """The last value logged by then; the first one before."""
        return next((value for x, value in zip(reversed(self.examples), reversed(self.values)) if x <= examples), self.values[0])


def findings(logs: Sequence[Mapping], implicit_rewards: bool = True) -> list[Finding]:
    """Answers for a run, of its evals: train steps are each of other pairs, and say more about these than about the policy.

    Args:
        logs: of metrics.jsonl.
        implicit_rewards: whether the loss's rewards compare with the reference.
    """
    evals = [log for log in logs if log["split"] == "eval"]
    answers = [_finite(logs), _start(logs) if implicit_rewards else None]
    if len(evals) > 1:
        answers += [_chosen(evals), _overoptimization(evals), _runaway(evals)]
    return [answer for answer in answers if answer is not None]


def _curve(evals: Sequence[Mapping], name: str) -> Optional[Curve]:
    points = [(log["counters/examples"], log[name]) for log in evals if log.get(name) is not None]
    return Curve([x for x, _ in points], [y for _, y in points]) if points else None


def _finite(logs: Sequence[Mapping]) -> Optional[Finding]:
    """JSON has null for what is not finite."""
    places = [(name, log["counters/examples"]) for log in logs for name, value in log.items() if value is None]
    if not places:
        return None
    name, examples = places[0]
    return Finding(True, f"{len(places)} logged values are not finite, the first is {name} after {examples:,} examples.")


def _start(logs: Sequence[Mapping]) -> Optional[Finding]:
    """At the first step policy and reference are the same."""
    first = next((log for log in logs if "rewards_train/chosen" in log and log.get("counters/updates") == 1), None)
    if first is None:
        first = next((log for log in logs if "rewards_eval/chosen" in log and log["counters/examples"] == 0), None)
    if first is None:
        return None
    worst = start_difference(first, first["split"])
    if worst == math.inf:
        return Finding(True, "At the start rewards or SeqKL are not finite.")
    if worst > SANE:
        cause = "policy and reference differ in dtype or weights"
        return Finding(True, f"At the start rewards or SeqKL are {worst:.3g}, not 0 (to {SANE:g}): {cause}.")
    return Finding(False, f"The start is sane: rewards and SeqKL are 0 (to {SANE:g}), so policy and reference are the same model.")


def _chosen(evals: Sequence[Mapping]) -> Optional[Finding]:
    chosen, rejected = _curve(evals, "logps_eval/chosen"), _curve(evals, "logps_eval/rejected")
    if chosen is None or rejected is None:
        return None
    change, other = (x.values[-1] - x.values[0] for x in (chosen, rejected))
    both = f"log-probability of chosen {change:+.1f} nats, of rejected {other:+.1f}; the limit is {-FALL:+g}"
    if change >= -FALL:
        return Finding(False, f"Chosen responses do not get less likely ({both}).")
    if other < change:
        return Finding(False, f"Chosen responses get less likely ({both}): usual for these losses, which train the difference alone.")
    return Finding(True, f"Chosen responses get less likely, and rejected ones do not fall further ({both}).")


def _overoptimization(evals: Sequence[Mapping]) -> Optional[Finding]:
    accuracy, margin = _curve(evals, "rewards_eval/accuracies"), _curve(evals, "rewards_eval/margins")
    if accuracy is None or margin is None or len(accuracy.values) < 2:
        return None
    best = max(range(len(accuracy.values)), key=accuracy.values.__getitem__)
    lost, grown = accuracy.values[best] - accuracy.values[-1], margin.values[-1] - margin.at(accuracy.examples[best])
    numbers = f"accuracy {accuracy.values[best]:.3f} at its best, after {accuracy.examples[best]:,} examples, "
    numbers += f"{accuracy.values[-1]:.3f} at the end; the limit is a loss of {PART:g}"
    if lost > PART and grown > 0:
        return Finding(True, f"Reward and accuracy part ({numbers}), while the margin grew by {grown:.2f}: over-optimized.")
    return Finding(False, f"Reward and accuracy do not part ({numbers}).")


def _runaway(evals: Sequence[Mapping]) -> Optional[Finding]:
    curves = {role: found for role in ("chosen", "rejected") if (found := _curve(evals, f"kl_eval/{role}")) is not None}
    if not curves:
        return None
    role, worst = max(curves.items(), key=lambda item: item[1].values[-1])
    end, before = worst.values[-1], worst.at(0.75 * worst.examples[-1])
    numbers = f"SeqKL of {role} {before:.1f} nats at three quarters of the run, {end:.1f} at its end; "
    numbers += f"the limits are {HIGH_KL:g} nats and {RUNAWAY:g} times"
    if end > HIGH_KL and end > RUNAWAY * before:
        return Finding(True, f"KL runs away ({numbers}): a larger alpha or beta, or a smaller lr.")
    return Finding(False, f"KL does not run away ({numbers}).")
