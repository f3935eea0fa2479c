"""Starting ranks, or joining those that a launcher has started: what is refused, and where the ranks meet."""

import os
import socket
from pathlib import Path

import pytest
from helpers import DATA, SHARDED, compose, run

from tdpo.distributed import launch
from tdpo.distributed.launch import first_node
from tdpo.utils import UserError


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["nproc_per_node=2", "batch_size=6", "gradient_accumulation_steps=2"], "batch_size=6 is not divisible by 2 processes x"),
        (["nproc_per_node=4", "batch_size=2"], "batch_size=2 is not divisible by 4 processes x gradient_accumulation_steps=1"),
        (["nproc_per_node=2", "parallel.replicas=3"], "parallel.replicas=3 does not divide the number of processes, 2"),
    ],
)
def test_indivisible_values_are_refused_before_anything_starts(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(*DATA, *SHARDED, *arguments, f"local_run_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"fsdp_port={port} cannot be used \(Address already in use\); fsdp_port=null picks a free"):
            run(*DATA, *SHARDED, "nproc_per_node=2", f"fsdp_port={port}", f"local_run_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_our_store_listens_only_on_the_loopback_interface():
    store = launch._loopback_store(2, None)
    listening = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]]
    addresses = [fields[1] for fields in listening if fields[3] == "0A" and fields[1].endswith(f":{store.port:04X}")]
    assert addresses == [f"0100007F:{store.port:04X}"]


@pytest.mark.parametrize(
    "nodes,first", [("gpu7", "gpu7"), ("gpu[003-005,9],x", "gpu003"), ("a-1,b[1-2]", "a-1"), ("c[12,14]", "c12"), ("n-[1-2]-x", "n-1-x")]
)
def test_the_first_node_of_a_slurm_list(nodes, first):
    assert first_node(nodes) == first


def test_the_environment_of_slurm(monkeypatch, tmp_path):
    """One task is a single process; several tasks are ranks that meet on the first node."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not launch.is_rank()
    for name, value in {"STEP_NUM_TASKS": "4", "LOCALID": "1", "STEP_NODELIST": "gpu[07-08]", "JOB_ID": "42"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert launch.is_rank() and launch.own_rank() == 3
    assert launch.processes_to_start(compose("exp_name=x", "trainer=FSDPTrainer", "nproc_per_node=4")) == 1
    launch._use_slurm()
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "15042"}
    assert {name: os.environ[name] for name in expected} == expected
