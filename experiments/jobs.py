"""Run the jobs of an experiment: several at a time, each a list of scripts with their output in logs/, under one progress bar."""

import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import tqdm

from experiments.scripts import run_script, send_to_scripts
from tdpo.distributed.signals import forwarded


class Step(NamedTuple):
    """One subprocess of the experiment."""

    name: str  # also the name of its log
    command: list[str]  # script and arguments


def slug(name: str) -> str:
    """Return a method's name as part of a path."""
    return name.lower().replace(" ", "_")


def run_jobs(title: str, jobs: Sequence[Sequence[Step]], workers: int, out: Path, marks: Sequence[str], total: int) -> list[str]:
    """Run the jobs, `workers` at a time, each with its share of the CPU cores or with one GPU.

    Args:
        title: label of the progress bar.
        jobs: the steps of each job, run one after another; steps after a failed one are still run.
        workers: number of jobs at the same time.
        out: folder of the experiment.
        marks: glob patterns in `out`; the number of matching files is the progress.
        total: that number at the end.

    Returns:
        the names of the steps that failed.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    failed = []

    def work(worker: int) -> None:
        environment = environment_of(worker, workers)
        while not received:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            failed.extend(step.name for step in job if not received and ended_badly(step, out, environment))

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(workers)]
    with forwarded(send_to_scripts) as received, tqdm.tqdm(total=total, desc=title, disable=None) as progress:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.5)
            progress.update(sum(len(list(out.glob(mark))) for mark in marks) - progress.n)
    if received:
        sys.exit(128 + received[0])  # the same command resumes
    return failed


def environment_of(worker: int, workers: int) -> dict[str, str]:
    """Return the environment of a worker: its number of CPU threads and, if there are GPUs, its GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers))}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[worker % len(visible)]
    return environment


def ended_badly(step: Step, out: Path, environment: dict[str, str]) -> bool:
    """Run a step with its output in logs/<name>.log. Return whether it failed."""
    script, *arguments = step.command
    try:
        with open(out / "logs" / f"{step.name}.log", "w") as log:
            return run_script(script, *arguments, output=log, environment=environment) != 0
    except OSError as error:  # a full disk
        print(f"{step.name}: {error}", file=sys.stderr)
        return True
