"""Means and metrics of examples, wandb without a key or a network, and the curves of plot.py."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import MINI, ROOT, run

import plot
from tdpo.losses import LossOutput, ResponseScores
from tdpo.training.metrics import MetricSums, example_metrics
from tdpo.training.sinks import WandbSink
from tdpo.utils import UserError


def test_means_are_over_examples_not_batches():
    sums = MetricSums()
    sums.add({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([True, False, True])})
    sums.add({"a": torch.tensor([10.0]), "b": torch.tensor([False])})
    assert sums.means() == {"a": 4.0, "b": 0.5}
    assert MetricSums().means() == {}


def test_example_metrics_by_hand():
    """Chosen: log-ratio 1, KL 0.5; rejected: log-ratio 2, KL 0; beta 1. Rewards (1.5 < 2) and log-ratios (1 < 2) rank the pair alike."""
    scores = {
        "chosen": ResponseScores(torch.tensor([-4.0]), torch.tensor([2]), torch.tensor([-5.0]), torch.tensor([0.5])),
        "rejected": ResponseScores(torch.tensor([-1.0]), torch.tensor([2]), torch.tensor([-3.0]), torch.tensor([0.0])),
    }
    output = LossOutput(torch.tensor([0.3]), {"chosen": torch.tensor([1.5]), "rejected": torch.tensor([2.0])}, torch.tensor([0.25]))
    metrics = {name: value.item() for name, value in example_metrics(scores, output, "eval").items()}
    expected = {
        "loss/eval": 0.3, "logps_eval/chosen": -4, "logps_eval/rejected": -1, "rewards_eval/chosen": 1.5, "rewards_eval/rejected": 2,
        "rewards_eval/accuracies": 0, "rewards_eval/margins": -0.5, "logits_eval/margins": 0.25, "logits_eval/accuracies": 1,
        "logratio_eval/accuracies": 0, "kl_eval/chosen": 0.5, "kl_eval/rejected": 0, "kl_eval/margin": 0.5,
    }  # fmt: skip
    assert metrics == pytest.approx(expected)


OPTIONS = ["model=blank_model", f"model.name_or_path={MINI}/model", "datasets=[hh]", f"datasets.hh.path={MINI}/data", "max_length=64"]
OPTIONS += ["max_prompt_length=32", "batch_size=8", "n_examples=16", "n_eval_examples=4"]


def wandb_run(tmp_path, **environment):
    arguments = [sys.executable, str(ROOT / "train.py"), "exp_name=x", f"local_run_dir={tmp_path}/run", "n_eval_model_samples=2", *OPTIONS]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**clean, "HOME": str(tmp_path), **environment}
    )


@pytest.mark.processes
def test_wandb_without_a_key_logs_offline(tmp_path):
    done = wandb_run(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("wandb: ")]
    assert len(lines) == 1 and "no API key" in lines[0] and "logging offline" in lines[0]
    assert any(name.startswith("offline-run") for name in os.listdir(tmp_path / "run" / "wandb"))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 3


@pytest.mark.processes
def test_wandb_without_a_network_logs_offline(tmp_path):
    """There is a key, but the server cannot be reached: nothing listens on the port."""
    done = wandb_run(tmp_path, WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert (
        "Failed to authenticate" in done.stdout
        and "logging offline" in done.stdout
        and done.stdout.splitlines()[-1] == f"done: {tmp_path}/run"
    )


def test_a_run_without_wandb_installed_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run_dir = run(*OPTIONS, "wandb.enabled=true", f"local_run_dir={tmp_path}/run")
    assert "wandb is not installed" in capsys.readouterr().out and (run_dir / "LATEST" / "policy.pt").exists()


def test_no_secret_is_written(tmp_path, monkeypatch):
    """config.yaml of a run contains nothing from the environment."""
    monkeypatch.setenv("WANDB_API_KEY", "secret-token")
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    run_dir = run(*OPTIONS, f"local_run_dir={tmp_path}/run")
    assert "secret-token" not in (run_dir / "config.yaml").read_text()


def write_run(folder, split_values):
    folder.mkdir()
    lines = [{"split": s, "counters/examples": x, **values} for s, x, values in split_values]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_plot_draws_curves(tmp_path, monkeypatch, capsys):
    sft = write_run(tmp_path / "sft", [("train", 8, {"loss/train": 3.0}), ("eval", 0, {"loss/eval": 4.0}), ("eval", 8, {"loss/eval": 2.0})])
    tdpo = write_run(tmp_path / "tdpo", [("train", 8, {"loss/train": 0.7, "kl_train/margin": 0.1, "rewards_train/accuracies": 0.5})])
    monkeypatch.chdir(tmp_path)
    name, logs = plot.read_run(sft)
    assert name == "sft" and plot.curve(logs, "eval", "loss/{s}") == ([0, 8], [4.0, 2.0])
    monkeypatch.setattr(sys, "argv", ["plot.py", sft, tdpo, "-o", "curves.png"])
    plot.main()
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out == "curves.png: loss, reward accuracy, SeqKL margin, chosen - rejected\n"
    with pytest.raises(UserError, match="no metrics.jsonl"):
        plot.read_run(str(tmp_path))


def test_smoothing_keeps_constants_and_short_curves():
    assert plot.smooth([2.0] * 200) == pytest.approx([2.0] * 200)
    assert plot.smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]
    noisy = [float(i % 2) for i in range(400)]
    assert max(plot.smooth(noisy)[100:]) < 0.6 and min(plot.smooth(noisy)[100:]) > 0.4


def test_a_failure_of_wandb_ends_only_its_logging(capsys):
    """Once: a full disk would be reported at every log."""

    class Failing:
        calls = 0

        def log(self, *_, **__):
            self.calls += 1
            raise OSError(28, "No space left on device")

        finish = log

    sink = WandbSink.__new__(WandbSink)
    sink.run, sink.failed = Failing(), False
    for _ in range(3):
        sink.log({"loss/train": 0.5}, "train", 8)
    sink.close()
    assert sink.run.calls == 1 and capsys.readouterr().out.count("warning: wandb: [Errno 28]") == 1
