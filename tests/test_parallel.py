"""Several processes: the same trajectory as one, on gloo as on NCCL, and what happens where one of them is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional

import pytest
import torch
from conftest import DATA, MINI, PREFERENCE, QUIET, ROOT, compose, logs_of, run, run_together, weights_of
from test_golden_runs import assert_same_logs, overrides

from tdpo.distributed import launch
from tdpo.distributed.launch import first_node
from tdpo.utils import RunError, UserError

SHARDED = ["trainer=FSDPTrainer"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STANDALONE = [*TORCHRUN, "--standalone", "--nproc-per-node=2"]


def golden(name: str) -> tuple[dict, list[str]]:
    """A recorded run, and its command line."""
    recorded = json.loads((MINI / f"{name}.json").read_text())
    return recorded, overrides(recorded, MINI, MINI / "model", MINI / "data")


def start(arguments: list[str], program=(sys.executable, "-u"), env: Optional[dict] = None) -> subprocess.Popen:
    command = [*program, str(ROOT / "train.py"), *QUIET, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def ranks_of(folder: Path) -> dict[int, int]:
    """Process ids by rank of the processes that train into a folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                environment = dict(entry.split(b"=", 1) for entry in (process / "environ").read_bytes().split(b"\0") if b"=" in entry)
                if b"RANK" in environment:
                    found[int(environment[b"RANK"])] = int(process.name)
        except OSError:  # it has ended
            continue
    return found


