"""Where a run's metrics and samples go: the console, metrics.jsonl, and wandb, tensorboard and trackio if they are installed."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Optional, Protocol

import tqdm
from omegaconf import DictConfig, OmegaConf

from tdpo.files import append_lines, reason_of
from tdpo.utils import RunError, formatted_dict, get_logger

log = get_logger(__name__)

WIDTH = 120  # characters of a line on a terminal


class Sink(Protocol):
    """A destination of metrics and samples; `examples` is the number of train examples so far."""

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None: ...

    def samples(self, rows: list[dict], examples: int) -> None: ...

    def close(self) -> None: ...


class ConsoleSink:
    """Prints metrics and at most three samples, above the progress bar.

    Args:
        short: one line a log for people, see `short_line`; False: every metric, as the published code does.
    """

    def __init__(self, short: bool = False):
        self.short = short

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None:
        what = "train stats" if split == "train" else "eval"
        whole = f"{what} after {examples} examples: {formatted_dict(dict(metrics))}"
        tqdm.tqdm.write(short_line(metrics, split, examples) if self.short else whole)

    def samples(self, rows: list[dict], examples: int) -> None:
        for row in rows[:3]:
            tqdm.tqdm.write(f"sample after {examples} examples: {json.dumps(row, ensure_ascii=False)}")

    def close(self) -> None:
        pass


def short_line(metrics: Mapping[str, float], split: str, examples: int) -> str:
    """Return what people look for in a log, in one line of at most WIDTH characters; of what does not fit, speed and memory are left out.

    SeqKL is that of chosen/rejected, in nats; memory is the peak so far, in GB (10^9 bytes).
    """
    value = {name.replace(f"_{split}/", "/").replace(f"/{split}", ""): x for name, x in metrics.items()}

    def number(*names: str, form: str = ".3g") -> str:
        return "/".join(f"{value[name]:{form}}" for name in names if value.get(name) is not None)

    parts = {
        "loss": number("loss", form=".4g"),
        "acc": number("rewards/accuracies") or number("logits/accuracies"),
        "margin": number("rewards/margins") or number("logits/margins"),
        "SeqKL": number("kl/chosen", "kl/rejected"),
        "lr": number("lr"),
    }
    texts = {name: f"{name} {text}" for name, text in parts.items() if text}
    units = {"examples_per_second": "ex/s", "tokens_per_second": "tok/s", "peak_memory_gb": "GB"}
    texts |= {unit: f"{thousands(value[name])} {unit}" for name, unit in units.items() if name in value}
    if "seconds_left" in value:
        texts["left"] = f"{duration(value['seconds_left'])} left"
    begin = f"{'eval ' if split == 'eval' else ''}{examples:,}:"
    for name in ("", "tok/s", "GB", "ex/s", "left", "margin", "SeqKL"):
        texts.pop(name, None)
        line = "  ".join([begin, *texts.values()])
        if len(line) <= WIDTH:
            break
    return line


def thousands(value: float) -> str:
    """Return a number with three digits, in thousands from 1,000 on: '364', '16.4k'."""
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return '45 s', '12 min', '3 h 05 min' or '2 d 07 h'."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 24 * 60 else f"{minutes // 1440} d {minutes % 1440 // 60:02} h"


class JsonlSink:
    """Writes metrics.jsonl, one object per log and the authoritative record of a run, and samples.jsonl, one object per sampled prompt."""

    def __init__(self, run_dir: str):
        self.run_dir = run_dir

    def _append(self, file: str, rows: list[dict]) -> None:
        path = os.path.join(self.run_dir, file)
        try:
            append_lines(path, rows)
        except OSError as error:
            reason = f"{path} cannot be written ({reason_of(error)})"
            raise RunError(f"{reason}; saved checkpoints are kept; to continue: resume={self.run_dir}") from None

    @staticmethod
    def _finite(metrics: Mapping[str, float]) -> dict:
        """Replace values that are not finite by None (null), because JSON has no infinity or NaN."""
        return {name: value if math.isfinite(value) else None for name, value in metrics.items()}

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None:
        self._append("metrics.jsonl", [{"split": split, "counters/examples": examples, **self._finite(metrics)}])

    def samples(self, rows: list[dict], examples: int) -> None:
        self._append("samples.jsonl", [{"counters/examples": examples, **row} for row in rows])

    def close(self) -> None:
        pass


class _Optional:
    """A sink of a library that may fail in a dozen ways: a failure ends logging there with a warning, not the run.

    Subclasses have _log, _samples and _close.
    """

    name = ""

    def __init__(self):
        self.failed = False

    def log(self, metrics: Mapping[str, float], split: str, examples: int) -> None:
        self._tried(lambda: self._log(metrics, examples))

    def samples(self, rows: list[dict], examples: int) -> None:
        self._tried(lambda: self._samples(rows, examples))

    def close(self) -> None:
        self._tried(self._close)

    def _samples(self, rows: list[dict], examples: int) -> None:
        """Log samples; a sink that has no place for them logs none."""

    def _tried(self, action: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning(f"{self.name}: {reason}; nothing more is logged to it; metrics.jsonl has all metrics")


class WandbSink(_Optional):
    """Logs to Weights & Biases. Without an API key or a network it logs offline, with a line on the console; the run continues.

    Args:
        run_dir: the run's folder, in which wandb keeps its files.
        config: the run's config.
        run_id: the wandb run to continue; None: a new one.
        examples: not used.
    """

    name = "wandb"

    def __init__(self, run_dir: str, config: DictConfig, run_id: Optional[str], examples: int = 0):
        super().__init__()
        import wandb  # here, because it is optional

        self.wandb = wandb
        arguments = {
            "entity": config.wandb.entity,
            "project": config.wandb.project,
            "name": config.exp_name,
            "config": OmegaConf.to_container(config),
            "dir": run_dir,
            **({"id": run_id, "resume": "allow"} if run_id else {}),
            "settings": wandb.Settings(init_timeout=20, finish_timeout=30, silent=True),
        }
        mode = os.environ.get("WANDB_MODE", "online")  # wandb's own switch
        if mode == "online":
            problem = self._start_online(arguments)
            if problem is None:
                log.info(f"wandb: {self.run.url}")
                return
            log.info(f"wandb: {problem}; logging offline to {run_dir}/wandb (wandb sync uploads it)")
            mode = "offline"
        self.run = wandb.init(mode=mode, **arguments)

    @property
    def run_id(self) -> str:
        """The wandb run's id, by which a resumed run continues it."""
        return self.run.id

    def _start_online(self, arguments: Mapping) -> Optional[str]:
        """Start the wandb run online; return None, or the reason why that is not possible."""
        try:
            if not self.wandb.login(prompt=False):
                return "no API key (wandb login)"
            self.run = self.wandb.init(mode="online", **arguments)
        except Exception as error:  # wandb has a dozen types: no network, no such entity, no permission
            return (str(error).splitlines() or [type(error).__name__])[0]
        return None

    def _log(self, metrics: Mapping[str, float], examples: int) -> None:
        self.run.log(dict(metrics), step=examples)

    def _samples(self, rows: list[dict], examples: int) -> None:
        for column in ("policy", "reference"):
            texts = [(examples, row["prompt"], row[column]) for row in rows if column in row]
            if texts:
                self.run.log({f"{column}_samples": self.wandb.Table(columns=["step", "prompt", "sample"], data=texts)}, step=examples)

    def _close(self) -> None:
        self.run.finish()


