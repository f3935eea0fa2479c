"""The console's lines, and the sinks that a run is given by name."""

import json
import os
import pty
import select
import subprocess
import sys

import pytest
from helpers import DATA, PREFERENCE, ROOT, TIMES, compose, logs_of, run

from tdpo.training.sinks import WIDTH, TrackioSink, duration, open_sinks, short_line

TRAIN = {
    "loss/train": 0.64213,
    "rewards_train/accuracies": 0.625,
    "rewards_train/margins": 0.12345,
    "kl_train/chosen": 1.2345,
    "kl_train/rejected": 4.5678,
    "logps_train/chosen": -100.0,
    "lr": 5e-7,
    "examples_per_second": 12.345,
    "tokens_per_second": 3456.7,
    "peak_memory_gb": 5.2789,
    "seconds_left": 754.0,
}


def test_a_short_line_by_hand():
    whole = "loss 0.6421  acc 0.625  margin 0.123  SeqKL 1.23/4.57  lr 5e-07  12.3 ex/s  3.46k tok/s  5.28 GB  13 min left"
    assert short_line(TRAIN, "train", 1408) == f"1,408:  {whole}" and len(whole) < 112
    assert short_line(TRAIN, "train", 10**13) == f"10,000,000,000,000:  {whole.replace('3.46k tok/s  ', '')}"


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_line_fits_whatever_the_values(scale, split):
    metrics = {name.replace("train", split): -value * scale for name, value in TRAIN.items()} | {"seconds_left": 1e9}
    line = short_line(metrics, split, 10**12)
    assert len(line) <= WIDTH and "\n" not in line and f"loss {-0.64213 * scale:.4g}" in line


def test_losses_without_rewards_or_kl_have_what_they_have():
    assert short_line({"loss/eval": 25.0, "logps_eval/chosen": -25.0}, "eval", 64) == "eval 64:  loss 25"
    assert "acc 1  margin 2" in short_line({"loss/train": 1.0, "logits_train/accuracies": 1.0, "logits_train/margins": 2.0}, "train", 8)


def test_durations():
    assert [duration(s) for s in (0, 59, 61, 3600, 100_000, float("nan"))] == ["0 s", "59 s", "1 min", "1 h 00 min", "1 d 03 h", "?"]


def test_the_metrics_of_the_line_are_in_the_logs(tmp_path):
    logs = logs_of(run(*PREFERENCE, "n_examples=24", f"local_run_dir={tmp_path}/run"), "train")
    assert all(set(log) >= TIMES for log in logs)
    assert all(log["tokens_per_second"] > log["examples_per_second"] > 0 and log["peak_memory_gb"] > 0.01 for log in logs)
    assert logs[-1]["seconds_left"] == 0 and logs[0]["seconds_left"] > 0


def on_a_terminal(arguments: list[str], tmp_path) -> str:
    """Run train.py with a terminal of 120 columns as standard output, and return what it prints there."""
    own, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train.py"), *arguments],
        stdout=its,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "120"},
    )
    os.close(its)
    printed = b""
    while True:
        if select.select([own], [], [], 120)[0]:
            try:
                some = os.read(own, 65536)
            except OSError:
                break
            if not some:
                break
            printed += some
    assert process.wait(60) == 0
    return printed.decode()


@pytest.mark.processes
def test_a_terminal_gets_lines_for_people_and_a_pipe_the_published_ones(tmp_path):
    options = ["exp_name=x", *PREFERENCE, "n_examples=16", "sample_during_eval=false", "wandb.enabled=false", "minimum_log_interval_secs=0"]
    lines = on_a_terminal([*options, f"local_run_dir={tmp_path}/terminal"], tmp_path).splitlines()
    assert [line for line in lines if line.startswith("8:  loss ")] and [line for line in lines if line.startswith("eval 16:  loss ")]
    assert not [line for line in lines if line.startswith(("train stats", "eval after"))]
    assert all(len(line) <= 120 for line in lines if line[:1].isdigit() or line.startswith("eval "))
    full = on_a_terminal([*options, "console=full", f"local_run_dir={tmp_path}/full"], tmp_path).splitlines()
    piped = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *options, f"local_run_dir={tmp_path}/piped"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    for printed in (full, piped.stdout.splitlines()):
        (line,) = [line for line in printed if line.startswith("train stats after 8 examples: {'loss/train': ")]
        assert "'logps_train/chosen'" in line and not [line for line in printed if line.startswith("8:  loss ")]


