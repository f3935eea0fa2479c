"""Write the tables and figure of a frontier experiment: results.json, table.md and frontier.png in its folder.

python experiments/frontier/report.py runs/frontier-reviews
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple, Optional

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.intervals import interval  # noqa: E402
from experiments.jobs import slug  # noqa: E402

LEVELS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # expected rewards at which KL is compared
REWARD, KL = "samples/reward", "samples/kl"
STEPS = (("seqkl/chosen", "SeqKL of chosen"), ("seqkl/rejected", "SeqKL of rejected"), ("seqkl/margin", "SeqKL margin, chosen - rejected"))


class Run(NamedTuple):
    """A run and its measurements."""

    method: str
    seed: int
    beta: float
    lr: float
    points: list[dict]  # measures of the SFT model, then of each checkpoint in order


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables and figure of a frontier experiment.")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    task = OmegaConf.load(arguments.folder / "task.yaml")
    runs = read_runs(arguments.folder, list(task.methods))
    if not runs:
        sys.exit(f"error: '{arguments.folder}' has no measured runs")
    methods = [method for method in task.methods if any(run.method == method for run in runs)]
    spent = {method: kl_at_levels([run for run in runs if run.method == method]) for method in methods}
    ratios = {method: ratio_to(spent["DPO"], spent[method]) for method in methods if "DPO" in methods and method != "DPO"}
    results = {"runs": len(runs), "kl_at_reward": spent, "kl_over_dpo": ratios, "best_reward": best_rewards(runs)}
    (arguments.folder / "results.json").write_text(json.dumps(results, indent=1))
    table = "\n\n".join([kl_table(spent), ratio_table(ratios), final_table(runs, task)])
    (arguments.folder / "table.md").write_text(table + "\n")
    draw(runs, methods, task.shown, arguments.folder / "frontier.png")
    print(table)


def read_runs(folder: Path, methods: list[str]) -> list[Run]:
    """Read the measured runs of the methods."""
    runs = []
    for method in methods:
        for file in sorted(folder.glob(f"{slug(method)}/*/measured.json")):
            content = json.loads(file.read_text())
            runs.append(Run(method, content["seed"], content["beta"], content["lr"], content["points"]))
    return runs


def least_kl(runs: list[Run], level: float) -> Optional[float]:
    """Return the lowest KL (nats) at which one of the runs reaches a reward, interpolated between its points; None if none does."""
    found = [run.points[0][KL] for run in runs if run.points[0][REWARD] >= level]
    for run in runs:
        for before, after in zip(run.points, run.points[1:]):
            low, high = before[REWARD], after[REWARD]
            if low < level <= high:
                share = (level - low) / (high - low)
                found.append(before[KL] + share * (after[KL] - before[KL]))
    return min(found, default=None)


def kl_at_levels(runs: list[Run]) -> dict[str, dict[int, Optional[float]]]:
    """Return level -> seed -> lowest KL over all betas, learning rates and steps of a method (its best envelope)."""
    seeds = sorted({run.seed for run in runs})
    return {str(level): {seed: least_kl([run for run in runs if run.seed == seed], level) for seed in seeds} for level in LEVELS}


def ratio_to(base: dict, other: dict) -> dict[str, Optional[dict]]:
    """Return level -> ratio of the other method's KL to the base's: mean over seeds and Student's 95% interval.

    The ratio is taken seed by seed. Seeds that do not reach the reward, or whose SFT model already has it (the base's KL is 0), are left
    out; None if fewer than two remain.

    Args:
        base, other: output of `kl_at_levels`.
    """
    result = {}
    for level, by_seed in other.items():
        ratios = [kl / base[level][seed] for seed, kl in by_seed.items() if kl is not None and base[level].get(seed)]
        result[level] = {**interval(ratios), "seeds": len(ratios)} if len(ratios) > 1 else None
    return result


def best_rewards(runs: list[Run]) -> dict[str, dict[int, float]]:
    """Return method -> seed -> highest reward measured."""
    best: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        best[run.method][run.seed] = max(best[run.method].get(run.seed, 0.0), *(point[REWARD] for point in run.points))
    return best


def kl_table(spent: dict) -> str:
    """Format method -> output of `kl_at_levels` as a Markdown table: mean and standard deviation over seeds."""
    lines = [
        "KL(pi \\|\\| pi_ref) per response, nats, at which a method's best envelope reaches an expected reward: mean ± standard deviation"
    ]
    lines[0] += " over seeds (in brackets the number of seeds that reach it, if not all):"
    lines += ["", f"| reward | {' | '.join(spent)} |", "|---|" + "---:|" * len(spent)]
    for level in map(str, LEVELS):
        cells = []
        for by_seed in (levels[level] for levels in spent.values()):
            values = [kl for kl in by_seed.values() if kl is not None]
            missing = "" if len(values) == len(by_seed) else f" ({len(values)})"
            deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{deviation}{missing}" if values else "never")
        lines.append(f"| {level} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio_table(ratios: dict) -> str:
    """Format method -> output of `ratio_to` as a Markdown table."""
    lines = ["The same KL divided by DPO's for the same seed: mean and Student's 95% interval over seeds:"]
    lines += ["", f"| reward | {' | '.join(ratios)} |", "|---|" + "---:|" * len(ratios)]
    for level in map(str, LEVELS):
        cells = (levels[level] for levels in ratios.values())
        shown = ["-" if cell is None else f"{cell['mean']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]" for cell in cells]
        lines.append(f"| {level} | {' | '.join(shown)} |")
    return "\n".join(lines)


def final_table(runs: list[Run], task) -> str:
    """Format the measures at the end of the runs with the task's `shown` setting as a Markdown table."""
    shown = task.shown
    lines = [f"At the end of the runs with beta {shown.beta} and learning rate {shown.lr}: mean ± standard deviation over seeds:"]
    names = {REWARD: "reward", KL: "KL", **{key: title for key, title in STEPS}, "accuracy/logratio": "accuracy, log-ratio"}
    lines += ["", f"| | {' | '.join(names.values())} |", "|---|" + "---:|" * len(names)]
    for method in task.methods:
        ends = [run.points[-1] for run in runs_shown(runs, method, shown)]
        if ends:
            cells = [
                f"{np.mean(v):.3f} ± {np.std(v, ddof=1) if len(v) > 1 else math.nan:.3f}" for v in ([e[k] for e in ends] for k in names)
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs_shown(runs: list[Run], method: str, shown) -> list[Run]:
    """Return a method's runs with the beta and learning rate of `shown`."""
    return [run for run in runs if run.method == method and run.beta == shown.beta and run.lr == shown.lr]


def draw(runs: list[Run], methods: list[str], shown, file: Path) -> None:
    """Draw four panels: reward against KL with each method's envelope; SeqKL of chosen, of rejected, and their margin during training."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5))
    for i, method in enumerate(methods):
        own = [run for run in runs if run.method == method]
        points = [(point[KL], point[REWARD]) for run in own for point in run.points]
        axes[0, 0].scatter(*zip(*points), s=6, alpha=0.25, color=f"C{i}", linewidths=0)
        envelope = sorted(points)
        best = np.maximum.accumulate([reward for _, reward in envelope])
        axes[0, 0].step([kl for kl, _ in envelope], best, where="post", color=f"C{i}", label=method)
        for axis, (key, _) in zip(axes.flat[1:], STEPS):
            own = runs_shown(runs, method, shown)
            if own:
                # Only checkpoints that all seeds have: an interrupted run has an additional one.
                examples = sorted(set.intersection(*({point["examples"] for point in run.points} for run in own)))
                curves = [[point[key] for point in run.points if point["examples"] in examples] for run in own]
                mean, spread = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=min(1, len(own) - 1))
                axis.plot(examples, mean, color=f"C{i}", label=method, marker="o", markersize=3)
                axis.fill_between(examples, mean - spread, mean + spread, color=f"C{i}", alpha=0.15, linewidth=0)
    axes[0, 0].set(xscale="symlog", xlabel="KL(pi || pi_ref), nats per response", ylabel="expected reward", title="reward and KL, all runs")
    axes[0, 0].legend(fontsize=8)
    for axis, (_, title) in zip(axes.flat[1:], STEPS):
        axis.set(xlabel="train examples", ylabel="nats", title=f"{title} (beta {shown.beta}, lr {shown.lr})")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
