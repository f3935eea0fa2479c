"""Draw the curves of one or several runs: python plot.py RUN [RUN ...] -o curves.html

RUN is a run folder (or its metrics.jsonl). Solid lines are train steps, dashed lines with dots are evals; each run has its own colour.
A page (.html) contains the curves and the findings about each run (tdpo/analysis/findings.py); a picture (.png, .svg, .pdf) contains the
curves only. The findings are printed in either case.
"""

import argparse
import base64
import io
import math
import os
import sys
from typing import BinaryIO, Optional

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
from omegaconf import OmegaConf  # noqa: E402

from tdpo.analysis.findings import Finding, findings  # noqa: E402
from tdpo.analysis.pages import write_page  # noqa: E402
from tdpo.checkpointing.logs import read_metrics  # noqa: E402
from tdpo.cli.run_config import load_run_config, objective_of_run  # noqa: E402
from tdpo.files import replaced_whole  # noqa: E402
from tdpo.utils import UserError, lenient_console, plural  # noqa: E402

# Title, unit and metric of each panel; {s} stands for train or eval.
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
SMOOTHING = 0.05  # train curves are exponential means over this fraction of the logged steps; the raw values are drawn pale


def read_run(path: str) -> tuple[str, list[dict]]:
    """Return the name of a run (its folder, relative to the working directory) and its logs.

    Args:
        path: the run folder or its metrics.jsonl.

    Raises:
        UserError: metrics.jsonl does not exist or is empty.
    """
    file = path if os.path.isfile(path) else os.path.join(path, "metrics.jsonl")
    if not os.path.isfile(file):
        raise UserError(f"'{path}' has no metrics.jsonl: give a run folder")
    logs, unreadable = read_metrics(file)
    if unreadable:
        print(f"{file}: {plural(unreadable, 'line')} left out, which cannot be read", file=sys.stderr)
    if not logs:
        raise UserError(f"'{file}' is empty: nothing has been logged yet")
    return os.path.relpath(os.path.dirname(os.path.abspath(file))), logs


def curve(logs: list[dict], split: str, metric: str) -> tuple[list[int], list[float]]:
    """Return the curve of one metric: numbers of train examples, and values. Values that are not finite are left out.

    Args:
        logs: lines of metrics.jsonl.
        split: "train" or "eval".
        metric: name of the metric, with {s} for the split.
    """
    name = metric.format(s=split)
    points = [(log["counters/examples"], log[name]) for log in logs if log["split"] == split and log.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def smooth(values: list[float]) -> list[float]:
    """Return the bias-corrected exponential mean. Up to 1/SMOOTHING values are returned unchanged."""
    decay = 1 - 1 / max(1.0, SMOOTHING * len(values))
    smoothed, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = decay * mean + (1 - decay) * value
        smoothed.append(mean / (1 - decay**i))
    return smoothed


def draw(runs: list[tuple[str, list[dict]]], output: BinaryIO, style: str = "default", form: Optional[str] = None) -> list[str]:
    """Draw the panels for which at least one run has values.

    Args:
        runs: (name, logs) of each run.
        output: buffer of the picture.
        style: name of a Matplotlib style.
        form: the picture's format, such as png or svg. None: a png without background, for a page, whose colour then shows.

    Returns:
        the titles of the panels.
    """
    with plt.style.context(style):
        return _draw(runs, output, form)


def _draw(runs: list[tuple[str, list[dict]]], output: BinaryIO, form: Optional[str]) -> list[str]:
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
    figure.text(0.5, 0.003, "train: raw values pale, smoothed values solid; eval: dashed with dots", ha="center", fontsize=7)
    figure.savefig(output, dpi=130, transparent=form is None, format=form or "png")
    plt.close(figure)
    return [title for title, _, _ in panels]


def draw_panel(axis, panel: tuple, runs: list[tuple[str, list[dict]]]) -> None:
    """Draw one metric of all runs.

    Args:
        axis: Matplotlib axes.
        panel: (title, unit, metric), an entry of PANELS.
        runs: (name, logs) of each run.
    """
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
    """Write a page with the curves, in a light and a dark version, and the findings.

    Args:
        runs: (name, logs) of each run.
        answers: run name -> findings.
        output: path of the page.

    Returns:
        the titles of the panels.
    """
    pictures = {}
    for kind, style in (("light", "default"), ("dark", "dark_background")):
        buffer = io.BytesIO()
        panels = draw(runs, buffer, style)
        pictures[kind] = base64.b64encode(buffer.getvalue()).decode()
    write_page("curves", output, pictures=pictures, runs=answers)
    return panels


def write_picture(runs: list[tuple[str, list[dict]]], output: str) -> list[str]:
    """Write a picture of the curves, whose ending gives its format; an existing one is replaced as a whole. Returns as `draw`."""
    buffer = io.BytesIO()
    panels = draw(runs, buffer, form=os.path.splitext(output)[1].removeprefix(".") or "png")
    with replaced_whole(output, "wb") as file:
        file.write(buffer.getvalue())
    return panels


def findings_of(path: str, logs: list[dict]) -> list[Finding]:
    """Return the findings about a run; what its loss, keep_best and stop_when are is read from its config.yaml, if there is one.

    Args:
        path: the run folder or a file in it.
        logs: of the run.
    """
    file = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.yaml")
    if not os.path.exists(file):
        return findings(logs)
    config = load_run_config(file)
    return findings(logs, objective_of_run(config).implicit_rewards, OmegaConf.to_container(config, resolve=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of one or several runs and print the findings about each.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "-o", "--output", default="curves.png", help="the page (.html) or picture (.png, .svg, .pdf) to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        runs = [read_run(path) for path in arguments.runs]
        answers = {name: findings_of(path, logs) for path, (name, logs) in zip(arguments.runs, runs)}
        page = arguments.output.endswith((".html", ".htm"))
        panels = write_curves(runs, answers, arguments.output) if page else write_picture(runs, arguments.output)
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, said in [(name, said) for name, said in answers.items() if said]:
        print("\n".join([f"{name}:", *(f"{'!' if answer.concern else ' '} {answer.text}" for answer in said)]))
    print(f"{arguments.output}: {', '.join(panels)}")


if __name__ == "__main__":
    with lenient_console():
        main()
