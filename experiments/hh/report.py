"""Write the results of an HH experiment into its folder: results.json, table.md (from results.json alone) and the curves of its runs.

    python experiments/hh/report.py runs/hh-small

Runs that are not measured yet are named with what became of them.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

import plot  # noqa: E402
from experiments.hh.run import SFT, folder_of, is_written, step_name  # noqa: E402
from experiments.intervals import interval  # noqa: E402
from tdpo.analysis.evaluation import MEASURES, Estimate  # noqa: E402
from tdpo.cli.run_config import load_run_config, objective_of_run  # noqa: E402
from tdpo.files import replaced_whole  # noqa: E402
from tdpo.losses import Objective, ResponseScores  # noqa: E402

# The tables: title -> measures. The first is the paper's Table 1.
TABLES = {
    "Alignment (accuracy on held-out pairs) and diversity (entropy of samples)": (
        "accuracy/logratio",
        "accuracy/reward",
        "accuracy/logit",
        "samples/entropy",
        "samples/entropy_fdpo",
    ),
    "Distance from the SFT model, nats": (
        "seqkl/chosen",
        "seqkl/rejected",
        "seqkl/margin",
        "reverse_seqkl/chosen",
        "reverse_seqkl/rejected",
        "samples/kl",
    ),
    "Log-ratio of held-out responses, r = log pi - log pi_ref, nats": ("logratio/chosen", "logratio/rejected"),
    "Samples": ("samples/tokens", "samples/distinct_1", "samples/distinct_2", "samples/self_bleu", "samples/reference_nll"),
}
START = 1e-3  # tolerance at the first step: of the loss, relative; of rewards and SeqKL, absolute, nats


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables and curves of an HH experiment.")
    parser.add_argument("folder", type=Path)
    print(write(parser.parse_args().folder.resolve()))


def write(folder: Path) -> str:
    """Write the results of an experiment's folder, and return the content of table.md."""
    task = OmegaConf.load(folder / "task.yaml")
    task.out = str(folder)  # it may have been moved
    results = results_of(task)
    with replaced_whole(str(folder / "results.json")) as file:
        json.dump(results, file, indent=1)
    table = table_of(json.loads((folder / "results.json").read_text()))
    with replaced_whole(str(folder / "table.md")) as file:
        file.write(table + "\n")
    draw(task)
    return table


def results_of(task: DictConfig) -> dict[str, Any]:
    """Return the content of results.json, from the files of the runs."""
    methods: dict[str, Any] = {}
    missing = {}
    for name in (SFT, *task.methods):
        by_seed = {seed: folder_of(task, name, seed) for seed in task.seeds}
        found = {seed: run for seed, run in by_seed.items() if is_written(run / "eval.json")}
        missing |= {f"{name}, seed {seed}": fate(task, name, seed) for seed in by_seed if seed not in found}
        if found:
            methods[name] = method_of(found)
    content = OmegaConf.to_container(task)
    settings = {key: value for key, value in content.items() if key not in ("out", "data", "methods", "seeds")}
    settings["model"] = [without_folder(setting) for setting in settings["model"]]
    compared = [measure for some in TABLES.values() for measure in some]
    comparisons = {measure: compare({name: methods[name]["measures"].get(measure) for name in methods}) for measure in compared}
    meanings = {measure: MEASURES[measure] for measure in compared}
    return {"settings": settings, "meanings": meanings, "methods": methods, "comparisons": comparisons, "missing": missing}


def without_folder(setting: str) -> str:
    """Return a setting without the folder of its value, which is of one machine alone, if it is an absolute path."""
    key, _, value = setting.partition("=")
    return f"{key}={Path(value).name}" if Path(value).is_absolute() else setting


def method_of(runs: Mapping[int, Path]) -> dict[str, Any]:
    """Return the results of a method.

    Args:
        runs: seed -> folder of a measured run.
    """
    evals = {seed: next(iter(json.loads((run / "eval.json").read_text())["results"].values())) for seed, run in runs.items()}
    measures = {name: over_seeds([found[name] for found in evals.values() if name in found]) for name in next(iter(evals.values()))}
    described = {str(seed): described_run(run) for seed, run in runs.items()}
    return {"seeds": list(runs), "measures": measures, "runs": described}