def wait_for(condition, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def has_steps(folder: Path, n: int) -> bool:
    return (folder / "metrics.jsonl").exists() and len(logs_of(folder, "train")) >= n


TENSOR = ["trainer=TensorParallelTrainer"]
LOW_PRECISION = [*PREFERENCE, "n_examples=8", "model.fsdp_policy_mp=bfloat16"]
EXACT = [*PREFERENCE, "optimizer=SGD", "lr=0.1", "warmup_steps=0", "model.policy_dtype=float64", "do_first_eval=false"]
EXACT += ["batch_size=40", "drop_last=false", "gradient_accumulation_steps=5", "n_eval_examples=3"]
SAMPLING = [*PREFERENCE, "n_examples=8", "sample_during_eval=true", "n_eval_model_samples=6", "eval_batch_size=5"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """A folder with runs by name, of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    halves = {
        f"bfloat16-{whole}": [*SHARDED, "gradient_accumulation_steps=4", f"parallel.reduce_once_a_step={whole}"] for whole in (True, False)
    }
    runs = {
        "sft": [*golden("sft")[1], *SHARDED],
        "tdpo2": [*golden("tdpo2")[1], *SHARDED, "tokens_per_microbatch=300", "activation_checkpointing=true"],
        "tensor": [*golden("tdpo2")[1], *TENSOR, "reference_cache=true"],
        **{name: [*LOW_PRECISION, *options] for name, options in halves.items()},
        "bfloat16-tensor": [*LOW_PRECISION, *TENSOR, "sample_during_eval=true", "n_eval_model_samples=3"],
        "samples": [*SAMPLING, *SHARDED],
    }
    run_together([[*options, f"local_run_dir={folder}/{name}", f"local_dirs=[{folder}]"] for name, options in runs.items()], 2, folder)
    return folder


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    hybrid = [*SHARDED, "eval_batch_size=5", "parallel.replicas=2", "parallel.reduce_once_a_step=false", "reference_cache=true"]
    runs = {"tdpo2": [*golden("tdpo2")[1], *hybrid], "exact": [*EXACT, *SHARDED]}
    run_together([[*options, f"local_run_dir={folder}/{name}", f"local_dirs=[{folder}]"] for name, options in runs.items()], 4, folder)
    return folder


@pytest.mark.parametrize("n", [1, 2])
def test_the_recorded_run_in_processes_that_it_starts(n, tmp_path):
    recorded, arguments = golden("tdpo2")
    assert_same_logs(recorded, run(*arguments, *SHARDED, f"nproc_per_node={n}", f"local_run_dir={tmp_path}/run"))


@pytest.mark.parametrize("name", ["sft", "tdpo2", "tensor"])
def test_the_recorded_runs_under_torchrun(name, two_ranks):
    assert_same_logs(golden("tdpo2" if name == "tensor" else name)[0], two_ranks / name)


def test_the_recorded_run_on_four_ranks(four_ranks):
    """As two replicas of two shards. Five eval pairs a batch: ranks without a row take part."""
    assert_same_logs(golden("tdpo2")[0], four_ranks / "tdpo2")


def test_sharded_models_of_every_family():
    """Gradients in float64 against the same model in one piece: shards, replicas, tensor parallelism where Transformers has a plan."""
    command = [*STANDALONE, str(ROOT / "tests" / "sharded_families.py"), "shard", "hybrid", "tensor"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("equal") for line in lines) == 7 + 7 + 5, done.stdout
    for family, model in (("gpt2", "GPT2LMHeadModel"), ("gptj", "GPTJForCausalLM")):
        assert f"refused {family} trainer=TensorParallelTrainer: Transformers has no plan that splits the layers of {model}" in done.stdout


def test_weights_do_not_depend_on_the_number_of_ranks(four_ranks, tmp_path):
    """Batches of 40, 40 and 16 pairs, the last cut into 20 parts of which four are empty: SGD in float64 hides nothing."""
    one, four = run(*EXACT, f"local_run_dir={tmp_path}/one"), four_ranks / "exact"
    assert weights_of(four).keys() == weights_of(one).keys()
    for name, tensor in weights_of(one).items():
        torch.testing.assert_close(weights_of(four)[name], tensor, rtol=0, atol=1e-12)
    for ours, theirs in zip(logs_of(one), logs_of(four), strict=True):
        numbers = {name: value for name, value in ours.items() if name not in ("split", "examples_per_second")}
        assert {name: theirs[name] for name in numbers} == pytest.approx(numbers, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("whole", [True, False])
def test_mixed_precision_is_that_of_one_device(whole, two_ranks, tmp_path):
    """bfloat16 copies compute, float32 weights are trained, gradients are summed in float32: with the same microbatches (and threads, by
    whose number bfloat16 kernels round) the gradient's norm is the same to float32's rounding; a sum in bfloat16 is off by 1e-5."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run(*LOW_PRECISION, "gradient_accumulation_steps=8", f"local_run_dir={tmp_path}/one")
    finally:
        torch.set_num_threads(threads)
    two = two_ranks / f"bfloat16-{whole}"
    assert logs_of(two, "eval")[0]["kl_eval/chosen"] == 0 and all(tensor.dtype == torch.float32 for tensor in weights_of(two).values())
    ours, theirs = (logs_of(folder, "train")[0]["grad_norm"] for folder in (one, two))
    assert theirs == pytest.approx(ours, rel=1e-6)


def test_tensor_parallelism_computes_in_bfloat16_and_samples(two_ranks):
    run_dir = two_ranks / "bfloat16-tensor"
    assert logs_of(run_dir, "eval")[0]["kl_eval/chosen"] == 0
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and len({row["prompt"] for row in rows}) == 3 and all(row["policy"] for row in rows)


def test_a_step_that_is_not_finite_names_examples_and_ranks(tmp_path, capfd):
    options = [*DATA, *SHARDED, "nproc_per_node=2", "optimizer=SGD", "lr=1e30", "warmup_steps=0", "max_grad_norm=1e30"]
    with pytest.raises(RunError, match="rank 0 .* ended with exit code 1"):
        run(*options, "n_examples=32", f"local_run_dir={tmp_path}/run")
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "is not finite" in line]
    assert line.startswith("error: step 2: the loss is not finite; examples hh:")
    assert "(rank 0); hh:" in line and line.endswith("(rank 1)") and line.count("hh:") == 8
    assert [log["counters/examples"] for log in logs_of(tmp_path / "run", "train")] == [8]


def test_samples_of_several_ranks(two_ranks, tmp_path):
    """Every prompt once, in order, in batches that leave a rank without one; texts of different lengths end together."""
    one, two = run(*SAMPLING, f"local_run_dir={tmp_path}/one"), two_ranks / "samples"
    ours, theirs = ([json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()] for folder in (one, two))
    assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs] and len(ours) == 12
    texts = [row["policy"].removeprefix(row["prompt"]) for row in theirs]
    assert len(set(texts)) == len(texts) and len({len(text.split()) for text in texts}) > 3