class TensorboardSink(_Optional):
    """Writes event files for TensorBoard into <run_dir>/tensorboard.

    Args:
        run_dir: the run's folder.
        config: the run's config.
        run_id: not used.
        examples: train examples so far; later entries of an interrupted run are hidden.
    """

    name = "tensorboard"

    def __init__(self, run_dir: str, config: DictConfig, run_id: Optional[str], examples: int):
        super().__init__()
        from torch.utils.tensorboard import SummaryWriter  # here, because it is optional

        self.writer = SummaryWriter(os.path.join(run_dir, "tensorboard"), purge_step=examples + 1 if examples else None)

    def _log(self, metrics: Mapping[str, float], examples: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, examples)

    def _samples(self, rows: list[dict], examples: int) -> None:
        for i, row in enumerate(rows):
            self.writer.add_text(f"samples/{i}", json.dumps(row, ensure_ascii=False), examples)

    def _close(self) -> None:
        self.writer.close()


class TrackioSink(_Optional):
    """Logs metrics to trackio, in the project of wandb.project; a resumed run continues that of the same folder.

    Args:
        run_dir: the run's folder; a hash of its path is part of the run's name, because folders of other runs may have the same name.
        config: the run's config.
        run_id, examples: not used.
    """

    name = "trackio"

    def __init__(self, run_dir: str, config: DictConfig, run_id: Optional[str], examples: int):
        super().__init__()
        import trackio  # here, because it is optional

        self.trackio = trackio
        run = f"{config.exp_name} {hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:8]}"
        trackio.init(project=config.wandb.project, name=run, config=OmegaConf.to_container(config), resume="allow", embed=False)

    def _log(self, metrics: Mapping[str, float], examples: int) -> None:
        self.trackio.log(dict(metrics), step=examples)

    def _close(self) -> None:
        self.trackio.finish()


SINKS: dict[str, Callable[..., Sink]] = {"wandb": WandbSink, "tensorboard": TensorboardSink, "trackio": TrackioSink}


def open_sinks(run_dir: str, config: DictConfig, wandb_id: Optional[str] = None, examples: int = 0) -> list[Sink]:
    """Open the sinks of a run: console, metrics.jsonl, and those of config.sinks that can be opened; the others get a line.

    Args:
        run_dir: the run's folder.
        config: a checked config.
        wandb_id: the wandb run to continue; None: a new one.
        examples: train examples so far.
    """
    short = config.console == "auto" and sys.stdout.isatty()
    sinks: list[Sink] = [ConsoleSink(short), JsonlSink(run_dir)]
    for name in dict.fromkeys(config.sinks):
        if config.debug or (name == "wandb" and not config.wandb.enabled):
            continue
        try:
            sinks.append(SINKS[name](run_dir, config, wandb_id, examples))
        except ImportError:
            log.info(f"{name} is not installed (pip install {name}): nothing is logged to it; metrics.jsonl has all metrics")
        except Exception as error:  # wandb refuses a setting, such as the project's name or WANDB_MODE
            log.info(f"{name}: {' '.join(str(error).split())[:200]}; nothing is logged to it; metrics.jsonl has all metrics")
    return sinks