def over_seeds(estimates: Sequence[Mapping]) -> dict[str, Any]:
    """Return mean, 95% interval and number of examples: with one seed its bootstrap interval over n prompts, otherwise Student's over the
    means of the n seeds."""
    if len(estimates) == 1:
        (only,) = estimates
        return {"mean": only["mean"], "low": only["low"], "high": only["high"], "n": only["examples"], "over": "prompts"}
    means = [found["mean"] for found in estimates]
    whole = dict.fromkeys(("mean", "low", "high")) if None in means else interval(means)  # None: a mean is not finite
    return {**whole, "n": len(estimates), "over": "seeds"}


def described_run(run: Path) -> dict[str, Any]:
    """Return what a run's logs say: train examples, its first step if it has a reference, and the findings."""
    name, logs = plot.read_run(str(run))
    objective = objective_of_run(load_run_config(str(run / "config.yaml")))
    found = [finding._asdict() for finding in plot.findings_of(str(run), logs)]
    start = first_step(objective, logs) if objective.needs_reference else None
    return {"train_examples": max(log["counters/examples"] for log in logs), "start": start, "findings": found}


def first_step(objective: Objective, logs: Sequence[Mapping]) -> Optional[dict[str, Any]]:
    """Return whether policy and reference were the same model at the first step: its loss, and what the loss is for equal models; the
    largest absolute reward and SeqKL, nats. None if the step was not logged.

    Args:
        objective: of the run.
        logs: lines of metrics.jsonl; values that are not finite are None there.
    """
    first = next((log for log in logs if log["split"] == "train" and log.get("counters/updates") == 1), None)
    if first is None:
        return None
    scale = objective.reward_scale or 1.0
    roles = ("chosen", "rejected")
    values = {key: [first[name] for role in roles if (name := f"{key}_train/{role}") in first] for key in ("rewards", "kl")}
    if None in [first["loss/train"], *values["rewards"], *values["kl"]]:
        return {"loss": first["loss/train"], "expected_loss": loss_of_equals(objective), "reward": None, "seqkl": None, "ok": False}
    reward, seqkl = (max(map(abs, some), default=0.0) / by for some, by in ((values["rewards"], scale), (values["kl"], 1.0)))
    expected = loss_of_equals(objective)
    ok = abs(first["loss/train"] - expected) <= START * abs(expected) and max(reward, seqkl) <= START
    return {"loss": first["loss/train"], "expected_loss": expected, "reward": reward, "seqkl": seqkl, "ok": ok}


def loss_of_equals(objective: Objective) -> float:
    """Return the mean loss of a pair, or of a desirable and an undesirable response, if policy and reference are the same model."""
    zeros = torch.zeros(2, dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0], dtype=torch.float64)
    scores = ResponseScores(zeros, torch.ones(2), zeros, zeros, labels, torch.zeros((), dtype=torch.float64))
    return float(objective({role: scores for role in objective.roles}).losses.mean())


def fate(task: DictConfig, name: str, seed: int) -> str:
    """Return what became of a run that is not measured: the error with which its last step ended, or that it is not finished."""
    for kind in ("eval", "train"):
        log = Path(task.out) / "logs" / f"{step_name(name, seed, kind)}.log"
        lines = log.read_text().splitlines() if log.exists() else []
        if errors := [line for line in lines if line.startswith("error: ")]:
            return f"failed: {errors[0].removeprefix('error: ')}"
        if lines:
            return f"stopped in '{log.relative_to(task.out)}': {lines[-1]}" if "Error" in lines[-1] else "not finished"
    return "not run yet"


def compare(measures: Mapping[str, Optional[Mapping]]) -> dict[str, list[list[str]]]:
    """Return the pairs of methods whose intervals are apart, the one with the larger mean first, and those whose intervals overlap: ties.

    Args:
        measures: method -> mean, low and high; None if it does not have the measure. Without an interval, a method ties with all.
    """
    apart, ties = [], []
    for (a, x), (b, y) in itertools.combinations([(name, value) for name, value in measures.items() if value is not None], 2):
        known = None not in (x["low"], y["low"])
        if known and x["low"] > y["high"]:
            apart.append([a, b])
        elif known and y["low"] > x["high"]:
            apart.append([b, a])
        else:
            ties.append([a, b])
    return {"apart": apart, "ties": ties}


