"""The tables of a frontier experiment, composed from results.json alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

REWARD, KL, PERPLEXITY = "samples/reward", "samples/kl", "samples/reference_perplexity"
STEPS = {"seqkl/chosen": "SeqKL of chosen", "seqkl/rejected": "SeqKL of rejected", "seqkl/margin": "SeqKL margin, chosen - rejected"}
RATIOS = {"logratio/chosen": "r of chosen", "logratio/rejected": "r of rejected"}
FINAL = {REWARD: "reward", KL: "KL", **STEPS, **RATIOS, "accuracy/logratio": "accuracy, log-ratio"}
SAMPLES = {
    REWARD: "reward",
    KL: "KL",
    "samples/distinct_1": "distinct-1",
    "samples/distinct_2": "distinct-2",
    "samples/tokens": "tokens",
    PERPLEXITY: "perplexity by pi_ref",
    "texts/distinct_2": "distinct-2 of all texts",
    "texts/repeated_words": "words repeated in a text",
}
PREVIOUS = "that of the method before it in the table above"
GRID = (REWARD, KL, "samples/distinct_2")


def tables(results: Mapping[str, Any]) -> list[str]:
    """Return the Markdown tables of results.json."""
    found = [kl_table(results), ratio_table(results["kl_over_dpo"], "DPO's"), ratio_table(results["kl_over_previous"], PREVIOUS)]
    found += [final_table(results), samples_table(results)]
    found += [difference_table(results["minus_start"], "the reference's"), difference_table(results["minus_dpo"], "DPO's")]
    return found + ([grid_table(results)] if len(results["grid"]) > 1 else [])


def kl_table(results: Mapping) -> str:
    """Return the KL at each reward: mean and standard deviation over seeds."""
    spent = results["kl_at_reward_over_seeds"]
    title = "KL(pi \\|\\| pi_ref) per response, nats, at which a method's best envelope reaches an expected reward: mean ± standard "
    title += "deviation over seeds (in brackets the number of seeds that reach it, if not all):"
    rows = {}
    for level in next(iter(spent.values())):
        rows[level] = []
        for found in (levels[level] for levels in spent.values()):
            missing = "" if found["n"] == found["of"] else f" ({found['n']})"
            deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.2f}"
            rows[level].append(f"{found['mean']:.2f}{deviation}{missing}" if found["n"] else "never")
    return markdown(title, "reward", list(spent), rows)


def ratio_table(ratios: Mapping[str, Mapping], base: str) -> str:
    """Return the KL divided by that of another method.

    Args:
        ratios: method -> level -> output of `ratio_to`.
        base: whose KL has divided it.
    """
    title = f"The same KL divided by {base} for the same seed: mean and Student's 95% interval over seeds "
    title += "(in brackets their number, if not all):"
    rows = {level: [ratio(levels[level]) for levels in ratios.values()] for level in next(iter(ratios.values()), ())}
    return markdown(title, "reward", list(ratios), rows)


def ratio(found: Optional[Mapping]) -> str:
    """Format a ratio with its interval and, if some seeds are missing, the number of those that it has."""
    if found is None:
        return "-"
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" + (
        f" ({found['seeds']})" if found["seeds"] < found["of"] else ""
    )


def final_table(results: Mapping) -> str:
    """Return the measures at the end of the runs with the task's `shown` setting."""
    shown = results["shown"]
    title = f"At the end of the runs with beta {shown['beta']} and learning rate {shown['lr']}; SeqKL, r = log pi - log pi_ref (nats) and "
    title += "accuracy on held-out pairs; mean ± standard deviation over seeds:"
    rows = {method: [with_deviation(measures.get(name)) for name in FINAL] for method, measures in results["end"].items()}
    return markdown(title, "", list(FINAL.values()), rows)


def samples_table(results: Mapping) -> str:
    """Return the measures of the responses that are sampled at the end of the same runs."""
    sizes = f"{results['prompts']} held-out prompts with {results['responses_a_prompt']} responses each"
    title = f"The responses at the end of the same runs ({sizes}): mean and Student's 95% interval over seeds:"
    some = {"reference": results["start"], **results["end"]}
    rows = {name: [with_interval(measures.get(measure)) for measure in SAMPLES] for name, measures in some.items()}
    return markdown(title, "", list(SAMPLES.values()), rows)


def difference_table(differences: Mapping, base: str) -> str:
    """Return differences at the end of the same runs, of which those whose interval contains 0 are ties.

    Args:
        differences: method -> measure -> output of `over_seeds`.
        base: what has been subtracted.
    """
    title = f"Measures at the end of the same runs, minus {base} for the same seed; a difference whose interval contains 0 is a tie:"
    names = {**SAMPLES, "seqkl/margin": "SeqKL margin", **RATIOS}
    rows = {}
    for method, measures in differences.items():
        rows[method] = [with_interval(found := measures.get(name)) + (", tie" if is_tie(found) else "") for name in names]
    return markdown(title, "", list(names.values()), rows)


def is_tie(found: Optional[Mapping]) -> bool:
    """Whether the interval of a difference contains 0."""
    return found is not None and found["low"] is not None and found["low"] <= 0 <= found["high"]


def grid_table(results: Mapping) -> str:
    """Return reward and KL at the end of the runs with every setting of the grid."""
    title = "Reward at KL(pi \\|\\| pi_ref), and distinct-2, at the end of the runs with each setting: means over seeds:"
    methods = list(results["end"])
    rows = {}
    for setting, by_method in results["grid"].items():
        found = [by_method.get(method) for method in methods]
        rows[setting] = ["-" if one is None else "{:.3f} at {:.2f}, {:.3f}".format(*(one[name]["mean"] for name in GRID)) for one in found]
    return markdown(title, "beta, learning rate", methods, rows)


def with_deviation(found: Optional[Mapping]) -> str:
    """Format an output of `over_seeds` with its standard deviation."""
    if found is None or found["mean"] is None:
        return "-"
    return f"{found['mean']:.3f} ± {math.nan if found['deviation'] is None else found['deviation']:.3f}"


def with_interval(found: Optional[Mapping]) -> str:
    """Format an output of `over_seeds` with its interval; '-' if there is none."""
    if found is None or found["mean"] is None:
        return "-"
    digits = 1 if abs(found["mean"]) >= 10 else 3
    limits = "" if found["low"] is None else f" [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
    return f"{found['mean']:.{digits}f}{limits}"


def markdown(title: str, corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Return a table under a line of text."""
    lines = [title, "", f"| {corner} | {' | '.join(columns)} |".replace("|  |", "| |"), "|---|" + "---:|" * len(columns)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])
