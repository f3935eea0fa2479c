"""Write the tables and figure of a frontier experiment into its folder.

    python experiments/frontier/report.py runs/frontier-reviews

results.json has every number of the tables with seeds, number of seeds, mean and 95% interval; table.md is composed from it alone;
frontier.png has four panels; samples.md has the responses of the final policies with the highest and the lowest rewards, to be read.
"""

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.frontier.tables import GRID, KL, PERPLEXITY, REWARD, STEPS, tables  # noqa: E402
from experiments.intervals import interval  # noqa: E402
from experiments.jobs import slug  # noqa: E402

EXTREMES = 20  # responses at each end in samples.md


class Run(NamedTuple):
    """A run and its measurements."""

    method: str
    seed: int
    beta: float
    lr: float
    points: list[dict]  # measures of the reference, then of each checkpoint in order
    folder: Path = Path()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables and figure of a frontier experiment.")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    task = OmegaConf.load(arguments.folder / "task.yaml")
    runs = read_runs(arguments.folder, list(task.methods))
    if not runs:
        sys.exit(f"error: '{arguments.folder}' has no measured runs")
    methods = [method for method in task.methods if any(run.method == method for run in runs)]
    results = json.loads(json.dumps(results_of(runs, methods, task)))  # as they are read from the file: seeds are strings
    (arguments.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    table = "\n\n".join(tables(results))
    (arguments.folder / "table.md").write_text(table + "\n")
    draw(runs, methods, task.shown, arguments.folder / "frontier.png")
    write_extremes(arguments.folder, runs, methods, task.shown)
    print(table)


def results_of(runs: list[Run], methods: list[str], task: DictConfig) -> dict:
    """Return all numbers of the experiment, JSON-serializable.

    Args:
        runs: the measured runs.
        methods: those that have runs.
        task: the experiment's.
    """
    spent, settings = (
        {method: at_levels([run for run in runs if run.method == method], task.levels, measure) for method in methods}
        for measure in (least_kl, best_setting)
    )
    ends = {method: at_point(runs_shown(runs, method, task.shown), -1) for method in methods}
    starts = list({run.seed: run for run in runs}.values())
    return {
        "runs": len(runs),
        "seeds": sorted({run.seed for run in runs}),
        "prompts": task.n_prompts,
        "responses_a_prompt": task.n,
        "shown": {"beta": task.shown.beta, "lr": task.shown.lr},
        "kl_at_reward": spent,
        "kl_at_reward_over_seeds": {method: {x: over_seeds(by_seed) for x, by_seed in levels.items()} for method, levels in spent.items()},
        "kl_over_dpo": {method: ratio_to(spent["DPO"], spent[method]) for method in methods if "DPO" in methods and method != "DPO"},
        "kl_over_previous": {after: ratio_to(spent[before], spent[after]) for before, after in itertools.pairwise(methods)},
        "best_setting": settings,
        "best_reward": best_rewards(runs),
        "start": by_measure(at_point(starts, 0)),
        "end": {method: by_measure(own) for method, own in ends.items() if own},
        "minus_start": {method: differences(own, at_point(starts, 0)) for method, own in ends.items() if own},
        "minus_dpo": {method: differences(own, ends.get("DPO", {})) for method, own in ends.items() if own and method != "DPO"},
        "grid": grid_of(runs, methods),
    }


def over_seeds(by_seed: Mapping[int, Optional[float]]) -> dict[str, Any]:
    """Return the seeds that have a value, their number n, mean, standard deviation and Student's 95% interval; None where undefined.

    Args:
        by_seed: seed -> value or None.
    """
    found = {seed: value for seed, value in by_seed.items() if value is not None}
    values = list(found.values())
    several = {**interval(values), "deviation": float(np.std(values, ddof=1))} if len(values) > 1 else {}
    nothing = dict.fromkeys(("low", "high", "deviation"))
    mean = float(np.mean(values)) if values else None
    return {"seeds": sorted(found), "n": len(values), "of": len(by_seed), "mean": mean, **nothing, **several}


def by_measure(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, dict]:
    """Return measure -> output of `over_seeds`.

    Args:
        by_seed: seed -> measures.
    """
    names = dict.fromkeys(name for measures in by_seed.values() for name in measures)
    return {name: over_seeds({seed: measures.get(name) for seed, measures in by_seed.items()}) for name in names}


def differences(by_seed: Mapping[int, Mapping[str, float]], base: Mapping[int, Mapping[str, float]]) -> dict[str, dict]:
    """Return measure -> output of `over_seeds` for the difference from other measures, seed by seed.

    Args:
        by_seed, base: seed -> measures; seeds that only one of them has are left out.
    """
    seeds = sorted(by_seed.keys() & base.keys())
    return by_measure({seed: {name: value - base[seed][name] for name, value in by_seed[seed].items()} for seed in seeds})


def at_point(runs: list[Run], point: int) -> dict[int, dict[str, float]]:
    """Return seed -> measures at one point of the runs.

    Args:
        runs: one per seed.
        point: 0: the reference; -1: the end.
    """
    points = {run.seed: with_perplexity(run.points[point]) for run in runs}
    return {seed: {name: value for name, value in measures.items() if name != "examples"} for seed, measures in points.items()}


def grid_of(runs: list[Run], methods: Sequence[str]) -> dict[str, dict]:
    """Return setting -> method -> measure of the grid's table -> output of `over_seeds` at the end."""
    grid: dict[str, dict] = {}
    for setting in dict.fromkeys(setting_of(run) for run in sorted(runs, key=lambda run: (run.beta, run.lr))):
        own = {method: [run for run in runs if (run.method, setting_of(run)) == (method, setting)] for method in methods}
        ends = {method: by_measure(at_point(some, -1)) for method, some in own.items() if some}
        grid[setting] = {method: {name: measures[name] for name in GRID} for method, measures in ends.items()}
    return grid


def setting_of(run: Run) -> str:
    """Return beta and learning rate of a run as text."""
    return f"{run.beta:g}, {run.lr:g}"


def with_perplexity(point: Mapping[str, float]) -> dict[str, float]:
    """Return a point with the reference's perplexity of the samples, if their likelihood has been measured."""
    nll = point.get("samples/reference_nll")
    return {**point, **({} if nll is None else {PERPLEXITY: math.exp(nll)})}


def read_runs(folder: Path, methods: list[str]) -> list[Run]:
    """Read the measured runs of the methods."""
    runs = []
    for method in methods:
        for file in sorted(folder.glob(f"{slug(method)}/*/measured.json")):
            content = json.loads(file.read_text())
            runs.append(Run(method, content["seed"], content["beta"], content["lr"], content["points"], file.parent))
    return runs


def least_kl(runs: list[Run], level: float) -> Optional[float]:
    """Return the lowest KL (nats) at which one of the runs reaches a reward, None if none does.

    Between two points the reward is taken as linear in the square root of KL, as it is for small moves (Gao et al. 2023, arXiv 2210.10760,
    fit rewards in it). Linear in KL, a method whose first point is further away would seem to need more of it on the same curve.
    """
    found = [run.points[0][KL] for run in runs if run.points[0][REWARD] >= level]
    for run in runs:
        for before, after in zip(run.points, run.points[1:]):
            low, high = before[REWARD], after[REWARD]
            if low < level <= high:
                share = (level - low) / (high - low)
                found.append(((1 - share) * before[KL] ** 0.5 + share * after[KL] ** 0.5) ** 2)
    return min(found, default=None)


def best_setting(runs: list[Run], level: float) -> Optional[str]:
    """Return the setting of the run that reaches a reward at the lowest KL, None if none does."""
    reached = [(kl, setting_of(run)) for run in runs if (kl := least_kl([run], level)) is not None]
    return min(reached)[1] if reached else None


def at_levels(runs: list[Run], levels: Sequence[float], measure: Callable[[list[Run], float], Any]) -> dict[str, dict[int, Any]]:
    """Return level -> seed -> a measure of the seed's runs with all betas and learning rates, such as `least_kl` (the best envelope)."""
    seeds = sorted({run.seed for run in runs})
    return {str(level): {seed: measure([run for run in runs if run.seed == seed], level) for seed in seeds} for level in levels}


def ratio_to(base: dict, other: dict) -> dict[str, Optional[dict]]:
    """Return level -> ratio of a method's KL to that of another one, the base: mean over seeds and Student's 95% interval.

    The ratio is taken seed by seed. Seeds that do not reach the reward, or whose SFT model already has it (the base's KL is 0), are left
    out; None if fewer than two remain.

    Args:
        base, other: output of `at_levels` with `least_kl`.
    """
    result = {}
    for level, by_seed in other.items():
        ratios = [kl / base[level][seed] for seed, kl in by_seed.items() if kl is not None and base[level].get(seed)]
        result[level] = {**interval(ratios), "seeds": len(ratios), "of": len(by_seed)} if len(ratios) > 1 else None
    return result


def best_rewards(runs: list[Run]) -> dict[str, dict[int, float]]:
    """Return method -> seed -> highest reward measured."""
    best: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        best[run.method][run.seed] = max(best[run.method].get(run.seed, 0.0), *(point[REWARD] for point in run.points))
    return best


def write_extremes(folder: Path, runs: list[Run], methods: list[str], shown: DictConfig) -> None:
    """Write samples.md: of each method's final policies with the `shown` setting, the responses with the highest and the lowest rewards."""
    parts = ["# Responses of the final policies, by reward\n"]
    for method in methods:
        files = [run.folder / "final_samples.jsonl" for run in runs_shown(runs, method, shown)]
        rows = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
        ranked = sorted(rows, key=lambda row: -row["reward"])
        for title, some in (("highest", ranked[:EXTREMES]), ("lowest", ranked[::-1][:EXTREMES])):
            lines = [f"- {row['reward']:.3f} {json.dumps(row['completion'], ensure_ascii=False)}" for row in some]
            parts.append("\n".join([f"## {method}: {title} rewards of {len(rows)}\n", *lines, ""]))
    (folder / "samples.md").write_text("\n".join(parts))


def runs_shown(runs: list[Run], method: str, shown) -> list[Run]:
    """Return a method's runs with the beta and learning rate of `shown`."""
    return [run for run in runs if run.method == method and run.beta == shown.beta and run.lr == shown.lr]


def draw(runs: list[Run], methods: list[str], shown, file: Path) -> None:
    """Draw four panels: reward against KL; SeqKL of chosen, of rejected, and their margin during training."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5))
    for i, method in enumerate(methods):
        draw_frontier(axes[0, 0], [run for run in runs if run.method == method], f"C{i}", method)
        if own := runs_shown(runs, method, shown):
            for axis, measure in zip(axes.flat[1:], STEPS):
                draw_course(axis, own, measure, f"C{i}")
    axes[0, 0].set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes[0, 0].set(xlim=(0, None), xlabel="KL(pi || pi_ref), nats per response", ylabel="expected reward", title="reward and KL, all runs")
    axes[0, 0].legend(fontsize=8)
    for axis, title in zip(axes.flat[1:], STEPS.values()):
        axis.set(xlabel="train examples", ylabel="nats", title=f"{title} (beta {shown.beta}, lr {shown.lr})")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_frontier(axis, runs: list[Run], colour: str, label: str) -> None:
    """Draw a method's measurements, and as a line the KL of its best envelope, mean over seeds, at rewards that all seeds reach."""
    points = [(point[KL], point[REWARD]) for run in runs for point in run.points]
    axis.scatter(*zip(*points), s=14, alpha=0.45, color=colour, linewidths=0)
    rewards = [reward for _, reward in points]
    levels = np.linspace(min(rewards), max(rewards), 100)
    spent = {level: list(by_seed.values()) for level, by_seed in zip(levels, at_levels(runs, levels, least_kl).values())}
    line = [(np.mean(found), level) for level, found in spent.items() if None not in found]
    axis.plot(*zip(*line), color=colour, label=label)


def draw_course(axis, runs: list[Run], measure: str, colour: str) -> None:
    """Draw a measure over training: mean and standard deviation over the runs, at points that all of them have."""
    examples = sorted(set.intersection(*({point["examples"] for point in run.points} for run in runs)))
    curves = [[point[measure] for point in run.points if point["examples"] in examples] for run in runs]
    mean, spread = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=min(1, len(runs) - 1))
    axis.plot(examples, mean, color=colour, marker="o", markersize=3)
    axis.fill_between(examples, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    main()
