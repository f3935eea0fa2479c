"""The processes of a run: starting them on this machine, or joining those that torchrun or Slurm has started."""

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
    """Whether a launcher (torchrun, srun or start_ranks) has started this process as one of several."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def is_supervised() -> bool:
    """Whether torchrun or start_ranks has started this process; they take any exit code but 0 for a failure."""
    return "TORCHELASTIC_USE_AGENT_STORE" in os.environ


def own_rank() -> int:
    """Of this process, also before it has joined the others."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID" if is_rank() else "", 0))


def processes_to_start(config: DictConfig) -> int:
    """How many processes this machine needs, this one being none of them; 1 where this one is enough, or is one of several already."""
    if config.trainer == "BasicTrainer" or is_rank():
        return 1
    gpus = torch.cuda.device_count()
    if gpus and (config.nproc_per_node or 1) > gpus:
        raise UserError(f"nproc_per_node={config.nproc_per_node}: this machine has {gpus} visible GPUs")
    return config.nproc_per_node or gpus or 1


def start_ranks(n: int, script: str, overrides: Sequence[str], config: DictConfig) -> None:
    """Run a script in n processes on this machine until all have ended.

    They meet at a loopback socket that this process holds; what they print goes where this process's own output does. Where one fails the
    others are ended; a signal goes on to them, so that they save and end.

    Args:
        script: path of the command that is this process too.
        overrides: of the command line.
        config: what they make.

    Raises:
        UserError: the port is in use, or the config does not suit n processes.
        RunError: a process failed.
        SystemExit: with 2, where one found a user's mistake, which it has explained.
        Stopped: a signal came.
    """
    _check_division(config, n)
    store = _loopback_store(n, config.fsdp_port)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a failure is reported below
    logs = tempfile.TemporaryDirectory()  # nothing is written there, but PyTorch wants one
    before = {signum: signal.getsignal(signum) for signum in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT)}
    processes = start_processes(
        name=os.path.basename(script),
        entrypoint=sys.executable,
        args={rank: ("-u", script, *overrides) for rank in range(n)},
        envs={rank: rank_environment(rank, n, store.port) for rank in range(n)},
        logs_specs=DefaultLogsSpecs(log_dir=logs.name),
    )
    for signum, handler in before.items():  # start_processes has set its own
        signal.signal(signum, handler)

    def send(signum: int) -> None:
        for pid in processes.pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    with forwarded(send) as received:
        try:
            while (result := processes.wait(timeout=0)) is None:
                time.sleep(0.2)
        finally:
            processes.close(signal.SIGKILL)
            logs.cleanup()
    if received and all(failure.exitcode in [-signum for signum in received] for failure in result.failures.values()):
        raise Stopped(received[0])  # saved, or ended before there was anything to save
    if result.is_failed():
        rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
        if failure.exitcode == 2:  # a mistake, which that rank has explained
            sys.exit(2)
        raise RunError(_describe(rank, failure))


def rank_environment(rank: int, n: int, port: int) -> dict[str, str]:
    """What a launcher sets for one of n processes on this machine, which meet at a loopback port that it holds."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher has the store
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", LOOPBACK),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n))),
    }


def _loopback_store(n: int, port: Optional[int]) -> dist.TCPStore:
    """Where the processes meet. PyTorch's own socket would listen on every interface."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port or 0))
        listener.listen(4 * n)
    except OSError as error:
        raise UserError(f"fsdp_port={port} cannot be used ({error.strerror}): null takes one that is free") from None
    port = listener.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())


def _describe(rank: int, failure: ProcessFailure) -> str:
    how = f"was killed by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
    return f"rank {rank} (process {failure.pid}) {how}; the others were ended, what was saved is kept"


def _use_slurm() -> None:
    """What torchrun sets, from what srun does: one process a task, met at the first node."""
    job = os.environ
    nodes = job.get("SLURM_STEP_NODELIST", job.get("SLURM_NODELIST", "127.0.0.1"))
    job["RANK"], job["WORLD_SIZE"], job["LOCAL_RANK"] = job["SLURM_PROCID"], job["SLURM_STEP_NUM_TASKS"], job["SLURM_LOCALID"]
    job.setdefault("MASTER_ADDR", first_node(nodes))
    job.setdefault("MASTER_PORT", str(15_000 + int(job.get("SLURM_JOB_ID", 0)) % 20_000))


def first_node(nodes: str) -> str:
    """The first name of Slurm's list: 'gpu[003-005,9],x' to 'gpu003'."""
    name = re.match(r"([^\[,]|\[[^\]]*\])*", nodes).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", name)


@contextmanager
def join_ranks(config: DictConfig) -> Iterator[World]:
    """The world of this process: alone, or with the others that its launcher has started.

    Raises:
        UserError: the world does not suit the config.
    """
    if config.trainer == "BasicTrainer":
        if is_rank() and int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
            raise UserError("trainer=BasicTrainer is one process, and this is one of several: trainer=FSDPTrainer")
        yield World()
        return
    with process_group(config.parallel.timeout_secs) as world:
        world.from_first(lambda: _check_division(config, world.size))
        yield world


@contextmanager
def process_group(timeout_secs: int) -> Iterator[World]:
    """This process with the others that its launcher has started; a world of one where none has.

    Args:
        timeout_secs: to wait for the others within a step.
    """
    if is_rank() and "RANK" not in os.environ:
        _use_slurm()
    cuda = torch.cuda.is_available()
    # Where each task sees its own GPU alone, that is number 0.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    arguments = {"backend": "cpu:gloo,cuda:nccl" if cuda else "gloo", "timeout": timedelta(seconds=timeout_secs)}
    if not is_rank():  # a world of one: no socket that others could reach
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        arguments |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**arguments)
    world = World(dist.get_rank(), dist.get_world_size(), device, timeout_secs)
    leave = world.size == 1  # else only in good order: a process that fails must not wait for the others
    try:
        yield world
        leave = True
    except Stopped:
        leave = True
        raise
    finally:
        if leave:
            dist.destroy_process_group()


def _check_division(config: DictConfig, n: int) -> None:
    """Values that must go together with the number of processes."""
    replicas, microbatches = config.parallel.replicas, config.gradient_accumulation_steps
    if n % replicas:
        raise UserError(f"parallel.replicas={replicas} does not divide {n} processes")
    if config.trainer == "FSDPTrainer" and config.tokens_per_microbatch is not None:
        if config.batch_size < n:
            raise UserError(f"batch_size={config.batch_size} is less than the {n} processes: some would have nothing to do")
    elif config.trainer == "FSDPTrainer" and config.batch_size % (n * microbatches):
        nearest = max(1, round(config.batch_size / (n * microbatches))) * n * microbatches
        raise UserError(
            f"batch_size={config.batch_size} does not divide by {n} processes x gradient_accumulation_steps={microbatches}: "
            f"each process takes equally many pairs of every microbatch; {nearest} would do"
        )