def test_two_nodes(tmp_path):
    """Two launchers that know of each other by address alone. When one rank is killed, the other node's names it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*DATA, *SHARDED, "n_epochs=1000", f"local_run_dir={tmp_path}/run"]
    nodes = []
    for rank in (0, 1):
        place = [f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        nodes.append(start(arguments, [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", *place]))
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    os.kill(ranks_of(tmp_path / "run")[1], signal.SIGKILL)
    outputs = [node.communicate(timeout=60)[0] for node in nodes]
    assert all(node.returncode != 0 for node in nodes)
    assert "error: rank 0: no sign of life of rank 1; what was saved is kept" in outputs[0]
    assert ranks_of(tmp_path / "run") == {}


def test_a_rank_that_is_killed_ends_the_run_and_is_named(tmp_path):
    process = start([*DATA, *SHARDED, "nproc_per_node=2", "n_epochs=1000", f"local_run_dir={tmp_path}/run"])
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    os.kill(ranks_of(tmp_path / "run")[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(errors) == 1 and errors[0].startswith("error: rank 1 (process "), output
    assert "was killed by SIGKILL" in errors[0] and ranks_of(tmp_path / "run") == {}


def start_unsupervised(arguments: list[str]) -> list[subprocess.Popen]:
    """Two ranks that no launcher watches, as under srun: rank 0 has the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [start(arguments, env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]


def test_the_end_of_the_process_that_has_the_rendezvous_is_noticed(tmp_path):
    ranks = start_unsupervised([*DATA, *SHARDED, "n_epochs=1000", f"local_run_dir={tmp_path}/run"])
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    ranks[0].kill()
    output, _ = ranks[1].communicate(timeout=60)
    ranks[0].communicate()
    assert ranks[1].returncode == 1 and "error: rank 1: " in output and "Traceback" not in output, output
    assert "no sign of life of rank 0" in output or "the rendezvous is gone: rank 0" in output


def test_a_signal_ends_unsupervised_ranks_with_its_number(tmp_path):
    """So that a Slurm script can tell a run that stopped from one that ended."""
    ranks = start_unsupervised([*DATA, *SHARDED, "n_epochs=1000", f"local_run_dir={tmp_path}/run"])
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    ranks[1].send_signal(signal.SIGUSR1)
    assert [(rank.communicate(timeout=60), rank.returncode)[1] for rank in ranks] == [138, 138]
    assert (tmp_path / "run" / "LATEST" / "policy.pt").exists()


def test_a_rank_that_hangs_is_named(tmp_path):
    arguments = [*DATA, *SHARDED, "n_epochs=1000", "parallel.timeout_secs=3", f"local_run_dir={tmp_path}/run"]
    ranks = start_unsupervised(arguments)
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    ranks[1].send_signal(signal.SIGSTOP)
    output, _ = ranks[0].communicate(timeout=60)
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 1 and "error: rank 0: no sign of life of rank 1" in output and "Traceback" not in output, output


def test_no_rank_outlives_its_launcher(tmp_path):
    process = start([*DATA, *SHARDED, "nproc_per_node=2", "n_epochs=1000", f"local_run_dir={tmp_path}/run"])
    wait_for(lambda: has_steps(tmp_path / "run", 3))
    process.kill()
    wait_for(lambda: not ranks_of(tmp_path / "run"), 30)
    process.communicate()


def test_an_error_of_one_rank_is_shown_once(tmp_path, monkeypatch, capfd):
    """Data that are wrong are read by one rank, and end all."""
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    data = ["datasets=[jsonl]", f"datasets.jsonl.path={tmp_path}/bad.jsonl"]
    with pytest.raises(SystemExit) as exit:
        run(*data, *SHARDED, "nproc_per_node=2", f"local_run_dir={tmp_path}/run")
    assert exit.value.code == 2
    assert capfd.readouterr().err.count("bad.jsonl") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["nproc_per_node=2", "batch_size=6", "gradient_accumulation_steps=2"], "batch_size=6 does not divide by 2 processes x"),
        (["nproc_per_node=4", "batch_size=2"], "batch_size=2 does not divide by 4 processes x gradient_accumulation_steps=1"),
        (["nproc_per_node=2", "parallel.replicas=3"], "parallel.replicas=3 does not divide 2 processes"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_starts(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(*DATA, *SHARDED, *arguments, f"local_run_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"fsdp_port={port} cannot be used \(Address already in use\): null takes one that is free"):
            run(*DATA, *SHARDED, "nproc_per_node=2", f"fsdp_port={port}", f"local_run_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_a_single_trainer_under_a_launcher_is_refused(tmp_path):
    process = start([*DATA, f"local_run_dir={tmp_path}/run"], STANDALONE)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and output.count("error: trainer=BasicTrainer is one process, and this is one of several") == 1
    assert not (tmp_path / "run").exists()


def test_our_rendezvous_listens_on_the_loopback_interface_alone():
    store = launch._loopback_store(2, None)
    listening = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]]
    addresses = [fields[1] for fields in listening if fields[3] == "0A" and fields[1].endswith(f":{store.port:04X}")]
    assert addresses == [f"0100007F:{store.port:04X}"]


@pytest.mark.parametrize(
    "nodes,first", [("gpu7", "gpu7"), ("gpu[003-005,9],x", "gpu003"), ("a-1,b[1-2]", "a-1"), ("c[12,14]", "c12"), ("n-[1-2]-x", "n-1-x")]
)
def test_the_first_node_of_a_slurm_list(nodes, first):
    assert first_node(nodes) == first


def test_a_world_that_slurm_made(monkeypatch, tmp_path):
    """One task is a process by itself; several find each other at the first node."""
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
