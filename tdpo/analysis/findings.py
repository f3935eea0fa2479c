"""Findings about a run, in words: answers from its logs to the questions most often asked about preference training."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

from tdpo.training.limits import Best, reason_to_stop
from tdpo.training.metrics import start_difference

# Thresholds. Each finding states those that it uses.
SANE = 1e-3  # largest |reward| or SeqKL (nats) at the start
FALL = 1.0  # nats by which the log-probability of chosen responses may fall
PART = 0.05  # accuracy that may be lost since the best eval while the margin grows
RUNAWAY = 1.5  # SeqKL at the end / SeqKL after three quarters of the run
HIGH_KL = 10.0  # nats per response; SeqKL below it is no concern, however fast it grows


class Finding(NamedTuple):
    """One statement about a run."""

    concern: bool  # whether it needs attention; False: all is as expected
    text: str


class Curve(NamedTuple):
    """The values of one metric over the evals of a run."""

    examples: list[int]
    values: list[float]

    def at(self, examples: float) -> float:
        """Return the last value logged at or before `examples`; the first value if there is none."""
        return next((value for x, value in zip(reversed(self.examples), reversed(self.values)) if x <= examples), self.values[0])


def findings(logs: Sequence[Mapping], implicit_rewards: bool = True, config: Optional[Mapping] = None) -> list[Finding]:
    """Return the findings about a run.

    Trends are taken from the evals, which all use the same pairs. Each train step has other pairs, so its values vary with them.

    Args:
        logs: lines of metrics.jsonl.
        implicit_rewards: whether the rewards of the loss compare with the reference, and so are 0 at the start.
        config: of the run, of which keep_best and stop_when are read; None: neither was set.
    """
    evals = [log for log in logs if log["split"] == "eval"]
    answers = [_finite(logs), _start(logs) if implicit_rewards else None, *_limits(evals, config or {})]
    if len(evals) > 1:
        answers += [_chosen(evals), _overoptimization(evals), _runaway(evals)]
    return [answer for answer in answers if answer is not None]


def _curve(evals: Sequence[Mapping], name: str) -> Optional[Curve]:
    points = [(log["counters/examples"], log[name]) for log in evals if log.get(name) is not None]
    return Curve([x for x, _ in points], [y for _, y in points]) if points else None


def _finite(logs: Sequence[Mapping]) -> Optional[Finding]:
    """Count the values that are not finite, which the JSON logs hold as null."""
    places = [(name, log["counters/examples"]) for log in logs for name, value in log.items() if value is None]
    if not places:
        return None
    name, examples = places[0]
    return Finding(True, f"{len(places)} logged values are NaN or infinite, first {name} after {examples:,} examples; curves omit them.")


def _start(logs: Sequence[Mapping]) -> Optional[Finding]:
    """Check that policy and reference are the same model at the start: first train step, else an eval before it."""
    first = next((log for log in logs if "rewards_train/chosen" in log and log.get("counters/updates") == 1), None)
    if first is None:
        first = next((log for log in logs if "rewards_eval/chosen" in log and log["counters/examples"] == 0), None)
    if first is None:
        return None
    worst = start_difference(first, first["split"])
    if worst == math.inf:
        return Finding(True, "At the start, rewards or SeqKL are NaN or infinite: check weights and dtype of policy and reference.")
    if worst > SANE:
        cause = "policy and reference differ in weights or dtype"
        return Finding(True, f"At the start, rewards or SeqKL reach {worst:.3g} instead of 0 (tolerance {SANE:g}): {cause}.")
    return Finding(
        False, f"At the start, rewards and SeqKL are 0 (tolerance {SANE:g}), as they should be: policy and reference are the same model."
    )


def _limits(evals: Sequence[Mapping], config: Mapping) -> list[Finding]:
    """Say which eval was the best, and whether the last one ended the run."""
    best, found = Best.of(config), []
    for log in evals:
        if best is not None and log["counters/examples"] > 0:
            best.see(log, log["counters/examples"])
    if best is not None and best.value is not None:
        found.append(Finding(False, f"The best eval by {best.metric} ({best.mode}): {best.value:.4g}, after {best.examples:,} examples."))
    if evals and (reason := reason_to_stop(config.get("stop_when") or {}, evals[-1], best)):
        found.append(Finding(False, f"The run reached stop_when after {evals[-1]['counters/examples']:,} examples: {reason}."))
    return found


def _chosen(evals: Sequence[Mapping]) -> Optional[Finding]:
    chosen, rejected = _curve(evals, "logps_eval/chosen"), _curve(evals, "logps_eval/rejected")
    if chosen is None or rejected is None:
        return None
    change, other = (x.values[-1] - x.values[0] for x in (chosen, rejected))
    both = f"log-probability from first to last eval: chosen {change:+.1f} nats, rejected {other:+.1f}; threshold for chosen {-FALL:+g}"
    if change >= -FALL:
        return Finding(False, f"Chosen responses did not become less likely ({both}).")
    if other < change:
        return Finding(
            False, f"Chosen responses became less likely, but rejected ones fell further ({both}): common, as the loss trains the margin."
        )
    return Finding(True, f"Chosen responses became less likely, and rejected ones did not fall further ({both}): the margin did not grow.")


def _overoptimization(evals: Sequence[Mapping]) -> Optional[Finding]:
    accuracy, margin = _curve(evals, "rewards_eval/accuracies"), _curve(evals, "rewards_eval/margins")
    if accuracy is None or margin is None or len(accuracy.values) < 2:
        return None
    best = max(range(len(accuracy.values)), key=accuracy.values.__getitem__)
    lost, grown = accuracy.values[best] - accuracy.values[-1], margin.values[-1] - margin.at(accuracy.examples[best])
    numbers = f"{accuracy.values[best]:.3f} at its best, after {accuracy.examples[best]:,} examples, "
    numbers += f"{accuracy.values[-1]:.3f} at the last eval; threshold: a fall of {PART:g}"
    if lost > PART and grown > 0:
        return Finding(True, f"Sign of over-optimization: reward accuracy fell ({numbers}), while the reward margin grew by {grown:.2f}.")
    return Finding(
        False, f"No sign of over-optimization: reward accuracy did not fall beyond the threshold while the margin grew ({numbers})."
    )


def _runaway(evals: Sequence[Mapping]) -> Optional[Finding]:
    curves = {role: found for role in ("chosen", "rejected") if (found := _curve(evals, f"kl_eval/{role}")) is not None}
    if not curves:
        return None
    role, worst = max(curves.items(), key=lambda item: item[1].values[-1])
    end, before = worst.values[-1], worst.at(0.75 * worst.examples[-1])
    numbers = f"{role} responses: {before:.1f} nats after three quarters of the run, {end:.1f} at its end; "
    numbers += f"thresholds: {HIGH_KL:g} nats and a factor of {RUNAWAY:g}"
    if end > HIGH_KL and end > RUNAWAY * before:
        return Finding(
            True,
            f"SeqKL rose sharply ({numbers}): the policy drifts from the reference. Try a larger beta (TDPO2: or alpha), or a smaller lr.",
        )
    return Finding(False, f"SeqKL did not rise sharply ({numbers}).")
