"""Start the processes (ranks) of a run on this machine, or join those that torchrun or Slurm has started."""

import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Optional

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tdpo.distributed.signals import STOP_SIGNALS, forwarded
from tdpo.distributed.world import World
from tdpo.utils import RunError, Stopped, UserError

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def is_rank() -> bool:
    """Whether a launcher (torchrun, srun or start_ranks) started this process as a rank."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def is_supervised() -> bool:
    """Whether torchrun or start_ranks started this process; both treat any exit code except 0 as a failure."""
    return "TORCHELASTIC_USE_AGENT_STORE" in os.environ


def own_rank() -> int:
    """Return the rank of this process, even before it has joined the others."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID" if is_rank() else "", 0))


def processes_to_start(config: DictConfig) -> int:
    """Return the number of ranks to start on this machine; 1 if this process trains itself (one device, or already started by a launcher).

    Raises:
        UserError: nproc_per_node exceeds the number of visible GPUs.
    """
    if config.trainer == "BasicTrainer" or is_rank():
        return 1
    gpus = torch.cuda.device_count()
    if gpus and (config.nproc_per_node or 1) > gpus:
        raise UserError(f"nproc_per_node={config.nproc_per_node}: this machine has {gpus} visible GPUs; use null for one process per GPU")
    return config.nproc_per_node or gpus or 1


def start_ranks(n: int, script: str, overrides: Sequence[str], config: DictConfig) -> None:
    """Run a script as n ranks on this machine and wait until all have ended.

    The ranks meet at a store on the loopback interface, held by this process, and share its standard output and error. If one fails, the
    others are killed. Stop signals are forwarded to the ranks, which save a checkpoint and exit.

    Args:
        n: number of ranks.
        script: path of the script, which this process runs too.
        overrides: the command line's.
        config: the config composed with them.

    Raises:
        UserError: the port is in use, or the config does not suit n processes.
        RunError: a rank failed.
        SystemExit: code 2, if a rank found invalid input; that rank has printed the error.
        Stopped: the ranks ended because of a signal.
    """
    _check_division(config, n)
    store = _loopback_store(n, config.fsdp_port)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a failure is reported below
    logs = tempfile.TemporaryDirectory()  # PyTorch requires a folder, although nothing is written to it
    before = {signum: signal.getsignal(signum) for signum in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT)}
    processes = start_processes(
        name=os.path.basename(script),
        entrypoint=sys.executable,
        args={rank: ("-u", script, *overrides) for rank in range(n)},
        envs={rank: rank_environment(rank, n, store.port) for rank in range(n)},
        logs_specs=DefaultLogsSpecs(log_dir=logs.name),
    )

    def send(signum: int) -> None:
        for pid in processes.pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    try:
        with forwarded(send) as received:
            for signum in (signal.SIGHUP, signal.SIGQUIT):  # start_processes has set its own handlers
                signal.signal(signum, before[signum])
            while (result := processes.wait(timeout=0)) is None:
                time.sleep(0.2)
    finally:
        processes.close(signal.SIGKILL)
        logs.cleanup()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if result.is_failed():
        codes = {failure.exitcode for failure in result.failures.values()}
        for signum in STOP_SIGNALS:
            # The ranks saved a checkpoint, which a signal to one of them also makes them do, or ended before there was anything to save.
            told = {128 + signum} | ({-signum} if received else set())
            if codes & told and codes <= told | {-signal.SIGTERM}:  # with which PyTorch ends the others when the first has ended
                raise Stopped(signum)
        rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
        if failure.exitcode == 2:  # invalid input, which that rank has reported
            sys.exit(2)
        raise RunError(_describe(rank, failure))


def rank_environment(rank: int, n: int, port: int) -> dict[str, str]:
    """Return the environment variables of one of n ranks on this machine, whose launcher holds the store at a loopback port."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher holds the store
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", LOOPBACK),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n))),
    }


def _loopback_store(n: int, port: Optional[int]) -> dist.TCPStore:
    """Create the store at which n ranks meet, on the loopback interface only: PyTorch's own socket would listen on every interface."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port or 0))
        listener.listen(4 * n)
    except OSError as error:
        raise UserError(f"fsdp_port={port} cannot be used ({error.strerror}); fsdp_port=null picks a free port") from None
    port = listener.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())


