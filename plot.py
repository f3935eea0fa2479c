"""Draw the curves of one or several runs: python plot.py RUN [RUN ...] -o curves.html

RUN is a run folder (or its metrics.jsonl). Lines are train steps, dots with lines are evals; runs share a panel and have a colour each.
A page (.html) has the curves and, in words, what they say (findings.py); a picture (.png, .svg, .pdf) the curves alone, and the words are
printed.
"""

import argparse
import base64
import io
import json
import math
import os
import sys
from typing import BinaryIO, Union

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
from omegaconf import OmegaConf  # noqa: E402

from tdpo.analysis.findings import Finding, findings  # noqa: E402
from tdpo.analysis.pages import write_page  # noqa: E402
from tdpo.losses import objective_of  # noqa: E402
from tdpo.utils import UserError  # noqa: E402

# Title, unit and metric of each panel; {s} is train or eval.
PANELS = (
    ("loss", "nats", "loss/{s}"),
    ("reward accuracy", "fraction of pairs", "rewards_{s}/accuracies"),
    ("reward margin", "beta * nats", "rewards_{s}/margins"),
    ("chosen reward", "beta * nats", "rewards_{s}/chosen"),
    ("rejected reward", "beta * nats", "rewards_{s}/rejected"),
    ("log-probability of chosen", "nats", "logps_{s}/chosen"),
    ("SeqKL of chosen", "nats", "kl_{s}/chosen"),
    ("SeqKL of rejected", "nats", "kl_{s}/rejected"),
    ("SeqKL margin, chosen - rejected", "nats", "kl_{s}/margin"),
)
SMOOTHING = 0.05  # of train curves: an exponential mean over this fraction of the logged steps; the values are drawn pale behind it


def read_run(path: str) -> tuple[str, list[dict]]:
    """Name and logs of a run.

    Raises:
        UserError: no metrics.jsonl there, or nothing in it.
    """
    file = path if os.path.isfile(path) else os.path.join(path, "metrics.jsonl")
    if not os.path.isfile(file):
        raise UserError(f"{path}: no metrics.jsonl there")
    with open(file) as lines:
        logs = [json.loads(line) for line in lines if line.strip()]
    if not logs:
        raise UserError(f"{file}: nothing logged yet")
    return os.path.relpath(os.path.dirname(os.path.abspath(file))), logs


def curve(logs: list[dict], split: str, metric: str) -> tuple[list[int], list[float]]:
    """Train examples and values of one metric of one split."""
    name = metric.format(s=split)
    points = [(log["counters/examples"], log[name]) for log in logs if log["split"] == split and log.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def smooth(values: list[float]) -> list[float]:
    """Exponential mean, corrected for its start; few values stay as they are."""
    decay = 1 - 1 / max(1.0, SMOOTHING * len(values))
    smoothed, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = decay * mean + (1 - decay) * value
        smoothed.append(mean / (1 - decay**i))
    return smoothed


def draw(runs: list[tuple[str, list[dict]]], output: Union[str, BinaryIO], style: str = "default") -> list[str]:
    """Write the picture; the titles of its panels, those that any of the runs has. `style` is one of Matplotlib's."""
    with plt.style.context(style):
        return _draw(runs, output)


def _draw(runs: list[tuple[str, list[dict]]], output: Union[str, BinaryIO]) -> list[str]:
    panels = [panel for panel in PANELS if any(curve(logs, s, panel[2])[0] for _, logs in runs for s in ("train", "eval"))]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        draw_panel(axis, panel, runs)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    figure.tight_layout(rect=(0, 0.02, 1, 1 - 0.25 * math.ceil(len(runs) / 4) / figure.get_figheight()))
    figure.text(0.5, 0.003, "train: pale, and smoothed where there are many logs; eval: dashed with dots", ha="center", fontsize=7)
    # A page's own colour shows behind its curves; a picture has a background.
    figure.savefig(output, dpi=130, transparent=not isinstance(output, str))
    plt.close(figure)
    return [title for title, _, _ in panels]


def draw_panel(axis, panel: tuple, runs: list[tuple[str, list[dict]]]) -> None:
    title, unit, metric = panel
    for i, (name, logs) in enumerate(runs):
        x, y = curve(logs, "train", metric)
        axis.plot(x, y, color=f"C{i}", alpha=0.2, linewidth=0.8)
        axis.plot(x, smooth(y), color=f"C{i}", linewidth=1.3, label=name)
        axis.plot(*curve(logs, "eval", metric), color=f"C{i}", marker="o", markersize=4, linewidth=0.8, linestyle="--")
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(unit, fontsize=8)
    axis.set_xlabel("train examples", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def write_curves(runs: list[tuple[str, list[dict]]], answers: dict[str, list[Finding]], output: str) -> list[str]:
    """One file with the curves, for light and dark screens, and the answers; the panels' titles."""
    pictures = {}
    for kind, style in (("light", "default"), ("dark", "dark_background")):
        buffer = io.BytesIO()
        panels = draw(runs, buffer, style)
        pictures[kind] = base64.b64encode(buffer.getvalue()).decode()
    write_page("curves", output, pictures=pictures, runs=answers)
    return panels


def has_implicit_rewards(run: str) -> bool:
    """By the run's config; where there is none, as of most losses."""
    file = os.path.join(run if os.path.isdir(run) else os.path.dirname(run), "config.yaml")
    return not os.path.exists(file) or objective_of(OmegaConf.to_container(OmegaConf.load(file).loss)).implicit_rewards


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of one or several runs, and say what they say.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "-o", "--output", default="curves.png", help="the page (.html) or picture (.png, .svg, .pdf) to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        runs = [read_run(path) for path in arguments.runs]
        answers = {name: findings(logs, has_implicit_rewards(path)) for path, (name, logs) in zip(arguments.runs, runs)}
        page = arguments.output.endswith((".html", ".htm"))
        panels = write_curves(runs, answers, arguments.output) if page else draw(runs, arguments.output)
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, said in [(name, said) for name, said in answers.items() if said]:
        print("\n".join([f"{name}:", *(f"{'!' if answer.concern else ' '} {answer.text}" for answer in said)]))
    print(f"{arguments.output}: {', '.join(panels)}")


if __name__ == "__main__":
    main()