def table_of(results: Mapping) -> str:
    """Format the content of results.json as a page of Markdown."""
    parts = [intervals_line(results)]
    if results["missing"]:
        parts.append("\n".join(["Not in the tables:", "", *(f"- {run}: {fate}" for run, fate in results["missing"].items())]))
    for title, measures in TABLES.items():
        parts += [f"## {title}", measures_table(results, measures)]
        parts.append("\n".join(f"- {measure}: {differences(results['comparisons'][measure])}" for measure in measures))
    parts += ["## First step", start_table(results), "## Findings", findings_list(results), "![Training curves](curves.png)"]
    parts.append("\n".join(f"{measure}: {meaning}  " for measure, meaning in results["meanings"].items()))
    return "\n\n".join(parts)


def intervals_line(results: Mapping) -> str:
    """Say over what the means and intervals are, and how many examples they have."""
    lines = []
    for name, method in results["methods"].items():
        examples = [run["train_examples"] for run in method["runs"].values()]
        counts = {name.startswith("samples/"): value["n"] for name, value in method["measures"].items() if value["over"] == "prompts"}
        kinds = [f"{n} held-out prompts of {'samples' if samples else 'pairs'}" for samples, n in sorted(counts.items())]
        over = " and ".join(kinds) or f"{len(method['seeds'])} seeds"
        seeds = ", ".join(map(str, method["seeds"]))
        lines.append(f"- {name}: {', '.join(f'{n:,}' for n in examples)} train examples, seed {seeds}; intervals over {over}")
    return "\n".join(["Means with 95 % intervals. Differences whose intervals overlap count as ties.", "", *lines])


def measures_table(results: Mapping, measures: Sequence[str]) -> str:
    """Format measures as a table with one row per method."""
    lines = [f"| | {' | '.join(measures)} |", "|---|" + "---:|" * len(measures)]
    for name, method in results["methods"].items():
        lines.append(f"| {name} | {' | '.join(cell(method['measures'].get(measure)) for measure in measures)} |")
    return "\n".join(lines)


def cell(value: Optional[Mapping]) -> str:
    """Format a mean with its interval."""
    if value is None or value["mean"] is None:
        return "-"
    low, high = (math.nan if value[key] is None else value[key] for key in ("low", "high"))
    return str(Estimate(value["mean"], low, high, value["n"]))


def differences(comparison: Mapping) -> str:
    """Say which methods differ, and that all others tie: 'TDPO2 above DPO, IPO; all others tie'."""
    below: dict[str, list[str]] = {}
    for larger, smaller in comparison["apart"]:
        below.setdefault(larger, []).append(smaller)
    told = [f"{larger} above {', '.join(smaller)}" for larger, smaller in below.items()]
    if not told:
        return "all tie" if comparison["ties"] else "nothing to compare"
    return "; ".join([*told, *(["all others tie"] if comparison["ties"] else [])])


def start_table(results: Mapping) -> str:
    """Format what the first steps say about policy and reference."""
    lines = ["| | loss | of equal models | largest reward, nats | largest SeqKL, nats | as it should be |", "|---|---:|---:|---:|---:|---|"]
    for name, method in results["methods"].items():
        for seed, run in method["runs"].items():
            if start := run["start"]:
                values = [start[key] for key in ("loss", "expected_loss", "reward", "seqkl")]
                cells = ["not finite" if value is None else f"{value:.4f}" for value in values]
                lines.append(f"| {name}, seed {seed} | {' | '.join(cells)} | {'yes' if start['ok'] else '**no**'} |")
    return "\n".join(lines)


def findings_list(results: Mapping) -> str:
    """Format the findings about each run; those that need attention begin with '!'."""
    lines = []
    for name, method in results["methods"].items():
        for seed, run in method["runs"].items():
            if run["findings"]:
                lines += [f"- {name}, seed {seed}", *(f"  - {'! ' * found['concern']}{found['text']}" for found in run["findings"])]
    return "\n".join(lines)


def draw(task: DictConfig) -> None:
    """Write curves.html of each measured run that has none, and curves.png with all methods."""
    shown = []
    for seed in task.seeds:
        for name in (SFT, *task.methods):
            run = folder_of(task, name, seed)
            if not is_written(run / "eval.json"):
                continue
            title = f"{name}, seed {seed}"
            logs = plot.read_run(str(run))[1]
            if not is_written(run / "curves.html"):
                plot.write_curves([(title, logs)], {title: plot.findings_of(str(run), logs)}, str(run / "curves.html"))
            shown += [(title, logs)] if name != SFT else []
    if shown:
        plot.write_picture(shown, str(Path(task.out) / "curves.png"))


if __name__ == "__main__":
    main()
