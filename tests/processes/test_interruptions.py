"""Runs whose processes are killed or told to stop: resumed, they end as if they had never been interrupted."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import (
    PREFERENCE,
    QUIET,
    ROOT,
    SHARDED,
    assert_same_run,
    compose,
    has_steps,
    logs_of,
    ranks_of,
    run,
    start,
    start_supervised,
    wait_for,
)

import train
from tdpo.cli.command_line import override

pytestmark = pytest.mark.processes

LONG = [*PREFERENCE, "n_epochs=null", "n_examples=480", "save_every=16", "eval_every=48", "n_eval_examples=8"]


def kill_at_random(options: list[str], run_dir: Path, kills: int, steps: int) -> None:
    """Start the same command `kills` times; each time kill it after at least one more step, and wait until its ranks have ended too."""
    moments = random.Random(0)
    for kill in range(kills):
        done = len(logs_of(run_dir, "train")) if kill else 0
        process = start(options)
        wait_for(lambda done=done, process=process: has_steps(run_dir, done + 1) or process.poll() is not None)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        wait_for(lambda: not subprocess.run(["pgrep", "-f", f"local_run_dir={run_dir}"], capture_output=True).stdout)
    assert len(logs_of(run_dir, "train")) < steps, "the run ended before the last kill"


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["adapter.rank=4", "reference.update_every=3", "reference.mixup=1"],
        ["keep_best.metric=rewards_eval/margins", "stop_when={patience: 5}", "keep_checkpoints=1", "lr_schedule=cosine"],
    ],
    ids=["full training", "adapters, moving reference", "best checkpoint, patience, decay"],
)
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(more, tmp_path):
    """The run saves every two steps, and is restarted with the same command."""
    options = [*LONG, *more, "n_examples=640"]
    straight = run(*options, f"local_run_dir={tmp_path}/straight")
    options += [f"local_run_dir={tmp_path}/run", "resume=auto"]
    kill_at_random(options, tmp_path / "run", kills=3, steps=len(logs_of(straight, "train")))
    assert_same_run(run(*options), straight)
    links = [
        {name: os.readlink(folder / name) for name in ("LATEST", "BEST") if (folder / name).is_symlink()}
        for folder in (straight, tmp_path / "run")
    ]
    assert links[0] == links[1] and all((tmp_path / "run" / target).is_dir() for target in links[1].values())


def test_ranks_killed_at_a_random_moment_end_with_the_same_weights(ranks, tmp_path):
    options = [*LONG, *SHARDED, "n_examples=320"]
    straight = ranks(2).run(*options, f"local_run_dir={tmp_path}/straight")
    options += [f"local_run_dir={tmp_path}/run", "resume=auto"]
    kill_at_random([*options, "nproc_per_node=2"], tmp_path / "run", kills=1, steps=40)
    assert_same_run(ranks(2).run(*options), straight)


@pytest.mark.parametrize(
    "extra,signum,code",
    [([], signal.SIGTERM, 143), ([*SHARDED, "nproc_per_node=2"], signal.SIGUSR1, 138)],
    ids=["one process", "two ranks"],
)
def test_a_stop_signal_saves_a_checkpoint_and_exits(extra, signum, code, tmp_path):
    options = [*LONG, *extra, "n_examples=80000", "eval_every=80000", f"local_run_dir={tmp_path}/run"]
    process = start(options)
    wait_for(lambda: has_steps(tmp_path / "run", 5))
    told = time.monotonic()
    process.send_signal(signum)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code and time.monotonic() - told < 30
    assert output.count(f"stopped by {signum.name}; to continue: resume={tmp_path}/run") == 1
    trained = logs_of(tmp_path / "run", "train")[-1]["counters/examples"]
    assert os.readlink(tmp_path / "run" / "LATEST") == f"step-{trained}"
    assert not subprocess.run(["pgrep", "-f", f"local_run_dir={tmp_path}/run"], capture_output=True).stdout
    if extra:
        return  # the test above shows that ranks resume exactly
    at = f"n_examples={trained + 16}"
    ended = run(*[option for option in options if not option.startswith("local_run_dir")], at, f"resume={tmp_path}/run")
    assert_same_run(ended, run(*options[:-1], at, f"local_run_dir={tmp_path}/straight"))


def test_under_torchrun_a_stop_signal_saves_and_torchrun_decides_the_exit_code(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start([*LONG, *SHARDED, "n_examples=80000", f"local_run_dir={tmp_path}/run"], command)
    wait_for(lambda: has_steps(tmp_path / "run", 5))
    process.terminate()
    output, _ = process.communicate(timeout=45)
    trained = logs_of(tmp_path / "run", "train")[-1]["counters/examples"]
    assert process.returncode == 1 and os.readlink(tmp_path / "run" / "LATEST") == f"step-{trained}", output


def test_a_full_disk_leaves_the_last_checkpoint_intact(ranks, tmp_path):
    """A limit on the size of files stands in for a full disk: every rank ends with a one-line error, the last checkpoint stays intact."""
    options = [*LONG, *SHARDED, "nproc_per_node=2", f"local_run_dir={tmp_path}/run"]
    short_run = ranks(2).run(*options, "n_examples=16")
    size = max(path.stat().st_size for path in short_run.rglob("*") if path.is_file())
    command = f"ulimit -f {size // 2048}; exec {sys.executable} -u {ROOT}/train.py {' '.join([*QUIET, *options[:-1]])} resume={short_run}"
    done = subprocess.run(["bash", "-c", f"trap '' XFSZ; {command}"], capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "could not be written" in errors[0] and "the last checkpoint is untouched" in errors[0], done.stderr
    assert len(errors) == 2 and errors[1].startswith("error: rank 0")
    assert os.readlink(short_run / "LATEST") == "step-16" and not list(short_run.glob("*.tmp"))


def test_a_stop_signal_to_one_rank_stops_all_and_the_exit_code_says_so(tmp_path):
    """Otherwise a scheduler would take the run for done."""
    process = start([*LONG, *SHARDED, "nproc_per_node=2", "n_examples=80000", f"local_run_dir={tmp_path}/run"])
    wait_for(lambda: has_steps(tmp_path / "run", 5))
    os.kill(ranks_of(tmp_path / "run")[1], signal.SIGTERM)
    output, _ = process.communicate(timeout=45)
    trained = logs_of(tmp_path / "run", "train")[-1]["counters/examples"]
    assert process.returncode == 143 and os.readlink(tmp_path / "run" / "LATEST") == f"step-{trained}", output
    assert f"stopped by SIGTERM; to continue: resume={tmp_path}/run" in output and "Traceback" not in output


def test_a_rank_that_a_launcher_started_tells_it_of_the_stop(tmp_path):
    """Also torchrun, which takes any exit code but 0 for a failure."""
    ranks = start_supervised("train.py", [*QUIET, *LONG, *SHARDED, "n_examples=80000", f"local_run_dir={tmp_path}/run"])
    wait_for(lambda: has_steps(tmp_path / "run", 5))
    ranks[1].terminate()
    assert [(rank.communicate(timeout=60), rank.returncode)[1] for rank in ranks] == [143, 143]


@pytest.mark.parametrize("resume", ["null", "auto"])
def test_two_starts_in_one_folder_at_once(resume, tmp_path):
    """Without resume the second is refused; with resume=auto it waits, and finds the run finished."""
    options = [*LONG, "n_examples=160", f"resume={resume}", f"local_run_dir={tmp_path}/run"]
    processes = [start(options) for _ in range(2)]
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes == ([0, 0] if resume == "auto" else [0, 2]), outputs
    assert ("already holds a run" if resume == "null" else "no batch is left") in "".join(outputs)
    assert not list((tmp_path / "run").glob("*.old"))
    assert_same_run(tmp_path / "run", run(*LONG, "n_examples=160", f"local_run_dir={tmp_path}/straight"))


def test_a_quote_in_the_name_of_the_runs_folder(tmp_path, monkeypatch):
    """The ranks are told the folder on their command line."""
    (place := tmp_path / "ann's \\'runs' (1) = é").mkdir()
    quoted = override("local_dirs", str(place)).partition("=")[2]
    told = []
    monkeypatch.setattr(train, "start_ranks", lambda n, script, overrides, config: told.append(compose(*overrides).local_run_dir))
    assert [str(run(*LONG, *SHARDED, "nproc_per_node=2", f"local_dirs=[{quoted}]"))] == told and told[0].startswith(f"{place}/")


def test_metrics_that_cannot_be_written_end_all_ranks_in_a_line(tmp_path):
    """Somebody has moved the run's folder."""
    options = [*QUIET, *LONG, *SHARDED, "debug=true", "n_examples=80000", f"local_run_dir={tmp_path}/run"]
    ranks = start_supervised("train.py", options)
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    os.rename(tmp_path / "run", tmp_path / "moved")
    outputs = [rank.communicate(timeout=90)[0] for rank in ranks]
    errors = [line for output in outputs for line in output.splitlines() if line.startswith("error: ")]
    assert [rank.returncode for rank in ranks] == [1, 1] and len(errors) == 1, outputs
    assert errors[0].startswith(f"error: {tmp_path}/run/metrics.jsonl cannot be written (No such file or directory)")
    assert not any("Traceback" in output for output in outputs)