def test_tensorboard_has_every_metric(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = [*PREFERENCE, "sinks=[tensorboard]", "n_epochs=null", "save_every=8"]
    run_dir = run(*options, "n_examples=8", f"local_run_dir={tmp_path}/run")
    run(*options, "n_examples=16", f"resume={run_dir}")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    for log in logs_of(run_dir, "train"):
        for name, value in log.items():
            if name not in ("split", "counters/examples"):
                assert [e.value for e in events.Scalars(name) if e.step == log["counters/examples"]] == pytest.approx([value], rel=1e-6), (
                    name
                )


class Recorded:
    """Stands for the module trackio."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *given, **named: self.calls.append((name, given, named))


def test_trackio_gets_every_metric_and_a_name_that_a_resumed_run_finds_again(tmp_path, monkeypatch):
    trackio = Recorded()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    options = [*PREFERENCE, "sinks=[trackio]", "n_epochs=null"]
    run_dir = run(*options, "n_examples=8", f"local_run_dir={tmp_path}/run")
    run(*options, "n_examples=16", f"resume={run_dir}")
    begun = [named for name, _, named in trackio.calls if name == "init"]
    assert len(begun) == 2 and begun[0]["name"] == begun[1]["name"] and begun[0]["resume"] == "allow"
    other = TrackioSink(str(tmp_path / "other" / "run"), compose("exp_name=test", *DATA), None, 0)
    assert other.name == "trackio" and trackio.calls.pop()[2]["name"] != begun[0]["name"]
    logged = [(given[0], named["step"]) for name, given, named in trackio.calls if name == "log"]
    expected = [{k: v for k, v in log.items() if k != "split"} for log in logs_of(run_dir)]
    assert [{**values, "counters/examples": step} for values, step in logged] == expected
    assert [name for name, _, _ in trackio.calls].count("finish") == 2


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_sink_that_is_not_installed_gets_a_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = compose("exp_name=x", *DATA, f"sinks=[{name}]")
    assert len(open_sinks(str(tmp_path), config)) == 2
    assert capsys.readouterr().out == (
        f"{name} is not installed (pip install {name}): nothing is logged to it; metrics.jsonl has all metrics\n"
    )


def test_a_sink_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    class Failing(Recorded):
        def log(self, *given, **named):
            raise RuntimeError("the disk is full\nof logs")

    monkeypatch.setitem(sys.modules, "trackio", Failing())
    run_dir = run(*PREFERENCE, "sinks=[trackio]", "n_examples=16", f"local_run_dir={tmp_path}/run")
    printed = capsys.readouterr().out
    assert printed.count("trackio: the disk is full; nothing more is logged to it; metrics.jsonl has all metrics") == 1
    assert len(logs_of(run_dir, "train")) == 2


def test_wandb_enabled_false_still_turns_wandb_off(tmp_path):
    for given in (["wandb.enabled=false"], ["sinks=[]"], ["debug=true"]):
        assert len(open_sinks(str(tmp_path), compose("exp_name=x", *DATA, *given))) == 2


def test_sinks_are_known_by_name():
    from tdpo.cli.check_config import check_config
    from tdpo.utils import UserError

    with pytest.raises(UserError, match="sinks.0=mlflow: must be 'wandb', 'tensorboard' or 'trackio'"):
        check_config(compose("exp_name=x", "sinks=[mlflow]"))
    assert json.dumps(list(compose("exp_name=x").sinks)) == '["wandb"]'