def _describe(rank: int, failure: ProcessFailure) -> str:
    how = f"was killed by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
    return f"rank {rank} (process {failure.pid}) {how}; the other ranks were stopped, saved checkpoints are kept"


def _use_slurm() -> None:
    """Set torchrun's environment variables from srun's: one rank per task, with the store on the first node."""
    job = os.environ
    nodes = job.get("SLURM_STEP_NODELIST", job.get("SLURM_NODELIST", "127.0.0.1"))
    job["RANK"], job["WORLD_SIZE"], job["LOCAL_RANK"] = job["SLURM_PROCID"], job["SLURM_STEP_NUM_TASKS"], job["SLURM_LOCALID"]
    job.setdefault("MASTER_ADDR", first_node(nodes))
    job.setdefault("MASTER_PORT", str(15_000 + int(job.get("SLURM_JOB_ID", 0)) % 20_000))


def first_node(nodes: str) -> str:
    """Return the first host name of a Slurm node list: 'gpu003' for 'gpu[003-005,9],x'."""
    name = re.match(r"([^\[,]|\[[^\]]*\])*", nodes).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", name)


@contextmanager
def join_ranks(config: DictConfig) -> Iterator[World]:
    """Yield the World of this process: alone, or with the other ranks that its launcher started.

    Raises:
        UserError: the config does not suit the number of processes.
    """
    if config.trainer == "BasicTrainer":
        if is_rank() and int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
            raise UserError("trainer=BasicTrainer runs in one process, but this one is one of several; use trainer=FSDPTrainer")
        yield World()
        return
    with process_group(config.parallel.timeout_secs) as world:
        world.from_first(lambda: _check_division(config, world.size))
        yield world


@contextmanager
def process_group(timeout_secs: int) -> Iterator[World]:
    """Join the ranks that this process's launcher started, and yield their World; without a launcher, a World of one process.

    Args:
        timeout_secs: seconds to wait for the other ranks within a step.
    """
    if is_rank() and "RANK" not in os.environ:
        _use_slurm()
    cuda = torch.cuda.is_available()
    # If each task sees only its own GPU, that GPU is number 0.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    arguments = {"backend": "cpu:gloo,cuda:nccl" if cuda else "gloo", "timeout": timedelta(seconds=timeout_secs)}
    if not is_rank():  # one process: open no socket that other machines could reach
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        arguments |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**arguments)
    world = World(dist.get_rank(), dist.get_world_size(), device, timeout_secs)
    leave = world.size == 1  # several leave only after success or a stop signal: a failing rank must not wait for the others
    try:
        yield world
        leave = True
    except Stopped:
        leave = True
        with suppress(RuntimeError):
            world.maximum(0)  # all end together: a launcher kills the others as soon as one has ended
        raise
    finally:
        if leave:
            dist.destroy_process_group()


def _check_division(config: DictConfig, n: int) -> None:
    """Raise UserError if the config does not suit n processes."""
    replicas, microbatches = config.parallel.replicas, config.gradient_accumulation_steps
    if n % replicas:
        raise UserError(f"parallel.replicas={replicas} does not divide the number of processes, {n}; use 1 or another divisor of it")
    if config.trainer == "FSDPTrainer" and config.tokens_per_microbatch is not None:
        if config.batch_size < n:
            raise UserError(f"batch_size={config.batch_size} is less than the number of processes, {n}; use a larger batch_size")
    elif config.trainer == "FSDPTrainer" and config.batch_size % (n * microbatches):
        nearest = max(1, round(config.batch_size / (n * microbatches))) * n * microbatches
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by {n} processes x gradient_accumulation_steps={microbatches}; "
            f"use batch_size={nearest}, or tokens_per_microbatch"
        )
