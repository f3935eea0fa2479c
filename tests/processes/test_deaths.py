"""Processes that are started, killed, stopped or hang: what the other ranks do, and what is printed."""

import json
import os
import signal

import pytest
from helpers import (
    DATA,
    QUIET,
    SHARDED,
    TORCHRUN,
    assert_recorded_logs,
    free_port,
    has_steps,
    ranks_of,
    recorded,
    run,
    start,
    start_supervised,
    start_unsupervised,
    wait_for,
)

pytestmark = pytest.mark.processes


def test_ranks_started_by_train_py_repeat_the_recorded_run(tmp_path):
    golden, arguments = recorded("tdpo2")
    assert_recorded_logs(golden, run(*arguments, *SHARDED, "nproc_per_node=2", f"local_run_dir={tmp_path}/run"))


def test_two_nodes(tmp_path):
    """Two launchers that know each other only by address. When the rank of one is killed, the rank of the other names it."""
    port = free_port()
    arguments = [*DATA, *SHARDED, "n_epochs=1000", f"local_run_dir={tmp_path}/run"]
    nodes = []
    for rank in (0, 1):
        place = [f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        nodes.append(start(arguments, [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", *place]))
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    os.kill(ranks_of(tmp_path / "run")[1], signal.SIGKILL)
    outputs = [node.communicate(timeout=60)[0] for node in nodes]
    assert all(node.returncode != 0 for node in nodes)
    assert "error: rank 0: no heartbeat from rank 1; saved checkpoints are kept" in outputs[0]
    assert ranks_of(tmp_path / "run") == {}


def test_a_rank_that_is_killed_ends_the_run_and_is_named(tmp_path):
    process = start([*DATA, *SHARDED, "nproc_per_node=2", "n_epochs=1000", f"local_run_dir={tmp_path}/run"])
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    os.kill(ranks_of(tmp_path / "run")[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and errors[-1].startswith("error: rank 1 (process "), output
    assert all(line.startswith("error: rank 0: no heartbeat from rank 1") for line in errors[:-1]), output  # where it was quicker
    assert "was killed by SIGKILL" in errors[-1] and ranks_of(tmp_path / "run") == {}


def test_the_death_of_the_rank_that_holds_the_store_is_noticed(tmp_path):
    ranks = start_unsupervised("train.py", [*QUIET, *DATA, *SHARDED, "n_epochs=1000", f"local_run_dir={tmp_path}/run"])
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    ranks[0].kill()
    output, _ = ranks[1].communicate(timeout=60)
    ranks[0].communicate()
    assert ranks[1].returncode == 1 and "error: rank 1: " in output and "Traceback" not in output, output
    assert "no heartbeat from rank 0" in output or "the rendezvous store is gone: rank 0" in output


def test_a_signal_ends_unsupervised_ranks_with_its_number(tmp_path):
    """The exit code is 128 + signal, so that a Slurm script can tell a stopped run from a finished one."""
    ranks = start_unsupervised("train.py", [*QUIET, *DATA, *SHARDED, "n_epochs=1000", f"local_run_dir={tmp_path}/run"])
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    ranks[1].send_signal(signal.SIGUSR1)
    assert [(rank.communicate(timeout=60), rank.returncode)[1] for rank in ranks] == [138, 138]
    assert (tmp_path / "run" / "LATEST" / "policy.pt").exists()


def test_a_rank_that_hangs_is_named(tmp_path):
    arguments = [*DATA, *SHARDED, "n_epochs=1000", "parallel.timeout_secs=3", f"local_run_dir={tmp_path}/run"]
    ranks = start_unsupervised("train.py", [*QUIET, *arguments])
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    ranks[1].send_signal(signal.SIGSTOP)
    output, _ = ranks[0].communicate(timeout=60)
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 1 and "error: rank 0: no heartbeat from rank 1" in output and "Traceback" not in output, output


def test_no_rank_outlives_its_launcher(tmp_path):
    process = start([*DATA, *SHARDED, "nproc_per_node=2", "n_epochs=1000", f"local_run_dir={tmp_path}/run"])
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    process.kill()
    wait_for(lambda: not ranks_of(tmp_path / "run"), 30)
    process.communicate()


def test_an_error_of_one_rank_is_shown_once(tmp_path, monkeypatch, capfd):
    """Only rank 0 reads the data; if they are invalid, all ranks end and one error is printed."""
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    data = ["datasets=[jsonl]", f"datasets.jsonl.path={tmp_path}/bad.jsonl"]
    with pytest.raises(SystemExit) as exit:
        run(*data, *SHARDED, "nproc_per_node=2", f"local_run_dir={tmp_path}/run")
    assert exit.value.code == 2
    assert capfd.readouterr().err.count("bad.jsonl") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("start_as", [start_unsupervised, start_supervised])
def test_a_single_trainer_under_a_launcher_is_refused(start_as, tmp_path):
    ranks = start_as("train.py", [*QUIET, *DATA, f"local_run_dir={tmp_path}/run"])
    output = "".join(rank.communicate(timeout=60)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert output.count("error: trainer=BasicTrainer runs in one process, but this one is one of several") == 1
    assert not (tmp_path / "run").exists()
